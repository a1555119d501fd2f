"""`pvt-timm detect` and `pvt-timm segment`."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from pvt_timm.cli.detect import draw_detections, run_lengths
from pvt_timm.detection import detector_to_mmdet, pvt_mask_rcnn, pvt_retinanet
from pvt_timm.segmentation import segmenter_to_mmseg, semantic_fpn


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Images, and checkpoints of a detector and a segmenter as OpenMMLab's code saves them."""
    path = tmp_path_factory.mktemp('detect')
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    for name, size in (('a.png', (60, 80)), ('b.png', (1, 1)), ('wide.png', (40, 200))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path / name)
    meta = dict(CLASSES=('cat', 'dog', 'emu'), cfg='scale=(96, 64)')
    small = dict(out_channels=16, model_args=dict(img_size=64))
    models = dict(
        mask_rcnn=pvt_mask_rcnn('test_pvt', 3, box_channels=32, mask_channels=16, **small),
        retinanet=pvt_retinanet('test_pvt', 3, **small))
    for name, model in models.items():
        torch.save(dict(state_dict=detector_to_mmdet(model), meta=meta), path / f'{name}.pth')
    segmenter = semantic_fpn('test_pvt', 150, channels=24, **small)
    segmenter.head.classifier.weight.data.mul_(100)  # more than one class
    torch.save(dict(state_dict=segmenter_to_mmseg(segmenter), meta=dict(cfg='')), path / 'segmenter.pth')
    return path


def test_detect(cli, folder, tmp_path):
    images = [folder / x for x in ('a.png', 'b.png', 'wide.png')]
    found = json.loads(cli('detect', *images, '--threshold', '0.01', '--checkpoint', folder / 'mask_rcnn.pth', '--json',
                           '--output', tmp_path / 'out'))
    assert found['model'] == 'MaskRCNN' and [x['image'] for x in found['images']] == [str(x) for x in images]
    first = found['images'][0]
    assert (first['width'], first['height']) == (80, 60) and len(first['objects']) > 3
    for item in first['objects']:
        x1, y1, x2, y2 = item['box']
        assert item['name'] == ('cat', 'dog', 'emu')[item['label']] and 0 <= x1 < x2 <= 80 and 0 <= y1 < y2 <= 60
        assert item['mask']['size'] == [60, 80] and sum(item['mask']['counts']) == 60 * 80
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['a_detect.png', 'b_detect.png', 'wide_detect.png']
    lines = cli('detect', images[0], '--threshold', '0.01', '--checkpoint', folder / 'mask_rcnn.pth').splitlines()
    assert lines[0] == f'{images[0]}: {len(first["objects"])} objects' and ' at ' in lines[1]
    assert cli('detect', images[0], '--checkpoint', folder / 'retinanet.pth') == f'{images[0]}: 0 objects\n'


def test_run_lengths_are_those_of_coco():
    coco = pytest.importorskip('pycocotools.mask')
    for mask in (torch.rand(5, 7) > 0.5, torch.ones(3, 2), torch.zeros(2, 3)):
        expected = coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        assert coco.frPyObjects(run_lengths(mask.bool()), *mask.shape)['counts'] == expected['counts']


def test_pictures_show_boxes_masks_and_names(tmp_path):
    image = Image.new('RGB', (300, 200), (128, 128, 128))
    mask = torch.zeros(200, 300, dtype=torch.bool)
    mask[100:180, 100:250] = True
    draw_detections(image, [dict(name='cat', score=0.9, box=[100, 100, 250, 180])], [mask], tmp_path / 'x.png')
    pixels = np.asarray(Image.open(tmp_path / 'x.png').convert('RGB')).astype(int)
    h, w = pixels.shape[:2]
    assert w / h == pytest.approx(1.5, abs=.02)
    inside = pixels[int(h * .7), int(w * .6)]
    assert inside[0] > 150 > inside[1]  # half red, half grey
    assert np.abs(pixels[int(h * .2), int(w * .2)] - 128).max() < 5
    reddest = (pixels[..., 0] - pixels[..., 1]).argmax()
    assert .3 < reddest % w / w < .9 and .4 < reddest // w / h < .95  # the edge and the label


def test_segment(cli, folder, tmp_path):
    args = ['segment', folder / 'a.png', folder / 'b.png', '--checkpoint', folder / 'segmenter.pth']
    found = json.loads(cli(*args, '--json', '--output', tmp_path))
    assert found['model'] == 'SemanticFpn'
    classes = found['images'][0]['classes']
    assert len(classes) > 1 and sum(x['share'] for x in classes) == pytest.approx(1, abs=0.01)
    assert [x['share'] for x in classes] == sorted((x['share'] for x in classes), reverse=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a_segment.png', 'b_segment.png']
    assert classes[0]['name'] in cli(*args).splitlines()[1]


def test_model_takes_all_that_are_published(cli, folder, monkeypatch):
    taken = []
    monkeypatch.setattr('pvt_timm.cli.detect.retinanet_coco', lambda name: taken.append(name) or pvt_retinanet(
        'test_pvt', 3, model_args=dict(img_size=64), min_size=64).eval())
    for name in ('pvt_tiny', 'pvt_small.retinanet_coco', 'pvt_medium'):
        cli('detect', folder / 'a.png', '--model', name)
    assert taken == ['pvt_tiny', 'pvt_small', 'pvt_medium']


@pytest.mark.parametrize('args, message', [
    (['detect', 'none.png', '--checkpoint', 'mask_rcnn.pth'], 'No such file or directory: none.png'),
    (['detect', 'a.png', '--checkpoint', 'segmenter.pth'], 'Faster R-CNN or Mask R-CNN, got a Semantic FPN'),
    (['segment', 'a.png', '--checkpoint', 'mask_rcnn.pth'], 'Expected a Semantic FPN, got a Mask R-CNN'),
    (['detect', 'a.png', '--checkpoint', 'plain.pth'], 'got keys layer.weight'),
    (['detect', 'a.png', '--model', 'pvt_large'], 'pvt_medium'),
    (['detect', 'mask_rcnn.pth', '--checkpoint', 'mask_rcnn.pth'], 'Cannot read the image mask_rcnn.pth'),
    (['detect', 'a.png', 'sub/a.png', '--output', 'x', '--checkpoint', 'mask_rcnn.pth'], 'images of different names'),
    (['detect', 'a.png', '--output', 'a.png', '--checkpoint', 'mask_rcnn.pth'], 'File exists: a.png'),
])
def test_wrong_input(cli, folder, monkeypatch, args, message):
    monkeypatch.chdir(folder)
    torch.save({'layer.weight': torch.ones(1)}, 'plain.pth')
    (folder / 'sub').mkdir(exist_ok=True)
    (folder / 'sub' / 'a.png').write_bytes((folder / 'a.png').read_bytes())
    assert message in cli(*args, fails=True)
