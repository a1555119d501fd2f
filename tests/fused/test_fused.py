""" The fused model has the results of the plain model, and takes the fast path only when it should. """
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from pvt_timm import PyramidVisionTransformerStage, fuse, fused as fast, pvt
from pvt_timm.sliced_mlp import SlicedMlp
from tests.support.forms import gradients, loss_of, make_input, make_model

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='PyTorch is built without oneDNN')
needs_bf16 = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason='no bfloat16 linears on this CPU')


@pytest.fixture
def fast_calls(monkeypatch):
    """Return a list to which each call of the fast forward adds the width of its stage.

    The cache of what works on this machine is cleared before and after the test.
    """
    calls = []
    forward = fast.FusedStage._fused_forward
    monkeypatch.setattr(
        fast.FusedStage, '_fused_forward', lambda self, *args: calls.append(self.dim) or forward(self, *args))
    fast._works.cache_clear()
    yield calls
    fast._works.cache_clear()


def assert_same(actual, expected, tolerance=1e-5):
    """Check that tensors are equal up to `tolerance` of their largest value (or of 1, if that is more).

    `actual` and `expected` may be nested.
    """
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance * max(1., e.abs().max().item()))


# --- The same numbers on the fast path ---

@needs_onednn
@pytest.mark.parametrize('products', [False, True])
@pytest.mark.parametrize('dtype, tolerance', [
    (torch.float32, 1e-5), pytest.param(torch.bfloat16, 0.05, marks=needs_bf16)])
@pytest.mark.parametrize('size', [
    (1, 32, 32), (3, 64, 96), (2, 75, 130), (1, 33, 255), (3, 224, 224), (1, 448, 320)])
def test_sizes(monkeypatch, fast_calls, size, dtype, tolerance, products):
    monkeypatch.setattr(fast, '_multiplies_faster', lambda: products)
    monkeypatch.setattr(fast, 'MANY_KEYS', 1)
    model = make_model().to(dtype)
    fused = fuse(model)
    x = make_input(*size).to(dtype)
    # in float32: with AMX the plain model's convolutions of 16 channels are wrong in bfloat16 (torch 2.14)
    model.float()
    with torch.no_grad():
        for call in (nn.Module.__call__, type(model).forward_intermediates):
            assert_same(tree_map(torch.Tensor.float, call(fused, x)), call(model, x.float()), tolerance)
    assert fast_calls == [16, 32, 40, 64] * 2
    assert torch.equal(x, make_input(*size).to(dtype))


@needs_onednn
@pytest.mark.parametrize('name, kwargs', [
    *(pytest.param(
        f'pvt_{name}', dict(features_only=features), marks=[pytest.mark.slow] * (name in ('medium', 'large')))
      for name in ('tiny', 'small', 'medium', 'large') for features in (False, True)),
    *(('test_pvt', kwargs) for kwargs in (
        dict(global_pool='avg'),
        dict(global_pool=''),
        dict(class_token=False),
        dict(class_token=False, final_norm=True, output_fmt='NLC'),
        dict(num_classes=0),
        dict(in_chans=1),
        dict(qkv_bias=False),
        dict(img_size=(64, 96)),
        dict(norm_layer='layernorm'),
        dict(depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2), sr_ratios=(2, 1), mlp_ratios=(2., 3.)),
        *(dict(features_only=True, feature_cls=cls, class_token=token)
          for cls in ('list', 'dict', 'hook', 'getter') for token in (False, True)),
    )),
], ids=str)
def test_variants_and_configurations(fast_calls, name, kwargs):
    model = make_model(name, **kwargs)
    x = make_input(2, 64, 96, kwargs.get('in_chans', 3))
    with torch.no_grad():
        expected, actual = model(x), reparameterize_model(model)(x)
    assert_same(actual, expected)
    assert [a.stride() for a in tree_leaves(actual)] == [e.stride() for e in tree_leaves(expected)]
    assert len(fast_calls) == len(kwargs.get('depths', 'four'))


@needs_onednn
@pytest.mark.parametrize('size', [(1, 32, 32), (5, 64, 96), (2, 75, 130)])
@pytest.mark.parametrize('dtype, tolerance', [
    (torch.float32, 1e-5), pytest.param(torch.bfloat16, 0.05, marks=needs_bf16)])
@pytest.mark.parametrize('name', ['test_pvt', 'pvt_tiny'])
def test_class_token_only(fast_calls, name, dtype, tolerance, size):
    model, x = make_model(name).to(dtype), make_input(*size).to(dtype)
    fused = fuse(model, class_token_only=True)
    model.float()
    with torch.no_grad():
        assert_same(fused(x).float(), model(x.float()), tolerance)
        token = fused.forward_features(x)
        assert_same(token.float(), model.forward_features(x.float())[:, :1], tolerance)
    assert token.is_contiguous() and len(fast_calls) == 8
    assert [repr(stage).count('class token only') for stage in fused.stages] == [0, 0, 0, 1]


@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('form', [
    lambda fused: fused.requires_grad_(True),
    copy.deepcopy,
    lambda fused: pickle.loads(pickle.dumps(fused)),
    torch.jit.script,
    pytest.param(
        lambda fused: torch.compile(fused, fullgraph=True, backend='aot_eager'), marks=pytest.mark.slow),
], ids=['gradients', 'copy', 'pickle', 'script', 'compile'])
def test_class_token_only_on_every_path(form):
    model, x = make_model(), make_input(2, 32, 64)
    fused = form(fuse(model, class_token_only=True))
    assert_same(fused(x), model(x))


def test_class_token_only_stays_true_on_the_plain_path():
    fused = fuse(make_model(), class_token_only=True)
    assert fused.forward_features(make_input(2, 32, 64)).shape == (2, 1, 64)  # with gradients
    assert 'class token only' in repr(fused.train().stages[3])


@pytest.mark.parametrize('model', [
    make_model(global_pool='avg'), make_model(class_token=False), make_model(features_only=True),
    make_model().stages[3], nn.Sequential(make_model())], ids=['average', 'dense', 'features', 'stage', 'inside'])
def test_class_token_only_needs_a_class_token_that_is_pooled(model):
    with pytest.raises(ValueError, match="an unchanged PVT classifier with global_pool='token'"):
        fuse(model, class_token_only=True)


def test_class_token_only_needs_a_stage_that_can_be_fused():
    class Stage(PyramidVisionTransformerStage):
        pass

    model = make_model()
    model.stages[3].__class__ = Stage
    with pytest.raises(ValueError, match='a last stage that can be fused .* got Stage'):
        fuse(model, inplace=True, class_token_only=True)
    assert type(model.stages[0]) is PyramidVisionTransformerStage  # nothing was replaced


def test_class_token_only_is_not_for_models_that_were_changed():
    class Mean(pvt.PyramidVisionTransformer):
        def forward_head(self, x, pre_logits=False):
            return x.mean(1)

    derived, patched, hooked = make_model(), make_model(), make_model()
    derived.__class__ = Mean
    patched.forward_head = lambda x: x.mean(1)
    hooked.stages[3].register_forward_hook(lambda module, args, out: None)
    for model in (derived, patched, hooked):
        with pytest.raises(ValueError, match='an unchanged PVT classifier'):
            fuse(model, class_token_only=True)


@needs_onednn
@pytest.mark.parametrize('tokens', [1, 7, 100, 10 ** 6])
@pytest.mark.parametrize('name', ['STAGE_TOKENS', 'SLICE_TOKENS'])
def test_slices(monkeypatch, name, tokens):
    monkeypatch.setattr(fast, name, tokens)
    model = make_model()
    x = make_input(3, 64, 96)
    with torch.no_grad():
        assert_same(fuse(model)(x), model(x))


@needs_bf16
@pytest.mark.parametrize('name', ['test_pvt', 'pvt_tiny'])
def test_bfloat16_is_as_good_as_plain(name):
    """The error against float32 is at most 1.5 times that of the plain bfloat16 model."""
    model, x = make_model(name), make_input(4, 64, 96)
    with torch.no_grad():
        exact = model(x)
        low = model.bfloat16()
        plain, fused = ((m(x.bfloat16()).float() - exact).square().mean().sqrt() for m in (low, fuse(low)))
    assert fused <= 1.5 * plain


@needs_onednn
@pytest.mark.parametrize('dtype', [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)])
@pytest.mark.parametrize('scale', [1., 4.])
def test_attention_by_products_is_as_exact_as_the_kernel(monkeypatch, scale, dtype):
    """The error is at most 1.5 times that of the kernel, also for large logits.

    At scale 4, logits reach 80, where bfloat16 has no decimals.
    """
    monkeypatch.setattr(fast, '_multiplies_faster', lambda: True)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        (factor * torch.randn(2, 3, tokens, 64, generator=generator)).to(dtype)
        for factor, tokens in ((scale, 200), (scale, 300), (1., 300)))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    with torch.no_grad():
        found, kernel = (f(q, k, v) for f in (fast._attend, F.scaled_dot_product_attention))
    assert found.dtype == dtype
    errors = [(out.double() - exact).abs().max().item() for out in (found, kernel)]
    assert errors[0] <= 1.5 * errors[1]


# --- What fusing does to modules ---

def kinds_of_stages(model):
    return {type(m) for m in model.modules() if isinstance(m, PyramidVisionTransformerStage)}


@pytest.mark.parametrize('fuse', [fuse, reparameterize_model])
def test_inplace_or_not(fuse):
    outer = nn.Sequential(make_model(), nn.Softmax(-1)).eval()
    inner, weights = outer[0], copy.deepcopy(outer.state_dict())
    fused = fuse(outer)
    assert kinds_of_stages(outer) == {PyramidVisionTransformerStage} and kinds_of_stages(fused) == {fast.FusedStage}
    with torch.no_grad():
        fused[0].stages[0].pos_embed.fill_(1.)
    assert all(torch.equal(v, weights[k]) for k, v in outer.state_dict().items())
    assert list(fused.state_dict()) == list(weights)
    before = list(fused[0].stages)
    assert all(a is b for a, b in zip(fuse(fused, inplace=True)[0].stages, before, strict=True))

    assert fuse(outer, inplace=True) is outer
    assert outer[0] is inner and kinds_of_stages(inner) == {fast.FusedStage}


def test_stage_of_another_class_is_left_alone():
    model = make_model()
    other = model.stages[0].__class__ = type('Stage', (PyramidVisionTransformerStage,), {})
    assert [type(s) for s in fuse(model).stages] == [other] + [fast.FusedStage] * 3


@pytest.mark.parametrize('make', [
    lambda: make_model(features_only=True, feature_cls='fx'),
    lambda: torch.jit.script(make_model()),
    lambda: nn.Linear(2, 2),
], ids=['fx', 'script', 'no PVT'])
def test_a_model_without_stages_is_refused(make):
    """A model without PVT stages is refused. Otherwise a user would believe that it is fused."""
    model = make()
    for inplace in (False, True):
        with pytest.raises(ValueError, match='Expected a model with PVT stages inside, got '):
            fuse(model, inplace)


def test_a_stage_with_two_places_stays_one_stage():
    stage = make_model().stages[0]
    outer = nn.ModuleDict(dict(a=stage, b=stage, c=nn.Sequential(stage)))
    fused = fuse(outer)
    assert type(fused['a']) is fast.FusedStage
    assert fused['a'] is fused['b'] is fused['c'][0]


def optimizer_step(model):
    model(make_input(1, 32, 32)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def fused_optimizer_steps(model):
    """Train with a fused optimizer, which does not change the version counters of the parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    for _ in range(5):
        model(make_input(1, 32, 32)).sum().backward()
        optimizer.step()


def fused_optimizer_step_in_training_mode(model):
    model.train()
    model(make_input(1, 32, 32)).sum().backward()
    torch.optim.AdamW(model.parameters(), lr=0.01, fused=True).step()
    model.eval()


def gradients_from_elsewhere(model):
    """Set gradients without a forward pass, as on a worker of a parameter server, and make a step."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    # larger steps would move all weights to one side, and rounding count
    torch.optim.SGD(model.parameters(), lr=0.01, fused=True).step()


def write_through_numpy(model):
    for p in model.parameters():
        p.detach().numpy()[...] *= 1.1


def write_through_dlpack(model):
    for p in model.parameters():
        torch.from_dlpack(p.detach()).mul_(1.1)


def collective(name, factor, **kwargs):
    """Return a function that changes all parameters with a collective operation of two ranks.

    The parameters of the other rank are `factor` times ours.
    """

    def change(model):
        store = dist.HashStore()
        of_ranks = [factor * p.detach() for p in model.parameters()], list(model.parameters())

        @torch.no_grad()
        def work(rank):
            group = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))
            for p in of_ranks[rank]:
                getattr(group, name)(p, **kwargs).wait()

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, range(2)))

    return change


def same_parameters_in_a_new_layer(model):
    mlp = model.stages[0].blocks[0].mlp
    mlp.fc1 = copy.copy(mlp.fc1)
    model.head.weight.data.mul_(2.)  # for another output


@needs_onednn
@pytest.mark.parametrize('change', [
    optimizer_step,
    fused_optimizer_steps,
    fused_optimizer_step_in_training_mode,
    gradients_from_elsewhere,
    write_through_numpy,
    write_through_dlpack,
    collective('broadcast', 1.1, root=0),
    collective('allreduce', 0.1),  # twice the weights would make large logits, and rounding count
    lambda m: m.bfloat16().float(),
    lambda m: m.stages[0].blocks.bfloat16().float(),
    lambda m: [m.stages[0].blocks[0].mlp.fc1.weight.data.mul_(3.), getattr(m.stages[0], 'repack', bool)()],
    lambda m: [setattr(p, 'data', p.data * 1.1) for p in m.parameters()],
    lambda m: setattr(m.stages[1].blocks[0].attn, 'proj', nn.Linear(32, 32)),
    same_parameters_in_a_new_layer,
    lambda m: m.load_state_dict({k: 1.1 * v for k, v in m.state_dict().items()}),
    lambda m: m.reset_classifier(7, 'avg'),
    lambda m: m.set_input_size((64, 96)),
    lambda m: m.prune_intermediate_layers([1], prune_head=True),
])
def test_packed_weights_follow_the_parameters(fast_calls, change):
    plain, fused, x = make_model(), fuse(make_model()), make_input(2, 64, 64)
    with torch.no_grad():
        before = fused(x)
        for model in (plain, fused):
            torch.manual_seed(0)
            with torch.enable_grad():
                change(model)
        del fast_calls[:]
        expected = plain(x)
        assert_same(fused(x), expected)
    assert len(fast_calls) == len(plain.stages)
    assert before.shape != expected.shape or not torch.equal(before, expected), 'stale weights would not be seen'


@needs_onednn
@pytest.mark.parametrize('copy_', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_copies(fast_calls, copy_):
    model, fused, x = make_model(), fuse(make_model()), make_input(1, 64, 32)
    with torch.no_grad():
        fused(x)
        other = copy_(fused)
        assert_same(other(x), model(x))
        assert len(fast_calls) == 8
        for p in other.parameters():
            p.zero_()
        assert_same(fused(x), model(x))


@needs_onednn
def test_fused_in_inference_mode(fast_calls):
    """In inference mode, `fuse` makes a fast copy of normal parameters, which also works outside of it.

    Parameters that were made in inference mode stay on the plain path.
    """
    model, x = make_model(), make_input(1, 32, 32)
    with torch.inference_mode():
        fused, left = fuse(model), fuse(make_model(), inplace=True)
        assert_same(fused(x), model(x))
        assert_same(left(x), model(x), 0)
    with torch.no_grad():
        assert_same(fused(x), model(x))
    assert len(fast_calls) == 8 and repr(fused).count('path=fast') == 4
    assert repr(left).count('path=plain (parameters made in inference mode') == 4


@needs_onednn
def test_meta_device(fast_calls):
    """With a meta device as the default, the plain path runs. Afterwards the fast path runs again."""
    fused, x = fuse(make_model()), make_input(1, 32, 32)
    with torch.device('meta'), torch.no_grad():
        meta = fuse(timm.create_model('test_pvt').eval())
        assert meta(torch.empty(2, 3, 64, 64)).shape == (2, 10)
        fused(x), repr(fused)
    assert not fast_calls and 'path=plain' in repr(meta) and 'path=fast' in repr(fused)
    with torch.no_grad():
        fused(x)
    assert len(fast_calls) == 4


# --- Where the plain path is right ---

def assert_plain(fast_calls, reason, change=nn.Module.eval):
    """Check that changed stages run on the plain path, with exactly the results of plain stages.

    `change` is called after the weights of the stages were packed.
    """
    plain, fused = (f(make_model(drop_path_rate=0.5, proj_drop_rate=0.3).stages) for f in (nn.Module.eval, fuse))
    x = make_input(4, 32, 32)
    outputs = []
    with torch.no_grad():
        fused(x)
        del fast_calls[:]
        for stages in (plain, fused):
            torch.manual_seed(0)
            for stage in stages:
                change(stage)
            outputs.append(stages(x.to(stages[0].pos_embed.dtype)))
    assert torch.equal(*outputs) and not fast_calls
    assert repr(fused).count(f'path=plain ({reason}') == 4


def make_plain_attribute(module, name):
    value = getattr(module, name).detach()
    delattr(module, name)
    setattr(module, name, value)


@pytest.mark.parametrize('change, reason', [
    (lambda s: setattr(s.blocks[0].attn, 'q', type('Adapter', (nn.Linear,), {})(s.dim, s.dim)),
     f'{__name__}.Adapter as q has no fast form'),
    (lambda s: torch.ao.quantization.quantize_dynamic(s, {nn.Linear}, inplace=True), 'torch.ao.nn.quantized.dynamic'),
    (lambda s: nn.utils.parametrizations.weight_norm(s.blocks[0].mlp.fc1), 'torch.nn.utils.parametrize.Parametrized'),
    (lambda s: setattr(s.blocks[0].mlp, 'forward', torch.neg), 'pvt_timm.sliced_mlp.SlicedMlp as mlp has no fast form'),
    (lambda s: setattr(s.blocks[0].mlp, 'act', nn.GELU('tanh')), 'approximate GELU'),
    (lambda s: setattr(s.blocks[0].mlp, 'act', nn.Identity()), 'torch.nn.modules.linear.Identity as act'),
    (lambda s: setattr(s.blocks[0].mlp, 'norm', nn.LayerNorm(s.blocks[0].mlp.fc1.out_features)), 'torch.nn.modules'),
    (lambda s: setattr(s.blocks[0], 'norm1', nn.Identity()), 'torch.nn.modules.linear.Identity as norm1'),
    # known ones in the place of others
    (lambda s: setattr(s.blocks[0], 'drop_path2', nn.LayerNorm(s.dim)), 'torch.nn.modules.normalization.LayerNorm as'),
    (lambda s: setattr(s.blocks[0].attn, 'proj_drop', nn.Linear(s.dim, s.dim)), 'torch.nn.modules.linear.Linear as'),
    (lambda s: setattr(s, 'pos_drop', nn.LayerNorm(s.dim)), 'torch.nn.modules.normalization.LayerNorm as pos_drop'),
    (lambda s: setattr(s.blocks[0], 'mlp', nn.Linear(s.dim, s.dim)), 'torch.nn.modules.linear.Linear as mlp'),
    (lambda s: setattr(s.blocks[0].attn, 'proj', nn.Identity()), 'torch.nn.modules.linear.Identity as proj'),
    (lambda s: s.blocks[0].mlp.fc1.add_module('lora', nn.Identity()), 'torch.nn.modules.linear.Identity as lora'),
    (lambda s: setattr(s.patch_embed.proj, 'padding', (1, 1)), 'patches that overlap or are padded'),
    (lambda s: setattr(s.patch_embed.proj, 'stride', (1, 1)), 'patches that overlap or are padded'),
    (lambda s: setattr(s.blocks[0].mlp, 'forward_tokens', torch.neg), 'pvt_timm.sliced_mlp.SlicedMlp as mlp has no'),
    (lambda s: (setattr(s.blocks[0].attn, 'scale', 2.), setattr(s.blocks[0].attn, 'fused_attn', False)),
     'attention with a scale of its own'),
    (lambda s: make_plain_attribute(s.blocks[0].mlp.fc1, 'weight'), 'weights that are not parameters'),
    (lambda s: make_plain_attribute(s.blocks[0].norm1, 'bias'), 'weights that are not parameters'),
    (lambda s: s.blocks[0].attn.register_forward_hook(lambda m, i, output: -output), 'hooks on inner modules'),
    (lambda s: [m.train() for m in s.modules() if isinstance(m, nn.Dropout)], 'dropout in training mode'),
    (nn.Module.train, 'training mode'),
    (nn.Module.double, 'no fast operators'),
    (nn.Module.half, 'no fast operators'),
])
def test_changed_modules(fast_calls, change, reason):
    assert_plain(fast_calls, reason, change)


@needs_onednn
@pytest.mark.parametrize('context, reason', [
    (lambda: torch.autocast('cpu', torch.bfloat16), 'autocast'),
    (lambda: torch.backends.mkldnn.flags(enabled=False), 'oneDNN is disabled'),
])
def test_contexts(fast_calls, context, reason):
    with context():
        assert_plain(fast_calls, reason)
    with torch.no_grad():
        fuse(make_model())(make_input(1, 32, 32))
    assert len(fast_calls) == 4


def negated(function):
    return lambda *args, **kwargs: tree_map_only(torch.Tensor, torch.neg, function(*args, **kwargs))


@pytest.mark.parametrize('owner, name', [
    (pvt.Attention, 'forward'),
    (pvt.Block, 'forward'),
    (SlicedMlp, 'forward'),
    (SlicedMlp, 'forward_tokens'),
    (pvt.LayerNorm, 'forward'),
    (nn.Linear, 'forward'),
    (nn.Linear, '__call__'),
    (nn.GELU, 'forward'),
    (nn.Module, '__call__'),
    (F, 'scaled_dot_product_attention'),
    (F, 'linear'),
], ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_patched_classes_and_functions(monkeypatch, fast_calls, owner, name):
    """Patches of classes or functions, as profilers make them, lead to the plain path.

    After the patch is removed, the fast path runs again.
    """
    fused, x = fuse(make_model()), make_input(1, 32, 32)
    with monkeypatch.context() as patch:
        assert_plain(fast_calls, 'patched: ', lambda stage: patch.setattr(owner, name, negated(getattr(owner, name))))
    with torch.no_grad():
        fused(x)
    assert len(fast_calls) == (4 if torch.backends.mkldnn.is_available() else 0)


@pytest.mark.parametrize('patch_before', [False, True])
def test_patched_stage_and_position_embeddings(monkeypatch, patch_before):
    """Patches of a stage's `forward` and of `resample_pos_embed` take effect in a fused model.

    The stage itself calls them, not its inner modules.
    """
    x = make_input(1, 64, 96)
    for owner, name in ((PyramidVisionTransformerStage, 'forward'), (pvt, 'resample_pos_embed')):
        plain, fused = make_model(), make_model() if patch_before else fuse(make_model())
        with monkeypatch.context() as patch, torch.no_grad():
            before = plain(x)
            patch.setattr(owner, name, negated(getattr(owner, name)))
            fused = fuse(fused) if patch_before else fused
            expected = plain(x)
            assert_same(fused(x), expected)
            assert not torch.equal(before, expected)


@needs_onednn
def test_convolutions_of_another_size(fast_calls):
    """If convolutions are replaced, the fast path uses their kernel sizes, as the plain model does."""
    outputs = []
    for make in (nn.Module.eval, fuse):
        stage = make(make_model().stages[0])
        torch.manual_seed(0)
        stage.patch_embed.proj = nn.Conv2d(3, 16, (8, 4), stride=(8, 4))
        stage.blocks[0].attn.sr = nn.Conv2d(16, 16, (1, 2), stride=(1, 2))
        with torch.no_grad():
            outputs.append(stage(make_input(2, 50, 70)))
    assert_same(*outputs)
    assert outputs[0].shape == (2, 16, 6, 17) and fast_calls == [16]


@pytest.mark.parametrize('error', [AttributeError, RuntimeError, TypeError, None])
def test_operators_missing_or_wrong(monkeypatch, fast_calls, error):
    def broken(weight, bias, gelu=False):
        if error is None:
            return lambda x: torch.zeros(*x.shape[:-1], len(weight), dtype=x.dtype)
        raise error('no such operator')

    monkeypatch.setattr(fast, '_pack_linear', broken)
    assert_plain(fast_calls, 'no fast operators')


def test_gradients(fast_calls):
    model, fused = make_model(), fuse(make_model())
    x = make_input(2, 32, 32).requires_grad_()
    for m in (model, fused):
        loss_of(m(x)).backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model).values(), gradients(fused).values(), strict=True))
    a, b = (torch.autograd.grad(m.requires_grad_(False)(x).sum(), x)[0] for m in (model, fused))
    assert torch.equal(a, b) and not fast_calls


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('of', ['images', 'parameters'])
def test_forward_mode_gradients(fast_calls, of, grad):
    tangents = []
    for model in (make_model(), fuse(make_model())):
        for attn in (m for m in model.modules() if isinstance(m, pvt.Attention)):
            attn.fused_attn = False  # the kernel has no forward-mode gradients
        x = make_input(1, 32, 32)
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            if of == 'images':
                x = forward_ad.make_dual(x, torch.ones_like(x))
            else:
                linear = model.stages[1].blocks[0].mlp.fc2
                weight = linear.weight.detach()
                del linear.weight
                linear._parameters['weight'] = forward_ad.make_dual(weight, torch.ones_like(weight))
            tangents.append(forward_ad.unpack_dual(model(x)).tangent)
    assert tangents[0].abs().max() > 0
    assert torch.equal(*tangents) and not fast_calls


@needs_onednn
def test_frozen_model_needs_no_no_grad(fast_calls):
    model = make_model().requires_grad_(False)
    fused = fuse(model)
    assert_same(fused(make_input(1, 32, 32)), model(make_input(1, 32, 32)))
    assert len(fast_calls) == 4 and 'path=fast\n' in repr(fused)
    assert 'path=fast (without gradients)' in repr(fuse(make_model())) and 'path=' not in repr(model)


def test_hooks_see_what_they_see_in_the_plain_model():
    seen = [], []
    for model, shapes in zip((make_model(), fuse(make_model())), seen):
        for module in (model.stages, model.stages[0], model.stages[0].blocks[0].attn, model.stages[3], model.norm):
            module.register_forward_hook(lambda m, i, o, shapes=shapes: shapes.append((i[0].shape, o.shape)))
        with torch.no_grad():
            model(make_input(1, 32, 32))
    assert seen[0] == seen[1] and len(seen[0]) == 5


def test_counters_see_all_work():
    from torch.utils.flop_counter import FlopCounterMode
    counts = []
    for model in (make_model(), fuse(make_model())):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.forward_features(make_input(1, 32, 32))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('form', [
    lambda model, x: torch.vmap(lambda image: model(image[None])[0]),
    torch.jit.script,
    lambda model, x: torch.jit.trace(model, x, check_trace=False),
    lambda model, x: torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO},)).module(),
    lambda model, x: torch.compile(model, fullgraph=True, backend='aot_eager'),
], ids=['vmap', 'script', 'trace', 'export', 'compile'])
def test_other_forms(fast_calls, form):
    model, fused, x = make_model(), fuse(make_model()), make_input(2, 32, 64)
    with torch.no_grad():
        assert_same(form(fused, x)(x), model(x))
    assert not fast_calls


@pytest.mark.parametrize('shape', [(1, 3, 16, 64), (1, 4, 64, 64), (3, 64, 64), (0, 3, 32, 32)])
def test_unusual_inputs_end_as_in_the_plain_model(shape):
    ends = []
    for model in (make_model(), fuse(make_model())):
        try:
            with torch.no_grad():
                ends.append(model(torch.ones(shape)).shape)
        except Exception as e:
            ends.append((type(e), str(e)))
    assert ends[0] == ends[1]


# --- What it is for ---

def test_threads_share_a_model():
    model, fused = make_model(), fuse(make_model())
    inputs = [make_input(1 + i % 3, 32 + 32 * (i % 2), 64, seed=i) for i in range(32)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        assert_same(list(pool.map(torch.no_grad()(fused.__call__), inputs)), expected)
