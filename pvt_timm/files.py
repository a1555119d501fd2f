""" Read and write checkpoint files. What is read may come from anywhere: nothing in it is executed. """
import argparse
import os
import re
import uuid
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterable, List, Tuple, Union

import numpy as np
import torch
from safetensors.torch import load_file

__all__ = [
    'MAX_BYTES', 'CheckpointError', 'checkpoints_among', 'find_checkpoint', 'read_checkpoint', 'save_atomically']

PathLike = Union[str, 'os.PathLike[str]']

# PVT-Large in float32, the largest checkpoint published. A training snapshot (weights, their average, two moments of
# Adam) is 4 times that, one of `pvt_huge_v2` about 18 times.
MAX_BYTES = 32 * 245_574_528

_FILES = ('model.safetensors', 'pytorch_model.bin', 'model.pth', 'model.pt')
_SUFFIXES = ('.safetensors', '.bin', '.pth', '.pt', '.tar')


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, is too large, or wants to execute something."""


def find_checkpoint(path: PathLike) -> Path:
    """The checkpoint that `path` means: the file itself, or that of a folder, the only one or under a usual name."""
    path = Path(path)
    if path.is_dir():
        found = checkpoints_among(p for p in path.iterdir() if p.is_file())
        if len(found) != 1:
            have = ', '.join(p.name for p in found[:4]) or 'none'
            raise CheckpointError(f'Expected one checkpoint file ({", ".join(_FILES[:2])}) in {path}, found {have}.')
        return found[0]
    if not path.exists():
        raise FileNotFoundError(f'No such file or folder: {path}')
    if not path.is_file():
        raise CheckpointError(f'Expected a file, got a device, pipe or socket: {path}')
    return path


def checkpoints_among(files: Iterable[Path]) -> List[Path]:
    """The one of a folder's files that is its checkpoint, by a usual name or as the only one, else all that may be."""
    by_name = {file.name: file for file in files}
    for name in _FILES:
        if name in by_name:
            return [by_name[name]]
    return [by_name[name] for name in sorted(by_name) if Path(name).suffix in _SUFFIXES]


def read_checkpoint(path: PathLike, max_bytes: int = MAX_BYTES) -> Dict[str, Any]:
    """Read a checkpoint file to the CPU without executing anything in it.

    The tensors may be backed by the file (memory mapped), so do not write to it while they are in use.

    Args:
        path: A safetensors file, a file written by `torch.save`, or a folder with one of them.
        max_bytes: Refuse a file that is larger.

    Raises:
        FileNotFoundError: No such file or folder.
        CheckpointError: Not a checkpoint, damaged, too large, or with anything but tensors, plain values, numpy's
            numbers and arrays, and `argparse.Namespace` in it.
    """
    path = find_checkpoint(path)
    size = path.stat().st_size
    if size > max_bytes:
        raise CheckpointError(
            f'Expected at most {max_bytes / 1e6:.1f} MB, {path.name} has {size / 1e6:.1f} MB. '
            f'Pass a larger max_bytes if you trust it.')
    kind = _kind(path)
    try:
        if kind == 'safetensors':
            checkpoint: Any = load_file(path)
        else:
            if kind == 'zip':
                _check_zip(path, size)
            with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
                warnings.simplefilter('ignore')  # an error follows
                checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=kind == 'zip')
        if not isinstance(checkpoint, dict):
            raise ValueError(f'Expected a dict of tensors, got {type(checkpoint).__name__}')
        if _tensor_bytes(checkpoint) > 4 * size:  # weights and their average may share memory, little else does
            raise ValueError('its tensors repeat what they hold many times over')
    except Exception as e:
        raise CheckpointError(f'{path.name} is {_what_is_wrong(e)}') from e
    return checkpoint


def save_atomically(path: PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a file aside and move it in place, so that it is there completely or not at all.

    What a link points to is replaced, not the link. A device or pipe is written to.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # before `resolve`, for which an open pipe is no path
        with open(path, 'wb') as f:
            write(f)
        return
    path = path.resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(f'No such folder: {path.parent}')
    aside = path.with_name(f'.{path.name}-{uuid.uuid4().hex}')
    try:
        with open(aside, 'xb') as f:
            write(f)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _kind(path: Path) -> str:
    """'safetensors', 'zip' or 'pickle' by content; the name of a file says nothing."""
    with open(path, 'rb') as f:
        start = f.read(16)
    if start[:4] == b'PK\x03\x04':
        return 'zip'
    if start[8:9] == b'{':  # before the next one: the length of a header may well start with byte 0x80
        return 'safetensors'
    if start[:1] == b'\x80':
        return 'pickle'
    raise CheckpointError(
        f'Expected a checkpoint (safetensors, or written by torch.save), {path.name} starts with {start!r}. '
        f'Is it a web page, or a pointer to what `git lfs pull` downloads?')


def _check_zip(path: Path, size: int) -> None:
    """torch compares no checksums, so damaged weights would pass."""
    with zipfile.ZipFile(path) as archive:
        if sum(record.file_size for record in archive.infolist()) > size:
            raise ValueError('its records claim more than the file holds, compressed ones are not read')
        bad = archive.testzip()
    if bad is not None:
        raise ValueError(f'the checksum of its record {ascii(bad)} is wrong')


def _tensor_bytes(checkpoint: Mapping[str, Any]) -> int:
    total, seen, todo = 0, set(), [checkpoint]
    while todo:
        x = todo.pop()
        if isinstance(x, torch.Tensor):
            total += x.numel() * x.element_size()
        elif isinstance(x, Mapping) and id(x) not in seen:  # a dict may hold itself
            seen.add(id(x))
            todo += x.values()
    return total


def _what_is_wrong(e: Exception) -> str:
    text = str(e).strip()
    if wanted := re.search(r'GLOBAL (\S+)', text):
        return (
            f'refused, nothing in it was executed: it wants {ascii(wanted[1])[1:-1]}, but only tensors, plain values, '
            f'numpy arrays and argparse.Namespace are read. Save the state_dict() alone where it was made.')
    # torch starts with advice to load with weights_only=False
    reason = re.sub(r'(?s).*WeightsUnpickler error: |Weights only load failed.*?\n\n+|In PyTorch 2.6,.*', '', text)
    return f'damaged or no checkpoint: {" ".join(reason.split())[:200] or type(e).__name__}'


# ---- what a pickle may name beside tensors and plain values ----------------------------------------------------------
# Trainers keep numpy's numbers and small arrays beside the weights. numpy's own unpickling takes flags and object
# pointers from the file, so these stand in for it: they rebuild plain numbers and text.

class _Dtype:
    def __init__(self, name: str, *_: Any):
        if not re.fullmatch(r'[biufcSU]\d+', name):
            raise ValueError(f'numpy values of type {name!r} are not read')
        self.plain = np.dtype(name)

    def __setstate__(self, state: Tuple[Any, ...]) -> None:
        self.plain = self.plain.newbyteorder(state[1])


class _Array(np.ndarray):
    def __new__(cls, *_: Any) -> '_Array':
        return super().__new__(cls, 0)

    def __setstate__(self, state: Tuple[Any, ...]) -> None:
        version, shape, dtype, fortran, data = state
        super().__setstate__((version, shape, dtype.plain, fortran, data))


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype.plain, 1)[0]


class _TrainingLog:
    """In place of the logs that OpenMMLab's training saves beside the weights, and of their functions."""

    def __init__(self, *args: Any):
        if args and args[0] is not _TrainingLog:
            raise ValueError('GLOBAL builtins.getattr')

    def __setstate__(self, state: Any) -> None:
        pass


_ALLOWED: Any = [
    argparse.Namespace,
    (_Dtype, 'numpy.dtype'),
    (_Array, 'numpy.ndarray'),
    (_Array, 'numpy.core.multiarray._reconstruct'),
    (_Array, 'numpy._core.multiarray._reconstruct'),  # since numpy 2
    (_scalar, 'numpy.core.multiarray.scalar'),
    (_scalar, 'numpy._core.multiarray.scalar'),
    (lambda: b'', 'builtins.bytes'),  # of an empty array
    (_TrainingLog, 'mmengine.logging.history_buffer.HistoryBuffer'),
    (_TrainingLog, 'builtins.getattr'),  # of a log
]
