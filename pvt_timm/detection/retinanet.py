""" RetinaNet on PVT with the settings of the published detectors, built from torchvision's and `parts.py`.

OpenMMLab's has eps 1e-6 in all norms of its backbone, which is set while loading.

The paper trains it for 12 epochs of COCO with 16 images per step: `AdamW(lr=1e-4, weight_decay=1e-4)`, 500 steps of
linear warm-up, a tenth of the rate after epochs 8 and 11, `model_args=dict(drop_path_rate=0.1)`.
"""
import copy
from typing import Any, Dict, List, Optional, Tuple

import torch
from torchvision.models.detection import RetinaNet

from .fpn import PvtFpnBackbone, pvt_fpn_backbone
from .parts import ClippedBoxCoder, Detection, FixedStrideAnchors, PublishedDetector


class PvtRetinaNet(PublishedDetector, RetinaNet):
    """torchvision's RetinaNet with the settings of the published PVT detectors.

    Takes a list of images (3, H, W) of any sizes with values from 0 to 1. In evaluation it returns one dict of 'boxes',
    'scores' and 'labels' per image, in training (with `targets`) a dict of losses. Labels count from 0 and there is no
    background class. See `PublishedDetector` for its attributes.
    """
    box_coder: Any
    detections_per_img: Any

    def __init__(self, backbone: PvtFpnBackbone, num_classes: int, **kwargs: Any):
        """
        Args:
            backbone: Five levels with strides 8 to 128.
            kwargs: Arguments for torchvision's RetinaNet, such as `min_size` (shorter side that images are resized to,
                800, several to choose from in training), `max_size` (longest side after that, 1333), `score_thresh`.
        """
        anchors = FixedStrideAnchors((8, 16, 32, 64, 128), [4 * 2 ** (i / 3) for i in range(3)])
        settings = dict(anchor_generator=anchors, detections_per_img=100)
        super().__init__(num_classes, backbone, num_classes, **{**settings, **kwargs})
        self.box_coder = ClippedBoxCoder(self.box_coder.weights)

    def postprocess_detections(
            self, head_outputs: Dict[str, List[torch.Tensor]], anchors: List[List[torch.Tensor]],
            image_shapes: List[Tuple[int, int]]) -> List[Detection]:
        """Leaves out boxes that lie outside of the image and so have no area, and takes scores in float32 or better."""
        outputs = {k: [x.to(torch.promote_types(x.dtype, torch.float32)) for x in v] for k, v in head_outputs.items()}
        unlimited = copy.copy(self)
        unlimited.detections_per_img = None  # what is left out takes nobody's place
        detections = RetinaNet.postprocess_detections(unlimited, outputs, anchors, image_shapes)
        for found in detections:
            seen = (found['boxes'][:, 2:] > found['boxes'][:, :2]).all(dim=1)
            found.update({k: v[seen][:self.detections_per_img] for k, v in found.items()})
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
        num_classes: Number of classes, without a background class.
        pretrained_backbone: Load its weights.
        out_channels: Channels of pyramid and head.
        model_args: Arguments for `timm.create_model`, such as `drop_path_rate`.
        kwargs: Arguments for `PvtRetinaNet`, such as `min_size`.
    """
    backbone = pvt_fpn_backbone(
        model_name, pretrained_backbone, out_channels, (1, 2, 3), 'p6p7_on_input', **(model_args or {}))
    return PvtRetinaNet(backbone, num_classes, **kwargs)
