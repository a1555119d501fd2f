""" Files for other runtimes have the outputs of the model, without this package. If they differ, none is written. """
import functools
import json
import shlex
import sys
from pathlib import Path

import pytest
import timm
import torch

import pvt_timm
from pvt_timm.cli.main import _parser, main
from pvt_timm import export as export_package
from pvt_timm.detection import detector_to_mmdet, pvt_faster_rcnn, pvt_mask_rcnn, pvt_retinanet
from pvt_timm.export import TARGETS, comparing, export, read_metadata
from pvt_timm.export.graphs import make_graph
from pvt_timm.int8 import CalibrationImages, find_images
from pvt_timm.segmentation import semantic_fpn
from tests.support.forms import make_input, make_model
from tests.support.runtimes import read_alone
from tests.support.systems import symlink

DENSE = dict(class_token=False, num_classes=0, global_pool='avg')

def skip_without(target):
    for package in TARGETS[target].packages:
        pytest.importorskip(package.split('.')[0])


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


def test_the_model_keeps_its_modes(monkeypatch, tmp_path):
    """An export changes no module's mode (training or evaluation), even if it fails."""
    pytest.importorskip('onnxruntime')

    def fail(*args):
        raise ValueError('stopped here')

    monkeypatch.setattr(export_package, '_write', fail)
    model = make_model().train()
    model.stages[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match='stopped here'):
        export(model, 'onnx', tmp_path / 'model.onnx')
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2


@pytest.mark.parametrize('checkpoint', ['pytorch_model.bin', '.'])
@pytest.mark.parametrize('has_xml', [False, True])
def test_the_weights_beside_an_openvino_file_replace_no_checkpoint(monkeypatch, tmp_path, capsys, checkpoint, has_xml):
    monkeypatch.setattr('pvt_timm.cli.export.load_model', lambda *args, **kwargs: pytest.fail('too late'))
    torch.save(make_model().state_dict(), tmp_path / 'pytorch_model.bin')
    before = (tmp_path / 'pytorch_model.bin').read_bytes()
    output = tmp_path / 'pytorch_model.xml'
    if has_xml:
        output.touch()
    argv = ['export', '--checkpoint', str(tmp_path / checkpoint), '--to', 'openvino', '--output', str(output)]
    assert main(argv) == 2
    assert 'pytorch_model.bin is read and would be replaced' in capsys.readouterr().err
    assert (tmp_path / 'pytorch_model.bin').read_bytes() == before


def test_weights_of_an_openvino_file_replace_nothing_else(tmp_path):
    """A .bin without its .xml is not replaced, as it is not from an export."""
    (tmp_path / 'x.bin').write_bytes(b'something else')
    with pytest.raises(ValueError, match=r'x\.bin would be replaced.* as there is no x\.xml'):
        export(make_model(), 'openvino', tmp_path / 'x.xml')
    assert [file.name for file in tmp_path.iterdir()] == ['x.bin']
    assert (tmp_path / 'x.bin').read_bytes() == b'something else'


@pytest.mark.parametrize('change, message', [
    (lambda outputs: [output + 0.01 for output in outputs], 'Outputs differ from those of PyTorch by more than 1e-04'),
    (lambda outputs: [output * float('nan') for output in outputs], 'Outputs differ'),
    (lambda outputs: [output[:, 1:] for output in outputs], r'logits has the shape \(1, 9\)'),
], ids=['other numbers', 'NaN', 'another shape'])
def test_a_file_that_differs_is_not_written(monkeypatch, tmp_path, change, message):
    pytest.importorskip('onnxruntime')
    path = tmp_path / 'model.onnx'
    path.write_bytes(b'an older one')
    target = TARGETS['onnx']
    load = target.load
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
    (dict(model=torch.nn.Linear(2, 2)), 'Expected a PyramidVisionTransformer, a detector or a segmenter of this '
                                        'package, got Linear'),
    (dict(model=make_model(num_classes=0)), 'Expected a model with a classifier'),
    (dict(model=make_model().double()), 'Expected a model in float32 on the CPU'),
    (dict(target='torch', output='model.pt2', img_size=32),
     'Expected images of at least 64x64 for torch, got 32x32: .*--img-size 64'),
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


DETECTORS = dict(retinanet=pvt_retinanet, faster_rcnn=pvt_faster_rcnn, mask_rcnn=pvt_mask_rcnn)


def make_detector(kind, score=0.3):
    """Return a detector that finds objects of different scores and classes in random images."""
    torch.manual_seed(0)
    channels = dict(retinanet={}, faster_rcnn=dict(box_channels=48), mask_rcnn=dict(box_channels=48, mask_channels=24))
    model = DETECTORS[kind](
        'test_pvt', 3, out_channels=32, model_args=dict(img_size=64), min_size=64, max_size=128, **channels[kind])
    for m in (model.head if kind == 'retinanet' else model.rpn).modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight)
    comparing.thresholds_of(model).score_thresh = score
    model.categories = ['ant', 'bee', 'cat']
    return model.eval()


def assert_same_objects(actual, expected, tolerance):
    """Check that both lists have the same objects: same class, nearly the same box, score and mask."""
    assert [output.shape for output in actual] == [output.shape for output in expected] and len(expected[0]) > 2
    for some, others in ((actual, expected), (expected, actual)):
        same = some[2][:, None] == others[2]
        same &= (some[0][:, None] - others[0]).abs().amax(dim=2) < 0.05
        same &= (some[1][:, None] - others[1]).abs() < tolerance
        if len(some) > 3:
            same &= (some[3][:, None] - others[3][None]).abs().amax(dim=(2, 3, 4)) < 0.1
        assert same.any(dim=1).all()


@pytest.fixture(scope='module')
def exported_detector(tmp_path_factory):
    """Return a function that exports a detector. The same one is exported once."""
    @functools.cache
    def make(kind, target, half):
        skip_without(target)
        model = make_detector(kind)
        path = tmp_path_factory.mktemp('detector') / f'model{TARGETS[target].suffix}'
        return model, path, export(model, target, path, half=half, name='mine')
    return make


@pytest.mark.parametrize('kind, target, half', [
    pytest.param(
        kind, target, half, id=f'{kind}-{target}-{"half" if half else "float32"}',
        # Mask R-CNN is a Faster R-CNN with masks, and half precision is tested with RetinaNet
        marks=[pytest.mark.slow] * (target == 'openvino' or kind == 'faster_rcnn' or half and kind == 'mask_rcnn'))
    for kind in DETECTORS for target in ('onnx', 'openvino') for half in (False, True)])
def test_detectors_are_read_by_the_runtime_alone(exported_detector, kind, target, half, tmp_path):
    """An exported detector works for an image of another size and content than the export used."""
    pytest.importorskip('onnx')
    model, path, done = exported_detector(kind, target, half)
    assert len(done.differences) == 3 and max(done.differences.values()) < (5e-2 if kind == 'mask_rcnn' else 1e-4)
    said = read_metadata(path)
    assert said['labels'] == ['ant', 'bee', 'cat'] and said['model'] == 'mine'
    assert said['outputs'] == ['boxes', 'scores', 'labels'] + ['masks'] * (kind == 'mask_rcnn')
    assert said['preprocessing'] == dict(input_size=[3, None, None], value_range=[0, 1], min_size=64, max_size=128)

    if half:  # rounded after matrices of attention were multiplied, and a list of boxes changes with any last digit
        module = make_graph(model, half=True).module
        assert all(torch.equal(p, p.half().float()) for p in module.parameters() if p.ndim > 1)
    else:
        module = DetectionsOf(model)
    image = torch.rand(3, 50, 141, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = module(image)
    actual = read_alone(target, path, image, tmp_path)
    assert actual[2].dtype == torch.int64
    assert_same_objects(actual, expected, 1e-4)


class DetectionsOf(torch.nn.Module):
    """Returns the boxes, scores, labels (from 0) and masks of one image."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        found = self.model([image])[0]
        masks = [found['masks']] if 'masks' in found else []
        return [found['boxes'], found['scores'], found['labels'] - self.model.first_label, *masks]


def test_half_precision_halves_a_detector(exported_detector):
    (model, _, whole), (_, _, half) = (exported_detector('retinanet', 'onnx', half) for half in (False, True))
    weights = sum(p.numel() for p in model.parameters())
    assert whole.bytes - half.bytes > 1.8 * weights  # of the 2 bytes that each weight can save


def test_detectors_that_find_nothing_are_compared_with_a_lower_score(tmp_path, monkeypatch):
    """If nothing is found, the comparison uses a lower score.

    Otherwise any two files that find nothing would be equal.
    """
    pytest.importorskip('onnxruntime')
    lowest = []
    compare = export_package.compare_detections
    monkeypatch.setattr(export_package, 'compare_detections', lambda run, reference, *args: (
        lowest.append(comparing.thresholds_of(reference.model).score_thresh), compare(run, reference, *args))[1])
    model = make_detector('retinanet', score=0.999)
    export(model, 'onnx', tmp_path / 'model.onnx')
    assert lowest == [0., 0.999] and model.score_thresh == 0.999
    assert [file.name for file in tmp_path.iterdir()] == ['model.onnx']


def one_more(outputs):
    """Return the outputs with the first object twice. The second one has another score."""
    boxes, scores, *rest = (torch.cat([output, output[:1]]) for output in outputs)
    scores[-1] += 0.01
    return [boxes, scores, *rest]


@pytest.mark.parametrize('change, message', [
    (lambda outputs: [outputs[0] + 0.5, *outputs[1:]], 'have no counterpart of the same class'),
    (lambda outputs: [outputs[0], outputs[1] * 0.99, *outputs[2:]], 'have no counterpart'),
    (lambda outputs: [outputs[0], outputs[1], (outputs[2] + 1) % 3, *outputs[3:]], 'have no counterpart'),
    (lambda outputs: [output[1:] for output in outputs], 'have no counterpart'),
    (one_more, 'have no counterpart'),
    (lambda outputs: [*outputs[:3], outputs[3] * 0.8], 'have no counterpart'),
    (lambda outputs: [*outputs[:3], outputs[3][..., 1:]], 'masks have the shape'),
], ids=['boxes', 'scores', 'labels', 'one less', 'one more', 'masks', 'size of masks'])
def test_a_detector_that_differs_is_not_written(monkeypatch, tmp_path, change, message):
    pytest.importorskip('onnxruntime')
    target = TARGETS['onnx']
    model = make_detector('mask_rcnn')

    def load(path):
        return torch.no_grad()(lambda image: change(DetectionsOf(model)(image)))

    monkeypatch.setitem(TARGETS, 'onnx', type(target)(**{
        **vars(target), 'write': lambda graph, path: path.touch(), 'load': load}))
    with pytest.raises(ValueError, match=message):
        export(model, 'onnx', tmp_path / 'model.onnx')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('target', ['torch', 'executorch'])
def test_targets_without_detectors_refuse_them_by_name(target, tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, target, type(TARGETS[target])(**{**vars(TARGETS[target]), 'packages': ()}))
    with pytest.raises(ValueError, match=f'Expected one of onnx, openvino as target for detectors, got {target}'):
        export(make_detector('retinanet'), target, tmp_path / f'model{TARGETS[target].suffix}')
    assert not list(tmp_path.iterdir())


def test_target_without_segmenters_refuses_them_by_name(tmp_path):
    model = semantic_fpn('test_pvt', 5, out_channels=32, channels=16, model_args=dict(img_size=64)).eval()
    with pytest.raises(ValueError, match='Expected one of onnx, openvino, executorch as target for segmenters, got to'):
        export(model, 'torch', tmp_path / 'model.pt2', img_size=64)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kwargs, message', [
    (dict(features=True), 'Expected features of a backbone, got a detector'),
    (dict(img_size=64), 'Expected no img_size for a detector'),
    (dict(calibration=()), 'Expected a classifier or features for int8'),
])
def test_what_a_detector_cannot_have(kwargs, message, tmp_path):
    pytest.importorskip('onnxruntime')
    with pytest.raises(ValueError, match=message):
        export(make_detector('retinanet'), 'onnx', tmp_path / 'model.onnx', **kwargs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('target', [
    'onnx',
    pytest.param('openvino', marks=pytest.mark.slow),
    pytest.param('executorch', marks=pytest.mark.slow),
])
def test_segmenters_are_read_by_the_runtime_alone(target, tmp_path):
    skip_without(target)
    torch.manual_seed(0)
    model = semantic_fpn('test_pvt', 5, out_channels=32, channels=16, model_args=dict(img_size=64)).eval()
    model.categories = list('abcde')
    path = tmp_path / f'model{TARGETS[target].suffix}'
    export(model, target, path, img_size=64)
    x = make_input(*((2, 96, 160) if TARGETS[target].dynamic else (1, 64, 64)))
    with torch.no_grad():
        assert_near(read_alone(target, path, x, tmp_path), [model(x)], 1e-5)
    said = read_metadata(path)
    assert said['labels'] == list('abcde') and said['outputs'] == ['logits']
    assert said['preprocessing']['mean'] == list(model.mean) and said['preprocessing']['size_divisible'] == 32


def test_command_for_detectors_and_segmenters(tmp_path, capsys):
    pytest.importorskip('onnxruntime')
    config = "test_pipeline = [dict(type='Resize', img_scale=(128, 64), keep_ratio=True)]"  # the usual 800 take long
    torch.save(
        {'meta': {'config': config}, 'state_dict': detector_to_mmdet(make_detector('mask_rcnn'))},
        tmp_path / 'mask_rcnn.pth')
    output = tmp_path / 'model.onnx'
    start = ['export', '--checkpoint', str(tmp_path / 'mask_rcnn.pth'), '--to', 'onnx', '--output', str(output)]
    assert main([*start, '--detector', '--json']) == 0
    said = json.loads(capsys.readouterr().out)
    assert said['model'] == 'MaskRCNN with weights from mask_rcnn.pth' and said['outputs'][3] == 'masks'
    assert len(said['differences']) == 3
    assert (read_metadata(output)['preprocessing']['min_size'], output.stat().st_size) == (64, said['bytes'])
    output.unlink()
    for argv, message in (
            ([*start, '--segmenter'], 'Expected'),
            ([*start, '--detector', '--model', 'pvt_tiny'], 'Expected no --model'),
            ([*start, '--detector', '--int8', '--calibrate', str(tmp_path)], 'with --int8'),
            ([*start, '--detector', '--img-size', '64'], 'Expected no img_size for a detector'),
            ([*start[:1], *start[3:], '--segmenter'], 'Expected --checkpoint with --segmenter')):
        assert main(argv) == 2, argv
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and message in error, error
    assert [file.name for file in tmp_path.iterdir()] == ['mask_rcnn.pth']


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
    """A finder of modules that acts as if a package is not installed."""

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
    """int8 loses at most half a point of accuracy. Classes are known from names of folders."""
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


def test_calibration_images_are_those_that_other_commands_read(tmp_path):
    """The extensions are those of `pvt-timm predict`, and links to folders are followed."""
    names = ['b/1.webp', 'b/2.bmp', 'b/3.tif', 'b/4.png']
    for name in (*names, 'elsewhere/1.png', 'elsewhere/2.jpg'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    images = tmp_path / 'images'
    images.mkdir()
    (tmp_path / 'b').rename(images / 'b')
    symlink(images / 'a', tmp_path / 'elsewhere')
    symlink(images / 'b' / 'circle', images)
    files, classes = find_images(images, ['a', 'b'])
    assert [file.relative_to(images).as_posix() for file in files] == ['a/1.png', 'a/2.jpg', *names]
    assert classes == [0, 0, 1, 1, 1, 1]


def test_find_images(tmp_path):
    hidden = ['a/.2.png', '.thumbnails/1.png', 'a/.cache/x/1.png']
    for name in ('b/2.png', 'b/10.png', 'a/1.JPG', 'a/notes.txt', *hidden):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
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


@pytest.mark.slow
def test_openvino_compiles_models_of_a_fixed_size(tmp_path):
    """OpenVINO compiles a model of a fixed size whose attention is folded.

    OpenVINO 2026.4 ended with a segmentation fault for a folded attention with one head, so this runs in a separate
    process.
    """
    pytest.importorskip('openvino')
    model = timm.create_model('pvt_tiny', depths=(2, 1, 1, 1)).eval()
    folded = [type(block.attn).__name__ for block in pvt_timm.simplify(model).stages[0].blocks]
    assert folded == ['FoldedAttention'] * 2 and model.stages[0].blocks[0].attn.num_heads == 1
    export(model, 'openvino', tmp_path / 'pvt.xml')
    x = torch.randn(1, 3, 224, 224)
    logits, = read_alone('openvino of one size', tmp_path / 'pvt.xml', x, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_int8_for_openvino_on_a_cpu_without_vnni(tmp_path, monkeypatch):
    """As exact as on a CPU with VNNI. With weights of the whole range, sums overflowed and the change doubled."""
    for package in ('openvino', 'nncf'):
        pytest.importorskip(package)

    def random_image(file):
        return torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(int(file.name)))

    torch.manual_seed(0)
    model = timm.create_model('pvt_tiny').eval()
    images = CalibrationImages([Path(str(i)) for i in range(8)], None, random_image)
    export(model, 'openvino', tmp_path / 'pvt.xml', calibration=images)
    x = torch.stack([random_image(Path(str(i))) for i in range(8, 12)])
    with torch.no_grad():
        expected = model(x)
    changes = []
    for limit in ('ALL', 'AVX2'):
        monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', limit)
        logits, = read_alone('openvino', tmp_path / 'pvt.xml', x, tmp_path)
        changes.append((logits - expected).abs().mean().item())
    assert 0 < changes[1] < 1.3 * changes[0]


def test_commands_of_the_guide():
    text = (Path(pvt_timm.__file__).parent / 'recipes' / 'EXPORT.md').read_text(encoding='utf-8')
    lines = [line for line in text.splitlines() if line.startswith('pvt-timm export ')]
    assert len(lines) == 7
    for line in lines:
        args = _parser().parse_args(shlex.split(line)[1:])
        assert args.output.suffix == TARGETS[args.to].suffix and args.int8 == (args.calibrate is not None)
