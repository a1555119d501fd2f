""" PVT under torchvision's detectors, and OpenMMLab's COCO detectors as torchvision models.

`pvt_fpn_backbone` gives any torchvision detector a feature pyramid on PVT. `pvt_retinanet` is torchvision's RetinaNet
with the settings of the published PVT detectors, `retinanet_coco` and `retinanet_from_mmdet` fill it with weights of
OpenMMLab, without any of their packages.

What the published RetinaNet does other than torchvision's, and which class here does it:
  * the pyramid starts at stride 8, its levels P6 and P7 come from the backbone's output by two convolutions without
    activation between them: `LastLevelsOnInput`, a `LastLevelP6P7`
  * anchors are not rounded, and their strides are 8 to 128 whatever the image size: `FixedStrideAnchors`, an
    `AnchorGenerator`
  * the decoded size is bounded from below too: `ClippedBoxCoder`, a `BoxCoder`
  * sides of the resized image are rounded, not floored: `RoundingTransform`, a `GeneralizedRCNNTransform`
  * boxes that lie outside of the image and so have no area are dropped: `PvtRetinaNet`, a `RetinaNet`
  * OpenMMLab's backbone has eps 1e-6 in all of its norms: set while loading
The rest is a matter of arguments: 80 classes without background, 100 detections, mean and std for 0 to 1.
"""
import math
from os import PathLike
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.hub import load_state_dict_from_url
from torchvision.models.detection import RetinaNet, RetinaNet_ResNet50_FPN_Weights
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, batched_nms, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import create_model, get_pretrained_cfg

from ..checkpoints import map_to_timm, describe, drop_parts, from_timm, unwrap
from ..pvt import find_variant

__all__ = [
    'PvtFpnBackbone', 'PvtRetinaNet', 'check_detection_inputs', 'coco_categories', 'pvt_fpn_backbone', 'pvt_retinanet',
    'retinanet_coco', 'retinanet_from_mmdet',
]

StateDict = Dict[str, torch.Tensor]
Detection = Dict[str, torch.Tensor]

_EXTRA_LEVELS = ('pool', 'p6p7', 'p6p7_on_input', None)
_COCO_VARIANTS = ('pvt_tiny', 'pvt_small', 'pvt_medium')
_NUM_ANCHORS = 9  # 3 scales x 3 aspect ratios
_MMDET_EPS = 1e-6

# {n} is counted from 0, {p} is weight or bias
_NECK_AND_HEAD = (
    # torchvision                                  mmdetection                         n
    ('backbone.fpn.inner_blocks.{n}.0.{p}',        'neck.lateral_convs.{n}.conv.{p}',  3),
    ('backbone.fpn.layer_blocks.{n}.0.{p}',        'neck.fpn_convs.{n}.conv.{p}',      3),
    ('backbone.fpn.extra_blocks.p6.{p}',           'neck.fpn_convs.3.conv.{p}',        1),
    ('backbone.fpn.extra_blocks.p7.{p}',           'neck.fpn_convs.4.conv.{p}',        1),
    ('head.classification_head.conv.{n}.0.{p}',    'bbox_head.cls_convs.{n}.conv.{p}', 4),
    ('head.classification_head.cls_logits.{p}',    'bbox_head.retina_cls.{p}',         1),
    ('head.regression_head.conv.{n}.0.{p}',        'bbox_head.reg_convs.{n}.conv.{p}', 4),
    ('head.regression_head.bbox_reg.{p}',          'bbox_head.retina_reg.{p}',         1),
)


def coco_categories() -> Dict[int, str]:
    """COCO's 80 categories, id in the annotation files to name, in the order of class indices."""
    names = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta['categories']
    return {i: name for i, name in enumerate(names) if name not in ('__background__', 'N/A')}


class LastLevelsOnInput(LastLevelP6P7):
    """P6 and P7 from the last backbone feature, without an activation between them."""

    def forward(
            self,
            p: List[torch.Tensor],
            c: List[torch.Tensor],
            names: List[str],
    ) -> Tuple[List[torch.Tensor], List[str]]:
        p6 = self.p6(c[-1])
        p7 = self.p7(p6)
        p.extend([p6, p7])
        names.extend(['p6', 'p7'])
        return p, names


class PvtFpnBackbone(nn.Module):
    """Backbone of a torchvision detector: images (B, C, H, W) to a dict of maps with `out_channels` channels each.

    Attributes:
        body: The `features_only` model.
        fpn: torchvision's `FeaturePyramidNetwork` on it.
        out_channels: Channels of every map.
        names: Keys of the maps, finest first.
    """

    def __init__(self, body: nn.Module, fpn: FeaturePyramidNetwork, out_channels: int, names: Sequence[str]):
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.out_channels = out_channels
        self.names = list(names)

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        features = self.body(x)
        named: Dict[str, torch.Tensor] = {}
        for i, feature in enumerate(features):
            named[str(i)] = feature
        return self.fpn(named)


def pvt_fpn_backbone(
        model_name: str = 'pvt_small',
        pretrained: bool = False,
        out_channels: int = 256,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        extra_levels: Optional[str] = 'pool',
        **model_args: Any,
) -> PvtFpnBackbone:
    """A PVT feature pyramid for torchvision's detectors.

    Args:
        model_name: Name of a timm model, with or without a tag.
        pretrained: Load its weights.
        out_channels: Channels of the pyramid.
        out_indices: Stages to take, 0 to 3 have strides 4 to 32.
        extra_levels: Coarser levels. 'pool': one, subsampled (Faster and Mask R-CNN). 'p6p7': two convolutions on the
            last level of the pyramid (torchvision's RetinaNet and FCOS). 'p6p7_on_input': two on the last stage
            (the published PVT RetinaNet). None: none.
        model_args: More arguments for `timm.create_model`, such as `drop_path_rate`.

    Returns:
        A module with `out_channels`. Its maps are named '0', '1', ... and 'pool' or 'p6' and 'p7'.

    Raises:
        ValueError: An argument is outside of what it accepts.
    """
    if extra_levels not in _EXTRA_LEVELS:
        raise ValueError(f'Expected extra_levels in {_EXTRA_LEVELS}, got {extra_levels!r}.')
    if out_channels < 1:
        raise ValueError(f'Expected out_channels of at least 1, got {out_channels}.')
    rising = not isinstance(out_indices, int) and list(out_indices) == sorted(set(out_indices))
    if not rising or min(out_indices, default=-1) < 0:
        raise ValueError(f'Expected out_indices to be rising stage indices such as (0, 1, 2, 3), got {out_indices}.')
    body = create_model(
        model_name, pretrained=pretrained, features_only=True, out_indices=tuple(out_indices), **model_args)
    channels = body.feature_info.channels()
    extra: Optional[ExtraFPNBlock] = None
    names = [str(i) for i in range(len(channels))]
    if extra_levels == 'pool':
        extra = LastLevelMaxPool()
        names += ['pool']
    elif extra_levels is not None:
        on_input = extra_levels == 'p6p7_on_input'
        extra = LastLevelsOnInput(channels[-1], out_channels) if on_input else LastLevelP6P7(out_channels, out_channels)
        names += ['p6', 'p7']
    fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks=extra)
    return PvtFpnBackbone(body, fpn, out_channels, names)


class FixedStrideAnchors(AnchorGenerator):
    """Anchors that are not rounded, on fixed strides.

    torchvision's take the image size over the size of the map as stride, which is 61 and not 64 for a map of 13 on 800
    pixels.
    """

    def __init__(
            self,
            strides: Sequence[int] = (8, 16, 32, 64, 128),
            base_scale: float = 4.,
            scales_per_octave: int = 3,
            aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    ):
        self.strides = tuple(strides)
        scales = [base_scale * 2 ** (i / scales_per_octave) for i in range(scales_per_octave)]
        super().__init__(
            sizes=tuple(tuple(stride * scale for scale in scales) for stride in self.strides),
            aspect_ratios=(tuple(aspect_ratios),) * len(self.strides),
        )

    def generate_anchors(
            self,
            scales: List[float],
            aspect_ratios: List[float],
            dtype: torch.dtype = torch.float32,
            device: Any = 'cpu',
    ) -> torch.Tensor:
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)
        h_ratios = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        w_ratios = 1 / h_ratios
        ws = (w_ratios[:, None] * sizes[None, :]).flatten()
        hs = (h_ratios[:, None] * sizes[None, :]).flatten()
        return torch.stack([-ws, -hs, ws, hs], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: List[torch.Tensor]) -> List[torch.Tensor]:
        if len(feature_maps) != len(self.strides):
            raise ValueError(f'Expected {len(self.strides)} feature maps for as many strides, got {len(feature_maps)}.')
        device = feature_maps[0].device
        # half precision cannot tell pixels apart from 256 (bfloat16) or 2048 (float16) on
        dtype = torch.float64 if feature_maps[0].dtype == torch.float64 else torch.float32
        self.set_cell_anchors(dtype, device)
        strides = [[torch.tensor(s, device=device)] * 2 for s in self.strides]
        anchors = torch.cat(self.grid_anchors([list(f.shape[-2:]) for f in feature_maps], strides))
        return [anchors for _ in image_list.image_sizes]


class ClippedBoxCoder(BoxCoder):
    """Box coder whose change of size is bounded on both sides, and that decodes in float32 or better."""

    def decode_single(self, rel_codes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        if rel_codes.dtype != torch.float64:
            rel_codes = rel_codes.float()
        centre, size = rel_codes[:, :2], rel_codes[:, 2:].clamp(min=-self.bbox_xform_clip)
        return super().decode_single(torch.cat([centre, size], dim=1), boxes)


class RoundingTransform(GeneralizedRCNNTransform):
    """Resizing to rounded instead of floored sides, none of them below 1."""

    def resize(
            self,
            image: torch.Tensor,
            target: Optional[Detection] = None,
    ) -> Tuple[torch.Tensor, Optional[Detection]]:
        if self.fixed_size is not None or (self.training and self._skip_resize):
            return super().resize(image, target)
        h, w = image.shape[-2:]
        min_size = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
        scale = min(self.max_size / max(h, w), min_size / min(h, w))
        new_h, new_w = max(int(h * scale + 0.5), 1), max(int(w * scale + 0.5), 1)
        if (new_h, new_w) != (h, w):
            image = F.interpolate(image[None], size=(new_h, new_w), mode='bilinear', align_corners=False)[0]
        if target is not None:
            ratios = target['boxes'].new_tensor([new_w / w, new_h / h, new_w / w, new_h / h])
            target = dict(target, boxes=target['boxes'] * ratios)
        return image, target


def check_detection_inputs(
        images: Sequence[torch.Tensor],
        targets: Optional[Sequence[Detection]] = None,
        num_classes: Optional[int] = None,
        first_label: int = 0,
        in_chans: int = 3,
        dtype: Optional[torch.dtype] = None,
) -> None:
    """Refuse what a torchvision detector would fail on without saying why, or would train on wrongly.

    `PvtRetinaNet` does this by itself. Call it before other detectors of torchvision, with `first_label=1` where label
    0 is the background.

    Args:
        images: Images (C, H, W), of any sizes.
        targets: 'boxes' (N, 4) as x1, y1, x2, y2 and 'labels' (N,) per image.
        num_classes: Labels are below it. Not checked if None.
        first_label: Smallest label.
        in_chans: Channels of an image.
        dtype: Type of the images, that of the first one if None.

    Raises:
        ValueError: The first thing that is wrong, and where it is.
    """
    for i, image in enumerate(images):
        if not isinstance(image, torch.Tensor) or image.ndim != 3 or image.shape[0] != in_chans or 0 in image.shape:
            got = list(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
            raise ValueError(f'Expected image {i} as a tensor ({in_chans}, height, width), got {got}.')
        if not image.is_floating_point():
            raise ValueError(
                f'Expected image {i} as floats from 0 to 1, got {image.dtype}: use image.float() / 255 for uint8.')
        dtype = dtype or image.dtype
        if image.dtype != dtype:
            raise ValueError(f'Expected image {i} of {dtype}, got {image.dtype}: use image.to({dtype}).')
    if targets is None:
        return
    if len(targets) != len(images):
        raise ValueError(f'Expected one target per image ({len(images)}), got {len(targets)}.')
    for i, target in enumerate(targets):
        missing = [k for k in ('boxes', 'labels') if not isinstance(target.get(k), torch.Tensor)]
        if missing:
            raise ValueError(f'Expected tensors boxes and labels in target {i}, missing: {", ".join(missing)}.')
        boxes, labels = target['boxes'], target['labels']
        if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
            raise ValueError(
                f'Expected boxes of target {i} as floats (N, 4), got {list(boxes.shape)} of {boxes.dtype}. '
                f'An image without objects has torch.zeros(0, 4).')
        if labels.shape != boxes.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f'Expected labels of target {i} as int64 ({len(boxes)},), one per box, got {list(labels.shape)} of '
                f'{labels.dtype}.')
        if not len(boxes):
            continue
        bad = ~(boxes.isfinite().all(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1))
        if bad.any():
            n = int(bad.nonzero()[0])
            raise ValueError(
                f'Expected boxes with x1 < x2 and y1 < y2, got {boxes[n].tolist()} in target {i}, box {n}. '
                f'Leave out boxes without area.')
        lo, hi = int(labels.min()), int(labels.max())
        if lo < first_label or (num_classes is not None and hi >= num_classes):
            top = '' if num_classes is None else f' to {num_classes - 1}'
            wrong = lo if lo < first_label else hi
            raise ValueError(f'Expected labels from {first_label}{top}, got {wrong} in target {i}.')


class PvtRetinaNet(RetinaNet):
    """torchvision's RetinaNet with the settings of the published PVT detectors.

    Takes a list of images (3, H, W) of any sizes with values from 0 to 1. In evaluation it returns one dict of 'boxes',
    'scores' and 'labels' per image, in training (with `targets`) a dict of losses. Labels count from 0 and there is no
    background class.

    Attributes:
        num_classes: Number of classes.
        categories: Their names, empty if not known.
        category_ids: Their ids in COCO's annotation files, empty for other classes.
    """

    def __init__(
            self,
            backbone: PvtFpnBackbone,
            num_classes: int = 80,
            min_size: Union[int, Tuple[int, ...]] = 800,
            max_size: int = 1333,
            image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
            image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
            score_thresh: float = 0.05,
            nms_thresh: float = 0.5,
            detections_per_img: int = 100,
            topk_candidates: int = 1000,
            **kwargs: Any,
    ):
        """
        Args:
            backbone: Five levels with strides 8 to 128.
            num_classes: Number of classes.
            min_size: Shorter side that images are resized to, several to choose from in training.
            max_size: Longest side after that.
            image_mean: Mean per channel of images from 0 to 1.
            image_std: Standard deviation per channel.
            score_thresh: Lowest score of a detection.
            nms_thresh: Overlap above which the lower of two boxes of a class is dropped.
            detections_per_img: Most detections per image.
            topk_candidates: Most detections per level before overlaps are dropped.
            kwargs: More arguments for torchvision's RetinaNet.
        """
        super().__init__(
            backbone,
            num_classes,
            anchor_generator=FixedStrideAnchors(),
            score_thresh=score_thresh,
            nms_thresh=nms_thresh,
            detections_per_img=detections_per_img,
            topk_candidates=topk_candidates,
            **kwargs,
        )
        self.num_classes = num_classes
        self.categories: List[str] = []
        self.category_ids: List[int] = []
        self.transform = RoundingTransform(
            min_size, max_size, list(image_mean), list(image_std), size_divisible=32)
        self.box_coder = ClippedBoxCoder(weights=(1., 1., 1., 1.), bbox_xform_clip=math.log(1000 / 16))

    def forward(
            self,
            images: Sequence[torch.Tensor],
            targets: Optional[Sequence[Detection]] = None,
    ) -> Union[Dict[str, torch.Tensor], List[Detection]]:
        if self.training and not len(images):
            raise ValueError('Expected at least one image to train on, got none.')
        if self.training and targets is None:
            raise ValueError('Expected targets in training. Call model.eval() to detect.')
        weight = self.head.classification_head.cls_logits.weight
        check_detection_inputs(images, targets, self.num_classes, dtype=weight.dtype)
        if not len(images):
            return []
        return super().forward(images, targets)

    def postprocess_detections(
            self,
            head_outputs: Dict[str, List[torch.Tensor]],
            anchors: List[List[torch.Tensor]],
            image_shapes: List[Tuple[int, int]],
    ) -> List[Detection]:
        detections = []
        for i, image_shape in enumerate(image_shapes):
            boxes, scores, labels = [], [], []
            for logits, deltas, level_anchors in zip(
                    head_outputs['cls_logits'], head_outputs['bbox_regression'], anchors[i]):
                # at most `topk_candidates` pairs of anchor and class per level
                level_scores = logits[i].flatten()
                level_scores = (level_scores if level_scores.dtype == torch.float64 else level_scores.float()).sigmoid()
                index = torch.where(level_scores > self.score_thresh)[0]
                level_scores, order = level_scores[index].topk(min(self.topk_candidates, len(index)))
                index = index[order]
                anchor = index // self.num_classes
                level_boxes = self.box_coder.decode_single(deltas[i][anchor], level_anchors[anchor])
                boxes.append(clip_boxes_to_image(level_boxes, image_shape))
                scores.append(level_scores)
                labels.append(index % self.num_classes)
            boxes, scores, labels = torch.cat(boxes), torch.cat(scores), torch.cat(labels)

            seen = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # the others lie outside of the image
            boxes, scores, labels = boxes[seen], scores[seen], labels[seen]
            keep = batched_nms(boxes, scores, labels, self.nms_thresh)[:self.detections_per_img]
            detections.append({'boxes': boxes[keep], 'scores': scores[keep], 'labels': labels[keep]})
        return detections


def pvt_retinanet(
        model_name: str = 'pvt_small',
        num_classes: int = 80,
        pretrained_backbone: bool = False,
        out_channels: int = 256,
        model_args: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> PvtRetinaNet:
    """RetinaNet on PVT as published, with new neck and head.

    Args:
        model_name: Name of a timm model, with or without a tag.
        pretrained_backbone: Load its weights.
        num_classes: Number of classes, without a background class. Labels are 0 to `num_classes - 1`.
        out_channels: Channels of pyramid and head.
        model_args: Arguments for `timm.create_model`, such as `drop_path_rate`.
        kwargs: Arguments for `PvtRetinaNet`, such as `min_size`.

    Raises:
        ValueError: An argument is outside of what it accepts.
    """
    if num_classes < 1:
        raise ValueError(f'Expected num_classes of at least 1, got {num_classes}.')
    backbone = pvt_fpn_backbone(
        model_name,
        pretrained=pretrained_backbone,
        out_channels=out_channels,
        out_indices=(1, 2, 3),
        extra_levels='p6p7_on_input',
        **(model_args or {}),
    )
    return PvtRetinaNet(backbone, num_classes, **kwargs)


def _neck_and_head(state_dict: Mapping[str, Any], prefix: str) -> StateDict:
    """Neck and head of a detector under torchvision's names."""
    names = {
        prefix + theirs.format(n=n, p=p): ours.format(n=n, p=p)
        for ours, theirs, count in _NECK_AND_HEAD for n in range(count) for p in ('weight', 'bias')}
    parts = tuple(f'{prefix}{part}.' for part in ('neck', 'bbox_head'))
    unknown = [k for k in state_dict if isinstance(k, str) and k.startswith(parts) and k not in names]
    missing = [k for k in names if not isinstance(state_dict.get(k), torch.Tensor)]
    if missing or unknown:
        what = f'missing {", ".join(missing[:4])}' if missing else f'not part of it: {", ".join(unknown[:4])}'
        raise ValueError(
            f"Expected neck and bbox_head of OpenMMLab's RetinaNet (FPN with 3 + 2 levels, 4 convolutions per branch), "
            f'{what} ({len(missing)} missing, {len(unknown)} unknown).')
    return {ours: state_dict[theirs] for theirs, ours in names.items()}


def _class_names(checkpoint: Mapping[str, Any]) -> List[str]:
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, Mapping) else {}
    inner = meta.get('dataset_meta')
    for source, key in ((meta, 'CLASSES'), (inner, 'classes'), (inner, 'CLASSES')):
        names = source.get(key) if isinstance(source, Mapping) else None
        if isinstance(names, (list, tuple)):
            return [str(name) for name in names]
    return []


def retinanet_from_mmdet(
        checkpoint: Union[str, 'PathLike[str]', Mapping[str, Any]],
        **kwargs: Any,
) -> PvtRetinaNet:
    """Whole RetinaNet checkpoint of mmdetection, or of the original PVT code, as a torchvision model.

    Args:
        checkpoint: File (loaded with `weights_only=True`) or what it holds: `backbone.*`, `neck.*` and `bbox_head.*`,
            bare or under 'state_dict'.
        kwargs: Arguments for `PvtRetinaNet`, such as `min_size`.

    Returns:
        The model in evaluation mode. Variant, number of classes and pyramid width are read off the weights.

    Raises:
        ValueError: Not such a checkpoint. The message names what is wrong.
    """
    if isinstance(checkpoint, (str, PathLike)):
        checkpoint = torch.load(checkpoint, map_location='cpu', weights_only=True)
    state_dict, _, _ = unwrap(checkpoint)
    converted = map_to_timm(checkpoint)
    if converted.format not in ('mmdet', 'original') or not converted.prefix.endswith('backbone.'):
        raise ValueError(
            f"Expected a detector of mmdetection or the original code (keys 'backbone.*', 'neck.*', 'bbox_head.*'), "
            f'got a {converted.format} model under {converted.prefix!r}.')
    info = describe(converted.state_dict)
    variant = find_variant(info.depths, info.embed_dims)
    if variant is None:
        raise ValueError(f'Expected a PVT v1 variant, got depths {info.depths} and channels {info.embed_dims}.')
    parts = ['norm', 'head'] + (['class_token'] if info.class_token or info.class_row else [])
    body, _ = from_timm(drop_parts(converted.state_dict, parts, info.class_row), 'timm_features')
    weights = {f'backbone.body.{k}': v for k, v in body.items()}
    weights.update(_neck_and_head(state_dict, converted.prefix[:-len('backbone.')]))

    logits = weights['head.classification_head.cls_logits.weight']
    num_classes, rest = divmod(logits.shape[0], _NUM_ANCHORS)
    if rest or not num_classes:
        raise ValueError(f'Expected class scores for {_NUM_ANCHORS} anchors, got {logits.shape[0]} rows in retina_cls.')
    model = pvt_retinanet(
        variant,
        num_classes,
        out_channels=logits.shape[1],
        model_args=dict(img_size=info.img_size, in_chans=info.in_chans),
        **kwargs,
    )
    expected = model.state_dict()
    missing = [k for k in expected if k not in weights]
    extra = [k for k in weights if k not in expected]
    if missing or extra:
        what = 'Missing in' if missing else 'Not part of the model, in'
        raise ValueError(f'{what} the checkpoint: {", ".join((missing or extra)[:4])}.')
    wrong = [f'{k} {list(v.shape)} instead of {list(expected[k].shape)}' for k, v in weights.items()
             if v.shape != expected[k].shape]
    if wrong:
        raise ValueError(f'Wrong shape in the checkpoint: {", ".join(wrong[:4])}.')
    model.load_state_dict(weights, strict=True)
    if converted.format == 'mmdet':
        for m in model.backbone.body.modules():
            if isinstance(m, nn.LayerNorm):
                m.eps = _MMDET_EPS  # in patch embeddings and spatial reductions too, unlike the original
    names = _class_names(checkpoint)
    coco = coco_categories()
    if len(names) != num_classes:
        names = list(coco.values()) if num_classes == len(coco) else []
    model.categories = names
    model.category_ids = list(coco) if names == list(coco.values()) else []
    return model.eval()


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

    Raises:
        ValueError: There is no such detector.
        RuntimeError: The weights could not be loaded.
    """
    if model_name not in _COCO_VARIANTS:
        raise ValueError(f'Expected model_name in {_COCO_VARIANTS}, got {model_name!r}.')
    if pretrained:
        cfg = get_pretrained_cfg(f'{model_name}.retinanet_coco')
        checkpoint = load_state_dict_from_url(
            cfg.url, model_dir=cache_dir, map_location='cpu', check_hash=True, weights_only=True)
        return retinanet_from_mmdet(checkpoint, **kwargs)
    model = pvt_retinanet(model_name, **kwargs)
    if model.num_classes == len(coco_categories()):
        model.category_ids, model.categories = list(coco_categories()), list(coco_categories().values())
    return model.eval()
