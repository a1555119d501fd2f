""" Find and read the images and label maps of a data set. """
import os
from pathlib import Path
from typing import Any, List, Tuple, Union

import numpy as np
import torch
from PIL import Image

from ..images import as_seen

__all__ = ['DataError', 'find_images', 'read_image', 'read_label_map']

_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')


class DataError(ValueError):
    """Something in a data set is wrong. The message names the file, and the id if there is one."""

    def __init__(self, message: Any):
        # An error of a loader process is raised again in the main process, with its traceback before the message.
        super().__init__(str(message).rpartition('DataError: ')[2].strip())


def find_images(folder: Path) -> List[Path]:
    """Return all image files in a folder and its subfolders, sorted. Links to folders are followed, but not in circles.

    Raises:
        DataError: The folder does not exist, or has no image.
    """
    if not folder.is_dir():
        raise DataError(f'No such folder: {folder}')
    found = []
    for root, folders, names in os.walk(folder, followlinks=True):
        # Links may give a folder several names, as images and label maps are matched by name. But a link to a folder
        # that it lies in would be followed again and again.
        above = {os.path.realpath(path) for path in (Path(root), *Path(root).parents)}
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(root, name)) not in above]
        found += [Path(root, name) for name in names if name.lower().endswith(_SUFFIXES) and not name.startswith('.')]
    if not found:
        raise DataError(f'No images in {folder}')
    return sorted(found)


def read_image(file: Path, channels: int = 3) -> torch.Tensor:
    """Return an image, turned upright, as uint8 (channels, H, W): RGB, or grey levels if `channels` is 1.

    Raises:
        DataError: The image cannot be read.
    """
    try:
        with Image.open(file) as image:
            image.load()
            pixels = np.array(as_seen(image, channels))
    except Exception as e:  # for damaged files, Pillow raises errors of many types
        raise DataError(f'Cannot read the image {file}: {e}') from e
    return torch.from_numpy(pixels if channels == 3 else pixels[..., None]).permute(2, 0, 1)


def read_label_map(file: Path, size: Union[None, Tuple[int, int]] = None) -> torch.Tensor:
    """Return the values of a label map as int64 (H, W). With a palette, they are the indices into it.

    Args:
        file: An image with one channel of integers.
        size: Expected height and width. If None, any size is accepted.

    Raises:
        DataError: The label map cannot be read, has several channels, or another size.
    """
    try:
        with Image.open(file) as image:
            image.load()
            mode, values = image.mode, np.array(image)
    except Exception as e:
        raise DataError(f'Cannot read the label map {file}: {e}') from e
    if values.ndim != 2 or mode not in ('1', 'L', 'P', 'I', 'I;16', 'I;16B', 'I;16L'):
        raise DataError(f'Expected a label map with one channel of integers, got mode {mode!r}: {file}')
    if size is not None and values.shape != tuple(size):
        raise DataError(
            f'Expected a label map of {size[1]}x{size[0]} pixels as its image has, got '
            f'{values.shape[1]}x{values.shape[0]}: {file}')
    return torch.from_numpy(values.astype(np.int64))
