""" Read what `torch.save` wrote: a pickle that describes plain values and tensors, and the bytes of the tensors.

An unpickler calls the functions that a pickle names, with arguments from the pickle. So does torch's unpickler, even
with `weights_only=True`, though only for a list of names. The unpickler in this file calls nothing that a pickle names.
It knows the few names that checkpoints need, and makes a plain value for each: a dict, list, tuple, set, text, bytes,
number, tensor, or an array or number of numpy. This is why

- no list of safe classes is shared between threads,
- no attribute of an object comes from a file,
- no call takes a size from a file, so that a file takes memory in proportion to its own size,
- no private function of torch is needed.

Two containers are read: zip archives, which torch writes since version 1.6, and the older stream of pickles.
"""
import io
import math
import mmap
import pickletools
import re
import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Protocol, Tuple

import numpy as np
import torch

__all__ = ['UnknownName', 'check_plain', 'read_legacy', 'read_zip']

MAX_STEPS = 1_000_000  # steps of a pickle, of about 100 bytes each. A training snapshot of pvt_huge_v2 has 250,000.
MAX_DIRECTORY = 2 ** 23  # bytes of an archive's directory. That of the same snapshot has 0.5 MB.
MAX_DEPTH = 100  # levels of dicts and lists inside of each other
BYTES_PER_ITEM = 64  # memory that an item of a dict or set takes
TEXT_PER_VALUE = 32  # characters that `str` writes for a number, or for brackets and commas

_LEGACY_MAGIC = 0x1950a86a20f9469cfc6c
_LEGACY_PROTOCOL = 1001

_STORAGES = {
    'torch.DoubleStorage': torch.float64,
    'torch.FloatStorage': torch.float32,
    'torch.HalfStorage': torch.float16,
    'torch.BFloat16Storage': torch.bfloat16,
    'torch.LongStorage': torch.int64,
    'torch.IntStorage': torch.int32,
    'torch.ShortStorage': torch.int16,
    'torch.CharStorage': torch.int8,
    'torch.ByteStorage': torch.uint8,
    'torch.BoolStorage': torch.bool,
    'torch.ComplexDoubleStorage': torch.complex128,
    'torch.ComplexFloatStorage': torch.complex64,
    'torch.storage.UntypedStorage': torch.uint8,  # holds types that have no storage class, such as float8
}


class UnknownName(ValueError):
    """A pickle names something that no checkpoint needs. The name is the message."""


@dataclass(frozen=True)
class _Name:
    """A class or function that a pickle names. Nothing is imported."""
    name: str


@dataclass(frozen=True)
class _Storage:
    """Bytes that tensors share, and the type of the values in them."""
    data: torch.UntypedStorage
    dtype: torch.dtype


@dataclass(slots=True)
class _Unfinished:
    """Stands for an object until the pickle gives its state. `finish` then makes a plain value from the state."""
    finish: Callable[[Any], Any]
    value: Any = None
    is_finished: bool = False


class _Storages(Protocol):
    """The source of the bytes of tensors."""

    def get(self, key: str, nbytes: int, dtype: torch.dtype) -> torch.UntypedStorage:
        ...


# ---- containers ------------------------------------------------------------------------------------------------------

class _ArchiveFile(io.BufferedReader):
    """A file that is read in short pieces until its directory is known.

    `zipfile` reads the directory in one piece, and takes about 10 times its bytes in memory.
    """
    longest_piece = MAX_DIRECTORY

    def read(self, size: Optional[int] = -1, /) -> bytes:
        if size is not None and size > self.longest_piece:
            raise ValueError(f'its directory has {size} bytes, more than any checkpoint needs')
        return super().read(size)


def read_zip(path: Path, size: int) -> Any:
    """Return the content of an archive of `torch.save`. Aligned tensors are backed by the file (copy on write).

    Args:
        path: The file.
        size: Its size in bytes.

    Raises:
        UnknownName: The archive needs more than plain values and tensors.
        ValueError: The archive is damaged, or was not made by `torch.save`.
        Exception: Errors of `zipfile`, if the archive is damaged.
    """
    with _ArchiveFile(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
        file.longest_piece = size
        records = {info.filename: info for info in archive.infolist()}
        if any(re.fullmatch(r'[^/]*/constants\.pkl', name) for name in records):
            raise ValueError('it is a TorchScript archive. Save the state_dict() of its model with torch.save')
        _check_records(archive, file, records, size)
        pickles = [name for name in records if re.fullmatch(r'[^/]*/data\.pkl', name)]
        if len(pickles) != 1:
            raise ValueError(f'expected one data.pkl in the archive, as torch.save writes it, found {len(pickles)}')
        folder = pickles[0][:-len('data.pkl')]
        byte_order = 'little'  # if the file does not say it
        if f'{folder}byteorder' in records:
            byte_order = archive.read(f'{folder}byteorder').decode()
            if byte_order not in ('little', 'big'):
                raise ValueError(f'its byte order is {ascii(byte_order)[:80]}')
        content = archive.read(pickles[0])
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    storages = _ZipStorages(mapped, records, folder, swap=byte_order != sys.byteorder)
    return _Pickle(io.BytesIO(content), size, storages).read()


def _check_records(
        archive: zipfile.ZipFile, file: io.BufferedReader, records: Dict[str, zipfile.ZipInfo], size: int) -> None:
    if len(records) != len(archive.infolist()):
        raise ValueError('it has two records of one name')
    for name, info in records.items():
        file.seek(info.header_offset + 8)  # the header before the record's bytes has the compression type once more
        compress_types = info.compress_type, int.from_bytes(file.read(2), 'little')
        if compress_types != (zipfile.ZIP_STORED, zipfile.ZIP_STORED) or info.compress_size != info.file_size:
            raise ValueError(f'its record {ascii(name)} is compressed, which torch.save never does')
    if sum(info.file_size for info in records.values()) > size:
        raise ValueError('its records claim more than the file holds')
    bad = archive.testzip()  # compares the checksums
    if bad is not None:
        raise ValueError(f'the checksum of its record {ascii(bad)} is wrong')


class _ZipStorages:
    """Reads the bytes of tensors from an archive that `_check_records` has checked."""

    def __init__(self, mapped: mmap.mmap, records: Dict[str, zipfile.ZipInfo], folder: str, swap: bool):
        self.mapped = mapped
        self.records = records
        self.folder = folder
        self.swap = swap  # reverse the order of the bytes in each number
        self.known: Dict[str, torch.UntypedStorage] = {}

    def get(self, key: str, nbytes: int, dtype: torch.dtype) -> torch.UntypedStorage:
        info = self.records.get(f'{self.folder}data/{key}')
        if info is None or info.file_size != nbytes:
            has = 'is missing' if info is None else f'has {info.file_size}'
            raise ValueError(f'storage {ascii(key)[:80]} claims {nbytes} bytes, its record {has}')
        if key not in self.known:
            self.known[key] = self.make(info, dtype)
        return self.known[key]

    def make(self, info: zipfile.ZipInfo, dtype: torch.dtype) -> torch.UntypedStorage:
        if info.file_size == 0:
            return torch.UntypedStorage(0, device='cpu')
        # the bytes of a record come after its header of 30 bytes, its name and its extra field
        name, extra = struct.unpack_from('<HH', self.mapped, info.header_offset + 26)
        start = info.header_offset + 30 + name + extra
        if start % dtype.itemsize == 0 and not self.swap:
            return torch.frombuffer(
                self.mapped, dtype=torch.uint8, count=info.file_size, offset=start).untyped_storage()
        data = np.frombuffer(self.mapped, np.uint8, info.file_size, start).copy()
        if self.swap:
            number = dtype.itemsize // (2 if dtype.is_complex else 1)
            data = data.view(f'u{number}').byteswap().view(np.uint8)
        return torch.from_numpy(data).untyped_storage()


def read_legacy(path: Path, size: int) -> Any:
    """Return the content of a file that torch < 1.6 wrote.

    Such a file holds three pickles that describe it, a pickle with the content, a pickle with the keys of the storages,
    and then the bytes of the storages. Arguments and errors are those of `read_zip`.
    """
    storages = _LegacyStorages(size)
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        if _Pickle(stream, size).read() != _LEGACY_MAGIC:
            raise ValueError('it is a pickle that torch.save did not write')
        if _Pickle(stream, size).read() != _LEGACY_PROTOCOL:
            raise ValueError('it is of an unknown version of the format')
        _Pickle(stream, size).read()  # byte order and C types of the machine that wrote it; numbers are little-endian
        content = _Pickle(stream, size, storages).read()
        keys = _Pickle(stream, size).read()
        file.seek(stream.tell())
        storages.fill(file, keys)
    return content


@dataclass(frozen=True)
class _Claimed:
    """Memory for a storage whose bytes have not been read yet."""
    data: np.ndarray
    itemsize: int
    storage: torch.UntypedStorage


class _LegacyStorages:
    """The bytes of tensors in a file of torch < 1.6. They come after the pickles, so they are read last."""

    def __init__(self, size: int):
        self.left = size  # bytes of the file that no storage has claimed
        self.known: Dict[str, _Claimed] = {}

    def get(self, key: str, nbytes: int, dtype: torch.dtype) -> torch.UntypedStorage:
        if key not in self.known:
            self.left -= nbytes
            if self.left < 0:
                raise ValueError('its storages claim more than the file holds')
            data = np.empty(nbytes, np.uint8)
            self.known[key] = _Claimed(data, dtype.itemsize, torch.from_numpy(data).untyped_storage())
        if self.known[key].data.nbytes != nbytes:
            raise ValueError(f'storage {ascii(key)[:80]} claims two sizes')
        return self.known[key].storage

    def fill(self, file: io.BufferedReader, keys: Any) -> None:
        """Read the storages in the order of `keys`. The bytes of each storage come after its number of values."""
        if type(keys) is not list or len(keys) != len(self.known) or set(keys) != set(self.known):
            raise ValueError('its list of storages is not that of its tensors')
        for key in keys:
            claimed = self.known[key]
            header = file.read(8)
            if len(header) != 8 or struct.unpack('<q', header)[0] * claimed.itemsize != claimed.data.nbytes:
                raise ValueError(f'storage {ascii(key)[:80]} claims two sizes')
            if file.readinto(claimed.data.data) != claimed.data.nbytes:
                raise ValueError(f'it ends within storage {ascii(key)[:80]}')
            if sys.byteorder == 'big':
                claimed.data.view(f'u{claimed.itemsize}').byteswap(inplace=True)


# ---- the pickle ------------------------------------------------------------------------------------------------------

_LITERALS = {'BININT', 'BININT1', 'BININT2', 'BINFLOAT', 'LONG1', 'BINUNICODE'}
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


class _Pickle:
    """Makes the value that one pickle describes.

    A pickle is a list of steps for a machine with a stack. The steps that are known are those of pickle protocol 2 that
    `torch.save` writes.
    """

    def __init__(self, stream: Any, size: int, storages: Optional[_Storages] = None):
        self.stream = stream
        self.storages = storages
        self.left_to_copy = BYTES_PER_ITEM * MAX_STEPS + 4 * size  # bytes
        self.stack: List[Any] = []
        self.marks: List[int] = []  # heights of the stack when MARK was read
        self.memo: Dict[int, Any] = {}
        self.namespaces: Dict[int, Dict[str, Any]] = {}  # the dicts that stand for an `argparse.Namespace`, by their id

    def read(self) -> Any:
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(self.stream)):
                if count > MAX_STEPS:
                    raise ValueError(f'its pickle has more than {MAX_STEPS} steps')
                if opcode.name == 'STOP':
                    break
                self.step(opcode.name, argument)
            return self.stack.pop()
        except (LookupError, TypeError) as e:
            raise ValueError('its pickle makes no sense') from e

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == 'SHORT_BINSTRING':  # written by Python 2
            stack.append(argument.encode('latin-1').decode('utf-8'))
        elif name == 'EMPTY_DICT':
            stack.append({})
        elif name == 'EMPTY_LIST':
            stack.append([])
        elif name in _TUPLES:
            stack.append(tuple(self.pop_many(_TUPLES[name])))
        elif name == 'TUPLE':
            stack.append(tuple(self.pop_to_mark()))
        elif name == 'MARK':
            self.marks.append(len(stack))
        elif name == 'APPEND':
            self.append_to_list(self.pop_many(1))
        elif name == 'APPENDS':
            self.append_to_list(self.pop_to_mark())
        elif name == 'SETITEM':
            self.set_items(self.pop_many(2))
        elif name == 'SETITEMS':
            self.set_items(self.pop_to_mark())
        elif name in ('BINPUT', 'LONG_BINPUT'):
            self.memo[argument] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET'):
            value = self.memo[argument]
            if isinstance(value, _Unfinished) and value.is_finished:
                value = value.value
            stack.append(value)
        elif name == 'GLOBAL':
            stack.append(_look_up(argument))
        elif name == 'BINPERSID':
            stack.append(self.storage(stack.pop()))
        elif name in ('REDUCE', 'NEWOBJ'):
            function, args = self.pop_many(2)
            self.pay_for_copies(args)
            value = _call(function, args)
            if function == _Name('argparse.Namespace'):
                self.namespaces[id(value)] = value
            stack.append(value)
        elif name == 'BUILD':
            self.build(stack.pop())
        elif name != 'PROTO':
            raise ValueError(f'its pickle has the step {name}, which torch.save does not write')

    def pop_many(self, n: int) -> List[Any]:
        if len(self.stack) < n:
            raise IndexError('the stack is empty')
        items = self.stack[-n:]
        del self.stack[-n:]
        return items

    def pop_to_mark(self) -> List[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def append_to_list(self, items: List[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError('it appends to what is no list')
        self.stack[-1].extend(items)

    def set_items(self, items: List[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise TypeError('it sets items of what is no dict')
        for key, value in zip(items[::2], items[1::2]):
            _check_key(key)
            self.stack[-1][key] = value

    def build(self, state: Any) -> None:
        """Give the topmost object its state."""
        self.pay_for_copies(state)
        found = self.stack[-1]
        if isinstance(found, _Unfinished):
            found.value = found.finish(state)
            found.is_finished = True
            self.stack[-1] = found.value
        elif id(found) in self.namespaces:
            if type(state) is not dict or any(type(key) is not str for key in state):
                raise TypeError('not the attributes of an object')
            found.update(state)
        elif found is not None and type(found) is not dict:  # attributes of dicts and of training logs are left out
            raise TypeError('it sets the state of a plain value')

    def pay_for_copies(self, given: Any) -> None:
        """Count the memory for a copy of `given`, and refuse the pickle when its copies take too much.

        Values that are made from a list or text are copies of it, and a pickle may use one list or text many times.
        """
        for value in (given, *given) if type(given) is tuple else (given,):
            if isinstance(value, (str, bytes)):
                self.left_to_copy -= len(value)
            elif isinstance(value, (dict, list, tuple, set)):
                self.left_to_copy -= BYTES_PER_ITEM * len(value)
        if self.left_to_copy < 0:
            raise ValueError('its pickle copies what it holds many times over')

    def storage(self, said: Any) -> _Storage:
        """The storage for a persistent id: (kind, type, key, device, number of values, view of another storage)."""
        kind, storage_type, key, _, numel = said[:5]
        if kind != 'storage' or said[5:] not in ((), (None,)) or type(key) is not str or self.storages is None:
            raise TypeError('not a storage')
        if not isinstance(storage_type, _Name) or storage_type.name not in _STORAGES:
            raise TypeError('not a type of storages')
        _check_sizes(numel)
        dtype = _STORAGES[storage_type.name]
        return _Storage(self.storages.get(key, numel * dtype.itemsize, dtype), dtype)


def _check_key(key: Any) -> None:
    """Refuse keys that are dangerous to hash.

    Tuples inside of tuples may overflow C's stack, and a dict is very slow with many numbers of equal hash.
    """
    for part in key if type(key) is tuple else (key,):
        if isinstance(part, int) and abs(part) > 2 ** 60:
            raise ValueError('it has a key that is a number of more than 60 bits')
        if not isinstance(part, (str, bytes, int, float, np.generic, type(None))):
            raise ValueError(f'it has a key of type {type(key).__name__}')


def _check_sizes(*sizes: Any) -> None:
    if any(type(n) is not int or not 0 <= n < 2 ** 63 for n in sizes):
        raise ValueError('a size in it is no number, or is negative or too large')


# ---- what a pickle may name ------------------------------------------------------------------------------------------

def _dict(pairs: Any = ()) -> Dict[Any, Any]:
    out = {}
    for key, value in pairs.items() if type(pairs) is dict else pairs:
        _check_key(key)
        out[key] = value
    return out


def _set(items: Any = ()) -> Any:
    for x in items:
        _check_key(x)
    return set(items)


def _bytes(content: Any = b'', encoding: str = 'latin-1') -> bytes:
    """Bytes from text or bytes. A number is refused: `bytes(n)` would make n zeros."""
    if type(content) is str:
        return _encode(content, encoding)
    if type(content) is not bytes:
        raise TypeError('bytes of what are none')
    return content


def _encode(text: Any, encoding: Any) -> bytes:
    """Bytes from text. Protocol 2 has no bytes and writes them as text, with a character for each byte.

    Other codecs than latin-1 are refused. They may make the text twice as long.
    """
    if type(text) is not str or encoding not in ('latin1', 'latin-1'):
        raise TypeError('not bytes as text')
    return text.encode('latin-1')


def _complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise TypeError('not the parts of a number')
    return complex(real, imaginary)


def _size(sizes: Any) -> Tuple[int, ...]:
    _check_sizes(*sizes)
    return tuple(sizes)


def _device(kind: Any, index: Any = None) -> torch.device:
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise TypeError('not a device')
    try:
        return torch.device(kind) if index is None else torch.device(kind, index)
    except RuntimeError as e:
        raise ValueError(f'it names the device {ascii(kind)[:80]}') from e


def _namespace() -> Dict[str, Any]:
    """A dict for an `argparse.Namespace`. If it has attributes, a BUILD step gives them."""
    return {}


def _training_log(*_: Any) -> None:
    """Return None instead of a log of OpenMMLab's training."""


def _attribute(of: Any, _: Any) -> None:
    """Return None instead of a function in such a training log. Other attributes are refused."""
    if of != _Name('mmengine.logging.history_buffer.HistoryBuffer'):
        raise UnknownName('builtins.getattr')


def _numpy_dtype(name: Any, *_: Any) -> _Unfinished:
    """A type of numpy values.

    Only the byte order is taken from the state. numpy would take flags too, one of which says that the values are
    pointers to objects.
    """
    if type(name) is not str or not re.fullmatch(r'[biufcSU][1-9]\d*', name):
        raise ValueError(f'numpy values of type {ascii(name)[:80]} are not read')

    def finish(state: Any) -> 'np.dtype[Any]':
        if state[1] not in ('<', '>', '|', '='):
            raise TypeError('not a byte order')
        return np.dtype(name).newbyteorder(state[1])
    return _Unfinished(finish)


def _numpy_array(*_: Any) -> _Unfinished:
    def finish(state: Any) -> np.ndarray:
        _, shape, dtype, is_fortran, data = state
        _check_sizes(*shape)
        _check_numpy(dtype, data, math.prod(shape))
        values = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
        return values.reshape(shape, order='F' if is_fortran else 'C').copy(order='K')
    return _Unfinished(finish)


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    _check_numpy(dtype, data, 1)
    return np.frombuffer(data, dtype)[0]


def _check_numpy(dtype: Any, data: Any, count: int) -> None:
    if not isinstance(dtype, np.dtype) or type(data) is not bytes or len(data) != count * dtype.itemsize:
        raise TypeError('not the bytes of numpy values')


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> torch.Tensor:
    """`more` holds whether the tensor takes gradients, its hooks, and its flags for conjugated and negated values."""
    if len(more) > 2 and more[2]:
        raise ValueError('a tensor in it is conjugated or negated')
    return _tensor_of_type(storage, offset, shape, stride, getattr(storage, 'dtype', None))


def _tensor_v3(
        storage: Any, offset: Any, shape: Any, stride: Any, takes_gradient: Any, hooks: Any, dtype: Any, *more: Any,
) -> torch.Tensor:
    if more and more[0]:
        raise ValueError('a tensor in it is conjugated or negated')
    return _tensor_of_type(storage, offset, shape, stride, dtype)


def _tensor_of_type(storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any) -> torch.Tensor:
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype) or len(shape) != len(stride):
        raise TypeError('not a tensor')
    _check_sizes(offset, *shape, *stride)
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device='cpu')
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride))
    if (last + 1) * dtype.itemsize > storage.data.nbytes():  # torch would enlarge the storage
        raise ValueError(f'a tensor of shape {list(shape)[:8]} goes beyond its storage')
    return torch.empty(0, dtype=dtype, device='cpu').set_(storage.data, offset, tuple(shape), tuple(stride))


def _parameter(tensor: Any, *_: Any) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError('not a tensor')
    return tensor


def _tensor_of_class(function: Any, cls: Any, args: Any, *_: Any) -> torch.Tensor:
    """A tensor without the attributes that it was saved with. Subclasses of Tensor are refused as unknown names."""
    if function not in (_Name('torch._utils._rebuild_tensor_v2'), _Name('torch._utils._rebuild_tensor_v3')):
        raise TypeError('not a tensor')
    return _call(function, args)


_CALLS: Dict[str, Callable[..., Any]] = {
    'argparse.Namespace': _namespace,
    'builtins.bytearray': _bytes,
    'builtins.bytes': _bytes,
    'builtins.complex': _complex,
    'builtins.getattr': _attribute,
    'builtins.set': _set,
    '_codecs.encode': _encode,
    'collections.Counter': _dict,
    'collections.OrderedDict': _dict,
    'mmengine.logging.history_buffer.HistoryBuffer': _training_log,
    'numpy.dtype': _numpy_dtype,
    'numpy.core.multiarray._reconstruct': _numpy_array,
    'numpy.core.multiarray.scalar': _numpy_scalar,
    'numpy._core.multiarray._reconstruct': _numpy_array,  # since numpy 2
    'numpy._core.multiarray.scalar': _numpy_scalar,
    'torch.Size': _size,
    'torch.device': _device,
    'torch._utils._rebuild_parameter': _parameter,
    'torch._utils._rebuild_parameter_with_state': _parameter,
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor_v3,
    'torch._tensor._rebuild_from_type_v2': _tensor_of_class,
}
_CLASSES = ('numpy.ndarray', 'torch.Tensor', 'torch.nn.parameter.Parameter', *_STORAGES)
_NAMES = {name: _Name(name) for name in (*_CALLS, *_CLASSES)}


def _look_up(argument: str) -> Any:
    """The value for a name in a pickle ('module name'): a dtype of torch, or a known name. Nothing is imported."""
    module, _, name = argument.partition(' ')
    module = 'builtins' if module == '__builtin__' else module  # protocol 2 uses the module's name in Python 2
    if module == 'torch' and isinstance(vars(torch).get(name), torch.dtype):
        return vars(torch)[name]
    module = 'torch' if module == 'torch.cuda' else module  # the storages of tensors that were saved on a GPU
    if f'{module}.{name}' not in _NAMES:
        raise UnknownName(f'{module}.{name}')
    return _NAMES[f'{module}.{name}']


def _call(function: Any, args: Any) -> Any:
    if not isinstance(function, _Name) or type(args) is not tuple:
        raise TypeError('it calls a plain value')
    if function.name not in _CALLS:
        raise UnknownName(function.name)
    return _CALLS[function.name](*args)


# ---- the result ------------------------------------------------------------------------------------------------------

_SMALL = (int, float, complex, np.generic, np.ndarray, np.dtype, torch.dtype, torch.device, type(None))


def check_plain(content: Any, size: int) -> None:
    """Refuse content that is not plain, that contains itself, or that is far larger than its file when written out.

    One list may occur in several places of a checkpoint, and several tensors may share one storage. Lists of such lists
    take few bytes in a file and in memory, but as text they may be larger than the memory of any machine.

    Args:
        content: Content of a file.
        size: Size of the file in bytes.
    """
    most_text = TEXT_PER_VALUE * MAX_STEPS + 4 * size
    most_tensors = 4 * size  # weights and their average may share memory, little else does
    known: Dict[int, Tuple[int, int]] = {}
    tensors = 0

    def measure(value: Any, depth: int) -> Tuple[int, int]:
        """Return the number of characters of `value` as text, and how deep dicts and lists are nested in it."""
        nonlocal tensors
        if isinstance(value, torch.Tensor):
            tensors += value.numel() * value.element_size()
            return TEXT_PER_VALUE, 0
        if isinstance(value, (str, bytes)):
            return TEXT_PER_VALUE + len(value), 0
        if isinstance(value, _SMALL):
            return TEXT_PER_VALUE, 0
        if isinstance(value, _Name):
            raise UnknownName(value.name)
        if type(value) not in (dict, list, tuple, set):
            raise ValueError(f'it holds a {type(value).__name__.strip("_").lower()} as a value')
        if depth == MAX_DEPTH:
            raise ValueError(too_deep)
        if id(value) not in known:
            text, height = TEXT_PER_VALUE, 0
            for item in (*value, *value.values()) if type(value) is dict else value:
                inner_text, inner_height = measure(item, depth + 1)
                text += inner_text
                height = max(height, inner_height)
            known[id(value)] = text, height + 1
        text, height = known[id(value)]
        if depth + height > MAX_DEPTH:
            raise ValueError(too_deep)
        if text > most_text:
            raise ValueError('its values repeat what they hold many times over')
        return text, height

    too_deep = f'its values are nested more than {MAX_DEPTH} deep, or hold themselves'
    measure(content, 0)
    if tensors > most_tensors:
        raise ValueError('its tensors repeat what they hold many times over')
