""" Prepare images for the models: turn them upright and convert them to 8 bits per channel. """
import re
from typing import Any, List, Tuple, Union

from PIL import Image, ImageOps

__all__ = ['as_seen', 'natural_key']


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
