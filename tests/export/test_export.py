""" Files for other runtimes: the model's numbers, read by the runtime alone, and nothing written where they differ. """
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pvt_timm
from pvt_timm import export as export_module
from pvt_timm.cli.main import _parser, main
from pvt_timm.export import TARGETS, export, read_metadata
from pvt_timm.int8 import find_images
from tests.support.forms import make_input, make_model

DENSE = dict(class_token=False, num_classes=0, global_pool='avg')

# A program that has nothing but the runtime: it reads images from a file and writes outputs to another.
READERS = {
    'onnx': '''
import onnxruntime
session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
outputs = session.run(None, {'image': x})
''',
    'openvino': '''
import openvino
compiled = openvino.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
outputs = list(compiled({'image': x}).values())
''',
    'torch': '''
import torch
outputs = [output.detach().numpy() for output in torch.export.load(path).module()(torch.from_numpy(x))]
''',
    'executorch': '''
import torch
from executorch.runtime import Runtime
method = Runtime.get().load_program(path).load_method('forward')
outputs = [output.numpy() for output in method.execute([torch.from_numpy(x)])]
''',
}
READ = '''
import sys
import numpy as np
path, images, results = sys.argv[1:]
x = np.load(images)
{reader}
np.savez(results, *outputs)
assert not {{'pvt_timm', 'timm'}} & sys.modules.keys()
'''


def skip_without(target):
    for package in TARGETS[target].packages:
        pytest.importorskip(package.split('.')[0])


def read_alone(target, path, x, tmp_path):
    np.save(tmp_path / 'images.npy', x.numpy())
    program = READ.format(reader=READERS[target])
    subprocess.run(
        [sys.executable, '-c', program, path, tmp_path / 'images.npy', tmp_path / 'results.npz'],
        check=True, cwd=tmp_path, timeout=300)
    with np.load(tmp_path / 'results.npz') as results:
        return [torch.from_numpy(results[name]) for name in results.files]


def assert_near(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance * max(1., e.abs().max().item()))


@pytest.mark.parametrize('features, half', [(False, False), (True, True)], ids=['logits', 'features in half'])
@pytest.mark.parametrize('target', [
    'onnx',
    pytest.param('openvino', marks=pytest.mark.slow),
    pytest.param('torch', marks=pytest.mark.slow),
    pytest.param('executorch', marks=pytest.mark.slow),
])
def test_read_by_the_runtime_alone(target, features, half, tmp_path):
    skip_without(target)
    model = make_model(img_size=64, **(DENSE if features else {}))
    path = tmp_path / f'model{TARGETS[target].suffix}'
    done = export(
        model, target, path, features=features, img_size=64, half=half, labels=['a', 'b'], name='mine',
        preprocessing=dict(input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3), crop_pct=0.9))
    assert len(done.differences) == (3 if TARGETS[target].dynamic else 1)
    assert max(done.differences.values()) < (5e-3 if half else 1e-5)

    x = make_input(*((2, 96, 160) if TARGETS[target].dynamic else (1, 64, 64)))
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True) if features else [model(x)]
    assert_near(read_alone(target, path, x, tmp_path), expected, 5e-3 if half else 1e-5)

    said = read_metadata(path)
    assert said['model'] == 'mine' and said['labels'] == ['a', 'b'] and said['input'] == 'image'
    assert said['outputs'] == ([f'stage{i}' for i in range(4)] if features else ['logits'])
    assert said['preprocessing'] == dict(input_size=[3, 64, 64], mean=[0.1, 0.2, 0.3], crop_pct=0.9)
    files = {path.name} | ({'model.bin'} if target == 'openvino' else set())
    assert {file.name for file in tmp_path.iterdir()} == {*files, 'images.npy', 'results.npz'}
    assert done.bytes == sum((tmp_path / name).stat().st_size for name in files)


def test_the_model_stays_as_it_is(tmp_path):
    pytest.importorskip('onnxruntime')
    model, x = make_model(), make_input(1, 64, 64)
    with torch.no_grad():
        before = model(x)
        export(model, 'onnx', tmp_path / 'model.onnx', half=True)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize('change, message', [
    (lambda outputs: [output + 0.01 for output in outputs], 'Outputs differ from those of PyTorch by more than 1e-04'),
    (lambda outputs: [output * float('nan') for output in outputs], 'Outputs differ'),
    (lambda outputs: [output[:, 1:] for output in outputs], r'logits has the shape \(1, 9\)'),
], ids=['other numbers', 'NaN', 'another shape'])
def test_a_file_that_differs_is_not_written(monkeypatch, tmp_path, change, message):
    pytest.importorskip('onnxruntime')
    path = tmp_path / 'model.onnx'
    path.write_bytes(b'an older one')
    load = export_module._load_onnx
    target = TARGETS['onnx']
    monkeypatch.setitem(TARGETS, 'onnx', type(target)(**{
        **vars(target), 'load': lambda path: lambda x: change(load(path)(x))}))
    with pytest.raises(ValueError, match=message):
        export(make_model(), 'onnx', path)
    assert path.read_bytes() == b'an older one' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('kwargs, message', [
    (dict(target='coreml'), "Expected one of onnx, openvino, torch, executorch as target, got 'coreml'"),
    (dict(output='model.bin'), r'Expected a file name that ends in \.onnx for onnx, got model\.bin'),
    (dict(output='none/model.onnx'), 'No such folder: '),
    (dict(features=True), 'Expected a dense model for features'),
    (dict(model=torch.nn.Linear(2, 2)), 'Expected a PyramidVisionTransformer, got Linear'),
    (dict(model=make_model(num_classes=0)), 'Expected a model with a classifier'),
    (dict(model=make_model().double()), 'Expected a model in float32 on the CPU'),
    (dict(target='torch', output='model.pt2', img_size=32), 'Expected an img_size of at least 64 for torch, got'),
    (dict(target='torch', output='model.pt2', calibration=()), 'Expected one of onnx, openvino as target for int8'),
    (dict(half=True, calibration=()), 'Expected half precision or int8, not both'),
])
def test_what_cannot_be_is_refused(tmp_path, kwargs, message):
    pytest.importorskip('onnxruntime')
    kwargs = dict(dict(model=make_model(), target='onnx', output='model.onnx'), **kwargs)
    kwargs['output'] = tmp_path / kwargs['output']
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        export(**kwargs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('target, package', [
    ('onnx', 'onnxruntime'), ('openvino', 'openvino'), ('executorch', 'executorch')])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path, capsys, target, package):
    for name in [name for name in sys.modules if name.split('.')[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, 'meta_path', [Missing(package), *sys.meta_path])
    output = tmp_path / f'model{TARGETS[target].suffix}'
    assert main(['export', '--model', 'test_pvt', '--to', target, '--output', str(output)]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and "is not installed, it comes with pip install 'pvt-timm[export]'" in error
    assert package in error and not list(tmp_path.iterdir())


class Missing:
    """A finder for which a package is not installed."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == self.package:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name.split('.')[0])


def test_command(tmp_path, capsys):
    pytest.importorskip('onnxruntime')
    path = tmp_path / 'digits.onnx'
    argv = ['export', '--model', 'test_pvt', '--to', 'onnx', '--output', str(path), '--features', '--json']
    assert main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert said['target'] == 'onnx' and said['file'] == str(path) and said['outputs'][0] == 'stage0'
    assert said['bytes'] == path.stat().st_size and list(said['differences'])[0] == '1x32x32'
    assert main([*argv[:-2], '--int8']) == 2
    assert 'Expected --int8 and --calibrate FOLDER together' in capsys.readouterr().err
    assert read_metadata(path)['model'] == 'test_pvt.digits'


@pytest.mark.parametrize('target', ['onnx', pytest.param('openvino', marks=pytest.mark.slow)])
def test_int8_keeps_the_digits(target, tmp_path, capsys):
    """With classes by the names of folders; at most half a point is lost."""
    pytest.importorskip('sklearn')
    for package in (*TARGETS[target].packages, *TARGETS[target].int8_packages):
        pytest.importorskip(package.split('.')[0])
    assert main(['digits', str(tmp_path / 'digits')]) == 0
    capsys.readouterr()
    path = tmp_path / f'digits{TARGETS[target].suffix}'
    assert main([
        'export', '--model', 'test_pvt', '--to', target, '--output', str(path), '--int8', '--calibrate',
        str(tmp_path / 'digits' / 'validation'), '--json']) == 0
    said = json.loads(capsys.readouterr().out)
    int8 = said['int8']
    assert int8['images'] == 360 and int8['right_before'] > 0.99
    assert int8['right_after'] >= int8['right_before'] - 0.005
    assert 0 < int8['mean_change'] < 0.02
    assert said['bytes'] < 700_000  # 0.6 MB of weights in float32, beside the graph
    assert read_metadata(path)['labels'] == [str(i) for i in range(10)]


def test_find_images(tmp_path):
    for name in ('b/2.png', 'b/10.png', 'a/1.JPG', 'a/notes.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = ['a/1.JPG', 'b/2.png', 'b/10.png']
    for labels, classes in ((['c', 'b', 'a'], [2, 1, 1]), (['x', 'y'], [0, 1, 1]), (['x', 'y', 'z'], None)):
        files, found = find_images(tmp_path, labels)
        assert [str(file.relative_to(tmp_path)) for file in files] == names and found == classes
    assert find_images(tmp_path / 'b', ['a', 'b'])[1] is None
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='Expected images in .*, found none'):
        find_images(tmp_path / 'empty')
    with pytest.raises(FileNotFoundError, match='No such folder'):
        find_images(tmp_path / 'none')


def test_commands_of_the_readme():
    text = (Path(pvt_timm.__file__).parent / 'recipes' / 'README.md').read_text(encoding='utf-8')
    lines = [line for line in text.splitlines() if line.startswith('python -m pvt_timm export ')]
    assert len(lines) == 2
    for line in lines:
        args = _parser().parse_args(shlex.split(line)[3:])
        assert args.output.suffix == TARGETS[args.to].suffix and args.int8 == (args.calibrate is not None)
    for target, kind in TARGETS.items():
        assert f'| `{target}` | {kind.suffix}' in text
