""" Mask R-CNN and Faster R-CNN on PVT with the settings of the published detectors, built from torchvision's.

What they do other than torchvision's, and which class does it:
  * anchors are not rounded, one scale of 8 strides per level, strides 4 to 64 whatever the image size:
    `FixedStrideAnchors`, an `AnchorGenerator`
  * boxes are pooled with half-pixel alignment and as many samples as they are large: `AlignedRoIAlign`, a
    `MultiScaleRoIAlign` (torchvision's has neither)
  * the decoded size is bounded from below too: `ClippedBoxCoder`, a `BoxCoder`
  * sides of the resized image are rounded, not floored, and masks are put back without rounding their boxes:
    `RoundingTransform`, a `GeneralizedRCNNTransform`
  * 1000 proposals in training, not 2000
  * OpenMMLab's backbone has eps 1e-6 in all of its norms: set while loading
Alike are the fifth level by subsampling, 1000 proposals in evaluation, IoU thresholds, 100 detections above a score of
0.05, and the box coding (torchvision's weights 10 and 5 are the deviations 0.1 and 0.2). OpenMMLab's background class
is the last one and torchvision's the first: rows are moved while loading, and those that only torchvision has (box and
mask of the background, never looked at) are 0. Left as torchvision has them: the losses of boxes (smooth L1 with beta
1/9 where OpenMMLab has L1), and that detections below 0.01 pixels are dropped.

The paper trains for 12 epochs of COCO with 16 images per step: `AdamW(lr=2e-4, weight_decay=1e-4)`, 500 steps of linear
warm-up, a tenth of the rate after epochs 8 and 11, `model_args=dict(drop_path_rate=0.1)`.
"""
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type

import torch
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops._utils import convert_boxes_to_roi_format

from .fpn import PvtFpnBackbone, pvt_fpn_backbone
from .parts import ClippedBoxCoder, FixedStrideAnchors, PublishedDetector, check_keywords


class AlignedRoIAlign(MultiScaleRoIAlign):
    """RoIAlign with half-pixel alignment on maps of fixed strides.

    torchvision's infers strides from the first image that it sees, and has no such alignment.
    """

    def __init__(self, output_size: int, strides: Sequence[int] = (4, 8, 16, 32)):
        super().__init__([str(i) for i in range(len(strides))], output_size, sampling_ratio=0)
        self.strides = tuple(strides)

    def forward(
            self, x: Dict[str, torch.Tensor], boxes: List[torch.Tensor],
            image_shapes: List[Tuple[int, int]]) -> torch.Tensor:
        maps = [x[name] for name in self.featmap_names]
        rois = convert_boxes_to_roi_format(boxes).to(maps[0].dtype)
        side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
        # boxes of up to 28 strides on a side are taken from the finest level, of up to 56 from the next one, and so on
        levels = (side / (14 * self.strides[0]) + 1e-6).log2().floor().clamp(0, len(maps) - 1)
        out = maps[0].new_zeros(len(rois), maps[0].shape[1], *self.output_size)
        for level, (feature, stride) in enumerate(zip(maps, self.strides)):
            index = torch.where(levels == level)[0]
            out[index] = roi_align(
                feature, rois[index], self.output_size, 1 / stride, self.sampling_ratio, aligned=True)
        return out


class _TwoStageDetector(PublishedDetector):
    """What Faster and Mask R-CNN share, before the torchvision class among the bases."""
    first_label = 1
    rpn: Any
    roi_heads: Any

    def __init__(
            self, backbone: PvtFpnBackbone, num_classes: int = 80, box_channels: int = 1024, mask_channels: int = 256,
            **kwargs: Any):
        """
        Args:
            backbone: Five levels with strides 4 to 64.
            num_classes: Number of classes, without the background.
            box_channels: Width of the two layers of the box head.
            mask_channels: Width of the layers of the mask head, if there is one.
            kwargs: Arguments for torchvision's class, such as `min_size` (shorter side that images are resized to, 800,
                several to choose from in training), `max_size` (longest side after that, 1333), `box_score_thresh`.
        """
        base: Type[FasterRCNN] = MaskRCNN if isinstance(self, MaskRCNN) else FasterRCNN
        check_keywords(kwargs, base)
        channels = backbone.out_channels
        settings: Dict[str, Any] = dict(
            rpn_anchor_generator=FixedStrideAnchors((4, 8, 16, 32, 64), base_scale=8, scales_per_octave=1),
            rpn_post_nms_top_n_train=1000,
            box_roi_pool=AlignedRoIAlign(7),
            box_head=TwoMLPHead(channels * 7 ** 2, box_channels),
            box_predictor=FastRCNNPredictor(box_channels, num_classes + 1),
        )
        if base is MaskRCNN:
            settings.update(
                mask_roi_pool=AlignedRoIAlign(14),
                mask_head=MaskRCNNHeads(channels, (mask_channels,) * 4, dilation=1),
                mask_predictor=MaskRCNNPredictor(mask_channels, mask_channels, num_classes + 1),
            )
        super().__init__(backbone, **{**settings, **kwargs})
        self._publish(num_classes)
        self.rpn.box_coder = ClippedBoxCoder()
        self.roi_heads.box_coder = ClippedBoxCoder(self.roi_heads.box_coder.weights)


class PvtFasterRCNN(_TwoStageDetector, FasterRCNN):
    """torchvision's Faster R-CNN with the settings of the published PVT detectors.

    Takes a list of images (3, H, W) of any sizes with values from 0 to 1. In evaluation it returns one dict of 'boxes',
    'scores' and 'labels' per image, in training (with `targets`) a dict of losses. Labels count from 1, as in
    torchvision 0 is the background. See `PublishedDetector` for its attributes.
    """


class PvtMaskRCNN(_TwoStageDetector, MaskRCNN):
    """torchvision's Mask R-CNN with the settings of the published PVT detectors.

    As `PvtFasterRCNN`, with 'masks' (N, 1, H, W) from 0 to 1 in what it returns and as uint8 (N, H, W) in targets.
    """


def pvt_mask_rcnn(
        model_name: str = 'pvt_small',
        num_classes: int = 80,
        pretrained_backbone: bool = False,
        out_channels: int = 256,
        model_args: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> PvtMaskRCNN:
    """Mask R-CNN on PVT as published, with new neck and heads.

    Args:
        model_name: Name of a timm model, with or without a tag.
        pretrained_backbone: Load its weights.
        num_classes: Number of classes, without the background. Labels are 1 to `num_classes`.
        out_channels: Channels of the pyramid.
        model_args: Arguments for `timm.create_model`, such as `drop_path_rate`.
        kwargs: Arguments for `PvtMaskRCNN`, such as `min_size`.
    """
    backbone = pvt_fpn_backbone(model_name, pretrained_backbone, out_channels, **(model_args or {}))
    return PvtMaskRCNN(backbone, num_classes, **kwargs)


def pvt_faster_rcnn(
        model_name: str = 'pvt_small',
        num_classes: int = 80,
        pretrained_backbone: bool = False,
        out_channels: int = 256,
        model_args: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> PvtFasterRCNN:
    """Faster R-CNN on PVT with the settings of `pvt_mask_rcnn`, which takes the same arguments."""
    backbone = pvt_fpn_backbone(model_name, pretrained_backbone, out_channels, **(model_args or {}))
    return PvtFasterRCNN(backbone, num_classes, **kwargs)
