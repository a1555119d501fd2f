""" Files of unknown origin: nothing in them is executed, and sizes in them are checked. Written files are complete. """
import argparse
import datetime
import json
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save

import pvt_timm  # noqa: F401  registers the models
from pvt_timm import files as reader
from pvt_timm.cli.main import main as pvt_timm_main
from pvt_timm.cli.train import latest_checkpoint
from pvt_timm.detection import retinanet_from_mmdet
from pvt_timm.files import CheckpointError, find_checkpoint, read_checkpoint, save_atomically
from pvt_timm.torch_files import BYTES_PER_ITEM, MAX_STEPS
from weights_conversion import convert, inspect
from weights_conversion.cli import main as pvt_convert_main
from tests.support import convert_files as files
from tests.support.memory import peak_memory
from tests.support.systems import mkfifo, needs_proc, symlink


def refusal(path, *matches, max_bytes=reader.MAX_BYTES):
    """Check that a file is refused quickly, without much memory, with one line that names the file."""
    start = time.monotonic()
    with peak_memory() as peak, pytest.raises(CheckpointError) as e:
        read_checkpoint(path, max_bytes)
    taken, text = peak(), str(e.value)
    assert '\n' not in text and len(text) < 400 and os.path.basename(path) in text
    assert all(match in text for match in matches), text
    assert time.monotonic() - start < 20
    assert taken < 150e6


class Call:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def write(content, path, how):
    if how == 'plain pickle':
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == 'zip')


# ---- nothing is executed --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('value, name', [
    (Call(os.system, ('touch executed',)), 'executed: it wants posix.system'), (Call(np.fromfile, ('x',)), 'fromfile'),
    (Call(eval, ('open("executed", "w")',)), 'eval'), (Call(torch.nn.Linear, (10 ** 5, 10 ** 6)), 'Linear'),
    (Call(getattr, ('x', 'upper')), 'getattr'), (datetime.datetime(2020, 1, 1), 'datetime.datetime'),
    (pathlib.Path('x'), 'pathlib'), (np.array([None, 1]), "'O8'"), (np.datetime64('2020-01-01'), "'M8'"),
    (np.float32, 'numpy.float32'), (np.zeros(2, dtype='f4,i4'), "'V8'")],
    ids=lambda x: x if isinstance(x, str) else '')
@pytest.mark.parametrize('how', ['zip', 'legacy', 'plain pickle'])
def test_foreign_objects_are_refused_by_name(value, name, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write({'model': {'x': torch.ones(1)} if how != 'plain pickle' else {}, 'x': value}, tmp_path / 'x.pth', how)
    refusal('x.pth', name)
    assert not (tmp_path / 'executed').exists()


class Evil:
    """A checkpoint that calls a function when it is loaded (or a clean one), at all places that are read."""

    def __init__(self, how, folder, hub):
        self.file, self.folder, self.executed = folder / 'last.pth.tar', folder / 'folder', folder / 'executed'
        self.image, self.out = folder / 'x.png', folder / 'out'
        Image.new('RGB', (32, 32)).save(self.image)
        content = dict(state_dict=timm.create_model('test_pvt').state_dict(), epoch=1, optimizer={})
        if how != 'clean':
            content['x'] = Call(os.mkdir, (str(self.executed),))
        write(content, self.file, 'zip' if how == 'clean' else how)
        found = {'pytorch_model.bin': self.file.read_bytes(), 'config.json': json.dumps(
            dict(architecture='test_pvt', num_classes=10, pretrained_cfg={})).encode()}
        self.folder.mkdir()
        for name, data in found.items():
            (self.folder / name).write_bytes(data)
        hub.add_repo('some/pvt', found)
        self.url = hub.add_file('x.pth', self.file)


def cli(main, *argv):
    if main([str(x) for x in argv]):
        raise ValueError('exit code 2')


WAYS_IN = {
    'file': lambda e: timm.create_model('test_pvt', True, pretrained_cfg_overlay=dict(file=str(e.file))),
    'checkpoint_path': lambda e: timm.create_model('test_pvt', checkpoint_path=str(e.file)),
    'folder': lambda e: timm.create_model(f'local-dir:{e.folder}', pretrained=True),
    'url': lambda e: timm.create_model(
        'test_pvt', True, pretrained_cfg_overlay=dict(file=None, hf_hub_id=None, url=e.url)),
    'hub': lambda e: timm.create_model('hf-hub:some/pvt', pretrained=True),
    'convert': lambda e: convert(e.file, e.out),
    'inspect a url': lambda e: inspect(e.url),
    'pvt-convert of the hub': lambda e: cli(pvt_convert_main, 'hf-hub:some/pvt', '--output', e.out),
    'predict': lambda e: cli(pvt_timm_main, 'predict', e.image, '--checkpoint', e.file),
    'predict with a folder': lambda e: cli(pvt_timm_main, 'predict', e.image, '--checkpoint', e.folder),
    'predict of the hub': lambda e: cli(pvt_timm_main, 'predict', e.image, '--model', 'hf-hub:some/pvt'),
    'features': lambda e: cli(
        pvt_timm_main, 'features', e.image, '--checkpoint', e.file, '--output', e.out.with_suffix('.png')),
    'detector': lambda e: retinanet_from_mmdet(e.file),
    'going on with training': lambda e: latest_checkpoint(e.file.parent),
    'resume': lambda e: timm.models.resume_checkpoint(timm.create_model('test_pvt'), str(e.file)),
}


@pytest.mark.parametrize('how', ['zip', 'legacy', 'clean'])
@pytest.mark.parametrize('way', WAYS_IN)
def test_no_way_in_executes_anything(way, how, hub, tmp_path):
    if way == 'features':
        pytest.importorskip('matplotlib')
    e = Evil(how, tmp_path, hub)
    if how == 'clean' and way != 'detector':
        WAYS_IN[way](e)
        return
    by_timm = way in ('file', 'checkpoint_path', 'folder', 'url', 'hub', 'resume')
    with pytest.raises((pickle.UnpicklingError, RuntimeError) if by_timm else ValueError) as error:
        WAYS_IN[way](e)
    assert not by_timm or re.search('weights.only', str(error.value), re.IGNORECASE)
    assert not e.executed.exists() and not e.out.exists()
    pickle.loads(pickle.dumps(Call(os.mkdir, (str(e.executed),))))  # it would have been seen
    assert e.executed.exists()


def test_two_backbones_on_the_command_line(tmp_path, capsys):
    """If a file has two backbones, each command names both, and --prefix chooses one."""
    pytest.importorskip('matplotlib')
    Image.new('RGB', (32, 32)).save(tmp_path / 'x.png')
    state = timm.create_model('test_pvt', pretrained=True).state_dict()
    torch.save({f'{name}.{k}': v for name in ('rgb', 'depth.net') for k, v in state.items()}, tmp_path / 'x.pth')
    file, out = tmp_path / 'x.pth', tmp_path / 'out'
    for main, *argv in (
            (pvt_timm_main, 'predict', tmp_path / 'x.png', '--checkpoint', file),
            (pvt_timm_main, 'features', tmp_path / 'x.png', '--checkpoint', file, '--output', tmp_path / 'y.png'),
            (pvt_convert_main, file, '--output', out), (pvt_convert_main, 'inspect', file)):
        argv = [str(x) for x in argv]
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert all(x in error for x in ("'rgb.'", "'depth.net.'", '--prefix')) and error.count('\n') == 1
        code = main([*argv, '--prefix', 'depth.net'])
        assert code == 0, capsys.readouterr().err
        capsys.readouterr()  # what the commands say of the device
    assert files.same(read_checkpoint(out), state)


# ---- what trainers save is read -------------------------------------------------------------------------------------

@pytest.mark.parametrize('how', ['zip', 'legacy'])
def test_what_training_snapshots_hold_is_read(how, tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {
        'model': model.state_dict(), 'optimizer': optimizer.state_dict(),
        'lr_scheduler': torch.optim.lr_scheduler.MultiStepLR(optimizer, [8, 11]).state_dict(),
        'no args': argparse.Namespace(),
        'args': argparse.Namespace(lr=1e-3, device=torch.device('cpu'), dtype=torch.float16, best=np.float32(.5)),
        'milestones': Counter([8, 8, 11]), 'set': {1, 'a'}, 'complex': 1 + 2j, 'bytearray': bytearray(b'\x00\xff'),
        'meta': OrderedDict(env_info='sys.platform: linux\n', CLASSES=('a', 'b'), PALETTE=[(1, 2, 3)], seed=None),
        'rng': torch.get_rng_state(), 'parameter': model.weight, 'bytes': b'\x00\xff', 'big': -2 ** 70,
        'half': torch.ones(2, dtype=torch.bfloat16), 'size': torch.Size([1, 2]), 'true': True,
        'top1': np.float64(75.1), 'count': np.int64(-3), 'flag': np.bool_(True), 'names': np.array(['a', 'bc']),
        'mean': np.arange(6, dtype=np.float32).reshape(2, 3), 'big endian': np.arange(3, dtype='>i4'),
        'columns': np.asfortranarray(np.arange(6.).reshape(2, 3)), 'none': np.zeros((0, 3)),
    }
    write(content, tmp_path / 'x.pth', how)
    found = read_checkpoint(tmp_path / 'x.pth')
    assert list(found) == list(content)
    for key, value in content.items():
        if isinstance(value, (np.ndarray, np.generic)):
            assert found[key].dtype.name == value.dtype.name and np.array_equal(found[key], value), key
        elif isinstance(value, torch.Tensor):
            assert torch.equal(found[key], value)
        elif key in ('args', 'no args'):
            assert found[key] == vars(value)
        elif key not in ('model', 'optimizer'):
            assert found[key] == value
    assert torch.equal(found['model']['weight'], model.weight)
    assert json.dumps(found['optimizer']['param_groups']) == json.dumps(content['optimizer']['param_groups'])


def test_flags_of_numpy_types_are_not_believed(tmp_path):
    """Flags of a numpy type in a pickle are not used. They could declare values to be pointers to objects."""
    class Dtype(Call):
        def __reduce__(self):
            return np.dtype, ('f8', False, True), (3, '<', None, None, None, -1, -1, 63)

    array = Call(*np.zeros(2).__reduce__()[:2], (1, (2,), Dtype(), False, struct.pack('<2d', 1, 2)))
    torch.save({'x': array}, tmp_path / 'x.pth')
    x = read_checkpoint(tmp_path / 'x.pth')['x']
    assert x.tolist() == [1, 2] and x.dtype.flags == 0 and not x.dtype.hasobject


# ---- claims are not believed ----------------------------------------------------------------------------------------

def rezip(source, target, compression=zipfile.ZIP_STORED, change=lambda data: data):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w', compression) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(old.read(info)))
    return target


def test_zips(tmp_path):
    source = files.save(files.make('original'), tmp_path / 'x.pth')
    # what some browsers and tools make of it
    assert files.same(read_checkpoint(rezip(source, tmp_path / 'archive.zip')), files.make('original'))
    torch.save({'x': torch.zeros(75_000_000)}, source)
    bomb = rezip(source, tmp_path / 'bomb.pth', zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 2e6
    refusal(bomb, "'x/data.pkl' is compressed")


@pytest.mark.parametrize('how', ['zip', 'legacy'])
@pytest.mark.parametrize('claimed', [2 * 10 ** 9, 10 ** 15])
def test_claims_of_size(claimed, how, tmp_path):
    """A file that holds 77 numbers and declares more is refused."""
    def lie(data):
        return data.replace(b'K\x4d', b'\x8a\x08' + struct.pack('<q', claimed))

    write({'x': torch.ones(77)}, tmp_path / 'x.pth', how)
    assert read_checkpoint(tmp_path / 'x.pth')['x'].shape == (77,)
    if how == 'zip':
        rezip(tmp_path / 'x.pth', tmp_path / 'y.pth', change=lie)
    else:
        data = lie((tmp_path / 'x.pth').read_bytes())
        numbers = struct.pack('<q', 77)
        assert data.count(numbers) == 1
        (tmp_path / 'y.pth').write_bytes(data.replace(numbers, struct.pack('<q', claimed)))
    refusal(tmp_path / 'y.pth', 'damaged')


def test_many_views_of_one_storage(tmp_path):
    big = torch.zeros(2 ** 18)
    torch.save({'model': {f'x{i}': big[:] for i in range(5)}}, tmp_path / 'x.pth')
    refusal(tmp_path / 'x.pth', 'repeat')
    torch.save({'x': torch.zeros(1).expand(10 ** 12)}, tmp_path / 'x.pth')
    refusal(tmp_path / 'x.pth', 'repeat')
    torch.save({'model': {'a': big}, 'model_ema': {'a': big}}, tmp_path / 'x.pth')
    assert torch.equal(read_checkpoint(tmp_path / 'x.pth')['model_ema']['a'], big)


def test_size_limit(tmp_path):
    with open(tmp_path / 'x.pth', 'wb') as f:
        f.write(b'PK\x03\x04')
        f.truncate(reader.MAX_BYTES + 1)  # takes no room on disk
    refusal(tmp_path / 'x.pth', 'Expected at most 7858.4 MB')
    small = files.save(files.make('original'), tmp_path / 'y.pth')
    assert read_checkpoint(small, small.stat().st_size)
    refusal(small, 'max_bytes', max_bytes=small.stat().st_size - 1)


@pytest.mark.parametrize('length, offsets, shape', [
    (2 ** 24 + 1, [0, 16], [4]), (2 ** 63, [0, 16], [4]), (0, [0, 2 ** 40], [2 ** 38]), (0, [0, 16], [2 ** 62, 4]),
    (0, [0, 12], [4])])
def test_safetensors_that_lie(length, offsets, shape, tmp_path):
    header = json.dumps({'a': {'dtype': 'F32', 'shape': shape, 'data_offsets': offsets}}).encode()
    (tmp_path / 'x').write_bytes(struct.pack('<Q', length or len(header)) + header + bytes(16))
    refusal(tmp_path / 'x', 'damaged')


@pytest.mark.parametrize('how', ['zip', 'legacy'])
def test_names_of_files_say_nothing(how, tmp_path):
    write({'a': torch.ones(1)}, tmp_path / 'model.safetensors', how)
    assert torch.equal(read_checkpoint(tmp_path)['a'], torch.ones(1))


def test_header_length_that_looks_like_a_pickle(tmp_path):
    data = save({'a': torch.ones(1)})
    size, = struct.unpack('<Q', data[:8])
    header = data[8:8 + size].strip()
    header += b' ' * (-len(header) % 256 + 0x80)
    (tmp_path / 'x').write_bytes(struct.pack('<Q', len(header)) + header + data[8 + size:])
    assert (tmp_path / 'x').read_bytes()[:1] == b'\x80'
    assert torch.equal(read_checkpoint(tmp_path / 'x')['a'], torch.ones(1))


# ---- what comes out is plain ----------------------------------------------------------------------------------------

def with_state(state):
    x = OrderedDict(a=torch.ones(2))
    vars(x).update(state)
    return x


class Tensor(torch.Tensor):
    pass


def types(x):
    """Return the types of everything in `x`, and check that tensors in `x` have no attributes."""
    assert not isinstance(x, torch.Tensor) or not vars(x) and not x.requires_grad and x.grad_fn is None
    inner = [*x, *x.values()] if isinstance(x, dict) else x if isinstance(x, (list, tuple, set)) else []
    return {type(x)}.union(*map(types, inner))


@pytest.mark.parametrize('how', ['zip', 'legacy'])
def test_what_is_read_is_plain(how, tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.isfinite = parameter.detach = parameter.numel = 5
    tensor = torch.zeros(3)
    tensor.shape_of_it = (1,)
    content = with_state({'get': 5, 'values': None, '_metadata': OrderedDict()})
    content.update(
        parameter=parameter, tensor=tensor, args=argparse.Namespace(items=1, keys=2, _get_args=3),
        linear=torch.nn.Linear(2, 2).state_dict(), size=torch.Size([1]), list=[with_state({'copy': 1})])
    write(content, tmp_path / 'x.pth', how)
    found = read_checkpoint(tmp_path / 'x.pth')
    assert types(found) == {dict, list, tuple, int, str, torch.Tensor}
    assert found.get('args') == dict(items=1, keys=2, _get_args=3) and found['list'][0].copy().keys() == {'a'}
    assert found['parameter'].isfinite().all() and found['parameter'].detach().numel() == 2
    str(found)

    write({'model': {'x': torch.ones(2).as_subclass(Tensor)}}, tmp_path / 'y.pth', how)
    refusal(tmp_path / 'y.pth', 'test_files.Tensor')
    write({'model': {'x': torch.eye(2).to_sparse()}}, tmp_path / 'y.pth', how)
    refusal(tmp_path / 'y.pth', '_rebuild_sparse_tensor')
    # classes are read for what they make, not themselves
    for name in ('Size', 'Tensor', 'FloatStorage'):
        refusal(archive(tmp_path / 'z.pth', pickled({'x': name_of('torch', name)})), f'torch.{name}')
    archive(tmp_path / 'z.pth', pickled({'x': name_of('torch', 'float32')}))
    assert read_checkpoint(tmp_path / 'z.pth') == {'x': torch.float32}


@pytest.mark.parametrize('how', ['zip', 'legacy'])
def test_tensors_are_those_that_were_saved(how, tmp_path):
    """Tensors have the bits and strides that were saved, and share memory as they did before."""
    bits = torch.tensor([0x7fc00001, 0x7f800001, -0x80000000, 1], dtype=torch.int64).to(torch.int32)
    grid = torch.randn(4, 6, dtype=torch.float64)
    content = {
        'nan': bits.view(torch.float32), 'grid': grid, 'transposed': grid.T, 'part': grid[1:3, ::2],
        'scalar': grid[2, 3], 'empty': torch.zeros(0, 3), 'nothing': torch.zeros(3)[:0],
        'expanded': torch.ones(1, dtype=torch.int8).expand(2), 'odd': torch.arange(7, dtype=torch.uint8),
        'last': torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    for name in ('float16', 'bfloat16', 'float64', 'int8', 'int16', 'int32', 'int64', 'bool', 'complex64', 'complex128',
                 'uint16', 'uint32', 'uint64', 'float8_e4m3fn', 'float8_e5m2'):
        content[name] = torch.tensor([0, 1, 1]).to(getattr(torch, name))
    write(content, tmp_path / 'x.pth', how)
    found = read_checkpoint(tmp_path / 'x.pth')
    assert found.keys() == content.keys()
    for key, x in content.items():
        y = found[key]
        assert (y.dtype, y.shape, y.storage_offset()) == (x.dtype, x.shape, x.storage_offset()), key
        assert y.stride() == x.stride() or not y.numel()
        assert y.untyped_storage().nbytes() == x.untyped_storage().nbytes() or not y.numel()
        assert y.contiguous().view(-1).view(torch.uint8).tolist() == x.contiguous().view(-1).view(torch.uint8).tolist()
    assert found['grid'].data_ptr() == found['transposed'].data_ptr() != found['last'].data_ptr()
    found['grid'][2, 3] = 7  # a copy on write, never the file
    assert found['scalar'] == 7 and read_checkpoint(tmp_path / 'x.pth')['scalar'] == grid[2, 3]


def test_other_byte_order(tmp_path):
    """A file from a big-endian machine is read."""
    content = {'x': torch.arange(5.), 'y': torch.tensor([1 + 2j, 3j]), 'z': torch.arange(3, dtype=torch.uint8)}
    torch.save(content, tmp_path / 'x.pth')
    with zipfile.ZipFile(tmp_path / 'x.pth') as old, zipfile.ZipFile(tmp_path / 'y.pth', 'w') as new:
        for name in old.namelist():
            data = old.read(name)
            if '/data/' in name:
                data = np.frombuffer(data, {20: '<u4', 16: '<u4', 3: 'u1'}[len(data)]).byteswap().tobytes()
            new.writestr(name, b'big' if name.endswith('byteorder') else data)
    assert files.same(read_checkpoint(tmp_path / 'y.pth'), content)


# ---- no more memory than the file has -------------------------------------------------------------------------------

# These make steps of pickles.

def text(x):
    return b'X' + struct.pack('<I', len(x)) + x.encode()


def number(n):
    return b'\x8a\x09' + n.to_bytes(9, 'little', signed=True)


def name_of(module, name):
    return f'c{module}\n{name}\n'.encode()


def called(module, name, *args):
    return name_of(module, name) + b'(' + b''.join(args) + b'tR'


def pickled(x):
    """Return the pickle of a dict. Its keys are texts, its values are steps of a pickle."""
    return b'\x80\x02}(' + b''.join(text(key) + steps for key, steps in x.items()) + b'u.'


def archive(path, pickle_of_it, **records):
    with zipfile.ZipFile(path, 'w') as new:
        for name, data in {'data.pkl': pickle_of_it, 'version': b'3\n', **records}.items():
            new.writestr(f'x/{name}', data)
    return path


def numpy_dtype(name):
    byte_order = b'(K\x03' + text('<') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t'
    return called('numpy', 'dtype', text(name), b'\x89', b'\x88') + byte_order + b'b'


def numpy_array(shape, dtype, data):
    empty = called('numpy.core.multiarray', '_reconstruct', name_of('numpy', 'ndarray'), b'K\x00\x85', text('b'))
    return empty + b'(K\x01' + shape + numpy_dtype(dtype) + b'\x89' + data + b'tb'


def doubled_by_a_codec():
    steps = called('_codecs', 'encode', text('ab' * 500), text('latin1'))
    for _ in range(20):
        steps = called('_codecs', 'encode', steps, text('hex'))
    return steps


def lists_of_lists():
    """Return steps for 30 nested lists that each hold the next list ten times. A level takes only 24 bytes."""
    steps = b'N'
    for _ in range(30):
        steps = b'](' + steps + b'q\x00' + b'h\x00' * 9 + b'e'
    return steps


BOMBS = {
    'bytearray': called('builtins', 'bytearray', number(3 * 10 ** 9)),
    'bytearray of Python 2': called('__builtin__', 'bytearray', number(3 * 10 ** 9)),
    'bytes': called('builtins', 'bytes', number(3 * 10 ** 9)),
    'codec': doubled_by_a_codec(),
    'other codec': called('_codecs', 'encode', text('ab' * 10 ** 5), text('utf-32')),
    'tensor': called('torch', 'FloatTensor', number(10 ** 9)),
    'new tensor': name_of('torch', 'Tensor') + number(10 ** 9) + b'\x85\x81',
    'storage': called('torch.storage', 'UntypedStorage', number(10 ** 10)),
    'meta tensor': called('torch._utils', '_rebuild_meta_tensor_no_storage', name_of('torch', 'float32'),
                          number(10 ** 15) + b'\x85', b'K\x01\x85', b'\x89'),
    'nested tensor': called('torch._utils', '_rebuild_nested_tensor', b'N', b'N', b'N', b'N'),
    'numbers': called('torch', 'Size', called('builtins', 'bytearray', number(10 ** 9)) + b'\x85'),
    'array': numpy_array(number(10 ** 10) + b'\x85', 'f8', called('builtins', 'bytes')),
    'array of long texts': called(
        'numpy.core.multiarray', 'scalar', numpy_dtype('U500000000'), called('builtins', 'bytes')),
    'copies of a dict': b'(}(' + b''.join(b'M' + struct.pack('<H', n) + b'N' for n in range(50_000)) + b'uq\x00' + (
        called('collections', 'Counter', b'h\x00') * 1000) + b't',
    'copies of a list': b'(](' + b''.join(b'M' + struct.pack('<H', n) for n in range(50_000)) + b'eq\x00' + (
        called('builtins', 'set', b'h\x00') * 1000) + b't',
    'copies of a text': b'(' + text('a' * 10 ** 6) + b'q\x00' + (
        called('_codecs', 'encode', b'h\x00', text('latin1')) * 2000) + b't',
    'copies of an array': b'(' + called('_codecs', 'encode', text('a' * 10 ** 6), text('latin1')) + b'q\x00' + (
        numpy_array(number(10 ** 6) + b'\x85', 'u1', b'h\x00') * 2000) + b't',
    'dicts': b'(' + b'}' * 5_000_000 + b't',
    'marks': b'(' * 5_000_000 + b't',
    'memory of steps': b'N' + b''.join(b'r' + struct.pack('<I', n) for n in range(2_000_000)),
    'key that is deep': b'})' + b'\x85' * 300_000 + b'Ns',
    'member that is deep': called('builtins', 'set', b'])' + b'\x85' * 300_000 + b'a'),
    'keys of one hash': b'}(' + b''.join(number(n * (2 ** 61 - 1)) + b'N' for n in range(1, 4)) + b'u',
    'values that are deep': b']' * 300_000 + b'a' * 299_999,
    'lists of lists': lists_of_lists(),
    'text in many places': text('a' * 1_000_000) + b'q\x00](' + b'h\x00' * 100_000 + b'e',
    'itself': b']q\x00h\x00a',
    'itself in itself': b'}q\x00' + text('a') + b'](h\x00h\x00es',
}
# These are refused for what they name, before anything else is looked at.
REFUSED = {
    'tensor': 'torch.FloatTensor', 'new tensor': 'torch.Tensor', 'storage': 'torch.storage.UntypedStorage',
    'meta tensor': '_rebuild_meta_tensor_no_storage', 'nested tensor': '_rebuild_nested_tensor'}

MEASURE = """
import json, sys
from pvt_timm.files import CheckpointError, read_checkpoint

def kilobytes(what):
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(what))

for path in sys.argv[1:]:
    open('/proc/self/clear_refs', 'w').write('5')  # forgets the largest size so far
    before = kilobytes('VmRSS')
    try:
        read_checkpoint(path)
        text = ''
    except CheckpointError as e:
        text = str(e)
    print(json.dumps([path, text, (kilobytes('VmHWM') - before) * 1024]), flush=True)
"""


def measure(paths):
    """Read files in a separate process. Return the error ('' if none) and the peak memory of each."""
    run = subprocess.run([sys.executable, '-c', MEASURE, *map(str, paths)], capture_output=True, text=True)
    assert run.returncode == 0, (run.returncode, run.stdout[-300:], run.stderr[-3000:])
    found = {path: (text, memory) for path, text, memory in map(json.loads, run.stdout.splitlines())}
    return [found[str(path)] for path in paths]


@needs_proc
@pytest.mark.parametrize('how', ['zip', pytest.param('legacy', marks=pytest.mark.slow)])  # one reader of pickles
def test_no_pickle_takes_more_memory_than_it_has(how, tmp_path):
    head = b''.join(pickle.dumps(x, 2) for x in (0x1950a86a20f9469cfc6c, 1001, {}))
    paths = []
    for i, steps in enumerate(BOMBS.values()):
        paths.append(tmp_path / f'{i}.pth')
        if how == 'zip':
            archive(paths[-1], pickled({'x': steps}))
        else:
            paths[-1].write_bytes(head + pickled({'x': steps}) + pickle.dumps([], 2))
    good = tmp_path / 'good.pth'
    torch.save({'x': torch.ones(10), 'y': np.ones(3)}, good)
    (said, _), *found = measure([good, *paths])
    assert said == ''
    for (name, steps), (said, memory) in zip(BOMBS.items(), found):
        assert ('refused' if name in REFUSED else 'damaged') in said and REFUSED.get(name, '') in said, (name, said)
        # 64 MB for copies of lists and texts, which honest pickles make too
        assert memory < 20 * len(steps) + BYTES_PER_ITEM * MAX_STEPS + 30e6 and memory < 250e6, (name, memory)


@needs_proc
def test_no_directory_takes_more_memory_than_it_has(tmp_path):
    """An archive whose directory lists one record 400,000 times takes less memory than the directory."""
    local = b'PK\x03\x04' + bytes(22) + struct.pack('<HH', 1, 0) + b'x'
    entry = b'PK\x01\x02' + bytes(24) + struct.pack('<H', 1) + bytes(16) + b'x'
    directory = entry * 400_000
    end = b'PK\x05\x06' + bytes(8) + struct.pack('<IIH', len(directory), len(local), 0)
    (tmp_path / 'x.pth').write_bytes(local + directory + end)
    (said, memory), = measure([tmp_path / 'x.pth'])
    assert 'directory has 18800000 bytes' in said and memory < len(directory)


def test_what_repeats_a_little_is_read(tmp_path):
    shared = {'a': [1, 2], 'b': 'text'}
    torch.save({'x': [shared] * 1000, 'y': {'z': shared}, 'w': [[[['deep']]]] * 10}, tmp_path / 'x.pth')
    found = read_checkpoint(tmp_path / 'x.pth')
    assert found['x'][0] is found['x'][999] is found['y']['z'] and len(str(found)) < 100_000


# ---- what is no checkpoint, and where one is ------------------------------------------------------------------------

@pytest.mark.parametrize('content, match', [
    (b'', "starts with b''"), (b'<!DOCTYPE html><html>', "b'<!DOCTYPE html><'"),
    (b'version https://git-lfs.github.com/spec/v1\n', "b'version https://'. Is it a web page"),
    (pickle.dumps([1], 2), 'damaged'), (b'PK\x03\x04' + bytes(99), 'damaged')])
def test_files_that_are_no_checkpoint(content, match, tmp_path):
    (tmp_path / 'x.pth').write_bytes(content)
    refusal(tmp_path / 'x.pth', match)


@pytest.mark.parametrize('how', ['zip', 'legacy', 'safetensors'])
def test_damage_is_noticed(how, tmp_path):
    path = tmp_path / ('x.safetensors' if how == 'safetensors' else 'x.pth')
    data = files.save(files.make('original'), path, legacy=how == 'legacy').read_bytes()
    for end in (len(data) // 2, len(data) - 1, 100):
        path.write_bytes(data[:end])
        refusal(path, 'damaged')
    if how == 'zip':  # the only one with checksums
        path.write_bytes(data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:])
        refusal(path, 'checksum')


def test_other_things_that_torch_writes(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / 'x.pt'))
    refusal(tmp_path / 'x.pt', 'TorchScript')
    torch.save([torch.ones(1)], tmp_path / 'x.pt')
    refusal(tmp_path / 'x.pt', 'got list')


def test_where_a_checkpoint_is(tmp_path):
    if os.path.exists('/dev/null'):
        with pytest.raises(CheckpointError, match='device'):
            read_checkpoint('/dev/null')
    with pytest.raises(FileNotFoundError, match='nowhere'):
        read_checkpoint(tmp_path / 'nowhere')
    with pytest.raises(CheckpointError, match='found none'):
        find_checkpoint(tmp_path)
    (tmp_path / 'a.pth').touch(), (tmp_path / 'notes.txt').touch()
    assert find_checkpoint(tmp_path) == tmp_path / 'a.pth'
    (tmp_path / 'b.pth').touch()
    with pytest.raises(CheckpointError, match='a.pth, b.pth'):
        find_checkpoint(tmp_path)
    (tmp_path / 'pytorch_model.bin').touch()
    assert find_checkpoint(tmp_path) == tmp_path / 'pytorch_model.bin'


@pytest.mark.parametrize('error', [MemoryError(), KeyboardInterrupt(), OSError(5, 'Input/output error')], ids=repr)
def test_what_is_no_damage_is_not_called_so(error, tmp_path, monkeypatch):
    def fails(self):
        raise error

    torch.save({'x': torch.ones(1)}, tmp_path / 'x.pth')
    monkeypatch.setattr(zipfile.ZipFile, 'testzip', fails)
    with pytest.raises(type(error)) as e:
        read_checkpoint(tmp_path / 'x.pth')
    assert e.value is error


def test_records_that_are_compressed(tmp_path):
    """Compressed records are refused, even if a gap in the file hides that their sizes are too large."""
    source = files.save(files.make('original', fill=files.random_values), tmp_path / 'x.pth')
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / 'y.pth', 'w') as new:
        for info in old.infolist():
            is_data = '/data/' in info.filename
            new.writestr(info.filename, old.read(info), zipfile.ZIP_DEFLATED if is_data else zipfile.ZIP_STORED)
        new.fp.seek(new.start_dir)
        new.fp.write(bytes(source.stat().st_size))
        new.start_dir = new.fp.tell()
    with zipfile.ZipFile(tmp_path / 'y.pth') as archive:
        assert sum(info.file_size for info in archive.infolist()) < (tmp_path / 'y.pth').stat().st_size
    refusal(tmp_path / 'y.pth', 'is compressed')
    # said by the record alone, not by the directory
    data = source.read_bytes()
    assert data[8:10] == b'\0\0'
    (tmp_path / 'y.pth').write_bytes(data[:8] + b'\x08\0' + data[10:])
    refusal(tmp_path / 'y.pth', 'is compressed')


# ---- the process is as it was ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('how', ['zip', 'legacy'])
def test_threads_do_not_disturb_each_other(how, tmp_path):
    write({'x': torch.ones(2), 'top1': np.float64(75.1), 'names': np.array(['a', 'bc']),
           'args': argparse.Namespace(a=1)}, tmp_path / 'x.pth', how)
    theirs = [argparse.Namespace, datetime.datetime]
    torch.serialization.add_safe_globals(theirs)
    before = set(torch.serialization.get_safe_globals())
    errors, lists = [], []

    def work():
        for _ in range(40):
            try:
                assert read_checkpoint(tmp_path / 'x.pth')['top1'] == 75.1
            except Exception as e:
                errors.append(e)
            lists.append(set(torch.serialization.get_safe_globals()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == [] and all(x == before for x in lists)
        # what torch may load for them is not what is read here
        write({'x': datetime.datetime(2020, 1, 1)}, tmp_path / 'y.pth', how)
        refusal(tmp_path / 'y.pth', 'datetime.datetime')
    finally:
        rest = [x for x in torch.serialization.get_safe_globals() if x not in theirs]
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(rest)


def test_no_private_function_of_torch_is_needed(tmp_path, monkeypatch):
    """Files are read without private functions of torch, which may be missing in later versions.

    Files that name such functions are read too.
    """
    content = {'x': torch.ones(2), 'parameter': torch.nn.Parameter(torch.ones(2)), 'args': argparse.Namespace(a=1)}
    for how in ('zip', 'legacy'):
        write(content, tmp_path / how, how)
    for name in ('_rebuild_tensor_v2', '_rebuild_parameter', '_rebuild_tensor'):
        monkeypatch.delattr(torch._utils, name)
    for name in ('safe_globals', 'add_safe_globals', '_load', '_legacy_load', '_open_zipfile_reader', '_is_zipfile'):
        monkeypatch.delattr(torch.serialization, name)
    monkeypatch.delattr(torch, 'load')
    for how in ('zip', 'legacy'):
        assert torch.equal(read_checkpoint(tmp_path / how)['parameter'], torch.ones(2))


# ---- writing --------------------------------------------------------------------------------------------------------

def test_files_are_replaced_whole(tmp_path):
    file, other = tmp_path / 'x', tmp_path / 'other'
    save_atomically(file, lambda f: f.write(b'old'))
    other.touch()
    assert file.stat().st_mode == other.stat().st_mode

    def fails(f):
        f.write(b'half')
        raise OSError(28, 'No space left on device')

    with pytest.raises(OSError, match=f"No space left on device: '{re.escape(str(file))}'"):
        save_atomically(file, fails)
    assert file.read_bytes() == b'old' and sorted(tmp_path.iterdir()) == [other, file]
    with pytest.raises(FileNotFoundError, match='No such folder'):
        save_atomically(tmp_path / 'nowhere' / 'x', fails)
    with pytest.raises(OSError):
        save_atomically(tmp_path, fails)


def test_what_a_link_points_to_is_replaced(tmp_path):
    file, link = tmp_path / 'x', tmp_path / 'link'
    symlink(link, file)  # which is not there yet
    for content in (b'old', b'new'):
        save_atomically(link, lambda f, content=content: f.write(content))
        assert link.is_symlink() and file.read_bytes() == content
    assert sorted(tmp_path.iterdir()) == [link, file]


def test_devices_and_pipes_are_written_to(tmp_path):
    mkfifo(tmp_path / 'pipe')
    got = []
    thread = threading.Thread(target=lambda: got.append((tmp_path / 'pipe').read_bytes()))
    thread.start()
    save_atomically(tmp_path / 'pipe', lambda f: f.write(b'through'))
    thread.join()
    assert got == [b'through'] and (tmp_path / 'pipe').is_fifo()

    if not os.path.exists('/dev/full'):
        pytest.skip('needs /dev/full')
    full = tmp_path / 'full'
    full.symlink_to('/dev/full')
    with pytest.raises(OSError, match='No space'):
        save_atomically(full, lambda f: f.write(b'x'))
    assert full.is_symlink() and full.is_char_device()
    # leads to no path of a file system
    stdout = os.dup(1)
    read, write = os.pipe()
    try:
        os.dup2(write, 1)
        save_atomically('/dev/stdout', lambda f: f.write(b'x'))
    finally:
        os.dup2(stdout, 1)
        for number in (stdout, write):
            os.close(number)
    with open(read, 'rb') as pipe:
        assert pipe.read() == b'x'
