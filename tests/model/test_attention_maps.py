""" timm's AttentionExtract returns the attention of every block (whose numbers are in downstream/test_migration.py).

The map of a block is (batch, heads, queries, keys): queries are the tokens of its stage, H/4 * W/4 to H/32 * W/32, keys
are those tokens reduced `sr_ratio` times per side. The class token is the first query and key of stage 4. Fused
attention never holds the map, so the model is made with `timm.layers.set_fused_attn(False)`.
"""
import pytest
import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn
from timm.utils import AttentionExtract

import pvt_timm  # noqa: F401  registers the models
from reference import images, randomize


@pytest.fixture
def model():
    before = use_fused_attn()
    set_fused_attn(False)
    yield randomize(timm.create_model('test_pvt', dtype=torch.float64)).eval()
    set_fused_attn(before)


@torch.no_grad()
@pytest.mark.parametrize('method, node', [('fx', 'softmax'), ('hook', 'attn_drop')])
@pytest.mark.parametrize('size', [(64, 64), (96, 160)])
def test_every_block(model, method, node, size):
    maps = AttentionExtract(model, method=method)(images(2, 3, *size))
    shapes = {}
    for i, stage in enumerate(model.stages):
        h, w, prefix = size[0] // 4 // 2 ** i, size[1] // 4 // 2 ** i, i == 3
        for j, block in enumerate(stage.blocks):
            sr, heads = block.attn.sr_ratio, block.attn.num_heads
            shapes[f'stages.{i}.blocks.{j}.attn.{node}'] = (2, heads, prefix + h * w, prefix + (h // sr) * (w // sr))
    assert {name: tuple(m.shape) for name, m in maps.items()} == shapes
    for m in maps.values():
        torch.testing.assert_close(m.sum(-1), torch.ones(m.shape[:-1], dtype=m.dtype))
