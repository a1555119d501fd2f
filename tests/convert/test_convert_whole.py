""" Detectors and segmenters of this package, converted to the layout of OpenMMLab on the command line. """
import json

import pytest
import torch

from pvt_timm.detection import detector_from_mmdet, pvt_mask_rcnn, pvt_retinanet
from pvt_timm.detection.trained import KEY, describe_model
from pvt_timm.segmentation import semantic_fpn, semantic_fpn_from_mmseg
from tests.support import convert_files as files
from tests.support.convert_files import run
from tests.support.reference import randomize

SMALL = dict(model_name='test_pvt', num_classes=3, out_channels=16, model_args=dict(img_size=64))
MODELS = dict(
    retinanet=lambda: pvt_retinanet(**SMALL, min_size=96, max_size=160),
    mask_rcnn=lambda: pvt_mask_rcnn(**SMALL, box_channels=32, mask_channels=8),
    semantic_fpn=lambda: semantic_fpn(**SMALL, channels=8, min_size=64, max_size=256))


def trained(kind):
    """Return a model with names of classes, and a checkpoint of the model as `fit` writes it."""
    model = randomize(MODELS[kind]()).eval()
    model.categories = ['cat', 'dog', 'eel']
    if kind == 'semantic_fpn':
        model.palette = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    where = getattr(model, 'transform', model)
    setattr(where, 'image_mean' if where is not model else 'mean', [0.1, 0.2, 0.4])
    if kind == 'mask_rcnn':  # rows of the background, which OpenMMLab does not have
        with torch.no_grad():
            for name, rows in (('box_predictor.bbox_pred', 4), ('mask_predictor.mask_fcn_logits', 1)):
                for x in model.roi_heads.get_submodule(name).parameters():
                    x[:rows] = 0
    return model, {'state_dict': {f'model.{k}': v for k, v in model.state_dict().items()}, KEY: describe_model(model)}


@pytest.mark.parametrize('to', ['mmdet', 'original'])
@pytest.mark.parametrize('kind', MODELS)
def test_there_and_back(kind, to, tmp_path):
    model, checkpoint = trained(kind)
    torch.save(checkpoint, tmp_path / 'last.ckpt')
    code, out, err = run(tmp_path / 'last.ckpt', '--output', tmp_path / 'out', '--to', to, '--whole')
    assert (code, err) == (0, '') and f'{kind} on test_pvt, 3 classes (cat, dog, eel)' in out
    file = tmp_path / 'out' / f'test_pvt_{kind}.pth'
    assert file.name in out and [p.name for p in (tmp_path / 'out').iterdir()] == [file.name]
    again = (semantic_fpn_from_mmseg if kind == 'semantic_fpn' else detector_from_mmdet)(file)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert again.categories == model.categories
    ours, theirs = (getattr(m, 'transform', m) for m in (model, again))
    assert (theirs.min_size, theirs.max_size) == (ours.min_size, ours.max_size)
    if kind == 'semantic_fpn':
        assert again.palette == model.palette and list(again.mean) == [0.1, 0.2, 0.4]
    else:
        assert again.transform.image_mean == [0.1, 0.2, 0.4]
    meta = torch.load(file, weights_only=True)['meta']
    assert meta['dataset_meta']['classes'] == meta['CLASSES'] == ('cat', 'dog', 'eel')
    # what was written is a source too, as are weights alone
    code, out, _ = run(file, '-o', tmp_path / 'again', '--to', to, '--whole', '--json')
    report = json.loads(out)
    assert code == 0 and report['kind'] == kind and report['files'] == {file.name: file.stat().st_size}
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    assert run(tmp_path / 'bare.pth', '-o', tmp_path / 'bare', '--to', to, '--whole')[0] == 0


def test_what_cannot_be_is_refused(tmp_path):
    _, checkpoint = trained('retinanet')
    torch.save(checkpoint, tmp_path / 'x.ckpt')
    backbone = files.save(files.make('mmdet'), tmp_path / 'backbone.pth')
    for source, options, named in (
            (tmp_path / 'x.ckpt', [], 'whole detector'),
            (tmp_path / 'x.ckpt', ['--to', 'transformers'], 'whole detector'),
            (tmp_path / 'x.ckpt', ['--to', 'mmdet', '--drop', 'head'], '--drop'),
            (tmp_path / 'x.ckpt', ['--to', 'mmdet', '--dtype', 'float16'], '--dtype'),
            (tmp_path / 'x.ckpt', ['--to', 'mmdet', '--labels', 'x'], '--labels'),
            (backbone, ['--to', 'mmdet'], 'backbone.'), (tmp_path / 'none', ['--to', 'mmdet'], 'No such file')):
        code, out, err = run(source, '-o', tmp_path / 'out', '--whole', *options)
        assert (code, out) == (2, '') and named in err and not (tmp_path / 'out').exists(), err


def test_a_pvt_that_the_layout_cannot_say_is_refused(tmp_path):
    model = randomize(pvt_retinanet('test_pvt', 3, out_channels=16, model_args=dict(img_size=64, num_heads=(4,) * 4)))
    torch.save({'state_dict': model.state_dict(), KEY: describe_model(model)}, tmp_path / 'x.ckpt')
    code, _, err = run(tmp_path / 'x.ckpt', '-o', tmp_path / 'out', '--to', 'mmdet', '--whole')
    assert code == 2 and 'num_heads=[4, 4, 4, 4], which the file cannot hold' in err and not (tmp_path / 'out').exists()


def test_nothing_is_written_that_is_read_back_otherwise(tmp_path, monkeypatch):
    from weights_conversion import detectors

    _, checkpoint = trained('retinanet')
    torch.save(checkpoint, tmp_path / 'x.ckpt')
    real = detectors.detector_to_mmdet
    monkeypatch.setattr(detectors, 'detector_to_mmdet', lambda *args: {
        k: v + 1 if k == 'bbox_head.retina_cls.bias' else v for k, v in real(*args).items()})
    code, _, err = run(tmp_path / 'x.ckpt', '-o', tmp_path / 'out', '--to', 'mmdet', '--whole')
    assert code == 2 and 'cls_logits.bias' in err and not (tmp_path / 'out').exists()
