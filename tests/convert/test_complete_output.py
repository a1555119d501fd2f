""" An output of the converter is complete or not there, and says nothing that it must not. """
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import convert_files as files
from pvt_timm.files import read_checkpoint
from weights_conversion import convert

ROOT = Path(__file__).resolve().parents[2]


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
    assert '<script>' not in card and '\x1b' not in card and '\n# hello' not in card
    assert all(line.isprintable() for line in report.to_text().splitlines())


class Program:
    """Starts the converter in processes that are warm already and can be killed."""

    def __init__(self, pause):
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PAUSE': pause}
        self.process = subprocess.Popen(
            [sys.executable, '-c', _SLOW], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def start(self, *argv):
        """Returns the process id."""
        self.process.stdin.write(json.dumps([str(a) for a in argv]) + '\n')
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def ended(self):
        """Returns the exit code and what it printed."""
        return json.loads(self.process.stdout.readline())


@pytest.fixture
def program(request):
    program = Program(request.param)
    with program.process:
        yield program


# Stretches the moments that matter: pauses shortly at every file operation of the converter. One process does the
# imports, its children do the work.
_SLOW = '''
import json, os, sys, tempfile, time
import weights_conversion.converter, weights_conversion.cli as cli
import weights_conversion.targets as targets
from pathlib import Path
pause = float(os.environ['PAUSE'])
def slow(home, name):
    inner = getattr(home, name)
    def outer(*args, **kwargs):
        time.sleep(pause)
        result = inner(*args, **kwargs)
        time.sleep(pause)
        return result
    setattr(home, name, outer)
for home, name in ((targets, 'save_file'), (targets, '_write_json'), (targets.ModelCard, 'save'),
                   (Path, 'rename'), (Path, 'mkdir')):
    slow(home, name)
for line in sys.stdin:
    with tempfile.TemporaryFile('w+') as err:
        pid = os.fork()
        if pid == 0:
            os.dup2(err.fileno(), 2)
            os.dup2(err.fileno(), 1)
            os._exit(cli.main(json.loads(line)))
        print(pid, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        err.seek(0)
        print(json.dumps([status, err.read()]), flush=True)
'''


def _state(out: Path):
    return {p.name: p.read_bytes() for p in out.iterdir()} if out.is_dir() else None


@pytest.mark.parametrize('program', ['0.02'], indirect=True)
@pytest.mark.parametrize('forced', [False, True])
def test_killed_at_any_moment(forced, program, tmp_path):
    old = files.save(files.make('original', seed=1), tmp_path / 'old.pth')
    new = files.save(files.make('original', seed=2), tmp_path / 'new.pth')
    out = tmp_path / 'place' / 'out'
    convert(new, tmp_path / 'finished')
    complete = {k: v for k, v in _state(tmp_path / 'finished').items() if k != 'README.md'}
    killed, kept = 0, 0
    for n in range(25):
        shutil.rmtree(out, ignore_errors=True)
        if forced:
            convert(old, out)
        before = _state(out)
        pid = program.start(new, '--output', out, '--quiet', *(['--force'] if forced else []))
        time.sleep(.03 * n)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        killed += program.ended()[0] == -signal.SIGKILL
        state = _state(out)
        kept += state in (before, None)
        if state not in (before, None):  # then it is the new one, complete
            assert {k: v for k, v in state.items() if k != 'README.md'} == complete
    assert killed >= 5 and kept >= 3, (killed, kept)
    convert(new, out, force=True)  # whatever was left behind is in nobody's way


@pytest.mark.parametrize('program', ['0.3'], indirect=True)
def test_terminated(program, tmp_path):
    file = files.save(files.make('original'), tmp_path / 'x.pth')
    place = tmp_path / 'place'
    pid = program.start(file, '--output', place / 'out')
    while not place.exists() or not any(place.iterdir()):
        time.sleep(.01)
    os.kill(pid, signal.SIGTERM)
    assert program.ended() == [130, '']
    assert not any(place.iterdir())


@pytest.mark.parametrize('to', ['timm', 'original'])
def test_full_disk(to, tmp_path):
    """A limit on file sizes stands for a full disk: writes fail in the middle of the weights."""
    file = files.save(files.make('original'), tmp_path / 'x.pth')
    code = ('import resource, signal, sys\n'
            'import weights_conversion.converter\n'
            'from weights_conversion.cli import main\n'
            'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
            'resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n'
            'sys.exit(main(sys.argv[1:]))\n')
    done = subprocess.run(
        [sys.executable, '-c', code, str(file), '--output', str(tmp_path / 'place' / 'out'), '--to', to],
        env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith('pvt-convert: error: ')
    assert not any((tmp_path / 'place').iterdir())


def test_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    from weights_conversion import targets
    file, out = files.save(files.make('original'), tmp_path / 'x.pth'), tmp_path / 'out'
    convert(file, out)
    before = _state(out)

    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(targets, 'save_file', full)
    with pytest.raises(OSError, match='No space left'):
        convert(file, out, force=True)
    assert _state(out) == before and sorted(p.name for p in tmp_path.iterdir()) == ['out', 'x.pth']


@pytest.mark.parametrize('out, error', [('/proc/nothing/out', OSError), ('x.pth/out', OSError), ('/', ValueError)])
def test_output_that_cannot_be_made(out, error, tmp_path):
    file = files.save(files.make('original'), tmp_path / 'x.pth')
    with pytest.raises(error):
        convert(file, tmp_path / out)
