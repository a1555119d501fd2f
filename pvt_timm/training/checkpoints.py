""" What a checkpoint of `fit` says about its model, and the model that a checkpoint holds.

A checkpoint has plain values under the key 'pvt_timm' beside the weights: all that is needed to build the model, its
classes and the sizes of its images. Weights alone, as of `torch.save(model.state_dict())`, are read too: variant, kind,
number of classes and widths follow from their names and shapes.
"""
import inspect
from os import PathLike
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

import torch
import torch.nn as nn

from ..detection import PvtFasterRCNN, PvtMaskRCNN, PvtRetinaNet, detector_from_mmdet
from ..detection.openmmlab import widths_of
from ..files import read_checkpoint
from ..formats.architecture import check_keys, describe
from ..formats.mapping import map_to_timm
from ..pvt import VARIANTS, PyramidVisionTransformer, find_variant
from ..segmentation import SemanticFpn, is_color, semantic_fpn, semantic_fpn_from_mmseg
from ..version import __version__

__all__ = ['KEY', 'KINDS', 'copy_weights', 'describe_model', 'is_own', 'load_any', 'load_trained']

KEY = 'pvt_timm'
KINDS: Dict[str, Callable[..., Any]] = {
    'retinanet': PvtRetinaNet.on_pvt,
    'faster_rcnn': PvtFasterRCNN.on_pvt,
    'mask_rcnn': PvtMaskRCNN.on_pvt,
    'semantic_fpn': semantic_fpn,
}
_CLASSES = {
    PvtRetinaNet: 'retinanet', PvtFasterRCNN: 'faster_rcnn', PvtMaskRCNN: 'mask_rcnn', SemanticFpn: 'semantic_fpn'}
# Kind -> a parameter that only it has, rows for one class, rows for the background. The first one that fits counts
_HEADS = {
    'retinanet': ('head.classification_head.cls_logits.weight', 9, 0),  # 3 scales x 3 aspect ratios
    'mask_rcnn': ('roi_heads.mask_predictor.mask_fcn_logits.weight', 1, 1),
    'faster_rcnn': ('roi_heads.box_predictor.cls_score.weight', 1, 1),
    'semantic_fpn': ('head.classifier.weight', 1, 0),
}
# Parameters whose rows are classes
_OF_CLASSES = (
    'head.classification_head.cls_logits.', 'roi_heads.box_predictor.', 'roi_heads.mask_predictor.mask_fcn_logits.',
    'head.classifier.')
_MODEL_ARGS = set(inspect.signature(PyramidVisionTransformer.__init__).parameters) - {'self', 'num_classes'}

Checkpoint = Union[str, 'PathLike[str]', Mapping[str, Any]]


def kind_of(model: nn.Module) -> str:
    """'retinanet', 'faster_rcnn', 'mask_rcnn' or 'semantic_fpn'."""
    for kind in type(model).__mro__:
        if kind in _CLASSES:
            return _CLASSES[kind]
    raise ValueError(f'Expected a detector or segmenter of this package, got {type(model).__name__}.')


def describe_body(state_dict: Mapping[str, torch.Tensor]) -> Tuple[str, Dict[str, Any]]:
    """Name and arguments of the PVT in the state dict of a detector or segmenter."""
    info = describe(map_to_timm(state_dict).state_dict)
    variant = find_variant(info.depths, info.embed_dims)
    if variant is None:
        raise ValueError(f'Expected a PVT v1 variant, got depths {info.depths} and channels {info.embed_dims}.')
    return variant, dict(img_size=list(info.img_size), in_chans=info.in_chans)


def describe_model(
        model: nn.Module, model_args: Optional[Mapping[str, Any]] = None, head_args: Optional[Mapping[str, Any]] = None,
        ) -> Dict[str, Any]:
    """Plain values that `load_trained` builds the model from again.

    Args:
        model: A detector or segmenter of this package.
        model_args: Arguments that its PVT was made with, as far as they do not follow from the weights.
        head_args: The same for its class.

    Returns:
        What belongs under the key 'pvt_timm' of a checkpoint, beside the weights.
    """
    any_model: Any = model
    state_dict = model.state_dict()
    variant, seen = describe_body(state_dict)
    kept = {name: value for name, value in (model_args or {}).items() if name in _MODEL_ARGS}
    kept.pop('drop_path_rate', None)  # only for training
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


def is_own(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of this package: written by `fit`, or with the weights of one of its models."""
    return KEY in checkpoint or _root(_state_dict(checkpoint)) is not None


def load_trained(checkpoint: Checkpoint, **kwargs: Any) -> Any:
    """The detector or segmenter in a checkpoint of `fit`, or in a state dict of one.

    Args:
        checkpoint: File, of which nothing is executed, or what it holds.
        kwargs: Arguments for the class of the model that replace those in the checkpoint, such as `min_size`.

    Returns:
        The model in evaluation mode. `categories` names its classes, if the checkpoint does.

    Raises:
        ValueError: Not such a checkpoint. The message says what is wrong.
    """
    if isinstance(checkpoint, (str, PathLike)):
        checkpoint = read_checkpoint(checkpoint)
    weights = _weights(checkpoint)
    said = checkpoint.get(KEY)
    if said is None:
        said = _described_by(weights)
    _check_described(said, weights)
    model_args, head_args = said.get('model_args', {}), said.get('head_args', {})
    unknown = [name for name in model_args if name not in _MODEL_ARGS]
    if unknown:
        raise ValueError(f'Expected arguments of a PVT in the checkpoint, got {", ".join(map(str, unknown))}.')
    sizes = {name: said[name] for name in ('min_size', 'max_size') if said.get(name) is not None}
    if isinstance(sizes.get('min_size'), list):
        sizes['min_size'] = tuple(sizes['min_size'])
    model_args = {name: tuple(value) if isinstance(value, list) else value for name, value in model_args.items()}
    build = KINDS[said['kind']]
    try:
        model = build(said['model'], said['num_classes'], model_args=model_args, **{**sizes, **head_args, **kwargs})
    except (TypeError, AssertionError) as e:
        raise ValueError(f"What stands under '{KEY}' in the checkpoint does not fit together: {e}") from e
    check_keys(weights, model.state_dict())
    model.load_state_dict(weights)
    _set_normalisation(model, said)
    model.categories = [str(name) for name in said.get('categories', ())]
    if hasattr(model, 'palette'):
        model.palette = [tuple(int(x) for x in color) for color in said.get('palette', ())]
    return model.eval()


def _check_described(said: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse a description that makes no sense, or of another model than the weights, before anything is built."""
    if not isinstance(said, Mapping) or not all(isinstance(said.get(name), str) for name in ('kind', 'model')) or (
            said['kind'] not in KINDS or said['model'] not in VARIANTS):
        raise ValueError(f"Expected a known kind and model under '{KEY}' in the checkpoint.")
    for name in ('model_args', 'head_args'):
        if not isinstance(said.get(name, {}), Mapping):
            raise ValueError(f"Expected a dict for {name} under '{KEY}' in the checkpoint.")
    name, per_class, background = _HEADS[said['kind']]
    rows = weights[name].shape[0] if name in weights and weights[name].ndim else 0
    count = said.get('num_classes')
    if type(count) is not int or (count + background) * per_class != rows:
        raise ValueError(f'Expected as many classes as {name} is for, which has {rows} rows.')
    for argument, width in widths_of(weights).items():
        if said.get('head_args', {}).get(argument, width) != width:
            raise ValueError(f'Expected {argument} {width}, which the weights have.')
    categories, palette = said.get('categories', ()), said.get('palette', ())
    if not isinstance(categories, (list, tuple)) or len(categories) not in (0, count):
        raise ValueError(f'Expected {count} names of classes or none, got {len_of(categories)}.')
    if not isinstance(palette, (list, tuple)) or len(palette) not in (0, count) or not all(map(is_color, palette)):
        raise ValueError(f'Expected {count} colours (red, green and blue from 0 to 255) as palette, or none.')


def len_of(value: Any) -> Any:
    return len(value) if isinstance(value, (list, tuple)) else type(value).__name__


def _set_normalisation(model: Any, said: Mapping[str, Any]) -> None:
    where, names = (model.transform, ('image_mean', 'image_std')) if hasattr(model, 'transform') else (
        model, ('mean', 'std'))
    for name, key in zip(names, ('mean', 'std')):
        if said.get(key) is not None:
            setattr(where, name, type(getattr(where, name))(float(x) for x in said[key]))


def _state_dict(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = checkpoint.get('state_dict')
    return inner if isinstance(inner, Mapping) else checkpoint


def _root(state_dict: Mapping[str, Any]) -> Optional[str]:
    """What stands before the names of the model's parameters, such as 'model.'. None if there is no such model."""
    for name in state_dict:
        root, found, _ = str(name).partition('backbone.body.stages_')
        if found and (not root or root.endswith('.')):
            return root
    return None


def _weights(checkpoint: Mapping[str, Any]) -> Dict[str, torch.Tensor]:
    """The weights, without what Lightning puts before their names."""
    state_dict = _state_dict(checkpoint)
    root = _root(state_dict)
    if root is None:
        raise ValueError("Expected a detector or segmenter of this package (keys 'backbone.body.*'), "
                         f"got keys {', '.join(list(map(str, state_dict))[:3]) or 'none'}.")
    weights = {name[len(root):]: x for name, x in state_dict.items() if isinstance(name, str) and name.startswith(root)}
    for name, x in weights.items():
        if not isinstance(x, torch.Tensor) or not x.isfinite().all():
            raise ValueError(f'Expected finite numbers as weights, {name} has NaN, infinity or no numbers at all.')
    return weights


def _described_by(weights: Mapping[str, torch.Tensor]) -> Dict[str, Any]:
    """What weights alone say about their model."""
    for kind, (name, per_class, background) in _HEADS.items():
        if name in weights and weights[name].ndim:
            variant, model_args = describe_body(weights)
            return dict(
                kind=kind, model=variant, model_args=model_args, head_args=widths_of(weights),
                num_classes=weights[name].shape[0] // per_class - background)
    raise ValueError('Expected a RetinaNet, Faster R-CNN, Mask R-CNN or Semantic FPN, its head is none of these.')


def load_any(checkpoint: Checkpoint, task: str, prefix: Optional[str] = None) -> Any:
    """A detector or segmenter from any checkpoint: of this package, of OpenMMLab or of the original code.

    Args:
        checkpoint: File, of which nothing is executed, or what it holds.
        task: 'detector' or 'segmenter'.
        prefix: What stands before the names of the backbone, needed where there are several.

    Raises:
        ValueError: Not such a checkpoint, or for the other task.
    """
    if isinstance(checkpoint, (str, PathLike)):
        checkpoint = read_checkpoint(checkpoint)
    if not is_own(checkpoint):
        return (detector_from_mmdet if task == 'detector' else semantic_fpn_from_mmseg)(checkpoint, prefix)
    model = load_trained(checkpoint)
    if (task == 'segmenter') != isinstance(model, SemanticFpn):
        raise ValueError(f'Expected a {task}, got a {type(model).__name__.removeprefix("Pvt")}.')
    return model


def copy_weights(model: Any, source: Any) -> List[str]:
    """Start a model from another one of its kind.

    Where the classes are not the same, the layers whose rows are classes stay as they are.

    Returns:
        Names of the parameters that stay.

    Raises:
        ValueError: Other parameters differ.
    """
    same = model.num_classes == source.num_classes and (
        not model.categories or not source.categories or list(model.categories) == list(source.categories))
    weights, own = source.state_dict(), model.state_dict()
    kept = [] if same else [name for name in own if name.startswith(_OF_CLASSES)]
    weights = {**weights, **{name: own[name] for name in kept}}
    check_keys(weights, own)
    model.load_state_dict(weights)
    eps = {name: m.eps for name, m in source.named_modules() if isinstance(m, nn.LayerNorm)}
    for name, module in model.named_modules():
        if name in eps:
            module.eps = eps[name]
    return kept
