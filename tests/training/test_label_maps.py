""" Data sets with a folder of images and a folder of label maps. """
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pvt_timm.training.images import DataError, find_images
from pvt_timm.training.label_maps import LabelMapDataset
from tests.support.systems import symlink

VALUES = np.array([[0, 1, 2, 255], [1, 1, 0, 3]], dtype=np.uint8)


@pytest.fixture
def folders(tmp_path):
    images, labels = tmp_path / 'images', tmp_path / 'labels'
    for folder in (images, labels):
        (folder / 'town').mkdir(parents=True)
    Image.new('RGB', (4, 2)).save(images / 'b.jpg')
    Image.new('L', (4, 2)).save(images / 'town' / 'a.png')
    for name in ('b.png', 'town/a.png'):
        Image.fromarray(VALUES).save(labels / name)
    return images, labels


def test_values(folders):
    dataset = LabelMapDataset(*folders, 4)
    assert len(dataset) == 2 and [file.name for file, _ in dataset.files] == ['b.jpg', 'a.png']
    image, classes = dataset[0]
    assert image.shape == (3, 2, 4) and image.dtype == torch.uint8
    assert classes.tolist() == VALUES.tolist() and classes.dtype == torch.int64
    reduced = LabelMapDataset(*folders, 3, reduce_zero_label=True)[0][1]
    assert reduced.tolist() == [[255, 0, 1, 255], [0, 0, 255, 2]]


@pytest.mark.parametrize('mode', ['P', 'I', 'I;16', 'L'])
def test_modes(folders, mode):
    values = VALUES.copy()
    values[values == 255] = 2
    map_ = Image.fromarray(values.astype({'I': np.int32, 'I;16': np.uint16}.get(mode, np.uint8)))
    if mode == 'P':
        map_ = Image.fromarray(values)
        map_.putpalette([10, 20, 30] * 256)
    (folders[1] / 'b.png').unlink()
    map_.save(folders[1] / 'b.tif')
    assert LabelMapDataset(*folders, 4)[0][1].tolist() == values.tolist()


@pytest.mark.parametrize('classes, reduce, value', [(3, False, 3), (2, True, 3), (2, False, 2)])
def test_values_beyond_the_classes_are_named(folders, classes, reduce, value):
    with pytest.raises(DataError, match=rf'for the {classes} classes .* got {value}: .*b.png'):
        LabelMapDataset(*folders, classes, reduce)[0]


@pytest.mark.parametrize('most, reduce', [(255, False), (254, True)])
def test_no_class_has_the_value_for_none(folders, most, reduce):
    """The number of classes is limited, as the value 255 of a label map means no class."""
    assert len(LabelMapDataset(*folders, most, reduce)) == 2
    with pytest.raises(ValueError, match=f'Expected at most {most} classes.* got {most + 1}'):
        LabelMapDataset(*folders, most + 1, reduce)


def test_links_are_not_followed_in_circles(folders):
    """A link to a folder that it lies in is left out. A folder may have a second name, also in label maps alone."""
    images, labels = folders
    shutil.copytree(images / 'town', images / 'night')
    symlink(labels / 'night', labels / 'town')
    symlink(images / 'town' / 'up', images)
    symlink(labels / 'town' / 'up', labels / 'town')
    found = [file.relative_to(images).as_posix() for file in find_images(images)]
    assert found == ['b.jpg', 'night/a.png', 'town/a.png']
    assert len(LabelMapDataset(images, labels, 4)) == 3


def test_wrong_files(folders):
    images, labels = folders
    Image.new('RGB', (4, 2)).save(labels / 'b.png')
    with pytest.raises(DataError, match="one channel of integers, got mode 'RGB': .*b.png"):
        LabelMapDataset(images, labels, 4)[0]
    Image.new('L', (2, 4)).save(labels / 'b.png')
    with pytest.raises(DataError, match='4x2 pixels as its image has, got 2x4: .*b.png'):
        LabelMapDataset(images, labels, 4)[0]
    (labels / 'b.png').write_bytes(b'')
    with pytest.raises(DataError, match='Cannot read the label map .*b.png'):
        LabelMapDataset(images, labels, 4)[0]
    (labels / 'b.png').unlink()
    with pytest.raises(DataError, match='a label map in .*labels for .*b.jpg, there is none for 1 of 2 files'):
        LabelMapDataset(images, labels, 4)
    Image.new('L', (4, 2)).save(labels / 'b.png')
    Image.new('L', (4, 2)).save(labels / 'c.png')
    with pytest.raises(DataError, match='an image in .*images for .*c.png'):
        LabelMapDataset(images, labels, 4)
    Image.new('L', (4, 2)).save(images / 'b.png')
    with pytest.raises(DataError, match='different names, got .*b.jpg and .*b.png'):
        LabelMapDataset(images, labels, 4)
    with pytest.raises(DataError, match='No such folder: .*none'):
        LabelMapDataset(images / 'none', labels, 4)
    (images / 'empty').mkdir()
    with pytest.raises(DataError, match='No images in .*empty'):
        LabelMapDataset(images / 'empty', labels, 4)
