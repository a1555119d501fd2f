"""`pvt-timm detect` and `pvt-timm segment`."""
import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pvt_timm.cli.detect import coco_results, compressed, run_lengths
from pvt_timm.cli.overlays import _overlap, _place_label, distinct_color, draw_detections, draw_segments
from pvt_timm.detection import coco_categories, detector_from_mmdet, detector_to_mmdet, pvt_mask_rcnn, pvt_retinanet
from pvt_timm.segmentation import segmenter_to_mmseg, semantic_fpn, semantic_fpn_from_mmseg
from tests.support.systems import symlink


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Return a folder with images, and with checkpoints of detectors and a segmenter as OpenMMLab saves them."""
    path = tmp_path_factory.mktemp('detect')
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    for name, size in (('a.png', (60, 80)), ('b.png', (1, 1)), ('wide.png', (40, 200))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path / name)
    meta = dict(CLASSES=('cat', 'dog', 'emu'), cfg="test_pipeline = [dict(type='Resize', scale=(96, 64))]")
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
        lengths = run_lengths(mask.bool())
        assert coco.frPyObjects(lengths, *mask.shape)['counts'] == expected['counts']
        assert compressed(lengths['counts']).encode() == expected['counts']
    wide = torch.rand(900, 1100, generator=torch.Generator().manual_seed(0))
    for mask in (wide > 0.999, wide < 0.999, wide > 0.5):
        expected = coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        assert compressed(run_lengths(mask)['counts']).encode() == expected['counts']


def drawn(draw, *args, folder):
    """Call a function that draws a picture, and return the pixels (H, W, 3) of the picture."""
    draw(*args, folder / 'x.png')
    return np.asarray(Image.open(folder / 'x.png').convert('RGB')).astype(int)


def found(name, score, *box):
    return dict(name=name, score=score, box=list(box))


def near(pixels, color, tolerance=40):
    """Return a mask (H, W) of the pixels that nearly have a colour."""
    return np.abs(pixels - np.array(color)).max(axis=2) <= tolerance


GREY = Image.new('RGB', (300, 200), (128, 128, 128))


def test_pictures_show_boxes_masks_and_names(tmp_path):
    mask = torch.zeros(200, 300, dtype=torch.bool)
    mask[100:180, 100:250] = True
    pixels = drawn(draw_detections, GREY, [found('cat', 0.9, 100, 100, 250, 180)], [mask], folder=tmp_path)
    h, w = pixels.shape[:2]
    assert w / h == pytest.approx(1.5, abs=.002)
    inside = pixels[int(h * .7), int(w * .6)]
    assert inside[0] > 150 > inside[1]  # half red, half grey
    assert np.abs(pixels[int(h * .2), int(w * .2)] - 128).max() < 5
    reddest = (pixels[..., 0] - pixels[..., 1]).argmax()
    assert .3 < reddest % w / w < .9 and .4 < reddest // w / h < .95  # the edge and the label


@pytest.mark.parametrize('masks', [[], torch.zeros(0, 200, 300, dtype=torch.bool)])
def test_picture_without_objects_is_the_image(tmp_path, masks):
    pixels = drawn(draw_detections, GREY, [], masks, folder=tmp_path)
    assert pixels.shape == (900, 1350, 3) and np.abs(pixels - 128).max() <= 1


def test_masks_of_one_class_can_be_told_apart(tmp_path):
    """Where two masks overlap, the picture shows the colour of the better object, without a blend.

    The outline of the other mask is still visible there.
    """
    masks = torch.zeros(2, 200, 300, dtype=torch.bool)
    masks[0, 60:150, 30:180] = True
    masks[1, 80:170, 120:280] = True
    objects = [found('person', 0.9, 30, 60, 180, 150), found('person', 0.8, 120, 80, 280, 170)]
    pixels = drawn(draw_detections, GREY, objects, masks, folder=tmp_path)
    zoom = pixels.shape[1] / 300
    first, both, second = (pixels[int(y * zoom), int(x * zoom)] for y, x in ((110, 70), (115, 150), (140, 240)))
    assert np.abs(first - both).max() < 4 and np.abs(first - second).max() > 60
    assert np.abs(second - (np.array(distinct_color(1)) + 128) / 2).max() < 4
    line = pixels[int(115 * zoom), int(110 * zoom):int(130 * zoom)]  # across the left edge of the second mask
    assert near(line[None], distinct_color(1), 60).any()


EDGES = [(0, 0, 30, 20), (270, 0, 300, 20), (270, 180, 300, 200), (0, 180, 30, 200), (130, 195, 170, 200),
         (296, 60, 300, 120), (100, 0, 200, 4)]


@pytest.mark.parametrize('box', EDGES)
def test_labels_stay_on_the_picture_and_hide_no_box(tmp_path, box):
    """A label stays inside of the picture, also for a box at the edge, and does not cover the box."""
    objects = [found('refrigerator', 0.9, *box)]
    pixels = drawn(draw_detections, GREY, objects, [], folder=tmp_path)
    assert pixels.shape[:2] == (900, 1350)
    white = near(pixels, (255, 255, 255), 3)
    assert not white[:, [0, -1]].any() and not white[[0, -1]].any()
    color = near(pixels, distinct_color(0), 3)
    rows, columns = np.nonzero(color)
    zoom = 1350 / 300
    x1, y1, x2, y2 = (round(x * zoom) for x in box)
    assert columns.min() <= x1 + 3 and columns.max() >= x2 - 4 and rows.min() <= y1 + 3 and rows.max() >= y2 - 4
    label = color.sum() - 2 * 3 * (x2 - x1 + y2 - y1)  # what is not the lines
    assert label > 3000
    middle = pixels[(y1 + y2) // 2, (x1 + x2) // 2]
    assert np.abs(middle - 128).max() < 3  # inside of the box is the image


def test_labels_of_neighbours_do_not_hide_each_other():
    """Labels do not overlap, for 12 narrow boxes side by side and four boxes inside of each other."""
    row = [(100. + 40 * i, 300., 135. + 40 * i, 500.) for i in range(12)]
    nested = [(200., 20., 900., 280.), (220., 30., 800., 270.), (230., 40., 700., 260.), (240., 50., 600., 250.)]
    boxes, labels = row + nested, []
    for i, box in enumerate(boxes):
        labels.append(_place_label(140., 28., box, boxes[:i] + boxes[i + 1:], labels, (1000., 600.)))
    for i, label in enumerate(labels):
        assert 0 <= label[0] and label[2] <= 1000 and 0 <= label[1] and label[3] <= 600
        assert all(_overlap(label, other) == 0 for other in labels[:i])


def test_pictures_of_thin_images_and_long_names(tmp_path):
    """Thin images can be drawn. So can long names, formulas of matplotlib, control characters and line breaks."""
    for size in ((1, 1), (400, 4), (4, 400)):
        w, h = size
        objects = [found('a name of a class that is longer than any picture is wide' * 3, 0.9, 0, 0, w, h),
                   found('$x^2$ \x1b[31m $\\frac{', 0.8, 0, 0, w / 2, h / 2), found('two\nlines', 0.7, 0, 0, w, h)]
        masks = torch.ones(3, h, w, dtype=torch.bool)
        pixels = drawn(draw_detections, Image.new('L', size, 128), objects, masks, folder=tmp_path)
        assert 300 <= min(pixels.shape[:2]) and max(pixels.shape[:2]) == 1350
        rows = [dict(label=0, name=objects[1]['name'], share=1.)]
        drawn(draw_segments, Image.new('L', size, 128), torch.zeros(h, w).long(), rows, None, folder=tmp_path)


def test_classes_have_the_colours_that_differ_most(tmp_path):
    objects = [found(name, 0.9, x, 40, x + 40, 120) for name, x in (('cat', 10), ('dog', 110), ('cat', 210))]
    pixels = drawn(draw_detections, GREY, objects, [], folder=tmp_path)
    zoom = (pixels.shape[1] - 15) / GREY.width
    for row, rank in zip(objects, (0, 1, 0)):
        x1, _, x2, _ = row['box']
        of_object = pixels[:, int((x1 - 5) * zoom):int((x2 + 20) * zoom)]
        assert near(of_object, distinct_color(rank), 30).sum() > 100
        assert not near(of_object, distinct_color(1 - rank), 30).sum() > 100


def test_segments_of_like_colours_and_of_classes_without_any(tmp_path):
    labels = torch.zeros(200, 300, dtype=torch.int64)
    labels[:, 150:] = 1
    labels[:4, :4] = 2
    rows = [dict(label=i, name=name, share=share) for i, name, share in (
        (0, 'hill', .5), (1, 'cushion', .4997), (2, 'bathtub', .0003))]
    like = [(255, 102, 0), (255, 110, 0), (0, 0, 255)]
    pixels = drawn(draw_segments, GREY, labels, rows, like, folder=tmp_path)
    height = pixels.shape[0] - 15  # 0.05 inches around
    zoom = height / 200
    edge = pixels[int(height * .8), int(145 * zoom):int(158 * zoom)]
    assert edge.sum(axis=1).min() < 0.6 * edge.sum(axis=1).max()  # a dark line between two that look alike
    for x in (75, 225):  # and a name in white on each
        area = pixels[int(80 * zoom):int(120 * zoom), int((x - 25) * zoom):int((x + 25) * zoom)]
        assert near(area, (255, 255, 255), 30).sum() > 150
    beside = pixels[:, int(310 * zoom):]
    assert near(beside, like[0], 3).sum() > 100 and near(beside, like[1], 3).sum() > 100
    assert not near(beside, like[2], 60).any()  # 0.03% of the image

    many = torch.arange(30).repeat_interleave(10).repeat(200, 1)
    rows = [dict(label=i, name=f'class {i}', share=1 / 30) for i in reversed(range(30))]
    pixels = drawn(draw_segments, GREY, many, rows, None, folder=tmp_path)
    stripes = [pixels[pixels.shape[0] * 3 // 4, int((10 * i + 3) * zoom)] for i in range(30)]
    assert np.abs(stripes[29] - (0.6 * np.array(distinct_color(0)) + 0.4 * 128)).max() < 4  # by rank
    assert min(np.abs(a - b).max() for i, a in enumerate(stripes) for b in stripes[:i]) > 5
    assert len({distinct_color(i) for i in range(150)}) == 150


def test_segment(cli, folder, tmp_path):
    args = ['segment', folder / 'a.png', folder / 'b.png', '--checkpoint', folder / 'segmenter.pth']
    found = json.loads(cli(*args, '--json', '--output', tmp_path))
    assert found['model'] == 'SemanticFpn'
    classes = found['images'][0]['classes']
    assert len(classes) > 1 and sum(x['share'] for x in classes) == pytest.approx(1, abs=0.01)
    assert [x['share'] for x in classes] == sorted((x['share'] for x in classes), reverse=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a_segment.png', 'b_segment.png']
    assert classes[0]['name'] in cli(*args).splitlines()[1]


def test_results_are_cocos(cli, folder, tmp_path, capsys):
    """With `--format coco`, pycocotools reads the results, and ids of images and categories are as documented."""
    pytest.importorskip('pycocotools')
    from pycocotools.coco import COCO
    paths = [tmp_path / name for name in ('000000000139.png', '42.png')]
    for path in paths:
        path.write_bytes((folder / 'a.png').read_bytes())
    args = ['--json', '--threshold', '0.01', '--checkpoint', folder / 'mask_rcnn.pth']
    plain = json.loads(cli('detect', *paths, *args))
    rows = json.loads(cli('detect', *paths, *args, '--format', 'coco'))
    objects = [x for image in plain['images'] for x in image['objects']]
    assert len(rows) == len(objects) > 6 and {row['image_id'] for row in rows} == {139, 42}
    for row, item in zip(rows, objects):
        x, y, w, h = row['bbox']
        assert [x, y, x + w, y + h] == pytest.approx(item['box'], abs=0.01)
        assert row['category_id'] == item['label'] + 1 and row['score'] == pytest.approx(item['score'], abs=1e-6)
    assert any(row['score'] != round(row['score'], 6) for row in rows)  # not rounded to ties
    truth = COCO()
    truth.dataset = dict(
        images=[dict(id=i, width=80, height=60) for i in (42, 139)], annotations=[],
        categories=[dict(id=i, name=str(i)) for i in (1, 2, 3)])
    truth.createIndex()
    loaded = truth.loadRes(rows)
    areas = [int(loaded.annToMask(x).sum()) for x in loaded.loadAnns(loaded.getAnnIds())]
    assert areas == [sum(x['mask']['counts'][1::2]) for x in objects]
    capsys.readouterr()
    named = json.loads(cli('detect', folder / 'a.png', paths[0], *args, '--format', 'coco'))
    assert {row['image_id'] for row in named} == {1, 2}

    results = [dict(image='x/7.png', objects=[dict(label=i, box=[0, 0, 1, 1], score=1.) for i in (0, 15, 79)])]
    assert [x['category_id'] for x in coco_results(results, list(coco_categories().values()), True)] == [1, 17, 90]
    assert [x['category_id'] for x in coco_results(results, [], True)] == [1, 16, 80]


def test_grey_images(cli, tmp_path):
    """A model with one channel gets grey levels. A model with four channels is refused."""
    small = dict(out_channels=16, model_args=dict(img_size=64, in_chans=1))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    image.save(tmp_path / 'x.png')
    detector = pvt_mask_rcnn('test_pvt', 3, box_channels=32, mask_channels=16, **small).eval()
    torch.save(dict(state_dict=detector_to_mmdet(detector), meta={}), tmp_path / 'd.pth')
    segmenter = semantic_fpn('test_pvt', 4, channels=24, **small).eval()
    torch.save(dict(state_dict=segmenter_to_mmseg(segmenter), meta={}), tmp_path / 's.pth')
    args = ['--output', tmp_path / 'out', '--json', '--checkpoint']
    seen = json.loads(cli('detect', tmp_path / 'x.png', '--threshold', '0.01', *args, tmp_path / 'd.pth'))
    grey = torch.from_numpy(np.array(image.convert('L'))).float()[None] / 255
    with torch.no_grad():
        expected = detector_from_mmdet(tmp_path / 'd.pth')([grey])[0]
    assert seen['images'][0]['objects'][0]['score'] == pytest.approx(expected['scores'][0].item(), abs=1e-5)
    classes = json.loads(cli('segment', tmp_path / 'x.png', *args, tmp_path / 's.pth'))['images'][0]['classes']
    labels = semantic_fpn_from_mmseg(tmp_path / 's.pth').segment(grey)
    assert {x['label']: x['share'] for x in classes} == pytest.approx(
        {i: (labels == i).float().mean().item() for i in labels.unique().tolist()}, abs=1e-6)
    torch.save(segmenter_to_mmseg(semantic_fpn('test_pvt', 4, model_args=dict(in_chans=4))), tmp_path / 'four.pth')
    message = 'Expected a model for images with 1 or 3 channels, four.pth takes 4'
    assert message in cli('segment', tmp_path / 'x.png', '--checkpoint', tmp_path / 'four.pth', fails=True)


@pytest.mark.parametrize('file', ['mask_rcnn.pth', 'retinanet.pth', 'segmenter.pth'])
@pytest.mark.parametrize('value, message', [
    (float('nan'), 'has weights that are not finite, it is damaged'),
    (float('inf'), 'has weights that are not finite, it is damaged'),
    (1e30, 'computes numbers that are not finite'),
])
def test_weights_that_give_no_numbers_are_refused(cli, folder, tmp_path, file, value, message):
    """Weights whose outputs are not finite are refused, with and without --json.

    The outputs are not taken for a class, or for an image without objects.
    """
    checkpoint = torch.load(folder / file)
    for name, weight in checkpoint['state_dict'].items():
        if name.startswith(('neck.lateral_convs', 'neck.fpn_convs')):
            weight.view(-1)[:] = value
    torch.save(checkpoint, tmp_path / file)
    command = 'segment' if file == 'segmenter.pth' else 'detect'
    for more in ([], ['--json']):
        args = [command, folder / 'a.png', '--checkpoint', tmp_path / file, *more]
        assert f'{file} {message}' in cli(*args, fails=True)


def test_small_classes_are_counted_on_the_terminal(cli, folder, monkeypatch):
    labels = torch.zeros(100, 100, dtype=torch.int64)
    labels[0, :60], labels[1, :40], labels[2, :10] = 1, 2, 3
    monkeypatch.setattr('pvt_timm.segmentation.SemanticFpn.segment', lambda self, images: labels[None])
    args = ['segment', folder / 'a.png', '--checkpoint', folder / 'segmenter.pth']
    assert cli(*args).splitlines()[1:] == ['   98.9%  wall', '    0.6%  building', '  and 2 below 0.5%']
    shares = [x['share'] for x in json.loads(cli(*args, '--json'))['images'][0]['classes']]
    assert shares == [0.989, 0.006, 0.004, 0.001]


def test_model_takes_all_that_are_published(cli, folder, monkeypatch):
    taken = []
    monkeypatch.setattr('pvt_timm.cli.network._reach', lambda url: None)
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
    (['detect', 'a.png', '--model', 'pvt_small', '--prefix', 'student'], 'Expected --checkpoint with --prefix'),
    (['detect', 'a.png', '--prefix', 'student'], 'Expected --checkpoint with --prefix'),
    (['detect', 'a.png', '--format', 'coco', '--checkpoint', 'retinanet.pth'], 'Expected --json with --format coco'),
    (['detect', 'mask_rcnn.pth', '--checkpoint', 'mask_rcnn.pth'], 'Cannot read the image mask_rcnn.pth'),
    (['detect', 'a.png', 'sub/a.png', '--output', 'x', '--checkpoint', 'mask_rcnn.pth'], 'images of different names'),
    (['detect', 'a.png', '--output', 'a.png', '--checkpoint', 'mask_rcnn.pth'], 'or a folder for pictures'),
    (['detect', 'a.png', '--output', 'found.json', '--checkpoint', 'mask_rcnn.pth'], 'ends in .jsonl, .csv, .parquet'),
    (['detect', 'a.png', '--overwrite', '--checkpoint', 'mask_rcnn.pth'], 'Expected --output FILE'),
])
def test_wrong_input(cli, folder, monkeypatch, args, message):
    monkeypatch.chdir(folder)
    torch.save({'layer.weight': torch.ones(1)}, 'plain.pth')
    (folder / 'sub').mkdir(exist_ok=True)
    (folder / 'sub' / 'a.png').write_bytes((folder / 'a.png').read_bytes())
    assert message in cli(*args, fails=True)


@pytest.mark.parametrize('args, message', [
    (['detect', 'a.png', '--checkpoint', 'none.pth'], 'none.pth'),
    (['segment', 'a.png', '--checkpoint', 'mask_rcnn.pth'], 'Expected a Semantic FPN'),
    (['detect', 'a.png', '--model', 'pvt_large'], 'pvt_medium'),
    (['detect', 'mask_rcnn.pth', '--checkpoint', 'mask_rcnn.pth'], 'Cannot read the image'),
    (['detect', 'a.png', '--checkpoint', 'mask_rcnn.pth', '--threshold', '0'], '`draw` extra'),
    (['segment', 'a.png', '--checkpoint', 'segmenter.pth'], '`draw` extra'),
])
def test_an_error_leaves_no_folder(cli, folder, tmp_path, monkeypatch, args, message):
    """The folder for pictures is created with the first picture. Its parents are too."""
    monkeypatch.chdir(folder)
    for name in [m for m in sys.modules if m.split('.')[0] == 'matplotlib'] + ['matplotlib']:
        monkeypatch.setitem(sys.modules, name, None)
    assert message in cli(*args, '--output', tmp_path / 'a' / 'b', fails=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('args', [
    ['detect', '{photo}', '--checkpoint', 'none.pth'], ['features', '{folder}', '--checkpoint', 'none.pth'], ['demo']])
def test_a_folder_that_cannot_be_made_is_refused_first(cli, folder, tmp_path, args):
    (tmp_path / 'file').touch()
    args = [arg.format(photo=folder / 'a.png', folder=tmp_path) for arg in args]
    Image.new('RGB', (32, 32)).save(tmp_path / 'x.png')
    for output in ('file', 'file/a/b'):
        error = cli(*args, '--output', tmp_path / output, fails=True)
        assert f'{tmp_path}{os.sep}file' in error and 'none.pth' not in error
    assert sorted(file.name for file in tmp_path.iterdir()) == ['file', 'x.png']


def test_a_link_to_nothing_is_no_folder(cli, folder, tmp_path):
    symlink(tmp_path / 'link', tmp_path / 'nowhere')
    argv = ['detect', folder / 'a.png', '--checkpoint', 'none.pth', '--output', tmp_path / 'link']
    assert str(tmp_path / 'link') in cli(*argv, fails=True)
    assert not (tmp_path / 'nowhere').exists()


def test_pictures_do_not_replace_images(cli, folder, tmp_path):
    for name in ('x.png', 'x_detect.png'):
        (tmp_path / name).write_bytes((folder / 'a.png').read_bytes())
    argv = ['detect', tmp_path, '--checkpoint', folder / 'retinanet.pth', '--output', tmp_path]
    assert 'x_detect.png is read and would be replaced' in cli(*argv, fails=True)
    assert (tmp_path / 'x_detect.png').read_bytes() == (folder / 'a.png').read_bytes()


def test_names_of_pictures(cli, folder, tmp_path):
    """The name of a picture has the image's extension only if two images differ in nothing else.

    An image that is given twice has one picture.
    """
    for name in ('x.png', 'x.bmp', 'y.png'):
        Image.open(folder / 'a.png').save(tmp_path / name)
    argv = ['detect', tmp_path, tmp_path / 'y.png', '--checkpoint', folder / 'retinanet.pth']
    cli(*argv, '--output', tmp_path / 'drawn')
    assert sorted(file.name for file in (tmp_path / 'drawn').iterdir()) == [
        'x.bmp_detect.png', 'x.png_detect.png', 'y_detect.png']
