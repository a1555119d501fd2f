""" Write the results of many images to one file, FILE, which is never incomplete.

While a command runs, its results are in the folder FILE.parts beside FILE. The folder holds parts, which are complete
files with the results of some hundred images each, and settings.json, which says what these results were computed with.
At the end the parts are merged into FILE, in the order of the images, and the folder is removed.

If a run was killed, the same command continues from the folder. A command with other settings is refused, and so is a
second run at the same time. The parts say which size and time of change each image had when it was read. If an image
has another size or time now, older or newer, the command is refused. A change that keeps both is not noticed. Memory
holds the names of all images, and the results of only a few parts.
"""
import csv
import hashlib
import io
import json
import logging
import os
import re
import sys
import time
import uuid
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..extras import import_extra
from ..files import save_atomically
from ..version import __version__
from .errors import clean, one_line

if sys.platform == 'win32':
    import msvcrt
else:
    import fcntl

__all__ = [
    'RECORD_SUFFIXES', 'VECTOR_SUFFIXES', 'Column', 'Results', 'State', 'Table', 'as_text', 'file_state', 'fingerprint',
    'settings_of']

_logger = logging.getLogger(__name__)

RECORD_SUFFIXES = ('.jsonl', '.csv', '.parquet')
VECTOR_SUFFIXES = ('.parquet', '.npz', '.safetensors')

_PART_IMAGES = 512  # images of a part, at most
_PART_SECONDS = 10.  # after this time a part is written even if it has fewer images
_CHUNK = 1024  # images that are merged at a time
_OPEN_PARTS = 16  # parts that are in memory while merging
_LARGEST_HEADER = 90 * 10 ** 6  # bytes; safetensors reads headers up to 100 MB
_PART = re.compile(r'[0-9a-f]{32}')  # name of a part, without its suffix
_UNFINISHED = re.compile(r'\.([0-9a-f]{32}\.\w+|settings\.json)-[0-9a-f]{32}')  # temporary files of `save_atomically`


State = List[int]  # size of a file in bytes and the time of its last change in nanoseconds, see `file_state`


@dataclass(frozen=True)
class Column:
    name: str
    kind: str  # 'string', 'int64' or 'float64', as Arrow calls them


@dataclass(frozen=True)
class Table:
    """How the results of images are written as a table."""
    columns: Tuple[Column, ...]
    rows: Callable[[Dict[str, Any]], List[Tuple[Any, ...]]]  # turns the record of an image into its rows


def fingerprint(model: torch.nn.Module) -> str:
    """Return a hash of all weights of a model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def settings_of(model: torch.nn.Module) -> str:
    """Return a hash of the settings of a model, on which its results depend too.

    The settings are the classes of all modules and their attributes with plain values, such as the eps of a norm, the
    number of heads, the pooling, or the sizes and thresholds of a detector.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        attributes = {
            key: value for key, value in sorted(vars(module).items())
            if key != 'training' and not key.startswith('_') and _is_plain(value)}
        digest.update(f'{name} {type(module).__name__} {attributes}\n'.encode('utf-8', 'backslashreplace'))
    return digest.hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, (bool, int, float, str))


def file_state(path: str) -> State:
    """Return the size of a file and the time of its last change, which show whether the file was changed.

    The list is empty if there is no such file.
    """
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


# ---- parts -----------------------------------------------------------------------------------------------------------

class _RecordParts:
    """Reads and writes parts with one record per image, as JSON lines: file, record and state of the file."""
    suffix = '.jsonl'

    def content(self, files: Sequence[str], rows: Sequence[Any], states: Sequence[State]) -> bytes:
        lines = (json.dumps(line, allow_nan=False) for line in zip(files, rows, states))
        return b''.join(line.encode() + b'\n' for line in lines)

    def files_in(self, path: Path) -> List[str]:
        return self._column(path, 0)

    def rows_in(self, path: Path) -> List[Any]:
        return self._column(path, 1)

    def states_in(self, path: Path) -> List[State]:
        return self._column(path, 2)

    def _column(self, path: Path, index: int) -> List[Any]:
        with open(path, encoding='ascii') as f:
            return [json.loads(line)[index] for line in f]


class _VectorParts:
    """Reads and writes parts with one float32 vector per image, as safetensors.

    The metadata of a part holds the names of the files, and their states (see `file_state`).
    """
    suffix = '.safetensors'

    def content(self, files: Sequence[str], rows: Sequence[Any], states: Sequence[State]) -> bytes:
        return save({'embedding': np.stack(rows)}, metadata={'file': json.dumps(files), 'state': json.dumps(states)})

    def files_in(self, path: Path) -> List[str]:
        with safe_open(path, 'numpy') as f:
            return json.loads(f.metadata()['file'])

    def states_in(self, path: Path) -> List[State]:
        with safe_open(path, 'numpy') as f:
            return json.loads(f.metadata()['state'])

    def rows_in(self, path: Path) -> List[Any]:
        with safe_open(path, 'numpy') as f:
            return list(f.get_tensor('embedding'))


@dataclass
class _Index:
    """Says where the result of each image is."""
    parts: List[Path] = field(default_factory=list)
    rows: Dict[str, Tuple[int, int]] = field(default_factory=dict)  # by image: index in `parts`, row in that part


class Results:
    """Collects the results of images as parts, and merges the parts into one file.

    Call `check` and `prepare` in the first process, `add` in all processes, and `flush` at the end of each process.
    Then call `finish` in the first process. Call `close` in all processes at the end, also after an error.
    """

    def __init__(self, output: Path, table: Optional[Table] = None, overwrite: bool = False):
        """
        Args:
            output: File to write. Its extension says the format.
            table: How records are written as a table. If None, the results are float32 vectors.
            overwrite: Whether `output` is replaced if it exists.
        """
        self.output, self.table, self.overwrite = output, table, overwrite
        self.folder = output.with_name(output.name + '.parts')
        self._kind: Any = _VectorParts() if table is None else _RecordParts()
        self._added: List[Tuple[str, Any, State]] = []  # images, results and states that are not yet written
        self._lock: Optional[BinaryIO] = None
        self._since = time.monotonic()

    def check(self) -> None:
        """Check, before a model is loaded, that the output can be written.

        Raises:
            ValueError: The output's extension is not that of a supported format, or the output exists and may not be
                replaced, or it is not a file.
            OSError: The folder of the output does not exist.
            ImportError: The format needs a package that is not installed.
        """
        suffixes = VECTOR_SUFFIXES if self.table is None else RECORD_SUFFIXES
        suffix = self.output.suffix.lower()
        if suffix not in suffixes:
            raise ValueError(f'Expected an --output that ends in {", ".join(suffixes)}, got {self.output}')
        if not self.output.absolute().parent.is_dir():
            raise FileNotFoundError(f'No such folder: {self.output.absolute().parent}')
        if self.output.exists() and not self.output.is_file():
            raise ValueError(f'Expected a file as --output, {self.output} is a folder or a device')
        self._refuse_replacing()
        if suffix == '.parquet':
            import_extra('pyarrow', 'embed')

    def _refuse_replacing(self) -> None:
        if self.output.is_file() and not self.overwrite:
            raise ValueError(
                f'{self.output} already exists: choose another --output, or add --overwrite, which replaces the file '
                f'once all results are there')

    def prepare(self, files: Sequence[str], settings: Dict[str, Any]) -> List[str]:
        """Create the folder of the parts, or continue from it. Returns the `files` without a result, each once.

        Args:
            files: All images.
            settings: Everything but the images that the results depend on, as values for JSON. A folder with results of
                other settings is refused.

        Raises:
            ValueError: The folder holds other files than parts, or results of other settings, or results of images that
                are not in `files` or have been changed since. Or another run uses the folder.
        """
        files = list(dict.fromkeys(files))
        if self.output.suffix.lower() == '.safetensors' and _length_in_header(files) > _LARGEST_HEADER:
            raise ValueError(
                f'{len(files)} names of images are too many for the header of a safetensors file: choose an --output '
                f'that ends in .parquet or .npz')
        if not all(os.path.isabs(file) for file in files):  # in another folder, the same paths name other images
            settings = dict(settings, working_directory=os.getcwd())
        settings = json.loads(json.dumps(dict(settings, format=2, version=__version__)))  # as JSON returns them
        marker = self.folder / 'settings.json'
        self.folder.mkdir(exist_ok=True)
        self._refuse_other_content(marker)  # before the lock file is created in it
        self._take_lock()
        self._refuse_other_content(marker)  # again: a run that has just ended may have left other files
        if not marker.is_file():
            content = json.dumps(settings, indent=2).encode()
            save_atomically(marker, lambda f: f.write(content))
            return files
        try:
            before = json.loads(marker.read_text(encoding='utf-8'))
            differing = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        except (ValueError, TypeError, AttributeError) as e:
            raise ValueError(f'{marker} is damaged, remove {self.folder} to start anew') from e
        if differing:
            raise ValueError(
                f'{self.folder} holds results of a run with other settings ({clean(", ".join(differing))}): remove it '
                f'to start anew, or choose another --output')
        index = self._index()
        done = index.rows
        given = set(files)
        gone = [file for file in done if file not in given]
        if gone:
            raise ValueError(
                f'{self.folder} holds results of {len(gone)} images that are not given now, such as {clean(gone[0])}: '
                f'remove it to start anew, or choose another --output')
        self._refuse_changed(index)
        return [file for file in files if file not in done]

    def _refuse_other_content(self, marker: Path) -> None:
        """Refuse a folder that holds other files. A run that was killed at its start may have left no settings."""
        if marker.is_file():
            return
        for path in self.folder.iterdir():
            if path.name != 'lock' and not _UNFINISHED.fullmatch(path.name):
                raise ValueError(f'{self.folder} holds files that are not results: choose another --output')

    def _take_lock(self) -> None:
        """Keep other runs out of the folder until `close`, or until this process ends in any way."""
        self._lock = open(self.folder / 'lock', 'ab')  # noqa: SIM115
        try:
            if sys.platform == 'win32':
                msvcrt.locking(self._lock.fileno(), msvcrt.LK_NBLCK, 1)
            else:  # this lock belongs to this process only: its worker processes do not inherit it
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            raise ValueError(f'{self.folder} is in use by another run of this command: wait for its end') from e
        except OSError as e:
            _logger.warning(f'{self.folder} cannot be locked, do not run this command twice at once: {one_line(e)}')

    def _refuse_changed(self, index: _Index) -> None:
        """Refuse results of images that are other files now: of another size or time of change, older or newer."""
        for part, path in enumerate(index.parts):
            files, states = (self._read(read, path) for read in (self._kind.files_in, self._kind.states_in))
            for row, (file, state) in enumerate(zip(files, states, strict=True)):
                if index.rows[file] == (part, row) and file_state(file) != state:
                    raise ValueError(
                        f'{clean(file, 4096)} was changed after its result was computed (its size in bytes or its time '
                        f'of change): remove {self.folder} to start anew, or choose another --output')

    def close(self) -> None:
        """Release the lock, so that other runs can use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def add(self, file: str, row: Any, state: State) -> None:
        """Add the result of an image. Results are kept in memory until there are enough for a part.

        A part is written once there are 512 results, or when a result is added more than 10 seconds after the last
        part.

        Args:
            file: Path of the image.
            row: The result.
            state: What `file_state` said before the image was read.
        """
        self._added.append((file, row, state))
        if len(self._added) >= _PART_IMAGES or time.monotonic() - self._since > _PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the results in memory as a part."""
        if self._added:
            files, rows, states = zip(*self._added)
            content = self._kind.content(files, rows, states)
            path = self.folder / f'{uuid.uuid4().hex}{self._kind.suffix}'
            save_atomically(path, lambda f: f.write(content))
            self._added = []
        self._since = time.monotonic()

    def close_early(self, alone: bool) -> None:
        """Write the results in memory as a part, when the command ends with an error.

        If this process is the only one (`alone`) and there is no part, the folder is removed. With several processes
        the folder stays, as the other processes may still write to it.
        """
        try:
            self.flush()
        except OSError:  # the disk is full: the error that ended the command says more
            pass
        if alone and self.folder.is_dir() and not self._part_files():
            self._remove([])

    def finish(self, files: Sequence[str], info: Dict[str, str], unreadable: int = 0) -> int:
        """Merge the parts into the output, in the order of `files`, and remove them. Returns the number of results.

        Args:
            files: All images. Images without a result are left out.
            info: Metadata of the file. Formats without metadata ignore it.
            unreadable: Number of images that have no result because they could not be read.

        Raises:
            ValueError: Other results are missing too, or there is no result, or the output has been created meanwhile
                and may not be replaced.
        """
        index = self._index()
        files = list(dict.fromkeys(files))
        order = [file for file in files if file in index.rows]
        missing = len(files) - len(order)
        if missing != unreadable:
            raise ValueError(
                f'{self.folder} lacks the results of {missing} images, and only {unreadable} images could not be read: '
                f'run the same command again to compute the missing ones')
        self._refuse_replacing()
        if not order:
            self._remove(index.parts)
            raise ValueError('None of the images could be read')
        chunks = self._chunks(order, index)
        suffix = self.output.suffix.lower()
        save_atomically(self.output, lambda f: _WRITERS[suffix](f, _Merged(order, chunks, self.table, info)))
        self._remove(index.parts)
        return len(order)

    def _part_files(self) -> List[Path]:
        return sorted(path for path in self.folder.glob(f'*{self._kind.suffix}') if _PART.fullmatch(path.stem))

    def _index(self) -> _Index:
        index = _Index()
        for path in self._part_files():
            for row, file in enumerate(self._read(self._kind.files_in, path)):
                index.rows.setdefault(file, (len(index.parts), row))
            index.parts.append(path)
        return index

    def _read(self, read: Callable[[Path], List[Any]], path: Path) -> List[Any]:
        try:
            return read(path)
        except (ValueError, TypeError, KeyError, IndexError, SafetensorError) as e:
            raise ValueError(f'{path} is damaged, remove it to have its images computed again: {one_line(e)}') from e

    def _chunks(self, order: Sequence[str], index: _Index) -> Iterator[Tuple[List[str], List[Any]]]:
        """Yield the names and results of all images in the given order, some of them at a time.

        A few parts stay in memory, as images that are close in the order are mostly in the same parts.
        """
        held: 'OrderedDict[int, List[Any]]' = OrderedDict()
        for start in range(0, len(order), _CHUNK):
            files = list(order[start:start + _CHUNK])
            places: Dict[int, List[Tuple[int, int]]] = {}  # by part: index in `files`, row in the part
            for i, file in enumerate(files):
                part, row = index.rows[file]
                places.setdefault(part, []).append((i, row))
            rows: List[Any] = [None] * len(files)
            for part, wanted in places.items():
                if part not in held:
                    held[part] = self._read(self._kind.rows_in, index.parts[part])
                    if len(held) > _OPEN_PARTS:
                        held.popitem(last=False)
                for i, row in wanted:
                    rows[i] = held[part][row]
            yield files, rows

    def _remove(self, parts: Sequence[Path]) -> None:
        """Remove the given parts, the settings, the lock file and temporary files of a killed run.

        The folder is removed too, unless it holds other files.
        """
        self.close()
        unfinished = [path for path in self.folder.iterdir() if _UNFINISHED.fullmatch(path.name)]
        for path in (*parts, *unfinished, self.folder / 'settings.json', self.folder / 'lock'):
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


# ---- formats ---------------------------------------------------------------------------------------------------------

@dataclass
class _Merged:
    """All results in order, for the function that writes a format."""
    files: List[str]
    chunks: Iterator[Tuple[List[str], List[Any]]]
    table: Optional[Table]
    info: Dict[str, str]

    def vectors(self) -> Tuple[int, Iterator[np.ndarray]]:
        """Return the length of a vector, and an iterator over the vectors (N, length) of N images at a time."""
        _, first = next(self.chunks)
        return len(first[0]), (np.stack(rows) for rows in self._starting_with(first))

    def _starting_with(self, first: List[Any]) -> Iterator[List[Any]]:
        yield first
        for _, rows in self.chunks:
            yield rows

    def rows(self) -> Iterator[List[Tuple[Any, ...]]]:
        """Yield the rows of the table, for some images at a time."""
        assert self.table is not None
        for _, records in self.chunks:
            yield [row for record in records for row in self.table.rows(record)]


def _write_jsonl(f: BinaryIO, results: _Merged) -> None:
    for _, records in results.chunks:
        for record in records:
            f.write(json.dumps(record, allow_nan=False).encode() + b'\n')


def _write_csv(f: BinaryIO, results: _Merged) -> None:
    assert results.table is not None
    # a file name with bytes that are not valid text is written with the same bytes
    text = io.TextIOWrapper(f, encoding='utf-8', errors='surrogateescape', newline='', write_through=True)
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow([column.name for column in results.table.columns])
    for rows in results.rows():
        writer.writerows(rows)
    text.detach()


def _write_parquet(f: BinaryIO, results: _Merged) -> None:
    pyarrow, parquet = import_extra('pyarrow', 'embed'), import_extra('pyarrow.parquet', 'embed')
    metadata = {name: as_text(value) for name, value in results.info.items()}
    if results.table is None:
        length, chunks = results.vectors()
        vector = pyarrow.list_(pyarrow.float32(), length)
        schema = pyarrow.schema([('file', pyarrow.string()), ('embedding', vector)], metadata)
        names = iter(results.files)
        with parquet.ParquetWriter(f, schema) as writer:
            for values in chunks:
                files = pyarrow.array([as_text(next(names)) for _ in values], pyarrow.string())
                flat = pyarrow.array(values.reshape(-1))
                writer.write_table(pyarrow.Table.from_arrays(
                    [files, pyarrow.FixedSizeListArray.from_arrays(flat, length)], schema=schema))
        return
    kinds = [(column.name, getattr(pyarrow, column.kind)()) for column in results.table.columns]
    schema = pyarrow.schema(kinds, metadata)
    with parquet.ParquetWriter(f, schema) as writer:
        for rows in results.rows():
            columns = [
                pyarrow.array([as_text(row[i]) if kind == pyarrow.string() else row[i] for row in rows], kind)
                for i, (_, kind) in enumerate(kinds)]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))


def as_text(value: str) -> str:
    """Return a file name as valid Unicode text. Bytes that are not text become \\udc80 and the like."""
    return value.encode('utf-8', 'backslashreplace').decode()


def _write_npz(f: BinaryIO, results: _Merged) -> None:
    """Write the arrays `file` and `embedding` in the format of `np.savez`, some rows at a time."""
    length, chunks = results.vectors()
    count = len(results.files)
    with zipfile.ZipFile(f, 'w', zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open('embedding.npy', 'w', force_zip64=True) as member:
            _write_npy_header(member, np.dtype(np.float32), (count, length))
            for values in chunks:
                member.write(values.astype('<f4', copy=False).tobytes())
        names = np.dtype(f'<U{max(map(len, results.files))}')
        with archive.open('file.npy', 'w', force_zip64=True) as member:
            _write_npy_header(member, names, (count,))
            for start in range(0, count, _CHUNK):
                member.write(np.array(results.files[start:start + _CHUNK], names).tobytes())


def _write_npy_header(f: Any, dtype: np.dtype, shape: Tuple[int, ...]) -> None:
    said = dict(descr=np.lib.format.dtype_to_descr(dtype), fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(f, said)


def _length_in_header(files: Sequence[str]) -> int:
    """Return how many bytes the names take in the header of a safetensors file: a JSON list inside a JSON string."""
    return len(json.dumps(json.dumps(files)))


def _write_safetensors(f: BinaryIO, results: _Merged) -> None:
    """Write a tensor `embedding`, and the names of the files as a JSON list under `file` in the metadata."""
    length, chunks = results.vectors()
    count = len(results.files)
    info = {name: as_text(value) for name, value in results.info.items()}
    header = json.dumps({
        '__metadata__': {**info, 'file': json.dumps(results.files)},
        'embedding': dict(dtype='F32', shape=[count, length], data_offsets=[0, 4 * count * length]),
    }).encode()
    header += b' ' * (-len(header) % 8)
    f.write(len(header).to_bytes(8, 'little') + header)
    for values in chunks:
        f.write(values.astype('<f4', copy=False).tobytes())


_WRITERS: Dict[str, Callable[[BinaryIO, _Merged], None]] = {
    '.jsonl': _write_jsonl,
    '.csv': _write_csv,
    '.parquet': _write_parquet,
    '.npz': _write_npz,
    '.safetensors': _write_safetensors,
}
