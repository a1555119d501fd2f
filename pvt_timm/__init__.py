""" Pyramid Vision Transformer (v1) for timm. Importing this package registers the models. """
from typing import Any

from torch import nn

from .digits import test_pvt
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
from .version import __version__

__all__ = [
    'PyramidVisionTransformer',
    '__version__',
    'checkpoint_filter_fn',
    'fuse',
    'pvt_huge_v2',
    'pvt_large',
    'pvt_medium',
    'pvt_small',
    'pvt_tiny',
    'test_pvt',
]


def __getattr__(name: str) -> Any:
    if name == 'fuse':  # imported when it is asked for
        from .fused import fuse
        return fuse
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def _fuse_stage(self: PyramidVisionTransformerStage) -> nn.Module:
    from .fused import FusedStage
    return FusedStage.from_stage(self)


# timm's `reparameterize_model` and the `--reparam` of its scripts call `fuse` of the modules inside a model
PyramidVisionTransformerStage.fuse = _fuse_stage  # type: ignore[attr-defined]
