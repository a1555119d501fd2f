""" Pyramid Vision Transformer (v1) for timm. Importing this package registers the models. """
from .digits import test_pvt
from .pvt import (
    PyramidVisionTransformer,
    checkpoint_filter_fn,
    pvt_huge_v2,
    pvt_large,
    pvt_medium,
    pvt_small,
    pvt_tiny,
)
from .version import __version__

__all__ = [
    'PyramidVisionTransformer',
    '__version__',
    'checkpoint_filter_fn',
    'pvt_huge_v2',
    'pvt_large',
    'pvt_medium',
    'pvt_small',
    'pvt_tiny',
    'test_pvt',
]
