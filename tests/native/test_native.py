""" What else a timm model has to stand: AMP, other dtypes, torch.func, TorchScript, tracing. """
import pytest
import torch

from forms import KINDS, SIZES, as_list, assert_equal_at, gradients, loss_of, make_input, make_model


@pytest.mark.parametrize('kwargs', KINDS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_and_dtype(dtype, kwargs):
    model, x = make_model(**kwargs).train(), make_input(2, 96, 64)
    expected = as_list(model(x))
    with torch.autocast('cpu', dtype=dtype):
        outputs = as_list(model(x))
    loss_of(outputs).backward()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients(model).values())
    low = as_list(model.to(dtype)(x.to(dtype)))
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


@pytest.mark.parametrize('kwargs', [
    *KINDS, dict(features_only=True, feature_cls='getter'), dict(class_token=False),
    dict(global_pool='avg', num_classes=7)], ids=str)
def test_torchscript(kwargs, tmp_path):
    model = make_model(**kwargs)
    torch.jit.script(model).save(tmp_path / 'model.pt')
    assert_equal_at(torch.jit.load(tmp_path / 'model.pt'), model, (*SIZES, (1, 64, 196)))


@pytest.mark.parametrize('kwargs', KINDS)
def test_traced_at_one_size_runs_at_others(kwargs):
    model = make_model(**kwargs)
    assert_equal_at(torch.jit.trace(model, make_input(2, 256, 320), check_trace=False), model)
