""" PVT v1 written down once more, as plainly as possible, to compare the package with.

`tokens`, `logits` and `features` are functions of a state dict under the names of the original code. They share no code
with `pvt_timm`. `load_original` runs the original code itself, from a checkout.
"""
import importlib.util
import logging
import math
import os
import sys
import types
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import pytest
import torch
import torch.nn.functional as F

StateDict = Dict[str, torch.Tensor]
HEADS = (1, 2, 5, 8)


def _linear(sd: StateDict, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ sd[f'{name}.weight'].T + sd[f'{name}.bias']


def _norm(sd: StateDict, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return x * sd[f'{name}.weight'] + sd[f'{name}.bias']


def _patches(sd: StateDict, name: str, x: torch.Tensor) -> torch.Tensor:
    """A convolution whose stride is its kernel, (B, C, H, W) to (B, H', W', C'). What does not fill a patch is cut."""
    weight = sd[f'{name}.weight']
    p = weight.shape[-1]
    B, C, H, W = x.shape
    h, w = H // p, W // p
    x = x[:, :, :h * p, :w * p].reshape(B, C, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(B, h, w, C * p * p)
    return x @ weight.flatten(1).T + sd[f'{name}.bias']


def _attention(sd: StateDict, name: str, x: torch.Tensor, h: int, w: int, heads: int) -> torch.Tensor:
    B, N, C = x.shape
    d = C // heads
    kv = x
    if f'{name}.sr.weight' in sd:
        kv = x.transpose(1, 2).reshape(B, C, h, w)
        kv = _patches(sd, f'{name}.sr', kv).reshape(B, -1, C)
        kv = _norm(sd, f'{name}.norm', kv, 1e-5)
    q = _linear(sd, f'{name}.q', x)
    k, v = _linear(sd, f'{name}.kv', kv).split(C, dim=-1)
    out = torch.empty_like(q)
    for i in range(heads):
        part = slice(i * d, (i + 1) * d)
        for start in range(0, N, 8192):  # not all rows of the attention matrix at once
            rows = slice(start, start + 8192)
            attn = torch.softmax(q[:, rows, part] @ k[:, :, part].transpose(1, 2) / math.sqrt(d), dim=-1)
            out[:, rows, part] = attn @ v[:, :, part]
    return _linear(sd, f'{name}.proj', out)


def _position(pos: torch.Tensor, grid: Tuple[int, int], h: int, w: int) -> torch.Tensor:
    pos = pos.reshape(1, grid[0], grid[1], -1).permute(0, 3, 1, 2)
    pos = F.interpolate(pos, size=(h, w), mode='bilinear', align_corners=False)
    return pos.flatten(2).transpose(1, 2)


def _run(sd, x, class_token, heads, img_size) -> Tuple[List[torch.Tensor], torch.Tensor]:
    maps = []
    for i in range(4):
        s = i + 1
        x = _patches(sd, f'patch_embed{s}.proj', x)
        B, h, w, C = x.shape
        x = _norm(sd, f'patch_embed{s}.norm', x.reshape(B, h * w, C), 1e-5)
        pos = sd[f'pos_embed{s}']
        grid = img_size[0] // (4 * 2 ** i), img_size[1] // (4 * 2 ** i)
        cls_pos, pos = pos[:, :pos.shape[1] - grid[0] * grid[1]], pos[:, pos.shape[1] - grid[0] * grid[1]:]
        x = x + _position(pos, grid, h, w)
        if class_token and i == 3:
            x = torch.cat([(sd['cls_token'] + cls_pos).expand(B, 1, C), x], dim=1)
        b = 0
        while f'block{s}.{b}.norm1.weight' in sd:
            name = f'block{s}.{b}'
            x = x + _attention(sd, f'{name}.attn', _norm(sd, f'{name}.norm1', x, 1e-6), h, w, heads[i])
            y = _linear(sd, f'{name}.mlp.fc1', _norm(sd, f'{name}.norm2', x, 1e-6))
            y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
            x = x + _linear(sd, f'{name}.mlp.fc2', y)
            b += 1
        last = x
        x = x[:, x.shape[1] - h * w:].transpose(1, 2).reshape(B, C, h, w)
        maps.append(x)
    return maps, last


def tokens(sd: StateDict, x: torch.Tensor, heads=HEADS, img_size=(224, 224)) -> torch.Tensor:
    """All tokens of the classifier after the final norm, the class token first."""
    return _norm(sd, 'norm', _run(sd, x, True, heads, img_size)[1], 1e-6)


def logits(sd: StateDict, x: torch.Tensor, heads=HEADS, img_size=(224, 224)) -> torch.Tensor:
    return _linear(sd, 'head', tokens(sd, x, heads, img_size)[:, 0])


def features(sd: StateDict, x: torch.Tensor, heads=HEADS, img_size=(224, 224)) -> List[torch.Tensor]:
    """Feature maps of the dense backbone: without the class token, without the final norm."""
    return _run(sd, x, False, heads, img_size)[0]


def randomize(model: torch.nn.Module, seed: int = 0, scale: float = 1.) -> torch.nn.Module:
    """Give every parameter random values, so that each one matters: no bias is 0, no norm is neutral, no two are equal.

    Args:
        model: Model to change.
        seed: Of the values.
        scale: 1 keeps the scale of activations through a layer.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if name.endswith(('pos_embed', 'cls_token', 'position_embeddings')):
                noise *= 0.5 * scale
            elif p.ndim > 1:
                noise *= scale / math.sqrt(p[0].numel())
            elif 'norm' in name and name.endswith('weight'):
                noise = 1 + 0.1 * noise
            else:
                noise *= 0.1 * scale
            p.copy_(noise)
    return model


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def max_diff(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    return (a - b).abs().max().item()


def pvt_checkout() -> Path:
    """The checkout of the original code, or skip the test."""
    path = os.environ.get('PVT_CHECKOUT')
    if not path:
        pytest.skip('PVT_CHECKOUT does not name a checkout of https://github.com/whai362/PVT')
    return Path(path)


def _stand_ins() -> Dict[str, types.ModuleType]:
    """Modules that the original imports: old timm under its old names, mmdetection, mmsegmentation and mmcv."""
    from timm.layers import DropPath, to_2tuple, trunc_normal_

    def module(name, **names):
        m = types.ModuleType(name)
        m.__dict__.update(names)
        m.__path__ = []
        return m

    class Registry:
        def register_module(self, *args, **kwargs):
            return lambda cls: cls

    # The original's own names must not end up in timm's registry, which holds ours.
    out = {
        'timm.models.layers': module(
            'timm.models.layers', DropPath=DropPath, to_2tuple=to_2tuple, trunc_normal_=trunc_normal_),
        'timm.models.registry': module('timm.models.registry', register_model=lambda fn: fn),
        'timm.models.vision_transformer': module('timm.models.vision_transformer', _cfg=lambda **kwargs: kwargs),
        'mmcv': module('mmcv'),
        'mmcv.runner': module('mmcv.runner', load_checkpoint=None),
    }
    for name in ('mmdet', 'mmseg'):
        out[name] = module(name)
        out[f'{name}.models'] = module(f'{name}.models')
        out[f'{name}.models.builder'] = module(f'{name}.models.builder', BACKBONES=Registry())
        out[f'{name}.utils'] = module(f'{name}.utils', get_root_logger=logging.getLogger)
    return out


def load_original(name: str, checkout: Optional[Path] = None) -> types.ModuleType:
    """Import 'classification', 'detection' or 'segmentation' `pvt.py` of the original, or skip the test without it."""
    path = (checkout or pvt_checkout()) / name / 'pvt.py'
    spec = importlib.util.spec_from_file_location(f'original_pvt_{name}', path)
    module = importlib.util.module_from_spec(spec)
    stand_ins = _stand_ins()
    before = {k: sys.modules.get(k) for k in stand_ins}
    sys.modules.update(stand_ins)
    try:
        spec.loader.exec_module(module)
    finally:
        for k, v in before.items():
            if v is None:
                del sys.modules[k]
            else:
                sys.modules[k] = v
    return module
