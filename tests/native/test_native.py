""" What every timm model has to support: compile, export, script, trace, feature extraction, other dtypes. """
import pytest
import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn
from timm.utils import AttentionExtract
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

from tests.support.forms import FEATURES_SLOW, KINDS, SIZES, assert_equal_at, gradients, loss_of, make_input, make_model
from tests.support.reference import images, randomize

SIZE = (2, 256, 320)  # the forms are made with
# Below 64 pixels the grid of the last stage is 1, which torch's symbolic shapes never generalise over.
SMALLEST = 64
# The last one has as many tokens as are stored for that of the example, in another shape.
EVERY_SIZE = (*SIZES, (2, SMALLEST, SMALLEST), (4, 113, 227), (5, 320, 256))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# torch.compile and torch.export

def export(model, dynamic=False, strict=False):
    dynamic_shapes = ({
        0: torch.export.Dim('batch', min=1, max=64),
        2: torch.export.Dim('height', min=SMALLEST, max=4096),
        3: torch.export.Dim('width', min=SMALLEST, max=4096),
    },) if dynamic else None
    return torch.export.export(model, (make_input(*SIZE),), dynamic_shapes=dynamic_shapes, strict=strict)


@pytest.mark.parametrize('kwargs', FEATURES_SLOW)
def test_all_sizes_with_one_compilation(kwargs):
    model = make_model(img_size=SIZE[1:], **kwargs)
    backend = CompileCounterWithBackend('eager')
    assert_equal_at(torch.compile(model, fullgraph=True, dynamic=True, backend=backend), model, EVERY_SIZE[1:])
    assert backend.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize('kwargs', KINDS)
@pytest.mark.parametrize('dynamic', [False, True])
def test_inductor(dynamic, kwargs):
    model = make_model(**kwargs)
    form = torch.compile(model, fullgraph=True, dynamic=dynamic)
    # the number of calls of the backend says nothing here, Inductor may be called twice for one compilation
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_equal_at(form, model, (SIZE, (2, 224, 224), SIZES[2]) if dynamic else [SIZE])


@pytest.mark.parametrize('kwargs', FEATURES_SLOW)
@pytest.mark.parametrize('strict', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export_of_all_sizes(strict, kwargs, tmp_path):
    model = make_model(img_size=SIZE[1:], **kwargs)
    program = export(model, True, strict)
    assert_equal_at(program.module(), model, EVERY_SIZE)
    torch.export.save(program, tmp_path / 'model.pt2')
    assert_equal_at(torch.export.load(tmp_path / 'model.pt2').module(), model, SIZES[2:])


@pytest.mark.slow
@pytest.mark.parametrize('dynamic', [False, True])
def test_export_to_aot_inductor(dynamic, tmp_path):
    model = make_model()
    path = torch._inductor.aoti_compile_and_package(export(model, dynamic), package_path=str(tmp_path / 'model.pt2'))
    assert_equal_at(torch._inductor.aoti_load_package(path), model, SIZES if dynamic else [SIZE])


@pytest.mark.parametrize('kwargs', FEATURES_SLOW)
@pytest.mark.parametrize('form', [
    lambda model: torch.compile(model, fullgraph=True, backend='aot_eager'),
    lambda model: export(model).module()], ids=['compile', 'export'])
def test_gradients(form, kwargs):
    model, other, x = make_model(**kwargs), make_model(**kwargs), make_input(*SIZE)
    other = form(other)
    for m in (model, other):
        loss_of(m(x)).backward()
    found = {name.removeprefix('_orig_mod.'): grad for name, grad in gradients(other).items()}
    torch.testing.assert_close(found, gradients(model), rtol=1e-4, atol=1e-6)


# Other graphs

@pytest.mark.parametrize('kwargs', [
    *KINDS, dict(features_only=True, feature_cls='getter'), dict(class_token=False),
    dict(global_pool='avg', num_classes=7)], ids=str)
@pytest.mark.parametrize('form', [
    torch.jit.script, lambda model: torch.jit.trace(model, make_input(*SIZE), check_trace=False)],
    ids=['script', 'trace'])
def test_torchscript(form, kwargs, tmp_path):
    model = make_model(img_size=SIZE[1:], **kwargs)
    form(model).save(tmp_path / 'model.pt')
    assert_equal_at(torch.jit.load(tmp_path / 'model.pt'), model, EVERY_SIZE)


@pytest.mark.parametrize('kwargs', KINDS)
@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.parametrize('dynamo', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_onnx(dynamo, dynamic, kwargs, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model, path = make_model(**kwargs), str(tmp_path / 'model.onnx')
    names = {0: 'batch', 2: 'height', 3: 'width'}
    axes = {}
    if dynamic and dynamo:
        axes = dict(dynamic_shapes=({i: torch.export.Dim.DYNAMIC for i in names},))
    elif dynamic:
        axes = dict(dynamic_axes={'x': names})
    torch.onnx.export(model, (make_input(*SIZE),), path, dynamo=dynamo, input_names=['x'], **axes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    assert_equal_at(lambda x: session.run(None, {'x': x.numpy()}), model, SIZES if dynamic else [SIZE])


# Dtypes, torch.func, attention

@pytest.mark.parametrize('kwargs', KINDS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_and_dtype(dtype, kwargs):
    # not test_pvt: with AMX, torch 2.14.1 computes channels_last convolutions of its 16 channels wrongly in bfloat16
    model, x = make_model('pvt_tiny', **kwargs).train(), make_input(2, 96, 64)
    expected = tree_leaves(model(x))
    with torch.autocast('cpu', dtype=dtype):
        outputs = tree_leaves(model(x))
    loss_of(outputs).backward()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients(model).values())
    low = tree_leaves(model.to(dtype)(x.to(dtype)))
    assert {o.dtype for o in low} == {dtype}
    for a, b, e in zip(outputs, low, expected, strict=True):
        assert max((a.float() - e).norm(), (b.float() - e).norm()) <= 0.03 * e.norm()


def test_per_sample_gradients():
    model = make_model(num_classes=10)
    params = {n: p.detach() for n, p in model.named_parameters()}
    x, target = make_input(3, 64, 96), torch.tensor([1, 0, 7])

    def loss(params, x, target):
        output = torch.func.functional_call(model, params, (x[None],))
        return torch.nn.functional.cross_entropy(output, target[None])

    grads = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, target)
    torch.nn.functional.cross_entropy(model(x[1:2]), target[1:2]).backward()
    torch.testing.assert_close({n: g[1] for n, g in grads.items()}, gradients(model), rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize('method, node', [('fx', 'softmax'), ('hook', 'attn_drop')])
@pytest.mark.parametrize('size', [(64, 64), (96, 160)])
def test_attention_maps(method, node, size):
    """Every block has a map (batch, heads, queries, keys), if attention is not fused.

    Queries are the tokens of the stage. Keys are these tokens, reduced `sr_ratio` times per side. In stage 4 the class
    token is the first of both.
    """
    before = use_fused_attn()
    set_fused_attn(False)
    model = randomize(timm.create_model('test_pvt', dtype=torch.float64)).eval()
    set_fused_attn(before)
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
