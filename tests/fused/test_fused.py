""" The fused model: the results of the plain one everywhere, on the fast path where it should be and nowhere else. """
import copy
import io
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from timm.utils import reparameterize_model

import pvt_timm
from pvt_timm import fused as fast

TOLERANCE = 1e-5
BF16_TOLERANCE = 0.05
ROOT = Path(__file__).resolve().parents[2]

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='PyTorch is built without oneDNN')
needs_bf16 = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason='no bfloat16 linears on this CPU')
bf16 = pytest.param(torch.bfloat16, BF16_TOLERANCE, marks=needs_bf16)


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
    """The stages whose fast forward ran."""
    calls = []
    forward = fast.FusedStage._fused_forward
    monkeypatch.setattr(
        fast.FusedStage, '_fused_forward', lambda self, *args: calls.append(self.dim) or forward(self, *args))
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
    assert actual.stride() == expected.stride() or actual.shape[0] < 2
    scale = max(1., expected.float().abs().max().item())
    assert (actual.float() - expected.float()).abs().max().item() <= tolerance * scale


# --- The same numbers on the fast path ---

@needs_onednn
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, TOLERANCE), bf16])
@pytest.mark.parametrize('batch, size', [
    (1, (32, 32)), (3, (64, 96)), (2, (75, 130)), (1, (33, 255)), (3, (224, 224)), (1, (448, 320))])
def test_sizes(fast_calls, batch, size, dtype, tolerance):
    model = build().to(dtype)
    fused = pvt_timm.fuse(model)
    x = images(batch, 3, *size).to(dtype)
    before = x.clone()
    with torch.no_grad():
        assert_same(fused(x), model(x), tolerance)
        assert_same(fused.forward_intermediates(x), model.forward_intermediates(x), tolerance)
    assert fast_calls == [16, 32, 40, 64] * 2
    assert torch.equal(x, before)


@needs_onednn
@pytest.mark.parametrize('name', ['pvt_tiny', 'pvt_small', 'pvt_medium', 'pvt_large'])
def test_variants(fast_calls, name):
    torch.manual_seed(0)  # the initial weights
    model = timm.create_model(name).eval()
    x = images(1, 3, 96, 64)
    with torch.no_grad():
        expected = model.forward_intermediates(x), model(x)
        fused = pvt_timm.fuse(model, inplace=True)
        assert fused is model
        assert_same((fused.forward_intermediates(x), fused(x)), expected)
    assert len(fast_calls) == 8


@needs_onednn
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
    *(dict(features_only=True, feature_cls=cls, class_token=token)
      for cls in ('list', 'dict', 'hook', 'getter') for token in (False, True)),
], ids=str)
def test_configurations(fast_calls, kwargs):
    model = build(**kwargs)
    fused = reparameterize_model(model)
    x = images(2, kwargs.get('in_chans', 3), 64, 96)
    with torch.no_grad():
        assert_same(fused(x), model(x))
    assert len(fast_calls) == len(kwargs.get('depths', 'four'))


def test_fx_features_stay_plain():
    model = build(features_only=True, feature_cls='fx')
    x = images(1, 3, 64, 96)
    with torch.no_grad():
        assert_same(reparameterize_model(model)(x), model(x), 0)


@needs_onednn
@pytest.mark.parametrize('tokens', [1, 7, 100, 10 ** 6])
@pytest.mark.parametrize('name', ['STAGE_TOKENS', 'SLICE_TOKENS'])
def test_slices(monkeypatch, name, tokens):
    monkeypatch.setattr(fast, name, tokens)
    model = build()
    x = images(3, 3, 64, 96)
    with torch.no_grad():
        assert_same(pvt_timm.fuse(model)(x), model(x))


@needs_bf16
def test_bfloat16_is_as_good_as_plain():
    """As near to float32 as the plain bfloat16 model is, within a half."""
    for name, size in (('test_pvt', (64, 96)), ('pvt_tiny', (64, 64))):
        model = build(name)
        x = images(4, 3, *size)
        with torch.no_grad():
            exact = model(x)
            low = copy.deepcopy(model).bfloat16()
            plain, fused = ((m(x.bfloat16()).float() - exact).square().mean().sqrt() for m in (low, pvt_timm.fuse(low)))
        assert fused <= 1.5 * plain


@pytest.mark.parametrize('dtype, share', [(torch.float32, 1.), pytest.param(torch.bfloat16, 0.99, marks=needs_bf16)])
def test_digits(dtype, share, tmp_path):
    """Classes of the held-out digits are those of the plain float32 model."""
    pytest.importorskip('sklearn')
    pytest.importorskip('PIL')
    from pvt_timm.digits import write_digits
    from timm.data import create_dataset, create_transform, resolve_model_data_config

    model = timm.create_model('test_pvt.digits', pretrained=True).eval()
    dataset = create_dataset('', str(write_digits(tmp_path, ['validation'])), split='validation')
    dataset.transform = create_transform(**resolve_model_data_config(model))
    x = torch.stack([image for image, _ in dataset])
    with torch.no_grad():
        expected = model(x).argmax(-1)
        actual = pvt_timm.fuse(model.to(dtype))(x.to(dtype)).argmax(-1)
    assert (actual == expected).float().mean() >= share


# --- What fusing does to modules ---

def stages_of(model):
    return [m for m in model.modules() if isinstance(m, pvt_timm.PyramidVisionTransformerStage)]


@pytest.mark.parametrize('fuse', [pvt_timm.fuse, reparameterize_model])
def test_inplace_or_not(fuse):
    outer = nn.Sequential(build(), nn.Softmax(-1)).eval()
    inner, weights = outer[0], copy.deepcopy(outer.state_dict())
    fused = fuse(outer)
    assert {type(s) for s in stages_of(outer)} == {pvt_timm.PyramidVisionTransformerStage}
    assert {type(s) for s in stages_of(fused)} == {fast.FusedStage}
    with torch.no_grad():
        assert_same(fused(images(1, 3, 32, 32)), outer(images(1, 3, 32, 32)))
        fused[0].stages[0].pos_embed.fill_(1.)
    assert all(torch.equal(v, weights[k]) for k, v in outer.state_dict().items())
    assert list(fused.state_dict()) == list(weights)
    again = [id(s) for s in stages_of(fuse(fused, inplace=True))]
    assert again == [id(s) for s in stages_of(fused)]

    assert fuse(outer, inplace=True) is outer
    assert outer[0] is inner and {type(s) for s in stages_of(inner)} == {fast.FusedStage}


def test_stage_with_a_forward_of_its_own():
    class Stage(pvt_timm.PyramidVisionTransformerStage):
        def forward(self, x):
            return 2 * super().forward(x)

    model = build()
    model.stages[0].__class__ = Stage
    assert [type(s) for s in pvt_timm.fuse(model).stages] == [Stage] + [fast.FusedStage] * 3


def _to_bfloat16_and_back(model):
    model.to(torch.bfloat16)
    with torch.no_grad():
        model(images(1, 3, 32, 32).bfloat16())
    model.float()


def _optimizer_step(model):
    model(images(1, 3, 32, 32)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@torch.no_grad()
def _in_place(model):
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
    attn = model.stages[1].blocks[0].attn
    attn.proj = nn.Linear(attn.dim, attn.dim)


def _write_through_data(model):
    model.stages[0].blocks[0].mlp.fc1.weight.data.mul_(3.)
    for stage in model.stages:
        if isinstance(stage, fast.FusedStage):
            stage.repack()


@needs_onednn
@pytest.mark.parametrize('change', [
    _to_bfloat16_and_back, _optimizer_step, _in_place, _new_data, _inner_move, _new_module, _write_through_data,
    lambda m: m.load_state_dict(build(seed=5).state_dict()),
    lambda m: m.reset_classifier(7),
    lambda m: m.reset_classifier(0, 'avg'),
    lambda m: m.set_input_size((64, 96)),
    lambda m: m.init_weights(),
    lambda m: m.prune_intermediate_layers([1], prune_head=True),
])
def test_packed_weights_follow_the_parameters(fast_calls, change):
    plain, fused = build(), pvt_timm.fuse(build())
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        before = fused(x)
    for model in (plain, fused):
        torch.manual_seed(0)
        change(model)
    del fast_calls[:]
    with torch.no_grad():
        actual, expected = fused(x), plain(x)
    assert len(fast_calls) == len(plain.stages)
    assert_same(actual, expected)
    if change is not _inner_move and change.__name__ != '<lambda>':
        assert not torch.allclose(before, expected, atol=1e-4), 'the test would not see stale weights'


@needs_onednn
@pytest.mark.parametrize('copy_', [
    copy.deepcopy,
    lambda m: pickle.loads(pickle.dumps(m)),
    lambda m: (lambda f: (torch.save(m, f), f.seek(0), torch.load(f, weights_only=False))[-1])(io.BytesIO()),
], ids=['deepcopy', 'pickle', 'torch.save'])
def test_copies(fast_calls, copy_):
    model, fused = build(), pvt_timm.fuse(build())
    x = images(1, 3, 64, 32)
    with torch.no_grad():
        fused(x)
        other = copy_(fused)
        del fast_calls[:]
        assert_same(other(x), model(x))
        assert len(fast_calls) == 4
        for p in other.parameters():
            p.zero_()
        assert_same(fused(x), model(x))


# --- Where the plain path is right ---

def assert_plain(model, fused, fast_calls, x, grad=False, reason=''):
    with torch.set_grad_enabled(grad):
        assert_same(fused(x), model(x), 0)
    assert not fast_calls
    assert f'path=plain ({reason}' in repr(fused) or not reason


def test_gradients(fast_calls):
    model, fused = build(), pvt_timm.fuse(build())
    x = images(2, 3, 32, 32)
    assert_plain(model, fused, fast_calls, x, grad=True)
    grads = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (model, fused)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    model.requires_grad_(False), fused.requires_grad_(False)
    x.requires_grad_(True)
    a, b = (torch.autograd.grad(m(x).sum(), x)[0] for m in (model, fused))
    assert torch.equal(a, b) and not fast_calls


@pytest.mark.parametrize('which', [nn.Module, nn.Dropout], ids=['all', 'dropout'])
def test_training_mode_of_the_model_or_of_its_dropout(fast_calls, which):
    model, fused = (build(drop_path_rate=0.5, proj_drop_rate=0.3) for _ in range(2))
    fused = pvt_timm.fuse(fused)
    with torch.no_grad():
        deterministic = model(images(4, 3, 32, 32))
    for m in (*model.modules(), *fused.modules()):
        m.training = isinstance(m, which)
    outputs = []
    for m in (model, fused):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(m(images(4, 3, 32, 32)))
    assert torch.equal(*outputs) and not torch.equal(outputs[0], deterministic)
    assert not fast_calls and 'training mode' in repr(fused.stages[0])


@needs_onednn
def test_frozen_model_needs_no_no_grad(fast_calls):
    model = build().requires_grad_(False)
    fused = pvt_timm.fuse(model)
    assert_same(fused(images(1, 3, 32, 32)), model(images(1, 3, 32, 32)))
    assert len(fast_calls) == 4 and 'path=fast\n' in repr(fused)
    assert 'path=fast (without gradients)' in repr(pvt_timm.fuse(build())) and 'path=' not in repr(model)


def test_onednn_disabled(fast_calls):
    with torch.backends.mkldnn.flags(enabled=False):
        assert_plain(
            build(), pvt_timm.fuse(build()), fast_calls, images(2, 3, 32, 32), reason='oneDNN is disabled')


@pytest.mark.parametrize('error', [AttributeError, RuntimeError, NotImplementedError, TypeError, None])
def test_operators_missing_or_wrong(monkeypatch, fast_calls, error):
    def broken(weight, bias, gelu=False):
        if error is None:
            return lambda x: torch.zeros(*x.shape[:-1], len(weight), dtype=x.dtype)
        raise error('no such operator')

    fast._works.cache_clear()
    monkeypatch.setattr(fast, '_pack_linear', broken)
    try:
        assert_plain(build(), pvt_timm.fuse(build()), fast_calls, images(2, 3, 32, 32), reason='no fast operators')
    finally:
        fast._works.cache_clear()


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16])
def test_other_dtypes(fast_calls, dtype):
    model = build().to(dtype)
    assert_plain(model, pvt_timm.fuse(model), fast_calls, images(1, 3, 32, 32).to(dtype), reason='no fast operators')


@needs_onednn
def test_meta_device(fast_calls):
    """Under a default device, too, and the fast path is there afterwards."""
    fast._works.cache_clear()
    fused, x = pvt_timm.fuse(build()), images(1, 3, 32, 32)
    with torch.device('meta'), torch.no_grad():
        meta = pvt_timm.fuse(timm.create_model('test_pvt').eval())
        assert meta(torch.empty(2, 3, 64, 64)).shape == (2, 10)
        fused(x), repr(fused)
    assert not fast_calls and 'path=plain' in repr(meta) and 'path=fast' in repr(fused)
    with torch.no_grad():
        fused(x)
    assert len(fast_calls) == 4


@needs_onednn
def test_autocast(fast_calls):
    fast._works.cache_clear()
    model = build()
    fused = pvt_timm.fuse(model)
    with torch.autocast('cpu', torch.bfloat16):
        assert_plain(model, fused, fast_calls, images(1, 3, 32, 32), reason='autocast')
    assert 'path=fast' in repr(fused)


@needs_onednn
def test_inference_mode(fast_calls):
    with torch.inference_mode():
        model = build()
        assert_plain(model, pvt_timm.fuse(model), fast_calls, images(1, 3, 32, 32), reason='parameters made in inf')
    model = build()
    fused = pvt_timm.fuse(model)
    with torch.inference_mode():
        assert_same(fused(images(1, 3, 32, 32)), model(images(1, 3, 32, 32)))
    assert len(fast_calls) == 4
    with torch.no_grad():  # what was packed in inference mode serves elsewhere
        assert_same(fused(images(1, 3, 64, 32)), model(images(1, 3, 64, 32)))


class Linear(nn.Linear):
    """An adapter."""
    def forward(self, x):
        return 2 * super().forward(x)


def _adapt(blk):
    torch.manual_seed(0)
    blk.attn.q = Linear(blk.attn.dim, blk.attn.dim)


def _parametrize(blk):
    nn.utils.parametrizations.weight_norm(blk.mlp.fc1)
    blk.mlp.fc1.parametrizations.weight.original0.data.mul_(2)


def _approximate(blk):
    blk.mlp.act = nn.GELU('tanh')


def _other_forward(blk):
    blk.mlp.forward = lambda x: 0.5 * x


@pytest.mark.parametrize('change, reason', [
    (_adapt, f'{__name__}.Linear has no fast form'),
    (_parametrize, 'torch.nn.utils.parametrize.ParametrizedLinear has'),
    (_approximate, 'approximate GELU'),
    (_other_forward, ''),
])
def test_replaced_modules(fast_calls, change, reason):
    model, fused = build(), pvt_timm.fuse(build())
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        before = fused(x)
    del fast_calls[:]
    for m in (model, fused):
        for stage in m.stages:
            change(stage.blocks[0])
    assert_plain(model, fused, fast_calls, x, reason=reason)
    with torch.no_grad():
        assert not torch.equal(before, fused(x))


def test_hooks_see_what_they_see_in_the_plain_model():
    seen = []
    for model in (build(), pvt_timm.fuse(build())):
        shapes = []
        for module in (model.stages, model.stages[0], model.stages[0].blocks[0].attn, model.stages[3], model.norm):
            module.register_forward_hook(lambda m, i, o, shapes=shapes: shapes.append((i[0].shape, o.shape)))
        with torch.no_grad():
            model(images(1, 3, 32, 32))
        seen.append(shapes)
    assert seen[0] == seen[1] and len(seen[0]) == 5


def test_counters_see_all_work():
    from torch.utils.flop_counter import FlopCounterMode
    counts = []
    for model in (build(), pvt_timm.fuse(build())):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.forward_features(images(1, 3, 32, 32))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_vmap():
    model, fused = build(), pvt_timm.fuse(build())
    x = images(3, 1, 3, 32, 32)
    with torch.no_grad():
        assert_same(torch.vmap(fused)(x), torch.stack([model(i) for i in x]))


@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::torch.jit.TracerWarning')
def test_script_trace_export(fast_calls):
    model, fused = build(), pvt_timm.fuse(build())
    x, other = images(2, 3, 32, 64), images(1, 3, 96, 64)
    with torch.no_grad():
        graphs = [
            torch.jit.script(fused),
            torch.jit.trace(fused, x, check_trace=False),
            torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO},))
            .module(),
        ]
        assert not fast_calls
        for graph in graphs:
            assert_same(graph(x), model(x))
        assert_same(graphs[0](other), model(other))
    assert isinstance(fused.stages[0], fast.FusedStage)


@pytest.mark.slow
def test_compile():
    model, fused = build(), pvt_timm.fuse(build())
    with torch.no_grad():
        compiled = torch.compile(fused, fullgraph=True, backend='aot_eager')
        for shape in ((2, 3, 32, 64), (1, 3, 96, 64)):
            assert_same(compiled(images(*shape)), model(images(*shape)))


@pytest.mark.parametrize('shape', [(1, 3, 16, 64), (1, 4, 64, 64), (3, 64, 64), (0, 3, 32, 32)])
def test_unusual_inputs_end_as_in_the_plain_model(shape):
    ends = []
    for model in (build(), pvt_timm.fuse(build())):
        try:
            with torch.no_grad():
                ends.append(model(images(*shape)).shape)
        except Exception as e:
            ends.append((type(e), str(e)))
    assert ends[0] == ends[1]


# --- What it is for ---

def test_threads_share_a_model():
    model, fused = build(), pvt_timm.fuse(build())
    inputs = [images(1 + i % 3, 3, 32 + 32 * (i % 2), 64, seed=i) for i in range(32)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        assert_same(list(pool.map(torch.no_grad()(fused.__call__), inputs)), expected)


_PEAK = """
import re, sys, timm, torch, pvt_timm
torch.manual_seed(0)
model = timm.create_model('pvt_tiny').eval().requires_grad_(False)
if sys.argv[1] == 'fused':
    model = pvt_timm.fuse(model, inplace=True)
model(torch.randn(1, 3, 64, 64))
x = torch.randn(1, 3, 640, 640)
def memory(field):
    return int(re.search(field + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024
open('/proc/self/clear_refs', 'w').write('5')
before = memory('VmRSS')
model(x)
print(memory('VmHWM') - before)
"""


@needs_onednn
@pytest.mark.slow
@pytest.mark.skipif(not os.access('/proc/self/clear_refs', os.W_OK), reason='peak memory is read from Linux\' /proc')
def test_memory_at_detection_size():
    """Some activations of the first stage (6.5 MB each), neither its hidden ones (52 MB) nor attention matrices."""
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    plain, fused = (
        int(subprocess.run([sys.executable, '-c', _PEAK, kind], env=env, check=True, capture_output=True).stdout)
        for kind in ('plain', 'fused'))
    assert fused <= plain and fused < 60e6, (plain, fused)
