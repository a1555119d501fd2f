"""OpenMMLab's own detectors and segmenter with random weights, as a reference to compare with.

Runs without compiled parts: mmcv's operators are stand-ins, except for its batched NMS, which is written down here on
top of torchvision's NMS, and its RoIAlign, which is torchvision's. Needs mmdet 3.3.0, mmsegmentation 1.2.2, mmcv-lite
2.1.0, mmengine 0.10.7 and setuptools<80.
"""
import importlib.machinery
import os
import sys
import types
from pathlib import Path

import torch
import torchvision


def _batched_nms(boxes, scores, idxs, nms_cfg, class_agnostic=False):
    """mmcv.ops.nms.batched_nms: classes are kept apart by an offset, in groups from 10000 boxes on."""
    cfg = dict(nms_cfg)
    cfg.pop('type')
    iou_threshold = cfg.pop('iou_threshold')
    assert not cfg and not class_agnostic
    if not len(boxes):
        keep = boxes.new_zeros(0, dtype=torch.long)
    elif len(boxes) < 10000:
        offsets = idxs.to(boxes) * (boxes.max() + 1)
        keep = torchvision.ops.nms(boxes + offsets[:, None], scores, iou_threshold)
    else:
        mask = torch.zeros_like(scores, dtype=torch.bool)
        for i in idxs.unique():
            group = (idxs == i).nonzero().view(-1)
            mask[group[torchvision.ops.nms(boxes[group], scores[group], iou_threshold)]] = True
        keep = mask.nonzero().view(-1)
        keep = keep[scores[keep].argsort(descending=True)]
    return torch.cat([boxes[keep], scores[keep, None]], dim=1), keep


class _RoIAlign(torch.nn.Module):
    """mmcv.ops.RoIAlign with its defaults."""

    def __init__(self, output_size, spatial_scale=1.0, sampling_ratio=0, aligned=True):
        super().__init__()
        self.output_size = torch.nn.modules.utils._pair(output_size)
        self.settings = dict(spatial_scale=spatial_scale, sampling_ratio=sampling_ratio, aligned=aligned)

    def forward(self, x, rois):
        return torchvision.ops.roi_align(x, rois, self.output_size, **self.settings)


class _Standin(types.ModuleType):
    __path__ = []
    batched_nms = staticmethod(_batched_nms)
    RoIAlign = _RoIAlign

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return type(name, (torch.nn.Module,), {})


class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name == 'mmcv.ops' or name.startswith('mmcv.ops.'):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Standin(spec.name)

    def exec_module(self, module):
        pass


def do_without_compiled_parts():
    """Let OpenMMLab's packages be imported with mmcv-lite."""
    if not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    import mmcv.cnn.bricks.transformer as transformer
    if not hasattr(transformer, 'MultiScaleDeformableAttention'):
        transformer.MultiScaleDeformableAttention = type('MultiScaleDeformableAttention', (torch.nn.Module,), {})


DEPTHS = dict(t=[2, 2, 2, 2], s=[3, 4, 6, 3], m=[3, 4, 18, 3], l=[3, 8, 27, 3])


def _configs(package):
    return Path(os.path.dirname(package.__file__), '.mim', 'configs')


def _settings(kind, letter, checkout, **changes):
    """Settings of a model in a config of mmdetection and mmsegmentation, or of a checkout of the original code."""
    from mmengine.config import Config
    if checkout is not None:
        folder, name = {
            'retinanet': ('detection', f'retinanet_pvt_{letter}_fpn_1x_coco'),
            'mask_rcnn': ('detection', f'mask_rcnn_pvt_{letter}_fpn_1x_coco'),
            'semantic_fpn': ('segmentation', f'sem_fpn/PVT/fpn_pvt_{letter}_ade20k_40k'),
        }[kind]
        config = Config.fromfile(checkout / folder / 'configs' / f'{name}.py')
        model = config.model
        model.backbone.pretrained = None
    else:
        import mmdet
        import mmseg
        config = Config.fromfile(_configs(mmseg if kind == 'semantic_fpn' else mmdet) / '_base_' / 'models' / {
            'retinanet': 'retinanet_r50_fpn.py', 'mask_rcnn': 'mask-rcnn_r50_fpn.py',
            'faster_rcnn': 'faster-rcnn_r50_fpn.py', 'semantic_fpn': 'fpn_r50.py'}[kind])
        model = config.model
        model.backbone = dict(type='mmdet.PyramidVisionTransformer', num_layers=DEPTHS[letter])
        model.neck.in_channels = [64, 128, 320, 512]
        if kind == 'semantic_fpn':
            model.decode_head.num_classes = 150
    model.pop('pretrained', None)
    if kind == 'semantic_fpn':
        model.decode_head.norm_cfg = dict(type='BN')  # of one process
    return model


def build(kind: str, letter: str = 't', seed: int = 0, delta_std: float = 3.0, checkout=None):
    """OpenMMLab's own model of its own config, with random weights scaled so that scores, boxes and masks spread.

    Args:
        kind: 'retinanet', 'mask_rcnn', 'faster_rcnn' or 'semantic_fpn'.
        letter: Variant 't', 's', 'm' or 'l'.
        seed: For the weights.
        delta_std: Standard deviation of box deltas. Trained models are under 1, over 2 the bounds of sizes are met.
        checkout: Of the original code, for its config and backbone.
    """
    do_without_compiled_parts()
    import mmdet.registry
    import mmdet.utils
    import mmseg.registry
    import mmseg.utils
    from mmengine.registry import DefaultScope
    segmenter = kind == 'semantic_fpn'
    package = mmseg if segmenter else mmdet
    mmdet.utils.register_all_modules(init_default_scope=False)
    package.utils.register_all_modules(init_default_scope=False)
    models = package.registry.MODELS
    if checkout is not None:
        from reference import load_original
        original = load_original('segmentation' if segmenter else 'detection', checkout)
        name = f'pvt_{dict(t="tiny", s="small", m="medium", l="large")[letter]}'
        models.register_module(name=name, module=getattr(original, name), force=True)
    with DefaultScope.overwrite_default_scope('mmseg' if segmenter else 'mmdet'):
        model = models.build(_settings(kind, letter, checkout)).eval()
    generator = torch.Generator().manual_seed(seed)

    def normal(shape):
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith('backbone.'):
                if 'pos_embed' in name or p.ndim > 1:
                    p.copy_(normal(p.shape) * (0.2 if 'pos_embed' in name else 0.04))
                else:  # norm weights around 1, biases around 0
                    p.copy_(normal(p.shape) * 0.1 + ('norm' in name and 'weight' in name))
            elif p.ndim > 1:
                p.copy_(normal(p.shape) * 1.4 / p[0].numel() ** 0.5)
            else:
                p.copy_(normal(p.shape) * 0.1 + ('bn.weight' in name))
        for name, buffer in model.named_buffers():
            if name.endswith('running_mean'):
                buffer.copy_(normal(buffer.shape) * 0.1)
            elif name.endswith('running_var'):
                buffer.copy_(normal(buffer.shape).exp())

        def scale(layer, values, std, bias=0.):
            """Let a layer whose outputs are `values` have outputs with this deviation."""
            layer.weight.mul_(std / torch.cat([x.flatten() for x in values]).std())
            layer.bias.fill_(bias)

        x = model.neck(model.backbone(normal((1, 3, 128, 160))))
        if kind == 'retinanet':
            scores, deltas = model.bbox_head(x)
            # scores of 0.002 to 0.7, not so high that many are equal to 1 in float32
            scale(model.bbox_head.retina_cls, scores, 1.2, -3.)
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
    return model


def predict(model, image: torch.Tensor, original: tuple, resized: tuple):
    """Detections for a padded and normalised image (1, 3, H, W), boxes and masks in pixels of the original image."""
    from mmdet.models.roi_heads.mask_heads import fcn_mask_head
    from mmdet.structures import DetDataSample
    sample = DetDataSample(metainfo=dict(
        img_shape=resized, ori_shape=original, pad_shape=tuple(image.shape[-2:]),
        batch_input_shape=tuple(image.shape[-2:]),
        scale_factor=(resized[1] / original[1], resized[0] / original[0])))
    paste = fcn_mask_head._do_paste_mask  # takes masks to float32, and so must be given boxes
    fcn_mask_head._do_paste_mask = lambda masks, boxes, *args, **kwargs: paste(masks, boxes.float(), *args, **kwargs)
    try:
        with torch.no_grad():
            found = model.predict(image, [sample], rescale=True)[0].pred_instances
    finally:
        fcn_mask_head._do_paste_mask = paste
    masks = dict(masks=found.masks) if 'masks' in found else {}
    return dict(boxes=found.bboxes, scores=found.scores, labels=found.labels, **masks)
