""" Describe the detectors and segmenters of this package in checkpoints, and load them from these checkpoints.

`pvt-timm detector fit` and `segmenter fit` write a description of the model under the key 'pvt_timm', beside the
weights. It holds plain values only: the arguments to build the model, its classes and the sizes of its images. Files
with only weights, as written by `torch.save(model.state_dict())`, are read too. Variant, kind, number of classes and
widths are then read from the names and shapes of the weights.
"""
import inspect
import logging
from dataclasses import dataclass
from os import PathLike
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

import torch
import torch.nn as nn

from ..files import read_checkpoint
from ..formats.architecture import check_keys, describe
from ..formats.mapping import map_to_timm
from ..formats.wrappers import unwrap
from ..pvt import PyramidVisionTransformer
from ..variants import VARIANTS, find_variant
from ..version import __version__

__all__ = [
    'KEY', 'KINDS', 'OF_CLASSES', 'describe_body', 'describe_model', 'is_color', 'is_own', 'kind_of', 'load_own',
    'open_checkpoint', 'widths_of', 'with_new_classes']

_logger = logging.getLogger(__name__)

Checkpoint = Union[str, 'PathLike[str]', Mapping[str, Any]]
Builder = Callable[..., Any]  # returns a model for the name of a PVT, a number of classes and keywords

KEY = 'pvt_timm'


@dataclass(frozen=True)
class Kind:
    """How to recognise the weights of a kind of model, and to read its number of classes from them.

    Attributes:
        name: Name for messages.
        head: A parameter that has rows for each class. Other kinds do not have it.
        rows_per_class: Number of its rows for one class.
        background: Number of its rows for the background.
    """
    name: str
    head: str
    rows_per_class: int = 1
    background: int = 0


# Attribute `kind` of a model -> how to recognise it. The first kind whose parameter `head` is in the weights is taken
KINDS = {
    'retinanet': Kind('RetinaNet', 'head.classification_head.cls_logits.weight', 9),  # 3 scales x 3 aspect ratios
    'mask_rcnn': Kind('Mask R-CNN', 'roi_heads.mask_predictor.mask_fcn_logits.weight', background=1),
    'faster_rcnn': Kind('Faster R-CNN', 'roi_heads.box_predictor.cls_score.weight', background=1),
    'semantic_fpn': Kind('Semantic FPN', 'head.classifier.weight'),
}
# Starts of the names of parameters that have rows for each class
OF_CLASSES = (
    'head.classification_head.cls_logits.', 'roi_heads.box_predictor.', 'roi_heads.mask_predictor.mask_fcn_logits.',
    'head.classifier.')
# Argument of a model -> the parameter and the dimension that have this width
_WIDTHS = {
    'out_channels': ('backbone.fpn.inner_blocks.0.0.weight', 0),
    'box_channels': ('roi_heads.box_predictor.cls_score.weight', 1),
    'mask_channels': ('roi_heads.mask_predictor.mask_fcn_logits.weight', 1),
    'channels': ('head.classifier.weight', 1),
}
_MODEL_ARGS = {
    name: parameter.default for name, parameter in inspect.signature(PyramidVisionTransformer).parameters.items()
    if name != 'num_classes'}  # with their defaults
_BODY = 'backbone.body.'
_STAGES = _BODY + 'stages_'


def open_checkpoint(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the content of a file, without executing anything in it. If content is given, it is returned as it is."""
    if isinstance(checkpoint, (str, PathLike)):
        return read_checkpoint(checkpoint)
    return checkpoint


def is_own(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint is of this package: written by `fit`, or with weights of one of its models."""
    return KEY in checkpoint or bool(_roots(unwrap(checkpoint)[0]))


# ---- the description of a model --------------------------------------------------------------------------------------

def kind_of(model: nn.Module) -> str:
    """Return the kind of a model: 'retinanet', 'faster_rcnn', 'mask_rcnn' or 'semantic_fpn'."""
    kind = getattr(model, 'kind', None)
    if kind not in KINDS:
        raise ValueError(f'Expected a detector or segmenter of this package, got {type(model).__name__}.')
    return kind


def widths_of(state_dict: Mapping[str, torch.Tensor]) -> Dict[str, int]:
    """Return the widths of pyramid and heads, as arguments of the function that builds the model."""
    return {argument: state_dict[name].shape[dim] for argument, (name, dim) in _WIDTHS.items()
            if name in state_dict and state_dict[name].ndim > dim}


def describe_body(state_dict: Mapping[str, torch.Tensor]) -> Tuple[str, Dict[str, Any]]:
    """Return name and arguments of the PVT in the state dict of a detector or segmenter."""
    info = describe(map_to_timm(state_dict).state_dict)
    variant = find_variant(info.depths, info.embed_dims)
    if variant is None:
        raise ValueError(f'Expected a PVT v1 variant, got depths {info.depths} and channels {info.embed_dims}.')
    return variant, dict(img_size=list(info.img_size), in_chans=info.in_chans)


def describe_model(model: nn.Module, head_args: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
    """Return a description of a model in plain values, from which `load_own` can build the model.

    Args:
        model: A detector or segmenter of this package.
        head_args: Arguments of the model's class that cannot be read from its weights.

    Returns:
        The value for the key 'pvt_timm' of a checkpoint.

    Raises:
        ValueError: The PVT was created with arguments that are not plain values.
    """
    any_model: Any = model
    state_dict = model.state_dict()
    variant, seen = describe_body(state_dict)
    kept = _unusual_args(variant, any_model.backbone.model_args)
    sizes = any_model.transform if hasattr(any_model, 'transform') else any_model
    shorter = sizes.min_size
    norms = [m for name, m in any_model.backbone.body.named_modules() if name.endswith('patch_embed.norm')]
    seen['embed_norm_eps'] = norms[0].eps
    described = dict(
        version=__version__, kind=kind_of(model), model=variant, model_args={**kept, **seen},
        num_classes=any_model.num_classes, categories=list(any_model.categories),
        palette=[list(color) for color in getattr(any_model, 'palette', [])],
        head_args={**(head_args or {}), **widths_of(state_dict)},
        min_size=list(shorter) if isinstance(shorter, (list, tuple)) else shorter, max_size=sizes.max_size)
    described['mean'] = list(sizes.image_mean if hasattr(sizes, 'image_mean') else sizes.mean)
    described['std'] = list(sizes.image_std if hasattr(sizes, 'image_std') else sizes.std)
    return described


def _unusual_args(variant: str, model_args: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the arguments of a PVT that differ from the variant's, without dropout rates (only for training)."""
    usual = {**_MODEL_ARGS, **VARIANTS[variant]}
    found = {}
    for name, value in model_args.items():
        if name not in usual or name.endswith('_rate'):
            continue
        value = _plain(name, value)
        if value != _plain(name, usual[name]):
            found[name] = value
    return found


def _plain(name: str, value: Any) -> Any:
    """Return an argument of a model as a plain value for a file. Tuples become lists."""
    if isinstance(value, (list, tuple)):
        return [_plain(name, one) for one in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f'Expected a plain value for {name} in model_args, which a checkpoint can hold, got {value!r}.')


def _described_by(weights: Mapping[str, torch.Tensor]) -> Dict[str, Any]:
    """Return the description of a model as far as it can be read from its weights."""
    for kind, about in KINDS.items():
        if about.head in weights and weights[about.head].ndim:
            variant, model_args = describe_body(weights)
            rows = weights[about.head].shape[0]
            return dict(
                kind=kind, model=variant, model_args=model_args, head_args=widths_of(weights),
                num_classes=rows // about.rows_per_class - about.background)
    raise ValueError('Expected a RetinaNet, Faster R-CNN, Mask R-CNN or Semantic FPN, its head is none of these.')


def _check_described(said: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse a description that is wrong or does not fit the weights, before a model is built."""
    if not isinstance(said, Mapping) or not all(isinstance(said.get(name), str) for name in ('kind', 'model')) or (
            said['kind'] not in KINDS or said['model'] not in VARIANTS):
        raise ValueError(f"Expected a known kind and model under '{KEY}' in the checkpoint.")
    for name in ('model_args', 'head_args'):
        if not isinstance(said.get(name, {}), Mapping):
            raise ValueError(f"Expected a dict for {name} under '{KEY}' in the checkpoint.")
    unknown = [name for name in said.get('model_args', {}) if name not in _MODEL_ARGS]
    if unknown:
        raise ValueError(f'Expected arguments of a PVT in the checkpoint, got {", ".join(map(str, unknown))}.')
    about = KINDS[said['kind']]
    rows = weights[about.head].shape[0] if about.head in weights and weights[about.head].ndim else 0
    count = said.get('num_classes')
    if type(count) is not int or (count + about.background) * about.rows_per_class != rows:
        raise ValueError(f'Expected as many classes as {about.head} is for, which has {rows} rows.')
    for argument, width in widths_of(weights).items():
        if said.get('head_args', {}).get(argument, width) != width:
            raise ValueError(f'Expected {argument} {width}, which the weights have.')
    categories, palette = said.get('categories', ()), said.get('palette', ())
    if not isinstance(categories, (list, tuple)) or len(categories) not in (0, count):
        raise ValueError(f'Expected {count} names of classes or none, got {_len_of(categories)}.')
    if not isinstance(palette, (list, tuple)) or len(palette) not in (0, count) or not all(map(is_color, palette)):
        raise ValueError(f'Expected {count} colours (red, green and blue from 0 to 255) as palette, or none.')


def _len_of(value: Any) -> Any:
    return len(value) if isinstance(value, (list, tuple)) else type(value).__name__


def is_color(value: Any) -> bool:
    """Return whether a value from a checkpoint is a colour: red, green and blue from 0 to 255."""
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return False
    return all(isinstance(x, int) and 0 <= x <= 255 for x in value)


# ---- the model -------------------------------------------------------------------------------------------------------

def load_own(
        checkpoint: Checkpoint, builders: Mapping[str, Builder], prefix: Optional[str] = None,
        num_classes: Optional[int] = None, model_args: Optional[Mapping[str, Any]] = None, **kwargs: Any) -> Any:
    """Return the detector or segmenter in a checkpoint of this package.

    Args:
        checkpoint: A file (nothing in it is executed), or its content.
        builders: The function that builds a model of each kind, such as 'retinanet'. Other kinds are refused.
        prefix: The part before the names of the model, or of its backbone. It is needed if there are several.
        num_classes: Number of classes. If it differs from the checkpoint, the layers that depend on it are new.
        model_args: Arguments of the PVT that replace those in the checkpoint, such as `dict(drop_path_rate=0.1)`.
        kwargs: Arguments for the builder that replace those in the checkpoint, such as `min_size`.

    Returns:
        The model in evaluation mode. `categories` has the names of its classes, if the checkpoint has them and
        `num_classes` does not change their number.

    Raises:
        ValueError: It is not such a checkpoint. The message says what is wrong.
        TypeError: A keyword is not known.
    """
    checkpoint = open_checkpoint(checkpoint)
    weights = _weights(checkpoint, prefix)
    said = checkpoint.get(KEY)
    if said is None:
        said = _described_by(weights)
    _check_described(said, weights)
    name = KINDS[said['kind']].name
    if said['kind'] not in builders:
        raise ValueError(f'Expected a {" or ".join(KINDS[kind].name for kind in builders)}, got a {name}.')
    build = builders[said['kind']]
    classes = said['num_classes']
    model = _build(build, said, classes, model_args, kwargs)
    check_keys(weights, model.state_dict())
    model.load_state_dict(weights)
    if num_classes not in (None, classes):
        fresh = _build(build, said, num_classes, model_args, kwargs)
        return with_new_classes(fresh, model.state_dict(), f'{name} for {classes} classes').eval()
    model.categories = [str(category) for category in said.get('categories', ())]
    if hasattr(model, 'palette'):
        model.palette = [tuple(int(x) for x in color) for color in said.get('palette', ())]
    return model.eval()


def with_new_classes(model: Any, state_dict: Mapping[str, torch.Tensor], name: str) -> Any:
    """Load the weights of a model with another number of classes into `model`, and return it.

    Weights that depend on the number of classes are not loaded. A warning names them.

    Args:
        model: A new model.
        state_dict: Weights of the other model.
        name: Name of the other model, for the warning.
    """
    own = model.state_dict()
    kept = {k: v for k, v in state_dict.items() if v.shape == own[k].shape}
    new = sorted(k.removesuffix('.weight') for k in own if k not in kept and k.endswith('.weight'))
    _logger.warning(f'Taken from a {name}: all but {", ".join(new)}, which are new for {model.num_classes} classes.')
    model.load_state_dict({**own, **kept})
    return model


def _build(
        build: Builder, said: Mapping[str, Any], num_classes: Optional[int], model_args: Optional[Mapping[str, Any]],
        kwargs: Mapping[str, Any]) -> Any:
    """Build the model of a description. `model_args` and `kwargs` replace arguments in the description."""
    pvt_args = {name: tuple(value) if isinstance(value, list) else value
                for name, value in said.get('model_args', {}).items()}
    sizes = {name: said[name] for name in ('min_size', 'max_size') if said.get(name) is not None}
    if isinstance(sizes.get('min_size'), list):
        sizes['min_size'] = tuple(sizes['min_size'])
    settings = {**sizes, **said.get('head_args', {}), **kwargs, 'model_args': {**pvt_args, **(model_args or {})}}
    try:
        model = build(said['model'], num_classes, **settings)
    except (TypeError, AssertionError) as e:
        if model_args or kwargs:
            _build(build, said, said['num_classes'], None, {})  # raises ValueError if the checkpoint is wrong
            raise
        raise ValueError(f"What stands under '{KEY}' in the checkpoint does not fit together: {e}") from e
    where, names = (model.transform, ('image_mean', 'image_std')) if hasattr(model, 'transform') else (
        model, ('mean', 'std'))
    for name, key in zip(names, ('mean', 'std')):
        if said.get(key) is not None and name not in kwargs:
            setattr(where, name, type(getattr(where, name))(float(x) for x in said[key]))
    return model


def _roots(state_dict: Mapping[str, Any]) -> List[str]:
    """Return the part before the names of each detector or segmenter, such as 'model.', in the order of the weights."""
    roots: Dict[str, None] = {}
    for name in state_dict:
        root, found, _ = str(name).partition(_STAGES)
        if found and (not root or root.endswith('.')):
            roots[root] = None
    return list(roots)


def _weights(checkpoint: Mapping[str, Any], prefix: Optional[str]) -> Dict[str, torch.Tensor]:
    """Return the weights of the model, without the part before their names."""
    state_dict = unwrap(checkpoint)[0]
    roots = _roots(state_dict)
    if not roots:
        raise ValueError(f"Expected a detector or segmenter of this package (keys '{_BODY}*'), "
                         f"got keys {', '.join(list(map(str, state_dict))[:3]) or 'none'}.")
    if prefix is not None:
        asked = f'{prefix.rstrip(".")}.'.lstrip('.')
        for end in (_BODY, 'backbone.'):
            if f'.{asked}'.endswith(f'.{end}'):
                asked = asked[:-len(end)]
                break
        if asked not in roots:
            raise ValueError(f'Expected a prefix of {roots}, got {prefix!r}.')
        roots = [asked]
    if len(roots) > 1:
        raise ValueError(f'Expected one model, got those under {roots}: choose with the prefix.')
    root = roots[0]
    weights = {name[len(root):]: x for name, x in state_dict.items() if isinstance(name, str) and name.startswith(root)}
    for name, x in weights.items():
        if not isinstance(x, torch.Tensor) or not x.isfinite().all():
            raise ValueError(f'Expected finite numbers as weights, {name} has NaN, infinity or no numbers at all.')
    return weights
