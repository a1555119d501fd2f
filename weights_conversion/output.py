""" Write a folder completely or not at all. """
import contextlib
import os
import re
import tempfile
from pathlib import Path
from typing import Iterator

from pvt_timm.files import PathLike

__all__ = ['check_output', 'new_folder']

# Everything that a conversion writes. `--force` replaces a folder only if there is nothing else in it.
_OURS = re.compile(
    r'model\.safetensors|class_row\.safetensors|config\.json|preprocessor_config\.json|README\.md|class_names\.txt|'
    r'[\w.-]+\.pth')


def check_output(path: PathLike, force: bool) -> Path:
    """Refuse an output folder that would overwrite something, before any work is done."""
    path = Path(path).resolve()
    if not path.name or os.path.lexists(path) and not path.is_dir():
        raise ValueError(f'Expected a folder for the output, {path} is {"a file" if path.name else "none"}.')
    inside = sorted(path.iterdir()) if path.is_dir() else []
    if inside and not force:
        raise ValueError(f'The output folder {path} is not empty: choose another one, or replace it with --force.')
    others = [p.name for p in inside if not _OURS.fullmatch(p.name) or p.is_dir()]
    if others:
        raise ValueError(f'The output folder {path} holds other files ({ascii(others[0])}): choose another one.')
    return path


@contextlib.contextmanager
def new_folder(path: Path, force: bool) -> Iterator[Path]:
    """A folder to fill, which becomes `path` once the block has ended without an error.

    It lies next to `path` under a hidden name until then, and is removed after an error. A process that is killed
    leaves it behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}.', suffix='.partial', dir=path.parent) as hidden:
        new, old = Path(hidden, 'new'), Path(hidden, 'old')
        new.mkdir()
        yield new
        check_output(path, force)  # again, as the work took its time
        try:
            if path.is_dir():
                path.rename(old)
            new.rename(path)
        except BaseException:
            if old.is_dir() and not path.exists():
                old.rename(path)
            raise
