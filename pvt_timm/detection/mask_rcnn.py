""" Mask R-CNN and Faster R-CNN on PVT with the settings of the published detectors, from torchvision's and `parts.py`.

OpenMMLab's background class is the last one and torchvision's the first: rows are moved while loading, and those that
only torchvision has (box and mask of the background, never looked at) are 0. Left as torchvision has them: the losses
of boxes (smooth L1 with beta 1/9 where OpenMMLab has L1), and that detections below 0.01 pixels are dropped. Norms, and
how the paper trains, are as in `retinanet.py`, but for `AdamW(lr=2e-4, weight_decay=1e-4)`.
"""
from typing import Any, Dict, List, Optional, Tuple

import torch
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops._utils import convert_boxes_to_roi_format

from .fpn import PvtFpnBackbone, pvt_fpn_backbone
from .parts import ClippedBoxCoder, FixedStrideAnchors, PublishedDetector


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
        side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
        # boxes of up to 28 strides on a side are taken from the finest level, of up to 56 from the next one, and so on
        levels = (side / 56 + 1e-6).log2().floor().clamp(0, 3)
        out = maps[0].new_zeros(len(rois), maps[0].shape[1], *self.output_size)
        for level, feature in enumerate(maps):
            index = torch.where(levels == level)[0]
            out[index] = roi_align(
                feature, rois[index], self.output_size, 1 / (4 * 2 ** level), self.sampling_ratio, aligned=True)
        return out


class PvtFasterRCNN(PublishedDetector, FasterRCNN):
    """torchvision's Faster R-CNN with the settings of the published PVT detectors.

    Takes a list of images (3, H, W) of any sizes with values from 0 to 1. In evaluation it returns one dict of 'boxes',
    'scores' and 'labels' per image, in training (with `targets`) a dict of losses. Labels count from 1, as in
    torchvision 0 is the background. See `PublishedDetector` for its attributes.
    """
    first_label = 1
    rpn: Any
    roi_heads: Any

    def __init__(self, backbone: PvtFpnBackbone, num_classes: int, box_channels: int = 1024, **kwargs: Any):
        """
        Args:
            backbone: Five levels with strides 4 to 64.
            num_classes: Number of classes, without the background.
            box_channels: Width of the two layers of the box head.
            kwargs: Arguments for torchvision's class, such as `min_size` (shorter side that images are resized to, 800,
                several to choose from in training), `max_size` (longest side after that, 1333), `box_score_thresh`.
        """
        settings: Dict[str, Any] = dict(
            rpn_anchor_generator=FixedStrideAnchors((4, 8, 16, 32, 64), [8]),
            rpn_post_nms_top_n_train=1000,
            box_roi_pool=AlignedRoIAlign(7),
            box_head=TwoMLPHead(backbone.out_channels * 7 ** 2, box_channels),
            box_predictor=FastRCNNPredictor(box_channels, num_classes + 1),
        )
        super().__init__(num_classes, backbone, **{**settings, **kwargs})
        for part in (self.rpn, self.roi_heads):
            part.box_coder = ClippedBoxCoder(part.box_coder.weights)


class PvtMaskRCNN(PvtFasterRCNN, MaskRCNN):
    """torchvision's Mask R-CNN with the settings of the published PVT detectors.

    As `PvtFasterRCNN`, with 'masks' (N, 1, H, W) from 0 to 1 in what it returns and as uint8 (N, H, W) in targets.
    """

    def __init__(
            self, backbone: PvtFpnBackbone, num_classes: int, box_channels: int = 1024, mask_channels: int = 256,
            **kwargs: Any):
        """As `PvtFasterRCNN`. `mask_channels` is the width of the layers of the mask head."""
        settings: Dict[str, Any] = dict(
            mask_roi_pool=AlignedRoIAlign(14),
            mask_head=MaskRCNNHeads(backbone.out_channels, (mask_channels,) * 4, dilation=1),
            mask_predictor=MaskRCNNPredictor(mask_channels, mask_channels, num_classes + 1),
        )
        super().__init__(backbone, num_classes, box_channels, **{**settings, **kwargs})


def pvt_faster_rcnn(
        model_name: str = 'pvt_small', num_classes: int = 80, pretrained_backbone: bool = False,
        out_channels: int = 256, model_args: Optional[Dict[str, Any]] = None, **kwargs: Any) -> PvtFasterRCNN:
    """Faster R-CNN on PVT with the settings of `pvt_mask_rcnn`, and its arguments."""
    backbone = pvt_fpn_backbone(model_name, pretrained_backbone, out_channels, **(model_args or {}))
    return PvtFasterRCNN(backbone, num_classes, **kwargs)


def pvt_mask_rcnn(
        model_name: str = 'pvt_small', num_classes: int = 80, pretrained_backbone: bool = False,
        out_channels: int = 256, model_args: Optional[Dict[str, Any]] = None, **kwargs: Any) -> PvtMaskRCNN:
    """Mask R-CNN on PVT as published, with new neck and heads.

    Arguments as in `pvt_retinanet`: `num_classes` does not count the background, `kwargs` are for `PvtMaskRCNN`.
    """
    backbone = pvt_fpn_backbone(model_name, pretrained_backbone, out_channels, **(model_args or {}))
    return PvtMaskRCNN(backbone, num_classes, **kwargs)
