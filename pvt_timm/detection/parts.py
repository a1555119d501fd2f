""" Parts in which the published detectors differ from torchvision's, as subclasses of torchvision's parts. """
import inspect
import math
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type, TypeVar, Union

import torch
import torch.nn as nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops._utils import convert_boxes_to_roi_format
from torchvision.ops.poolers import LevelMapper

from .checks import check_image, check_targets
from .fpn import PvtFpnBackbone, usual_normalisation

Detection = Dict[str, torch.Tensor]
Detector = TypeVar('Detector', bound='PublishedDetector')


class FixedStrideAnchors(AnchorGenerator):
    """Anchors of mmdetection: not rounded, centred on multiples of fixed strides.

    torchvision divides the image size by the size of the feature map to get the stride. For 800 pixels and a map of 13
    positions that gives 61 instead of 64.
    """

    def __init__(self, strides: Sequence[int], scales: Sequence[float]):
        """
        Args:
            strides: Stride of each level.
            scales: Sides of the square anchors, in strides of their level.
        """
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
        dtype = torch.promote_types(feature_maps[0].dtype, torch.float32)  # see `in_full`
        self.set_cell_anchors(dtype, feature_maps[0].device)
        anchors = torch.cat(self.grid_anchors([f.shape[-2:] for f in feature_maps], [(s, s) for s in self.strides]))
        return [anchors for _ in image_list.image_sizes]


def in_full(x: torch.Tensor) -> torch.Tensor:
    """Return the same numbers in float32, or in float64 if that is their type.

    Half precision is not used for coordinates and scores. It cannot tell neighbouring pixels apart above 256 (bfloat16)
    or 2048 (float16).
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ClippedBoxCoder(BoxCoder):
    """Box coder that limits how much a box may shrink as well as grow, and decodes in float32 or better."""

    def decode_single(self, rel_codes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        codes = in_full(rel_codes)
        width, height = (-self.bbox_xform_clip * weight for weight in self.weights[2:])
        lowest = codes.new_tensor([-math.inf, -math.inf, width, height])
        return super().decode_single(codes.maximum(lowest.repeat(codes.shape[1] // 4)), boxes)


class BestForObjectMatcher(Matcher):
    """Matcher that gives each object the anchor with its best IoU, as OpenMMLab's matcher does.

    torchvision's matcher may give this anchor to another object, which the anchor overlaps more. It also takes such
    anchors if their IoU is very small.
    """

    def __init__(self, high_threshold: float, low_threshold: float, lowest_best: float):
        """
        Args:
            high_threshold: As in torchvision's matcher.
            low_threshold: As in torchvision's matcher.
            lowest_best: An object whose best IoU is below this number does not get an anchor for being its best.
        """
        super().__init__(high_threshold, low_threshold, allow_low_quality_matches=True)
        self.lowest_best = lowest_best

    def set_low_quality_matches_(
            self, matches: torch.Tensor, all_matches: torch.Tensor, match_quality_matrix: torch.Tensor) -> None:
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        objects, anchors = torch.where((match_quality_matrix == best) & (best >= self.lowest_best))
        # if an anchor is the best one of several objects, the last of them gets it
        last = torch.full_like(matches, -1).scatter_reduce(0, anchors, objects, 'amax')
        matches[last >= 0] = last[last >= 0]


class FullRPNHead(RPNHead):
    """torchvision's `RPNHead`, but its scores and box deltas are in float32 or float64."""

    def forward(self, x: List[torch.Tensor]) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        scores, deltas = super().forward(x)
        return [in_full(score) for score in scores], [in_full(delta) for delta in deltas]


class FullBoxPredictor(FastRCNNPredictor):
    """torchvision's `FastRCNNPredictor`, but its scores and box deltas are in float32 or float64."""

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        scores, deltas = super().forward(x)
        return in_full(scores), in_full(deltas)


class FullMaskPredictor(MaskRCNNPredictor):
    """torchvision's `MaskRCNNPredictor`, but its logits are in float32 or float64."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return in_full(super().forward(x))


class BatchRetinaNetHead(RetinaNetHead):
    """torchvision's head with OpenMMLab's loss: the sum over all images, divided by the positive anchors of all images.

    torchvision divides image by image and takes the mean of the images, so an object weighs more in an image with few
    objects. As in OpenMMLab, an image without positive anchors counts as if it had one. Outputs are float32 or better.
    """

    def forward(self, x: List[torch.Tensor]) -> Dict[str, torch.Tensor]:
        return {name: in_full(output) for name, output in super().forward(x).items()}

    def compute_loss(
            self, targets: List[Detection], head_outputs: Dict[str, torch.Tensor], anchors: List[torch.Tensor],
            matched_idxs: List[torch.Tensor]) -> Dict[str, torch.Tensor]:
        losses: Dict[str, Any] = {}
        positives: Any = 0
        for i, matched in enumerate(matched_idxs):
            count = (matched >= 0).sum().clamp(min=1)
            positives = positives + count
            outputs = {name: output[i:i + 1] for name, output in head_outputs.items()}
            alone = super().compute_loss([targets[i]], outputs, [anchors[i]], [matched])  # divided by its own count
            for name, loss in alone.items():
                losses[name] = losses.get(name, 0) + loss * count
        return {name: loss / positives for name, loss in losses.items()}


class AlignedRoIAlign(MultiScaleRoIAlign):
    """RoIAlign with half-pixel alignment, on maps with strides 4 to 32. Larger boxes take more samples.

    torchvision's class infers the strides from the first image that it sees, and has no half-pixel alignment. Boxes and
    samples are float32 or better, whatever the type of the maps.
    """

    def __init__(self, output_size: int):
        super().__init__(['0', '1', '2', '3'], output_size, sampling_ratio=0)

    def forward(
            self, x: Dict[str, torch.Tensor], boxes: List[torch.Tensor],
            image_shapes: List[Tuple[int, int]]) -> torch.Tensor:
        maps = [x[name] for name in self.featmap_names]
        boxes = [in_full(box) for box in boxes]
        rois = convert_boxes_to_roi_format(boxes)
        levels = LevelMapper(2, 5)(boxes)
        pooled, indices = [], []
        for level, feature in enumerate(maps):
            index = torch.where(levels == level)[0]
            feature = in_full(feature)
            pooled.append(roi_align(
                feature, rois[index].to(feature.dtype), self.output_size, 1 / (4 * 2 ** level), self.sampling_ratio,
                aligned=True))
            indices.append(index)
        # Sorted back into their order. Writing them into an empty tensor would fix the number of boxes in an exported
        # graph.
        return torch.cat(pooled)[torch.cat(indices).argsort()].to(maps[0].dtype)


def paste_masks(masks: torch.Tensor, boxes: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Put masks (N, 1, M, M) that span their boxes (N, 4) into an image of height and width `size`: (N, 1, H, W).

    The masks are sampled at the centres of the image's pixels, bilinearly, in float32 or better. torchvision rounds a
    box to whole pixels, which moves its mask.
    """
    masks, boxes = in_full(masks), in_full(boxes)
    x1, y1, x2, y2 = boxes.to(masks.dtype).unbind(dim=1)
    rows = _sampling_weights(y1, y2, size[0], masks.shape[2])
    columns = _sampling_weights(x1, x2, size[1], masks.shape[3])
    with torch.autocast(masks.device.type, enabled=False):  # autocast would multiply in half precision
        return (rows @ masks[:, 0] @ columns.transpose(1, 2))[:, None]


def _sampling_weights(low: torch.Tensor, high: torch.Tensor, pixels: int, cells: int) -> torch.Tensor:
    """Return the weights (N, pixels, cells) of the cells of N masks for the pixels along one side of the image.

    The cells lie between `low` and `high` (N,), the edges of the boxes on this side. The weight of a cell falls from 1
    at its centre to 0 at the centre of the next cell. It is 0 for pixels that are more than a pixel outside of the box.
    """
    low, high = low[:, None], high[:, None]
    pixel = torch.arange(pixels, device=low.device).to(low.dtype)
    near = (pixel >= low.floor() - 1) & (pixel < high.ceil() + 1)
    position = (pixel + 0.5 - low) / (high - low) * cells - 0.5  # counted in cells, 0 is the centre of the first one
    distance = position[:, :, None] - torch.arange(cells, device=low.device).to(low.dtype)
    return (1 - distance.abs()).clamp(min=0) * near[:, :, None]


def resized(width: Any, height: Any, min_size: int, max_size: int) -> Tuple[Any, Any]:
    """Return the width and height that an image is resized to. Its aspect ratio is kept.

    The shorter side becomes `min_size`, or less if the longer side would be above `max_size`. Both are rounded, and at
    least 1. In an exported graph they are computed from the size of the image that the graph gets.
    """
    if torch.jit.is_tracing():
        sides = torch.stack([torch.as_tensor(width), torch.as_tensor(height)]).double()
        # a tensor is divided by a tensor: if a number is divided by a tensor, OpenVINO returns the tensor itself
        limits = torch.tensor([max_size, min_size], dtype=torch.float64)
        scale = (limits / torch.stack([sides.max(), sides.min()])).min()
        width, height = (sides * scale + 0.5).long().clamp(min=1).unbind()
        return width, height
    scale = min(max_size / max(width, height), min_size / min(width, height))
    return max(int(width * scale + 0.5), 1), max(int(height * scale + 0.5), 1)


class RoundingTransform(GeneralizedRCNNTransform):
    """torchvision's transform, except that sides are rounded (not floored, and at least 1), and masks are not shifted.

    torchvision rounds the boxes of masks to pixels, see `paste_masks`.
    """

    def resize(
            self, image: torch.Tensor, target: Optional[Detection] = None) -> Tuple[torch.Tensor, Optional[Detection]]:
        h, w = image.shape[-2:]
        size = self.fixed_size  # width, height
        if size is None:
            min_size = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
            size = resized(w, h, min_size, self.max_size)
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
    """Base class of the detectors in this package. Each of them also derives from a class of torchvision.

    A detector takes a list of images (C, H, W) of any sizes, with values from 0 to 1. In evaluation mode it returns a
    dict for each image: 'boxes' (N, 4) as x1, y1, x2, y2 in pixels, 'scores' (N,) and 'labels' (N,). In training mode
    it also takes `targets`, a dict with 'boxes' and 'labels' for each image, and returns a dict of losses.

    ValueError is raised for images and targets that would give wrong results without an error, and TypeError for
    keyword arguments that torchvision would ignore.

    Attributes:
        kind: 'retinanet', 'faster_rcnn' or 'mask_rcnn', also of subclasses.
        num_classes: Number of classes, without a background. (torchvision counts it in Faster and Mask R-CNN.)
        first_label: Label of the first class, in targets and results: 0, or 1 where label 0 is the background.
        categories: Names of the classes, starting with the one of `first_label`. Empty if not known.
    """
    kind = ''
    first_label = 0
    needs_masks = False  # in targets
    levels: Dict[str, Any] = {}  # of the pyramid, arguments for `PvtFpnBackbone`
    transform: Any

    def __init__(self, backbone: PvtFpnBackbone, num_classes: int, *args: Any, **kwargs: Any):
        self.check_keywords(kwargs)
        self.in_chans = getattr(backbone, 'in_chans', 3)
        mean, std = usual_normalisation(self.in_chans)
        super().__init__(backbone, *args, **{'image_mean': mean, 'image_std': std, **kwargs})
        self.num_classes = num_classes
        self.categories: List[str] = []
        t = self.transform
        self.transform = RoundingTransform(
            t.min_size, t.max_size, t.image_mean, t.image_std, t.size_divisible, t.fixed_size)
        parts: Any = [m for m in self.modules() if hasattr(m, 'box_coder')]
        for part in parts:
            part.box_coder = ClippedBoxCoder(part.box_coder.weights)

    @classmethod
    def check_keywords(cls, kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError for arguments that neither this class nor its torchvision class has."""
        known = {'size_divisible', 'fixed_size'}
        for base in cls.__mro__:
            known.update(inspect.signature(base).parameters)
            if not issubclass(base, PublishedDetector):
                break  # torchvision's class. Arguments of its own base classes are not passed on.
        unknown = [k for k in kwargs if k not in known]
        if unknown:
            raise TypeError(f'{cls.__name__} got unexpected keyword arguments: {", ".join(unknown)}')

    @classmethod
    def on_pvt(
            cls: Type[Detector], model_name: str = 'pvt_small', num_classes: int = 80,
            pretrained_backbone: bool = False, out_channels: int = 256, model_args: Optional[Dict[str, Any]] = None,
            frozen_stages: int = 0, **kwargs: Any) -> Detector:
        """Build the detector on PVT with the published settings. Its neck and heads are new and have to be trained.

            model = pvt_retinanet('pvt_small', num_classes=3, pretrained_backbone=True)

        Args:
            model_name: Name of a timm model, 'pvt_small' or with a tag 'pvt_small.in1k'. A tag is timm's name for a set
                of published weights.
            num_classes: Number of classes, without a background class.
            pretrained_backbone: Whether to load the published weights of the backbone. They are downloaded once.
            out_channels: Channels of the feature pyramid, and of RetinaNet's head.
            model_args: Arguments for `timm.create_model`, such as `dict(drop_path_rate=0.1)`.
            frozen_stages: Number of stages of the backbone that are not trained, from the first one on.
            kwargs: Arguments for the class of the detector, such as `min_size` and `max_size`.

        Returns:
            The detector in training mode. Its `first_label` says whether labels count from 0 or from 1.

        Raises:
            TypeError: An argument is not known.
        """
        cls.check_keywords(kwargs)  # before anything is downloaded
        backbone = PvtFpnBackbone(
            model_name, pretrained_backbone, out_channels, model_args=model_args, frozen_stages=frozen_stages,
            **cls.levels)
        return cls(backbone, num_classes, **kwargs)

    def forward(
            self, images: Sequence[torch.Tensor], targets: Optional[Sequence[Detection]] = None,
    ) -> Union[Dict[str, torch.Tensor], List[Detection]]:
        if not torch.jit.is_tracing():  # an exported graph cannot raise errors
            unit_range = max(self.transform.image_std) <= 1  # otherwise the model was set up for images from 0 to 255
            for i, image in enumerate(images):
                check_image(image, self.in_chans, f'image {i}', unit_range)
        if targets is not None:
            check_targets(images, targets, self.first_label, self.num_classes, self.needs_masks)
        return super().forward(images, targets)
