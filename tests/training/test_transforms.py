""" Transforms of images in training. """
import colorsys

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from pvt_timm.training.transforms import (
    JitteredSize, PadTo, PhotometricDistortion, VariedCrop, detection_transform, segmentation_transform)


def pair(h, w, classes=None):
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.randint(256, (3, h, w), dtype=torch.uint8))
    return image, tv_tensors.Mask(torch.zeros(h, w, dtype=torch.int64) if classes is None else classes)


def test_flip_moves_image_boxes_and_masks():
    image = tv_tensors.Image(torch.arange(12, dtype=torch.uint8).reshape(1, 2, 6).repeat(3, 1, 1))
    target = dict(
        boxes=tv_tensors.BoundingBoxes(torch.tensor([[0., 0, 2, 1]]), format='XYXY', canvas_size=(2, 6)),
        labels=torch.tensor([4]), masks=tv_tensors.Mask(torch.tensor([[[1, 1, 0, 0, 0, 0], [0] * 6]])), image_id=7)
    flipped, found = detection_transform(1.0)(image, target)
    assert flipped[0].tolist() == image[0].flip(1).tolist()
    assert found['boxes'].tolist() == [[4, 0, 6, 1]] and found['masks'][0, 0].tolist() == [0, 0, 0, 0, 1, 1]
    assert found['labels'].tolist() == [4] and found['image_id'] == 7
    same, _ = detection_transform(0.0)(image, target)
    assert torch.equal(same, image)


def test_sizes_are_within_the_range_and_keep_the_ratio():
    heights = []
    for seed in range(40):
        image, classes = pair(60, 90)
        torch.manual_seed(seed)
        image, classes = JitteredSize((200, 50), (0.5, 2.0))(image, classes)
        h, w = image.shape[1:]
        assert classes.shape == (h, w) and w == pytest.approx(h * 1.5, abs=1)
        heights.append(h)
    assert min(heights) >= 25 and max(heights) <= 100 and max(heights) - min(heights) > 50
    torch.manual_seed(0)
    longest = JitteredSize((100, 90), (1.0, 1.0))(*pair(30, 60))[0]
    assert longest.shape[1:] == (50, 100)  # the longest side counts where it is reached first


def test_resizing_makes_no_new_classes():
    classes = torch.randint(2, (30, 40)) * 149
    classes[:5] = 255
    _, out = JitteredSize((100, 50), (1.0, 1.0))(*pair(30, 40, classes))
    assert set(out.unique().tolist()) == {0, 149, 255} and out.dtype == torch.int64


def test_crops_hold_several_classes():
    classes = torch.zeros(64, 64, dtype=torch.int64)
    classes[:, 48:] = 1
    classes[:8] = 255
    shares = []
    for seed in range(30):
        image, mask = pair(64, 64, classes)
        torch.manual_seed(seed)
        image, mask = VariedCrop(24, 0.75)(image, mask)
        assert image.shape == (3, 24, 24) and mask.shape == (24, 24)
        counts = mask[mask != 255].bincount(minlength=2)
        shares.append((counts.max() / counts.sum()).item())
    assert sum(share < 0.75 for share in shares) > 20  # a single attempt finds one of four
    assert VariedCrop(100, 0.75)(*pair(64, 50))[0].shape == (3, 64, 50)


def test_padding():
    image, classes = PadTo(8)(*pair(5, 6))
    assert image.shape == (3, 8, 8) and image[:, 7, 7].tolist() == [124, 116, 104]
    assert (classes[5:] == 255).all() and (classes[:, 6:] == 255).all() and (classes[:5, :6] == 0).all()
    grey = PadTo(8)(tv_tensors.Image(torch.zeros(1, 5, 6, dtype=torch.uint8)), classes)[0]
    assert grey.shape == (1, 8, 8) and grey[0, 7, 7] == 114


@pytest.mark.parametrize('seed', range(8))
def test_distortion_is_that_of_hsv(seed):
    image, classes = pair(6, 7)
    distort = PhotometricDistortion()
    torch.manual_seed(seed)
    params = distort.make_params([image])
    torch.manual_seed(seed)
    found, same = distort(image, classes)
    assert torch.equal(same, classes) and found.dtype == torch.uint8
    for i, j in np.ndindex(6, 7):
        rgb = np.clip(image[:, i, j].numpy() / 255 + params['brightness'], 0, 1)
        if params['contrast_first']:
            rgb = np.clip(rgb * params['contrast'], 0, 1)
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        rgb = np.array(colorsys.hsv_to_rgb((h + params['hue']) % 1, min(s * params['saturation'], 1), v))
        if not params['contrast_first']:
            rgb = np.clip(rgb * params['contrast'], 0, 1)
        assert np.abs(found[:, i, j].numpy() - rgb * 255).max() < 1


def test_distortion_takes_its_ranges_and_sometimes_nothing():
    values = {name: [] for name in ('brightness', 'contrast', 'saturation', 'hue')}
    for seed in range(400):
        torch.manual_seed(seed)
        params = PhotometricDistortion().make_params([])
        for name, seen in values.items():
            seen.append(params[name])
    ranges = dict(
        brightness=(-32 / 255, 32 / 255, 0), contrast=(.5, 1.5, 1), saturation=(.5, 1.5, 1), hue=(-.1, .1, 0))
    for name, (low, high, default) in ranges.items():
        seen = np.array(values[name])
        assert low <= seen.min() < low + 0.1 * (high - low) and high - 0.1 * (high - low) < seen.max() <= high
        assert 0.4 < (seen == default).mean() < 0.6


def test_all_together_gives_squares():
    transform = segmentation_transform((256, 64), (0.5, 2.0), 64)
    for seed, size in enumerate([(20, 200), (64, 64), (300, 40)]):
        image, classes = pair(*size)
        torch.manual_seed(seed)
        image, classes = transform(image, classes)
        assert image.shape == (3, 64, 64) and classes.shape == (64, 64) and image.dtype == torch.uint8
