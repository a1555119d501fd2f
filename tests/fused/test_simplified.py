""" The smaller graph gives the same numbers with fewer operations: at every size, also exported and compiled. """
import copy

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import LayerScale
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pvt_timm import fuse, pvt, simplify, simplified
from pvt_timm.segmentation import semantic_fpn
from tests.support.forms import make_input, make_model
from tests.support.reference import randomize

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
SIZES = ((1, 32, 32), (3, 64, 96), (2, 75, 130), (1, 33, 255))
# a stage with one head, two and more, with and without reduction, deeper than one block
DEEP = dict(depths=(2, 2, 2, 2))


def assert_same(actual, expected):
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=TOLERANCE[e.dtype] * max(1., e.abs().max().item()))


FOLDINGS = ('cheaper', 'folded', 'projected')


@pytest.fixture(params=FOLDINGS)
def folding(request, monkeypatch):
    """Test both forms of attention at every place, and the choice by the number of operations."""
    if request.param != 'cheaper':
        monkeypatch.setattr(simplified, 'folding_is_cheaper', lambda *_: request.param == 'folded')
    return request.param


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('kwargs', [
    dict(DEEP),
    dict(DEEP, fused=False),
    dict(DEEP, global_pool='avg'),
    dict(DEEP, global_pool='', class_token=False),
    dict(DEEP, features_only=True),
    dict(DEEP, features_only=True, feature_cls='getter', class_token=True),
    dict(num_classes=0),
    dict(in_chans=1, qkv_bias=False),
    dict(img_size=(64, 96), norm_layer='layernorm', act_layer='relu'),
    dict(depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2), sr_ratios=(2, 1), mlp_ratios=(2., 3.)),
], ids=str)
def test_same_numbers(folding, kwargs, dtype):
    kwargs = dict(kwargs)
    fused = kwargs.pop('fused', True)
    model = make_model(**kwargs).to(dtype)
    for module in model.modules():
        if isinstance(module, pvt.Attention):
            module.fused_attn = fused
            if not fused:
                module.scale *= 0.7
    before = copy.deepcopy(model.state_dict())
    small = simplify(model)
    with torch.no_grad():
        for size in SIZES:
            x = make_input(*size, in_chans=kwargs.get('in_chans', 3)).to(dtype)
            assert_same(small(x), model(x))
    assert not any(isinstance(m, pvt.Attention) for m in small.modules())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize('name, kwargs', [
    ('pvt_tiny', {}),
    ('pvt_tiny', dict(features_only=True)),
    ('pvt_tiny', dict(embed_dims=(128, 256, 512, 768), num_heads=(2, 4, 8, 12))),
], ids=str)
def test_variants(name, kwargs):
    model = make_model(name, **kwargs)
    with torch.no_grad():
        for size in ((1, 224, 224), (2, 96, 160)):
            x = make_input(*size)
            assert_same(simplify(model, size[1:])(x), model(x))


@pytest.mark.parametrize('name, gain', [('pvt_tiny', 0.09), ('pvt_small', 0.05)])
def test_operations(name, gain):
    """`simplify` reduces the operations for 224x224 by this share, as counted by PyTorch."""
    model, x = timm.create_model(name).eval(), make_input(1, 224, 224)
    counts = []
    for m in (model, simplify(model)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            m(x)
        counts.append(counter.get_total_flops())
    assert 1 - counts[1] / counts[0] > gain


def kinds(model):
    return [type(block.attn).__name__ for stage in model.stages for block in stage.blocks]


def test_the_size_decides_what_is_folded():
    model = timm.create_model('pvt_tiny')
    assert kinds(simplify(model)) == [
        *['FoldedAttention'] * 4, *['ProjectedAttention'] * 3, 'ClassTokenAttention']
    assert kinds(simplify(model, (800, 1344))) == [*['ProjectedAttention'] * 7, 'ClassTokenAttention']
    features = timm.create_model('pvt_tiny', features_only=True)
    small = simplify(features, (800, 1344))
    assert {type(b.attn).__name__ for i in range(4) for b in small[f'stages_{i}'].blocks} == {'ProjectedAttention'}


def test_all_tokens_are_there_unless_the_class_token_is_all_that_is_returned():
    x = make_input(2, 64, 96)
    for kwargs in (dict(global_pool='avg'), dict(global_pool='')):
        model = make_model(**kwargs)
        small = simplify(model)
        with torch.no_grad():
            assert_same(small.forward_features(x), model.forward_features(x))
            assert_same(small.forward_intermediates(x), model.forward_intermediates(x))
    small = simplify(make_model())
    assert not hasattr(small, 'forward_features') and not hasattr(small, 'forward_intermediates')
    inner = nn.Sequential(make_model())  # whoever holds a model may call any method of it
    assert type(simplify(inner)[0]) is pvt.PyramidVisionTransformer


def test_models_that_hold_one():
    x = make_input(1, 64, 96)
    model = randomize(semantic_fpn('test_pvt', num_classes=3)).eval()
    small = simplify(model, (64, 96))
    assert not any(isinstance(m, pvt.Attention) for m in small.modules())
    with torch.no_grad():
        assert_same(small(x), model(x))
        stage = make_model().stages[0]
        assert_same(simplify(stage)(x), stage(x))
        fused = fuse(make_model())
        assert_same(simplify(fused)(x), fused(x))


def adapter(model):
    attn = model.stages[3].blocks[-1].attn
    attn.q = type('Adapter', (nn.Linear,), {'forward': lambda self, x: 2 * nn.Linear.forward(self, x)})(64, 64)


@pytest.mark.parametrize('change', [
    adapter,
    lambda m: m.stages[3].blocks[-1].register_forward_hook(lambda module, args, output: -output),
    lambda m: m.stages[3].blocks[-1].attn.register_forward_hook(lambda module, args, output: -output),
    lambda m: m.stages[3].blocks[-1].attn.kv.register_forward_hook(lambda module, args, output: -output),
    lambda m: m.stages[3].register_forward_hook(lambda module, args, output: output - output.mean(1, keepdim=True)),
    lambda m: m.register_forward_hook(lambda module, args, output: -output),
    lambda m: m.head_drop.register_forward_hook(lambda module, args, output: -output),
    lambda m: setattr(m.stages[3].blocks[-1].mlp, 'norm', nn.Softmax(dim=1)),
    lambda m: setattr(m.stages[3].blocks[-1], 'drop_path1', LayerScale(64, 2.)),
    lambda m: setattr(m.stages[3].blocks[-1].attn, 'proj_drop', LayerScale(64, 2.)),
    lambda m: setattr(m.stages[3].blocks[-1].attn, 'forward', lambda x, size: -x),
    lambda m: setattr(m.stages[3].blocks[-1], 'forward', lambda x, size: -x),
    lambda m: setattr(m, 'norm', nn.Softmax(dim=1)),
], ids=range(13))
def test_layers_of_other_kinds_keep_what_they_do(change):
    model, x = make_model(), make_input(1, 32, 32)
    plain = model(x)
    change(model.eval())
    with torch.no_grad():
        expected = model.eval()(x)
        assert_same(simplify(model)(x), expected)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_parametrized_weights():
    model, x = make_model(), make_input(1, 32, 32)
    nn.utils.parametrizations.weight_norm(model.stages[3].blocks[-1].attn.q)
    with torch.no_grad():
        assert_same(simplify(model)(x), model(x))


def test_what_cannot_be_simplified_is_refused(monkeypatch):
    with pytest.raises(ValueError, match='Expected a model with PVT stages inside, got Linear'):
        simplify(nn.Linear(2, 2))
    monkeypatch.setattr(pvt.Attention, 'forward', lambda self, x, size: -x)
    with pytest.raises(ValueError, match=r'but Attention\.forward is patched'):
        simplify(make_model())


FORMS = dict(
    script=torch.jit.script,
    trace=lambda model: torch.jit.trace(model, make_input(2, 256, 320), check_trace=False),
    export=lambda model: torch.export.export(model, (make_input(2, 256, 320),), dynamic_shapes=({
        0: torch.export.Dim('batch', max=64),
        2: torch.export.Dim('height', min=64, max=4096),
        3: torch.export.Dim('width', min=64, max=4096)},)).module())


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('folding, form, kwargs', [
    pytest.param(
        folding, form, kwargs, id=f'{folding}-{form}-{kind}',
        # an export takes long, and has both forms of attention if the cheaper one is chosen at every place
        marks=[pytest.mark.slow] * (form == 'export' and (folding, kind) != ('cheaper', 'classification')))
    for folding in FOLDINGS for form in FORMS
    for kind, kwargs in (('classification', DEEP), ('features', dict(DEEP, features_only=True)))],
    indirect=['folding'])
def test_forms(folding, form, kwargs):
    model = make_model(**kwargs)
    made = FORMS[form](simplify(model))
    with torch.no_grad():
        for size in ((2, 256, 320), (1, 64, 64), (3, 113, 227)):
            assert_same(made(make_input(*size)), model(make_input(*size)))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_the_plain_model(dtype):
    model, x = make_model(), make_input(4, 64, 96)
    with torch.no_grad():
        exact = model(x)
        low = model.to(dtype)
        plain, small = ((m(x.to(dtype)).float() - exact).square().mean().sqrt() for m in (low, simplify(low)))
    assert small <= 1.5 * plain
