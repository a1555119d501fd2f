""" Detectors and segmenters from any checkpoint, and as a start for others.

What `fit` writes into a checkpoint, and how it is read, is in `detection/trained.py`.
"""
from typing import Any, Callable, Dict, List, Optional

import torch.nn as nn

from ..detection import PvtFasterRCNN, PvtMaskRCNN, PvtRetinaNet, detector_from_mmdet
from ..detection.trained import OF_CLASSES, Checkpoint, load_own
from ..formats.architecture import check_keys
from ..segmentation import semantic_fpn, semantic_fpn_from_mmseg

__all__ = ['BUILDERS', 'copy_weights', 'load_any', 'load_trained']

# Kind -> what makes such a model
BUILDERS: Dict[str, Callable[..., Any]] = {
    'retinanet': PvtRetinaNet.on_pvt,
    'faster_rcnn': PvtFasterRCNN.on_pvt,
    'mask_rcnn': PvtMaskRCNN.on_pvt,
    'semantic_fpn': semantic_fpn,
}


def load_trained(checkpoint: Checkpoint, **kwargs: Any) -> Any:
    """The detector or segmenter in a checkpoint of `fit`, or in a state dict of one.

    Args:
        checkpoint: A file (nothing in it is executed), or its content.
        kwargs: As for `pvt_timm.detection.retinanet_from_mmdet`: arguments for the class of the model that replace
            those in the checkpoint, such as `min_size`, and `prefix`, `num_classes`, `model_args`, `frozen_stages`.

    Returns:
        The model in evaluation mode. `categories` names its classes, if the checkpoint does.

    Raises:
        ValueError: Not such a checkpoint. The message says what is wrong.
    """
    return load_own(checkpoint, BUILDERS, **kwargs)


def load_any(checkpoint: Checkpoint, task: str, prefix: Optional[str] = None) -> Any:
    """A detector or segmenter from any checkpoint: of this package, of OpenMMLab or of the original code.

    Args:
        checkpoint: A file (nothing in it is executed), or its content.
        task: 'detector' or 'segmenter'.
        prefix: What stands before the names of the model, or of its backbone, needed where there are several.

    Raises:
        ValueError: Not such a checkpoint, or for the other task.
    """
    load = detector_from_mmdet if task == 'detector' else semantic_fpn_from_mmseg
    return load(checkpoint, prefix)


def copy_weights(model: Any, source: Any) -> List[str]:
    """Start a model from another one of its kind.

    If the classes differ, the layers that have rows for each class keep their own weights.

    Returns:
        Names of the parameters that stay.

    Raises:
        ValueError: Other parameters differ.
    """
    same = model.num_classes == source.num_classes and (
        not model.categories or not source.categories or list(model.categories) == list(source.categories))
    weights, own = source.state_dict(), model.state_dict()
    kept = [] if same else [name for name in own if name.startswith(OF_CLASSES)]
    weights = {**weights, **{name: own[name] for name in kept}}
    check_keys(weights, own)
    model.load_state_dict(weights)
    eps = {name: m.eps for name, m in source.named_modules() if isinstance(m, nn.LayerNorm)}
    for name, module in model.named_modules():
        if name in eps:
            module.eps = eps[name]
    return kept
