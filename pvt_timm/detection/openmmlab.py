""" Detectors of OpenMMLab and of the original PVT code as torchvision models, and back.

mmdetection 2 and 3 and the original code (which is mmdetection 2.13 with a backbone of its own) name neck and heads
alike. A row of a table says which parameters hold the same numbers, as in `checkpoints.py`.
"""
import logging
import re
from os import PathLike
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import torch
import torch.nn as nn
from torch.hub import load_state_dict_from_url
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from ..checkpoints import Description, check_keys, describe, drop_parts, from_timm, map_to_timm, remap, to_timm, unwrap
from ..files import read_checkpoint
from ..pvt import default_cfgs, find_variant
from .mask_rcnn import PvtFasterRCNN, PvtMaskRCNN, pvt_faster_rcnn, pvt_mask_rcnn
from .retinanet import PvtRetinaNet, pvt_retinanet

_logger = logging.getLogger(__name__)

StateDict = Dict[str, torch.Tensor]
Checkpoint = Union[str, 'PathLike[str]', Mapping[str, Any]]

FPN = (
    # torchvision                                      mmdetection, mmsegmentation
    ('backbone.fpn.inner_blocks.{i}.0.{p}',            'neck.lateral_convs.{i}.conv.{p}'),
    ('backbone.fpn.layer_blocks.{i}.0.{p}',            'neck.fpn_convs.{i}.conv.{p}'),
)
_RETINANET = (
    ('backbone.fpn.extra_blocks.p6.{p}',               'neck.fpn_convs.3.conv.{p}'),
    ('backbone.fpn.extra_blocks.p7.{p}',               'neck.fpn_convs.4.conv.{p}'),
    *FPN,
    ('head.classification_head.conv.{i}.0.{p}',        'bbox_head.cls_convs.{i}.conv.{p}'),
    ('head.classification_head.cls_logits.{p}',        'bbox_head.retina_cls.{p}'),
    ('head.regression_head.conv.{i}.0.{p}',            'bbox_head.reg_convs.{i}.conv.{p}'),
    ('head.regression_head.bbox_reg.{p}',              'bbox_head.retina_reg.{p}'),
)
_FASTER_RCNN = (
    *FPN,
    ('rpn.head.conv.0.0.{p}',                          'rpn_head.rpn_conv.{p}'),
    ('rpn.head.cls_logits.{p}',                        'rpn_head.rpn_cls.{p}'),
    ('rpn.head.bbox_pred.{p}',                         'rpn_head.rpn_reg.{p}'),
    ('roi_heads.box_head.fc6.{p}',                     'roi_head.bbox_head.shared_fcs.0.{p}'),
    ('roi_heads.box_head.fc7.{p}',                     'roi_head.bbox_head.shared_fcs.1.{p}'),
    ('roi_heads.box_predictor.cls_score.{p}',          'roi_head.bbox_head.fc_cls.{p}'),
    ('roi_heads.box_predictor.bbox_pred.{p}',          'roi_head.bbox_head.fc_reg.{p}'),
)
_MASK_RCNN = (
    *_FASTER_RCNN,
    ('roi_heads.mask_head.{i}.0.{p}',                  'roi_head.mask_head.convs.{i}.conv.{p}'),
    ('roi_heads.mask_predictor.conv5_mask.{p}',        'roi_head.mask_head.upsample.{p}'),
    ('roi_heads.mask_predictor.mask_fcn_logits.{p}',   'roi_head.mask_head.conv_logits.{p}'),
)
_TABLES = {PvtRetinaNet: _RETINANET, PvtFasterRCNN: _FASTER_RCNN, PvtMaskRCNN: _MASK_RCNN}

# Kind of model -> a parameter with rows per class, rows for one class, rows for the background
_HEADS = {
    'RetinaNet': ('bbox_head.retina_cls.weight', 9, 0),  # 3 scales x 3 aspect ratios
    'Mask R-CNN': ('roi_head.mask_head.conv_logits.weight', 1, 0),
    'Faster R-CNN': ('roi_head.bbox_head.fc_cls.weight', 1, 1),
    'Semantic FPN': ('decode_head.conv_seg.weight', 1, 0),
}
_MMDET_EPS = 1e-6


def coco_categories() -> Dict[int, str]:
    """COCO's 80 categories, id in the annotation files to name, in the order of class indices."""
    names = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta['categories']
    return {i: name for i, name in enumerate(names) if name not in ('__background__', 'N/A')}


def describe_heads(state_dict: Mapping[str, Any]) -> Optional[Tuple[str, int]]:
    """Tell what a state dict of OpenMMLab holds beside its backbone.

    Args:
        state_dict: Tensors under the names of mmdetection or mmsegmentation, whatever stands before them.

    Returns:
        'RetinaNet', 'Mask R-CNN', 'Faster R-CNN' or 'Semantic FPN' and its number of classes. None if none of these.
    """
    for kind, (anchor, per_class, background) in _HEADS.items():
        for key, value in state_dict.items():
            if f'.{key}'.endswith(f'.{anchor}') and isinstance(value, torch.Tensor) and value.ndim:
                if kind == 'Semantic FPN' and not any('decode_head.scale_heads.' in k for k in state_dict):
                    continue
                return kind, value.shape[0] // per_class - background
    return None


class OpenMMLabCheckpoint:
    """A whole detector or segmenter of OpenMMLab or of the original code, taken apart.

    Attributes:
        variant: Name of the PVT.
        info: What its weights say about it.
        body: Its weights under the names of a `features_only` model.
        heads: The weights beside it under the names of the file, without what stands before all of them.
        format: Format of the backbone, 'mmdet' or 'original'.
        num_classes: Number of classes, without background.
        meta: What the file says about itself.
    """

    def __init__(self, checkpoint: Checkpoint, kind: str, prefix: Optional[str] = None):
        """
        Args:
            checkpoint: File, or what it holds.
            kind: Key of `_HEADS`, what it is expected to be.
            prefix: What stands before the names of the backbone, needed where there are several.

        Raises:
            ValueError: It is something else. The message names what.
        """
        if isinstance(checkpoint, (str, PathLike)):
            checkpoint = read_checkpoint(checkpoint)
        converted = map_to_timm(checkpoint, prefix=prefix)
        if converted.format not in ('mmdet', 'original') or not converted.prefix.endswith('backbone.'):
            raise ValueError(
                f"Expected a {kind} of OpenMMLab or the original code (keys 'backbone.*', 'neck.*', ...), got a "
                f'{converted.format} model under {converted.prefix!r}.')
        state_dict, _, _ = unwrap(checkpoint)
        root = converted.prefix[:-len('backbone.')]
        self.heads: StateDict = {
            k[len(root):]: v for k, v in state_dict.items()
            if isinstance(k, str) and k.startswith(root) and not k.startswith(converted.prefix)}
        found = describe_heads(self.heads)
        if found is None or found[0] != kind:
            parts = sorted({k.partition('.')[0] for k in self.heads})
            what = f'a {found[0]}' if found else f'a model with {", ".join(parts) or "nothing"} beside its backbone'
            raise ValueError(f'Expected a {kind}, got {what}.')
        self.num_classes = found[1]
        self.format = converted.format
        self.info: Description = describe(converted.state_dict)
        variant = find_variant(self.info.depths, self.info.embed_dims)
        if variant is None:
            raise ValueError(
                f'Expected a PVT v1 variant, got depths {self.info.depths} and channels {self.info.embed_dims}.')
        self.variant: str = variant
        parts = ['norm', 'head'] + (['class_token'] if self.info.class_token or self.info.class_row else [])
        body = drop_parts(converted.state_dict, parts, self.info.class_row)
        self.body, _ = from_timm(body, 'timm_features')
        meta = checkpoint.get('meta')
        self.meta: Mapping[str, Any] = meta if isinstance(meta, Mapping) else {}

    def width(self, name: str, dim: int = 0) -> int:
        """Size of a parameter beside the backbone."""
        weight = self.heads.get(name)
        if not isinstance(weight, torch.Tensor) or weight.ndim <= dim or not weight.shape[dim]:
            raise ValueError(f'Missing in the checkpoint: {name}.')
        return weight.shape[dim]

    @property
    def model_args(self) -> Dict[str, Any]:
        return dict(img_size=self.info.img_size, in_chans=self.info.in_chans)

    @property
    def image_size(self) -> Dict[str, int]:
        """Shorter and longest side that the config in the file resizes images to, nothing if it does not say it."""
        text = self.meta.get('config') or self.meta.get('cfg')
        sizes = set(re.findall(r'\b(?:img_)?scale=\((\d+), (\d+)\)', text)) if isinstance(text, str) else set()
        if len(sizes) != 1:
            return {}
        longest, shorter = sizes.pop()
        return dict(min_size=int(shorter), max_size=int(longest))

    def dataset(self, key: str) -> Optional[List[Any]]:
        """'classes' or 'palette' of the dataset, None if the file does not have one per class."""
        inner = self.meta.get('dataset_meta')
        for source, name in ((inner, key), (inner, key.upper()), (self.meta, key.upper())):
            values = source.get(name) if isinstance(source, Mapping) else None
            if isinstance(values, (list, tuple)) and len(values) == self.num_classes:
                return list(values)
        return None

    def load(self, model: nn.Module, reference: StateDict, heads: StateDict) -> None:
        """Load all weights, or none.

        Args:
            model: The model.
            reference: What `model` holds beside its backbone, under the names of the file.
            heads: `self.heads` under the names of the model.

        Raises:
            ValueError: Something is missing, extra, or of another shape. It is named as in the file.
        """
        check_keys(self.heads, reference)
        weights = {**{f'backbone.body.{k}': v for k, v in self.body.items()}, **heads}
        check_keys(weights, model.state_dict())
        model.load_state_dict(weights, strict=True)
        if self.format == 'mmdet':
            backbone: Any = model.backbone
            for m in backbone.body.modules():
                if isinstance(m, nn.LayerNorm):
                    m.eps = _MMDET_EPS  # in patch embeddings and spatial reductions too, unlike the original


def _background_first(heads: StateDict, to_torchvision: bool) -> StateDict:
    """Move the class without objects, in a two-stage detector under torchvision's names."""
    out = dict(heads)
    for key, value in heads.items():
        if 'box_predictor.cls_score' in key:
            out[key] = value.roll(1 if to_torchvision else -1, dims=0)
        elif 'box_predictor.bbox_pred' in key or 'mask_predictor.mask_fcn_logits' in key:
            rows = 4 if 'bbox_pred' in key else 1
            out[key] = torch.cat([torch.zeros_like(value[:rows]), value]) if to_torchvision else value[rows:]
    return out


def detector_to_mmdet(model: Union[PvtRetinaNet, PvtFasterRCNN, PvtMaskRCNN], fmt: str = 'mmdet') -> StateDict:
    """Weights of a detector as mmdetection, or the original code, names and stacks them.

    Args:
        model: A detector of this package.
        fmt: 'mmdet', or 'original' for the backbone of the original code (whose position embedding of the last stage
            gets a row of zeros that it never uses).
    """
    state_dict = model.state_dict()
    return {**backbone_to_mmdet(state_dict, fmt), **_heads_to_mmdet(model, state_dict)}


def backbone_to_mmdet(state_dict: StateDict, fmt: str) -> StateDict:
    """Backbone of a detector or segmenter in format 'mmdet' or 'original', with 'backbone.' before all names."""
    features = {k[len('backbone.body.'):]: v for k, v in state_dict.items() if k.startswith('backbone.body.')}
    body, _ = from_timm(to_timm(features, 'timm_features')[0], fmt)
    if fmt == 'original':
        body['pos_embed4'] = torch.cat([torch.zeros_like(body['pos_embed4'][:, :1]), body['pos_embed4']], dim=1)
    return {f'backbone.{k}': v for k, v in body.items()}


def _heads_to_mmdet(model: nn.Module, state_dict: StateDict) -> StateDict:
    heads = {k: v for k, v in state_dict.items() if not k.startswith('backbone.body.')}
    return remap(_background_first(heads, to_torchvision=False), _TABLES[type(model)], to_timm=False)[0]


def _finish(model: Union[PvtRetinaNet, PvtFasterRCNN, PvtMaskRCNN], source: OpenMMLabCheckpoint) -> None:
    """Load the weights into a detector and name its classes."""
    heads, _, _ = remap(source.heads, _TABLES[type(model)])
    source.load(model, _heads_to_mmdet(model, model.state_dict()), _background_first(heads, to_torchvision=True))
    coco = coco_categories()
    names = source.dataset('classes') or (list(coco.values()) if source.num_classes == len(coco) else [])
    model.categories = [str(name) for name in names]
    model.category_ids = list(coco) if model.categories == list(coco.values()) else []
    model.eval()


def retinanet_from_mmdet(checkpoint: Checkpoint, prefix: Optional[str] = None, **kwargs: Any) -> PvtRetinaNet:
    """Whole RetinaNet checkpoint of mmdetection, or of the original PVT code, as a torchvision model.

    Args:
        checkpoint: File, of which nothing is executed, or what it holds: `backbone.*`, `neck.*` and `bbox_head.*`, bare
            or under 'state_dict'.
        prefix: What stands before the names of the backbone, needed where there are several.
        kwargs: Arguments for `PvtRetinaNet`, such as `min_size` (by default that of the config in the file, or 800).

    Returns:
        The model in evaluation mode. Variant, number of classes and pyramid width are read off the weights.

    Raises:
        ValueError: Not such a checkpoint. The message names what is wrong.
    """
    source = OpenMMLabCheckpoint(checkpoint, 'RetinaNet', prefix)
    channels = source.width('bbox_head.retina_cls.weight', 1)
    model = pvt_retinanet(
        source.variant, source.num_classes, out_channels=channels, model_args=source.model_args,
        **{**source.image_size, **kwargs})
    _finish(model, source)
    return model


def mask_rcnn_from_mmdet(checkpoint: Checkpoint, prefix: Optional[str] = None, **kwargs: Any) -> PvtMaskRCNN:
    """Whole Mask R-CNN checkpoint of mmdetection, or of the original PVT code, as a torchvision model.

    Args:
        checkpoint: File, of which nothing is executed, or what it holds: `backbone.*`, `neck.*`, `rpn_head.*` and
            `roi_head.*`, bare or under 'state_dict'.
        prefix: What stands before the names of the backbone, needed where there are several.
        kwargs: Arguments for `PvtMaskRCNN`, such as `min_size` (by default that of the config in the file, or 800).

    Returns:
        The model in evaluation mode. Variant, number of classes and widths are read off the weights.

    Raises:
        ValueError: Not such a checkpoint. The message names what is wrong.
    """
    source = OpenMMLabCheckpoint(checkpoint, 'Mask R-CNN', prefix)
    model = pvt_mask_rcnn(
        source.variant, source.num_classes,
        mask_channels=source.width('roi_head.mask_head.convs.0.conv.weight'), **_two_stage(source, kwargs))
    _finish(model, source)
    return model


def faster_rcnn_from_mmdet(checkpoint: Checkpoint, prefix: Optional[str] = None, **kwargs: Any) -> PvtFasterRCNN:
    """Whole Faster R-CNN checkpoint, otherwise as `mask_rcnn_from_mmdet`."""
    source = OpenMMLabCheckpoint(checkpoint, 'Faster R-CNN', prefix)
    model = pvt_faster_rcnn(source.variant, source.num_classes, **_two_stage(source, kwargs))
    _finish(model, source)
    return model


def _two_stage(source: OpenMMLabCheckpoint, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    return dict(
        out_channels=source.width('rpn_head.rpn_conv.weight'), model_args=source.model_args,
        box_channels=source.width('roi_head.bbox_head.fc_cls.weight', 1), **{**source.image_size, **kwargs})


def retinanet_coco(
        model_name: str = 'pvt_small',
        pretrained: bool = True,
        cache_dir: Optional[str] = None,
        **kwargs: Any,
) -> PvtRetinaNet:
    """OpenMMLab's RetinaNet on PVT, trained on COCO (published box AP: tiny 36.6, small 40.4, medium 41.7).

    The file is that of the tag `retinanet_coco`, downloaded once and checked against the hash in its name.

    Args:
        model_name: 'pvt_tiny', 'pvt_small' or 'pvt_medium'.
        pretrained: Load the weights.
        cache_dir: Where to keep the download, torch's hub folder by default.
        kwargs: Arguments for `PvtRetinaNet`, such as `min_size`.

    Returns:
        The model in evaluation mode. `categories` names its 80 classes, `category_ids` are their ids in COCO's files.
    """
    if not pretrained:
        model = pvt_retinanet(model_name, **kwargs).eval()
        model.category_ids, model.categories = list(coco_categories()), list(coco_categories().values())
        return model
    urls = {name: cfg.cfgs['retinanet_coco'].url for name, cfg in default_cfgs.items() if 'retinanet_coco' in cfg.cfgs}
    if model_name not in urls:
        raise ValueError(f'Expected model_name in {tuple(urls)}, got {model_name!r}.')
    checkpoint = load_state_dict_from_url(
        urls[model_name], model_dir=cache_dir, map_location='cpu', check_hash=True, weights_only=True)
    return retinanet_from_mmdet(checkpoint, **kwargs)
