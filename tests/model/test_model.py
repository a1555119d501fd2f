""" The model's interface: modes, sizes, heads, initialisation, features. test_equivalence.py compares its outputs. """
import copy
import inspect
import subprocess
import sys
from unittest import mock

import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import given, settings, strategies as st
from timm.layers import DropPath, Mlp, set_reentrant_ckpt
from timm.models import group_parameters
from torch.utils._pytree import tree_leaves

from tests.support.forms import gradients, loss_of, make_input, make_model
from pvt_timm import PyramidVisionTransformer, checkpoint_filter_fn, pvt, variants
from pvt_timm.formats.mapping import from_timm
from pvt_timm.sliced_mlp import SLICE_TOKENS, SlicedMlp
from tests.support.reference import images, logits, max_diff

VARIANTS = ('pvt_tiny', 'pvt_small', 'pvt_medium', 'pvt_large', 'pvt_huge_v2', 'test_pvt')
DIMS, STRIDES = (16, 32, 40, 64), (4, 8, 16, 32)
examples = settings(max_examples=20, deadline=None, derandomize=True)
sides = st.integers(32, 130)


def create(**kwargs):
    return timm.create_model('test_pvt', **kwargs)


@pytest.fixture(scope='module')
def model():
    return make_model()


@pytest.fixture(scope='module')
def net():
    return make_model(features_only=True)


def test_import(client_env):
    code = (
        "import warnings, logging, sys; warnings.simplefilter('error', UserWarning); logging.basicConfig(level=0)\n"
        "import timm; before = set(timm.list_models()); import pvt_timm\n"
        "print(sorted(set(timm.list_models()) - before))\n"
        "assert 'transformers' not in sys.modules and 'matplotlib' not in sys.modules\n")
    run = subprocess.run(
        [sys.executable, '-c', code], env=client_env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stdout.strip() == str(sorted(VARIANTS)), run.stderr
    assert 'egistry' not in run.stderr and 'verwriting' not in run.stderr, run.stderr


def test_registry():
    runs = dict(
        pvt_tiny='20210831_103110-17b566bd', pvt_small='20210906_142921-b6c94a5b',
        pvt_medium='20210831_103243-55effa1b')
    top1 = dict(pvt_tiny=75.1, pvt_small=79.8, pvt_medium=81.2, pvt_large=81.7)
    tags = [f'{v}.in1k' for v in top1]
    assert sorted(timm.list_pretrained('pvt_*', exclude_filters='pvt_v2*')) == sorted(
        tags + [f'{v}.retinanet_coco' for v in runs])
    for v, run in runs.items():
        cfg = timm.get_pretrained_cfg(f'{v}.retinanet_coco')
        folder = f'retinanet_pvt-{v[4]}_fpn_1x_coco'
        assert cfg.url == f'https://download.openmmlab.com/mmdetection/v2.0/pvt/{folder}/{folder}_{run}.pth'
        assert cfg.num_classes == 0
    for tag in tags:
        v = tag.partition('.')[0]
        cfg = timm.get_pretrained_cfg(v)
        assert (cfg.tag, cfg.num_classes, cfg.license, variants.TOP1[tag]) == ('in1k', 1000, 'apache-2.0', top1[v])
        assert (cfg.pool_size, cfg.min_input_size, cfg.fixed_input_size) == (None, (3, 32, 32), False)
        assert cfg.url == f'https://github.com/whai362/PVT/releases/download/v2/{v}.pth'
        assert cfg.hf_hub_id == f'Zetatech/pvt-{v[4:]}-224' and 'whai362/PVT' in cfg.origin_url
        data = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict())
        assert (data['crop_pct'], data['interpolation'], data['input_size']) == (0.875, 'bicubic', (3, 224, 224))
        assert data['mean'] == (0.485, 0.456, 0.406) and data['std'] == (0.229, 0.224, 0.225)


# Sizes

def shapes(batch, h, w):
    return [(batch, c, h // s, w // s) for c, s in zip(DIMS, STRIDES)]


@torch.no_grad()
@examples
@given(h=sides, w=sides, batch=st.integers(0, 3))
def test_any_size(model, net, h, w, batch):
    x = make_input(batch, h, w)
    tokens = model.forward_features(x)
    assert tokens.shape == (batch, 1 + (h // 32) * (w // 32), 64)
    assert model.forward_head(tokens).shape == (batch, 10)
    for maps in (net(x), model.forward_intermediates(x, intermediates_only=True)):
        assert [tuple(f.shape) for f in maps] == shapes(batch, h, w)
        assert all(f.isfinite().all() for f in maps)
    if batch:  # images of a batch do not see each other, pixels that fill no patch of the first stage change nothing
        first = model(x[:1, :, :h // 4 * 4, :w // 4 * 4].contiguous())
        assert max_diff(model(x)[:1], first) <= 1e-4 * first.abs().max()


@torch.no_grad()
@pytest.mark.parametrize('img_size', [32, 64, (48, 80), [64, 32]])
def test_img_size(img_size):
    model = make_model(img_size=img_size, dtype=torch.float64)
    h, w = (img_size, img_size) if isinstance(img_size, int) else img_size
    sd = from_timm(model.state_dict(), 'original')[0]
    for size in ((h, w), (40, 72)):
        x = images(1, 3, *size)
        assert max_diff(model(x), logits(sd, x, img_size=(h, w))) <= 1e-10


@torch.no_grad()
@examples
@given(old=st.tuples(sides, sides), new=st.tuples(sides, sides), dense=st.booleans())
def test_set_input_size(old, new, dense):
    """The result equals a model that is created at the new size and loads the same weights."""
    kwargs = dict(class_token=False) if dense else {}
    model = make_model(img_size=old, **kwargs)
    other = create(img_size=new, **kwargs).eval()
    other.pretrained_model_args = dict(img_size=old)  # as timm's argument of that name, where it has it
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))
    model.set_input_size(new)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    x = make_input(1, *new)
    assert torch.equal(model(x), other(x))
    before = [p for p in model.parameters()]
    model.set_input_size(new)
    assert all(a is b for a, b in zip(before, model.parameters()))


def test_set_input_size_keeps_what_is_frozen():
    model = create(dtype=torch.bfloat16)
    model.stages[1].pos_embed.requires_grad_(False)
    model.set_input_size((64, 96))
    assert [s.grid_size for s in model.stages] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [s.pos_embed.requires_grad for s in model.stages] == [True, False, True, True]
    assert {s.pos_embed.dtype for s in model.stages} == {torch.bfloat16}


# What is refused

@pytest.mark.parametrize('kwargs', [
    dict(global_pool='max'), dict(class_token=False, global_pool='token'), dict(img_size=31), dict(img_size=(64, 16)),
    dict(weight_init='xavier'), dict(output_fmt='NHWC'), dict(embed_dims=(8, 16, 16)), dict(num_heads=(1, 2)),
    dict(embed_dims=(16, 32, 40, 60)), dict(sr_ratios=(4, 2, 1, 2), img_size=64),
    dict(features_only=True, feature_cls='tuple'),
], ids=str)
def test_refused_at_construction(kwargs):
    with pytest.raises(AssertionError):
        create(**kwargs)


@pytest.mark.parametrize('call', [
    lambda m: m.reset_classifier(3, 'max'),
    lambda m: m.set_input_size(16),
    lambda m: m.set_input_size(64, patch_size=8),
    lambda m: m.forward_intermediates(make_input(1, 32, 32), output_fmt='NLC'),
    lambda m: m.forward_intermediates(make_input(1, 32, 32), indices=[4]),
    lambda m: m.prune_intermediate_layers([4]),
    lambda m: m.init_weights('jax'),
])
def test_refused_later(call):
    """After an error, the model is unchanged."""
    model = create().eval()
    with pytest.raises(AssertionError):
        call(model)
    assert (model.global_pool, model.num_classes, len(model.stages)) == ('token', 10, 4)
    assert model.stages[0].grid_size == (8, 8) and model(make_input(1, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize('kwargs', [{}, dict(class_token=False), dict(features_only=True)], ids=str)
def test_refused_inputs(kwargs):
    model = create(output_stride=32, **kwargs)
    for size in ((31, 32), (32, 31), (16, 64)):
        with pytest.raises(AssertionError, match='at least 32'):
            model(make_input(1, *size))
    with pytest.raises(RuntimeError, match='channels'):
        model(make_input(1, 32, 32, 4))
    with pytest.raises(TypeError, match='bogus'):
        create(bogus=1, **kwargs)
    with pytest.raises(ValueError, match='output_stride 32 only.* 4, 8, 16, 32'):
        create(output_stride=8, **kwargs)
    with pytest.raises(IndexError):
        create(features_only=True, out_indices=(4,))


def test_three_stages_of_larger_patches():
    model = PyramidVisionTransformer(
        img_size=64, patch_size=8, embed_dims=(8, 16, 24), depths=(1, 1, 2), num_heads=(1, 2, 3), sr_ratios=(8, 2, 1),
        mlp_ratios=(2, 2, 2), num_classes=4)
    with pytest.raises(AssertionError, match='at least 64'):
        model(make_input(1, 63, 64))
    assert model(make_input(1, 64, 80)).shape == (1, 4)
    assert [(f['num_chs'], f['reduction']) for f in model.feature_info] == [(8, 8), (16, 16), (24, 32)]
    assert model.no_weight_decay() == {'stages.2.cls_token'}
    model.double().eval().reset_classifier(7)
    assert (model.num_classes, model.global_pool) == (7, 'token') and model.get_classifier() is model.head
    assert model(images(2, 3, 64, 64)).shape == (2, 7) and not model.head.training


# Modes and heads

@torch.no_grad()
def test_global_pool(model):
    x = make_input(2, 64, 96)
    tokens = model.forward_features(x)
    for pool, want in (('token', tokens[:, 0]), ('avg', tokens[:, 1:].mean(1)), ('', tokens)):
        other = create(global_pool=pool).eval()
        other.load_state_dict(model.state_dict())
        assert torch.allclose(other(x), other.head(want), atol=1e-5)
        assert torch.allclose(other.forward_head(tokens, pre_logits=True), want, atol=1e-5)
        other.reset_classifier(0)
        assert other.global_pool == pool and torch.allclose(other(x), want, atol=1e-5)


@torch.no_grad()
def test_dense_mode():
    dense = make_model(class_token=False)
    x = make_input(2, 64, 96)
    fmap = dense.forward_features(x)
    assert fmap.shape == (2, 64, 2, 3) and dense.global_pool == 'avg'
    dense.reset_classifier(3, '')
    assert dense(x).shape == (2, 3, 2, 3)
    dense.reset_classifier(0, '')
    assert torch.equal(dense(x), fmap)


@torch.no_grad()
@pytest.mark.parametrize('class_token', [True, False])
def test_norm_and_format_of_the_output(class_token):
    """`final_norm` and `output_fmt` are independent: the first sets the final norm, the second the shape."""
    x = make_input(2, 64, 96)
    by = {}
    for norm in (True, False):
        for fmt in ('NLC', 'NCHW'):
            model = make_model(class_token=class_token, final_norm=norm, output_fmt=fmt)
            assert isinstance(model.norm, nn.LayerNorm if norm else nn.Identity)
            assert model.global_pool == ('token' if class_token and fmt == 'NLC' else 'avg')
            assert model.num_prefix_tokens == (class_token and fmt == 'NLC')
            out = model.forward_features(x)
            assert out.shape == ((2, class_token + 6, 64) if fmt == 'NLC' else (2, 64, 2, 3))
            assert model(x).shape == (2, 10) and model.forward_head(out, pre_logits=True).shape == (2, 64)
            final, maps = model.forward_intermediates(x, norm=True)
            assert torch.equal(final, out)
            patches = out[:, class_token:] if fmt == 'NLC' else out.flatten(2).transpose(1, 2)
            torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), patches)
            scripted = torch.jit.script(model)
            torch.testing.assert_close(scripted(x), model(x))
            by[norm, fmt] = model, patches
    for norm in (True, False):
        torch.testing.assert_close(by[norm, 'NLC'][1], by[norm, 'NCHW'][1])
    normed = by[True, 'NCHW'][0].norm(by[False, 'NCHW'][1])
    torch.testing.assert_close(normed, by[True, 'NCHW'][1])
    assert not torch.allclose(normed, by[False, 'NCHW'][1])
    model = by[True, 'NCHW'][0]
    model.prune_intermediate_layers(1, prune_norm=True)
    torch.testing.assert_close(model.forward_features(x).flatten(2).transpose(1, 2), by[False, 'NCHW'][1])


def test_layers_are_pluggable():
    class Block(pvt.Block):
        pass

    model = create(
        block_fn=Block, mlp_layer=Mlp, act_layer='relu', norm_layer=lambda dim, **dd: nn.LayerNorm(dim, eps=0.5, **dd))
    block = model.stages[0].blocks[0]
    assert type(block) is Block and type(block.mlp) is Mlp and isinstance(block.mlp.act, nn.ReLU)
    assert (block.norm1.eps, block.norm2.eps, model.norm.eps) == (0.5, 0.5, 0.5)
    assert (model.stages[0].patch_embed.norm.eps, block.attn.norm.eps) == (1e-5, 1e-5)
    assert model(make_input(1, 32, 64)).shape == (1, 10)


# Features

@torch.no_grad()
@pytest.mark.parametrize('feature_cls, indices, taken', [
    *((cls, (1, 3), (1, 3)) for cls in ('dict', 'hook', 'getter', 'fx')),
    ('list', 1, (3,)), ('list', 2, (2, 3)), ('list', (0,), (0,)), ('list', (1, 2), (1, 2)), ('list', (-1,), (3,)),
    ('list', (-3, -1), (1, 3)), ('list', range(3), (0, 1, 2)), ('config', (0, 2), (0, 2)),
])
def test_features_only(net, feature_cls, indices, taken):
    config = dict(out_indices=indices, feature_cls=feature_cls)
    if feature_cls == 'config':  # timm's other way to say it
        config = dict(feature_cfg=dict(out_indices=indices))
    other = create(features_only=True, **config).eval()
    state = net.state_dict()
    for key, value in other.state_dict().items():  # the wrappers name the same parameters differently
        value.copy_(state[key.removeprefix('model.').removeprefix('graph_module.').replace('stages.', 'stages_')])
    assert other.feature_info.channels() == [DIMS[i] for i in taken]
    assert other.feature_info.reduction() == [STRIDES[i] for i in taken]
    assert other.feature_info.module_name() == [f'stages.{i}' for i in taken]
    x = make_input(2, 64, 96)
    for a, i in zip(tree_leaves(other(x)), taken, strict=True):
        assert torch.equal(a, net(x)[i])
        assert a.is_contiguous(memory_format=torch.channels_last)  # of tokens, without a copy


@torch.no_grad()
@pytest.mark.parametrize('dense', [False, True])
def test_forward_intermediates(dense):
    model = make_model(class_token=not dense)
    x = make_input(2, 64, 96)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert [tuple(f.shape) for f in maps] == shapes(2, 64, 96)
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps[:3], normed[:3]))
    if dense:
        assert torch.equal(maps[3], normed[3]) and torch.equal(maps[3], final)
    else:
        assert torch.equal(normed[3].flatten(2).transpose(1, 2), final[:, 1:])
        assert not torch.allclose(maps[3], normed[3])
    assert torch.equal(model.forward_intermediates(x, indices=[0])[0], final)
    only = model.forward_intermediates(x, indices=[0, 2], stop_early=True, intermediates_only=True)
    assert len(only) == 2 and torch.equal(only[0], maps[0]) and torch.equal(only[1], maps[2])


@torch.no_grad()
@pytest.mark.parametrize('indices, stages', [(1, 4), ([0, 2], 3), ([0], 1), ([-1], 4)])
def test_prune(model, indices, stages):
    x = make_input(1, 64, 96)
    want = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    pruned = copy.deepcopy(model)
    taken = pruned.prune_intermediate_layers(indices)
    assert len(pruned.stages) == stages and max(taken) == stages - 1
    assert pruned.num_features == DIMS[stages - 1] and isinstance(pruned.head, torch.nn.Identity)
    got = pruned.forward_intermediates(x, indices=taken, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert pruned(x).shape[1 if stages < 4 else -1] == DIMS[stages - 1]
    assert pruned.forward_features(x).shape[-1 if stages == 4 else 1] == DIMS[stages - 1]


# Initialisation, devices, training

@pytest.mark.parametrize('later', [False, True])
def test_initialisation(later):
    """Weights are initialised by the constructor, or by `init_weights` after the meta device."""
    torch.manual_seed(0)
    model = timm.create_model('pvt_tiny', device='meta' if later else 'cpu')
    if later:
        assert all(p.is_meta for p in [*model.parameters(), *model.buffers()])
        model.to_empty(device='cpu')
        for p in model.parameters():
            nn.init.constant_(p, float('nan'))
        model.init_weights(needs_reset=True)
    for name, p in model.named_parameters():
        if name.endswith(('pos_embed', 'cls_token')) or (p.ndim == 2 and name.endswith('weight')):
            assert abs(p.std() - 0.02) < 2e-3 and p.abs().max() <= 2, name
        elif 'norm' in name:
            assert torch.equal(p, torch.ones_like(p) if name.endswith('weight') else torch.zeros_like(p)), name
        elif p.ndim == 4 or name.endswith(('patch_embed.proj.bias', 'sr.bias')):  # of convolutions, as torch has them
            weight = model.get_parameter(name.replace('bias', 'weight'))
            assert abs(p.std() * (3 * weight[0].numel()) ** 0.5 - 1) < 0.2, name
        else:
            assert not p.any(), name


@pytest.fixture(params=[False, True])
def reentrant(request):
    set_reentrant_ckpt(request.param)
    yield
    set_reentrant_ckpt(False)


@pytest.mark.usefixtures('reentrant')
@pytest.mark.parametrize('kwargs, train, twice', [
    ({}, True, [2] * 6), ({}, False, [2] * 6),  # in evaluation mode but for its dropout, as for Monte Carlo
    (dict(features_only=True), True, [1, 2, 2, 2, 2, 1])])  # timm's wrapper: not the first and last stage
def test_checkpointing(kwargs, train, twice):
    """With checkpointing, gradients are the same, and blocks run again in the backward pass.

    Dropout is the same in both runs. Reentrant checkpoints first run blocks without gradients, where MLPs could use
    slices.
    """
    torch.manual_seed(0)
    model, x = create(drop_path_rate=0.2, proj_drop_rate=0.3, **kwargs).train(train), make_input(1, 192, 192)
    assert 48 * 48 > SLICE_TOKENS
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.train()
    calls, results = [], []
    blocks = [m for m in model.modules() if isinstance(m, pvt.Block)]
    for block in blocks:
        block.register_forward_pre_hook(lambda m, args: calls.append(m))
    for enable, times in ((False, [1] * 6), (True, twice)):
        del calls[:]
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        out = tree_leaves(model(x))
        loss_of(out).backward()
        results.append([o.detach() for o in out] + list(gradients(model).values()))
        assert [calls.count(block) for block in blocks] == times
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_arguments():
    model = create(drop_rate=.1, pos_drop_rate=.2, proj_drop_rate=.3, attn_drop_rate=.4, drop_path_rate=.5)
    blocks = [b for s in model.stages for b in s.blocks]
    for name in ('drop_path1', 'drop_path2'):
        rates = [getattr(getattr(b, name), 'drop_prob', 0.) for b in blocks]
        assert rates == pytest.approx([.1 * i for i in range(6)])
    block = blocks[0]
    assert (model.head_drop.p, model.stages[0].pos_drop.p, block.attn.proj_drop.p, block.mlp.drop1.p, block.mlp.drop2.p,
            block.attn.attn_drop.p) == (.1, .2, .3, .3, .3, .4)
    x = make_input(1, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_dropout_before_the_head():
    model = create(drop_rate=0.5)
    tokens = torch.ones(8, 2, 64)
    pre_logits = model.forward_head(tokens, pre_logits=True)
    assert set(pre_logits.unique().tolist()) == {0., 2.} and 0.3 < (pre_logits == 0).float().mean() < 0.7
    torch.manual_seed(0)
    first = model.forward_head(tokens)
    assert not torch.equal(first, model.forward_head(tokens))  # the head sees it


def test_weight_decay_and_groups():
    assert create().no_weight_decay() == {'stages.3.cls_token'}  # the position embeddings are decayed, as published
    assert create(class_token=False).no_weight_decay() == set()
    model = timm.create_model('pvt_tiny', device='meta')
    for coarse, count in ((True, 6), (False, 11)):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(n for g in groups.values() for n in g) == sorted(n for n, _ in model.named_parameters())
        assert len(groups) in (count - 1, count), groups.keys()


@torch.no_grad()
def test_inputs_in_any_layout(model):
    x = make_input(2, 64, 96)
    want = model(x)
    for other in (x.to(memory_format=torch.channels_last), torch.cat([x, x], 1)[:, :3], x.expand(2, 3, 64, 96)):
        assert max_diff(model(other), want) <= 1e-4 * want.abs().max()


def test_defaults():
    """Without arguments, the class is PVT-Small, and a block has a plain MLP and no dropout.

    timm's `create_model` takes another MLP in this package.
    """
    assert type(create(device='meta').stages[0].blocks[0].mlp) is SlicedMlp
    assert type(create(device='meta', mlp_layer=Mlp).stages[0].blocks[0].mlp) is Mlp
    ours, small = PyramidVisionTransformer(device='meta'), timm.create_model('pvt_small', device='meta', mlp_layer=Mlp)
    assert type(ours.stages[0].blocks[0].mlp) is Mlp
    for model in (ours, small):
        model.attention = [(b.attn.num_heads, b.attn.sr_ratio, b.attn.scale) for s in model.stages for b in s.blocks]
    assert str(ours) == str(small) and ours.attention == small.attention
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}
    block = pvt.Block(32, 2)
    assert (block.attn.sr_ratio, block.mlp.fc1.out_features, block.norm1.eps) == (1, 128, 1e-6)
    assert str(pvt.Attention(32)) == str(block.attn) and pvt.Attention(32).num_heads == 8
    assert block.attn.q.bias is not None
    stage = pvt.PyramidVisionTransformerStage(3, 16, 1, (2, 2), num_heads=1)
    for m in (m for x in (ours, block, stage) for m in x.modules()):
        assert not isinstance(m, DropPath) and getattr(m, 'p', 0) == 0
    for name in VARIANTS:
        assert inspect.signature(timm.models.model_entrypoint(name)).parameters['pretrained'].default is False


@pytest.mark.parametrize('name', VARIANTS)
def test_arguments_of_variants(name):
    """The arguments in `VARIANTS` are those that the entrypoint gives to the model."""
    assert list(variants.VARIANTS) == list(VARIANTS)
    args = {**dict(img_size=224, sr_ratios=(8, 4, 2, 1), mlp_ratios=(8, 8, 4, 4)), **variants.VARIANTS[name]}
    model = timm.create_model(name, device='meta', weight_init='skip')
    blocks = [stage.blocks[0] for stage in model.stages]
    assert args == dict(
        img_size=model.stages[0].grid_size[0] * 4,
        depths=tuple(len(stage.blocks) for stage in model.stages),
        embed_dims=tuple(stage.dim for stage in model.stages),
        num_heads=tuple(block.attn.num_heads for block in blocks),
        sr_ratios=tuple(block.attn.sr_ratio for block in blocks),
        mlp_ratios=tuple(block.mlp.fc1.out_features / block.mlp.fc1.in_features for block in blocks),
    )


# MLPs on slices of tokens

def rows_of(mlp, x):
    """Return the number of tokens in each call of the MLP's second layer."""
    with mock.patch.object(mlp.fc2, 'forward', wraps=mlp.fc2.forward) as forward:
        mlp(x)
    return [call.args[0].shape[:-1].numel() for call in forward.call_args_list]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('batch, tokens', [(2, SLICE_TOKENS), (1, SLICE_TOKENS + 1), (3, 1000)])
def test_mlp_slices_change_nothing(batch, tokens, dtype):
    torch.manual_seed(0)
    mlp = SlicedMlp(16, 64, dtype=dtype).eval()
    x = torch.randn(batch, tokens, 16, dtype=dtype)
    whole = Mlp.forward(mlp, x)
    with torch.no_grad():
        assert max_diff(mlp(x), whole.detach()) <= 20 * torch.finfo(dtype).eps
        assert sum(rows_of(mlp, x)) == batch * tokens and max(rows_of(mlp, x)) == SLICE_TOKENS
        assert torch.equal(mlp(x[:1, :SLICE_TOKENS]), Mlp.forward(mlp, x[:1, :SLICE_TOKENS]))  # one slice
    assert torch.equal(mlp(x), whole)  # with gradients


def test_mlp_slices_are_left_where_somebody_looks():
    x = torch.randn(2, SLICE_TOKENS, 16)
    seen = []
    for change in (
            lambda mlp: mlp.fc1.register_forward_hook(lambda m, args, out: seen.append(out.shape)),
            lambda mlp: setattr(mlp, 'fc1', nn.Sequential(mlp.fc1).eval()),
            lambda mlp: setattr(mlp, 'drop2', type('Watcher', (nn.Identity,), {})().eval()),
            lambda mlp: mlp.train(),
            lambda mlp: mlp.drop2.train(),
            lambda mlp: mlp.drop1.train(),
    ):
        mlp = SlicedMlp(16, 64, drop=0.5).eval()
        change(mlp)
        with torch.no_grad():
            assert rows_of(mlp, x) == [2 * SLICE_TOKENS]
    assert seen == [(2, SLICE_TOKENS, 64)]
