""" PVT under torchvision's detectors, and OpenMMLab's detectors as torchvision models.

`pvt_fpn_backbone` gives any torchvision detector a feature pyramid on PVT. `pvt_retinanet`, `pvt_mask_rcnn` and
`pvt_faster_rcnn` are torchvision's detectors with the settings of the published PVT detectors, and the functions of
`openmmlab.py` fill them with weights of OpenMMLab or of the original code, without any of their packages.
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
