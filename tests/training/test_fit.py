""" `pvt-timm detector` and `pvt-timm segmenter`: train, stop and continue, validate, and use the trained models. """
import contextlib
import copy
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('pytorch_lightning')
pytest.importorskip('pycocotools')

from pvt_timm.cli.main import main  # noqa: E402
from pvt_timm.detection import detector_from_mmdet, detector_to_mmdet, pvt_retinanet  # noqa: E402
from pvt_timm.detection.trained import describe_model  # noqa: E402
from pvt_timm.segmentation import segmenter_to_mmseg, semantic_fpn, semantic_fpn_from_mmseg  # noqa: E402
from pvt_timm.training import load_trained  # noqa: E402
from pvt_timm.training.published import PAPER  # noqa: E402
from tests.support.systems import needs_kill, needs_resource  # noqa: E402
from tests.support.training_options import DETECTOR, MASKS, SEGMENTER  # noqa: E402

NAMES = ['box', 'triangle', 'disc']  # in the order of their ids, 7, 18 and 30


def fit_args(task, folder, output, *more):
    return [task, 'fit', *(DETECTOR if task == 'detector' else SEGMENTER), '--data', folder, '--output', output,
            '--images-per-step', '6', *more]


def last(folder):
    return torch.load(folder / 'last.ckpt', weights_only=True)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope='module')
def trained(shapes_folder, tmp_path_factory):
    """Return a folder with a RetinaNet, a Mask R-CNN and a Semantic FPN that were trained for two epochs."""

    root = tmp_path_factory.mktemp('trained')
    for name, task, more in (
            ('retinanet', 'detector', ('--head-args', 'score_thresh=0.001')), ('mask_rcnn', 'detector', MASKS),
            ('semantic_fpn', 'segmenter', ())):
        argv = fit_args(task, shapes_folder, root / name, '--epochs', '2', '--eval-every', '1', *more)
        assert main([str(x) for x in argv]) == 0
    return root


@pytest.mark.parametrize('name, task, classes', [
    ('retinanet', 'detector', NAMES), ('mask_rcnn', 'detector', NAMES),
    ('semantic_fpn', 'segmenter', ['background', 'disc', 'box', 'triangle'])])
def test_what_fit_writes(trained, name, task, classes):
    folder = trained / name
    assert sorted(p.name for p in folder.iterdir()) == ['best.ckpt', 'curve.png', 'history.json', 'last.ckpt']
    assert Image.open(folder / 'curve.png').size[0] > 1000
    history = json.loads((folder / 'history.json').read_text())
    assert len(history['losses']) == 4 and np.isfinite(history['losses']).all()
    assert [row['step'] for row in history['evaluations']] == [2, 4]
    for file in ('best.ckpt', 'last.ckpt'):
        said = torch.load(folder / file, weights_only=True)['pvt_timm']  # plain values
        assert (said['kind'], said['model'], said['categories']) == (name, 'test_pvt', classes)
        assert said['num_classes'] == len(classes) and said['model_args']['img_size'] == [64, 64]
        assert said['mean'] == [0.485, 0.456, 0.406] and said['max_size'] == 128
    model = load_trained(folder / 'last.ckpt')
    assert not model.training and model.categories == classes
    weights = {f'model.{k}': v for k, v in model.state_dict().items()}
    there = {k: v for k, v in last(folder)['state_dict'].items() if not k.startswith('confusion')}
    assert equal(weights, there)


@pytest.mark.parametrize('name, task, more', [
    ('retinanet', 'detector', ('--head-args', 'score_thresh=0.001')), ('mask_rcnn', 'detector', MASKS),
    ('semantic_fpn', 'segmenter', ())])
def test_stopped_after_an_epoch_it_goes_on_as_if_it_had_not(
        cli, trained, shapes_folder, tmp_path, monkeypatch, name, task, more):
    from pvt_timm.training.callbacks import Checkpoints

    argv = fit_args(task, shapes_folder, tmp_path / 'out', '--epochs', '2', '--eval-every', '1', *more)
    save = Checkpoints.on_train_epoch_end

    def save_and_stop(self, trainer, module):
        save(self, trainer, module)
        raise RuntimeError('stopped')
    monkeypatch.setattr(Checkpoints, 'on_train_epoch_end', save_and_stop)
    assert 'stopped' in cli(*argv, code=2)
    assert last(tmp_path / 'out')['epoch'] == 0
    monkeypatch.undo()
    assert 'epoch 2 of 2' in cli(*argv)
    one, other = last(tmp_path / 'out'), last(trained / name)
    assert equal(one['state_dict'], other['state_dict'])
    assert one['callbacks'] == other['callbacks'] and one['pvt_timm']['figures'] == other['pvt_timm']['figures']
    before = (tmp_path / 'out' / 'last.ckpt').read_bytes()
    cli(*argv)  # nothing is left to do
    assert (tmp_path / 'out' / 'last.ckpt').read_bytes() == before
    error = cli(*argv, '--lr', '1', '--workers', '1', code=2)
    assert "started with lr=0.002, now it is 1.0" in error


def moved(rows, shapes_folder, file):
    """Write annotations that are detections, moved by some pixels.

    Otherwise figures would be near 0, as a model trained for four steps finds almost nothing.
    """
    content = json.loads((shapes_folder / 'val.json').read_text())
    content['annotations'] = []
    for n, row in enumerate(rows[::3]):
        x, y, w, h = row['bbox']
        x, y = x + n % 7 - 3, y + n % 5 - 2
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        content['annotations'].append(dict(
            row, id=n + 1, bbox=[x, y, w, h], area=w * h, iscrowd=int(n % 9 == 8), segmentation=[polygon]))
    file.write_text(json.dumps(content))


def coco_by_hand(truth_file, predictions, kinds):
    """Return the figures that pycocotools computes from two files, in the order of pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    by_hand = []
    for kind in kinds:
        file = predictions / {'box': 'boxes.json', 'mask': 'masks.json'}[kind]
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(truth_file))
            evaluation = COCOeval(truth, truth.loadRes(str(file)), {'box': 'bbox', 'mask': 'segm'}[kind])
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        by_hand += evaluation.stats.tolist()
    return by_hand


KINDS = {'retinanet': ('box',), 'mask_rcnn': ('box', 'mask')}


@pytest.mark.parametrize('name', KINDS)
def test_validate_is_pycocotools_on_the_predictions(cli, trained, shapes_folder, tmp_path, name):
    argv = ['detector', 'validate', '--weights', trained / name / 'last.ckpt', '--accelerator', 'cpu', '--predictions']
    first = json.loads(cli(*argv, tmp_path / 'first', '--json'))
    assert first == dict(kind=name, figures=last(trained / name)['pvt_timm']['figures'], published={})  # as in training
    rows = json.loads((tmp_path / 'first' / 'boxes.json').read_text())
    assert {row['category_id'] for row in rows} <= {7, 18, 30}
    moved(rows, shapes_folder, tmp_path / 'truth.json')
    argv += [tmp_path, '--val-annotations', tmp_path / 'truth.json']
    figures = json.loads(cli(*argv, '--json'))['figures']
    by_hand = coco_by_hand(tmp_path / 'truth.json', tmp_path, KINDS[name])
    assert list(figures.values()) == by_hand  # to the last digit
    assert len(figures) == 12 * len(KINDS[name]) and 0 < by_hand[0] < 1
    shown = [float(line.split()[1]) for line in cli(*argv).splitlines()]
    assert shown == [float(f'{100 * value if value >= 0 else value:.2f}') for value in by_hand]


def iou_by_hand(model, shapes_folder):
    """Return the mean IoU, the accuracy and the IoU of every class, from a confusion matrix of all pixels."""
    confusion = np.zeros((4, 4), dtype=np.int64)
    for file in sorted((shapes_folder / 'val').iterdir()):
        image = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255
        truth = np.array(Image.open(shapes_folder / 'val_labels' / file.name))
        np.add.at(confusion, (truth, model.segment(image).numpy()), 1)
    both = confusion.diagonal()
    iou = both / (confusion.sum(0) + confusion.sum(1) - both)
    return {'mIoU': iou.mean(), 'accuracy': both.sum() / confusion.sum(),
            **{f'IoU/{name}': value for name, value in zip(model.categories, iou)}}


def test_validate_is_the_confusion_of_all_pixels(cli, trained, shapes_folder):
    argv = ['segmenter', 'validate', '--weights', trained / 'semantic_fpn' / 'last.ckpt', '--accelerator', 'cpu']
    by_hand = iou_by_hand(load_trained(trained / 'semantic_fpn' / 'last.ckpt'), shapes_folder)
    assert json.loads(cli(*argv, '--json')) == dict(kind='semantic_fpn', figures=by_hand, published={})
    assert last(trained / 'semantic_fpn')['pvt_timm']['figures'] == by_hand
    assert f'{100 * by_hand["mIoU"]:.2f}' in cli(*argv)


@pytest.mark.parametrize('name, task', [('retinanet', 'detect'), ('mask_rcnn', 'detect'), ('semantic_fpn', 'segment')])
def test_commands_read_it(cli, trained, shapes_folder, tmp_path, name, task):
    image = sorted((shapes_folder / 'val').iterdir())[0]
    model = load_trained(trained / name / 'best.ckpt')
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    more = ['--threshold', '0.01'] if task == 'detect' else []
    found = [json.loads(cli(task, image, '--json', '--checkpoint', file, *more))['images'][0]
             for file in (trained / name / 'best.ckpt', trained / name / 'last.ckpt')]
    rows = found[0].get('objects', found[0].get('classes'))
    assert rows and {row['name'] for row in rows} <= set(model.categories)
    again = load_trained(tmp_path / 'weights.pth')
    assert equal(again.state_dict(), model.state_dict()) and type(again) is type(model)
    cli(task, image, '--checkpoint', tmp_path / 'weights.pth', *more)
    other = 'segment' if task == 'detect' else 'detect'
    error = cli(other, image, '--checkpoint', trained / name / 'best.ckpt', code=2)
    there = {'retinanet': 'RetinaNet', 'mask_rcnn': 'Mask R-CNN', 'semantic_fpn': 'Semantic FPN'}[name]
    asked = 'Semantic FPN' if other == 'segment' else 'RetinaNet or Faster R-CNN or Mask R-CNN'
    assert f'Expected a {asked}, got a {there}.' in error


@pytest.mark.parametrize('name', ['retinanet', 'mask_rcnn', 'semantic_fpn'])
def test_it_goes_to_openmmlab_and_back(trained, name):
    model = load_trained(trained / name / 'best.ckpt')
    if name == 'semantic_fpn':
        again = semantic_fpn_from_mmseg(segmenter_to_mmseg(model))
    else:
        again = detector_from_mmdet(detector_to_mmdet(model))
    assert equal(again.state_dict(), model.state_dict())


def test_from_whole_weights_with_other_classes(cli, trained, shapes_folder, tmp_path, capsys):
    """The head is new if the classes differ. Otherwise all weights are kept."""
    data = tmp_path / 'data'
    shutil.copytree(shapes_folder, data)
    for split in ('train', 'val'):
        content = json.loads((data / f'{split}.json').read_text())
        content['categories'].append(dict(id=99, name='star'))
        (data / f'{split}.json').write_text(json.dumps(content))
    start = load_trained(trained / 'retinanet' / 'best.ckpt').state_dict()
    argv = fit_args('detector', data, tmp_path / 'out', '--epochs', '1', '--weights',
                    trained / 'retinanet' / 'best.ckpt', '--lr', '0', '--head-args', 'score_thresh=0.001')
    assert main([str(x) for x in argv]) == 0
    err = capsys.readouterr().err
    assert 'the classes differ' in err and 'head.classification_head.cls_logits.weight' in err
    found = load_trained(tmp_path / 'out' / 'last.ckpt')
    assert found.categories == [*NAMES, 'star']
    for name, value in found.state_dict().items():
        assert ('cls_logits' in name) or torch.equal(value, start[name]), name
    argv = fit_args('detector', shapes_folder, tmp_path / 'same', '--epochs', '1', '--weights',
                    trained / 'retinanet' / 'best.ckpt', '--lr', '0', '--head-args', 'score_thresh=0.001')
    cli(*argv)
    assert equal(load_trained(tmp_path / 'same' / 'last.ckpt').state_dict(), start)
    error = cli(*fit_args('detector', shapes_folder, tmp_path / 'x', '--epochs', '1', '--kind', 'faster_rcnn',
                          '--weights', trained / 'retinanet' / 'best.ckpt'), code=2)
    assert 'Expected a faster_rcnn in' in error


def test_from_the_weights_of_openmmlab(cli, shapes_folder, tmp_path):
    """Widths, image size and eps of the norms are those of the file."""
    torch.manual_seed(0)
    source = pvt_retinanet('test_pvt', 3, out_channels=16, model_args=dict(img_size=64))
    torch.save(dict(state_dict=detector_to_mmdet(source), meta=dict(CLASSES=('a', 'b', 'c'))), tmp_path / 'mm.pth')
    argv = ['detector', 'fit', '--config', 'finetune_detector', '--data', shapes_folder, '--output', tmp_path / 'out',
            '--weights', tmp_path / 'mm.pth', '--epochs', '1', '--images-per-step', '6', '--min-size', '64',
            '--lr', '0', '--workers', '0', '--accelerator', 'cpu']
    assert main([str(x) for x in argv]) == 0
    model = load_trained(tmp_path / 'out' / 'last.ckpt')
    assert {m.eps for m in model.backbone.body.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    assert torch.equal(model.backbone.fpn.inner_blocks[0][0].weight, source.backbone.fpn.inner_blocks[0][0].weight)


@pytest.mark.parametrize('task', ['detector', 'segmenter'])
def test_what_a_start_says_holds_on(cli, shapes_folder, tmp_path, task):
    """The checkpoint to start from also gives image channels, normalisation and arguments of the PVT."""
    torch.manual_seed(0)
    args = dict(img_size=64, in_chans=1, num_heads=(4, 4, 4, 4))
    if task == 'detector':
        source = pvt_retinanet('test_pvt', 3, out_channels=16, model_args=args, image_mean=[0.3], image_std=[0.2])
    else:
        source = semantic_fpn('test_pvt', 4, out_channels=16, channels=16, model_args=args)
        source.mean, source.std = (0.3,), (0.2,)
    torch.save({'pvt_timm': describe_model(source), 'state_dict': source.state_dict()}, tmp_path / 'start.ckpt')
    argv = fit_args(task, shapes_folder, tmp_path / 'out', '--epochs', '1', '--weights', tmp_path / 'start.ckpt')
    cli(*argv)
    cli(task, 'validate', '--weights', tmp_path / 'out' / 'last.ckpt')
    model = load_trained(tmp_path / 'out' / 'last.ckpt')
    assert model.in_chans == 1 and model.backbone.model_args['num_heads'] == (4, 4, 4, 4)
    sizes = getattr(model, 'transform', model)
    mean, std = ('image_mean', 'image_std') if task == 'detector' else ('mean', 'std')
    assert (list(getattr(sizes, mean)), list(getattr(sizes, std))) == ([0.3], [0.2])
    error = cli(*argv, '--output', tmp_path / 'x', '--model-args', 'img_size=96', code=2)
    assert 'Expected no img_size in model_args, or (64, 64) as in' in error


@pytest.mark.parametrize('kind', ['retinanet', 'mask_rcnn', 'semantic_fpn'])
def test_grey_images_and_no_others(cli, shapes_folder, tmp_path, kind):
    task = 'segmenter' if kind == 'semantic_fpn' else 'detector'
    argv = fit_args(task, shapes_folder, tmp_path / 'out', '--epochs', '1', *(MASKS if kind == 'mask_rcnn' else ()))
    more = ['--model-args', 'img_size=64', 'in_chans=1']
    cli(*argv, *more)
    model = load_trained(tmp_path / 'out' / 'last.ckpt')
    assert model.in_chans == 1
    image = sorted((shapes_folder / 'val').iterdir())[0]
    cli('segment' if task == 'segmenter' else 'detect', image, '--checkpoint', tmp_path / 'out' / 'last.ckpt')
    error = cli(*argv, *more[:-1], 'in_chans=4', '--output', tmp_path / 'x', code=2)
    assert 'images with 1 or 3 channels, got one for 4' in error


@pytest.mark.parametrize('kind, first', [('retinanet', 0), ('faster_rcnn', 1), ('mask_rcnn', 1)])
def test_labels_are_counted_as_the_detector_does(shapes_folder, tmp_path, kind, first):
    """Labels count from the detector's first label. Its docstring and its error for other labels say so."""
    from pvt_timm.training.run import _detector_parts
    from pvt_timm.training.settings import DetectorSettings, read_settings

    settings = read_settings(DetectorSettings, 'finetune_detector', dict(
        data=str(shapes_folder), output=str(tmp_path), kind=kind, model='test_pvt', out_channels=16, min_size=64))
    model, train, _, module_args = _detector_parts(settings)
    labels = {label for i in range(len(train)) for label in train[i][1]['labels'].tolist()}
    assert labels == {first, first + 1, first + 2} and module_args['category_ids'] == {
        first: 7, first + 1: 18, first + 2: 30}
    assert f'Labels count from {first} to ' in type(model).__doc__ + type(model).__mro__[1].__doc__
    targets = [dict(boxes=torch.tensor([[1., 1, 20, 20]]), labels=torch.tensor([first + 3]),
                    masks=torch.zeros(1, 64, 64, dtype=torch.uint8))]
    with pytest.raises(ValueError, match=f'labels from {first} to {first + 2}'):
        model.train()([torch.rand(3, 64, 64)], targets)


def test_frozen_stages(cli, trained, shapes_folder, tmp_path):
    cli(*fit_args('detector', shapes_folder, tmp_path, '--epochs', '1', '--frozen-stages', '2', '--drop-path', '0.9',
                  '--grad-checkpointing', '--clip-grad', '0.5', '--weights', trained / 'retinanet' / 'best.ckpt'))
    start = load_trained(trained / 'retinanet' / 'best.ckpt').state_dict()
    for name, value in load_trained(tmp_path / 'last.ckpt').state_dict().items():
        if name.startswith('backbone.body.'):
            frozen = name.startswith(('backbone.body.stages_0.', 'backbone.body.stages_1.'))
            assert torch.equal(value, start[name]) == frozen, name


@pytest.mark.parametrize('kind', ['retinanet', 'mask_rcnn'])
def test_an_epoch_without_objects(cli, shapes_folder, tmp_path, kind):
    data = tmp_path / 'data'
    shutil.copytree(shapes_folder, data)
    content = json.loads((data / 'train.json').read_text())
    content['annotations'] = []
    (data / 'train.json').write_text(json.dumps(content))
    more = MASKS if kind == 'mask_rcnn' else ()
    argv = fit_args('detector', data, tmp_path / 'out', '--epochs', '1', *more)
    assert 'Nothing to train on (12 images without objects)' in cli(*argv, code=2)
    cli(*argv, '--keep-empty')
    assert all(x.isfinite().all() for x in load_trained(tmp_path / 'out' / 'last.ckpt').state_dict().values())


@pytest.mark.parametrize('warmup, is_said', [(1, False), (2, True)])
def test_a_warm_up_that_is_longer_than_half_of_the_training_is_said(
        shapes_folder, tmp_path, capsys, warmup, is_said):
    argv = fit_args('segmenter', shapes_folder, tmp_path / 'out', '--epochs', '1', '--warmup-steps', warmup)
    assert main([str(arg) for arg in argv]) == 0
    said = f'rises during the first {warmup} steps, and the whole training has 2 steps: give fewer --warmup-steps'
    assert (said in capsys.readouterr().err) == is_said


@pytest.mark.parametrize('kind, count', [('retinanet', 1), ('retinanet', 365), ('mask_rcnn', 1), ('mask_rcnn', 365)])
def test_one_class_and_365(cli, shapes_folder, tmp_path, kind, count):
    data = tmp_path / 'data'
    shutil.copytree(shapes_folder, data)
    for split in ('train', 'val'):
        content = json.loads((data / f'{split}.json').read_text())
        content['categories'] = [dict(id=10 + 3 * i, name=f'thing {i}') for i in range(count)]
        for n, annotation in enumerate(content['annotations']):
            annotation['category_id'] = 10 + 3 * (n * 7 % count)
        (data / f'{split}.json').write_text(json.dumps(content))
    more = MASKS if kind == 'mask_rcnn' else ()
    cli(*fit_args('detector', data, tmp_path / 'out', '--epochs', '1', *more))
    model = load_trained(tmp_path / 'out' / 'last.ckpt')
    assert model.num_classes == count and model.categories[-1] == f'thing {count - 1}'
    assert equal(load_trained(copy.copy(model.state_dict())).state_dict(), model.state_dict())


@needs_resource
def test_a_full_disk_leaves_the_last_checkpoint(cli, trained, shapes_folder, tmp_path, monkeypatch):
    """If the disk is full, the last checkpoint stays. A limit of file sizes makes writing fail."""
    import resource

    argv = fit_args('detector', shapes_folder, tmp_path / 'out', '--epochs', '2')
    from pvt_timm.training.callbacks import Checkpoints
    save = Checkpoints.on_train_epoch_end

    def full_in_the_second_epoch(self, trainer, module):
        if trainer.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        save(self, trainer, module)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(Checkpoints, 'on_train_epoch_end', full_in_the_second_epoch)
    try:
        cli(*argv, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    monkeypatch.undo()
    assert last(tmp_path / 'out')['epoch'] == 0
    files = sorted(p.name for p in (tmp_path / 'out').iterdir())
    assert files == ['best.ckpt', 'curve.png', 'history.json', 'last.ckpt']
    cli(*argv)
    assert last(tmp_path / 'out')['epoch'] == 1


def test_a_loss_that_is_no_number_ends_it(cli, shapes_folder, tmp_path):
    error = cli(*fit_args('detector', shapes_folder, tmp_path / 'out', '--epochs', '4', '--lr', '1e30',
                          '--clip-grad', '1e9', '--warmup-steps', '0'), code=2)
    assert 'The loss of step' in error and '--lr' in error
    assert not (tmp_path / 'out' / 'last.ckpt').exists()


def test_a_failed_validation_leaves_no_folder(cli, shapes_folder, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = pvt_retinanet('test_pvt', 3, out_channels=16, model_args=dict(img_size=64))
    meta = dict(CLASSES=('disc', 'box', 'triangle'), cfg="test_pipeline = [dict(type='Resize', scale=(128, 64))]")
    torch.save(dict(state_dict=detector_to_mmdet(model), meta=meta), tmp_path / 'x.pth')
    argv = ['detector', 'validate', '--config', 'finetune_detector', '--weights', tmp_path / 'x.pth', '--data',
            shapes_folder, '--workers', '0', '--accelerator', 'cpu', '--predictions']
    assert 'x.pth' in cli(*argv, tmp_path / 'x.pth' / 'in', code=2)  # a file, which is seen before images are read

    def fail(*args, **kwargs):
        raise ValueError('the disk is gone')

    monkeypatch.setattr('pytorch_lightning.Trainer.validate', fail)
    assert 'the disk is gone' in cli(*argv, tmp_path / 'out', code=2)
    assert [file.name for file in tmp_path.iterdir()] == ['x.pth']


def test_published_figures_decide_on_the_exit_code(cli, shapes_folder, tmp_path, monkeypatch):
    torch.manual_seed(0)
    detector = pvt_retinanet('test_pvt', 3, out_channels=16, model_args=dict(img_size=64))
    cfg = "test_pipeline = [dict(type='Resize', scale=(128, 64))]"
    meta = dict(CLASSES=('disc', 'box', 'triangle'), cfg=cfg)
    torch.save(dict(state_dict=detector_to_mmdet(detector), meta=meta), tmp_path / 'detector.pth')
    segmenter = semantic_fpn('test_pvt', 4, channels=24, out_channels=16, model_args=dict(img_size=64))
    torch.save(dict(state_dict=segmenter_to_mmseg(segmenter), meta=dict(cfg=cfg)), tmp_path / 'fpn.pth')
    layout = dict(
        detector=['--config', 'finetune_detector'],
        segmenter=['--val-images', 'val', '--val-labels', 'val_labels', '--no-reduce-zero-label'])
    for task, file, figure in (('detector', 'detector.pth', 'box/AP'), ('segmenter', 'fpn.pth', 'mIoU')):
        argv = [task, 'validate', '--weights', tmp_path / file, '--data', shapes_folder, '--workers', '0',
                '--accelerator', 'cpu', *layout[task]]
        line = next(line for line in cli(*argv).splitlines() if line.startswith(figure))
        assert 'published' not in line  # of three classes nothing is
        measured = float(line.split()[1])
        for published, code in ((measured + 0.1, 0), (measured + 0.5, 1)):
            monkeypatch.setattr('pvt_timm.training.run.published_figures', lambda *_, p={figure: published}: p)
            printed = cli(*argv, code=code)
            assert f'published {published:6.2f}' in printed and ('NOT within 0.2' in printed) == bool(code)
        assert 'published' not in cli(*argv, '--no-published')
        cli(*argv, '--allowed', '1')
        monkeypatch.undo()
    assert 'No figures are published' in cli(*argv, '--published', code=2)


def test_named_weights_are_compared_with_openmmlab(cli, shapes_folder, tmp_path, monkeypatch):
    """`--weights retinanet_coco` is compared with OpenMMLab's figures.

    Without a config, the folders of the data are COCO's.
    """
    (tmp_path / 'annotations').mkdir()
    shutil.copytree(shapes_folder / 'val', tmp_path / 'val2017')
    shutil.copy(shapes_folder / 'val.json', tmp_path / 'annotations' / 'instances_val2017.json')
    assert PAPER['retinanet', 'pvt_medium', 800] == {'box/AP': 41.9}  # and OpenMMLab's file has 41.7
    torch.manual_seed(0)
    model = pvt_retinanet('test_pvt', 3, out_channels=16, model_args=dict(img_size=64), min_size=64).eval()
    asked = []
    monkeypatch.setattr('pvt_timm.cli.network._reach', lambda url: None)
    monkeypatch.setattr('pvt_timm.training.run.retinanet_coco', lambda name: asked.append(name) or model)
    monkeypatch.setattr('pvt_timm.training.run._variant', lambda model: 'pvt_medium')
    printed = cli('detector', 'validate', '--weights', 'retinanet_coco', '--model', 'pvt_medium',
                  '--data', tmp_path, '--workers', '0', '--accelerator', 'cpu', code=1)
    assert asked == ['pvt_medium'] and 'published  41.70' in printed.splitlines()[0]
    assert len(printed.splitlines()) == 12


def test_categories_are_matched_by_name(cli, trained, shapes_folder, tmp_path):
    """Other ids in another order give the same figures. Other names are refused."""
    content = json.loads((shapes_folder / 'val.json').read_text())
    for entry in content['categories']:
        entry['id'] = 1000 - entry['id']
    for annotation in content['annotations']:
        annotation['category_id'] = 1000 - annotation['category_id']
    (tmp_path / 'other.json').write_text(json.dumps(content))
    argv = ['detector', 'validate', '--weights', trained / 'retinanet' / 'last.ckpt', '--accelerator', 'cpu']
    assert cli(*argv, '--val-annotations', tmp_path / 'other.json') == cli(*argv)
    content['categories'][0]['name'] = 'ring'
    (tmp_path / 'other.json').write_text(json.dumps(content))
    error = cli(*argv, '--val-annotations', tmp_path / 'other.json', code=2)
    assert "Only the file has 'ring', only the model has 'disc'" in error


@pytest.mark.parametrize('task, more, message', [
    ('detector', ['--config', 'none'], "a recipe (finetune_detector, mask_rcnn_coco_1x, retinanet_coco_1x)"),
    ('detector', ['--kind', 'yolo'], 'invalid choice'),
    ('detector', ['--epochs', '2', '--steps', '2'], 'either epochs or steps'),
    ('detector', ['--images-per-pass', '4'], 'a multiple of 4'),
    ('detector', ['--devices', 'two'], "number of devices or 'auto'"),
    ('detector', ['--frozen-stages', '5'], '0 to 4 for frozen_stages'),
    ('detector', ['--lr', 'nan'], 'Expected a finite number for lr, got nan'),
    ('detector', ['--clip-grad', '-1'], 'Expected a finite number, 0 or more, for clip_grad, got -1.0'),
    ('detector', ['--train-annotations', 'none.json'], 'No such annotation file'),
    ('detector', ['--weights', 'none.pth'], 'No such file'),
    ('detector', ['--model', 'resnet18'], "as model, with or without a tag, got 'resnet18'"),
    ('detector', ['--head-args', 'colour=1'], 'colour'),
    ('detector', ['--model-args', 'colour=1'], 'colour'),
    ('detector', ['--accelerator', 'hovercraft'], 'hovercraft'),
    ('segmenter', ['--classes', '1'], 'two classes or more'),
    ('segmenter', ['--classes', 'a', 'a'], 'different names'),
    ('segmenter', ['--classes', '256'], 'at most 255 classes'),
    ('segmenter', ['--classes', 'background', 'disc'], 'for the 2 classes'),
])
def test_wrong_command_lines(cli, shapes_folder, tmp_path, task, more, message):
    argv = fit_args(task, shapes_folder, tmp_path / 'out', '--epochs', '1', *more)
    assert message in cli(*argv, code=2)
    assert not (tmp_path / 'out' / 'last.ckpt').exists()


@pytest.mark.parametrize('name', ['lr', 'weight_decay', 'clip_grad'])
@pytest.mark.parametrize('value', [-1., float('nan'), float('inf')])
def test_settings_that_python_code_makes_are_checked(tmp_path, name, value):
    """`fit` refuses numbers out of range, even if the settings do not come from a file or a command line."""
    from pvt_timm.training.run import fit
    from pvt_timm.training.settings import DetectorSettings

    with pytest.raises(ValueError, match=f'Expected a finite number, 0 or more, for {name}, got {value}'):
        fit(DetectorSettings(output=str(tmp_path / 'out'), epochs=1, **{name: value}))
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name, task', [
    ('retinanet', 'detector'), ('mask_rcnn', 'detector'), ('semantic_fpn', 'segmenter')])
def test_half_precision(cli, trained, shapes_folder, tmp_path, name, task):
    """Training in bfloat16 has losses near those of float32, keeps weights in float32, and can be evaluated.

    It cannot be continued with another precision.
    """
    more = MASKS if name == 'mask_rcnn' else ('--head-args', 'score_thresh=0.001') if name == 'retinanet' else ()
    argv = fit_args(task, shapes_folder, tmp_path / 'out', '--epochs', '2', '--eval-every', '1', *more,
                    '--precision', 'bf16-mixed')
    cli(*argv)
    history, whole = (json.loads((folder / 'history.json').read_text()) for folder in (
        tmp_path / 'out', trained / name))
    # later steps of Mask R-CNN are trained on other proposals, as rounding decides which ones are sampled
    compared = slice(2) if name == 'mask_rcnn' else slice(None)
    assert history['losses'][compared] == pytest.approx(whole['losses'][compared], rel=0.05)
    assert history['losses'] != whole['losses']
    assert {x.dtype for x in last(tmp_path / 'out')['state_dict'].values() if x.is_floating_point()} == {torch.float32}
    found = json.loads(cli(task, 'validate', '--weights', tmp_path / 'out' / 'last.ckpt', '--json',
                           '--precision', 'bf16-mixed'))
    assert history['evaluations'][-1] == dict(step=4, epoch=2, **found['figures'])  # as in training
    error = cli(*argv[:-1], '32-true', code=2)
    assert "started with precision='bf16-mixed', now it is '32-true'" in error


# ---- processes of their own ------------------------------------------------------------------------------------------

@pytest.fixture
def command(client_env, tmp_path):
    """Return a function that starts a command in a separate process."""
    def start(argv, launcher=()):
        env = {**client_env, 'OMP_NUM_THREADS': '1'}
        return subprocess.Popen(
            [sys.executable, *launcher, '-m', 'pvt_timm', *map(str, argv)], env=env, cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True)
    return start


def finish(process):
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return out


def figures_in(out):
    """Return the figures in the output of `validate --json`. Gloo prints lines before them."""
    return json.loads(out[out.index('{'):])['figures']


TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2')


@pytest.mark.slow
@pytest.mark.parametrize('launcher, more', [((), ('--devices', '2')), (TORCHRUN, ())])
@pytest.mark.parametrize('name, task', [('mask_rcnn', 'detector'), ('semantic_fpn', 'segmenter')])
def test_two_processes(command, trained, shapes_folder, tmp_path, name, task, launcher, more):
    """Two processes measure exactly the figures of pycocotools or a confusion matrix, and train together.

    The number of images, five, is not a multiple of two.
    """
    argv = [task, 'validate', '--weights', trained / name / 'last.ckpt', '--accelerator', 'cpu', '--workers', '0',
            '--json']
    if task == 'detector':
        finish(command([*argv, '--predictions', tmp_path / 'one']))
        moved(json.loads((tmp_path / 'one' / 'boxes.json').read_text()), shapes_folder, tmp_path / 'truth.json')
        argv += ['--val-annotations', tmp_path / 'truth.json', '--predictions', tmp_path / 'two']
    found = figures_in(finish(command([*argv, *more], launcher)))
    if task == 'detector':
        for file in ('boxes.json', 'masks.json'):
            one, two = (json.loads((tmp_path / folder / file).read_text()) for folder in ('one', 'two'))
            assert one == two and len(one) > 5
        assert list(found.values()) == coco_by_hand(tmp_path / 'truth.json', tmp_path / 'two', KINDS[name])
        assert 0 < found['box/AP'] < 1 and 0 < found['mask/AP'] < 1
    else:
        assert found == iou_by_hand(load_trained(trained / name / 'last.ckpt'), shapes_folder)
    kind = MASKS if name == 'mask_rcnn' else ()
    argv = fit_args(task, shapes_folder, tmp_path / 'out', '--epochs', '2', '--eval-every', '1', *kind)
    finish(command([*argv, *more], launcher))
    end = last(tmp_path / 'out')
    assert end['global_step'] == 4 and len(end['callbacks']['History']['losses']) == 4
    half = [*argv, *more, '--output', tmp_path / 'half', '--precision', 'bf16-mixed', '--clip-grad', '1']
    finish(command(half, launcher))
    assert np.isfinite(last(tmp_path / 'half')['callbacks']['History']['losses']).all()
    assert last(tmp_path / 'half')['global_step'] == 4
    finish(command([task, 'validate', '--weights', tmp_path / 'out' / 'last.ckpt', '--accelerator', 'cpu',
                    '--workers', '0']))


@needs_kill
@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(command, shapes_folder, tmp_path):
    """After several kills, the final weights are those of a run without kills."""
    argv = fit_args('detector', shapes_folder, tmp_path / 'killed', '--epochs', '6')
    rng = np.random.default_rng(0)
    kills = 0
    for attempt in range(12):
        process = command(argv)
        deadline = time.time() + 300
        if attempt >= 4:
            finish(process)
            break
        before = (tmp_path / 'killed' / 'last.ckpt').exists() and os.stat(tmp_path / 'killed' / 'last.ckpt').st_mtime_ns
        while process.poll() is None and time.time() < deadline:  # until there is a new checkpoint, and some more
            file = tmp_path / 'killed' / 'last.ckpt'
            if file.exists() and os.stat(file).st_mtime_ns != before:
                break
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.5)))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        torch.load(tmp_path / 'killed' / 'last.ckpt', weights_only=True)
    assert kills >= 2 and last(tmp_path / 'killed')['epoch'] == 5
    finish(command(fit_args('detector', shapes_folder, tmp_path / 'whole', '--epochs', '6')))
    assert equal(last(tmp_path / 'killed')['state_dict'], last(tmp_path / 'whole')['state_dict'])
