""" timm's AttentionExtract returns the attention of every block.

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


@pytest.fixture
def unfused():
    before = use_fused_attn()
    set_fused_attn(False)
    yield
    set_fused_attn(before)


def expected_shapes(model, batch, height, width):
    shapes = []
    for i, stage in enumerate(model.stages):
        h, w = height // model.reductions[i], width // model.reductions[i]
        for block in stage.blocks:
            attn = block.attn
            keys = (h // attn.sr_ratio) * (w // attn.sr_ratio)
            prefix = stage.num_prefix_tokens
            shapes.append((batch, attn.num_heads, prefix + h * w, prefix + keys))
    return shapes


@pytest.mark.parametrize('name', ['test_pvt', 'pvt_tiny'])
@pytest.mark.parametrize('method', ['fx', 'hook'])
@pytest.mark.parametrize('size', [(64, 64), (96, 160)])
def test_every_block(name, method, size, unfused):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    expected = expected_shapes(model, 2, *size)
    extract = AttentionExtract(model, method=method)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = extract(x)
    node = 'softmax' if method == 'fx' else 'attn_drop'
    names = [f'stages.{i}.blocks.{j}.attn.{node}' for i, s in enumerate(model.stages) for j in range(len(s.blocks))]
    assert list(maps) == names
    assert [tuple(m.shape) for m in maps.values()] == expected
    for m in maps.values():
        torch.testing.assert_close(m.sum(-1), torch.ones(m.shape[:-1]))


def test_methods_agree_and_are_what_the_block_computes(unfused):
    torch.manual_seed(0)
    model = timm.create_model('test_pvt').eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        x = torch.randn(2, 3, 64, 96)
        maps = [list(AttentionExtract(model, method=method)(x).values()) for method in ('fx', 'hook')]
        for a, b in zip(*maps):
            torch.testing.assert_close(a, b)

        # by hand, for the class token of the last block, whose keys are not reduced
        tokens = {}
        attn = model.stages[-1].blocks[-1].attn
        handle = attn.register_forward_hook(lambda m, i, o: tokens.update(x=i[0]))
        model(x)
        handle.remove()
        q = attn.q(tokens['x'][:, :1]).reshape(2, 1, attn.num_heads, -1).transpose(1, 2)
        k = attn.kv(tokens['x'])[..., :attn.dim].reshape(2, -1, attn.num_heads, attn.head_dim).transpose(1, 2)
        expected = (q @ k.transpose(-2, -1) / attn.head_dim ** 0.5).softmax(-1)
        torch.testing.assert_close(maps[0][-1][:, :, :1], expected)
        assert maps[0][-1].std() > 1e-3
