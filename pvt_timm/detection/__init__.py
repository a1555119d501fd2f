""" torchvision's detectors on PVT, and OpenMMLab's PVT detectors as torchvision models.

`pvt_fpn_backbone` builds a feature pyramid on PVT for any torchvision detector. `pvt_retinanet`, `pvt_mask_rcnn` and
`pvt_faster_rcnn` build torchvision's detectors with the settings of the published PVT detectors. The functions of
`openmmlab.py` load weights of OpenMMLab or of the original code into them. None of OpenMMLab's packages is needed.
"""
from .detectors import PvtFasterRCNN, PvtMaskRCNN, PvtRetinaNet, pvt_faster_rcnn, pvt_mask_rcnn, pvt_retinanet
from .fpn import PvtFpnBackbone, pvt_fpn_backbone
from .openmmlab import (
    coco_categories, describe_heads, detector_from_mmdet, detector_to_mmdet, faster_rcnn_from_mmdet,
    mask_rcnn_from_mmdet, retinanet_coco, retinanet_from_mmdet)

__all__ = [
    'PvtFasterRCNN', 'PvtFpnBackbone', 'PvtMaskRCNN', 'PvtRetinaNet', 'coco_categories', 'describe_heads',
    'detector_from_mmdet', 'detector_to_mmdet', 'faster_rcnn_from_mmdet', 'mask_rcnn_from_mmdet', 'pvt_faster_rcnn',
    'pvt_fpn_backbone', 'pvt_mask_rcnn', 'pvt_retinanet', 'retinanet_coco', 'retinanet_from_mmdet',
]
