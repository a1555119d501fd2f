""" Create models with the features that only this package has.

`pvt.py` is written as a file of timm. What only this package does when a model is created is in this file, in a
function that calls `_create_pvt` of pvt.py.
"""
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

from torch import nn

from timm.models import load_pretrained
from timm.models._builder import resolve_pretrained_cfg

from . import pvt
from ._input import RECORDS_INPUT
from .formats.mapping import map_to_timm
from .sliced_mlp import SlicedMlp

__all__ = ['create_pvt']

_create_pvt = pvt._create_pvt  # kept here, because __init__.py replaces `pvt._create_pvt` by `create_pvt`

# Keys of `pretrained_cfg_overlay` that give a source of weights
_SOURCES = ('state_dict', 'file', 'url', 'hf_hub_id')


def create_pvt(variant: str, pretrained: bool = False, **kwargs: Any) -> pvt.PyramidVisionTransformer:
    """Create a model as `_create_pvt` of pvt.py does, but with the MLP of this package.

    The user's weights, from a source in `pretrained_cfg_overlay`, may have other numbers of classes and channels than
    the published weights. If their head fits the model, it is kept, otherwise it is left out with a warning. The first
    convolution is adapted to the channels of the model.

    Raises:
        ValueError: An `output_stride` other than 32 is given (segmentation_models_pytorch does so for its dilated
            decoders), or the weights are not those of a PVT v1.
    """
    if kwargs.pop('output_stride', 32) != 32:
        raise ValueError(
            'PVT has output_stride 32 only: use a decoder for feature strides 4, 8, 16, 32, such as FPN or UPerNet.')
    kwargs.setdefault('mlp_layer', SlicedMlp)
    if pretrained:
        kwargs = _with_facts_of_weights(variant, kwargs)
    return _create_pvt(variant, pretrained, **kwargs)


def _with_facts_of_weights(variant: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Return the arguments, with the numbers of classes and channels of the user's weights in the overlay.

    timm compares these numbers with those of the model after it has read the weights. They are read from the weights,
    not from a config. With a wrong number in a config, timm would replace the trained head by a new one without any
    message.
    """
    overlay = dict(kwargs.get('pretrained_cfg_overlay') or {})
    cfg: Any = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    kwargs = {'num_classes': cfg.num_classes, 'in_chans': cfg.input_size[0], **kwargs}
    in_chans = cfg.input_size[0]
    has_own_config = not isinstance(kwargs.get('pretrained_cfg') or '', str)  # of a folder, of the hub or of the user
    if has_own_config or any(overlay.get(name) for name in _SOURCES):
        num_classes, in_chans = _facts(overlay.get('state_dict') or _read(cfg.to_dict(), kwargs.get('cache_dir')))
        # For weights without a head, the number of the published weights stays. `checkpoint_filter_fn` compares it with
        # the model to find out whether a new head is wanted, or the head is missing.
        overlay['num_classes'] = num_classes or cfg.num_classes
        overlay['input_size'] = (in_chans, *cfg.input_size[1:])
        kwargs['pretrained_cfg_overlay'] = overlay
    if not RECORDS_INPUT and in_chans != 3 and kwargs['in_chans'] not in (1, 3):
        raise ValueError(f'timm < 1.0.31 replaces a first convolution of {in_chans} channels by random numbers.')
    return kwargs


class _HaveRead(Exception):
    """Raised to end timm's loading after the weights have been read."""


def _read(pretrained_cfg: Dict[str, Any], cache_dir: Optional[Union[str, Path]]) -> Mapping[str, Any]:
    """Return what timm would pass to the filter function of a model with this `pretrained_cfg`."""
    found: List[Mapping[str, Any]] = []

    def keep(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
        found.append(state_dict)
        raise _HaveRead

    try:
        load_pretrained(nn.Module(), pretrained_cfg, filter_fn=keep, cache_dir=cache_dir)
    except _HaveRead:
        pass
    if not found:
        raise ValueError('Expected weights that timm passes to a filter, the pretrained config says custom_load.')
    return found[0]


def _facts(checkpoint: Mapping[str, Any]) -> Tuple[int, int]:
    """Return the numbers of classes (0 without a head) and of image channels of a checkpoint."""
    state_dict = map_to_timm(checkpoint, quiet=True).state_dict
    head = state_dict.get('head.weight')
    return 0 if head is None else head.shape[0], state_dict['stages.0.patch_embed.proj.weight'].shape[1]
