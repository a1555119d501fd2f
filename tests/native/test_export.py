""" torch.export, with dynamic sizes from 64x64 up, and AOTInductor packages. """
import pytest
import torch

from forms import SIZES, assert_equal_at, assert_equal_outputs, make_input, make_model

pytestmark = pytest.mark.skipif(not hasattr(torch.export, 'Dim'), reason='needs torch.export.Dim')

KINDS = [pytest.param({}, id='classification'), pytest.param(dict(features_only=True), id='features')]
# Below 64 pixels the grid of the last stage is 1, which torch's symbolic shapes never generalise over.
SMALLEST = 64


def dynamic_shapes():
    return ({
        0: torch.export.Dim('batch', min=1, max=64),
        2: torch.export.Dim('height', min=SMALLEST, max=4096),
        3: torch.export.Dim('width', min=SMALLEST, max=4096),
    },)


def export(model, dynamic=True, strict=False):
    return torch.export.export(
        model, (make_input(2, 256, 320),), dynamic_shapes=dynamic_shapes() if dynamic else None, strict=strict)


@pytest.mark.parametrize('strict', [False, True], ids=['non-strict', 'strict'])
def test_static(strict):
    model = make_model()
    assert_equal_at(export(model, dynamic=False, strict=strict).module(), model, [(2, 256, 320)])


@pytest.mark.parametrize('kwargs,strict', [
    pytest.param({}, False, id='classification-non-strict'),
    pytest.param({}, True, id='classification-strict', marks=pytest.mark.slow),
    pytest.param(dict(features_only=True), False, id='features-non-strict', marks=pytest.mark.slow),
    pytest.param(dict(features_only=True), True, id='features-strict', marks=pytest.mark.slow),
])
def test_dynamic_batch_height_and_width(kwargs, strict, tmp_path):
    model = make_model(**kwargs)
    program = export(model, strict=strict)
    # odd sizes, the smallest, and one whose first grid has as many tokens as the stored one but another shape
    sizes = (*SIZES, (1, SMALLEST, SMALLEST), (1, 113, 227), (1, 64, 196))
    assert_equal_at(program.module(), model, sizes)
    if not strict:
        torch.export.save(program, tmp_path / 'model.pt2')
        assert_equal_at(torch.export.load(tmp_path / 'model.pt2').module(), model, SIZES)


@pytest.mark.slow
def test_pvt_tiny():
    model = make_model('pvt_tiny')
    assert_equal_at(export(model).module(), model)


@pytest.mark.slow
@pytest.mark.parametrize('dynamic', [False, True], ids=['static', 'dynamic'])
@pytest.mark.skipif(not hasattr(torch._inductor, 'aoti_compile_and_package'), reason='needs torch 2.6')
def test_aot_inductor_package(dynamic, tmp_path):
    model = make_model()
    path = torch._inductor.aoti_compile_and_package(
        export(model, dynamic=dynamic), package_path=str(tmp_path / 'model.pt2'))
    package = torch._inductor.aoti_load_package(path)
    assert_equal_at(package, model, SIZES if dynamic else [(2, 256, 320)])


def test_an_exported_program_can_be_trained():
    model = make_model()
    x = make_input(2, 64, 96)
    program = torch.export.export(model, (x,)).module()
    program(x).square().mean().backward()
    model(x).square().mean().backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    for name, p in program.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)
    assert_equal_outputs(program(x).detach(), model(x).detach())
