""" Pyramid Vision Transformer (v1) for timm. Importing this package registers the models. """
from . import pvt
from .creation import create_pvt
from .digits import test_pvt
from .fused import FusedStage, fuse
from .pvt import (
    PyramidVisionTransformer,
    PyramidVisionTransformerStage,
    checkpoint_filter_fn,
    pvt_huge_v2,
    pvt_large,
    pvt_medium,
    pvt_small,
    pvt_tiny,
)
from .simplified import simplify
from .version import __version__
from .weights import create_from_checkpoint

__all__ = [
    'PyramidVisionTransformer',
    '__version__',
    'checkpoint_filter_fn',
    'create_from_checkpoint',
    'fuse',
    'pvt_huge_v2',
    'pvt_large',
    'pvt_medium',
    'pvt_small',
    'pvt_tiny',
    'simplify',
    'test_pvt',
]

# The entrypoints of pvt.py create models as this package does
pvt._create_pvt = create_pvt

# timm's `reparameterize_model` and the `--reparam` of its scripts call `fuse` of the modules inside a model
PyramidVisionTransformerStage.fuse = lambda self: FusedStage.from_stage(self)  # type: ignore[attr-defined]
