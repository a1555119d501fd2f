""" Write a set of files into a folder: all of them completely or none. Other files in the folder are not changed. """
import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Dict, Iterator, Sequence

from pvt_timm.files import PathLike, checkpoints_among, find_checkpoint
from pvt_timm.labels import LABELS_FILE
from pvt_timm.sources import NEIGHBOURS


__all__ = ['KEPT_SOURCE', 'check_output', 'files_in', 'new_files']

KEPT_SOURCE = 'source'  # folder inside of an output for a copy of the source file (`keep_source`)

_ASIDE = '.partial'  # end of the name of the hidden folder in which files are prepared

# Content of the text file that replaces the weights while the other files are replaced. No reader takes it for weights.
_STOPPED = ('pvt-convert was stopped while it replaced the files of this folder. Those that were here before are in '
            '{old}, complete. Move them back, or convert again with --force.\n')


def check_output(path: PathLike, force: bool) -> Path:
    """Return the absolute path of an output folder. Refuse one that cannot be used.

    Raises:
        ValueError: `path` is not a folder, or it is not empty and `force` is not set.
    """
    if not os.fspath(path):
        raise ValueError('Expected a folder for the output, got an empty name.')
    path = Path(path).resolve()
    if not path.name or os.path.lexists(path) and not path.is_dir():
        raise ValueError(f'Expected a folder for the output, {path} is {"a file" if path.name else "the root folder"}.')
    if path.is_dir() and not force:
        inside = [p.name for p in path.iterdir()]
        aside = [name for name in inside if name.startswith('.') and name.endswith(_ASIDE)]
        if len(inside) > len(aside):
            stopped = f' A conversion that was stopped has left {path / aside[0]} there.' if aside else ''
            raise ValueError(
                f'The output folder {path} is not empty: choose another one, or replace the files of the same names '
                f'with --force, others stay.{stopped}')
    return path


def files_in(folder: Path) -> Dict[str, int]:
    """Return the bytes of each file in a folder and its subfolders, by its path relative to the folder, with '/'."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob('*') if p.is_file()}
    return {name: found[name].stat().st_size for name in sorted(found)}


@contextlib.contextmanager
def new_files(path: Path, force: bool, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield a hidden folder to write files into. If the block ends without an error, its files move to `path`.

    If `path` does not exist, it appears with all files at once. If it exists, files are replaced one by one. First, the
    weights are replaced by a text file, which no reader takes for weights. Then the other files follow, and the new
    weights come last. So old weights are never beside new settings. After an error the old files are put back.

    If the process is killed, the hidden folder `.NAME-*.partial` stays: inside of `path` if that existed, otherwise
    beside it. If files were being replaced, its folder `old` has all old files. Later runs do not change it.

    Args:
        path: The path that `check_output` returned.
        force: Whether files of the same names are replaced.
        sources: Files that are being converted. They are never replaced.

    Raises:
        ValueError: The folder would hold two checkpoints, or a config that belongs to other weights, or a source would
            be replaced. No file has been changed.
        OSError: Files cannot be written, or old files cannot be put back. The error says where the old files are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    home = path if path.is_dir() else path.parent
    hidden = Path(tempfile.mkdtemp(prefix=f'.{path.name}-', suffix=_ASIDE, dir=home))
    try:
        new = hidden / 'new'
        new.mkdir()
        yield new
        check_output(path, force)  # again: files may have been added in the meantime
        if os.path.lexists(path):
            _check_names(path, new, sources)
            _replace(path, new, hidden / 'old')
        else:
            new.rename(path)
    except _NotPutBackError:  # the hidden folder stays: `old` has the only copies of the old files
        raise
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    shutil.rmtree(hidden, ignore_errors=True)


class _NotPutBackError(OSError):
    """Raised if files could not be put back after an error."""


def _check_names(path: Path, new: Path, sources: Sequence[Path]) -> None:
    """Refuse a folder in which a source would be replaced, or readers would find two checkpoints or a wrong config."""
    names = files_in(new)
    for name in names:
        there = path / name
        if there.parent != path and os.path.lexists(there.parent) and (
                there.parent.is_symlink() or not there.parent.is_dir()):
            raise ValueError(f'Expected {there.parent} to be a folder, or not to exist: it is a file or a link.')
        if not os.path.lexists(there):
            continue
        if not there.is_symlink() and not there.is_file():
            raise ValueError(
                f'Expected {there} to be a file, or not to exist: it is something else, and is not replaced.')
        if any(os.path.samefile(there, source) for source in sources if there.exists()):
            raise ValueError(f'{there} is being converted and would be replaced: choose another folder.')

    weights = find_checkpoint(new).name
    others = {p.name for p in path.iterdir() if p.is_file()} - set(names)
    found = [p.name for p in checkpoints_among(Path(name) for name in (weights, *others))]
    if found != [weights]:
        rivals = ', '.join(name for name in found if name != weights)
        raise ValueError(
            f'The output folder {path} also holds {rivals}, so it would not be clear which weights to load. Choose '
            f'another folder.')
    for name in (*NEIGHBOURS, LABELS_FILE):
        if name in others:
            raise ValueError(
                f'The output folder {path} holds {name}, which would be read with the new weights: choose another '
                f'folder, or remove that file.')


def _replace(path: Path, new: Path, old: Path) -> None:
    """Move the files of `new` to the same names in `path`, all of them or none."""
    weights = find_checkpoint(new).name
    names = [*(name for name in files_in(new) if name != weights), weights]
    saved = [name for name in names if os.path.lexists(path / name)]
    for name in saved:
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(path / name, old / name)
    marker = new.with_name('marker')
    marker.write_text(_STOPPED.format(old=old), encoding='utf-8')
    made = sorted({(path / name).parent for name in names if not (path / name).parent.exists()})
    try:
        os.replace(marker, path / weights)
        for folder in made:
            folder.mkdir()
        for name in names:
            os.replace(new / name, path / name)
    except BaseException as e:
        if not (new / weights).exists():  # the weights, which come last, have arrived: everything is in place
            raise
        try:
            for name in names:
                arrived = not (marker if name == weights else new / name).exists()
                if arrived and name in saved:
                    os.replace(old / name, path / name)
                elif arrived:
                    (path / name).unlink()
            for folder in made:
                with contextlib.suppress(OSError):  # this folder was not made yet
                    folder.rmdir()
        except BaseException as again:
            raise _NotPutBackError(
                f'Cannot put back the files that were in {path}, they are in {old}: {again}') from e
        raise


def _link_or_copy(file: Path, to: Path) -> None:
    """Give a file the second name `to`, which stays when the first one is replaced. Copy it if that is impossible."""
    try:
        os.link(file, to, follow_symlinks=False)
    except (OSError, NotImplementedError):  # the file system has no links, or the file belongs to another user
        shutil.copy2(file, to, follow_symlinks=False)
