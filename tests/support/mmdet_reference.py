"""OpenMMLab's own detectors and segmenter with random weights, as a reference to compare with.

Runs without compiled parts: stand-ins replace mmcv's operators, and torchvision's operators replace its batched NMS and
its RoIAlign. Needs mmdet 3.3.0, mmsegmentation 1.2.2, mmcv-lite 2.1.0, mmengine 0.10.7 and setuptools<80.
"""
import sys
import types
from pathlib import Path
from unittest import mock

import torch
import torchvision

DEPTHS = dict(t=[2, 2, 2, 2], s=[3, 4, 6, 3], m=[3, 4, 18, 3], l=[3, 8, 27, 3])
# kind -> config of mmdetection or mmsegmentation, and of the original code
CONFIGS = {
    'retinanet': ('retinanet_r50_fpn.py', 'detection/configs/retinanet_pvt_{}_fpn_1x_coco.py'),
    'mask_rcnn': ('mask-rcnn_r50_fpn.py', 'detection/configs/mask_rcnn_pvt_{}_fpn_1x_coco.py'),
    'faster_rcnn': ('faster-rcnn_r50_fpn.py', None),
    'semantic_fpn': ('fpn_r50.py', 'segmentation/configs/sem_fpn/PVT/fpn_pvt_{}_ade20k_40k.py'),
}


def _batched_nms(boxes, scores, idxs, nms_cfg, class_agnostic=False):
    assert set(nms_cfg) == {'type', 'iou_threshold'} and not class_agnostic
    keep = torchvision.ops.batched_nms(boxes, scores, idxs, nms_cfg['iou_threshold'])
    return torch.cat([boxes[keep], scores[keep, None]], dim=1), keep


class _RoIAlign(torchvision.ops.RoIAlign):
    """RoIAlign with the defaults of mmcv.ops.RoIAlign."""

    def __init__(self, output_size, spatial_scale=1.0, sampling_ratio=0):
        super().__init__((output_size, output_size), spatial_scale, sampling_ratio, aligned=True)


class _Standin(types.ModuleType):
    batched_nms = staticmethod(_batched_nms)
    RoIAlign = _RoIAlign

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return type(name, (torch.nn.Module,), {})


def do_without_compiled_parts():
    """Make imports of OpenMMLab's packages work with mmcv-lite, which has no compiled parts."""
    for name in ('ops', 'ops.carafe', 'ops.deform_conv', 'ops.merge_cells', 'ops.modulated_deform_conv',
                 'ops.multi_scale_deform_attn', 'ops.nms', 'ops.roi_align'):
        sys.modules.setdefault(f'mmcv.{name}', _Standin(name))
    import mmcv.cnn.bricks.transformer as transformer
    if not hasattr(transformer, 'MultiScaleDeformableAttention'):
        transformer.MultiScaleDeformableAttention = type('MultiScaleDeformableAttention', (torch.nn.Module,), {})


def build(kind: str, letter: str = 't', delta_std: float = 1., checkout=None):
    """OpenMMLab's own model of its own config, with random weights scaled so that scores, boxes and masks spread.

    Args:
        kind: Key of `CONFIGS`.
        letter: Variant 't', 's', 'm' or 'l'.
        delta_std: Standard deviation of box deltas.
        checkout: Of the original code, for its config and backbone.
    """
    do_without_compiled_parts()
    import mmdet.registry
    import mmdet.utils
    import mmseg.registry
    import mmseg.utils
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    segmenter = kind == 'semantic_fpn'
    package = mmseg if segmenter else mmdet
    mmdet.utils.register_all_modules(init_default_scope=False)
    package.utils.register_all_modules(init_default_scope=False)
    models = package.registry.MODELS
    theirs, originals = CONFIGS[kind]
    if checkout is not None:
        from tests.support.reference import load_original
        original = load_original('segmentation' if segmenter else 'detection')
        name = f'pvt_{dict(t="tiny", s="small", m="medium", l="large")[letter]}'
        models.register_module(name=name, module=getattr(original, name), force=True)
        config = Config.fromfile(checkout / originals.format(letter)).model
        config.backbone.pretrained = None
    else:
        config = Config.fromfile(Path(package.__file__).parent / '.mim/configs/_base_/models' / theirs).model
        config.backbone = dict(type='mmdet.PyramidVisionTransformer', num_layers=DEPTHS[letter])
        config.neck.in_channels = [64, 128, 320, 512]
    config.pop('pretrained', None)
    if segmenter:
        config.decode_head.update(num_classes=150, norm_cfg=dict(type='BN'))  # of one process
    with DefaultScope.overwrite_default_scope(package.__name__):
        model = models.build(config).eval()
    with torch.no_grad():
        _fill(model, kind, delta_std)
    return model


def _fill(model, kind, delta_std):
    generator = torch.Generator().manual_seed(0)

    def normal(shape):
        return torch.randn(shape, generator=generator)

    for name, p in model.named_parameters():
        if 'pos_embed' in name:
            p.copy_(normal(p.shape) * 0.2)
        elif p.ndim > 1:
            p.copy_(normal(p.shape) * (0.04 if name.startswith('backbone.') else 1.4 / p[0].numel() ** 0.5))
        else:  # weights of norms around 1, biases around 0
            p.copy_(normal(p.shape) * 0.1 + (('norm' in name or 'bn' in name) and 'weight' in name))
    for name, buffer in model.named_buffers():
        if name.endswith('running_mean'):
            buffer.copy_(normal(buffer.shape) * 0.1)
        elif name.endswith('running_var'):
            buffer.copy_(normal(buffer.shape).exp())

    def scale(layer, values, std, bias=0.):
        """Scale a layer whose outputs are `values`, so that they get the standard deviation `std`."""
        layer.weight.mul_(std / torch.cat([x.flatten() for x in values]).std())
        layer.bias.fill_(bias)

    x = model.neck(model.backbone(normal((1, 3, 128, 160))))
    if kind == 'retinanet':
        scores, deltas = model.bbox_head(x)
        scale(model.bbox_head.retina_cls, scores, 1.2, -3.)  # not so high that many are equal to 1 in float32
        scale(model.bbox_head.retina_reg, deltas, delta_std)
    elif kind != 'semantic_fpn':
        scores, deltas = model.rpn_head(x)
        scale(model.rpn_head.rpn_cls, scores, 2.)
        scale(model.rpn_head.rpn_reg, deltas, delta_std / 3)
        corners = torch.rand(64, 2, generator=generator) * 80
        rois = torch.cat([torch.zeros(64, 1), corners, corners + 10 + normal((64, 2)).abs() * 30], dim=1)
        out = model.roi_head._bbox_forward(x, rois)
        scale(model.roi_head.bbox_head.fc_cls, [out['cls_score']], 2.)
        scale(model.roi_head.bbox_head.fc_reg, [out['bbox_pred']], delta_std)
        if kind == 'mask_rcnn':
            scale(model.roi_head.mask_head.conv_logits, [model.roi_head._mask_forward(x, rois)['mask_preds']], 2.)


@torch.no_grad()
def predict(model, image: torch.Tensor, original: tuple, resized: tuple):
    """Return detections for a normalised and padded image (1, 3, H, W), in pixels of the original image."""
    from mmdet.models.roi_heads.mask_heads import fcn_mask_head
    from mmdet.structures import DetDataSample
    sample = DetDataSample(metainfo=dict(
        img_shape=resized, ori_shape=original, pad_shape=tuple(image.shape[-2:]),
        batch_input_shape=tuple(image.shape[-2:]),
        scale_factor=(resized[1] / original[1], resized[0] / original[0])))
    paste = fcn_mask_head._do_paste_mask  # takes masks to float32, and so must be given boxes
    with mock.patch.object(fcn_mask_head, '_do_paste_mask', lambda masks, boxes, *args, **kwargs: paste(
            masks, boxes.float(), *args, **kwargs)):
        found = model.predict(image, [sample], rescale=True)[0].pred_instances
    masks = dict(masks=found.masks) if 'masks' in found else {}
    return dict(boxes=found.bboxes, scores=found.scores, labels=found.labels, **masks)
