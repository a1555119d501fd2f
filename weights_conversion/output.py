""" Write a folder completely or not at all. """
import contextlib
import os
import re
import secrets
import shutil
import socket
from pathlib import Path
from typing import Iterator, List, Union

__all__ = ['check_output', 'new_folder']

# Everything that a conversion writes. `--force` replaces a folder only if there is nothing else in it.
_OURS = re.compile(
    r'model\.safetensors|class_row\.safetensors|config\.json|preprocessor_config\.json|README\.md|\w+\.pth')


def check_output(path: Union[str, 'os.PathLike[str]'], force: bool) -> Path:
    """Refuse an output folder that would overwrite something, before any work is done.

    Raises:
        ValueError: It is there and not empty without `force`, or it has other files than a conversion writes.
    """
    path = Path(os.path.abspath(os.path.realpath(path)))
    if not path.name:
        raise ValueError(f'Expected a folder for the output, got {path}.')
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir())
        if inside and not force:
            raise ValueError(f'The output folder {path} is not empty: choose another one, or replace it with --force.')
        others = [n for n in inside if not _OURS.fullmatch(n) or (path / n).is_dir()]
        if others:
            raise ValueError(f'The output folder {path} holds other files ({ascii(others[0])}): choose another one.')
    elif os.path.lexists(path):
        raise ValueError(f'Expected a folder for the output, {path} is a file.')
    return path


@contextlib.contextmanager
def new_folder(path: Path, force: bool) -> Iterator[Path]:
    """A folder to fill, which becomes `path` once the block has ended without an error.

    The folder lies next to `path` under a hidden name until then. A killed process leaves it behind, and the next run
    with the same `path` removes it.

    Args:
        path: Result of `check_output`.
        force: Replace `path` if it is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean_up(path)
    mark = f'{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}'
    new = path.parent / f'.{path.name}.{mark}.partial'
    old = path.parent / f'.{path.name}.{mark}.old'
    try:
        new.mkdir()
        yield new
        for file in new.iterdir():
            with open(file, 'rb+') as f:
                os.fsync(f.fileno())
        check_output(path, force)  # again, as the work took its time
        if path.is_dir() and any(path.iterdir()):
            path.rename(old)
            try:
                new.rename(path)
            except BaseException:
                old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            if path.is_dir():
                path.rmdir()
            new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _clean_up(path: Path) -> None:
    """Remove what killed runs on this machine left behind, and put back what they had moved out of the way."""
    pattern = re.compile(
        rf'\.{re.escape(path.name)}\.{re.escape(socket.gethostname())}\.(\d+)\.[0-9a-f]{{8}}\.(partial|old)')
    stale: List[Path] = []
    for p in path.parent.iterdir():
        m = pattern.fullmatch(p.name)
        if m and p.is_dir() and not p.is_symlink() and not _alive(int(m.group(1))):
            stale.append(p)
    for p in stale:
        if p.suffix == '.old' and not os.path.lexists(path):
            p.rename(path)
        else:
            shutil.rmtree(p, ignore_errors=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid() or os.name == 'nt':  # where signal 0 is not a question
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
