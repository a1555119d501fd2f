""" A second implementation of PVT v1, as plain as possible, to compare the package with.

`tokens`, `logits` and `features` are functions of a state dict under the names of the original code. They share no code
with `pvt_timm`. `load_original` runs the original code itself, from a checkout.
"""
import importlib.util
import math
import os
import sys
import types
from pathlib import Path
from typing import Dict, List, Tuple
from unittest import mock

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
    """Apply a convolution whose stride is its kernel size: (B, C, H, W) to (B, H', W', C').

    Pixels that do not fill a patch are cut off.
    """
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
    """Return all tokens of the classifier after the final norm. The class token is the first."""
    return _norm(sd, 'norm', _run(sd, x, True, heads, img_size)[1], 1e-6)


def logits(sd: StateDict, x: torch.Tensor, heads=HEADS, img_size=(224, 224)) -> torch.Tensor:
    return _linear(sd, 'head', tokens(sd, x, heads, img_size)[:, 0])


def features(sd: StateDict, x: torch.Tensor, heads=HEADS, img_size=(224, 224)) -> List[torch.Tensor]:
    """Return the feature maps of the dense backbone, without class token and final norm."""
    return _run(sd, x, False, heads, img_size)[0]


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter random values and return the model. No bias is 0, no norm is 1, no two are equal.

    The scale of activations stays about the same through a layer.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if name.endswith(('pos_embed', 'cls_token', 'position_embeddings')):
                noise *= 0.5
            elif p.ndim > 1:
                noise /= math.sqrt(p[0].numel())
            elif 'norm' in name and name.endswith('weight'):
                noise = 1 + 0.1 * noise
            else:
                noise *= 0.1
            p.copy_(noise)
    return model


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def max_diff(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    return (a - b).abs().max().item()


def pvt_checkout() -> Path:
    """Return the path of the checkout of the original code. Without it, skip the test."""
    path = os.environ.get('PVT_CHECKOUT')
    if not path:
        pytest.skip('PVT_CHECKOUT does not name a checkout of https://github.com/whai362/PVT')
    return Path(path)


def load_original(name: str) -> types.ModuleType:
    """Import `pvt.py` from a folder of the original code and return the module. Without it, skip the test.

    `name` is 'classification', 'detection' or 'segmentation'. The module is not added to timm's registry, which holds
    our models. mmdetection, mmsegmentation and mmcv are not needed.
    """
    registry = types.SimpleNamespace(register_module=lambda: lambda cls: cls)
    stand_ins = {'mmcv.runner': types.SimpleNamespace(load_checkpoint=None)}
    for package in ('mmdet', 'mmseg'):
        stand_ins[f'{package}.models.builder'] = types.SimpleNamespace(BACKBONES=registry)
        stand_ins[f'{package}.utils'] = types.SimpleNamespace(get_root_logger=None)
    path = pvt_checkout() / name / 'pvt.py'
    spec = importlib.util.spec_from_file_location(f'original_pvt_{name}', path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, stand_ins), mock.patch('timm.models.registry.register_model', lambda fn: fn):
        spec.loader.exec_module(module)
    return module
