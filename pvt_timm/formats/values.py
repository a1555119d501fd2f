""" Read values from configs and training settings, which may hold anything.

Each function returns the value in the expected type, or None if it is something else.
"""
import math
from typing import Any, List, Mapping, Optional, Tuple

from .format import Said
from .names import shown

__all__ = [
    'class_names', 'image_size', 'number', 'numbers', 'problem_type', 'read_preprocessing', 'shown', 'text', 'truth',
    'whole_number', 'whole_numbers']

MAX_CHANNELS = 16
MAX_SIDE = 2 ** 16
MAX_NAME = 1000  # characters of the name of a class
PROBLEM_TYPES = ('single_label_classification', 'multi_label_classification', 'regression')
MIN_CROP_PCT = 0.1  # with less, images are enlarged until they fill the memory
# timm's interpolations for evaluation. It also has 'random', for training only.
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
CROP_MODES = ('center', 'squash', 'border')


def number(value: Any, low: float = -math.inf, high: float = math.inf) -> Optional[float]:
    """Return a finite number from `low` to `high`."""
    if isinstance(value, bool):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) and low <= found <= high else None


def numbers(value: Any, low: float = -math.inf, high: float = math.inf) -> Optional[Tuple[float, ...]]:
    """Return one number or several, at most `MAX_CHANNELS`, each from `low` to `high`, as a tuple."""
    values = list(value) if hasattr(value, '__len__') and not isinstance(value, (str, bytes, Mapping)) else [value]
    found = [number(x, low, high) for x in values[:MAX_CHANNELS + 1]]
    if not found or len(found) > MAX_CHANNELS:
        return None
    plain = tuple(x for x in found if x is not None)
    return plain if len(plain) == len(found) else None


def whole_number(value: Any, low: int = 1) -> Optional[int]:
    """Return a whole number from `low` up."""
    found = number(value, low=low, high=MAX_SIDE)
    return int(found) if found is not None and found == int(found) else None


def whole_numbers(value: Any) -> Optional[Tuple[int, ...]]:
    """Return one or several whole numbers from 1 up, as a tuple."""
    found = numbers(value, low=1, high=MAX_SIDE)
    return tuple(int(x) for x in found) if found and all(x == int(x) for x in found) else None


def truth(value: Any) -> Optional[bool]:
    return value if isinstance(value, bool) else None


def text(value: Any) -> Optional[str]:
    return value if isinstance(value, str) else None


def image_size(value: Any) -> Optional[Tuple[int, int]]:
    """Return height and width. One number is the side of a square. Three numbers are channels, height and width."""
    found = numbers(value, low=1, high=MAX_SIDE)
    if found is None or len(found) > 3 or any(x != int(x) for x in found):
        return None
    height, width = found[-2:] if len(found) > 1 else found * 2
    return int(height), int(width)


def class_names(value: Any) -> Optional[List[str]]:
    """Return the names of classes from a list of texts or numbers."""
    if not isinstance(value, (list, tuple)) or not value:
        return None
    if not all(isinstance(name, (str, int, float)) and len(str(name)) <= MAX_NAME for name in value):
        return None
    return [str(name) for name in value]


def problem_type(value: Any) -> Optional[str]:
    """Return a problem type if it is one of transformers'."""
    return value if value in PROBLEM_TYPES else None


def read_preprocessing(said: Said, config: Mapping[Any, Any]) -> None:
    """Copy what a config with timm's keys says about images into `said`. Invalid values are left out and noted."""
    readers = dict(
        mean=lambda x: numbers(x, low=0),
        std=lambda x: numbers(x, low=1e-9),
        crop_pct=lambda x: number(x, low=MIN_CROP_PCT, high=1),
        crop_mode=lambda x: x if x in CROP_MODES else None,
        interpolation=lambda x: x if x in INTERPOLATIONS else None,
    )
    for name, read in readers.items():
        value = config.get(name)
        if value is None or isinstance(value, str) and value == '':
            continue
        found = read(value) if not isinstance(value, Mapping) else None
        if found is None:
            said.notes.append(f'left out the {name} that {said.where} says: {shown(value)}')
        else:
            setattr(said, name, found)
