""" Results of many images as one file: complete or not there, going on where a run was killed.

While a command runs, its results lie in the folder FILE.parts beside FILE: in files of some hundred images, each of
them complete, beside settings.json, which says what they are results of. In the end they are merged into FILE, in the
order of the images, and the folder is removed. The same command goes on from the folder of a run that ended early.
Results of other settings are refused, and so is a second run at the same time. Memory holds the names of the images
and a few parts.
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
    'RECORD_SUFFIXES', 'VECTOR_SUFFIXES', 'Column', 'Results', 'Table', 'as_text', 'fingerprint', 'settings_of']

_logger = logging.getLogger(__name__)

RECORD_SUFFIXES = ('.jsonl', '.csv', '.parquet')
VECTOR_SUFFIXES = ('.parquet', '.npz', '.safetensors')

_PART_IMAGES = 512  # images of a part, at most
_PART_SECONDS = 10.  # after which a part is written, however few images it has
_CHUNK = 1024  # images that are merged at a time
_OPEN_PARTS = 16  # parts that are held while merging
_LARGEST_HEADER = 90 * 10 ** 6  # bytes; safetensors reads 100 MB
_PART = re.compile(r'[0-9a-f]{32}')  # name of a part, without its suffix
_UNFINISHED = re.compile(r'\.([0-9a-f]{32}\.\w+|settings\.json)-[0-9a-f]{32}')  # as `save_atomically` calls it


@dataclass(frozen=True)
class Column:
    name: str
    kind: str  # 'string', 'int64' or 'float64', as Arrow calls them


@dataclass(frozen=True)
class Table:
    """What results of images look like as rows: columns, and the rows of an image's record."""
    columns: Tuple[Column, ...]
    rows: Callable[[Dict[str, Any]], List[Tuple[Any, ...]]]


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of all weights of a model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def settings_of(model: torch.nn.Module) -> str:
    """A hash of what a model computes with beside its weights.

    That are the classes of all modules and their plain attributes, such as the eps of a norm, the number of heads, the
    pooling, or the sizes and thresholds of a detector.
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


# ---- parts -----------------------------------------------------------------------------------------------------------

class _RecordParts:
    """Parts with a record per image: JSON lines."""
    suffix = '.jsonl'

    def content(self, files: Sequence[str], rows: Sequence[Any]) -> bytes:
        return b''.join(json.dumps([file, row], allow_nan=False).encode() + b'\n' for file, row in zip(files, rows))

    def files_in(self, path: Path) -> List[str]:
        with open(path, encoding='ascii') as f:
            return [json.loads(line)[0] for line in f]

    def rows_in(self, path: Path) -> List[Any]:
        with open(path, encoding='ascii') as f:
            return [json.loads(line)[1] for line in f]


class _VectorParts:
    """Parts with a vector of float32 per image: safetensors, with the names of the files in the metadata."""
    suffix = '.safetensors'

    def content(self, files: Sequence[str], rows: Sequence[Any]) -> bytes:
        return save({'embedding': np.stack(rows)}, metadata={'file': json.dumps(files)})

    def files_in(self, path: Path) -> List[str]:
        with safe_open(path, 'numpy') as f:
            return json.loads(f.metadata()['file'])

    def rows_in(self, path: Path) -> List[Any]:
        with safe_open(path, 'numpy') as f:
            return list(f.get_tensor('embedding'))


@dataclass
class _Index:
    """Where each image's result is: number of its part and of its row there."""
    parts: List[Path] = field(default_factory=list)
    rows: Dict[str, Tuple[int, int]] = field(default_factory=dict)


class Results:
    """Results of images on their way into one file.

    `prepare` in the first process, `add` in all of them, `flush` at the end of each, then `finish` in the first one.
    `close` in all of them, whatever happened.
    """

    def __init__(self, output: Path, table: Optional[Table] = None, overwrite: bool = False):
        """
        Args:
            output: File to write. Its name says the format.
            table: Of records. Without one, results are vectors of float32.
            overwrite: Replace a file of that name.
        """
        self.output, self.table, self.overwrite = output, table, overwrite
        self.folder = output.with_name(output.name + '.parts')
        self._kind: Any = _VectorParts() if table is None else _RecordParts()
        self._added: List[Tuple[str, Any]] = []  # an image and its result, not yet written
        self._lock: Optional[BinaryIO] = None
        self._since = time.monotonic()

    def check(self) -> None:
        """Raise what stands against the output, before a model is loaded.

        Raises:
            ValueError: The name has another extension than those of the formats, or a file of that name is there.
            OSError: Its folder is not there.
            ImportError: The format needs a package that is not installed.
        """
        suffixes = VECTOR_SUFFIXES if self.table is None else RECORD_SUFFIXES
        suffix = self.output.suffix.lower()
        if suffix not in suffixes:
            raise ValueError(f'Expected an --output that ends in {", ".join(suffixes)}, got {self.output}')
        if not self.output.absolute().parent.is_dir():
            raise FileNotFoundError(f'No such folder: {self.output.absolute().parent}')
        if self.output.exists() and not self.output.is_file():
            raise ValueError(f'Expected a file as --output, {self.output} is none')
        self._refuse_replacing()
        if suffix == '.parquet':
            import_extra('pyarrow', 'embed')

    def _refuse_replacing(self) -> None:
        if self.output.is_file() and not self.overwrite:
            raise ValueError(f'{self.output} is there already: --overwrite replaces it, once all results are there')

    def prepare(self, files: Sequence[str], settings: Dict[str, Any]) -> List[str]:
        """Make the folder, or go on from it. Returns the `files` that have no result yet, each once.

        Args:
            files: All images.
            settings: What the results depend on beside the images, for JSON. A run with others does not go on.

        Raises:
            ValueError: The folder holds something else, or results of other settings or other images, or of images
                that were changed since. Or another run uses it.
        """
        files = list(dict.fromkeys(files))
        if self.output.suffix.lower() == '.safetensors' and _length_in_header(files) > _LARGEST_HEADER:
            raise ValueError(f'{len(files)} names are too many for the header of a safetensors file: write .parquet')
        if not all(os.path.isabs(file) for file in files):  # elsewhere the same paths are other images
            settings = dict(settings, working_directory=os.getcwd())
        settings = json.loads(json.dumps(dict(settings, format=1, version=__version__)))  # as it is read again
        marker = self.folder / 'settings.json'
        self.folder.mkdir(exist_ok=True)
        self._refuse_other_content(marker)  # before a lock is put there
        self._take_lock()
        self._refuse_other_content(marker)  # a run that has just ended may have left some
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
                f'{self.folder} holds results of a run with another {clean(", ".join(differing))}: remove it to start '
                f'anew, or choose another --output')
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
        """Refuse a folder of somebody else. One of a run that was killed while it began is taken."""
        if marker.is_file():
            return
        for path in self.folder.iterdir():
            if path.name != 'lock' and not _UNFINISHED.fullmatch(path.name):
                raise ValueError(f'{self.folder} holds something else than results: choose another --output')

    def _take_lock(self) -> None:
        """Keep other runs out of the folder until `close`, or until this process ends in any way."""
        self._lock = open(self.folder / 'lock', 'ab')  # noqa: SIM115
        try:
            if sys.platform == 'win32':
                msvcrt.locking(self._lock.fileno(), msvcrt.LK_NBLCK, 1)
            else:  # a lock of this process alone: those that read images do not inherit it
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            raise ValueError(f'{self.folder} is in use by another run of this command: wait for its end') from e
        except OSError as e:
            _logger.warning(f'{self.folder} cannot be locked, do not run this command twice at once: {one_line(e)}')

    def _refuse_changed(self, index: _Index) -> None:
        """Refuse results of images that were written to after their part."""
        written = [path.stat().st_mtime for path in index.parts]
        for file, (part, _) in index.rows.items():
            if os.path.exists(file) and os.stat(file).st_mtime > written[part]:
                raise ValueError(
                    f'{clean(file, 4096)} was changed after its result was computed: remove {self.folder} to start '
                    f'anew, or choose another --output')

    def close(self) -> None:
        """Let other runs use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def add(self, file: str, row: Any) -> None:
        """Keep the result of an image.

        Results are written together, once there are 512, or when one is added 10 seconds after the last were written.
        """
        self._added.append((file, row))
        if len(self._added) >= _PART_IMAGES or time.monotonic() - self._since > _PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added."""
        if self._added:
            content = self._kind.content([file for file, _ in self._added], [row for _, row in self._added])
            path = self.folder / f'{uuid.uuid4().hex}{self._kind.suffix}'
            save_atomically(path, lambda f: f.write(content))
            self._added = []
        self._since = time.monotonic()

    def close_early(self, alone: bool) -> None:
        """Keep what is done when the command ends in an error.

        A process that is alone leaves no folder without a result. With several processes the folder stays: the others
        may still write there.
        """
        try:
            self.flush()
        except OSError:  # the disk is full: the error that ended the command says more
            pass
        if alone and self.folder.is_dir() and not self._part_files():
            self._remove([])

    def finish(self, files: Sequence[str], info: Dict[str, str], unreadable: int = 0) -> int:
        """Write the output, with the images in the order of `files`, and remove the parts. Returns how many there are.

        Args:
            files: All images. Those without a result are left out.
            info: What the file says about itself, where its format has a place for that.
            unreadable: How many images have no result because they could not be read.

        Raises:
            ValueError: More results are missing, or none is there, or a file of the output's name is there meanwhile.
        """
        index = self._index()
        files = list(dict.fromkeys(files))
        order = [file for file in files if file in index.rows]
        missing = len(files) - len(order)
        if missing != unreadable:
            raise ValueError(
                f'Expected results of all but {unreadable} images in {self.folder}, {missing} are missing: the same '
                f'command goes on from there')
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
        """Names and results of some images after the other. A few parts are held: neighbours are in the same ones."""
        held: 'OrderedDict[int, List[Any]]' = OrderedDict()
        for start in range(0, len(order), _CHUNK):
            files = list(order[start:start + _CHUNK])
            places: Dict[int, List[Tuple[int, int]]] = {}  # of each part: where its rows go, and which ones
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
        """Remove these parts, the settings, the lock and what a killed run left unfinished. Where something else is in
        the folder, it stays."""
        self.close()
        unfinished = [path for path in self.folder.iterdir() if _UNFINISHED.fullmatch(path.name)]
        for path in (*parts, *unfinished, self.folder / 'settings.json', self.folder / 'lock'):
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


# ---- formats ---------------------------------------------------------------------------------------------------------

@dataclass
class _Merged:
    """All results in order, for a writer."""
    files: List[str]
    chunks: Iterator[Tuple[List[str], List[Any]]]
    table: Optional[Table]
    info: Dict[str, str]

    def vectors(self) -> Tuple[int, Iterator[np.ndarray]]:
        """The length of a vector, and the vectors (N, length) of some images after the other."""
        _, first = next(self.chunks)
        return len(first[0]), (np.stack(rows) for rows in self._starting_with(first))

    def _starting_with(self, first: List[Any]) -> Iterator[List[Any]]:
        yield first
        for _, rows in self.chunks:
            yield rows

    def rows(self) -> Iterator[List[Tuple[Any, ...]]]:
        """The rows of the table of some images after the other."""
        assert self.table is not None
        for _, records in self.chunks:
            yield [row for record in records for row in self.table.rows(record)]


def _write_jsonl(f: BinaryIO, results: _Merged) -> None:
    for _, records in results.chunks:
        for record in records:
            f.write(json.dumps(record, allow_nan=False).encode() + b'\n')


def _write_csv(f: BinaryIO, results: _Merged) -> None:
    assert results.table is not None
    # the bytes of a name that is no text stay as they are
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
    """A name as text that every format takes: bytes that are none become \\udc80 and the like."""
    return value.encode('utf-8', 'backslashreplace').decode()


def _write_npz(f: BinaryIO, results: _Merged) -> None:
    """Arrays `file` and `embedding`, as `np.savez` writes them, some rows at a time."""
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
    """Bytes that the names take in the header of a safetensors file: JSON as a string of JSON."""
    return len(json.dumps(json.dumps(files)))


def _write_safetensors(f: BinaryIO, results: _Merged) -> None:
    """A tensor `embedding`, and the names of the files as a JSON list under `file` in the metadata."""
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
