""" Find images in folders, and prepare them for the models: turn them upright, convert them to 8 bits per channel. """
import os
import re
from typing import Any, Iterator, List, Tuple, Union

from PIL import Image, ImageOps
from timm.data import get_img_extensions

__all__ = ['as_seen', 'has_more_than_8_bits', 'image_files', 'natural_key']

# Extensions of images that timm's list does not have
_MORE_EXTENSIONS = {'.avif', '.bmp', '.gif', '.jp2', '.pbm', '.pgm', '.ppm', '.tif', '.tiff', '.webp'}


def image_files(folder: str) -> Iterator[str]:
    """Yield the paths of all images in a folder and its subfolders, in no particular order.

    Images are recognised by their extensions. Names that start with a dot are left out. Links to folders are followed,
    but each folder is read only once: under its own name if it lies in the given folder, otherwise under the name of a
    link.

    Raises:
        OSError: A folder cannot be read.
    """
    def fail(error: OSError) -> None:  # by default os.walk skips a folder that cannot be read
        raise error

    extensions = get_img_extensions(as_set=True) | _MORE_EXTENSIONS
    seen = set()
    waiting = [folder]  # links to folders wait here until all real folders have been walked
    while waiting:
        for root, folders, files in os.walk(waiting.pop(0), onerror=fail):
            real = os.path.realpath(root)
            if real in seen:  # it was walked under another name
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith('.'))
            for name in folders:
                path = os.path.join(root, name)
                if os.path.realpath(path) != os.path.join(real, name):  # a link, which `os.walk` does not follow
                    waiting.append(path)
            for name in files:
                if os.path.splitext(name)[1].lower() in extensions and not name.startswith('.'):
                    yield os.path.join(root, name)


def has_more_than_8_bits(image: Image.Image) -> bool:
    """Return whether it is a grey image whose mode has more than 8 bits (such images in colour are read as 8 bits)."""
    return image.mode in ('I', 'F') or image.mode.startswith('I;16')


def as_seen(image: Image.Image, channels: int = 3) -> Image.Image:
    """Return an image as RGB or, with `channels` 1, as grey levels from 0 to 255. EXIF data turn it upright.

    Grey images with more than 8 bits are scaled to 0 to 255 (Pillow would cut larger values off at 255). Images of 16
    bits (modes 'I;16', and 'I' where a value is above 255) have values from 0 to 65535, those of floating point numbers
    (mode 'F') from 0 to 1.

    Raises:
        ValueError: The values of mode 'I' are not from 0 to 65535, or those of mode 'F' not from 0 to 1.
    """
    upright: Any = ImageOps.exif_transpose(image)
    if upright.mode.startswith('I;16'):
        upright = upright.point(lambda value: value / 257).convert('L')
    elif upright.mode == 'I':
        low, high = upright.getextrema()
        if low < 0 or high > 65535:
            raise ValueError(f'its values are from {low} to {high}, expected 0 to 255 or 0 to 65535')
        upright = (upright.point(lambda value: value / 257) if high > 255 else upright).convert('L')
    elif upright.mode == 'F':
        low, high = upright.getextrema()
        if not 0 <= low <= high <= 1:  # also where a value is NaN
            raise ValueError(f'its values are from {low:g} to {high:g}, expected 0 to 1')
        upright = upright.point(lambda value: value * 255 + 0.5).convert('L')
    return upright.convert('RGB' if channels == 3 else 'L')


def natural_key(name: str) -> Tuple[List[Union[str, int]], str]:
    """Return a key to sort names by: 2 comes before 10, and capital letters make no difference.

    The name itself is the last part of the key, so that two different names never tie. Only the digits 0 to 9 count as
    a number: others, such as a superscript two, are text.
    """
    parts: List[Union[str, int]] = []
    for i, part in enumerate(re.split('([0-9]+)', name.lower())):
        parts.append(int(part) if i % 2 else part)  # text and numbers alternate, text comes first
    return parts, name
