""" Annotations in COCO's format: what is read, what is left out, and what is refused with its file and id. """
import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

coco_mask = pytest.importorskip('pycocotools.mask')

from pvt_timm.training.coco import CocoAnnotations, CocoDataset, decode_mask  # noqa: E402
from pvt_timm.training.images import DataError  # noqa: E402
from pvt_timm.training.metrics import coco_figures  # noqa: E402

SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]


def content():
    """Return annotations of four images: one without objects, one 20 pixels high. Ids are not in order."""
    def annotation(id, image, category, box, **more):
        x, y, w, h = box
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        return dict(dict(id=id, image_id=image, category_id=category, bbox=box, area=w * h, iscrowd=0,
                         segmentation=[polygon]), **more)
    return dict(
        images=[dict(id=i, file_name=f'{i}.png', height=h, width=w)
                for i, h, w in ((70, 40, 50), (3, 40, 50), (8, 40, 50), (9, 20, 50))],
        categories=[dict(id=90, name='zebra'), dict(id=4, name='ant')],
        annotations=[
            annotation(11, 70, 90, [10, 10, 20, 20]), annotation(12, 70, 4, [30.5, 5, 40, 10.25]),
            annotation(13, 70, 4, [0, 0, 30, 30], iscrowd=1, segmentation=dict(size=[40, 50], counts=[0, 900, 1100])),
            annotation(14, 3, 90, [-5, 2, 15, 10]), annotation(15, 3, 4, [5, 5, 0, 10]),
            annotation(16, 3, 4, [60, 5, 10, 10]), annotation(17, 3, 4, [5, 5, 0.5, 10]),
            annotation(18, 9, 4, [5, 5, 10, 10])])


@pytest.fixture
def write(tmp_path):
    """Return a function that writes annotations and their images."""
    def write(data):
        for image in data['images']:
            Image.new('RGB', (image['width'], image['height'])).save(tmp_path / image['file_name'])
        file = tmp_path / 'annotations.json'
        file.write_text(json.dumps(data))
        return file
    return write


def test_objects_and_what_is_left_out(write, tmp_path):
    annotations = CocoAnnotations(write(content()), tmp_path, masks=True)
    assert annotations.categories == {4: 'ant', 90: 'zebra'}
    train = CocoDataset(annotations, {4: 1, 90: 2}, masks=True, training=True)
    assert [annotations.images[i].id for i in train.indices] == [70, 3]
    assert train.left_out == ('1 images without objects, 1 images with a side below 32 pixels, 1 crowds, '
                              '3 boxes or masks below one pixel or outside of their image')
    image, target = train[0]
    assert image.shape == (3, 40, 50) and image.dtype == torch.uint8
    assert target['boxes'].tolist() == [[10, 10, 30, 30], [30.5, 5, 50, 15.25]]  # inside of the image
    assert target['labels'].tolist() == [2, 1] and target['image_id'] == 70
    assert target['masks'].shape == (2, 40, 50) and target['masks'].dtype == torch.uint8
    assert target['masks'][0].nonzero().aminmax(dim=0).min.tolist() == [10, 10]
    assert target['masks'].flatten(1).sum(1).tolist()[0] == 400
    assert train[1][1]['boxes'].tolist() == [[0, 2, 10, 12]]
    everything = CocoDataset(annotations, {4: 0, 90: 1})
    assert len(everything) == 4 and len(everything[2][1]['boxes']) == 0  # all images are evaluated on
    kept = CocoDataset(annotations, {4: 0, 90: 1}, masks=True, training=True, keep_empty=True)
    assert [annotations.images[i].id for i in kept.indices] == [70, 3, 8]
    assert kept[2][1]['boxes'].shape == (0, 4) and kept[2][1]['masks'].shape == (0, 40, 50)


def test_masks_without_a_pixel_are_left_out(write, tmp_path):
    """Objects without a pixel in their mask are left out.

    Such polygons are points, lines, outside of the image, or between the centres of pixels. An object of several
    polygons needs only one with pixels.
    """
    data = content()
    data['images'] = data['images'][:1]
    polygons = [
        [[12, 12] * 4], [[5, 5, 30, 5, 30, 5]], [[60, 5, 80, 5, 80, 20]], [[10.1, 10.1, 10.2, 10.1, 10.2, 10.2]],
        [[60, 5, 80, 5, 80, 20], SQUARE]]
    data['annotations'] = [
        dict(id=i, image_id=70, category_id=4, bbox=[10, 10, 20, 20], area=400, segmentation=polygon)
        for i, polygon in enumerate(polygons)]
    data['annotations'].append(dict(data['annotations'][0], id=9, segmentation=dict(size=[40, 50], counts=[2000])))
    annotations = CocoAnnotations(write(data), tmp_path, masks=True)
    train = CocoDataset(annotations, {4: 1, 90: 2}, masks=True, training=True)
    assert train.left_out == '3 boxes or masks below one pixel or outside of their image'
    _, target = train[0]
    assert target['labels'].tolist() == [1] and target['boxes'].tolist() == [[10, 10, 30, 30]]
    assert target['masks'].shape == (1, 40, 50) and target['masks'].sum() == 400
    assert type(target['boxes']).__name__ == 'BoundingBoxes' and type(target['masks']).__name__ == 'Mask'
    boxes = CocoDataset(annotations, {4: 0, 90: 1}, training=True)  # a detector without masks takes their boxes
    assert boxes.left_out == '' and len(boxes[0][1]['boxes']) == 6


def test_nothing_to_train_on(write, tmp_path):
    data = content()
    data['annotations'] = data['annotations'][-1:]
    annotations = CocoAnnotations(write(data), tmp_path)
    with pytest.raises(DataError, match='Nothing to train on .3 images without objects'):
        CocoDataset(annotations, {4: 0, 90: 1}, training=True)
    assert len(CocoDataset(annotations, {4: 0, 90: 1}, training=True, keep_empty=True)) == 3


def test_masks_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    mask = (rng.random((23, 31)) < 0.4).astype(np.uint8)
    encoded = coco_mask.encode(np.asfortranarray(mask))
    compressed = dict(size=[23, 31], counts=encoded['counts'].decode())
    values = np.concatenate([[2], mask.T.flatten()])  # column by column
    starts = np.flatnonzero(np.diff(values))
    plain = dict(size=[23, 31], counts=[0] * int(mask[0, 0]) + np.diff([*starts, mask.size]).tolist())
    for segmentation in (compressed, plain):
        assert (decode_mask(segmentation, 23, 31) == mask).all()
    polygons = [[2., 3, 20, 4, 15, 20], [25, 1, 30, 1, 30, 9.5, 24, 8]]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 23, 31)))
    assert (decode_mask(polygons, 23, 31) == expected).all() and expected.sum() > 50


def change(**values):
    """Return a function that changes values of the first annotation."""
    return lambda data: data['annotations'][0].update(values)


def drop(key):
    return lambda data: data['annotations'][0].pop(key)


@pytest.mark.parametrize('damage, message', [
    (lambda d: d['images'][1].update(id=70), 'image id 70 is there twice'),
    (lambda d: d['images'][1].update(id='a'), "'id' of image number 1"),
    (lambda d: d['images'][1].pop('file_name'), "'file_name' of image 3"),
    (lambda d: d['images'][1].update(file_name='none.png'), 'No such image: .*none.png .image 3 of'),
    (lambda d: d['images'][1].update(height=0), "'height' and 'width' of image 3"),
    (lambda d: d.update(images=[]), 'annotation|Annotation 11 is for image 70|at least one image'),
    (lambda d: d['categories'][1].update(id=90), 'category id 90 is there twice'),
    (lambda d: d['categories'][1].update(name='zebra'), "category name 'zebra' is there twice"),
    (lambda d: d.update(categories=[]), 'at least one category'),
    (lambda d: d.pop('categories'), "a list under 'categories'"),
    (lambda d: d['annotations'][1].update(id=11), 'annotation id 11 is there twice'),
    (drop('id'), "'id' of annotation number 0"),
    (change(image_id=5), 'Annotation 11 is for image 5'),
    (change(image_id=[]), 'Annotation 11 is for image'),
    (change(category_id=[]), "'category_id' of annotation 11"),
    (change(category_id=5), "'category_id' of annotation 11 .image 70., got 5"),
    (change(bbox=[1, 2, 3]), "'bbox' of annotation 11"),
    (change(bbox=[1, 2, 3, float('nan')]), "'bbox' of annotation 11"),
    (change(bbox=[1, 2, 3, '4']), "'bbox' of annotation 11"),
    (change(iscrowd=2), "'iscrowd' of annotation 11"),
    (change(area='large'), "'area' of annotation 11"),
    (drop('segmentation'), "'segmentation' of annotation 11"),
    (change(segmentation=[]), "'segmentation' of annotation 11"),
    (change(segmentation=[[1, 2, 3, 4]]), "one of 4 numbers, as 'segmentation' of annotation 11"),
    (change(segmentation=[SQUARE[:-1]]), "one of 7 numbers, as 'segmentation' of annotation 11"),
    (change(segmentation=[[*SQUARE[:-1], None]]), "Expected polygons"),
    (change(segmentation=[[*SQUARE[:-1], 1e12]]), 'polygons near their image of 50x40, got one with 1e.12, as .*11'),
    (change(segmentation=[[*SQUARE[:-1], -501]]), 'polygons near their image of 50x40, got one with 501, as .*11'),
    (change(segmentation=dict(size=[50, 40], counts=[2000])), r'height and width \[40, 50\], got \[50, 40\]'),
    (change(segmentation=dict(size=[40, 50], counts=[1999])), 'add up to the 2000 pixels'),
    (change(segmentation=dict(size=[40, 50], counts=[-1, 2001])), 'add up to the 2000 pixels'),
])
def test_what_is_wrong_is_named(write, tmp_path, damage, message):
    data = content()
    damage(data)
    good = content()
    file = write(good)
    file.write_text(json.dumps(data))
    with pytest.raises(DataError, match=message) as e:
        CocoAnnotations(file, tmp_path, masks=True)
    assert str(file) in str(e.value)


@pytest.mark.parametrize('counts', ['abc', 'PPYo0', 'o' * 40, '\x00\x01'])
def test_damaged_run_lengths_are_named(write, tmp_path, counts):
    """Damaged run lengths are refused. pycocotools would write past the end of the mask for some of them."""
    data = content()
    data['annotations'][0]['segmentation'] = dict(size=[40, 50], counts=counts)
    dataset = CocoDataset(CocoAnnotations(write(data), tmp_path, masks=True), {4: 1, 90: 2}, masks=True, training=True)
    with pytest.raises(DataError, match='mask of annotation 11 .image 70.'):
        dataset[0]


def test_encodings(write, tmp_path):
    data = content()
    data['categories'][0]['name'] = 'zèbre'
    file = write(data)
    text = json.dumps(data, ensure_ascii=False)
    for encoding in ('utf-8', 'utf-8-sig', 'utf-16', 'utf-32'):
        file.write_bytes(text.encode(encoding))
        assert CocoAnnotations(file, tmp_path).categories[90] == 'zèbre'
    for broken in (text.encode('latin-1'), text.encode()[:-40], b'', b'[' * 100_000):
        file.write_bytes(broken)
        with pytest.raises(DataError, match='Cannot read the annotations in .*annotations.json'):
            CocoAnnotations(file, tmp_path)
    with pytest.raises(DataError, match='No such annotation file: .*none.json'):
        CocoAnnotations(tmp_path / 'none.json', tmp_path)


def test_images_that_are_not_as_said(write, tmp_path):
    annotations = CocoAnnotations(write(content()), tmp_path)
    dataset = CocoDataset(annotations, {4: 0, 90: 1})
    Image.new('RGB', (40, 50)).save(tmp_path / '70.png')
    with pytest.raises(DataError, match='Expected 50x40 pixels .* image 70, got 40x50: .*70.png'):
        dataset[0]
    (tmp_path / '70.png').write_bytes(b'no image')
    with pytest.raises(DataError, match='Cannot read the image .*70.png'):
        dataset[0]
    Image.new('I;16', (50, 40)).save(tmp_path / '70.png')
    assert dataset[0][0].shape == (3, 40, 50)
    assert CocoDataset(annotations, {4: 0, 90: 1}, channels=1)[0][0].shape == (1, 40, 50)


def test_errors_of_a_loader_are_one_line(write, tmp_path):
    """An error of a loader process is one line, without the traceback of this process."""
    annotations = CocoAnnotations(write(content()), tmp_path)
    (tmp_path / '70.png').write_bytes(b'no image')
    loader = torch.utils.data.DataLoader(CocoDataset(annotations, {4: 0, 90: 1}), None, num_workers=1)
    with pytest.raises(DataError) as e:
        list(loader)
    assert str(e.value).startswith('Cannot read the image') and 'Traceback' not in str(e.value)


def test_truth_counts_annotations_from_1_and_adds_areas(write, tmp_path):
    """Annotations get ids from 1, and areas if these are missing.

    pycocotools reads the id 0 as no match, and fails without 'area'.
    """
    data = content()
    data['annotations'] = [copy.deepcopy(data['annotations'][i]) for i in (0, 1, 3)]
    for number, annotation in enumerate(data['annotations']):
        annotation['id'] = number
        del annotation['area'], annotation['iscrowd']
    truth = CocoAnnotations(write(data), tmp_path).truth()
    assert [a['area'] for a in truth['annotations']] == [400, pytest.approx(410, abs=250), pytest.approx(100, abs=60)]
    rows = [dict(image_id=a['image_id'], category_id=a['category_id'], bbox=a['bbox'], score=0.9)
            for a in truth['annotations']]
    assert coco_figures(truth, rows, 'bbox')['AP'] == pytest.approx(1)
