"""mmdetection's own RetinaNet with random weights, as a reference to compare with.

Runs without compiled parts: mmcv's operators are stand-ins, except for its batched NMS, which is written down here on
top of torchvision's NMS. Needs mmdet 3.3.0, mmcv-lite 2.1.0, mmengine 0.10.7 and setuptools<80.
"""
import importlib.machinery
import os
import sys
import types

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


class _Standin(types.ModuleType):
    __path__ = []
    batched_nms = staticmethod(_batched_nms)

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


def build_retinanet(letter: str = 't', seed: int = 0, delta_std: float = 3.0):
    """mmdetection's RetinaNet of its own config, with random weights scaled so that scores and boxes spread.

    Args:
        letter: Variant 't', 's', 'm' or 'l'.
        seed: For the weights.
        delta_std: Standard deviation of box deltas. Trained models are under 1, over 2 the bounds of sizes are met.
    """
    do_without_compiled_parts()
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    register_all_modules(init_default_scope=True)
    folder = os.path.join(os.path.dirname(mmdet.__file__), '.mim', 'configs', 'pvt')
    cfg = Config.fromfile(os.path.join(folder, f'retinanet_pvt-{letter}_fpn_1x_coco.py'))
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith('backbone.'):
                if 'pos_embed' in name or p.ndim > 1:
                    p.copy_(torch.randn(p.shape, generator=generator) * (0.2 if 'pos_embed' in name else 0.04))
                else:  # norm weights around 1, biases around 0
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + ('norm' in name and 'weight' in name))
            elif p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 1.4 / p[0].numel() ** 0.5)
            else:
                p.zero_()
        image = torch.randn(1, 3, 128, 160, generator=generator)
        scores, deltas = model.bbox_head(model.neck(model.backbone(image)))
        # scores of 0.002 to 0.7, not so high that many are equal to 1 in float32
        model.bbox_head.retina_cls.weight.mul_(1.2 / torch.cat([x.flatten() for x in scores]).std())
        model.bbox_head.retina_cls.bias.fill_(-3.)
        model.bbox_head.retina_reg.weight.mul_(delta_std / torch.cat([x.flatten() for x in deltas]).std())
    return model


def predict(model, image: torch.Tensor, original: tuple, resized: tuple):
    """Detections for a padded and normalised image (1, 3, H, W), boxes in pixels of the original image."""
    from mmdet.structures import DetDataSample
    sample = DetDataSample(metainfo=dict(
        img_shape=resized, ori_shape=original, pad_shape=tuple(image.shape[-2:]),
        batch_input_shape=tuple(image.shape[-2:]),
        scale_factor=(resized[1] / original[1], resized[0] / original[0])))
    with torch.no_grad():
        found = model.predict(image, [sample], rescale=True)[0].pred_instances
    return dict(boxes=found.bboxes, scores=found.scores, labels=found.labels)
