""" RetinaNet, Faster R-CNN and Mask R-CNN on PVT with the settings of the published detectors.

In Faster and Mask R-CNN, three things are still torchvision's: the loss of boxes is smooth L1 with beta 1/9 (OpenMMLab
has L1), Mask R-CNN matches each proposal with the object that it overlaps most, and boxes smaller than 0.01 pixels are
dropped.

`num_classes` never counts a background. Labels count from 0 in RetinaNet and from 1 in Faster and Mask R-CNN, where 0
is the background: `first_label` says which.

The paper trains for 12 epochs of COCO with 16 images per step: `AdamW(lr=1e-4, weight_decay=1e-4)` for RetinaNet and
`lr=2e-4` for the others, 500 steps of linear warm-up, a tenth of the rate after epochs 8 and 11,
`model_args=dict(drop_path_rate=0.1)`.

To export a model to ONNX, for one image of any size:

    torch.onnx.export(
        model, ([image],), 'detector.onnx', dynamo=False, opset_version=17, input_names=['image'],
        dynamic_axes={'image': {1: 'height', 2: 'width'}})
"""
import copy
from typing import Any, Dict, List, Tuple

import torch
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from .fpn import PvtFpnBackbone
from .parts import (
    AlignedRoIAlign, BatchRetinaNetHead, BestForObjectMatcher, Detection, FixedStrideAnchors, FullBoxPredictor,
    FullMaskPredictor, FullRPNHead, PublishedDetector)


class PvtRetinaNet(PublishedDetector, RetinaNet):
    """torchvision's RetinaNet with the settings of the published PVT detectors.

    Labels count from 0 to `num_classes - 1`, in targets and in results. There is no background class.
    """
    kind = 'retinanet'
    levels = dict(out_indices=(1, 2, 3), extra_levels='p6p7_on_input')
    detections_per_img: Any
    proposal_matcher: Any

    def __init__(self, backbone: PvtFpnBackbone, num_classes: int, **kwargs: Any):
        """
        Args:
            backbone: Five levels with strides 8 to 128.
            num_classes: Number of classes, without a background class.
            kwargs: Arguments for torchvision's class, such as `score_thresh`, `min_size` (shorter side of resized
                images, 800 by default; training takes a random one of several values) and `max_size` (limit of the
                longer side, 1333 by default).
        """
        anchors = FixedStrideAnchors((8, 16, 32, 64, 128), [4 * 2 ** (i / 3) for i in range(3)])
        settings: Dict[str, Any] = dict(
            anchor_generator=anchors, detections_per_img=100,
            head=BatchRetinaNetHead(backbone.out_channels, anchors.num_anchors_per_location()[0], num_classes))
        super().__init__(backbone, num_classes, num_classes, **{**settings, **kwargs})
        if kwargs.get('proposal_matcher') is None:
            matcher: Any = self.proposal_matcher
            self.proposal_matcher = BestForObjectMatcher(matcher.high_threshold, matcher.low_threshold, 0.)

    def postprocess_detections(
            self, head_outputs: Dict[str, List[torch.Tensor]], anchors: List[List[torch.Tensor]],
            image_shapes: List[Tuple[int, int]]) -> List[Detection]:
        """Return the detections of torchvision, without boxes that lie outside of the image and so have no area."""
        unlimited = copy.copy(self)
        unlimited.detections_per_img = None  # the limit is applied below, to the boxes that stay
        detections = RetinaNet.postprocess_detections(unlimited, head_outputs, anchors, image_shapes)
        for found in detections:
            seen = (found['boxes'][:, 2:] > found['boxes'][:, :2]).all(dim=1)
            found.update({k: v[seen][:self.detections_per_img] for k, v in found.items()})
        return detections


class PvtFasterRCNN(PublishedDetector, FasterRCNN):
    """torchvision's Faster R-CNN with the settings of the published PVT detectors.

    Labels count from 1 to `num_classes`, in targets and in results. Label 0 is the background. `num_classes` does not
    count it, while the argument `num_classes` of torchvision's class does.
    """
    kind = 'faster_rcnn'
    first_label = 1

    def __init__(self, backbone: PvtFpnBackbone, num_classes: int, box_channels: int = 1024, **kwargs: Any):
        """
        Args:
            backbone: Five levels with strides 4 to 64.
            num_classes: Number of classes, without the background.
            box_channels: Width of the layers of the box head.
            kwargs: Arguments for torchvision's class, such as `min_size`, `max_size` and `box_score_thresh`.
        """
        anchors = FixedStrideAnchors((4, 8, 16, 32, 64), [8])
        settings: Dict[str, Any] = dict(
            rpn_anchor_generator=anchors,
            rpn_head=FullRPNHead(backbone.out_channels, anchors.num_anchors_per_location()[0]),
            rpn_post_nms_top_n_train=1000,
            box_roi_pool=AlignedRoIAlign(7),
            box_head=TwoMLPHead(backbone.out_channels * 7 ** 2, box_channels),
            box_predictor=FullBoxPredictor(box_channels, num_classes + 1),
        )
        super().__init__(backbone, num_classes, **{**settings, **kwargs})
        rpn: Any = self.rpn
        matcher = rpn.proposal_matcher
        rpn.proposal_matcher = BestForObjectMatcher(matcher.high_threshold, matcher.low_threshold, 0.3)


class PvtMaskRCNN(PvtFasterRCNN, MaskRCNN):
    """torchvision's Mask R-CNN with the settings of the published PVT detectors.

    Labels count as in `PvtFasterRCNN`. Results also have 'masks' (N, 1, H, W) with values from 0 to 1. Targets need
    'masks' (N, H, W) of 0 and 1, of type uint8 or bool.
    """
    kind = 'mask_rcnn'
    needs_masks = True

    def __init__(
            self, backbone: PvtFpnBackbone, num_classes: int, box_channels: int = 1024, mask_channels: int = 256,
            **kwargs: Any):
        """
        Args:
            backbone: Five levels with strides 4 to 64.
            num_classes: Number of classes, without the background.
            box_channels: Width of the layers of the box head.
            mask_channels: Width of the layers of the mask head.
            kwargs: Arguments for torchvision's class, such as `min_size`, `max_size` and `box_score_thresh`.
        """
        settings: Dict[str, Any] = dict(
            mask_roi_pool=AlignedRoIAlign(14),
            mask_head=MaskRCNNHeads(backbone.out_channels, (mask_channels,) * 4, dilation=1),
            mask_predictor=FullMaskPredictor(mask_channels, mask_channels, num_classes + 1),
        )
        super().__init__(backbone, num_classes, box_channels, **{**settings, **kwargs})


# Functions that build the detectors, named as torchvision names its functions
pvt_retinanet = PvtRetinaNet.on_pvt
pvt_faster_rcnn = PvtFasterRCNN.on_pvt
pvt_mask_rcnn = PvtMaskRCNN.on_pvt
