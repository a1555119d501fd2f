""" What else a timm model has to stand: AMP, torch.func, copies, pickle, shared memory, TorchScript, FX. """
import copy
import pickle

import pytest
import timm
import torch

from forms import (
    KINDS, SIZES, as_list, assert_equal_at, assert_equal_outputs, gradients, loss_of, make_input, make_model)


@pytest.mark.parametrize('kwargs', KINDS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype, kwargs):
    model, x = make_model(**kwargs).train(), make_input(2, 96, 64)
    expected = as_list(model(x))
    with torch.autocast('cpu', dtype=dtype):
        outputs = as_list(model(x))
    loss_of(outputs).backward()
    for o, e in zip(outputs, expected):
        assert (o.float() - e).norm() <= 0.03 * e.norm()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize('kwargs', KINDS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype, kwargs):
    model, x = make_model(**kwargs), make_input(2, 96, 64)
    with torch.no_grad():
        expected, outputs = as_list(model(x)), as_list(model.to(dtype)(x.to(dtype)))
    for o, e in zip(outputs, expected):
        assert o.dtype == dtype
        assert (o.float() - e).norm() <= 0.03 * e.norm()


def test_functional_call_and_ensemble():
    models = [make_model(num_classes=10) for _ in range(3)]
    with torch.no_grad():
        for i, m in enumerate(models):
            for p in m.parameters():
                p.mul_(1 + 0.1 * i)
    params, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to('meta')
    x = make_input(2, 64, 96)

    def call(p, b, x):
        return torch.func.functional_call(base, (p, b), (x,))

    with torch.no_grad():
        outputs = torch.vmap(call, in_dims=(0, 0, None))(params, buffers, x)
        for output, m in zip(outputs, models):
            assert_equal_outputs(output, m(x), tolerance=1e-5)
    assert (outputs[0] - outputs[2]).abs().max() > 1e-2


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


@pytest.mark.parametrize('kwargs', KINDS)
@pytest.mark.parametrize('copy_', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_copies(copy_, kwargs):
    model, x = make_model(**kwargs), make_input(2, 96, 64)
    other = copy_(model)
    with torch.no_grad():
        before = model(x)
        assert_equal_outputs(other(x), before, tolerance=0)
        for p in other.parameters():
            p.zero_()
        assert_equal_outputs(model(x), before, tolerance=0)


def _zero_head(model):
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.fill_(3.)


def test_shared_memory():
    model = make_model().share_memory()
    assert all(p.is_shared() for p in model.parameters())
    context = torch.multiprocessing.get_context('spawn')
    process = context.Process(target=_zero_head, args=(model,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    with torch.no_grad():
        assert (model(make_input(1, 64, 64)) == 3.).all()


@pytest.mark.parametrize('kwargs', [
    *KINDS,
    pytest.param(dict(features_only=True, feature_cls='getter'), id='getter'),
    pytest.param(dict(class_token=False), id='dense'),
    pytest.param(dict(global_pool='avg', num_classes=7), id='avg'),
])
def test_torchscript(kwargs, tmp_path):
    model = make_model(**kwargs)
    torch.jit.script(model).save(tmp_path / 'model.pt')
    loaded = torch.jit.load(tmp_path / 'model.pt')
    assert_equal_at(loaded, model, (*SIZES, (1, 64, 196)))


@pytest.mark.parametrize('kwargs', KINDS)
def test_traced_at_one_size_runs_at_others(kwargs):
    model = make_model(**kwargs)
    assert_equal_at(torch.jit.trace(model, make_input(2, 256, 320), check_trace=False), model)


def test_fx_graph():
    fx = pytest.importorskip('torchvision.models.feature_extraction')
    model = make_model()
    tracer = dict(
        leaf_modules=timm.models.get_notrace_modules(), autowrap_functions=timm.models.get_notrace_functions())
    nodes = fx.get_graph_node_names(model, tracer_kwargs=tracer)[1]
    graph = fx.create_feature_extractor(model, nodes[-1:], tracer_kwargs=tracer)
    assert_equal_at(graph, model, (*SIZES, (1, 64, 196)))
