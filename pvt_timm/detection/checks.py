""" Checks of images and targets. Without them, detectors and segmenters would give wrong results without an error. """
from typing import Any, Dict, Sequence

import torch

__all__ = ['check_image', 'check_targets']

# Images that are normalised already have values up to about 3, images from 0 to 255 have far larger ones.
_LARGEST_VALUE = 10.
# Annotations are often rounded, so a box may reach this many pixels beyond its image.
_PIXELS_OUTSIDE = 1.


def check_image(image: torch.Tensor, in_chans: int, name: str = 'the image', unit_range: bool = True) -> None:
    """Refuse a tensor that is not an image for the models.

    Args:
        image: An image (C, H, W) of floating point numbers.
        in_chans: Number of channels that the model takes.
        name: Name of the image in the message.
        unit_range: Whether its values have to be from 0 to 1.

    Raises:
        ValueError: The tensor has another type, shape or range.
    """
    shape = tuple(image.shape)
    if len(shape) != 3 or shape[0] != in_chans or 0 in shape:
        raise ValueError(f'Expected {name} to be of shape ({in_chans}, height, width), got {shape}.')
    if not image.is_floating_point():
        raise ValueError(f'Expected {name} to hold floats from 0 to 1, got {image.dtype} (divide by 255).')
    if unit_range and image.max() > _LARGEST_VALUE:
        raise ValueError(
            f'Expected {name} to hold values from 0 to 1, got values up to {image.max().item():.6g} (divide by 255).')


def check_targets(
        images: Sequence[torch.Tensor], targets: Sequence[Dict[str, torch.Tensor]], first_label: int,
        num_classes: int, masks: bool) -> None:
    """Refuse wrong targets of a detector.

    Args:
        images: Images (C, H, W).
        targets: A dict per image: 'boxes' (N, 4) as x1, y1, x2, y2 in pixels of the image, 'labels' (N,), and 'masks'
            (N, H, W) of the size of the image, of 0 and 1.
        first_label: Label of the first class.
        num_classes: Number of classes.
        masks: Whether there have to be masks. If not, masks are not checked.

    Raises:
        ValueError: A target is wrong. The message says which one, what was expected and what it has.
    """
    if len(targets) != len(images):
        raise ValueError(f'Expected one target per image ({len(images)}), got {len(targets)}.')
    for i, (image, target) in enumerate(zip(images, targets)):
        height, width = image.shape[-2:]
        for key in ('boxes', 'labels', 'masks')[:3 if masks else 2]:
            if not isinstance(target.get(key), torch.Tensor):
                raise ValueError(f"Expected a tensor '{key}' in target {i}, got {type(target.get(key)).__name__}.")
        _check_boxes(target['boxes'], f'target {i}', height, width)
        _check_labels(target['labels'], f'target {i}', len(target['boxes']), first_label, num_classes)
        if masks:
            _check_masks(target['masks'], f'target {i}', (len(target['boxes']), height, width))


def _check_boxes(boxes: torch.Tensor, where: str, height: int, width: int) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f'Expected boxes of shape (N, 4) in {where}, got {tuple(boxes.shape)}.')
    if not boxes.isfinite().all():
        raise ValueError(f'Expected boxes of numbers in {where}, got NaN or infinity.')
    _refuse(
        boxes, (boxes[:, 2:] <= boxes[:, :2]).any(dim=1),
        f'Expected boxes x1, y1, x2, y2 with x1 < x2 and y1 < y2 (not x, y, width, height) in {where}')
    limit = boxes.new_tensor([width, height]) + _PIXELS_OUTSIDE
    outside = (boxes[:, :2] < -_PIXELS_OUTSIDE) | (boxes[:, 2:] > limit)
    _refuse(
        boxes, outside.any(dim=1),
        f'Expected boxes x1, y1, x2, y2 inside of their image, {width} wide and {height} high, in {where}')


def _refuse(boxes: torch.Tensor, wrong: torch.Tensor, expected: str) -> None:
    if wrong.any():
        n = int(wrong.nonzero()[0])
        raise ValueError(f'{expected}, got {[round(x, 3) for x in boxes[n].tolist()]} as box {n}.')


def _check_labels(labels: torch.Tensor, where: str, count: int, first: int, num_classes: int) -> None:
    if labels.shape != (count,):
        raise ValueError(f'Expected one label per box ({count}) in {where}, got {list(labels.shape)}.')
    if labels.dtype != torch.int64:
        raise ValueError(f'Expected labels of type torch.int64 in {where}, got {labels.dtype}.')
    last = first + num_classes - 1
    wrong = labels[(labels < first) | (labels > last)]
    if len(wrong):
        background = ', 0 is the background' if first else ''
        raise ValueError(f'Expected labels from {first} to {last}{background}, got {int(wrong[0])} in {where}.')


def _check_masks(masks: Any, where: str, shape: Any) -> None:
    if tuple(masks.shape) != shape:
        hint = ': take masks[:, 0] >= 0.5 of what a model returned' if masks.ndim == 4 else ''
        raise ValueError(
            f'Expected masks (N, height, width) of shape {shape}, one per box and as large as the image, in {where}, '
            f'got {tuple(masks.shape)}{hint}.')
    if masks.dtype not in (torch.uint8, torch.bool):
        raise ValueError(f'Expected masks of type torch.uint8 or torch.bool in {where}, got {masks.dtype}.')
    if masks.dtype == torch.uint8 and masks.numel() and masks.max() > 1:
        raise ValueError(f'Expected masks of 0 and 1 in {where}, got {int(masks.max())}.')
