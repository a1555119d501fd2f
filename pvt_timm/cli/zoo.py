""" What there is: models, tags, cost and published accuracy. """
from typing import Any, Dict, List, Tuple

import timm
import torch
from timm.layers import to_2tuple

from ..pvt import PyramidVisionTransformer
from .. import digits, pvt

default_cfgs = {**pvt.default_cfgs, **digits.default_cfgs}

__all__ = ['MODELS', 'TOP1', 'count_macs', 'zoo']

MODELS = tuple(default_cfgs)

# Top-1 on the ImageNet-1K validation set as published with the weights (test_pvt: on the held-out digits, measured)
TOP1 = {
    'pvt_tiny.in1k': 75.1,
    'pvt_small.in1k': 79.8,
    'pvt_medium.in1k': 81.2,
    'pvt_large.in1k': 81.7,
    'test_pvt.digits': 99.2,
}


def count_macs(model: PyramidVisionTransformer, img_size: Tuple[int, int]) -> int:
    """Multiply-accumulates of one image, in matrix products and convolutions, attention included.

    Args:
        model: The model, on any device ('meta' will do).
        img_size: Height and width in pixels.
    """
    total = 0
    size = to_2tuple(img_size)
    for stage in model.stages:
        embed = stage.patch_embed
        size = (size[0] // embed.patch_size, size[1] // embed.patch_size)
        tokens = size[0] * size[1]
        total += tokens * embed.proj.weight.numel()
        tokens += 1 if stage.cls_token is not None else 0
        for block in stage.blocks:
            attn = block.attn
            keys = tokens
            if attn.sr is not None:
                keys = (size[0] // attn.sr_ratio) * (size[1] // attn.sr_ratio)
                total += keys * attn.sr.weight.numel()
            total += keys * attn.kv.weight.numel()
            total += tokens * (attn.q.weight.numel() + attn.proj.weight.numel() + 2 * keys * attn.dim)
            total += tokens * (block.mlp.fc1.weight.numel() + block.mlp.fc2.weight.numel())
    if isinstance(model.head, torch.nn.Linear):
        total += model.head.weight.numel()
    return total


def zoo() -> List[Dict[str, Any]]:
    """One row per model and tag.

    Returns:
        Dicts with model, tag (None without weights), params (as the tag's mode has them), macs at img_size, top1 (None
        if not known), classes (0 for a backbone without head), and hf_hub_id, url or file of the weights.
    """
    rows = []
    for name in MODELS:
        for tag, cfg in default_cfgs[name].cfgs.items():
            model = timm.create_model(
                f'{name}.{tag}' if tag else name, num_classes=cfg.num_classes, device='meta', weight_init='skip')
            img_size = tuple(cfg.input_size[1:])
            rows.append(dict(
                model=name,
                tag=tag if cfg.has_weights else None,
                params=sum(p.numel() for p in model.parameters()),
                macs=count_macs(model, img_size),
                img_size=img_size,
                top1=TOP1.get(f'{name}.{tag}'),
                classes=cfg.num_classes,
                hf_hub_id=cfg.hf_hub_id or None,
                url=str(cfg.url) if cfg.url else None,
                file=str(cfg.file) if cfg.file else None,
            ))
    return rows
