""" The converter never executes, never spends what a file only claims, never leaves half an output. """
import argparse
import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import convert_files as files
from pvt_timm import files as reader
from pvt_timm.files import CheckpointError, read_checkpoint
from weights_conversion import convert

ROOT = Path(__file__).resolve().parents[2]


def refusal(path, match, max_bytes=reader.MAX_BYTES):
    """The refusal has to come without memory being spent."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=match) as e:
        read_checkpoint(path, max_bytes)
    assert '\n' not in str(e.value) and len(str(e.value)) < 600
    assert time.monotonic() - start < 20
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 150e6
    return str(e.value)


# ---- nothing is executed --------------------------------------------------------------------------------------------

class Call:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


CALLS = [
    (os.system, ('touch executed',)), (eval, ('open("executed", "w")',)), (exec, ('open("executed", "w")',)),
    (open, ('executed', 'w')), (subprocess.Popen, (['touch', 'executed'],)), (getattr, ('x', 'upper')),
    (bytearray, (10 ** 12,)), (torch.load, ('executed',)), (torch.Tensor, (10 ** 11,)),
    (torch.nn.Linear, (10 ** 5, 10 ** 6)), (Path, ('/',)), (set, ([1],)), (torch.FloatTensor, (10 ** 11,)),
]


@pytest.mark.parametrize('call', CALLS, ids=lambda c: c[0].__name__)
@pytest.mark.parametrize('how', ['zip', 'legacy', 'plain pickle'])
def test_foreign_pickles_are_refused_by_name(call, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {'model': files.make('original'), 'x': Call(*call)}
    if how == 'plain pickle':
        (tmp_path / 'x.pth').write_bytes(pickle.dumps(content, protocol=2))
        message = refusal('x.pth', 'another pickle|refused')
    else:
        torch.save(content, 'x.pth', _use_new_zipfile_serialization=how == 'zip')
        message = refusal('x.pth', 'nothing in it was executed')
        assert call[0].__name__ in message
    assert not (tmp_path / 'executed').exists()


def test_what_training_snapshots_hold_is_read(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {
        'model': model.state_dict(), 'optimizer': optimizer.state_dict(),
        'lr_scheduler': torch.optim.lr_scheduler.MultiStepLR(optimizer, [8, 11]).state_dict(),
        'args': argparse.Namespace(lr=1e-3, betas=(.9, .99), device=torch.device('cpu'), dtype=torch.float16),
        'meta': OrderedDict(env_info='sys.platform: linux\n', CLASSES=('a', 'b'), PALETTE=[(1, 2, 3)], seed=None),
        'rng': torch.get_rng_state(), 'parameter': model.weight, 'bytes': b'\x00\xff', 'big': -2 ** 70,
        'half': torch.ones(2, dtype=torch.bfloat16), 'size': torch.Size([1, 2]), 'true': True,
    }
    groups = json.dumps(content['optimizer']['param_groups'])
    for legacy in (False, True):
        found = read_checkpoint(files.save(content, tmp_path / 'x.pth', legacy))
        assert list(found) == list(content)
        assert found['args'] == content['args'] and found['meta'] == content['meta']
        assert torch.equal(found['model']['weight'], model.weight) and torch.equal(found['parameter'], model.weight)
        assert json.dumps(found['optimizer']['param_groups']) == groups
        assert (found['bytes'], found['big'], found['size']) == (b'\x00\xff', -2 ** 70, torch.Size([1, 2]))


def test_objects_whose_state_is_replaced(tmp_path):
    class Odd:
        def __reduce__(self):
            return OrderedDict, (), {'items': 5, 'keys': 3}

    torch.save({'model': Odd()}, tmp_path / 'x.pth')
    refusal(tmp_path / 'x.pth', 'sets the state')


def test_nested_tuple_as_key_does_not_hang(tmp_path):
    ops = b'\x80\x02}q\x00K\x01q\x01'
    for _ in range(60):
        ops += b'q\x02h\x02\x86'
    ops += b'K\x01s.'
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_STORED) as z:
        z.writestr('x/data.pkl', ops)
        z.writestr('x/version', '3\n')
    (tmp_path / 'x.pth').write_bytes(buffer.getvalue())
    refusal(tmp_path / 'x.pth', 'key of a dict')


# ---- claims are checked before memory is spent ----------------------------------------------------------------------

def rezip(source: Path, target: Path, compression=zipfile.ZIP_STORED, change=lambda name, data: data, more=()):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w', compression) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
        for name, data in more:
            new.writestr(name, data)
    return target


def test_zip_bomb(tmp_path):
    source = files.save(files.make('original'), tmp_path / 'x.pth')
    bomb = rezip(source, tmp_path / 'bomb.pth', zipfile.ZIP_DEFLATED, more=[('x/data/999', bytes(300_000_000))])
    assert bomb.stat().st_size < 2e6
    refusal(bomb, 'compressed')
    with pytest.raises(ValueError, match='compressed'):
        convert(bomb, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_stored_records_are_read(tmp_path):
    source = files.save(files.make('original'), tmp_path / 'x.pth')
    rezip(source, tmp_path / 'archive.zip')  # what some browsers and tools make of it
    assert files.same(read_checkpoint(tmp_path / 'archive.zip'), files.make('original'))


@pytest.mark.parametrize('name', ['../evil', '/etc/evil', 'y/evil', 'x/../../evil', 'x\\..\\evil'])
def test_archive_names_that_lead_outside(name, tmp_path):
    source = files.save(files.make('original'), tmp_path / 'x.pth')
    (tmp_path / 'in').mkdir()
    bad = rezip(source, tmp_path / 'in' / 'bad.pth', more=[(name, b'evil')])
    before = sorted(tmp_path.rglob('*'))
    refusal(bad, 'outside of its folder|checkpoint')
    assert sorted(tmp_path.rglob('*')) == before


def claim(numel, shape=None, stride=None, legacy=False):
    """A checkpoint of one tensor, with claims of our own."""
    storage = struct.pack('<i', numel) if numel < 2 ** 31 else None
    number = b'J' + storage if storage else b'\x8a\x08' + struct.pack('<q', numel)

    def tuple_of(ns):
        return b'(' + b''.join(b'\x8a\x08' + struct.pack('<q', n) for n in ns) + b't'

    view = b'N' if legacy else b''
    return (b'\x80\x02}X\x16\x00\x00\x00patch_embed1.proj.biasctorch._utils\n_rebuild_tensor_v2\n('
            b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu' + number + view
            + b'tQK\x00' + tuple_of(shape or [numel]) + tuple_of(stride or [1])
            + b'\x89ccollections\nOrderedDict\n)RtRs.')


def claimed_zip(path, *args, data=b'\0' * 64, **kwargs):
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('x/data.pkl', claim(*args, **kwargs))
        z.writestr('x/version', '3\n')
        z.writestr('x/data/0', data)
    return path


def test_claims_of_a_zip(tmp_path):
    fine = read_checkpoint(claimed_zip(tmp_path / 'a.pth', 16))
    assert fine['patch_embed1.proj.bias'].shape == (16,)
    refusal(claimed_zip(tmp_path / 'b.pth', 10 ** 12), 'claims')
    refusal(claimed_zip(tmp_path / 'c.pth', 16, shape=[10 ** 12], stride=[0]), 'repeats')
    refusal(claimed_zip(tmp_path / 'd.pth', 16, shape=[17]), 'beyond')
    refusal(claimed_zip(tmp_path / 'e.pth', 16, shape=[2 ** 32, 2 ** 32], stride=[0, 0]), 'repeats')
    refusal(claimed_zip(tmp_path / 'f.pth', 16, shape=[-1]), 'makes no sense')
    refusal(claimed_zip(tmp_path / 'g.pth', 17), 'claims 68 bytes and has 64')


def test_claims_of_a_legacy_pickle(tmp_path):
    def legacy(numel, written, data=bytes(64)):
        torch.save({}, path := tmp_path / 'x.pth', _use_new_zipfile_serialization=False)
        raw = path.read_bytes()
        head = raw[:raw.index(b'\x80\x02}q\x00.', 30)]  # magic number, protocol, system
        keys = b'\x80\x02]X\x01\x00\x00\x000a.'
        path.write_bytes(head + claim(numel, legacy=True) + keys + struct.pack('<q', written) + data)
        return path

    assert read_checkpoint(legacy(16, 16))['patch_embed1.proj.bias'].shape == (16,)
    refusal(legacy(2 * 10 ** 9, 2 * 10 ** 9), 'claims to hold 8.0 GB')
    refusal(legacy(10 ** 15, 10 ** 15), 'claims')
    refusal(legacy(16, 10 ** 15), 'two different sizes')
    refusal(legacy(16, 16, bytes(60)), 'truncated')


def test_overlapping_tensors(tmp_path):
    """Many views of one storage would each be copied."""
    big = torch.zeros(2 ** 20)
    torch.save({f'x{i}': big[:] for i in range(200)}, tmp_path / 'x.pth')
    refusal(tmp_path / 'x.pth', 'overlapping')


def test_shared_weights_are_written_one_by_one(tmp_path):
    source = files.make('original')
    source['block2.1.norm1.weight'] = source['block2.0.norm1.weight']
    source['block2.1.norm1.bias'] = source['block2.0.norm1.weight'][:]
    convert(files.save(source, tmp_path / 'x.pth'), tmp_path / 'out')
    convert(tmp_path / 'out', tmp_path / 'back', to='original')
    assert files.same(read_checkpoint(tmp_path / 'back'), source)


def test_size_limit(tmp_path):
    sparse = tmp_path / 'x.pth'
    with open(sparse, 'wb') as f:
        f.write(b'PK\x03\x04')
        f.truncate(reader.MAX_BYTES + 1)  # takes no room on disk
    refusal(sparse, 'Expected at most 7.9 GB')
    assert reader.MAX_BYTES == 32 * reader.LARGEST_KNOWN_BYTES
    small = files.save(files.make('original'), tmp_path / 'y.pth')
    refusal(small, 'at most 1000 bytes', max_bytes=1000)


@pytest.mark.parametrize('length', [2 ** 24 + 1, 2 ** 40, 2 ** 63, 2 ** 64 - 1])
def test_safetensors_header_that_claims_too_much(length, tmp_path):
    (tmp_path / 'x.safetensors').write_bytes(struct.pack('<Q', length) + b'{"a":{}}' + bytes(1000))
    refusal(tmp_path / 'x.safetensors', 'header claims')


@pytest.mark.parametrize('offsets, shape', [
    ([0, 2 ** 40], [2 ** 38]), ([0, 16], [2 ** 62, 4]), ([8, 24], [4]), ([-4, 12], [4]), ([0, 12], [4]),
    ([16, 0], [4])])
def test_safetensors_offsets_that_lie(offsets, shape, tmp_path):
    header = json.dumps({'a': {'dtype': 'F32', 'shape': shape, 'data_offsets': offsets}}).encode()
    (tmp_path / 'x.safetensors').write_bytes(struct.pack('<Q', len(header)) + header + bytes(16))
    refusal(tmp_path / 'x.safetensors', 'damaged')


def test_safetensors_names_that_occur_twice(tmp_path):
    data = save({'a': torch.ones(4)})
    size, = struct.unpack('<Q', data[:8])
    text = data[8:8 + size].strip()
    text = text[:-1] + b',' + text[1:]
    (tmp_path / 'x.safetensors').write_bytes(struct.pack('<Q', len(text)) + text + data[8 + size:])
    refusal(tmp_path / 'x.safetensors', 'twice')


def test_header_length_that_looks_like_a_pickle(tmp_path):
    for extra in range(256):  # every low byte of the length, 0x80 among them
        data = save({'a': torch.ones(1)})
        size, = struct.unpack('<Q', data[:8])
        header = data[8:8 + size].strip() + b' ' * extra
        (tmp_path / 'x').write_bytes(struct.pack('<Q', len(header)) + header + data[8 + size:])
        assert torch.equal(read_checkpoint(tmp_path / 'x')['a'], torch.ones(1))


@pytest.mark.parametrize('content, match', [
    (b'', 'empty'), (b'<!DOCTYPE html><html>', 'web page'), (b'version https://git-lfs.github.com/spec/v1\n', 'LFS'),
    (b'\x1f\x8b\x08\x00' + bytes(20), 'gzip'), (b'hello world, no weights', 'starts with'),
    (b'\x89HDF\r\n\x1a\n', 'HDF5')])
def test_files_that_are_no_checkpoint(content, match, tmp_path):
    (tmp_path / 'x.pth').write_bytes(content)
    refusal(tmp_path / 'x.pth', match)


def test_damaged_data_of_a_zip_is_noticed(tmp_path):
    path = files.save(files.make('original'), tmp_path / 'x.pth')
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    refusal(path, 'CRC')


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / 'x.pt'))
    refusal(tmp_path / 'x.pt', 'TorchScript')


def test_devices_and_folders(tmp_path):
    with pytest.raises(CheckpointError, match='device'):
        read_checkpoint('/dev/null')
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / 'nowhere')
    with pytest.raises(CheckpointError, match='found none'):
        read_checkpoint(tmp_path)
    for name in ('a.pth', 'b.pth'):
        (tmp_path / name).write_bytes(b'x')
    with pytest.raises(CheckpointError, match='a.pth, b.pth'):
        read_checkpoint(tmp_path)


def test_names_cannot_break_out_of_the_card_or_the_terminal(tmp_path):
    source = files.wrap(files.make('original'), 'state_dict', 'backbone.')
    source['state_dict']['x`|\n---\n# hello\x1b[2J<script>'] = torch.ones(1)
    report = convert(files.save(source, tmp_path / 'x.pth'), tmp_path / 'out')
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert '<script>' not in card and '\x1b' not in card and '\n# hello' not in card
    assert all(line.isprintable() for line in report.to_text().splitlines())


# ---- an output is complete or not there -----------------------------------------------------------------------------

@pytest.fixture
def program(monkeypatch):
    """Starts the converter in processes that are warm already and can be killed: `start(*argv)` gives a pid, `ended()`
    its status and what it wrote."""
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    process = subprocess.Popen([sys.executable, '-c', _SLOW], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    class Program:
        def start(self, *argv):
            process.stdin.write(json.dumps([str(a) for a in argv]) + '\n')
            process.stdin.flush()
            return int(process.stdout.readline())

        def ended(self):
            return json.loads(process.stdout.readline())

    yield Program()
    process.stdin.close()
    process.wait()
    process.stdout.close()


# Stretches the moments that matter: pauses shortly at every file operation of the converter. One process does the
# imports, its children do the work.
_SLOW = '''
import json, os, sys, tempfile, time
import weights_conversion.converter, weights_conversion.cli as cli
import weights_conversion.targets as targets
from pathlib import Path
pause = float(os.environ.get('PAUSE', 0))
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


@pytest.mark.parametrize('forced', [False, True])
def test_killed_at_any_moment(forced, tmp_path, monkeypatch, request):
    monkeypatch.setenv('PAUSE', '0.02')
    program = request.getfixturevalue('program')
    old = files.save(files.make('original', seed=1), tmp_path / 'old.pth')
    new = files.save(files.make('original', seed=2), tmp_path / 'new.pth')
    out = tmp_path / 'place' / 'out'
    convert(new, tmp_path / 'finished')
    complete = {k: v for k, v in _state(tmp_path / 'finished').items() if k != 'README.md'}
    killed, kept, nothing, done = 0, 0, 0, 0
    for n in range(25):
        before = None
        if out.exists():
            shutil.rmtree(out)
        if forced:
            convert(old, out)
            before = _state(out)
        pid = program.start(new, '--output', out, '--quiet', *(['--force'] if forced else []))
        time.sleep(.03 * n)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        killed += program.ended()[0] == -signal.SIGKILL
        state = _state(out)
        if state is None:
            nothing += 1
        elif state == before:
            kept += 1
        else:  # then it is the new one, complete
            done += 1
            assert {k: v for k, v in state.items() if k != 'README.md'} == complete
            assert read_checkpoint(out)
    assert killed >= 5 and kept + nothing >= 3, (killed, kept, nothing, done)
    convert(new, out, force=True)  # whatever was left behind is in nobody's way
    assert files.same(read_checkpoint(out), read_checkpoint(tmp_path / 'finished'))


def test_terminated(tmp_path, monkeypatch, request):
    monkeypatch.setenv('PAUSE', '0.3')
    program = request.getfixturevalue('program')
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
    limit = 200_000
    code = ('import resource, signal, sys\n'
            'import weights_conversion.converter\n'
            'from weights_conversion.cli import main\n'
            'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
            f'resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n'
            'sys.exit(main(sys.argv[1:]))\n')
    done = subprocess.run(
        [sys.executable, '-c', code, str(file), '--output', str(tmp_path / 'place' / 'out'), '--to', to],
        env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith('pvt-convert: error: ')
    assert not any((tmp_path / 'place').iterdir())


def test_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    from weights_conversion import targets
    old = files.save(files.make('original', seed=1), tmp_path / 'old.pth')
    out = tmp_path / 'out'
    convert(old, out)
    before = _state(out)

    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(targets, 'save_file', full)
    with pytest.raises(OSError, match='No space left'):
        convert(files.save(files.make('original', seed=2), tmp_path / 'new.pth'), out, force=True)
    assert _state(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['new.pth', 'old.pth', 'out']


def test_output_that_cannot_be_made(tmp_path):
    file = files.save(files.make('original'), tmp_path / 'x.pth')
    with pytest.raises((OSError, ValueError)):
        convert(file, '/proc/nothing/out')
    with pytest.raises((OSError, ValueError)):
        convert(file, tmp_path / 'x.pth' / 'out')
    with pytest.raises(ValueError, match='Expected a folder'):
        convert(file, '/')
