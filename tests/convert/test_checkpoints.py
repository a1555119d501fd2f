""" State dicts of all formats: how they are recognised, and mapped to timm's names and back. """
import argparse
import logging
import random
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from pvt_timm import PyramidVisionTransformer, checkpoint_filter_fn, create_from_checkpoint
from pvt_timm.formats import FORMATS
from pvt_timm.formats.architecture import describe, drop_parts, stage_grids
from pvt_timm.formats.mapping import from_timm, map_to_timm
from pvt_timm.formats.names import Row, to_ours, to_theirs
from pvt_timm.formats.wrappers import training_settings, unwrap
from pvt_timm.pvt import resample_pos_embed
from pvt_timm.variants import VARIANTS, find_variant
from tests.support.reference import images, randomize

SMALL = dict(img_size=32, embed_dims=(8, 16, 16, 24), depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 3),
             sr_ratios=(4, 2, 2, 1), mlp_ratios=(2, 2, 1, 1), num_classes=5)
WRAPPERS = ((), ('model',), ('state_dict',), ('state_dict_ema',), ('model_ema',), ('state_dict', 'model'))
# DDP, compile, Lightning, smp, TimmWrapper, torchvision, other repositories' models
PREFIXES = ('', 'module.', 'backbone.', 'module.backbone.', '_orig_mod.', 'model.', 'net.', 'encoder.model.',
            'timm_model.', 'backbone.body.', 'encoder.', 'model_uav.transformer.', 'net.encoder.', 'a.pvt.encoder.')
ALL = ('class_token', 'norm', 'head')
examples = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def small(**kwargs) -> PyramidVisionTransformer:
    return randomize(PyramidVisionTransformer(**{**SMALL, **kwargs}, weight_init='skip'))


@pytest.fixture(scope='module')
def state():
    return small().state_dict()


def in_format(state, fmt):
    """Return `state` (timm's names) in another format. Parts that the format has no place for are left out."""
    if fmt == 'mmdet':
        state = drop_parts(state, ALL, class_row='stages.3.cls_token' in state)
    return from_timm(state, fmt)[0]


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def error(call, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as info:
        call(*args, **kwargs)
    assert type(info.value) is ValueError and '\n' not in str(info.value)
    return str(info.value)


configs = st.fixed_dictionaries(dict(
    depths=st.tuples(*[st.integers(1, 3)] * 4),
    num_classes=st.integers(0, 12),
    in_chans=st.integers(1, 6),
    class_token=st.booleans(),
    qkv_bias=st.booleans(),
    sr_ratios=st.tuples(*[st.sampled_from((1, 2))] * 3, st.just(1)),
    img_size=st.tuples(st.integers(32, 130), st.integers(32, 130)),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.float16, torch.bfloat16)),
))


@pytest.mark.parametrize('fmt', FORMATS)
@examples
@given(config=configs, wrappers=st.sampled_from(WRAPPERS), prefix=st.sampled_from(PREFIXES))
def test_round_trip(fmt, config, wrappers, prefix):
    if fmt == 'mmdet':
        config['qkv_bias'] = True  # its attention always has them
    model = small(**config)
    state = model.state_dict()
    source = in_format(state, fmt)
    checkpoint = OrderedDict((prefix + k, v) for k, v in source.items())
    for wrapper in reversed(wrappers):
        checkpoint = {wrapper: checkpoint, 'epoch': 3}
    got = map_to_timm(checkpoint)
    assert (got.format, got.prefix, got.wrappers) == (fmt, prefix, wrappers)
    want = drop_parts(state, ALL, config['class_token']) if fmt == 'mmdet' else state
    assert equal(got.state_dict, want)
    assert len(got.dropped) == len(wrappers) and all('epoch' in k for k in got.dropped)
    assert equal(from_timm(got.state_dict, fmt)[0], source)
    # every key of both sides is accounted for, once
    assert sorted(k for new, _ in got.mapped for k in new) == sorted(want)
    assert sorted(k for _, old in got.mapped for k in old) == sorted(source)

    info = describe(got.state_dict, config['img_size'])
    dense = fmt == 'mmdet'
    assert (info.depths, info.sr_ratios, info.in_chans, info.dtype) == (
        config['depths'], config['sr_ratios'], config['in_chans'], config['dtype'])
    assert info.grid_size == model.stages[0].grid_size and info.img_size == tuple(4 * n for n in info.grid_size)
    assert info.class_token == info.class_row == (config['class_token'] and not dense)
    assert info.num_classes == (0 if dense else config['num_classes'])


@pytest.mark.parametrize('name', VARIANTS)
def test_variants_are_described(name):
    model = timm.create_model(name, device='meta')
    for fmt in FORMATS:
        source = in_format(model.state_dict(), fmt)
        info = describe(map_to_timm(source).state_dict)
        assert find_variant(info.depths, info.embed_dims) == name and info.patch_size == 4
        assert info.sr_ratios == tuple(s.blocks[0].attn.sr_ratio for s in model.stages)
        assert info.img_size == ((32, 32) if name == 'test_pvt' else (224, 224))
        assert info.mlp_ratios == ((4, 4, 4, 4) if name == 'test_pvt' else (8, 8, 4, 4))
        assert info.norm == (fmt != 'mmdet')


@pytest.mark.parametrize('stages', [2, 3, 5])
def test_other_numbers_of_stages(stages):
    kwargs = {k: (v + v[-1:])[:stages] if isinstance(v, tuple) else v for k, v in SMALL.items()}
    model = PyramidVisionTransformer(**dict(kwargs, img_size=64, sr_ratios=(1,) * stages))
    info = describe(map_to_timm(model.state_dict()).state_dict)
    assert (info.depths, info.embed_dims) == (kwargs['depths'], kwargs['embed_dims'])
    assert info.class_token and info.class_row and info.grid_size == (16, 16)
    assert equal(checkpoint_filter_fn(model.state_dict(), model), model.state_dict())
    dense = drop_parts(model.state_dict(), ['class_token'])
    assert dense[f'stages.{stages - 1}.pos_embed'].shape[1] == (16 // 2 ** (stages - 1)) ** 2
    got = f'got one with depths {info.depths} and embed_dims {info.embed_dims}'
    assert got in error(checkpoint_filter_fn, model.state_dict(), small())


def test_layouts(state):
    source = from_timm(state, 'original')[0]
    assert {'pos_embed1', 'pos_embed4', 'cls_token', 'patch_embed1.proj.weight', 'block2.1.attn.sr.bias',
            'block4.0.attn.kv.weight', 'norm.weight', 'head.bias'} <= set(source)
    assert source['pos_embed4'].shape == (1, 2, 24)

    q, kv = (state[f'stages.1.blocks.1.attn.{x}.weight'] for x in ('q', 'kv'))
    source = from_timm(state, 'transformers')[0]
    name = 'pvt.encoder.block.1.1.attention.self.'
    assert torch.equal(source[name + 'key.weight'], kv[:16]) and torch.equal(source[name + 'value.weight'], kv[16:])
    assert source[name + 'key.weight'].untyped_storage().nbytes() == 16 * 16 * 4  # no view of the whole
    # `PvtModel` has no head and no 'pvt.' before its names
    base = {f'x.{k.removeprefix("pvt.")}': v for k, v in source.items() if not k.startswith('classifier')}
    assert equal(map_to_timm(base).state_dict, drop_parts(state, ['head']))
    assert map_to_timm({**base, 'x.decoder.a': kv}).dropped == {'x.decoder.*': '1 beside the PVT'}

    source = in_format(state, 'mmdet')
    assert torch.equal(source['layers.1.1.2.attn.attn.in_proj_weight'], torch.cat([q, kv]))
    assert source['layers.1.1.2.ffn.layers.0.weight'].shape == (32, 16, 1, 1)
    assert torch.equal(source['layers.3.1.0.pos_embed'], state['stages.3.pos_embed'][:, 1:])
    name, dense = 'layers.1.1.2.ffn.layers.0.weight', small(num_classes=0, class_token=False)
    wrong = source[name].expand(-1, -1, 3, 3)
    assert 'Wrong shape' in error(checkpoint_filter_fn, {**source, name: wrong}, dense)


def test_original_detector(state):
    """Detectors of the original code have no class token, but the position embedding has a row for it."""
    source = {k: v for k, v in from_timm(state, 'original')[0].items() if not k.startswith(('cls', 'norm', 'head'))}
    info = describe(map_to_timm({f'backbone.{k}': v for k, v in source.items()}).state_dict)
    assert info.class_row and not info.class_token and not info.norm
    dense = small(class_token=False, num_classes=0)
    expected = drop_parts(state, ALL)
    assert torch.equal(expected['stages.3.pos_embed'], state['stages.3.pos_embed'][:, 1:])
    for weights in (source, state, expected):  # its own, a classifier, ours
        assert equal(checkpoint_filter_fn(weights, dense), expected)
    assert 'class token' in error(checkpoint_filter_fn, source, small())


def test_other_tables():
    """The heads of detectors are converted with tables of their own."""
    table = (
        Row('fpn.{i}.0.{p}', 'neck.{i}.conv.{p}'),
        Row('bn.{i}.{n}', 'bn{s}.{n}'),
        Row('fc.{p}', 'fc.{p}', to_ours=lambda x: x.flatten(1), to_theirs=lambda x: x[..., None, None]),
    )
    theirs = {'neck.0.conv.weight': torch.ones(1), 'neck.10.conv.bias': torch.ones(2), 'bn1.running_var': torch.ones(3),
              'fc.weight': torch.ones(4, 5, 1, 1), 'neck.01.conv.bias': torch.ones(1), 'neck.x': torch.ones(1)}
    ours, pairs, unknown = to_ours(theirs, table)
    assert {k: tuple(v.shape) for k, v in ours.items()} == {
        'fpn.0.0.weight': (1,), 'fpn.10.0.bias': (2,), 'bn.0.running_var': (3,), 'fc.weight': (4, 5)}
    assert unknown == ['neck.01.conv.bias', 'neck.x'] and (('bn.0.running_var',), ('bn1.running_var',)) in pairs
    back, _, none = to_theirs(ours, table)
    assert not none and equal(back, {k: v for k, v in theirs.items() if k not in unknown})


# ---- inside of other models -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('fmt', FORMATS)
@pytest.mark.parametrize('prefix', PREFIXES)
def test_what_stands_beside_is_named(state, fmt, prefix, caplog):
    source = {prefix + k: v for k, v in in_format(state, fmt).items()}
    others = {'loss': 3, 'dec.a': 1, 'dec.b.c': 2, 3: 'x', f'{prefix}dec2.a': torch.ones(1), f'{prefix}dec2.b': 0}
    caplog.set_level(logging.INFO, 'pvt_timm')
    got = map_to_timm(dict(state_dict={**source, **others}, optimizer={}))
    assert equal(got.state_dict, map_to_timm(source).state_dict)
    assert got.dropped == {
        'optimizer': "beside 'state_dict'", 'state_dict.loss': '1 beside the PVT', 'state_dict.3': '1 beside the PVT',
        'state_dict.dec.*': '2 beside the PVT', f'state_dict.{prefix}dec2.*': '2 beside the PVT'}
    record = caplog.records[0]
    assert record.levelno == logging.WARNING and f'{fmt} format' in record.message
    assert (f'under the prefix {prefix!r}' in record.message) == bool(prefix)
    assert all(x in record.message for x in ('dec.*: 2', f'{prefix}dec2.*: 2', 'loss: 1'))
    # nothing beside it, or a wrapper that is well known: nothing to warn of
    map_to_timm(source, prefix=prefix)
    map_to_timm({f'backbone.{k}': v for k, v in in_format(state, fmt).items()} | {'neck.a': 1, 'bbox_head.b': 2})
    assert [r.levelno for r in caplog.records] == [logging.WARNING] + [logging.INFO] * 3
    assert caplog.records[1].message.endswith('Nothing was left out.')


@pytest.mark.parametrize('fmt', FORMATS)
def test_two_of_them(state, fmt):
    one, other = in_format(state, fmt), {k: v + 1 for k, v in in_format(state, fmt).items()}
    both = {**{f'rgb.{k}': v for k, v in one.items()}, **{f'rgb.depth.{k}': v for k, v in other.items()}}
    text = error(map_to_timm, both)
    assert "'rgb.'" in text and "'rgb.depth.'" in text and 'prefix' in text
    assert "'rgb.'" in error(map_to_timm, both, prefix='gb') and 'several' not in error(map_to_timm, both, prefix='')
    for prefix, want in (('rgb', one), ('rgb.depth', other), ('rgb.depth.', other)):
        got = map_to_timm(both, prefix=prefix)
        assert got.prefix == prefix.rstrip('.') + '.' and equal(got.state_dict, map_to_timm(want).state_dict)
    nested = dict(teacher=one, student=other, epoch=3)  # in dicts of their own
    assert "'student.'" in error(map_to_timm, nested)
    assert equal(map_to_timm(nested, prefix='student').state_dict, map_to_timm(other).state_dict)
    assert 'got several' in error(map_to_timm, {**one, **in_format(state, 'timm' if fmt != 'timm' else 'original')})


@pytest.mark.parametrize('prefix', ['', 'module.backbone.', 'net.encoder.'])
def test_ways_in(prefix, tmp_path):
    """timm's `create_model` loads a file in another format: as a whole model, and with features only."""
    model = randomize(timm.create_model('test_pvt'))
    source = in_format(model.state_dict(), 'original')
    torch.save({'state_dict': {**{prefix + k: v for k, v in source.items()}, 'dec.x': torch.ones(1)}}, tmp_path / 'x')
    overlay = dict(file=str(tmp_path / 'x'))
    assert equal(timm.create_model('test_pvt', True, pretrained_cfg_overlay=overlay).state_dict(), model.state_dict())
    features = timm.create_model('test_pvt', True, features_only=True, pretrained_cfg_overlay=overlay).state_dict()
    assert equal(map_to_timm(features).state_dict, drop_parts(model.state_dict(), ALL))
    again = timm.create_model('test_pvt', True, features_only=True, pretrained_cfg_overlay=dict(state_dict=features))
    assert equal(again.state_dict(), features)

    two = {**{f'a.{prefix}{k}': v for k, v in source.items()}, **{f'b.{k}': v + 1 for k, v in source.items()}}
    torch.save(two, tmp_path / 'x')
    assert "'b.'" in error(timm.create_model, 'test_pvt', True, pretrained_cfg_overlay=overlay)
    got = create_from_checkpoint(tmp_path / 'x', prefix=f'a.{prefix}')
    assert equal(got.state_dict(), model.state_dict())
    got = create_from_checkpoint(tmp_path / 'x', prefix=f'a.{prefix}', features_only=True)
    assert equal(got.state_dict(), features)


# ---- what is not right is named -------------------------------------------------------------------------------------

@pytest.mark.parametrize('fmt', FORMATS)
def test_unknown_key(state, fmt):
    source = in_format(state, fmt)
    body = FORMATS[fmt].first_weight[0].partition('.')[0] + '.'
    for name in (f'{body}bogus.weight', *(() if fmt == 'transformers' else ('norm3.weight', 'norm.running_mean'))):
        assert name in error(map_to_timm, {**source, name: torch.zeros(1)})
    key = random.Random(0).choice(sorted(k for k in source if '.0.' in k and k not in FORMATS[fmt].first_weight))
    renamed = {(k.replace('.0.', '.00.', 1) if k == key else k): v for k, v in source.items()}
    assert key.replace('.0.', '.00.', 1) in error(map_to_timm, renamed)  # only a name that is written back is taken
    text = error(from_timm, {**state, 'bogus': torch.ones(1)}, fmt)
    assert 'bogus' in text and all(k in text for k in ('cls_token', 'norm.weight', 'head.bias') if fmt == 'mmdet')


@pytest.mark.parametrize('fmt', FORMATS)
@settings(examples, max_examples=40)
@given(data=st.data())
def test_missing_and_misshaped_keys_are_named(fmt, data):
    model = small(num_classes=2) if fmt != 'mmdet' else small(num_classes=0, class_token=False)
    source = in_format(model.state_dict(), fmt)
    key = data.draw(st.sampled_from(sorted(source)))
    row = next(row for row in map_to_timm(source).mapped if key in row[1])
    change = data.draw(st.sampled_from(('missing', 'transpose', 'cut', 'flat', 'scalar', 'empty')))
    x = source.pop(key)
    if change != 'missing':
        source[key] = {
            'transpose': x.transpose(0, -1), 'cut': x[..., :-1], 'flat': x.flatten(), 'scalar': torch.tensor(1.),
            'empty': x[:0]}[change]
        if source[key].shape == x.shape or (row[0], change) == (('head.weight',), 'transpose'):  # more classes
            return
    text = error(checkpoint_filter_fn, source, model)
    if change == 'missing' and key in FORMATS[fmt].first_weight:
        assert 'Expected a PVT v1 checkpoint' in text
    elif change == 'missing' and key.endswith('cls_token'):
        assert 'class token' in text
    elif change == 'missing':  # a whole block or its first parameter
        assert any(k in text or k.rpartition('.')[0] in text for k in (key, *row[0])), (key, text)
    else:  # sizes that say which model it is, are reported as another model
        named = (key, *row[0], *row[1], 'rows', 'Expected a checkpoint with depths')
        assert any(k in text for k in named), (key, change, text)


def test_not_tensors(state):
    source = from_timm(state, 'original')[0]
    assert 'block1.0.norm1.weight, got list' in error(map_to_timm, {**source, 'block1.0.norm1.weight': [1, 2]})
    text = error(map_to_timm, dict(model={k: v.numpy() for k, v in source.items()}))
    assert 'got ndarray' in text and 'torch.from_numpy' in text
    assert 'got list' in error(map_to_timm, [1, 2]) and 'got int' in error(unwrap, 3)
    for nothing in ({}, {5: torch.zeros(1)}):
        assert 'Expected a PVT v1 checkpoint' in error(map_to_timm, nothing)
    endless = {}
    endless['model'] = endless
    assert 'PVT v1' in error(map_to_timm, endless) and unwrap(endless)[1] == ('model',) * 4


@pytest.mark.parametrize('name, family', [
    ('resnet10t', 'ResNet'), ('pvt_v2_b0', 'PVT v2'), ('swin_tiny_patch4_window7_224', 'Swin'),
    ('vit_tiny_patch16_224', 'ViT'), ('twins_pcpvt_small', 'Twins'), ('convnext_atto', 'stem.0.weight')])
def test_other_families(name, family):
    source = timm.create_model(name, device='meta').state_dict()
    for prefix in ('', 'backbone.'):
        assert family in error(map_to_timm, {prefix + k: v for k, v in source.items()})


def test_names_of_pvt_v2(state):
    for fmt, key in (('original', 'block1.0.mlp.dwconv.dwconv.weight'), ('mmdet', 'layers.0.1.0.ffn.layers.1.weight')):
        text = error(map_to_timm, {**in_format(state, fmt), key: torch.zeros(1)})
        assert "timm's pvt_v2" in text and key in text


def test_half_of_a_pair(state):
    name = 'pvt.encoder.block.0.0.attention.self.value.bias'
    source = from_timm(state, 'transformers')[0]
    for wrong in (torch.zeros(9), torch.zeros(8, dtype=torch.float64), torch.zeros(()), torch.zeros(8, 1)):
        assert name in error(map_to_timm, {**source, name: wrong})
    del source[name]
    assert f'Missing in the checkpoint: {name}' in error(map_to_timm, source)


def test_gap_in_the_blocks(state):
    source = {k.replace('stages.1.blocks.1.', 'stages.1.blocks.3.'): v for k, v in state.items()}
    assert 'stages.1.blocks.1' in error(checkpoint_filter_fn, source, small())
    assert error(describe, source) == 'Missing in the checkpoint: stages.1.blocks.1.'
    for part in ('patch_embed', 'blocks.0'):
        assert f'stages.1.{part}' in error(describe, {k: v for k, v in state.items() if f'stages.1.{part}' not in k})


# ---- wrappers -------------------------------------------------------------------------------------------------------

def test_averaged_weights(state):
    other = {k: v + 1 for k, v in state.items()}
    for plain, ema in (('model', 'model_ema'), ('state_dict', 'state_dict_ema')):
        checkpoint = {plain: state, ema: other, 'epoch': 1}
        assert equal(map_to_timm(checkpoint).state_dict, other) and map_to_timm(checkpoint).wrappers == (ema,)
        assert set(map_to_timm(checkpoint).dropped) == {plain, 'epoch'}
        assert equal(map_to_timm(checkpoint, use_ema=False).state_dict, state)
        assert equal(map_to_timm({plain: state, ema: None}).state_dict, state)
        for use_ema in (True, False):  # the only ones
            assert equal(map_to_timm({ema: other}, use_ema=use_ema).state_dict, other)


def said(checkpoint):
    """Return the values that the training settings of a checkpoint give, and the notes. Empty values are left out."""
    found = training_settings(checkpoint)
    return {k: v for k, v in vars(found).items() if v and k not in ('where', 'notes')}, found.notes


def test_training_settings():
    assert said({}) == said(dict(args=3, hyper_parameters=[1], meta=None)) == ({}, [])
    args = argparse.Namespace(
        model='pvt_tiny', img_size=64, input_size=None, mean=[.5, .4, .3], std=None, crop_pct=.9, interpolation='',
        num_classes=3, lr=.1, gp='avg', model_kwargs=dict(act_layer='relu'))
    assert said(dict(arch='pvt_tiny', args=args)) == (dict(
        img_size=(64, 64), mean=(.5, .4, .3), crop_pct=.9, model_args=dict(global_pool='avg', act_layer='relu')), [])
    # Lightning, in groups, with numpy's numbers
    hyper = dict(data=argparse.Namespace(input_size=(3, 96, 64), std=np.array([.5, .25])), crop_pct=np.float64(.9),
                 interpolation='bilinear', model=dict(crop_pct=.7), class_names=('cat', 'dog'))
    assert said(dict(hyper_parameters=hyper)) == (dict(
        img_size=(96, 64), std=(.5, .25), crop_pct=.9, interpolation='bilinear', label_names=['cat', 'dog']), [])
    # what makes no sense is named, the names of classes are texts or numbers
    nonsense = dict(img_size='x', mean=[float('nan')], std=[0], crop_pct=10 ** 400, interpolation='random', classes=3)
    found, notes = said(dict(args=nonsense))
    assert found == {} and len(notes) == 5
    for name in ('img_size', 'mean', 'std', 'crop_pct', 'interpolation'):
        assert any(f'left out the {name} ' in note for note in notes)
    found, notes = said(dict(args=dict(mean=[.5] * 16, std=[.5] * 17)))
    assert found == dict(mean=(.5,) * 16) and len(notes) == 1  # per channel
    nested = ['a']
    for _ in range(60):
        nested = [nested, nested]  # 2 to the power of 60 letters as a text
    found, notes = said(dict(hyper_parameters=dict(class_names=nested)))
    assert found == {} and len(notes) == 1 and 'class_names' in notes[0] and len(notes[0]) < 200


# ---- to a model -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('old, new', [(32, 64), ((64, 32), (96, 160)), ((36, 100), 32), (224, (112, 448))])
@pytest.mark.parametrize('fmt', ['timm', 'original', 'transformers'])
def test_other_grid(old, new, fmt):
    source, target = small(img_size=old), small(img_size=new)
    if isinstance(old, tuple):
        target.pretrained_model_args = dict(img_size=old)  # what timm's hub configuration says about the weights
    adapted = checkpoint_filter_fn(in_format(source.state_dict(), fmt), target)
    source.set_input_size(new)
    assert equal(source.state_dict(), adapted)


@pytest.mark.parametrize('fmt', ['timm', 'original', 'transformers'])
def test_non_square_grid_of_the_model(fmt):
    model = small(img_size=(64, 160))
    source = in_format(model.state_dict(), fmt)
    assert equal(checkpoint_filter_fn(source, model), model.state_dict())  # no square fits, the model's grid does
    assert 'Pass img_size' in error(checkpoint_filter_fn, source, small(img_size=96))


def test_grids(state):
    """The grid is square if that fits, or as `img_size` says. Grids whose sides do not halve are refused."""
    def resized(*counts):
        return {**state, **{f'stages.{i}.pos_embed': torch.zeros(1, n, 8) for i, n in enumerate(counts)}}
    for last, row in ((50, True), (49, False)):
        info = describe(drop_parts(resized(3136, 784, 196, last), ['class_token'], class_row=False))
        assert (info.grid_size, info.class_row) == ((56, 56), row)
    assert describe(resized(1024, 256, 64, 17)).grid_size == (32, 32)
    assert describe(resized(1024, 256, 64, 17), (64, 256)).grid_size == (16, 64)
    assert 'halve' in error(describe, resized(3136, 784, 196, 60))
    assert 'Pass img_size' in error(describe, resized(800, 200, 50, 13))
    assert stage_grids((17, 9), 3) == [(17, 9), (8, 4), (4, 2)]


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_resample(dtype):  # the values are the reference's, see test_equivalence.py
    pos = images(1, 1 + 7 * 5, 6, dtype=dtype)
    assert resample_pos_embed(pos, [7, 5], [7, 5], 1) is pos
    out = resample_pos_embed(pos, [12, 1], [7, 5], 1)
    assert out.shape == (1, 1 + 12, 6) and out.dtype == dtype and torch.equal(out[:, :1], pos[:, :1])
