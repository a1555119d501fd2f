""" Read and write checkpoint files. Files that are read may come from any source: nothing in them is executed. """
import errno
import os
import struct
import uuid
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterable, List, Optional, Union

from safetensors import SafetensorError
from safetensors.torch import load_file

from .torch_files import UnknownName, check_plain, read_legacy, read_zip

__all__ = [
    'MAX_BYTES', 'CheckpointError', 'check_folder', 'checkpoints_among', 'find_checkpoint', 'read_checkpoint',
    'refuse_same_file', 'save_atomically']

PathLike = Union[str, 'os.PathLike[str]']

# PVT-Large in float32, the largest checkpoint published. A training snapshot (weights, their average, two moments of
# Adam) is 4 times that, one of `pvt_huge_v2` about 18 times.
MAX_BYTES = 32 * 245_574_528

_FILES = ('model.safetensors', 'pytorch_model.bin', 'model.pth', 'model.pt')
_SUFFIXES = ('.safetensors', '.bin', '.pth', '.pt', '.tar')


# Errors that the readers of pickles, archives and safetensors raise for a damaged file. MemoryError and errors in this
# package itself are not among them.
_SIGNS_OF_DAMAGE = (
    ValueError, TypeError, LookupError, ArithmeticError, EOFError, RuntimeError, struct.error, zipfile.BadZipFile,
    SafetensorError)


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, is too large, or wants to execute something."""


def too_large(name: str, size: int, max_bytes: int) -> CheckpointError:
    """Return the error for a file of `size` bytes, which is too large."""
    return CheckpointError(
        f'Expected at most {max_bytes / 1e6:.1f} MB, {name} has {size / 1e6:.1f} MB. '
        f'Pass a larger max_bytes if you trust it.')


def find_checkpoint(path: PathLike) -> Path:
    """Return the checkpoint file that `path` names: the file itself, or the checkpoint in a folder.

    In a folder it is the file with one of the usual names, otherwise the only file with a checkpoint's extension.

    Raises:
        CheckpointError: The folder has no such file or several, or `path` is neither a file nor a folder.
        FileNotFoundError: `path` does not exist.
    """
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
    """Return the files that may be a folder's checkpoint: the one with a usual name, else all with its extensions."""
    by_name = {file.name: file for file in files}
    for name in _FILES:
        if name in by_name:
            return [by_name[name]]
    return [by_name[name] for name in sorted(by_name) if Path(name).suffix in _SUFFIXES]


def refuse_same_file(output: PathLike, *inputs: Optional[PathLike]) -> None:
    """Refuse an output that is one of the input files, also under another name (a link).

    Raises:
        ValueError: `output` is one of `inputs`.
    """
    for path in inputs:
        if path and os.path.isfile(path) and os.path.isfile(output) and os.path.samefile(path, output):
            raise ValueError(f'{output} is read and would be replaced: choose another name for the output.')


def check_folder(folder: PathLike) -> None:
    """Raise OSError if files cannot be written into a folder. A folder that does not exist is not created.

    For output whose folder is created with the first file: an error on the way there leaves no empty folder behind.
    """
    folder = Path(folder).absolute()
    # lexists: also a link that points to nothing
    there = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), None)
    if there is None:  # a drive that does not exist
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    if not there.is_dir():
        number = errno.EEXIST if there == folder else errno.ENOTDIR
    elif not os.access(there, os.W_OK | os.X_OK):
        number = errno.EACCES
    else:
        return
    raise OSError(number, os.strerror(number), str(there))


def read_checkpoint(path: PathLike, max_bytes: int = MAX_BYTES) -> Dict[str, Any]:
    """Read a checkpoint file to the CPU without executing anything in it.

    The tensors may be backed by the file (memory mapped), so do not write to it while they are in use.

    Args:
        path: A safetensors file, a file written by `torch.save`, or a folder with one of them.
        max_bytes: Largest size of a file. Larger files are refused.

    Returns:
        A dict of plain tensors and values. Parameters become tensors, and ordered dicts and `argparse.Namespace`
        objects become dicts.

    Raises:
        FileNotFoundError: No such file or folder.
        CheckpointError: The file is no checkpoint, is damaged or too large, or holds something else than tensors,
            plain values, numpy's numbers and arrays, and `argparse.Namespace`.
    """
    path = find_checkpoint(path)
    size = path.stat().st_size
    if size > max_bytes:
        raise too_large(path.name, size, max_bytes)
    kind = _kind(path)
    try:
        if kind == 'safetensors':
            return dict(load_file(path))
        checkpoint = read_zip(path, size) if kind == 'zip' else read_legacy(path, size)
        check_plain(checkpoint, size)
        if not isinstance(checkpoint, dict):
            raise ValueError(f'Expected a dict of tensors, got {type(checkpoint).__name__}')
    except UnknownName as e:
        raise CheckpointError(
            f'{path.name} is refused, nothing in it was executed: it wants {ascii(str(e))[1:-1][:120]}, but only '
            f'tensors, plain values, numpy arrays and argparse.Namespace are read. '
            f'Save the state_dict() alone where it was made.') from e
    except _SIGNS_OF_DAMAGE as e:
        raise _damaged(path.name, e) from e
    except OSError as e:  # EINVAL means damage: a record claims to start before the file. Others are errors of the disk
        if e.errno != errno.EINVAL:
            raise
        raise _damaged(path.name, e) from e
    return checkpoint


def save_atomically(path: PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a new file in the same folder, then rename it to `path`: `path` is complete or unchanged.

    If `path` is a link, the file that it points to is replaced. If it is a device or pipe, it is written to directly.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # before `resolve`, which does not work for an open pipe
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
    except BaseException as e:
        aside.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.errno == errno.ENOSPC and e.filename is None:  # a write does not know the name
            e.filename = str(path)
        raise


def _kind(path: Path) -> str:
    """Return 'safetensors', 'zip' or 'pickle', according to the content of the file. Its name is not used."""
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


def _damaged(name: str, e: Exception) -> CheckpointError:
    return CheckpointError(f'{name} is damaged or no checkpoint: {" ".join(str(e).split())[:200] or type(e).__name__}')
