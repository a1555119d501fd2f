""" Read checkpoint files that come from somewhere else: nothing in them is executed, and no claim in them is believed.

Two kinds of file are read: safetensors, and what `torch.save` writes (zip since torch 1.6, a pickle stream before).
A pickle is first walked without building anything: what it would call, and how much memory it would take, is known
before `torch.load(weights_only=True)` sees it.
"""
import argparse
import contextlib
import io
import json
import os
import pickletools
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Dict, List, Tuple, Union

import torch
from safetensors import safe_open

__all__ = ['MAX_BYTES', 'CheckpointError', 'find_checkpoint', 'read_checkpoint', 'read_metadata']

PathLike = Union[str, 'os.PathLike[str]']

# PVT-Large in float32, the largest checkpoint published. A training snapshot (weights, their average, two moments of
# Adam) is 4 times that, one of `pvt_huge_v2` about 18 times.
LARGEST_KNOWN_BYTES = 245_574_528
MAX_BYTES = 32 * LARGEST_KNOWN_BYTES

MAX_HEADER_BYTES = 16 * 2 ** 20  # safetensors header, pickle, or zip directory: each under 1 MB in a real checkpoint
MAX_RECORDS = 100_000
MAX_OPCODES = 4_000_000

_FILES = ('model.safetensors', 'pytorch_model.bin', 'model.pth', 'model.pt')
_SUFFIXES = ('.safetensors', '.bin', '.pth', '.pt', '.tar')

_LEGACY_MAGIC = 0x1950a86a20f9469cfc6c
_LEGACY_PROTOCOL = 1001


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, claims too much, or wants to execute something."""


def find_checkpoint(path: PathLike) -> Path:
    """The checkpoint file that `path` means.

    Args:
        path: A file, which is returned, or a folder with one checkpoint in it.

    Raises:
        FileNotFoundError: No such file or folder.
        CheckpointError: A folder with no checkpoint, or several and none under a usual name.
    """
    path = Path(path)
    if path.is_dir():
        for name in _FILES:
            if (path / name).is_file():
                return path / name
        found = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES and p.is_file())
        if len(found) == 1:
            return found[0]
        have = ', '.join(p.name for p in found[:4]) if found else 'none'
        raise CheckpointError(f'Expected one checkpoint file ({", ".join(_FILES[:2])}) in {path}, found {have}.')
    if not path.exists():
        raise FileNotFoundError(f'No such file or folder: {path}')
    if not path.is_file():
        raise CheckpointError(f'Expected a file, got a device, pipe or socket: {path}')
    return path


def read_checkpoint(path: PathLike, max_bytes: int = MAX_BYTES) -> Dict[str, Any]:
    """Read a checkpoint file to the CPU without executing anything in it.

    The tensors may be backed by the file (memory mapped), so do not write to it while they are in use.

    Args:
        path: A safetensors file, a file written by `torch.save`, or a folder with one of them.
        max_bytes: Refuse a file that is larger or claims to hold more.

    Returns:
        What the file holds: a state dict, or a dict with one in it.

    Raises:
        FileNotFoundError: No such file or folder.
        CheckpointError: Not a checkpoint, damaged, too large, or with anything but tensors and plain values in it.
    """
    path = find_checkpoint(path)
    with open(path, 'rb') as f:
        size = os.fstat(f.fileno()).st_size
        if size > max_bytes:
            raise CheckpointError(
                f'Expected at most {_size(max_bytes)}, {path.name} has {_size(size)}. '
                f'Pass a larger max_bytes if you trust it.')
        try:
            kind = _kind(f, size, path.name)
            if kind == 'safetensors':
                _check_safetensors(f, size, path.name)
            elif kind == 'zip':
                _check_zip(f, size, path.name, max_bytes)
            else:
                _check_legacy(f, size, path.name, max_bytes)
        except (RecursionError, MemoryError) as e:
            raise CheckpointError(f'{path.name} is nested or filled beyond what a checkpoint needs.') from e
    checkpoint = _load_safetensors(path) if kind == 'safetensors' else _load_torch(path, mmap=kind == 'zip')
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'Expected a dict of tensors in {path.name}, got {type(checkpoint).__name__}.')
    return checkpoint


def read_metadata(path: PathLike) -> Dict[str, str]:
    """The free text (`__metadata__`) of a safetensors file, empty for any other file."""
    path = find_checkpoint(path)
    with open(path, 'rb') as f:
        size = os.fstat(f.fileno()).st_size
        if _kind(f, size, path.name) != 'safetensors':
            return {}
        _check_safetensors(f, size, path.name)
    try:
        with safe_open(path, framework='pt') as f:
            return dict(f.metadata() or {})
    except Exception as e:
        raise _broken(path.name, e) from e


def _size(n: int) -> str:
    return f'{n / 1e9:.1f} GB' if n >= 1e9 else f'{n / 1e6:.1f} MB' if n >= 1e6 else f'{n} bytes'


def _show(x: Any) -> str:
    return ascii(x)[:80]


def _broken(name: str, e: BaseException) -> CheckpointError:
    reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
    return CheckpointError(f'{name} is damaged or no checkpoint: {reason}')


def _kind(f: BinaryIO, size: int, name: str) -> str:
    """'safetensors', 'zip' or 'legacy' by content; the name of a file says nothing."""
    f.seek(0)
    start = f.read(16)
    f.seek(0)
    if start[:4] == b'PK\x03\x04':
        return 'zip'
    if start[8:9] == b'{':  # before the next one: the length of a header may well start with byte 0x80
        return 'safetensors'
    if start[:1] == b'\x80':
        return 'legacy'
    if not start:
        got = 'an empty file'
    elif start.lstrip()[:1] == b'<':
        got = 'a web page, so the download went wrong'
    elif start.startswith(b'version https://'):
        got = 'a Git LFS pointer, so run `git lfs pull` or download the file itself'
    elif start[:2] == b'\x1f\x8b':
        got = 'a gzip archive, so unpack it first'
    elif start[:6] == b'\x89HDF\r\n':
        got = 'an HDF5 file'
    else:
        got = f'a file that starts with {start[:8]!r}'
    raise CheckpointError(f'Expected a checkpoint (safetensors, or written by torch.save), {name} is {got}.')


# ---- safetensors ----------------------------------------------------------------------------------------------------

def _check_safetensors(f: BinaryIO, size: int, name: str) -> None:
    """Check what the library does not: the size of the header and names that occur twice. It checks all offsets."""
    length, = struct.unpack('<Q', f.read(8))
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f'{name} is damaged or no checkpoint: its header claims {length} bytes, the file has {size} and '
            f'{MAX_HEADER_BYTES} are accepted.')

    def no_twins(pairs):
        if len({k for k, _ in pairs}) != len(pairs):
            raise ValueError('a name occurs twice in its header')
        return dict(pairs)

    try:
        header = json.loads(f.read(length).decode('utf-8'), object_pairs_hook=no_twins)
    except ValueError as e:
        raise _broken(name, e) from e
    if len(header) > MAX_RECORDS:
        raise CheckpointError(f'Expected at most {MAX_RECORDS} tensors, {name} has {len(header)}.')


def _load_safetensors(path: Path) -> Dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework='pt') as f:
            return {k: f.get_tensor(k) for k in f.keys()}
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic in the library is no Exception
        raise _broken(path.name, e) from e


# ---- torch.save -----------------------------------------------------------------------------------------------------

def _load_torch(path: Path, mmap: bool) -> Any:
    if hasattr(torch.serialization, 'safe_globals'):
        allowed = torch.serialization.safe_globals([argparse.Namespace])
    else:  # torch < 2.5
        torch.serialization.add_safe_globals([argparse.Namespace])
        allowed = contextlib.nullcontext()
    try:
        with allowed:
            return torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except Exception as e:
        raise _broken(path.name, e) from e


def _check_zip(f: BinaryIO, size: int, name: str, max_bytes: int) -> None:
    """Check that a zip is exactly what `torch.save` writes, so that every reader sees the same records in it."""
    f.seek(max(0, size - 22))
    end = f.read(22)
    if len(end) < 22 or end[:4] != b'PK\x05\x06' or end[20:] != b'\x00\x00':
        raise CheckpointError(f'{name} is damaged: it does not end as a zip archive does, so it may be truncated.')
    count, directory = struct.unpack('<H', end[10:12])[0], struct.unpack('<I', end[12:16])[0]
    if size >= 42:
        f.seek(size - 42)
        locator = f.read(20)
        if locator[:4] == b'PK\x06\x07':  # zip64
            f.seek(min(struct.unpack('<Q', locator[8:16])[0], size))
            end64 = f.read(56)
            if len(end64) < 56 or end64[:4] != b'PK\x06\x06':
                raise CheckpointError(f'{name} is damaged: its zip64 directory is not where it says.')
            count, directory = struct.unpack('<QQ', end64[32:48])
    if count > MAX_RECORDS or directory > MAX_HEADER_BYTES:
        raise CheckpointError(f'{name} claims {count} records in a directory of {directory} bytes, no checkpoint does.')
    try:
        with zipfile.ZipFile(f) as archive:
            _check_records(archive, size, name, max_bytes)
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, IndexError, OSError, EOFError, struct.error,
            NotImplementedError, RuntimeError) as e:
        raise _broken(name, e) from e


def _check_records(archive: zipfile.ZipFile, size: int, name: str, max_bytes: int) -> None:
    records = {}
    if any(n.count('/') == 1 and n.endswith('/constants.pkl') for n in archive.namelist()):
        raise CheckpointError(f'{name} is a TorchScript archive, not weights. Save its state_dict() with torch.save.')
    for info in archive.infolist():
        if info.filename in records:
            raise CheckpointError(f'{name} holds {_show(info.filename)} twice.')
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointError(
                f'{name} holds compressed records, torch.save never writes them. '
                f'Load and save it with torch to get a plain file.')
        if info.flag_bits & 1:
            raise CheckpointError(f'{name} is encrypted.')
        records[info.filename] = info
    if sum(info.file_size for info in records.values()) > size:
        raise CheckpointError(f'{name} claims more data than the file has: its records overlap.')
    pickles = [n for n in records if n.count('/') == 1 and n.endswith('/data.pkl')]
    if len(pickles) != 1:
        raise CheckpointError(f'Expected what torch.save writes, {name} is another zip archive (no data.pkl).')
    prefix = pickles[0][:-len('data.pkl')]
    strange = [n for n in records if not n.startswith(prefix) or '..' in n.split('/') or '\\' in n]
    if strange:
        raise CheckpointError(f'{name} holds a record outside of its folder: {_show(strange[0])}.')
    if records[pickles[0]].file_size > MAX_HEADER_BYTES:
        raise CheckpointError(f'{name} holds a pickle of {_size(records[pickles[0]].file_size)}, no checkpoint does.')

    scan = _PickleScan(io.BytesIO(archive.read(pickles[0])), name, legacy=False)
    scan.run()
    for key, storage in scan.storages.items():
        record = records.get(f'{prefix}data/{key}')
        if record is None:
            raise CheckpointError(f'{name} is damaged: the data of storage {_show(key)} is missing.')
        if record.file_size != storage.nbytes:
            raise CheckpointError(
                f'{name} is damaged: storage {_show(key)} claims {storage.nbytes} bytes and has {record.file_size}.')
    scan.check_total(size, max_bytes)
    for info in records.values():  # torch does not compare checksums, so damaged weights would pass
        with archive.open(info) as record:
            while record.read(2 ** 20):
                pass


def _check_legacy(f: BinaryIO, size: int, name: str, max_bytes: int) -> None:
    """Check the pickle stream of torch < 1.6: three small pickles, the object, the storage keys, then the data."""
    def value():
        scan = _PickleScan(f, name, legacy=True)
        return scan.run(), scan

    magic, _ = value()
    if magic != _LEGACY_MAGIC:
        raise CheckpointError(
            f'Expected a checkpoint written by torch.save, {name} is another pickle. It is not loaded, as that can '
            f'execute code.')
    protocol, _ = value()
    if protocol != _LEGACY_PROTOCOL:
        raise CheckpointError(f'{name} is damaged: legacy protocol {_show(protocol)}.')
    value()  # endianness and type sizes
    _, scan = value()
    keys, _ = value()
    if not isinstance(keys, list) or any(not isinstance(k, str) for k in keys) or sorted(keys) != sorted(scan.storages):
        raise CheckpointError(f'{name} is damaged: its list of storages does not fit its tensors.')
    scan.check_total(size, max_bytes)
    pos = f.tell()
    for key in keys:
        storage = scan.storages[key]
        f.seek(pos)
        count = f.read(8)
        if len(count) < 8 or pos + 8 + storage.nbytes > size:
            raise CheckpointError(f'{name} is truncated: {_size(size)}, the data of storage {_show(key)} goes beyond.')
        if struct.unpack('<q', count)[0] != storage.numel:
            raise CheckpointError(f'{name} is damaged: storage {_show(key)} claims two different sizes.')
        pos += 8 + storage.nbytes


@dataclass
class _Storage:
    numel: int
    itemsize: int
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True)
class _Global:
    name: str


class _Namespace:
    """Stands for an object with attributes."""


class _OrderedDict(dict):
    """Stands for an OrderedDict."""


@dataclass
class _Tensor:
    nbytes: int


_STORAGES = {
    'DoubleStorage': 8, 'FloatStorage': 4, 'HalfStorage': 2, 'BFloat16Storage': 2, 'LongStorage': 8, 'IntStorage': 4,
    'ShortStorage': 2, 'CharStorage': 1, 'ByteStorage': 1, 'BoolStorage': 1, 'ComplexDoubleStorage': 16,
    'ComplexFloatStorage': 8,
}
_DTYPES = {
    f'torch.{n}' for n in (
        'float16', 'float32', 'float64', 'bfloat16', 'uint8', 'int8', 'int16', 'int32', 'int64', 'bool')}
_CALLABLES = {
    'collections.OrderedDict', 'collections.Counter', 'torch.Size', 'torch.device', '_codecs.encode',
    'torch._utils._rebuild_tensor', 'torch._utils._rebuild_tensor_v2', 'torch._utils._rebuild_parameter',
}
_PRIMITIVES = (str, int, float, bool, bytes, type(None))


class _PickleScan:
    """Walk a pickle without building what it asks for.

    Only what checkpoints need is let through: plain values, tensors on dense storages, `OrderedDict`,
    `argparse.Namespace`. Everything else is refused by name, before anything has been called.
    """

    def __init__(self, f: BinaryIO, name: str, legacy: bool):
        self.f = f
        self.name = name
        self.legacy = legacy
        self.storages: Dict[str, _Storage] = {}
        self.tensor_bytes = 0

    def refuse(self, what: str) -> CheckpointError:
        return CheckpointError(f'{self.name} is refused, nothing in it was executed: {what}.')

    def check_total(self, size: int, max_bytes: int) -> None:
        """Compare what the pickle claims with the size of the file and the limit."""
        claimed = sum(s.nbytes for s in self.storages.values())
        if claimed > size:
            raise CheckpointError(f'{self.name} has {_size(size)} and claims to hold {_size(claimed)}.')
        # two dicts of the same weights may share them, more than that is a way to blow up memory
        if self.tensor_bytes > min(4 * size, max_bytes):
            raise CheckpointError(
                f'{self.name} has {_size(size)} and its overlapping tensors claim {_size(self.tensor_bytes)}.')

    def run(self) -> Any:
        """Walk one pickle, return what it holds with stand-ins for everything but plain values."""
        try:
            return self._run()
        except CheckpointError:
            raise
        except (IndexError, KeyError, ValueError, TypeError, struct.error, EOFError, UnicodeError) as e:
            raise CheckpointError(f'{self.name} is damaged: its pickle breaks off or makes no sense.') from e

    def _take(self, n: int) -> bytes:
        if n > MAX_HEADER_BYTES:
            raise self.refuse(f'a value of {n} bytes')
        data = self.f.read(n)
        if len(data) < n:
            raise EOFError
        return data

    def _line(self) -> str:
        line = self.f.readline(1024)
        if not line.endswith(b'\n'):
            raise EOFError
        return line[:-1].decode('utf-8')

    def _run(self) -> Any:
        stack: List[Any] = []
        marks: List[List[Any]] = []
        memo: Dict[int, Any] = {}

        def pop_mark() -> List[Any]:
            nonlocal stack
            items, stack = stack, marks.pop()
            return items

        start = self.f.tell()
        for count in range(MAX_OPCODES + 1):
            if count == MAX_OPCODES or self.f.tell() - start > MAX_HEADER_BYTES:
                raise self.refuse('a pickle longer than any checkpoint has')
            op = self._take(1)
            if op == b'\x80':  # PROTO
                protocol = self._take(1)[0]
                if protocol != 2:
                    raise self.refuse(f'pickle protocol {protocol}, expected 2 as torch.save writes')
            elif op == b'.':  # STOP
                return stack.pop()
            elif op == b'(':  # MARK
                marks.append(stack)
                stack = []
            elif op == b'c':  # GLOBAL
                module, attribute = self._line(), self._line()
                stack.append(self._global(f'{module}.{attribute}'))
            elif op == b'R':  # REDUCE
                args = stack.pop()
                stack[-1] = self._call(stack[-1], args)
            elif op == b'\x81':  # NEWOBJ
                args = stack.pop()
                if stack[-1] != _Global('argparse.Namespace') or args != ():
                    raise self.refuse(f'it makes a new {self._name_of(stack[-1])}')
                stack[-1] = _Namespace()
            elif op == b'b':  # BUILD
                state = stack.pop()
                obj = stack[-1]
                names = set(state) if type(state) is dict else {0}
                fits = type(obj) is _Namespace or type(obj) is _OrderedDict and names <= {'_metadata'}
                if not fits or any(type(k) is not str for k in names):
                    raise self.refuse(f'it sets the state of a {self._name_of(obj)}')
            elif op == b'Q':  # BINPERSID
                stack.append(self._storage(stack.pop()))
            elif op == b'}':
                stack.append({})
            elif op == b']':
                stack.append([])
            elif op == b')':
                stack.append(())
            elif op == b'a':  # APPEND
                item = stack.pop()
                self._list(stack[-1]).append(item)
            elif op == b'e':  # APPENDS
                items = pop_mark()
                self._list(stack[-1]).extend(items)
            elif op == b's':  # SETITEM
                item, key = stack.pop(), stack.pop()
                self._set_items(stack[-1], [key, item])
            elif op == b'u':  # SETITEMS
                items = pop_mark()
                self._set_items(stack[-1], items)
            elif op == b't':  # TUPLE
                items = tuple(pop_mark())
                stack.append(items)
            elif op in b'\x85\x86\x87':  # TUPLE1 to TUPLE3
                n = op[0] - 0x84
                if len(stack) < n:
                    raise IndexError
                stack[-n:] = [tuple(stack[-n:])]
            elif op == b'N':
                stack.append(None)
            elif op == b'\x88':
                stack.append(True)
            elif op == b'\x89':
                stack.append(False)
            elif op == b'J':  # BININT
                stack.append(struct.unpack('<i', self._take(4))[0])
            elif op == b'K':  # BININT1
                stack.append(self._take(1)[0])
            elif op == b'M':  # BININT2
                stack.append(struct.unpack('<H', self._take(2))[0])
            elif op == b'\x8a':  # LONG1
                stack.append(int.from_bytes(self._take(self._take(1)[0]), 'little', signed=True))
            elif op == b'G':  # BINFLOAT
                stack.append(struct.unpack('>d', self._take(8))[0])
            elif op == b'X':  # BINUNICODE
                stack.append(str(self._take(struct.unpack('<I', self._take(4))[0]), 'utf-8', 'surrogatepass'))
            elif op == b'U':  # SHORT_BINSTRING, from Python 2
                stack.append(self._take(self._take(1)[0]).decode('utf-8'))
            elif op in b'hj':  # BINGET, LONG_BINGET
                stack.append(memo[self._index(op == b'j')])
            elif op in b'qr':  # BINPUT, LONG_BINPUT
                memo[self._index(op == b'r')] = stack[-1]
            else:
                opcode = pickletools.code2op.get(op.decode('latin-1'))
                raise self.refuse(f'pickle instruction {opcode.name if opcode else op!r}, torch.save never writes it')

    def _index(self, long: bool) -> int:
        return struct.unpack('<I', self._take(4))[0] if long else self._take(1)[0]

    def _name_of(self, x: Any) -> str:
        return x.name if isinstance(x, _Global) else type(x).__name__.lstrip('_')

    def _list(self, x: Any) -> List[Any]:
        if type(x) is not list:
            raise self.refuse(f'it appends to a {self._name_of(x)}')
        return x

    def _set_items(self, x: Any, items: List[Any]) -> None:
        if type(x) not in (dict, _OrderedDict):
            raise self.refuse(f'it sets an item of a {self._name_of(x)}')
        for key, item in zip(items[::2], items[1::2], strict=True):
            if type(key) not in _PRIMITIVES:  # hashing a nested tuple can take forever
                raise self.refuse(f'a {self._name_of(key)} as key of a dict')
            x[key] = item

    def _global(self, name: str) -> _Global:
        if name not in _CALLABLES and name not in _DTYPES and name != 'argparse.Namespace':
            module, _, attribute = name.rpartition('.')
            if module != 'torch' or attribute not in _STORAGES:
                raise self.refuse(
                    f'it wants {_show(name)[1:-1]}, only tensors, plain values and argparse.Namespace are accepted. '
                    f'Save the state_dict() alone where the file was made')
        return _Global(name)

    def _storage(self, pid: Any) -> _Storage:
        if type(pid) is not tuple or not 5 <= len(pid) <= 6 or pid[0] != 'storage':
            raise self.refuse('a persistent object that is no storage')
        kind, key, location, numel = pid[1:5]
        if type(kind) is not _Global or kind.name.removeprefix('torch.') not in _STORAGES:
            raise self.refuse(f'a storage of type {self._name_of(kind)}')
        if type(key) is not str or type(location) is not str or type(numel) is not int or numel < 0:
            raise ValueError(pid)
        if pid[5:] not in ((), (None,)):
            raise self.refuse('a storage that is a view of another')
        dtype = kind.name.removeprefix('torch.')
        storage = self.storages.setdefault(key, _Storage(numel, _STORAGES[dtype], dtype))
        if (storage.numel, storage.dtype) != (numel, dtype):
            raise CheckpointError(f'{self.name} is damaged: storage {_show(key)} claims two different sizes.')
        return storage

    def _call(self, func: Any, args: Any) -> Any:
        name = self._name_of(func)
        if type(func) is not _Global or name not in _CALLABLES or type(args) is not tuple:
            raise self.refuse(f'it calls {name}')
        if name.startswith('torch._utils._rebuild_tensor'):
            return self._tensor(name, args)
        if name == 'torch._utils._rebuild_parameter':
            if len(args) != 3 or type(args[0]) is not _Tensor or type(args[2]) is not _OrderedDict or args[2]:
                raise self.refuse('a parameter that is not made from a tensor')
            return args[0]
        if name == 'collections.OrderedDict' and (args == () or len(args) == 1 and type(args[0]) is list):
            out = _OrderedDict()
            for pair in args[0] if args else ():
                if type(pair) not in (list, tuple) or len(pair) != 2:
                    raise ValueError(pair)
                self._set_items(out, list(pair))
            return out
        if name == 'collections.Counter' and (args == () or len(args) == 1 and type(args[0]) is dict):
            return dict(*args)
        if name == 'torch.Size' and len(args) == 1 and type(args[0]) in (tuple, list) and all(
                type(n) is int for n in args[0]):
            return tuple(args[0])
        if name == 'torch.device' and 1 <= len(args) <= 2 and type(args[0]) is str:
            return None
        if name == '_codecs.encode' and len(args) == 2 and type(args[0]) is str and args[1] == 'latin1':
            return args[0].encode('latin1')
        raise self.refuse(f'it calls {name} in an unusual way')

    def _tensor(self, name: str, args: Tuple[Any, ...]) -> _Tensor:
        if len(args) != (4 if name.endswith('_tensor') else 6) or type(args[0]) is not _Storage:
            raise self.refuse('a tensor that is not made from a storage')
        if len(args) == 6 and (type(args[4]) is not bool or type(args[5]) is not _OrderedDict or args[5]):
            raise self.refuse('a tensor with hooks')
        storage, offset, shape, stride = args[:4]
        if type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride) or len(shape) > 16:
            raise ValueError(shape)
        if any(type(n) is not int or n < 0 for n in (offset, *shape, *stride)):
            raise ValueError(shape)
        numel, last = 1, offset
        for n, step in zip(shape, stride):
            numel *= n
            last += (n - 1) * step
        if numel and last >= storage.numel or numel > storage.numel:
            raise self.refuse(
                f'a tensor of shape {list(shape)} on a storage of {storage.numel} values: it repeats them or goes '
                f'beyond')
        tensor = _Tensor(numel * storage.itemsize)
        self.tensor_bytes += tensor.nbytes
        return tensor
