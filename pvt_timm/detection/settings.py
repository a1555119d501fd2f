""" Read the settings of a detector or segmenter from the config that OpenMMLab keeps in a checkpoint.

Scales of anchors, thresholds and sizes of images cannot be read from the weights, and with other values the results
differ. So each setting that changes the results either becomes an argument of our model, or must have the one value
that our model has. Any other value is refused, and the message names the setting.
"""
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

from ..formats.openmmlab import Unknown, find_dicts, normalisation, read_backbone, read_config_text
from ..formats.values import numbers, shown

__all__ = ['read_settings']

# Settings for which our models have one value only: their place in `model` of the config, and the value
Fixed = Dict[str, Any]

_ANCHORS: Fixed = {'type': 'AnchorGenerator', 'ratios': (0.5, 1, 2), 'center_offset': 0}
_CODER: Fixed = {'type': 'DeltaXYWHBBoxCoder', 'target_means': (0, 0, 0, 0), 'target_stds': (1, 1, 1, 1)}


def _under(place: str, fixed: Fixed) -> Fixed:
    return {f'{place}.{name}': value for name, value in fixed.items()}


_FPN: Fixed = _under('neck', {'type': 'FPN', 'no_norm_on_lateral': False, 'relu_before_extra_convs': False,
                              'norm_cfg': None, 'act_cfg': None, 'upsample_cfg.mode': 'nearest'})
_RETINANET: Fixed = {
    **_FPN,
    **_under('neck', {'start_level': 1, 'end_level': -1, 'add_extra_convs': 'on_input', 'num_outs': 5}),
    'bbox_head.type': 'RetinaHead',
    'bbox_head.norm_cfg': None,
    'bbox_head.conv_cfg': None,
    'bbox_head.reg_decoded_bbox': False,
    'bbox_head.loss_cls.use_sigmoid': True,
    **_under('bbox_head.anchor_generator', {
        **_ANCHORS, 'octave_base_scale': 4, 'scales_per_octave': 3, 'strides': (8, 16, 32, 64, 128)}),
    **_under('bbox_head.bbox_coder', _CODER),
    'test_cfg.min_bbox_size': 0,
    'test_cfg.nms.type': 'nms',
}
_FASTER_RCNN: Fixed = {
    **_FPN,
    **_under('neck', {'start_level': 0, 'end_level': -1, 'add_extra_convs': False, 'num_outs': 5}),
    'rpn_head.type': 'RPNHead',
    'rpn_head.num_convs': 1,
    'rpn_head.loss_cls.use_sigmoid': True,
    **_under('rpn_head.anchor_generator', {**_ANCHORS, 'scales': (8,), 'strides': (4, 8, 16, 32, 64)}),
    **_under('rpn_head.bbox_coder', _CODER),
    'roi_head.type': 'StandardRoIHead',
    'roi_head.bbox_roi_extractor.type': 'SingleRoIExtractor',
    **_under('roi_head.bbox_roi_extractor', {
        'roi_layer.type': 'RoIAlign', 'roi_layer.output_size': 7, 'roi_layer.sampling_ratio': 0,
        'featmap_strides': (4, 8, 16, 32), 'finest_scale': 56}),
    'roi_head.bbox_head.reg_class_agnostic': False,
    'roi_head.bbox_head.loss_cls.use_sigmoid': False,
    **_under('roi_head.bbox_head.bbox_coder', {**_CODER, 'target_stds': (0.1, 0.1, 0.2, 0.2)}),
    'test_cfg.rpn.min_bbox_size': 0,
    'test_cfg.rpn.nms.type': 'nms',
    'test_cfg.rcnn.nms.type': 'nms',
}
_MASK_RCNN: Fixed = {
    **_FASTER_RCNN,
    'roi_head.mask_head.type': 'FCNMaskHead',
    'roi_head.mask_head.class_agnostic': False,
    **_under('roi_head.mask_roi_extractor', {
        'roi_layer.type': 'RoIAlign', 'roi_layer.output_size': 14, 'roi_layer.sampling_ratio': 0,
        'featmap_strides': (4, 8, 16, 32), 'finest_scale': 56}),
    'test_cfg.rcnn.mask_thr_binary': 0.5,
}
_SEMANTIC_FPN: Fixed = {
    **_FPN,
    **_under('neck', {'start_level': 0, 'end_level': -1, 'add_extra_convs': False, 'num_outs': 4}),
    'decode_head.type': 'FPNHead',
    'decode_head.in_index': (0, 1, 2, 3),
    'decode_head.feature_strides': (4, 8, 16, 32),
    'decode_head.align_corners': False,
    'decode_head.threshold': None,
    'test_cfg.mode': 'whole',
}
FIXED: Dict[str, Fixed] = {
    'RetinaNet': _RETINANET,
    'Faster R-CNN': _FASTER_RCNN,
    'Mask R-CNN': _MASK_RCNN,
    'Semantic FPN': _SEMANTIC_FPN,
}

# Settings that become arguments of our models: their place, (the argument, its lowest value, its highest value)
_TWO_STAGES: Dict[str, Tuple[str, float, float]] = {
    'test_cfg.rpn.nms_pre': ('rpn_pre_nms_top_n_test', 1, 1e6),
    'test_cfg.rpn.max_per_img': ('rpn_post_nms_top_n_test', 1, 1e6),
    'test_cfg.rpn.nms.iou_threshold': ('rpn_nms_thresh', 0, 1),
    'test_cfg.rcnn.score_thr': ('box_score_thresh', 0, 1),
    'test_cfg.rcnn.nms.iou_threshold': ('box_nms_thresh', 0, 1),
    'test_cfg.rcnn.max_per_img': ('box_detections_per_img', 1, 1e6),
}
OBEYED: Dict[str, Dict[str, Tuple[str, float, float]]] = {
    'RetinaNet': {
        'test_cfg.nms_pre': ('topk_candidates', 1, 1e6),
        'test_cfg.score_thr': ('score_thresh', 0, 1),
        'test_cfg.nms.iou_threshold': ('nms_thresh', 0, 1),
        'test_cfg.max_per_img': ('detections_per_img', 1, 1e6),
    },
    'Faster R-CNN': _TWO_STAGES,
    'Mask R-CNN': _TWO_STAGES,
    'Semantic FPN': {},
}


def read_settings(meta: Mapping[str, Any], kind: str) -> Dict[str, Any]:
    """Return arguments of our model from the config in a checkpoint.

    Args:
        meta: The entry 'meta' of the checkpoint.
        kind: 'RetinaNet', 'Faster R-CNN', 'Mask R-CNN' or 'Semantic FPN'.

    Returns:
        Arguments for the class of the model, among them 'image_mean' and 'image_std' (for images from 0 to 1), and
        'model_args' for its PVT. Empty without a config.

    Raises:
        ValueError: The config has a setting with a value that our model cannot have. The message names it.
    """
    config = read_config_text(meta)
    model = config.get('model')
    model = dict(model) if isinstance(model, dict) else {}
    test_cfg = config.get('test_cfg')  # where mmdetection 2 has it. In mmengine's configs this is the test loop.
    if 'test_cfg' not in model and isinstance(test_cfg, dict) and 'type' not in test_cfg:
        model['test_cfg'] = test_cfg
    for place, ours in FIXED[kind].items():
        theirs = _at(model, place)
        if theirs is not _NOT_SAID and not _same(theirs, ours):
            raise ValueError(
                f'The config in the checkpoint says {place}={shown(theirs)}, {kind} here has {shown(ours)} and no '
                f'setting for it.')
    found: Dict[str, Any] = {}
    for place, (name, low, high) in OBEYED[kind].items():
        theirs = _at(model, place)
        if theirs is _NOT_SAID:
            continue
        values = numbers(theirs, low=low, high=high)
        if values is None or len(values) != 1:
            raise ValueError(f'Expected a number from {low:g} to {high:g} for {place} in the config in the checkpoint, '
                             f'got {shown(theirs)}.')
        found[name] = int(values[0]) if low >= 1 else values[0]
    found.update(_image_size(config))
    backbone = read_backbone(config)
    if backbone:
        found['model_args'] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in backbone.items()}
    said = normalisation(config)
    if said is not None:
        found['image_mean'], found['image_std'] = said
    return found


_NOT_SAID = Unknown()


def _at(model: Any, place: str) -> Any:
    """Return the value at a place such as 'test_cfg.nms.type', `_NOT_SAID` if there is none."""
    for name in place.split('.'):
        if not isinstance(model, dict) or name not in model:
            return _NOT_SAID
        model = model[name]
    return model


def _same(theirs: Any, ours: Any) -> bool:
    """Return whether a value of a config is the same as ours.

    A list is compared like a tuple, and a single number like a tuple of equal numbers.
    """
    if isinstance(ours, (int, float)) and not isinstance(ours, bool):
        values = numbers(theirs)
        return values is not None and all(abs(value - ours) <= 1e-6 * abs(ours) for value in values)
    if isinstance(ours, tuple):
        values = numbers(theirs)
        return values is not None and len(values) in (1, len(ours)) and all(
            abs(value - one) <= 1e-6 for value, one in zip(values * (len(ours) if len(values) == 1 else 1), ours))
    if isinstance(ours, str):
        return isinstance(theirs, str) and theirs.rpartition('.')[2] == ours
    return theirs is ours or ours is False and theirs is None


# ---- sizes of images -------------------------------------------------------------------------------------------------

# Steps of a pipeline that resize images, and the names of their settings for the size
_RESIZING = ('Resize', 'AlignResize', 'MultiScaleFlipAug', 'TestTimeAug')
_SCALES = ('scale', 'img_scale', 'scales')


def _image_size(config: Dict[str, Any]) -> Dict[str, int]:
    """Return the sizes that images are resized to in testing: the shorter side, and the limit of the longer side."""
    for pipeline in _pipelines(config):
        steps = [step for name in _RESIZING for step in find_dicts(pipeline, name)]
        for step in steps:
            if step.get('keep_ratio') is False:
                raise ValueError('The config in the checkpoint says keep_ratio=False, images are always resized in '
                                 'proportion here.')
        scales = [scale for step in steps for name in _SCALES for scale in _as_scales(step.get(name))]
        different = sorted(set(scales))
        if len(different) > 1:
            raise ValueError(f'The config in the checkpoint tests at several sizes, {shown(str(different))}: say '
                             f'min_size and max_size.')
        if different:
            return dict(min_size=min(different[0]), max_size=max(different[0]))
    return {}


def _pipelines(config: Dict[str, Any]) -> Iterator[Any]:
    """Yield the places that may say how images are resized in testing. The first one that says it is used."""
    data = config.get('data')
    yield _at(config, 'test_dataloader.dataset')
    yield data.get('test') if isinstance(data, dict) else None
    yield config.get('test_pipeline')
    yield _at(config, 'val_dataloader.dataset')
    yield data.get('val') if isinstance(data, dict) else None


def _as_scales(value: Any) -> Iterable[Tuple[int, int]]:
    """Yield (side, side) for each size in a value of a config. A single number is a square."""
    several: List[Any] = [value]
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)):
        several = list(value)
    for one in several:
        sides: Optional[Tuple[float, ...]] = numbers(one, low=1, high=2 ** 16) if one is not None else None
        if one is not None and not isinstance(one, Unknown) and (sides is None or len(sides) > 2):
            raise ValueError(f'Expected a size of images in the config in the checkpoint, got {shown(one)}.')
        if sides:
            yield int(sides[0]), int(sides[-1])
