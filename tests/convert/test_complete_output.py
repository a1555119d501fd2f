""" An output of the converter is complete or does not exist, and names in a checkpoint cannot disturb its card. """
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pvt_timm.formats.mapping import map_to_timm
from pvt_timm.files import read_checkpoint
from weights_conversion import convert
from tests.support import convert_files as files
from tests.support.systems import mkfifo, needs_resource, symlink


@pytest.fixture
def program(client_env):
    return lambda code, *argv: subprocess.run(
        [sys.executable, '-c', code, *map(str, argv)], env=client_env, capture_output=True, text=True)


def state(out: Path):
    return {p.name: p.read_bytes() for p in out.iterdir()} if out.is_dir() else None


def test_shared_weights_are_written_one_by_one(tmp_path):
    source = files.make('original')
    source['block2.1.norm1.weight'] = source['block2.0.norm1.weight']
    source['block2.1.norm1.bias'] = source['block2.0.norm1.weight'][:]
    convert(files.save(source, tmp_path / 'x.pth'), tmp_path / 'out')
    convert(tmp_path / 'out', tmp_path / 'back', to='original')
    assert files.same(read_checkpoint(tmp_path / 'back'), source)


def test_names_cannot_break_out_of_the_card_or_the_terminal(tmp_path):
    source = files.wrap(files.make('original'), 'state_dict', 'backbone.')
    source['state_dict']['x`|\n---\n# hello\x1b[2J<script>'] = torch.ones(1)
    report = convert(files.save(source, tmp_path / 'x.pth'), tmp_path / 'out')
    card = (tmp_path / 'out' / 'README.md').read_text()
    lines = [line for line in card.splitlines() if 'script' in line]  # in an indented block, which is shown as it is
    assert len(lines) == 1 and lines[0].startswith('    ') and '# hello' in lines[0]
    assert all(line.isprintable() for line in (*card.splitlines(), *report.to_text().splitlines()))


def visible(out: Path):
    """Return name and content of the files that are not hidden, None if there is no folder."""
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} if out.is_dir() else None


# ---- stopped in the middle -------------------------------------------------------------------------------------------

class Moments:
    """Calls a function before each operation of Python on files in a folder, while `watching`.

    Python reports these operations to its audit hooks, whichever function or module does them.
    """
    MAKE = ('open', 'os.link', 'os.mkdir', 'os.rename')  # os.replace is announced as os.rename
    REMOVE = ('os.remove', 'os.rmdir')

    def __init__(self):
        self.folder, self.events, self.act = None, (), None
        sys.addaudithook(self._hook)  # which cannot be removed again

    def _hook(self, event, args):
        if self.folder is None or event not in self.events:
            return
        if event == 'open' and not set(args[1] or '') & set('wax+'):
            return
        if any(isinstance(arg, (str, os.PathLike)) and os.fspath(arg).startswith(self.folder) for arg in args):
            act, folder, self.folder = self.act, self.folder, None  # what `act` does to files is not announced
            try:
                act()
            finally:
                self.folder = folder

    @contextlib.contextmanager
    def watching(self, folder, act, events=MAKE):
        self.folder, self.act, self.events = str(folder), act, events
        try:
            yield
        finally:
            self.folder = None


@pytest.fixture(scope='module')
def moments():
    return Moments()


@pytest.fixture
def place(request, tmp_path):
    """Return the path of an output: no folder yet, or one that is empty, has an old output, or has a training."""
    out = tmp_path / 'place' / 'out'
    out.parent.mkdir()
    if request.param == 'old':
        convert(files.save(files.make('original', seed=1), tmp_path / '1.pth'), out)
        (out / 'thesis.tex').write_text('years of work', encoding='utf-8')
    elif request.param != 'nothing':
        out.mkdir()
    if request.param == 'training':
        files.save(files.make('original', seed=3), out / 'epoch_1.pth')
    return out


@pytest.fixture
def finished(tmp_path):
    """Return a file to convert, and the files that a conversion of it writes."""
    file = files.save(files.make('original', seed=2), tmp_path / '2.pth')
    convert(file, tmp_path / 'finished')
    return file, visible(tmp_path / 'finished')


PLACES = pytest.mark.parametrize('place', ['nothing', 'empty', 'training', 'old'], indirect=True)


@PLACES
def test_killed_at_any_moment(place, finished, moments, tmp_path):
    """After a kill, the folder holds the old weights, the new weights, or none and a copy of the old files.

    Other files stay. A killed process leaves what is on the disk at that moment, so the test copies the folder at every
    moment.
    """
    file, new = finished
    before = visible(place)
    complete = {**(before or {}), **new}
    copies = []

    def copy():
        copies.append(shutil.copytree(place.parent, tmp_path / f'copy {len(copies)}') / 'out')

    with moments.watching(place.parent, copy, Moments.MAKE + Moments.REMOVE):
        convert(file, place, force=True)
    assert visible(place) == complete and len(copies) > len(new)
    ends = [visible(out) for out in copies]
    assert ends[0] == before and ends[-1] == complete
    between = [out for out, end in zip(copies, ends) if end not in (before, complete)]
    assert bool(between) == (before is not None)
    for out in between:
        with pytest.raises(ValueError, match='pvt-convert was'):  # the start of the text that stands for the weights
            read_checkpoint(out)
        aside, = out.glob('.out-*.partial')
        assert str(place / aside.name) in (out / 'model.safetensors').read_text(encoding='utf-8')
        for name, content in (before or {}).items():
            assert (aside / 'old' / name if name in new else out / name).read_bytes() == content
    for out in (copies[len(copies) // 2], *between[:1]):  # whatever was left behind is in nobody's way
        convert(file, out, force=True)
        assert visible(out) == complete


@pytest.mark.parametrize('place', ['nothing', 'old'], indirect=True)
def test_interrupted_at_any_moment(place, finished, moments, tmp_path):
    """After Ctrl-C at any moment, the folder is unchanged or complete, and no temporary file is left."""
    file, new = finished
    before = visible(place)
    complete = {**(before or {}), **new}
    original = shutil.copytree(place.parent, tmp_path / 'original')
    wait, codes = 0, []
    while codes[-1:] != [0]:
        left = wait

        def interrupt():
            nonlocal left
            left -= 1
            if left == -1:
                raise KeyboardInterrupt

        with moments.watching(place.parent, interrupt):
            codes.append(files.run(file, '--output', place, '--quiet', '--force')[0])
        assert [p.name for p in place.parent.iterdir()] in ([], ['out'])
        assert visible(place) == (before if codes[-1] else complete) and not list(place.parent.glob('**/.*'))
        shutil.rmtree(place.parent)
        shutil.copytree(original, place.parent)
        wait += 1
    assert set(codes[:-1]) == {130} and len(codes) > len(new)


_SIGNALLED = '''
import os, signal, sys
import weights_conversion.converter
from weights_conversion.cli import main

def kill(event, args):
    if event == 'os.rename' and sys.argv[2] in str(args[1]):
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))

sys.addaudithook(kill)
sys.exit(main([sys.argv[3], '--output', sys.argv[4], '--quiet', '--force']))
'''


@pytest.mark.parametrize('place', ['old'], indirect=True)
@pytest.mark.parametrize('name', ['SIGKILL', 'SIGTERM'])
def test_signal(name, place, finished, program):
    """A signal arrives while files are replaced, after the weights and before any other file."""
    if not hasattr(signal, name) or os.name != 'posix':  # on Windows every signal kills at once
        pytest.skip(f'needs the signal {name} of POSIX')
    file, new = finished
    before = visible(place)
    done = program(_SIGNALLED, name, 'README.md', file, place)
    assert done.returncode == (-signal.SIGKILL if name == 'SIGKILL' else 130), done.stderr
    hidden = [p.name for p in place.glob('.*')]
    if name == 'SIGTERM':
        assert visible(place) == before and not hidden
    else:
        assert len(hidden) == 1 and hidden[0].endswith('.partial')
        with pytest.raises(ValueError, match='pvt-convert was'):
            read_checkpoint(place)


def test_files_come_back_after_an_error(tmp_path, monkeypatch):
    """If a move fails, the old files are put back. If that fails too, the error says where they are."""
    file, out = files.save(files.make('original'), tmp_path / 'x.pth'), tmp_path / 'out'
    convert(file, out, keep_source=True)
    (out / 'config.json').unlink()  # one that was not there
    (out / 'source' / 'x.pth').write_text('old')
    before = {**visible(out), 'source/x.pth': b'old'}
    replace, calls, failing = os.replace, [], []

    def fails(*args):
        calls.append(args)
        if len(calls) in failing:
            raise OSError(28, 'No space left')
        replace(*args)
    monkeypatch.setattr(os, 'replace', fails)
    for number in range(1, 6):
        calls.clear()
        failing[:] = [number]
        with pytest.raises(OSError, match='No space left'):
            convert(file, out, force=True, keep_source=True)
        assert {**visible(out), 'source/x.pth': (out / 'source' / 'x.pth').read_bytes()} == before
        assert not list(out.glob('.*')) and sorted(p.name for p in out.iterdir()) == sorted(
            ['README.md', 'model.safetensors', 'source'])
    calls.clear()
    failing[:] = [4, 5]
    with pytest.raises(OSError, match=r'Cannot put back .*\.partial/old: ') as error:
        convert(file, out, force=True, keep_source=True)
    kept = Path(re.search(r'they are in (.+?): ', str(error.value))[1])
    assert all((kept / name).read_bytes() == content for name, content in before.items() if name != 'config.json')


def test_no_links(tmp_path, monkeypatch):
    """On a file system without hard links, the old files are copied."""
    def link(*args, **kwargs):
        raise OSError(95, 'Operation not supported')
    file, out = files.save(files.make('original'), tmp_path / 'x.pth'), tmp_path / 'out'
    convert(file, out)
    complete = visible(out)
    (out / 'config.json').write_text('old')
    monkeypatch.setattr(os, 'link', link)
    convert(file, out, force=True)
    assert visible(out) == complete and not list(out.glob('.*'))


def unchanged(path: Path):
    """Return values that change if a file is written or replaced, but not if it is read."""
    stat = path.lstat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


# ---- what is in the folder already -----------------------------------------------------------------------------------

@pytest.mark.parametrize('to', ['timm', 'original'])
def test_other_files_of_a_folder_stay(to, tmp_path):
    """A conversion leaves other files of the folder unchanged: a training, a text, a folder, a link, a pipe."""
    out = tmp_path / 'runs'
    out.mkdir()
    file = files.save(files.make('original'), tmp_path / 'x.pth')
    (out / 'thesis.tex').write_text('years of work')
    (out / 'sub').mkdir()
    (out / 'sub' / 'config.json').write_text('{}')
    if hasattr(os, 'mkfifo'):
        os.mkfifo(out / 'pipe')
    if to == 'timm':
        (out / 'epoch_1.pth').write_bytes(b'weights')
        with contextlib.suppress(OSError):  # which not every user of Windows may make
            (out / 'optimizer.pth').symlink_to(out / 'epoch_1.pth')
    with pytest.raises(ValueError, match='not empty'):
        convert(file, out, to=to)
    there = {p: unchanged(p) for p in out.rglob('*')}
    for _ in range(2):
        report = convert(file, out, to=to, force=True)
        for path, before in there.items():
            assert unchanged(path) == before or path == out / 'sub', path
        assert {p for p in out.iterdir() if p not in there} == {out / name for name in report.files}
        assert convert(out, tmp_path / 'again' / to, force=True).sha256


@pytest.mark.parametrize('how', ['file', 'link', 'hard link', 'folder', 'beside'])
def test_the_source_is_not_replaced(how, tmp_path):
    """A source is not replaced, whichever name it is given by, and neither are files that were read with it."""
    out = tmp_path / 'w'
    out.mkdir()
    file = files.save(files.make('original'), out / 'test_pvt.pth')
    to, source = 'original', file
    if how == 'link':
        source = file.rename(tmp_path / 'x.pth')
        symlink(file, source)
    elif how == 'hard link':
        source = tmp_path / 'x.pth'
        os.link(file, source)
    elif how == 'folder':
        file.rename(tmp_path / 'x.pth')
        convert(tmp_path / 'x.pth', out, force=True)
        to, source = 'timm', out
    elif how == 'beside':  # the folder's config.json tells what the weights do not
        (out / 'config.json').write_text('{"image_size": 32}')
        to, source = 'timm', out
    before = {p.name: (unchanged(p), p.read_bytes()) for p in out.iterdir()}
    with pytest.raises(ValueError, match='is being converted and would be replaced'):
        convert(source, out, to=to, force=True)
    assert {p.name: (unchanged(p), p.read_bytes()) for p in out.iterdir()} == before


def test_a_source_beside_its_output(tmp_path):
    """`pvt-convert w/pvt_tiny.pth -o w --force` works twice, and does not change the source."""
    file = files.save(files.make('original'), tmp_path / 'x.pth')
    before = file.read_bytes()
    for _ in range(2):
        convert(file, tmp_path, force=True)
        assert file.read_bytes() == before
        assert files.same(read_checkpoint(tmp_path), map_to_timm(read_checkpoint(file)).state_dict)


@pytest.mark.parametrize('to, other', [
    ('timm', 'class_row.safetensors'), ('timm', 'preprocessor_config.json'), ('timm', 'class_names.txt'),
    ('original', 'epoch_1.pth'), ('original', 'model.safetensors'), ('original', 'config.json'),
    ('original', 'class_row.safetensors'), ('transformers', 'class_row.safetensors'),
    ('transformers', 'class_names.txt'),
])
def test_a_folder_that_could_not_be_read_is_refused(to, other, tmp_path):
    """An output folder is refused if it has a second checkpoint, or a file that is read with any weights."""
    file, out = files.save(files.make('original'), tmp_path / 'x.pth'), tmp_path / 'out'
    out.mkdir()
    (out / other).write_text('{}')
    with pytest.raises(ValueError, match=re.escape(other)):
        convert(file, out, to=to, force=True)
    assert visible(out) == {other: b'{}'} and not list(out.glob('.*'))


@pytest.mark.parametrize('kind', ['folder', 'pipe', 'source is a file', 'source is a link'])
def test_what_is_no_file_is_not_replaced(kind, tmp_path):
    file, out = files.save(files.make('original'), tmp_path / 'x.pth'), tmp_path / 'out'
    out.mkdir()
    if kind == 'folder':
        (out / 'config.json').mkdir()
    elif kind == 'pipe':
        mkfifo(out / 'config.json')
    elif kind == 'source is a file':
        (out / 'source').write_text('code')
    else:
        symlink(out / 'source', tmp_path)
    before = sorted(out.iterdir())
    with pytest.raises(ValueError, match='or not to exist: it is '):
        convert(file, out, force=True, keep_source=True)
    assert sorted(out.iterdir()) == before


def test_a_link_is_replaced_and_not_its_target(tmp_path):
    file, out = files.save(files.make('original'), tmp_path / 'x.pth'), tmp_path / 'out'
    out.mkdir()
    (tmp_path / 'notes.md').write_text('mine')
    symlink(out / 'README.md', tmp_path / 'notes.md')
    convert(file, out, force=True)
    assert (tmp_path / 'notes.md').read_text() == 'mine' and not (out / 'README.md').is_symlink()


def test_the_folder_that_a_shell_stands_in(program, tmp_path):
    files.save(files.make('original'), tmp_path / 'x.pth')
    inode = tmp_path.stat().st_ino
    done = program('import os, sys; from weights_conversion.cli import main; os.chdir(sys.argv[1])\n'
                   'sys.exit(main(["x.pth", "--output", ".", "--force", "-q"]) or len(os.listdir(".")) - 4)', tmp_path)
    assert done.returncode == 0 and tmp_path.stat().st_ino == inode, done.stderr
    with pytest.raises(ValueError, match='empty name'):
        convert(tmp_path / 'x.pth', '')


@pytest.mark.parametrize('to', ['timm', 'original', 'mmdet'])
def test_a_kept_source_is_not_taken_for_the_weights(to, tmp_path):
    source = files.make('mmdet')
    file = files.save(source, tmp_path / 'test_pvt.pth')
    report = convert(file, tmp_path / 'out', to=to, keep_source=True)
    assert (tmp_path / 'out' / 'source' / 'test_pvt.pth').read_bytes() == file.read_bytes()
    assert report.files['source/test_pvt.pth'] == file.stat().st_size
    convert(tmp_path / 'out', tmp_path / 'back', to='mmdet', drop=['class_token'] if to == 'original' else [])
    assert files.same(read_checkpoint(tmp_path / 'back'), source)
    folder = convert(tmp_path / 'out', tmp_path / 'twice', keep_source=True)  # a source that is called as the weights
    assert 'source/model.safetensors' in folder.files or to != 'timm'


@needs_resource
@pytest.mark.parametrize('to', ['timm', pytest.param('original', marks=pytest.mark.slow)])
def test_full_disk(to, program, tmp_path):
    """If the disk is full, the old output stays. A limit of file sizes makes writing the weights fail in the middle."""
    file, out = files.save(files.make('original'), tmp_path / 'x.pth'), tmp_path / 'place' / 'out'
    convert(file, out)
    before = state(out)
    pytest.importorskip('resource', reason='needs the module resource')
    done = program('import resource, signal, sys\n'
                   'import weights_conversion.converter\n'
                   'from weights_conversion.cli import main\n'
                   'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
                   'resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n'
                   'sys.exit(main(sys.argv[1:]))\n', file, '--output', out, '--to', to, '--force')
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith('pvt-convert: error: Cannot write to ')
    assert state(out) == before and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize('how, error, says', [
    ('below a file', OSError, 'x.pth'), ('the root', ValueError, 'Expected a folder'), ('a bad name', OSError, 'out')])
def test_output_that_cannot_be_made(how, error, says, tmp_path):
    file = files.save(files.make('original'), tmp_path / 'x.pth')
    out = {'below a file': file / 'out', 'the root': Path(tmp_path.anchor), 'a bad name': tmp_path / ('out' * 100)}[how]
    with pytest.raises(error, match=says):
        convert(file, out)
    assert list(tmp_path.iterdir()) == [file]
