""" What the published detectors do other than torchvision's, in subclasses of torchvision's own parts. """
import inspect
import math
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type, TypeVar, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops._utils import convert_boxes_to_roi_format
from torchvision.ops.poolers import LevelMapper

from .fpn import PvtFpnBackbone

Detection = Dict[str, torch.Tensor]
Detector = TypeVar('Detector', bound='PublishedDetector')


class FixedStrideAnchors(AnchorGenerator):
    """Anchors of mmdetection: not rounded, centred on multiples of fixed strides.

    torchvision's take the image size over the size of the map as stride, which is 61 and not 64 for a map of 13 on 800
    pixels.
    """

    def __init__(self, strides: Sequence[int], scales: Sequence[float]):
        """Sides of the square ones are `scales` times the stride of their level."""
        self.strides = tuple(strides)
        sizes = tuple(tuple(stride * scale for scale in scales) for stride in self.strides)
        super().__init__(sizes, ((0.5, 1.0, 2.0),) * len(sizes))

    def generate_anchors(
            self, scales: List[float], aspect_ratios: List[float],
            dtype: torch.dtype = torch.float32, device: Any = 'cpu') -> torch.Tensor:
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)
        h_ratios = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        ws, hs = torch.outer(1 / h_ratios, sizes).flatten(), torch.outer(h_ratios, sizes).flatten()
        return torch.stack([-ws, -hs, ws, hs], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: List[torch.Tensor]) -> List[torch.Tensor]:
        # half precision cannot tell pixels apart from 256 (bfloat16) or 2048 (float16) on
        dtype = torch.promote_types(feature_maps[0].dtype, torch.float32)
        self.set_cell_anchors(dtype, feature_maps[0].device)
        anchors = torch.cat(self.grid_anchors([f.shape[-2:] for f in feature_maps], [(s, s) for s in self.strides]))
        return [anchors for _ in image_list.image_sizes]


class ClippedBoxCoder(BoxCoder):
    """Box coder whose change of size is bounded on both sides, and that decodes in float32 or better."""

    def decode_single(self, rel_codes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        codes = rel_codes.to(torch.promote_types(rel_codes.dtype, torch.float32)).unflatten(1, (-1, 4))
        lowest = codes.new_tensor(self.weights[2:]) * -self.bbox_xform_clip
        codes = torch.cat([codes[..., :2], codes[..., 2:].maximum(lowest)], dim=-1)
        return super().decode_single(codes.flatten(1), boxes)


class AlignedRoIAlign(MultiScaleRoIAlign):
    """RoIAlign with half-pixel alignment on maps with strides 4 to 32, and as many samples as a box is large.

    torchvision's infers strides from the first image that it sees, and has no such alignment.
    """

    def __init__(self, output_size: int):
        super().__init__(['0', '1', '2', '3'], output_size, sampling_ratio=0)

    def forward(
            self, x: Dict[str, torch.Tensor], boxes: List[torch.Tensor],
            image_shapes: List[Tuple[int, int]]) -> torch.Tensor:
        maps = [x[name] for name in self.featmap_names]
        rois = convert_boxes_to_roi_format(boxes).to(maps[0].dtype)
        levels = LevelMapper(2, 5)(boxes)
        out = maps[0].new_zeros(len(rois), maps[0].shape[1], *self.output_size)
        for level, feature in enumerate(maps):
            index = torch.where(levels == level)[0]
            out[index] = roi_align(
                feature, rois[index], self.output_size, 1 / (4 * 2 ** level), self.sampling_ratio, aligned=True)
        return out


def paste_masks(masks: torch.Tensor, boxes: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Put masks (N, 1, M, M) that span their boxes (N, 4) into an image of height and width `size`: (N, 1, H, W).

    They are sampled at the centres of its pixels. torchvision rounds a box to pixels, which moves its mask.
    """
    out = masks.new_zeros(len(masks), 1, *size)
    for n, (mask, (x1, y1, x2, y2)) in enumerate(zip(masks, boxes.tolist())):
        left, right = max(math.floor(x1) - 1, 0), min(math.ceil(x2) + 1, size[1])
        top, bottom = max(math.floor(y1) - 1, 0), min(math.ceil(y2) + 1, size[0])
        x = (torch.arange(left, right).to(mask) + 0.5 - x1) / (x2 - x1) * 2 - 1
        y = (torch.arange(top, bottom).to(mask) + 0.5 - y1) / (y2 - y1) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing='xy'), dim=-1)
        out[n, :, top:bottom, left:right] = F.grid_sample(mask[None], grid[None], align_corners=False)[0]
    return out


class RoundingTransform(GeneralizedRCNNTransform):
    """Resizing to rounded instead of floored sides, none of them below 1, and back without rounding boxes of masks."""

    def resize(
            self, image: torch.Tensor, target: Optional[Detection] = None) -> Tuple[torch.Tensor, Optional[Detection]]:
        h, w = image.shape[-2:]
        size = self.fixed_size  # width, height
        if size is None:
            min_size = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
            scale = min(self.max_size / max(h, w), min_size / min(h, w))
            size = max(int(w * scale + 0.5), 1), max(int(h * scale + 0.5), 1)
        sized = GeneralizedRCNNTransform(0, 0, self.image_mean, self.image_std, fixed_size=size)
        return sized.eval().resize(image, target)

    def postprocess(
            self, result: List[Detection], image_shapes: List[Tuple[int, int]],
            original_image_sizes: List[Tuple[int, int]]) -> List[Detection]:
        masks = [found.pop('masks', None) for found in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for found, mask, size in zip(result, masks, original_image_sizes):
            if mask is not None:
                found['masks'] = paste_masks(mask, found['boxes'], size)
        return result


class PublishedDetector(nn.Module):
    """What the detectors here have beside their torchvision classes, which follow it among the bases.

    They take a list of images (3, H, W) of any sizes with values from 0 to 1. In evaluation they return one dict of
    'boxes', 'scores' and 'labels' per image, in training (with `targets`) a dict of losses. Refused are targets that
    torchvision would train on wrongly without a word, and keywords that it would swallow.

    Attributes:
        num_classes: Number of classes, the background not counted.
        first_label: Label of the first class: 0, or 1 where label 0 is the background.
        categories: Names of the classes, the first is that of `first_label`. Empty if not known.
    """
    first_label = 0
    levels: Dict[str, Any] = {}  # of the pyramid, arguments for `PvtFpnBackbone`
    transform: Any

    def __init__(self, backbone: PvtFpnBackbone, num_classes: int, *args: Any, **kwargs: Any):
        known = (*inspect.signature(super().__init__).parameters, 'size_divisible', 'fixed_size')
        unknown = [k for k in kwargs if k not in known]
        if unknown:
            raise TypeError(f'{type(self).__name__} got unexpected keyword arguments: {", ".join(unknown)}')
        super().__init__(backbone, *args, **kwargs)
        self.num_classes = num_classes
        self.categories: List[str] = []
        t = self.transform
        self.transform = RoundingTransform(
            t.min_size, t.max_size, t.image_mean, t.image_std, t.size_divisible, t.fixed_size)
        parts: Any = [m for m in self.modules() if hasattr(m, 'box_coder')]
        for part in parts:
            part.box_coder = ClippedBoxCoder(part.box_coder.weights)

    @classmethod
    def on_pvt(
            cls: Type[Detector], model_name: str = 'pvt_small', num_classes: int = 80,
            pretrained_backbone: bool = False, out_channels: int = 256, model_args: Optional[Dict[str, Any]] = None,
            **kwargs: Any) -> Detector:
        """The detector on PVT as published, with new neck and heads.

        Args:
            model_name: Name of a timm model, with or without a tag.
            num_classes: Number of classes, without a background class.
            pretrained_backbone: Load its weights.
            out_channels: Channels of the pyramid, and of RetinaNet's head.
            model_args: Arguments for `timm.create_model`, such as `drop_path_rate`.
            kwargs: Arguments for the class, such as `min_size`.
        """
        backbone = PvtFpnBackbone(model_name, pretrained_backbone, out_channels, **cls.levels, **(model_args or {}))
        return cls(backbone, num_classes, **kwargs)

    def forward(
            self, images: Sequence[torch.Tensor], targets: Optional[Sequence[Detection]] = None,
    ) -> Union[Dict[str, torch.Tensor], List[Detection]]:
        if targets is not None and len(targets) != len(images):
            raise ValueError(f'Expected one target per image ({len(images)}), got {len(targets)}.')
        first, last = self.first_label, self.first_label + self.num_classes - 1
        for i, target in enumerate(targets or ()):
            boxes, labels = target['boxes'], target['labels']
            if labels.shape != boxes.shape[:1]:
                raise ValueError(f'Expected one label per box ({len(boxes)}) in target {i}, got {list(labels.shape)}.')
            if not boxes.isfinite().all():
                raise ValueError(f'Expected boxes of numbers in target {i}, got NaN or infinity.')
            wrong = labels[(labels < first) | (labels > last)]
            if len(wrong):
                raise ValueError(f'Expected labels from {first} to {last}, got {int(wrong[0])} in target {i}.')
        return super().forward(images, targets)
