""" The formats of PVT v1 checkpoints: one file per format, and the files that all formats share.

The file of a format holds all that the package knows about it: how to recognise it, the names of its parameters, how
to read its configs, what it cannot store, how to write it, how to build the model of its own library (to compare
outputs with), and how users load it.
"""
from importlib import import_module
from typing import Dict

from .format import Format

__all__ = ['FORMATS']

# The files of the formats, in the order in which they are tried
FILES = (
    'timm',
    'original',
    'transformers',
    'openmmlab',
)

# Every format by its name
FORMATS: Dict[str, Format] = {
    fmt.name: fmt for file in FILES for fmt in import_module(f'{__name__}.{file}').FORMATS}
