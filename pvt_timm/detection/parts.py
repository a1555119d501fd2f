""" What the published detectors do other than torchvision's, in subclasses of torchvision's own parts. """
import inspect
import math
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

Detection = Dict[str, torch.Tensor]


class FixedStrideAnchors(AnchorGenerator):
    """Anchors of mmdetection: not rounded, centred on multiples of fixed strides.

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
            self, scales: List[float], aspect_ratios: List[float],
            dtype: torch.dtype = torch.float32, device: Any = 'cpu') -> torch.Tensor:
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

    def __init__(self, weights: Tuple[float, float, float, float] = (1., 1., 1., 1.)):
        super().__init__(weights, bbox_xform_clip=math.log(1000 / 16))

    def decode_single(self, rel_codes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        if rel_codes.dtype != torch.float64:
            rel_codes = rel_codes.float()
        codes = rel_codes.unflatten(1, (-1, 4))
        lowest = codes.new_tensor(self.weights[2:]) * -self.bbox_xform_clip
        codes = torch.cat([codes[..., :2], codes[..., 2:].maximum(lowest)], dim=-1)
        return super().decode_single(codes.flatten(1), boxes)


def paste_masks(masks: torch.Tensor, boxes: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Put masks (N, 1, M, M) that span their boxes (N, 4) into an image of height and width `size`: (N, 1, H, W).

    They are sampled at the centres of its pixels. torchvision rounds a box to pixels, which moves its mask.
    """
    out = masks.new_zeros(len(masks), 1, *size)
    for n, (mask, box) in enumerate(zip(masks, boxes.to(masks.dtype))):
        axes, window = [], []
        for low, high, length in ((box[0], box[2], size[1]), (box[1], box[3], size[0])):
            first, last = max(int(low.floor()) - 1, 0), min(int(high.ceil()) + 1, length)
            pixels = torch.arange(first, max(first, last), device=mask.device, dtype=mask.dtype) + 0.5
            axes.append((pixels - low) / (high - low) * 2 - 1)
            window.append(slice(first, max(first, last)))
        if all(len(axis) for axis in axes):
            grid = torch.stack(torch.meshgrid(*axes, indexing='xy'), dim=-1)
            out[n, :, window[1], window[0]] = F.grid_sample(mask[None], grid[None], align_corners=False)[0]
    return out


class RoundingTransform(GeneralizedRCNNTransform):
    """Resizing to rounded instead of floored sides, none of them below 1, and back without rounding boxes of masks."""

    def resize(
            self, image: torch.Tensor, target: Optional[Detection] = None) -> Tuple[torch.Tensor, Optional[Detection]]:
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
            if 'masks' in target:
                target['masks'] = F.interpolate(target['masks'][:, None].float(), (new_h, new_w))[:, 0].byte()
        return image, target

    def postprocess(
            self, result: List[Detection], image_shapes: List[Tuple[int, int]],
            original_image_sizes: List[Tuple[int, int]]) -> List[Detection]:
        if self.training:
            return result
        masks = [found.pop('masks', None) for found in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for found, mask, size in zip(result, masks, original_image_sizes):
            if mask is not None:
                found['masks'] = paste_masks(mask, found['boxes'], size)
        return result


def check_detection_inputs(
        images: Sequence[torch.Tensor],
        targets: Optional[Sequence[Detection]] = None,
        num_classes: Optional[int] = None,
        first_label: int = 0,
        in_chans: int = 3,
) -> None:
    """Refuse what torchvision's detectors would train on wrongly without a word, or fail on without saying why.

    The detectors of this package do this by themselves, call it before others of torchvision.

    Args:
        images: Images (in_chans, H, W), of any sizes.
        targets: 'boxes' (N, 4) as x1, y1, x2, y2 and 'labels' (N,) per image.
        num_classes: Number of classes without background, None for any.
        first_label: Label of the first class, 1 where label 0 is the background.

    Raises:
        ValueError: The first thing that is wrong, and where it is.
    """
    last_label = first_label + num_classes - 1 if num_classes else float('inf')
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != in_chans or 0 in image.shape:
            raise ValueError(f'Expected image {i} as ({in_chans}, height, width), got {list(image.shape)}.')
    if targets is None:
        return
    if len(targets) != len(images):
        raise ValueError(f'Expected one target per image ({len(images)}), got {len(targets)}.')
    for i, target in enumerate(targets):
        boxes, labels = target['boxes'], target['labels']
        if labels.shape != boxes.shape[:1]:
            raise ValueError(f'Expected one label per box ({len(boxes)}) in target {i}, got {list(labels.shape)}.')
        if not boxes.isfinite().all():
            raise ValueError(f'Expected boxes of numbers in target {i}, got NaN or infinity.')
        wrong = labels[(labels < first_label) | (labels > last_label)]
        if len(wrong):
            raise ValueError(
                f'Expected labels from {first_label} to {last_label}, got {int(wrong[0])} in target {i}.')


class PublishedDetector(nn.Module):
    """What the detectors here have beside their torchvision classes: checked images and targets, names of classes.

    Attributes:
        num_classes: Number of classes, the background not counted.
        first_label: Label of the first class: 0, or 1 where label 0 is the background.
        categories: Names of the classes, the first is that of `first_label`. Empty if not known.
        category_ids: Their ids in COCO's annotation files, empty for other classes.
    """
    first_label = 0
    transform: Any

    def _publish(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.categories: List[str] = []
        self.category_ids: List[int] = []
        t = self.transform
        self.transform = RoundingTransform(
            t.min_size, t.max_size, t.image_mean, t.image_std, t.size_divisible, t.fixed_size)

    def forward(
            self, images: Sequence[torch.Tensor], targets: Optional[Sequence[Detection]] = None,
    ) -> Union[Dict[str, torch.Tensor], List[Detection]]:
        in_chans = len(self.transform.image_mean)
        check_detection_inputs(images, targets, self.num_classes, self.first_label, in_chans)
        if not len(images):
            if self.training:
                raise ValueError('Expected at least one image to train on, got none.')
            return []
        return super().forward(images, targets)


def check_keywords(kwargs: Mapping[str, Any], cls: type) -> None:
    """Refuse keywords that torchvision's `cls` would swallow, as Python does elsewhere."""
    known = (*inspect.signature(cls).parameters, 'size_divisible', 'fixed_size')
    unknown = [k for k in kwargs if k not in known]
    if unknown:
        raise TypeError(f'{cls.__name__} got unexpected keyword arguments: {", ".join(unknown)}')
