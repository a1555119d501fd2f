"""Generated images of shapes with boxes, masks and classes, for the demos of detection and segmentation.

No download: an image has one to four discs, boxes and triangles of random size, colour and place on a noisy background.
The same seed gives the same images.
"""
import json
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Tuple

import numpy as np
import torch
from PIL import Image, ImageDraw

CLASSES = ('disc', 'box', 'triangle')
COLORS = ('#e6553a', '#2f7fd3', '#2a9d5c')  # of the classes, in pictures


class Sample(NamedTuple):
    """An image with its objects.

    Attributes:
        image: (H, W, 3) uint8.
        labels: Class per object, from 0.
        masks: (N, H, W) bool, the visible part of each object.
    """
    image: np.ndarray
    labels: np.ndarray
    masks: np.ndarray

    @property
    def boxes(self) -> np.ndarray:
        """(N, 4) float32 as x1, y1, x2, y2."""
        out = []
        for mask in self.masks:
            ys, xs = np.where(mask.any(axis=1))[0], np.where(mask.any(axis=0))[0]
            out.append((xs[0], ys[0], xs[-1] + 1, ys[-1] + 1))
        return np.asarray(out, dtype=np.float32).reshape(-1, 4)

    @property
    def semantic(self) -> np.ndarray:
        """(H, W) int64, 0 for background and class + 1 elsewhere."""
        out = np.zeros(self.image.shape[:2], dtype=np.int64)
        for label, mask in zip(self.labels, self.masks):
            out[mask] = label + 1
        return out

    def tensor(self) -> torch.Tensor:
        """Return the image (3, H, W) as floats from 0 to 1."""
        return torch.from_numpy(self.image).permute(2, 0, 1).float() / 255


def _draw(label: int, centre: np.ndarray, radius: float, angle: float, aspect: float, size: Tuple[int, int]):
    mask = Image.new('1', (size[1], size[0]))
    draw = ImageDraw.Draw(mask)
    x, y = centre
    if label == 0:
        draw.ellipse([x - radius, y - radius * aspect, x + radius, y + radius * aspect], fill=1)
    else:
        corners = 4 if label == 1 else 3
        start = np.pi / 4 if label == 1 else np.pi / 2
        turn = angle if label == 2 else angle / 8
        t = start + turn + 2 * np.pi * np.arange(corners) / corners
        draw.polygon([(x + radius * np.cos(a), y + radius * aspect * np.sin(a)) for a in t], fill=1)
    return np.asarray(mask)


def make_sample(rng: np.random.Generator, size: Tuple[int, int] = (128, 128), max_objects: int = 4) -> Sample:
    """Return one random image with its objects.

    Args:
        rng: Generator of random numbers.
        size: Height and width.
        max_objects: Largest number of objects.
    """
    h, w = size
    coarse = rng.integers(40, 216, size=(4, 4, 3)).astype(np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((w, h), Image.BICUBIC)).astype(np.float32)
    labels: List[int] = []
    masks: List[np.ndarray] = []
    for _ in range(int(rng.integers(1, max_objects + 1))):
        for _ in range(10):  # attempts to find a free place
            label = int(rng.integers(len(CLASSES)))
            radius = rng.uniform(0.1, 0.24) * min(h, w)
            centre = np.array([rng.uniform(radius, w - radius), rng.uniform(radius, h - radius)])
            mask = _draw(label, centre, radius, rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1.3), size)
            if mask.sum() >= 64 and not any((mask & m).sum() > 0.1 * min(mask.sum(), m.sum()) for m in masks):
                break
        else:
            continue
        color = rng.integers(0, 256, size=3)
        while np.abs(color - image[mask].mean(axis=0)).max() < 60:
            color = rng.integers(0, 256, size=3)
        image[mask] = color
        masks = [m & ~mask for m in masks] + [mask]
        labels.append(label)
    image = np.clip(image + rng.normal(0, 8, size=image.shape), 0, 255).astype(np.uint8)
    return Sample(image, np.asarray(labels, dtype=np.int64), np.asarray(masks, dtype=bool).reshape(-1, h, w))


def generate_samples(count: int, seed: int, low: int = 128, high: int = 128) -> Iterator[Sample]:
    """Yield random images, whose sides are between `low` and `high`."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield make_sample(rng, (int(rng.integers(low, high + 1)), int(rng.integers(low, high + 1))))


def make_samples(count: int, seed: int, low: int = 128, high: int = 128) -> List[Sample]:
    """Return the images of `generate_samples` as a list."""
    return list(generate_samples(count, seed, low, high))


def coco_annotations(samples: Iterable[Sample], first_category: int = 1) -> Dict[str, Any]:
    """Return the content of an annotation file in COCO's format for samples. Image ids count from 1."""
    from pycocotools import mask as coco_mask
    images: List[Dict[str, Any]] = []
    annotations: List[Dict[str, Any]] = []
    for n, sample in enumerate(samples, start=1):
        h, w = sample.image.shape[:2]
        images.append(dict(id=n, file_name=f'{n:05d}.png', height=h, width=w))
        for label, mask, (x1, y1, x2, y2) in zip(sample.labels, sample.masks, sample.boxes.tolist()):
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(dict(
                id=len(annotations) + 1, image_id=n, category_id=int(label) + first_category, iscrowd=0,
                bbox=[x1, y1, x2 - x1, y2 - y1], area=float(mask.sum()),
                segmentation=dict(size=rle['size'], counts=rle['counts'].decode())))
    categories = [dict(id=i + first_category, name=name) for i, name in enumerate(CLASSES)]
    return dict(info={}, licenses=[], images=images, annotations=annotations, categories=categories)


def write_split(samples: Iterable[Sample], folder: Path, split: str) -> None:
    """Write samples as data sets for detectors and for segmenters. Only one sample is in memory at a time.

    The images are `split`/*.png. `split`.json has their annotations in COCO's format, and `split`_labels/*.png are
    label maps, where 0 is the background.
    """
    images, label_maps = folder / split, folder / f'{split}_labels'
    images.mkdir(parents=True, exist_ok=True)
    label_maps.mkdir(exist_ok=True)

    def written() -> Iterator[Sample]:
        for n, sample in enumerate(samples, start=1):
            Image.fromarray(sample.image).save(images / f'{n:05d}.png')
            Image.fromarray(sample.semantic.astype(np.uint8)).save(label_maps / f'{n:05d}.png')
            yield sample

    annotations = coco_annotations(written())
    (folder / f'{split}.json').write_text(json.dumps(annotations))
