""" An output of the converter is complete or not there, and says nothing that it must not. """
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convert_files as files
from pvt_timm.files import read_checkpoint
from weights_conversion import convert


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


# For each output a conversion of its own, in a process that gets the signal at the next one of all moments: before or
# after an operation on files. One process does the imports, its children do the work.
_SIGNALLED = '''
import os, sys
from pathlib import Path
import weights_conversion.converter
from weights_conversion import targets
from weights_conversion.cli import main
left = int(sys.argv[1])
def tick():
    global left
    left -= 1
    if left == -1:
        os.kill(os.getpid(), int(sys.argv[2]))
def watch(home, name):
    inner = getattr(home, name)
    def outer(*args, **kwargs):
        tick()
        result = inner(*args, **kwargs)
        tick()
        return result
    setattr(home, name, outer)
for home, name in ((targets, 'save'), (targets, '_write_json'), (targets.ModelCard, 'save'),
                   (Path, 'rename'), (Path, 'mkdir')):
    watch(home, name)
for out in sys.argv[4:]:
    if os.fork() == 0:
        os._exit(main([sys.argv[3], '--output', out, '--quiet', '--force']))
    print(os.waitstatus_to_exitcode(os.wait()[1]))
    left += 1
'''


@pytest.mark.parametrize('number, code', [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)])
@pytest.mark.parametrize('there', [False, True])
def test_stopped_at_any_moment(there, number, code, program, tmp_path):
    old, new = (files.save(files.make('original', seed=n), tmp_path / f'{n}.pth') for n in (1, 2))
    convert(new, tmp_path / 'finished')
    complete = state(tmp_path / 'finished')
    outs = [tmp_path / f'place {n}' / 'out' for n in range(18)]
    for out in outs:
        out.parent.mkdir()
        if there:
            convert(old, out)
    before = state(outs[0])
    done = program(_SIGNALLED, 0, int(number), new, *outs)
    assert done.returncode == 0 and done.stderr == ''
    codes = list(map(int, done.stdout.split()))
    moments = codes.index(0)
    assert 12 <= moments < 18 and codes == [code] * moments + [0] * (18 - moments)
    ends = [state(out) for out in outs]
    assert all(end in (None, before, complete) for end in ends)
    assert ends[0] == before and ends[moments - 1] == complete
    if number == signal.SIGTERM:
        assert None not in ends or not there
        assert all(p.name == 'out' for out in outs for p in out.parent.iterdir())
    convert(new, outs[moments // 2], force=True)  # whatever was left behind is in nobody's way


@pytest.mark.parametrize('to', ['timm', 'original'])
def test_full_disk(to, program, tmp_path):
    """A limit on file sizes stands for a full disk: writes fail in the middle of the weights."""
    file, out = files.save(files.make('original'), tmp_path / 'x.pth'), tmp_path / 'place' / 'out'
    convert(file, out)
    before = state(out)
    done = program('import resource, signal, sys\n'
                   'import weights_conversion.converter\n'
                   'from weights_conversion.cli import main\n'
                   'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
                   'resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n'
                   'sys.exit(main(sys.argv[1:]))\n', file, '--output', out, '--to', to, '--force')
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith('pvt-convert: error: Cannot write to ')
    assert state(out) == before and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize('out, error', [('/proc/nothing/out', OSError), ('x.pth/out', OSError), ('/', ValueError)])
def test_output_that_cannot_be_made(out, error, tmp_path):
    file = files.save(files.make('original'), tmp_path / 'x.pth')
    with pytest.raises(error):
        convert(file, tmp_path / out)
