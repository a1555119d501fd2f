""" The fused model: the results of the plain one everywhere, on the fast path where it should be and nowhere else. """
import copy
import io
import os
import pickle
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from timm.utils import reparameterize_model

import pvt_timm  # noqa: F401
from pvt_timm import fused as fast

TOLERANCE = 1e-5
ROOT = Path(__file__).resolve().parents[2]

needs_fast_ops = pytest.mark.skipif(
    not fast._works(torch.float32), reason='this build of PyTorch or this CPU has no oneDNN linears')


def build(name='test_pvt', seed=0, **kwargs):
    """A model whose parameters all have a say in the output."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.02 if p.ndim > 1 else 0.1))
    return model


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def fast_calls(monkeypatch):
    """The fast forwards that ran."""
    calls = []
    fused_forward = fast.FusedStage._fused_forward

    def count(self, *args, **kwargs):
        calls.append(kwargs.get('num_tokens'))
        return fused_forward(self, *args, **kwargs)

    monkeypatch.setattr(fast.FusedStage, '_fused_forward', count)
    return calls


def assert_same(actual, expected, tolerance=TOLERANCE):
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected):
            assert_same(a, e, tolerance)
        return
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    scale = max(1., expected.float().abs().max().item())
    assert (actual.float() - expected.float()).abs().max().item() <= tolerance * scale


@needs_fast_ops
@pytest.mark.parametrize('size', [(32, 32), (64, 96), (75, 130), (224, 224), (33, 255)])
@pytest.mark.parametrize('batch', [1, 3])
def test_classification(fast_calls, size, batch):
    model = build()
    fused = model.fuse()
    x = images(batch, 3, *size)
    with torch.no_grad():
        assert_same(fused(x), model(x))
        assert fast_calls == [None, None, None, 1]
        assert_same(fused.forward_features(x), model.forward_features(x))
        assert_same(fused.forward_intermediates(x), model.forward_intermediates(x))
    assert len(fast_calls) == 12


@needs_fast_ops
@pytest.mark.parametrize('name', ['pvt_tiny', 'pvt_small', 'pvt_medium', 'pvt_large'])
def test_variants(fast_calls, name):
    # with the initial weights
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = images(1, 3, 96, 64)
    with torch.no_grad():
        expected, features = model(x), model.forward_intermediates(x, intermediates_only=True)
        fused = model.fuse(inplace=True)
        assert fused is model
        assert_same(fused(x), expected)
        assert_same(fused.forward_intermediates(x, intermediates_only=True), features)
    assert len(fast_calls) == 8


@needs_fast_ops
@pytest.mark.parametrize('kwargs', [
    dict(global_pool='avg'),
    dict(global_pool=''),
    dict(class_token=False),
    dict(class_token=False, output_fmt='NLC'),
    dict(num_classes=0),
    dict(in_chans=1),
    dict(qkv_bias=False),
    dict(img_size=(64, 96)),
    dict(norm_layer='layernorm'),
    dict(depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2), sr_ratios=(2, 1), mlp_ratios=(2., 3.)),
], ids=str)
def test_configurations(fast_calls, kwargs):
    model = build(**kwargs)
    fused = reparameterize_model(model)
    x = images(2, kwargs.get('in_chans', 3), 64, 96)
    with torch.no_grad():
        assert_same(fused(x), model(x))
        assert_same(fused.forward_features(x), model.forward_features(x))
    assert len(fast_calls) == 2 * len(model.depths)


@needs_fast_ops
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'getter'])
@pytest.mark.parametrize('class_token', [False, True])
def test_features(fast_calls, feature_cls, class_token):
    model = build(features_only=True, feature_cls=feature_cls, class_token=class_token)
    fused = reparameterize_model(model)
    x = images(2, 3, 64, 96)
    with torch.no_grad():
        assert_same(fused(x), model(x))
    assert len(fast_calls) == 4


def test_fx_features_stay_plain():
    model = build(features_only=True, feature_cls='fx')
    x = images(1, 3, 64, 96)
    with torch.no_grad():
        assert_same(reparameterize_model(model)(x), model(x), 0)


@needs_fast_ops
def test_as_part_of_another_model(fast_calls):
    model = build()
    outer = nn.Sequential(model, nn.Softmax(-1)).eval()
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        assert_same(reparameterize_model(outer)(x), outer(x))
    assert len(fast_calls) == 4
    assert not any(isinstance(m, fast.FusedStage) for m in outer.modules())


@needs_fast_ops
@pytest.mark.parametrize('tokens', [1, 7, 100, 10 ** 6])
@pytest.mark.parametrize('name', ['STAGE_TOKENS', 'SLICE_TOKENS', 'SLICE_SCORES'])
def test_slices(monkeypatch, name, tokens):
    monkeypatch.setattr(fast, name, tokens)
    monkeypatch.setattr(fast, 'MIN_SLICE_TOKENS', 5)
    model = build()
    x = images(3, 3, 64, 96)
    with torch.no_grad():
        assert_same(model.fuse()(x), model(x))


@needs_fast_ops
@pytest.mark.parametrize('qkv_bias', [True, False])
@pytest.mark.parametrize('heads', [0, 1, 2, 8])
def test_merged_projections(monkeypatch, heads, qkv_bias):
    """Whichever blocks merge the projections of queries and outputs into keys and values."""
    monkeypatch.setattr(fast, 'MERGED_HEADS', heads)
    merged = []
    function = fast._merged_attention
    monkeypatch.setattr(
        fast, '_merged_attention', lambda attn, *args: merged.append(attn.num_heads) or function(attn, *args))
    for class_token in (True, False):
        model = build(qkv_bias=qkv_bias, class_token=class_token)
        x = images(2, 3, 96, 64)
        with torch.no_grad():
            assert_same(model.fuse()(x), model(x))
    assert set(merged) <= {1, 2, 5, 8} and all(h <= heads for h in merged)
    assert bool(merged) == bool(heads)


@needs_fast_ops
def test_merged_projections_only_where_they_are_less_work(monkeypatch):
    merged = []
    function = fast._merged_attention
    monkeypatch.setattr(fast, '_merged_attention', lambda attn, *args: merged.append(attn) or function(attn, *args))
    model = timm.create_model('pvt_small').eval().fuse()
    with torch.no_grad():
        model(images(1, 3, 224, 224))
        assert [a.num_heads for a in merged] == [1] * 3 + [2] * 4
        del merged[:]
        model(images(1, 3, 576, 640))  # 360 keys
        assert [a.num_heads for a in merged] == [1] * 3


@needs_fast_ops
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, TOLERANCE), (torch.bfloat16, 0.05)])
def test_attention_of_many_keys(monkeypatch, dtype, tolerance):
    monkeypatch.setattr(fast, 'MANY_KEYS', 10)
    heads = []
    function = fast._attention_of_many_keys
    monkeypatch.setattr(
        fast, '_attention_of_many_keys', lambda attn, *args: heads.append(attn.num_heads) or function(attn, *args))
    for class_token in (True, False):
        model = build(class_token=class_token).to(dtype)
        x = images(2, 3, 128, 96).to(dtype)
        with torch.no_grad():
            assert_same(model.fuse()(x), model(x), tolerance)
    assert set(heads) == {2, 5, 8}


@pytest.mark.parametrize('limit', [1, 196, 1568])
@pytest.mark.parametrize('batch, tokens', [(1, 1), (3, 50), (16, 49), (2, 3136), (5, 1569), (1, 67200)])
def test_slices_cover_everything_once(batch, tokens, limit):
    seen = torch.zeros(batch, tokens)
    for b, n in fast._slices(batch, tokens, limit):
        part = seen[b, n]
        part += 1
        assert part.is_contiguous() and 0 < part.numel() <= limit
    assert (seen == 1).all()


def test_original_untouched_and_idempotent():
    model = build()
    before = copy.deepcopy(model.state_dict())
    fused = model.fuse()
    assert not any(isinstance(m, fast.FusedStage) for m in model.modules())
    again = reparameterize_model(fused)
    assert [type(s) for s in again.stages] == [fast.FusedStage] * 4
    assert fused.fuse(inplace=True) is fused and fused.stages[0].fuse() is fused.stages[0]
    with torch.no_grad():
        fused.stages[0].pos_embed.fill_(1.)
        fused(images(1, 3, 32, 32))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert list(fused.state_dict()) == list(before)


def test_input_is_not_written():
    x = images(2, 3, 64, 64)
    for value in (x, x.to(memory_format=torch.channels_last), x[:, :, ::2, ::2]):
        before = value.clone()
        fused, model = build().fuse(), build()
        with torch.no_grad():
            assert_same(fused(value), model(value))
        assert torch.equal(value, before)


def _to_bfloat16_and_back(model):
    model.to(torch.bfloat16)
    with torch.no_grad():
        model(images(1, 3, 32, 32).bfloat16())
    model.float()


def _load(model):
    model.load_state_dict(build(seed=5).state_dict())


def _optimizer_step(model):
    model.requires_grad_(True)
    model(images(1, 3, 32, 32)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def _in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)


def _new_data(model):
    for p in model.parameters():
        p.data = p.data * 1.1


def _inner_move(model):
    for stage in model.stages:
        for blk in stage.blocks:
            blk.to(torch.bfloat16).float()


def _new_module(model):
    torch.manual_seed(3)
    attn = model.stages[1].blocks[0].attn
    attn.proj = nn.Linear(attn.dim, attn.dim)


@needs_fast_ops
@pytest.mark.parametrize('change', [
    _to_bfloat16_and_back,
    _load,
    _optimizer_step,
    _in_place,
    _new_data,
    _inner_move,
    _new_module,
    lambda m: m.reset_classifier(7),
    lambda m: m.reset_classifier(0, 'avg'),
    lambda m: m.set_input_size((64, 96)),
    lambda m: (torch.manual_seed(9), m.init_weights()),
    lambda m: m.prune_intermediate_layers([1], prune_head=True),
    lambda m: m.to(torch.bfloat16),
])
def test_packed_weights_follow_the_parameters(fast_calls, change):
    plain, fused = build(), build().fuse()
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        before = fused(x)
    for model in (plain, fused):
        torch.manual_seed(0)
        change(model)
    x = x.to(next(plain.parameters()).dtype)
    del fast_calls[:]
    with torch.no_grad():
        actual, expected = fused(x), plain(x)
    assert len(fast_calls) == len(plain.stages)
    assert actual.shape == expected.shape
    assert_same(actual, expected, TOLERANCE if x.dtype == torch.float32 else 0.05)
    if actual.shape == before.shape and change is not _inner_move and x.dtype == torch.float32:
        moved = not torch.allclose(before, expected, atol=1e-4)
        assert moved or change.__name__ == '<lambda>', 'the test would not see stale weights'


@needs_fast_ops
def test_repack_after_a_write_through_data():
    plain, fused = build(), build().fuse()
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        fused(x)
        for model in (plain, fused):
            model.stages[0].blocks[0].mlp.fc1.weight.data.mul_(3.)
        for stage in fused.stages:
            stage.repack()
        assert_same(fused(x), plain(x))


@needs_fast_ops
@pytest.mark.parametrize('copy_', [
    copy.deepcopy,
    lambda m: pickle.loads(pickle.dumps(m)),
    lambda m: (lambda f: (torch.save(m, f), f.seek(0), torch.load(f, weights_only=False))[-1])(io.BytesIO()),
], ids=['deepcopy', 'pickle', 'torch.save'])
@pytest.mark.parametrize('used', [False, True])
def test_copies(fast_calls, copy_, used):
    model, fused = build(), build().fuse()
    x = images(1, 3, 64, 32)
    with torch.no_grad():
        if used:
            fused(x)
        other = copy_(fused)
        del fast_calls[:]
        assert_same(other(x), model(x))
        assert len(fast_calls) == 4
        for p in other.parameters():
            p.zero_()
        assert_same(fused(x), model(x))


def test_state_dict_goes_both_ways():
    model, other = build(seed=1), build(seed=2)
    fused = build(seed=3).fuse()
    x = images(1, 3, 32, 32)
    fused.load_state_dict(model.state_dict())
    other.load_state_dict(fused.state_dict())
    with torch.no_grad():
        assert_same(fused(x), model(x))
        assert_same(other(x), model(x), 0)


@needs_fast_ops
def test_bfloat16():
    """As near to float32 as the plain bfloat16 model is, within a half, and 2 % of the logits' range from it."""
    for name, size in (('test_pvt', (64, 96)), ('pvt_tiny', (64, 64))):
        model = build(name)
        x = images(4, 3, *size)
        with torch.no_grad():
            exact = model(x)
            low = copy.deepcopy(model).bfloat16()
            fused = low.fuse()
            plain_out, fused_out = low(x.bfloat16()), fused(x.bfloat16())
            assert fused_out.dtype == torch.bfloat16
            span = exact.max() - exact.min()
            assert (fused_out.float() - plain_out.float()).abs().max() <= 0.02 * span
            plain_error = (plain_out.float() - exact).square().mean().sqrt()
            assert (fused_out.float() - exact).square().mean().sqrt() <= 1.5 * plain_error


# --- Where the plain path is right ---

def _is_plain(model, fused, fast_calls, x, tolerance=0., grad=False):
    with torch.set_grad_enabled(grad):
        expected, actual = model(x), fused(x)
    assert_same(actual, expected, tolerance)
    assert not fast_calls


def test_gradients(fast_calls):
    model, fused = build(), build().fuse()
    x = images(2, 3, 32, 32)
    _is_plain(model, fused, fast_calls, x, grad=True)
    grads = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (model, fused)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    model.requires_grad_(False), fused.requires_grad_(False)
    x.requires_grad_(True)
    a, b = (torch.autograd.grad(m(x).sum(), x)[0] for m in (model, fused))
    assert torch.equal(a, b) and not fast_calls


def test_training_mode(fast_calls):
    model, fused = (build(drop_path_rate=0.5, proj_drop_rate=0.3).train() for _ in range(2))
    fused.fuse(inplace=True)
    x = images(4, 3, 32, 32)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        assert torch.equal(fused(x), expected)
    assert not fast_calls
    assert 'training' in repr(fused.stages[0])


@needs_fast_ops
def test_frozen_model_needs_no_no_grad(fast_calls):
    model = build().requires_grad_(False)
    fused = model.fuse()
    assert_same(fused(images(1, 3, 32, 32)), model(images(1, 3, 32, 32)))
    assert len(fast_calls) == 4


def test_onednn_disabled(fast_calls):
    model, fused = build(), build().fuse()
    with torch.backends.mkldnn.flags(enabled=False):
        _is_plain(model, fused, fast_calls, images(2, 3, 32, 32))
        assert 'path=plain (oneDNN is disabled)' in repr(fused)


@pytest.mark.parametrize('error', [AttributeError, RuntimeError, NotImplementedError, TypeError, None])
def test_operators_missing_or_wrong(monkeypatch, fast_calls, error):
    def broken(weight, bias, gelu=False):
        if error is None:
            return lambda x: torch.zeros(*x.shape[:-1], len(weight), dtype=x.dtype)
        raise error('no such operator')

    model, fused = build(), build().fuse()
    fast._works.cache_clear()
    monkeypatch.setattr(fast, '_pack_linear', broken)
    try:
        _is_plain(model, fused, fast_calls, images(2, 3, 32, 32))
        assert 'no fast operators' in repr(fused)
    finally:
        fast._works.cache_clear()


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16])
def test_other_dtypes(fast_calls, dtype):
    model, fused = build().to(dtype), build().to(dtype).fuse()
    _is_plain(model, fused, fast_calls, images(1, 3, 32, 32).to(dtype))
    assert 'path=plain' in repr(fused)


def test_meta_device(fast_calls):
    fused = timm.create_model('test_pvt', device='meta').eval().fuse()
    with torch.no_grad():
        assert fused(torch.empty(2, 3, 64, 64, device='meta')).shape == (2, 10)
    assert not fast_calls and 'path=plain' in repr(fused)


def test_autocast(fast_calls):
    model, fused = build(), build().fuse()
    with torch.autocast('cpu', torch.bfloat16):
        _is_plain(model, fused, fast_calls, images(1, 3, 32, 32))


def test_inference_mode_parameters(fast_calls):
    with torch.inference_mode():
        model = build()
        fused = model.fuse()
        _is_plain(model, fused, fast_calls, images(1, 3, 32, 32))


@needs_fast_ops
def test_inference_mode(fast_calls):
    model, fused = build(), build().fuse()
    with torch.inference_mode():
        assert_same(fused(images(1, 3, 32, 32)), model(images(1, 3, 32, 32)))
    assert len(fast_calls) == 4
    with torch.no_grad():  # what was packed in inference mode serves elsewhere
        assert_same(fused(images(1, 3, 64, 32)), model(images(1, 3, 64, 32)))


class Adapter(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def _adapt(model):
    for stage in model.stages:
        for blk in stage.blocks:
            blk.attn.q = Adapter(blk.attn.q)


def _parametrize(model):
    for stage in model.stages:
        nn.utils.parametrizations.weight_norm(stage.blocks[0].mlp.fc1)
        stage.blocks[0].mlp.fc1.parametrizations.weight.original0.data.mul_(2)


def _approximate(model):
    for stage in model.stages:
        stage.blocks[0].mlp.act = nn.GELU('tanh')


def _other_forward(model):
    for stage in model.stages:
        stage.blocks[0].mlp.forward = lambda x: 0.5 * x


@pytest.mark.parametrize('change', [_adapt, _parametrize, _approximate, _other_forward])
def test_replaced_modules(fast_calls, change):
    model, fused = build(), build().fuse()
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        before = fused(x)
    del fast_calls[:]
    change(model), change(fused)
    _is_plain(model, fused, fast_calls, x)
    with torch.no_grad():
        assert not torch.equal(before, fused(x))


def test_hooks():
    model, fused = build(), build().fuse()
    x = images(1, 3, 32, 32)
    seen = []
    handles = [
        fused.stages[0].blocks[0].attn.register_forward_hook(lambda m, i, o: seen.append(('attn', o.shape))),
        fused.stages[3].register_forward_hook(lambda m, i, o: seen.append(('stage', o.shape))),
    ]
    with torch.no_grad():
        assert_same(fused(x), model(x))
        assert seen == [('attn', (1, 64, 16)), ('stage', (1, 2, 64))]
        for handle in handles:
            handle.remove()
        assert_same(fused(x), model(x))
    assert len(seen) == 2


def test_counters_see_all_work():
    from torch.utils.flop_counter import FlopCounterMode
    counts = []
    for model in (build(), build().fuse()):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.forward_features(images(1, 3, 32, 32))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_vmap():
    model, fused = build(), build().fuse()
    x = images(3, 1, 3, 32, 32)
    with torch.no_grad():
        assert_same(torch.vmap(fused)(x), torch.stack([model(i) for i in x]))


@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::torch.jit.TracerWarning')
def test_script_trace_export(fast_calls):
    model, fused = build(), build().fuse()
    x, other = images(2, 3, 32, 64), images(1, 3, 96, 64)
    with torch.no_grad():
        expected = model(x), model(other)
        graphs = [
            torch.jit.script(fused),
            torch.jit.trace(fused, x, check_trace=False),
            torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO},))
            .module(),
        ]
        assert not fast_calls
        for graph in graphs:
            assert_same(graph(x), expected[0])
        assert_same(graphs[0](other), expected[1])
    assert isinstance(fused.stages[0], fast.FusedStage)


@pytest.mark.slow
def test_compile():
    model, fused = build(), build().fuse()
    with torch.no_grad():
        compiled = torch.compile(fused, fullgraph=True, backend='aot_eager')
        for shape in ((2, 3, 32, 64), (1, 3, 96, 64)):
            assert_same(compiled(images(*shape)), model(images(*shape)))


def test_wrong_inputs_say_the_same():
    model, fused = build(), build().fuse()
    for x in (images(1, 3, 16, 64), images(1, 4, 64, 64), images(3, 64, 64)):
        messages = []
        for m in (model, fused):
            with pytest.raises(ValueError) as error, torch.no_grad():
                m(x)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_empty_batch():
    model, fused = build(), build().fuse()
    with torch.no_grad():
        assert fused(images(0, 3, 32, 32)).shape == (0, 10)
        assert_same(fused.forward_features(images(0, 3, 32, 32)).sum(), model.forward_features(
            images(0, 3, 32, 32)).sum())


# --- What it is for ---

def test_repr():
    assert 'path=fast (without gradients)' in repr(build().fuse()) or not fast._works(torch.float32)
    assert 'path=fast' not in repr(build())


def test_threads_share_a_model():
    model, fused = build(), build().fuse()
    inputs = [images(1 + i % 3, 3, 32 + 32 * (i % 2), 64, seed=i) for i in range(32)]

    def run(x):
        with torch.no_grad():
            return fused(x)

    with torch.no_grad():
        expected = [model(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for a, e in zip(pool.map(run, inputs), expected):
            assert_same(a, e)


_PEAK = """
import re, sys, timm, torch, pvt_timm
torch.manual_seed(0)
model = timm.create_model('pvt_tiny').eval().requires_grad_(False)
if sys.argv[1] == 'fused':
    model = model.fuse(inplace=True)
model(torch.randn(1, 3, 64, 64))
x = torch.randn(1, 3, 640, 640)
def memory(field):
    return int(re.search(field + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024
open('/proc/self/clear_refs', 'w').write('5')
before = memory('VmRSS')
model(x)
print(memory('VmHWM') - before)
"""


@needs_fast_ops
@pytest.mark.slow
@pytest.mark.skipif(not os.access('/proc/self/clear_refs', os.W_OK), reason='peak memory is read from Linux\' /proc')
def test_memory_at_detection_size():
    """Some activations of the first stage (6.5 MB each), neither its hidden ones (52 MB) nor attention matrices."""
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    plain, fused = (
        int(subprocess.run([sys.executable, '-c', _PEAK, kind], env=env, check=True, capture_output=True).stdout)
        for kind in ('plain', 'fused'))
    assert fused < 0.5 * plain
    assert fused < 60e6, (plain, fused)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_digits(dtype):
    """Top-1 on the held-out digits: that of the plain float32 model."""
    pytest.importorskip('sklearn')
    pytest.importorskip('PIL')
    from pvt_timm.digits import write_digits
    from timm.data import create_dataset, create_transform, resolve_model_data_config

    if not Path(timm.get_pretrained_cfg('test_pvt.digits').file).is_file():
        pytest.skip('the weights of test_pvt.digits are not there')
    model = timm.create_model('test_pvt.digits', pretrained=True).eval()
    with tempfile.TemporaryDirectory() as folder:
        dataset = create_dataset('', str(write_digits(folder, ['validation'])), split='validation')
        dataset.transform = create_transform(**resolve_model_data_config(model))
        x, labels = zip(*dataset)
    x, labels = torch.stack(x), torch.tensor(labels)
    with torch.no_grad():
        expected = model(x).argmax(-1)
        actual = model.to(dtype).fuse()(x.to(dtype)).argmax(-1)
    assert (expected == labels).float().mean() > 0.9
    if dtype == torch.float32:
        assert torch.equal(actual, expected)
    else:
        assert (actual == expected).float().mean() >= 0.99
