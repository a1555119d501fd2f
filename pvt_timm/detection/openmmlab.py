""" Detectors of OpenMMLab and of the original PVT code as torchvision models, and back.

mmdetection 2, mmdetection 3 and the original code (mmdetection 2.13 with another backbone) use the same names for neck
and heads. A row of a table says which parameters hold the same numbers, see `formats/names.py`.
"""
import logging
from typing import Any, Callable, Dict, Iterable, Mapping, Optional, Set, Tuple, Union

import torch
import torch.nn as nn
from torch.hub import load_state_dict_from_url
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from ..formats import FORMATS
from ..formats.architecture import check_keys, describe, drop_parts
from ..formats.mapping import Converted, from_timm, map_to_timm
from ..formats.names import Row, Table, to_ours, to_theirs
from ..pvt import default_cfgs
from ..variants import find_variant
from .detectors import PvtFasterRCNN, PvtMaskRCNN, PvtRetinaNet
from .settings import read_settings
from .trained import Checkpoint, is_own, load_own, open_checkpoint, widths_of, with_new_classes

_logger = logging.getLogger(__name__)

StateDict = Dict[str, torch.Tensor]

# The background is the last class in OpenMMLab and the first one in torchvision. OpenMMLab has no boxes and masks for
# it. torchvision has, and does not use them: they are set to 0.

def _background_first(x: torch.Tensor) -> torch.Tensor:
    return x.roll(1, dims=0)


def _background_last(x: torch.Tensor) -> torch.Tensor:
    return x.roll(-1, dims=0)


def _add_background_box(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(x[:4]), x])


def _drop_background_box(x: torch.Tensor) -> torch.Tensor:
    return x[4:]


def _add_background_mask(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(x[:1]), x])


def _drop_background_mask(x: torch.Tensor) -> torch.Tensor:
    return x[1:]


FPN = (
    #   torchvision                                       mmdetection, mmsegmentation
    Row('backbone.fpn.inner_blocks.{i}.0.{p}',            'neck.lateral_convs.{i}.conv.{p}'),
    Row('backbone.fpn.layer_blocks.{i}.0.{p}',            'neck.fpn_convs.{i}.conv.{p}'),
)
_RETINANET = (
    Row('backbone.fpn.extra_blocks.p6.{p}',               'neck.fpn_convs.3.conv.{p}'),
    Row('backbone.fpn.extra_blocks.p7.{p}',               'neck.fpn_convs.4.conv.{p}'),
    *FPN,
    Row('head.classification_head.conv.{i}.0.{p}',        'bbox_head.cls_convs.{i}.conv.{p}'),
    Row('head.classification_head.cls_logits.{p}',        'bbox_head.retina_cls.{p}'),
    Row('head.regression_head.conv.{i}.0.{p}',            'bbox_head.reg_convs.{i}.conv.{p}'),
    Row('head.regression_head.bbox_reg.{p}',              'bbox_head.retina_reg.{p}'),
)
_FASTER_RCNN = (
    *FPN,
    Row('rpn.head.conv.0.0.{p}',                          'rpn_head.rpn_conv.{p}'),
    Row('rpn.head.cls_logits.{p}',                        'rpn_head.rpn_cls.{p}'),
    Row('rpn.head.bbox_pred.{p}',                         'rpn_head.rpn_reg.{p}'),
    Row('roi_heads.box_head.fc6.{p}',                     'roi_head.bbox_head.shared_fcs.0.{p}'),
    Row('roi_heads.box_head.fc7.{p}',                     'roi_head.bbox_head.shared_fcs.1.{p}'),
    Row('roi_heads.box_predictor.cls_score.{p}',          'roi_head.bbox_head.fc_cls.{p}',
        to_ours=_background_first, to_theirs=_background_last),
    Row('roi_heads.box_predictor.bbox_pred.{p}',          'roi_head.bbox_head.fc_reg.{p}',
        to_ours=_add_background_box, to_theirs=_drop_background_box),
)
_MASK_RCNN = (
    *_FASTER_RCNN,
    Row('roi_heads.mask_head.{i}.0.{p}',                  'roi_head.mask_head.convs.{i}.conv.{p}'),
    Row('roi_heads.mask_predictor.conv5_mask.{p}',        'roi_head.mask_head.upsample.{p}'),
    Row('roi_heads.mask_predictor.mask_fcn_logits.{p}',   'roi_head.mask_head.conv_logits.{p}',
        to_ours=_add_background_mask, to_theirs=_drop_background_mask),
)
# Kind of model -> (a parameter that has rows for each class, number of rows per class, number of rows for a background)
_HEADS = {
    'RetinaNet': ('bbox_head.retina_cls.weight', 9, 0),  # 3 scales x 3 aspect ratios
    'Mask R-CNN': ('roi_head.mask_head.conv_logits.weight', 1, 0),  # its classes are those of Faster R-CNN's
    'Faster R-CNN': ('roi_head.bbox_head.fc_cls.weight', 1, 1),
    'Semantic FPN': ('decode_head.conv_seg.weight', 1, 0),
}
# Kind of detector -> (its class, table of the parameters outside of its backbone)
_DETECTORS: Dict[str, Tuple[Any, Table]] = {
    'RetinaNet': (PvtRetinaNet, _RETINANET),
    'Faster R-CNN': (PvtFasterRCNN, _FASTER_RCNN),
    'Mask R-CNN': (PvtMaskRCNN, _MASK_RCNN),
}
# Arguments of `on_pvt` that the loading functions take, besides the arguments of the class
_FOR_ON_PVT = ('num_classes', 'model_args', 'frozen_stages')


def coco_categories() -> Dict[int, str]:
    """Return the names of COCO's 80 categories by their ids in annotation files, in the order of class indices."""
    names = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta['categories']
    return {i: name for i, name in enumerate(names) if name not in ('__background__', 'N/A')}


def describe_heads(state_dict: Mapping[str, Any]) -> Optional[Tuple[str, int]]:
    """Return the kind of detector or segmenter that a state dict of OpenMMLab holds, and its number of classes.

    Args:
        state_dict: Tensors under the names of mmdetection or mmsegmentation, with any prefix.

    Returns:
        ('RetinaNet', 'Mask R-CNN', 'Faster R-CNN' or 'Semantic FPN', number of classes). None if it is none of these.
    """
    found = {}
    for kind, (anchor, per_class, background) in _HEADS.items():
        weight = next((v for k, v in state_dict.items() if f'.{k}'.endswith(f'.{anchor}')), None)
        if kind == 'Semantic FPN' and not any('decode_head.scale_heads.' in str(k) for k in state_dict):
            continue
        if isinstance(weight, torch.Tensor) and weight.ndim:
            found[kind] = weight.shape[0] // per_class - background
    if 'Mask R-CNN' in found:
        # Some models have one mask for all classes. The number of classes is that of the box head, so that a message
        # about a wrong shape names the mask head.
        return 'Mask R-CNN', found.get('Faster R-CNN', found['Mask R-CNN'])
    return next(iter(found.items()), None)


def heads_of(converted: Converted) -> Dict[str, Any]:
    """Return the tensors outside of the backbone of a detector or segmenter, under OpenMMLab's names."""
    root = converted.prefix.removesuffix('backbone.')
    return {k[len(root):]: v for k, v in converted.beside.items() if isinstance(k, str) and k.startswith(root)}


def _outline(heads: Mapping[str, Any]) -> str:
    """Return the modules beside a backbone and their parts, such as 'bbox_head (cls_convs), neck (fpn_convs)'."""
    inner: Dict[str, Set[str]] = {}
    for key in heads:
        part, _, rest = key.partition('.')
        inner.setdefault(part, set()).add(rest.partition('.')[0])
    return ', '.join(f'{part} ({", ".join(sorted(inner[part]))})' for part in sorted(inner)) or 'nothing'


def from_openmmlab(
        checkpoint: Checkpoint, kinds: Mapping[str, Tuple[Callable[..., Any], Table]], prefix: Optional[str] = None,
        num_classes: Optional[int] = None, model_args: Optional[Dict[str, Any]] = None,
        **kwargs: Any) -> Tuple[Any, Dict[str, Any]]:
    """Load a whole detector or segmenter of OpenMMLab or of the original code. All of its weights have to fit.

    Args:
        checkpoint: A file, or its content.
        kinds: The kinds of models (as `describe_heads` returns them) that are accepted. Each has the function that
            builds the model and the table of its parameters outside of the backbone. The function gets the name of a
            PVT, the number of classes, the settings from the weights and from the config in the file, and `kwargs`.
        prefix: The part before the names of the model, or of its backbone.
        num_classes: If it differs from that of the file, the layers that depend on it are new.
        model_args: Arguments for `timm.create_model`.
        kwargs: More arguments for the function that builds the model.

    Returns:
        The model in evaluation mode, and 'label_names' and 'palette' from the file if it has one for each class. Both
        are empty for new classes.

    Raises:
        ValueError: The checkpoint holds none of `kinds`, or does not fit the model.
    """
    checkpoint = open_checkpoint(checkpoint)
    if prefix is not None and prefix.rstrip('.').rpartition('.')[2] != 'backbone':
        prefix = f'{prefix.rstrip(".")}.backbone'.lstrip('.')  # the caller gave the prefix of the whole model
    converted = map_to_timm(checkpoint, prefix=prefix)
    if converted.format not in ('mmdet', 'original') or not converted.prefix.endswith('backbone.'):
        raise ValueError(
            f"Expected a {' or '.join(kinds)} of OpenMMLab or the original code (keys 'backbone.*', 'neck.*', ...), "
            f'got a {converted.format} model' + (f' under {converted.prefix!r}.' if converted.prefix else '.'))
    heads = _without_leftovers(heads_of(converted))
    kind, classes = describe_heads(heads) or ('', 0)
    if kind not in kinds:
        told_by = {name: f'{name} ({_HEADS[name][0].removesuffix(".weight")})' for name in kinds}
        there = f'model with {_outline(heads)} beside its backbone'
        raise ValueError(
            f'Expected a {" or ".join(kinds)}, got a {kind}.' if kind else
            f'Expected a {" or ".join(told_by.values())}, got a {there}.')
    build, table = kinds[kind]
    info = describe(converted.state_dict)
    variant = find_variant(info.depths, info.embed_dims)
    if variant is None:
        raise ValueError(f'Expected a PVT v1 variant, got depths {info.depths} and channels {info.embed_dims}.')

    body = drop_parts(converted.state_dict, ('class_token', 'norm', 'head'), info.class_row)
    body, _ = from_timm(body, 'timm_features')
    ours, _, _ = to_ours(heads, table)
    # A width cannot be read from an empty tensor. A checkpoint with empty tensors is refused below.
    settings: Dict[str, Any] = dict(widths_of({name: x for name, x in ours.items() if x.numel()}))
    meta = checkpoint.get('meta')
    said = read_settings(meta if isinstance(meta, Mapping) else {}, kind)
    for name in ('image_mean', 'image_std'):
        if name in said and len(said[name]) not in (1, info.in_chans):
            raise ValueError(f'Expected {name} of {info.in_chans} channels in the config in the checkpoint, got '
                             f'{len(said[name])}.')
    normalisation: Dict[str, Tuple[float, ...]] = {
        name: said.pop(name) for name in ('image_mean', 'image_std') if name in said}
    settings.update(said)
    model_args = {
        'img_size': info.img_size,
        'in_chans': info.in_chans,
        **FORMATS[converted.format].model_args,
        **said.pop('model_args', {}),
        **(model_args or {}),
    }
    settings = {**settings, **kwargs, 'model_args': model_args}
    model = _build(build, variant, classes, settings, normalisation)

    check_keys(heads, to_theirs(model.state_dict(), table)[0])
    weights = {**{f'backbone.body.{k}': v for k, v in body.items()}, **ours}
    check_keys(weights, model.state_dict())
    model.load_state_dict(weights)
    if num_classes not in (None, classes):
        fresh = _build(build, variant, num_classes, settings, normalisation)
        model = with_new_classes(fresh, model.state_dict(), f'{kind} for {classes} classes')
    if model.num_classes != classes:
        return model.eval(), {'label_names': [], 'palette': []}
    names = FORMATS['mmdet'].read_meta(checkpoint)
    found = {name: getattr(names, name, None) or [] for name in ('label_names', 'palette')}
    return model.eval(), {name: values for name, values in found.items() if len(values) == model.num_classes}


def _build(
        build: Callable[..., Any], variant: str, num_classes: int, settings: Dict[str, Any],
        normalisation: Mapping[str, Tuple[float, ...]]) -> Any:
    """Build a model with the normalisation of images of the config, unless `settings` give another one."""
    model = build(variant, num_classes, **settings)
    holder, names = (model.transform, ('image_mean', 'image_std')) if hasattr(model, 'transform') else (
        model, ('mean', 'std'))
    for name, key in zip(names, ('image_mean', 'image_std')):
        if key in normalisation and key not in settings:
            values = normalisation[key]
            count = len(getattr(holder, name))
            setattr(holder, name, list(values) if len(values) == count else [values[0]] * count)
    return model


# Starts of names that training leaves in a checkpoint and that are not used: copies of mmcv's EMA hook (the averaged
# weights are those under the plain names), buffers of mmengine, a head that is used in training only
_LEFTOVERS = ('ema_', 'data_preprocessor.', 'auxiliary_head.')


def _without_leftovers(heads: Dict[str, Any]) -> Dict[str, Any]:
    counts = {start: sum(key.startswith(start) for key in heads) for start in _LEFTOVERS}
    there = [f'{start}* ({count})' for start, count in counts.items() if count]
    if there:
        _logger.warning(f'Left out of the checkpoint, as no part of the model that is used: {", ".join(there)}.')
    return {key: value for key, value in heads.items() if not key.startswith(_LEFTOVERS)}


def to_openmmlab(model: nn.Module, table: Table, fmt: str) -> StateDict:
    """Return the weights of `model` as OpenMMLab names and stacks them. `fmt` is that of the backbone."""
    state_dict = model.state_dict()
    body, _ = from_timm(map_to_timm(state_dict).state_dict, fmt)
    if fmt == 'original':
        body['pos_embed4'] = torch.cat([torch.zeros_like(body['pos_embed4'][:, :1]), body['pos_embed4']], dim=1)
    heads, _, _ = to_theirs(state_dict, table)
    return {**{f'backbone.{k}': v for k, v in body.items()}, **heads}


def detector_to_mmdet(model: Union[PvtRetinaNet, PvtFasterRCNN, PvtMaskRCNN], fmt: str = 'mmdet') -> StateDict:
    """Return the weights of a detector, named and stacked as in mmdetection or the original code.

    Args:
        model: A detector of this package.
        fmt: 'mmdet', or 'original' for the backbone of the original code. Then the position embedding of the last stage
            gets a row of zeros, which the original code expects and does not use.
    """
    tables = dict(_DETECTORS.values())
    table = next((tables[base] for base in type(model).__mro__ if base in tables), None)  # the class or a subclass
    if table is None:
        raise ValueError(f'Expected a detector of this package or of a subclass, got a {type(model).__name__}.')
    return to_openmmlab(model, table, fmt)


def detector_from_mmdet(
        checkpoint: Checkpoint, prefix: Optional[str] = None, kinds: Iterable[str] = tuple(_DETECTORS),
        **kwargs: Any) -> Any:
    """Load a whole detector of any of these `kinds`. Arguments and errors are those of `retinanet_from_mmdet`."""
    checkpoint = open_checkpoint(checkpoint)
    wanted = {kind: _DETECTORS[kind] for kind in kinds}
    if is_own(checkpoint):
        builders = {detector.kind: detector.on_pvt for detector, _ in wanted.values()}
        return load_own(checkpoint, builders, prefix, **kwargs)
    model, said = from_openmmlab(
        checkpoint, {kind: (detector.on_pvt, table) for kind, (detector, table) in wanted.items()}, prefix, **kwargs)
    coco = list(coco_categories().values()) if model.num_classes == 80 else []
    model.categories = said.get('label_names', coco)
    return model


def retinanet_from_mmdet(checkpoint: Checkpoint, prefix: Optional[str] = None, **kwargs: Any) -> PvtRetinaNet:
    """Load a RetinaNet of mmdetection, of the original PVT code or of this package.

    Args:
        checkpoint: A file (nothing in it is executed), or its content: a state dict, bare or under 'state_dict', with
            `backbone.*`, `neck.*` and `bbox_head.*`. A two-stage detector has `rpn_head.*` and `roi_head.*` instead of
            `bbox_head.*`. From this package: a checkpoint of `pvt-timm detector fit`, or the state dict of a detector.
        prefix: The part before the names of the model, or of its backbone. It is needed if there are several.
        kwargs: Arguments of `pvt_retinanet`, such as `min_size` (by default that of the file, or 800), `num_classes`,
            `model_args` (such as `dict(drop_path_rate=0.1)`) and `frozen_stages`. If `num_classes` differs from that
            of the file, the layers that depend on it are new and have to be trained. A warning names them.

    Returns:
        A torchvision model in evaluation mode. Variant, number of classes and widths are read from the weights. Names
        of classes, sizes and normalisation of images are those in the file.

    Raises:
        ValueError: It is not such a checkpoint. The message says what is wrong.
        TypeError: A keyword is not known.
    """
    return detector_from_mmdet(checkpoint, prefix, ['RetinaNet'], **kwargs)


def faster_rcnn_from_mmdet(checkpoint: Checkpoint, prefix: Optional[str] = None, **kwargs: Any) -> PvtFasterRCNN:
    """Load a Faster R-CNN with neck and heads. Arguments and errors are those of `retinanet_from_mmdet`."""
    return detector_from_mmdet(checkpoint, prefix, ['Faster R-CNN'], **kwargs)


def mask_rcnn_from_mmdet(checkpoint: Checkpoint, prefix: Optional[str] = None, **kwargs: Any) -> PvtMaskRCNN:
    """Load a Mask R-CNN with neck and heads. Arguments and errors are those of `retinanet_from_mmdet`."""
    return detector_from_mmdet(checkpoint, prefix, ['Mask R-CNN'], **kwargs)


def retinanet_coco(model_name: str = 'pvt_small', cache_dir: Optional[str] = None, **kwargs: Any) -> PvtRetinaNet:
    """Return OpenMMLab's RetinaNet on PVT, trained on COCO (published box AP: tiny 36.6, small 40.4, medium 41.7).

    The weights are the file of the tag `retinanet_coco` (a tag is timm's name for a set of published weights). It is
    downloaded once, and compared with the hash in its name.

    Args:
        model_name: 'pvt_tiny', 'pvt_small' or 'pvt_medium'.
        cache_dir: Folder that keeps the download, by default torch's hub folder.
        kwargs: Arguments of `retinanet_from_mmdet`, such as `num_classes` for a new head, and `min_size`.

    Returns:
        The model in evaluation mode. `categories` names its 80 classes, see `coco_categories` for their ids.
    """
    urls = {name: cfg.cfgs['retinanet_coco'].url for name, cfg in default_cfgs.items() if 'retinanet_coco' in cfg.cfgs}
    if model_name not in urls:
        raise ValueError(f'Expected model_name in {tuple(urls)}, got {model_name!r}.')
    PvtRetinaNet.check_keywords({k: v for k, v in kwargs.items() if k not in _FOR_ON_PVT})  # before the download
    checkpoint = load_state_dict_from_url(
        urls[model_name], model_dir=cache_dir, map_location='cpu', check_hash=True, weights_only=True)
    return retinanet_from_mmdet(checkpoint, **kwargs)
