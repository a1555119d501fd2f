""" RetinaNet on PVT with the settings of the published detectors, built from torchvision's.

What it does other than torchvision's, and which class does it:
  * the pyramid starts at stride 8, its levels P6 and P7 come from the backbone's output by two convolutions without
    activation between them: `LastLevelsOnInput`, a `LastLevelP6P7`
  * anchors are not rounded, and their strides are 8 to 128 whatever the image size: `FixedStrideAnchors`, an
    `AnchorGenerator`
  * the decoded size is bounded from below too: `ClippedBoxCoder`, a `BoxCoder`
  * sides of the resized image are rounded, not floored: `RoundingTransform`, a `GeneralizedRCNNTransform`
  * boxes that lie outside of the image and so have no area are dropped: `PvtRetinaNet`, a `RetinaNet`
  * OpenMMLab's backbone has eps 1e-6 in all of its norms: set while loading
The rest is a matter of arguments: 80 classes without background, 100 detections, mean and std for 0 to 1.

The paper trains it for 12 epochs of COCO with 16 images per step: `AdamW(lr=1e-4, weight_decay=1e-4)`, 500 steps of
linear warm-up, a tenth of the rate after epochs 8 and 11, `model_args=dict(drop_path_rate=0.1)`.
"""
from typing import Any, Dict, List, Optional, Tuple

import torch
from torchvision.models.detection import RetinaNet
from torchvision.ops import batched_nms, clip_boxes_to_image

from .fpn import PvtFpnBackbone, pvt_fpn_backbone
from .parts import ClippedBoxCoder, Detection, FixedStrideAnchors, PublishedDetector, check_keywords


class PvtRetinaNet(PublishedDetector, RetinaNet):
    """torchvision's RetinaNet with the settings of the published PVT detectors.

    Takes a list of images (3, H, W) of any sizes with values from 0 to 1. In evaluation it returns one dict of 'boxes',
    'scores' and 'labels' per image, in training (with `targets`) a dict of losses. Labels count from 0 and there is no
    background class. See `PublishedDetector` for its attributes.
    """
    score_thresh: Any
    topk_candidates: Any
    nms_thresh: Any

    def __init__(self, backbone: PvtFpnBackbone, num_classes: int = 80, **kwargs: Any):
        """
        Args:
            backbone: Five levels with strides 8 to 128.
            kwargs: Arguments for torchvision's RetinaNet, such as `min_size` (shorter side that images are resized to,
                800, several to choose from in training), `max_size` (longest side after that, 1333), `score_thresh`.
        """
        check_keywords(kwargs, RetinaNet)
        settings = dict(anchor_generator=FixedStrideAnchors(), detections_per_img=100)
        super().__init__(backbone, num_classes, **{**settings, **kwargs})
        self._publish(num_classes)
        self.box_coder = ClippedBoxCoder()

    def postprocess_detections(
            self, head_outputs: Dict[str, List[torch.Tensor]], anchors: List[List[torch.Tensor]],
            image_shapes: List[Tuple[int, int]]) -> List[Detection]:
        detections = []
        for i, image_shape in enumerate(image_shapes):
            found: List[Tuple[torch.Tensor, ...]] = []
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
                found.append((clip_boxes_to_image(level_boxes, image_shape), level_scores, index % self.num_classes))
            boxes, scores, labels = (torch.cat(x) for x in zip(*found))

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
    """
    backbone = pvt_fpn_backbone(
        model_name, pretrained_backbone, out_channels, (1, 2, 3), 'p6p7_on_input', **(model_args or {}))
    return PvtRetinaNet(backbone, num_classes, **kwargs)
