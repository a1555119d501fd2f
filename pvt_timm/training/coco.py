""" Read annotations in COCO's format, check them, and make a data set of them.

The checks find errors that would make training wrong without any message. As in the published settings, some objects
are left out: boxes (and masks) below one pixel or outside of their image, and crowds, which are annotations of many
objects as one. Objects that are left out are counted.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, NoReturn, Optional, Sequence, Tuple

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from .images import DataError, read_image

__all__ = ['CocoAnnotations', 'CocoDataset', 'CocoImage', 'decode_mask']

MIN_SIDE = 32  # images whose shorter side is below this are not used in training, as published
FURTHEST = 10  # largest coordinate of a polygon, as a multiple of the longer side of its image


@dataclass(frozen=True)
class CocoImage:
    """An image in an annotation file."""
    id: int
    file: Path
    height: int
    width: int


class PackedList:
    """A list of plain values, stored in one array.

    Forked loader processes share this array. A list of objects would be copied into each of them little by little,
    because Python writes reference counts into objects that it reads.
    """

    def __init__(self, values: Sequence[Any]):
        texts = [json.dumps(value).encode() for value in values]
        self.ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        self.bytes = np.frombuffer(b''.join(texts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Any:
        start = self.ends[index - 1] if index else 0
        return json.loads(self.bytes[start:self.ends[index]].tobytes())


class CocoAnnotations:
    """The content of an annotation file, checked.

    Attributes:
        file: The annotation file.
        categories: Names of the categories by their ids, in the order of the ids.
        images: The images, in the order of the file.
        objects: The annotations of every image, unchanged.
    """

    def __init__(self, file: Path, folder: Path, masks: bool = False):
        """
        Args:
            file: The annotation file.
            folder: Folder of the images.
            masks: Whether masks are required and checked.

        Raises:
            DataError: Something in the file is wrong. The message names the file and the id.
        """
        self.file = file
        content = self._read()
        self.categories = self._read_categories(content['categories'])
        self.images = self._read_images(content['images'], folder)
        index_of = {image.id: index for index, image in enumerate(self.images)}
        objects: List[List[Dict[str, Any]]] = [[] for _ in self.images]
        seen = set()
        for number, annotation in enumerate(content['annotations']):
            if not isinstance(annotation, dict) or not _is_id(annotation.get('id')):
                self._fail(f"Expected an integer as 'id' of annotation number {number}")
            if annotation['id'] in seen:
                self._fail(f'The annotation id {annotation["id"]} is there twice')
            seen.add(annotation['id'])
            image_id: Any = annotation.get('image_id')
            index = index_of.get(image_id) if _is_id(image_id) else None
            if index is None:
                self._fail(f'Annotation {annotation["id"]} is for image {image_id!r}, which is not '
                           'among the images')
            self._check(annotation, self.images[index], masks)
            objects[index].append(annotation)
        self.objects = PackedList(objects)

    def _fail(self, message: str) -> NoReturn:
        raise DataError(f'{message}: {self.file}')

    def _read(self) -> Dict[str, List[Any]]:
        try:
            content = json.loads(self.file.read_bytes())  # bytes, as UTF-8, 16 and 32 are recognised then
        except FileNotFoundError:
            raise DataError(f'No such annotation file: {self.file}') from None
        except (OSError, ValueError, RecursionError) as e:
            raise DataError(f'Cannot read the annotations in {self.file}: {e}') from e
        for key in ('images', 'annotations', 'categories'):
            if not isinstance(content, dict) or not isinstance(content.get(key), list):
                self._fail(f"Expected a list under '{key}' (the format of COCO's instances_*.json)")
        return content

    def _read_categories(self, entries: List[Any]) -> Dict[int, str]:
        names: Dict[int, str] = {}
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict) or not _is_id(entry.get('id')) or not isinstance(entry.get('name'), str):
                self._fail(f"Expected an integer as 'id' and a text as 'name' of category number {number}")
            if entry['id'] in names:
                self._fail(f'The category id {entry["id"]} is there twice')
            if entry['name'] in names.values():
                self._fail(f'The category name {entry["name"]!r} is there twice')
            names[entry['id']] = entry['name']
        if not names:
            self._fail('Expected at least one category')
        return dict(sorted(names.items()))

    def _read_images(self, entries: List[Any], folder: Path) -> List[CocoImage]:
        images, seen = [], set()
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict) or not _is_id(entry.get('id')):
                self._fail(f"Expected an integer as 'id' of image number {number}")
            if entry['id'] in seen:
                self._fail(f'The image id {entry["id"]} is there twice')
            seen.add(entry['id'])
            name: Any = entry.get('file_name')
            height: Any = entry.get('height')
            width: Any = entry.get('width')
            if not isinstance(name, str) or not name:
                self._fail(f"Expected a text as 'file_name' of image {entry['id']}")
            if not all(_is_id(side) and side > 0 for side in (height, width)):
                self._fail(f"Expected 'height' and 'width' of image {entry['id']}, got {height!r} and {width!r}")
            file = folder / name
            if not file.is_file():
                raise DataError(f'No such image: {file} (image {entry["id"]} of {self.file})')
            images.append(CocoImage(entry['id'], file, height, width))
        if not images:
            self._fail('Expected at least one image')
        return images

    def _check(self, annotation: Dict[str, Any], image: CocoImage, masks: bool) -> None:
        which = f'annotation {annotation["id"]} (image {image.id})'
        box = annotation.get('bbox')
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            self._fail(f"Expected four numbers (x, y, width, height) as 'bbox' of {which}, got {box!r}")
        category = annotation.get('category_id')
        if not _is_id(category) or category not in self.categories:
            self._fail(f"Expected one of the categories as 'category_id' of {which}, got {category!r}")
        if annotation.get('iscrowd', 0) not in (0, 1):
            self._fail(f"Expected 0 or 1 as 'iscrowd' of {which}, got {annotation['iscrowd']!r}")
        if not _is_number(annotation.get('area', 0)):
            self._fail(f"Expected a number as 'area' of {which}, got {annotation['area']!r}")
        if masks:
            wrong = _wrong_segmentation(annotation.get('segmentation'), image)
            if wrong:
                self._fail(f"{wrong} as 'segmentation' of {which}")

    def truth(self) -> Dict[str, Any]:
        """Return the annotations for an evaluation by pycocotools.

        Their ids count from 1, because pycocotools takes the id 0 for 'no match'. 'area' and 'iscrowd' are added if
        they are missing in the file.
        """
        annotations: List[Dict[str, Any]] = []
        for index, image in enumerate(self.images):
            for annotation in self.objects[index]:
                annotation = {'iscrowd': 0, **annotation, 'id': len(annotations) + 1}
                if 'area' not in annotation:
                    annotation['area'] = _area(annotation, image)
                annotations.append(annotation)
        return dict(
            info={},
            images=[dict(id=i.id, file_name=i.file.name, height=i.height, width=i.width) for i in self.images],
            annotations=annotations,
            categories=[dict(id=id, name=name) for id, name in self.categories.items()])


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _wrong_segmentation(segmentation: Any, image: CocoImage) -> Optional[str]:
    """Return the first part of an error message if a mask is wrong, otherwise None."""
    if isinstance(segmentation, list) and segmentation:
        for polygon in segmentation:
            if not isinstance(polygon, list) or not all(map(_is_number, polygon)):
                return 'Expected polygons, lists of numbers x, y, x, y, ...,'
            if len(polygon) < 6 or len(polygon) % 2:
                return f'Expected polygons of three points or more, got one of {len(polygon)} numbers,'
            furthest = max(map(abs, polygon))
            if furthest > FURTHEST * max(image.height, image.width):  # pycocotools runs out of memory, or crashes
                return f'Expected polygons near their image of {image.width}x{image.height}, got one with {furthest:g},'
        return None
    if isinstance(segmentation, dict):
        size, counts = segmentation.get('size'), segmentation.get('counts')
        if size != [image.height, image.width]:
            return f'Expected run lengths for height and width {[image.height, image.width]}, got {size!r},'
        if isinstance(counts, list):
            if not all(_is_id(count) and count >= 0 for count in counts) or sum(counts) != size[0] * size[1]:
                return f'Expected run lengths that add up to the {size[0] * size[1]} pixels of the image'
            return None
        if isinstance(counts, str):
            return None
    return f'Expected polygons or run lengths, got {str(segmentation)[:40]},'


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Return the mask (H, W) of 0 and 1, as uint8, for polygons or run lengths of an annotation file.

    Raises:
        ValueError: The run lengths do not add up to the pixels of the image.
    """
    from pycocotools import mask as coco_mask

    encoded = segmentation
    if isinstance(segmentation, list):
        encoded = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation['counts'], list):
        encoded = coco_mask.frPyObjects(segmentation, height, width)
    else:
        _check_run_lengths(segmentation['counts'], height * width)
    return coco_mask.decode(encoded)


def _check_run_lengths(text: str, pixels: int) -> None:
    """Refuse compressed run lengths that do not add up to an image. pycocotools would write beyond the image's end.

    A count is written in groups of five bits, the lowest first. A sixth bit says that more groups follow. From the
    fourth count on, the difference to the count two places before is written.
    """
    counts: List[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError('its run lengths are damaged')
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # the sign
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        value = shift = 0
    if shift or any(count < 0 for count in counts) or sum(counts) != pixels:
        raise ValueError(f'its run lengths do not add up to the {pixels} pixels of the image')


def _area(annotation: Dict[str, Any], image: CocoImage) -> float:
    segmentation = annotation.get('segmentation')
    if segmentation and not _wrong_segmentation(segmentation, image):
        return float(decode_mask(annotation['segmentation'], image.height, image.width).sum())
    return float(annotation['bbox'][2] * annotation['bbox'][3])


class CocoDataset(Dataset):
    """Images with their objects. An item is an image, uint8 (C, H, W), and a target.

    The target has 'boxes' (N, 4) as x1, y1, x2, y2, 'labels' (N,) as the detector counts them, with masks also 'masks'
    (N, H, W) of 0 and 1, and 'image_id'. Crowds and objects without a pixel are left out.

    Attributes:
        left_out: How many images and objects are not used in training, and why, as text. Empty if there are none.
    """

    def __init__(
            self, annotations: CocoAnnotations, labels: Dict[int, int], masks: bool = False, training: bool = False,
            keep_empty: bool = False, channels: int = 3):
        """
        Args:
            annotations: Images and their objects.
            labels: The label of each category id.
            masks: Whether targets have masks.
            training: Whether to leave out images without objects and images with a side below 32 pixels.
            keep_empty: Whether images without objects are kept in training.
            channels: Channels that images are read with: 3, or 1 for grey levels.

        Raises:
            DataError: Nothing is left to train on.
        """
        self.annotations, self.labels, self.masks, self.channels = annotations, labels, masks, channels
        self.indices = list(range(len(annotations.images)))
        self.left_out = ''
        if training:
            self.indices, counts = self._select(keep_empty)
            self.left_out = ', '.join(f'{count} {what}' for what, count in counts.items() if count)
            if not self.indices:
                raise DataError(f'Nothing to train on ({self.left_out}): {annotations.file}')

    def _select(self, keep_empty: bool) -> Tuple[List[int], Dict[str, int]]:
        """Return the indices of images to train on, and how many images and objects are left out, by reason."""
        kept = []
        counts = {
            'images without objects': 0, f'images with a side below {MIN_SIDE} pixels': 0, 'crowds': 0,
            'boxes or masks below one pixel or outside of their image': 0}
        empty, small, crowds, boxes = counts
        for index, image in enumerate(self.annotations.images):
            objects = self.annotations.objects[index]
            crowd = sum(1 for annotation in objects if annotation.get('iscrowd', 0))
            usable = len(_usable(objects, image, self.masks))
            counts[crowds] += crowd
            counts[boxes] += len(objects) - crowd - usable
            if min(image.height, image.width) < MIN_SIDE:
                counts[small] += 1
            elif not usable and not keep_empty:
                counts[empty] += 1
            else:
                kept.append(index)
        return kept, counts

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, Dict[str, Any]]:
        index = self.indices[index]
        image = self.annotations.images[index]
        pixels = read_image(image.file, self.channels)
        size = image.height, image.width
        if pixels.shape[1:] != size:
            raise DataError(
                f'Expected {image.width}x{image.height} pixels as {self.annotations.file} says for image {image.id}, '
                f'got {pixels.shape[2]}x{pixels.shape[1]}: {image.file}')
        objects = _usable(self.annotations.objects[index], image, self.masks)
        boxes = torch.tensor([_corners(o['bbox'], image) for o in objects], dtype=torch.float32).reshape(-1, 4)
        target: Dict[str, Any] = dict(
            boxes=tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=size),
            labels=torch.tensor([self.labels[o['category_id']] for o in objects], dtype=torch.int64),
            image_id=image.id)
        if self.masks:
            masks = np.zeros((len(objects), *size), dtype=np.uint8)
            for mask, annotation in zip(masks, objects):
                try:
                    mask[:] = decode_mask(annotation['segmentation'], *size)
                except ValueError as e:
                    raise DataError(f'Cannot read the mask of annotation {annotation["id"]} (image {image.id}), {e}: '
                                    f'{self.annotations.file}') from e
            target['masks'] = tv_tensors.Mask(torch.from_numpy(masks))
            seen = torch.from_numpy(masks.any(axis=(1, 2)))
            if not seen.all():  # thin objects that lie between the centres of pixels have none
                target['boxes'] = tv_tensors.wrap(target['boxes'][seen], like=target['boxes'])
                target['masks'] = tv_tensors.wrap(target['masks'][seen], like=target['masks'])
                target['labels'] = target['labels'][seen]
        return tv_tensors.Image(pixels), target


def _corners(box: Sequence[float], image: CocoImage) -> Tuple[float, float, float, float]:
    """Return the corners x1, y1, x2, y2 of a box (x, y, width, height), moved into its image."""
    x, y, w, h = box
    return max(x, 0), max(y, 0), min(x + w, image.width), min(y + h, image.height)


def _usable(objects: Sequence[Dict[str, Any]], image: CocoImage, masks: bool) -> List[Dict[str, Any]]:
    """Return the objects to train on.

    Left out are crowds, boxes below one pixel and boxes outside of their image. With `masks`, objects whose polygons
    are all lines or points, or outside of the image, are left out too.
    """
    usable = []
    for annotation in objects:
        if annotation.get('iscrowd', 0) or min(annotation['bbox'][2:]) < 1 or annotation.get('area', 1) <= 0:
            continue
        x1, y1, x2, y2 = _corners(annotation['bbox'], image)
        if x1 < x2 and y1 < y2 and not (masks and _is_nowhere(annotation['segmentation'], image)):
            usable.append(annotation)
    return usable


def _is_nowhere(segmentation: Any, image: CocoImage) -> bool:
    """Return whether all polygons are lines or points, or outside of their image. Run lengths are not checked here."""
    if not isinstance(segmentation, list):
        return False
    for polygon in segmentation:
        xs, ys = polygon[::2], polygon[1::2]
        width = min(max(xs), image.width) - max(min(xs), 0)
        height = min(max(ys), image.height) - max(min(ys), 0)
        if width > 0 and height > 0:
            return False
    return True
