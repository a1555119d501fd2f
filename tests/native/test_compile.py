""" torch.compile: one graph, and one compilation for all sizes. """
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from forms import KINDS, SIZES, assert_equal_at, gradients, loss_of, make_input, make_model


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize('kwargs', KINDS)
def test_all_sizes_with_one_compilation(kwargs):
    model = make_model(**kwargs)
    backend = CompileCounterWithBackend('eager')
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    # odd sizes too, and one with as many tokens as the stored grid of stage 1 but another shape
    assert_equal_at(compiled, model, ((2, 256, 320), *SIZES[1:], (4, 113, 227), (5, 64, 96), (2, 64, 64)))
    assert backend.frame_count == 1


@pytest.mark.parametrize('kwargs', KINDS)
def test_gradients(kwargs):
    model, other = make_model(**kwargs), make_model(**kwargs)
    x = make_input(2, 64, 96)
    for m in (model, torch.compile(other, fullgraph=True, backend='aot_eager')):
        loss_of(m(x)).backward()
    torch.testing.assert_close(gradients(other), gradients(model), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('kwargs', KINDS)
@pytest.mark.parametrize('dynamic', [False, True])
def test_inductor(dynamic, kwargs):
    model = make_model(**kwargs)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    # the number of calls of the backend says nothing here, Inductor may be called twice for one compilation
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_equal_at(compiled, model, ((2, 256, 320), (2, 224, 224), SIZES[2]) if dynamic else [(2, 256, 320)])
