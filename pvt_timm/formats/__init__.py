""" The formats of PVT v1 checkpoints, a file each, and what they have in common.

A file says all that the package knows about its format: how it is recognised, its names, what its configs say, what it
has no place for, what it writes, its own model for comparisons, and how it is loaded.
"""
from importlib import import_module
from typing import Dict

from .format import Format

__all__ = ['FORMATS']

# The files of the formats, in the order in which they are asked
FILES = (
    'timm',
    'original',
    'transformers',
    'openmmlab',
)

# Every format by its name
FORMATS: Dict[str, Format] = {
    fmt.name: fmt for file in FILES for fmt in import_module(f'{__name__}.{file}').FORMATS}
