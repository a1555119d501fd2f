""" What a state dict is, and its way to timm's names and back. """
import random
from collections import OrderedDict

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from pvt_timm import PyramidVisionTransformer, checkpoint_filter_fn
from pvt_timm.checkpoints import (
    FORMATS,
    describe,
    detect,
    drop_parts,
    from_timm,
    map_to_timm,
    to_timm,
    unwrap,
)
from pvt_timm.pos_embed import resample_pos_embed, source_grid, stage_grids
from pvt_timm.pvt import VARIANTS, find_variant, resize_pos_embeds
from reference import images, randomize

SMALL = dict(img_size=32, embed_dims=(8, 16, 16, 24), depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 3),
             sr_ratios=(4, 2, 2, 1), mlp_ratios=(2, 2, 1, 1), num_classes=5)
WRAPPERS = ((), ('model',), ('state_dict',), ('state_dict_ema',), ('model_ema',), ('state_dict', 'model'))
PREFIXES = ('', 'module.', 'backbone.', 'module.backbone.', '_orig_mod.', 'model.')
examples = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def small(**kwargs) -> PyramidVisionTransformer:
    return randomize(PyramidVisionTransformer(**{**SMALL, **kwargs}, weight_init='skip'))


@pytest.fixture(scope='module')
def state():
    return small().state_dict()


def in_format(state, fmt):
    """`state` (timm's names) in another format, without what that has no place for."""
    if fmt == 'mmdet':
        state = drop_parts(state, ('class_token', 'norm', 'head'), class_row='stages.3.cls_token' in state)
    return from_timm(state, fmt)[0]


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def error(call, *args) -> str:
    with pytest.raises(ValueError) as info:
        call(*args)
    assert type(info.value) is ValueError and '\n' not in str(info.value)
    return str(info.value)


configs = st.fixed_dictionaries(dict(
    depths=st.tuples(*[st.integers(1, 3)] * 4),
    num_classes=st.integers(0, 12),
    in_chans=st.integers(1, 6),
    class_token=st.booleans(),
    qkv_bias=st.booleans(),
    sr_ratios=st.tuples(*[st.sampled_from((1, 2))] * 3, st.just(1)),
    img_size=st.tuples(st.sampled_from((32, 40, 64, 97)), st.sampled_from((32, 40, 64, 97))),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.float16, torch.bfloat16)),
))


@pytest.mark.parametrize('fmt', FORMATS)
@examples
@given(config=configs, wrappers=st.sampled_from(WRAPPERS), prefix=st.sampled_from(PREFIXES))
def test_round_trip(fmt, config, wrappers, prefix):
    if fmt == 'mmdet':
        config['qkv_bias'] = True  # its attention always has them
    state = small(**config).state_dict()
    source = in_format(state, fmt)
    assert list(source) == list(in_format(state, fmt))
    checkpoint = OrderedDict((prefix + k, v) for k, v in source.items())
    for wrapper in reversed(wrappers):
        checkpoint = {wrapper: checkpoint, 'epoch': 3}
    got = map_to_timm(checkpoint)
    assert (got.format, got.prefix, got.wrappers) == (fmt, prefix, wrappers)
    want = drop_parts(state, ('class_token', 'norm', 'head'), config['class_token']) if fmt == 'mmdet' else state
    assert equal(got.state_dict, want)
    assert len(got.dropped) == len(wrappers) and all('epoch' in k for k in got.dropped)
    assert equal(from_timm(got.state_dict, fmt)[0], source)
    # every key of both sides is accounted for, once
    assert sorted(k for new, _ in got.mapped for k in new) == sorted(want)
    assert sorted(k for _, old in got.mapped for k in old) == sorted(source)


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('fmt', FORMATS)
def test_variants_are_described(name, fmt):
    model = timm.create_model(name, device='meta')
    got = map_to_timm(in_format(model.state_dict(), fmt)).state_dict
    info = describe(got)
    assert info.variant == name and info.embed_dims == model.embed_dims and info.depths == model.depths
    assert info.sr_ratios == tuple(s.blocks[0].attn.sr_ratio for s in model.stages)
    assert info.img_size == ((32, 32) if name == 'test_pvt' else (224, 224)) and info.patch_size == 4
    assert info.mlp_ratios == ((4, 4, 4, 4) if name == 'test_pvt' else (8, 8, 4, 4))
    dense = fmt == 'mmdet'
    assert (info.class_token, info.class_row, info.norm, info.num_classes) == (
        not dense, not dense, not dense, 0 if dense else model.num_classes)


def test_original_names(state):
    source = from_timm(state, 'original')[0]
    assert {'pos_embed1', 'pos_embed4', 'cls_token', 'patch_embed1.proj.weight', 'block2.1.attn.sr.bias',
            'block4.0.attn.kv.weight', 'norm.weight', 'head.bias'} <= set(source)
    assert source['pos_embed4'].shape == (1, 2, 24)


def test_transformers_splits_and_merges(state):
    source = from_timm(state, 'transformers')[0]
    kv = state['stages.1.blocks.1.attn.kv.weight']
    name = 'pvt.encoder.block.1.1.attention.self.'
    assert torch.equal(source[name + 'key.weight'], kv[:16]) and torch.equal(source[name + 'value.weight'], kv[16:])
    assert source[name + 'key.weight'].untyped_storage().nbytes() == 16 * 16 * 4  # no view of the whole


def test_transformers_without_head(state):
    """`PvtModel` has no head and no 'pvt.' before its names."""
    source = {k.removeprefix('pvt.'): v for k, v in from_timm(drop_parts(state, ['head']), 'transformers')[0].items()}
    assert equal(map_to_timm(source).state_dict, drop_parts(state, ['head']))


def test_mmdet_layout(state):
    source = in_format(state, 'mmdet')
    q, kv = (state[f'stages.1.blocks.1.attn.{x}.weight'] for x in ('q', 'kv'))
    assert torch.equal(source['layers.1.1.2.attn.attn.in_proj_weight'], torch.cat([q, kv]))
    assert source['layers.1.1.2.ffn.layers.0.weight'].shape == (32, 16, 1, 1)
    assert torch.equal(source['layers.3.1.0.pos_embed'], state['stages.3.pos_embed'][:, 1:])


def test_detector(state):
    """Neck and head are dropped and listed, the backbone is taken."""
    source = {f'backbone.{k}': v for k, v in in_format(state, 'mmdet').items()}
    source['neck.fpn.weight'] = source['bbox_head.weight'] = torch.zeros(1)
    got = map_to_timm(dict(meta=dict(epoch=12), state_dict=source))
    assert equal(got.state_dict, drop_parts(state, ('class_token', 'norm', 'head')))
    assert set(got.dropped) == {'meta', 'state_dict.neck.fpn.weight', 'state_dict.bbox_head.weight'}


def test_original_detector(state):
    """The original's detectors have no class token, but its row in the position embedding."""
    source = {k: v for k, v in from_timm(state, 'original')[0].items() if not k.startswith(('cls', 'norm', 'head'))}
    got = map_to_timm({f'backbone.{k}': v for k, v in source.items()}).state_dict
    info = describe(got)
    assert info.class_row and not info.class_token and not info.norm
    dense = small(class_token=False, num_classes=0)
    adapted = checkpoint_filter_fn(source, dense)
    assert torch.equal(adapted['stages.3.pos_embed'], state['stages.3.pos_embed'][:, 1:])
    assert adapted.keys() == dense.state_dict().keys()
    assert 'class token' in error(checkpoint_filter_fn, source, small())


# What is not right is named

@pytest.mark.parametrize('fmt', FORMATS)
def test_unknown_key(state, fmt):
    source = in_format(state, fmt)
    prefix = {'transformers': 'pvt.', 'timm_features': 'stages_0.'}.get(fmt, '')
    assert f'{prefix}bogus.weight' in error(convert, {**source, f'{prefix}bogus.weight': torch.zeros(1)})
    key = random.Random(0).choice(sorted(k for k in source if '.0.' in k and k != FORMATS[fmt][1]))
    renamed = {(k.replace('.0.', '.00.', 1) if k == key else k): v for k, v in source.items()}
    assert key.replace('.0.', '.00.', 1) in error(convert, renamed)  # only a name that is written back is taken


@pytest.mark.parametrize('fmt', ['original', 'timm', 'transformers', 'timm_features'])
@examples
@given(data=st.data())
def test_missing_key_is_named(fmt, data):
    model = small(num_classes=2)
    source = in_format(model.state_dict(), fmt)
    key = data.draw(st.sampled_from(sorted(source)))
    row = next(row for row in map_to_timm(source).mapped if key in row[1])
    del source[key]
    text = error(checkpoint_filter_fn, source, model)
    if key == FORMATS[fmt][1]:
        assert 'Expected a PVT v1 checkpoint' in text
    elif key.endswith('cls_token'):
        assert 'class token' in text
    else:
        assert key in text or any(k in text or k.rpartition('.')[0] in text for k in row[0]), (key, text)


@pytest.mark.parametrize('fmt', FORMATS)
@examples
@given(data=st.data())
def test_wrong_shape_is_named(fmt, data):
    model = small(num_classes=2) if fmt != 'mmdet' else small(num_classes=0, class_token=False)
    source = in_format(model.state_dict(), fmt)
    key = data.draw(st.sampled_from(sorted(source)))
    row = next(row for row in map_to_timm(source).mapped if key in row[1])
    change = data.draw(st.sampled_from(('transpose', 'cut', 'flat', 'scalar', 'empty')))
    x = source[key]
    source[key] = {
        'transpose': x.transpose(0, -1), 'cut': x[..., :-1], 'flat': x.flatten(), 'scalar': torch.tensor(1.),
        'empty': x[:0]}[change]
    if source[key].shape == x.shape:
        return
    text = error(checkpoint_filter_fn, source, model)
    names = [key, *row[0], *row[1]]
    if not any(k in text for k in names):
        # sizes that say which model it is, are reported as another model
        assert 'rows' in text or 'and channels' in text, (key, change, text)


def test_not_tensors(state):
    source = from_timm(state, 'original')[0]
    assert 'block1.0.norm1.weight' in error(convert, {**source, 'block1.0.norm1.weight': [1, 2]})
    assert 'got list' in error(convert, [1, 2])
    assert 'got int' in error(unwrap, 3)
    assert '(none)' in error(convert, {})
    assert 'Expected a PVT v1' in error(convert, {5: torch.zeros(1)})
    assert map_to_timm({**source, 5: 'x'}).dropped == {'5': "not under ''"}


def test_other_models(state):
    assert 'PVT v1' in error(convert, timm.create_model('resnet10t', device='meta').state_dict())
    assert 'PVT v1' in error(convert, timm.create_model('pvt_v2_b0', device='meta').state_dict())
    v2 = {'patch_embed1.proj.weight': torch.zeros(1), 'block1.0.mlp.dwconv.dwconv.weight': torch.zeros(1)}
    assert "timm's pvt_v2" in error(convert, v2)
    source = from_timm(state, 'original')[0]
    both = {**source, **{f'backbone.{k}': v for k, v in source.items()}}
    assert 'got several' in error(convert, both)
    assert 'got several' in error(convert, {**source, **state})


def test_formats_without_a_place(state):
    text = error(from_timm, state, 'mmdet')
    assert all(k in text for k in ('cls_token', 'norm.weight', 'head.bias'))
    assert 'got' in error(drop_parts, state, ['neck'])


def test_half_of_a_pair(state):
    source = from_timm(state, 'transformers')[0]
    del source['pvt.encoder.block.0.0.attention.self.value.bias']
    assert 'pvt.encoder.block.0.0.attention.self.value.bias' in error(convert, source)
    source = from_timm(state, 'transformers')[0]
    source['pvt.encoder.block.0.0.attention.self.value.bias'] = torch.zeros(9)
    assert 'attention.self.value.bias' in error(convert, source)


def test_other_variant_is_named():
    tiny, small_ = (timm.create_model(name, device='meta') for name in ('pvt_tiny', 'pvt_small'))
    text = error(checkpoint_filter_fn, from_timm(small_.state_dict(), 'transformers')[0], tiny)
    assert '(2, 2, 2, 2)' in text and '(3, 4, 6, 3)' in text and 'pvt_small' in text


def test_gap_in_the_blocks(state):
    source = {k.replace('stages.1.blocks.1.', 'stages.1.blocks.3.'): v for k, v in state.items()}
    assert 'stages.1.blocks.1' in error(describe, source)


# Wrappers

def test_averaged_weights(state):
    other = {k: v + 1 for k, v in state.items()}
    for plain, ema in (('model', 'model_ema'), ('state_dict', 'state_dict_ema')):
        checkpoint = {plain: state, ema: other, 'epoch': 1}
        assert equal(map_to_timm(checkpoint).state_dict, state) and map_to_timm(checkpoint).wrappers == (plain,)
        assert equal(map_to_timm(checkpoint, use_ema=True).state_dict, other)
        assert set(map_to_timm(checkpoint).dropped) == {ema, 'epoch'}
        assert equal(map_to_timm({ema: other}).state_dict, other)
    assert 'averaged weights' in error(convert, dict(model=state), True)


def test_endless_wrappers():
    checkpoint = {}
    checkpoint['model'] = checkpoint
    error(convert, checkpoint)


# To a model

def test_native_is_passed_on(state):
    model = small()
    for source in (state, drop_parts(state, ['head'])):
        if 'head.weight' not in source:
            model = small(num_classes=0)
        adapted = checkpoint_filter_fn(source, model)
        assert adapted.keys() == source.keys() and all(adapted[k] is source[k] for k in source)


def test_dense_from_classifier(state):
    dense = small(class_token=False, num_classes=0)
    adapted = checkpoint_filter_fn(state, dense)
    assert adapted.keys() == dense.state_dict().keys()
    assert torch.equal(adapted['stages.3.pos_embed'], state['stages.3.pos_embed'][:, 1:])
    dense.load_state_dict(adapted)
    assert equal(checkpoint_filter_fn(dense.state_dict(), dense), dense.state_dict())


def test_features_checkpoint_to_model():
    """The weights of a features-only model, saved by a user, fit a dense model and another features-only model."""
    net = randomize(timm.create_model('test_pvt', features_only=True))
    assert detect(net.state_dict()) == ('timm_features', '')
    again = timm.create_model(
        'test_pvt', features_only=True, pretrained=True, pretrained_cfg_overlay=dict(state_dict=net.state_dict()))
    assert equal(again.state_dict(), net.state_dict())


@pytest.mark.parametrize('old, new', [(32, 64), ((64, 32), (96, 160)), ((36, 100), 32), (224, (112, 448))])
@pytest.mark.parametrize('fmt', ['timm', 'original', 'transformers'])
def test_other_grid(old, new, fmt):
    source, target = small(img_size=old), small(img_size=new)
    if isinstance(old, tuple):
        target.pretrained_model_args = dict(img_size=old)  # what timm's hub configuration says about the weights
    adapted = checkpoint_filter_fn(in_format(source.state_dict(), fmt), target)
    target.load_state_dict(adapted)
    source.eval(), target.eval()
    source.set_input_size(new)
    assert equal(source.state_dict(), target.state_dict())
    x = images(1, 3, *((new, new) if isinstance(new, int) else new), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(source(x), target(x))


@pytest.mark.parametrize('fmt', ['timm', 'original', 'transformers'])
def test_non_square_grid_of_the_model(fmt):
    model = small(img_size=(64, 160))
    source = in_format(model.state_dict(), fmt)
    assert equal(checkpoint_filter_fn(source, model), model.state_dict())  # no square fits, the model's grid does
    assert 'Pass img_size' in error(checkpoint_filter_fn, source, small(img_size=96))


def test_resize_as_the_model_does(state):
    model = small()
    model.load_state_dict(state)
    resized = resize_pos_embeds(state, (8, 8), (16, 24), class_row=True)
    model.set_input_size((64, 96))
    assert equal(resized, model.state_dict())
    same = resize_pos_embeds(state, (8, 8), (8, 8), class_row=True)
    assert all(same[k] is state[k] for k in state)


@examples
@given(h=st.integers(8, 80), w=st.integers(8, 80), class_row=st.sampled_from((0, 1)))
def test_source_grid(h, w, class_row):
    counts = [a * b for a, b in stage_grids((h, w))]
    counts[-1] += class_row
    assert source_grid(counts, hint=(h, w), class_row=bool(class_row)) == ((h, w), class_row)
    if h == w:
        assert source_grid(counts, class_row=bool(class_row)) == ((h, w), class_row)
    for found in (source_grid(counts, (h, w)), source_grid(counts, (h, w), class_row=None)):
        (a, b), rows = found
        assert [x * y for x, y in stage_grids((a, b))][:-1] == counts[:-1] and rows in (0, 1)


def test_source_grid_refuses():
    assert 'halve' in error(source_grid, [3136, 784, 196, 60])
    assert 'Pass img_size' in error(source_grid, [800, 200, 50, 12], None, False)
    assert source_grid([3136, 784, 196, 50]) == ((56, 56), 1)
    assert source_grid([3136, 784, 196, 49]) == ((56, 56), 0)
    assert source_grid([3136, 784, 196, 49 + 1], hint=(28, 112))[0] in ((28, 112), (56, 56))


@examples
@given(h=st.integers(1, 12), w=st.integers(1, 12), prefix=st.sampled_from((0, 1)),
       dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)))
def test_resample(h, w, prefix, dtype):
    pos = images(1, prefix + 7 * 5, 6, dtype=dtype)
    out = resample_pos_embed(pos, [h, w], [7, 5], prefix)
    assert out.shape == (1, prefix + h * w, 6) and out.dtype == dtype
    assert torch.equal(out[:, :prefix], pos[:, :prefix])
    if (h, w) == (7, 5):
        assert out is pos
    flat = resample_pos_embed(torch.ones_like(pos), [h, w], [7, 5], prefix)
    assert torch.allclose(flat, torch.ones_like(flat))
    assert out.max() <= pos.max() and out.min() >= pos.min()  # bilinear never overshoots, bicubic does


@pytest.mark.parametrize('fmt', FORMATS)
def test_mutations_end_in_a_value_error(fmt):
    """Whatever is done to a checkpoint, it is mapped in full or refused, with a ValueError."""
    rng = random.Random(7)
    model = small(num_classes=0, class_token=False) if fmt == 'mmdet' else small()
    clean = in_format(model.state_dict(), fmt)
    outcomes = {'kept': 0, 'refused': 0}
    for _ in range(150):
        source = dict(clean)
        for _ in range(rng.randint(1, 3)):
            key = rng.choice(sorted(map(str, source)))
            value = source.get(key)
            action = rng.randrange(8)
            if action == 0:
                source.pop(key, None)
            elif action == 1:
                source[key + rng.choice(('x', '.weight', ''))] = value
            elif action == 2:
                source[key] = rng.choice((None, 3, 'x', [], {}, torch.tensor(1.), torch.zeros(0)))
            elif action == 3 and isinstance(value, torch.Tensor) and value.ndim:
                source[key] = value[:-1]
            elif action == 4 and isinstance(value, torch.Tensor):
                source[key] = value[None]
            elif action == 5 and isinstance(value, torch.Tensor):
                source[key] = value.to(rng.choice((torch.float64, torch.int64, torch.bool)))
            elif action == 6:
                source[rng.choice((3, None, ('a',), 'model', 'state_dict'))] = rng.choice((3, {}, value))
            else:
                source[key.replace('0', rng.choice(('1', '9', '00', '-1')), 1)] = source.pop(key, None)
        try:
            adapted = checkpoint_filter_fn(source, model)
        except ValueError:
            outcomes['refused'] += 1
            continue
        model.load_state_dict(adapted)  # strict
        outcomes['kept'] += 1
    assert outcomes['refused'] > 60 and outcomes['kept'] > 0


def test_tables_are_one_to_one():
    state = timm.create_model('pvt_small', device='meta').state_dict()
    for fmt in FORMATS:
        source = in_format(state, fmt)
        back, pairs = to_timm(source, fmt)
        assert len(pairs) == len({p[0] for p in pairs}) == len({p[1] for p in pairs})
        assert {k: v.shape for k, v in from_timm(back, fmt)[0].items()} == {k: v.shape for k, v in source.items()}
