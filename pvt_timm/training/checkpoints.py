""" Load detectors and segmenters from any checkpoint, and start models from others.

The content of `fit`'s checkpoints is described in `detection/trained.py`, which also reads them.
"""
from typing import Any, Callable, Dict, List, Optional

import torch.nn as nn

from ..detection import PvtFasterRCNN, PvtMaskRCNN, PvtRetinaNet, detector_from_mmdet
from ..detection.trained import OF_CLASSES, Checkpoint, load_own
from ..formats.architecture import check_keys
from ..segmentation import semantic_fpn, semantic_fpn_from_mmseg

__all__ = ['BUILDERS', 'copy_weights', 'load_any', 'load_trained']

# Kind -> function that builds such a model
BUILDERS: Dict[str, Callable[..., Any]] = {
    'retinanet': PvtRetinaNet.on_pvt,
    'faster_rcnn': PvtFasterRCNN.on_pvt,
    'mask_rcnn': PvtMaskRCNN.on_pvt,
    'semantic_fpn': semantic_fpn,
}


def load_trained(checkpoint: Checkpoint, **kwargs: Any) -> Any:
    """Return the detector or segmenter in a checkpoint of `fit`, or in a state dict of such a model.

    Args:
        checkpoint: A file (nothing in it is executed), or its content.
        kwargs: As for `pvt_timm.detection.retinanet_from_mmdet`: arguments for the class of the model, such as
            `min_size`, which replace those in the checkpoint, and `prefix`, `num_classes`, `model_args`,
            `frozen_stages`.

    Returns:
        The model in evaluation mode. `categories` names its classes, if the checkpoint does.

    Raises:
        ValueError: It is not such a checkpoint. The message says what is wrong.
    """
    return load_own(checkpoint, BUILDERS, **kwargs)


def load_any(checkpoint: Checkpoint, task: str, prefix: Optional[str] = None) -> Any:
    """Return the detector or segmenter in a checkpoint of this package, of OpenMMLab or of the original code.

    Args:
        checkpoint: A file (nothing in it is executed), or its content.
        task: 'detector' or 'segmenter'.
        prefix: Part before the names of the model's or its backbone's weights, needed if there are several models.

    Raises:
        ValueError: It is not such a checkpoint, or its model is for the other task.
    """
    load = detector_from_mmdet if task == 'detector' else semantic_fpn_from_mmseg
    return load(checkpoint, prefix)


def copy_weights(model: Any, source: Any) -> List[str]:
    """Copy the weights of `source` into `model`, which is of the same kind.

    If the classes of the two differ, layers with rows for each class are not copied.

    Returns:
        Names of the parameters that are not copied.

    Raises:
        ValueError: The names or shapes of other parameters differ.
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
