""" torch.export, with dynamic sizes from 64x64 up, and AOTInductor packages. """
import pytest
import torch

from forms import KINDS, SIZES, assert_equal_at, gradients, loss_of, make_input, make_model

SIZE = (2, 256, 320)
# Below 64 pixels the grid of the last stage is 1, which torch's symbolic shapes never generalise over.
SMALLEST = 64


def export(model, dynamic, strict=False):
    dynamic_shapes = ({
        0: torch.export.Dim('batch', min=1, max=64),
        2: torch.export.Dim('height', min=SMALLEST, max=4096),
        3: torch.export.Dim('width', min=SMALLEST, max=4096),
    },) if dynamic else None
    return torch.export.export(model, (make_input(*SIZE),), dynamic_shapes=dynamic_shapes, strict=strict)


@pytest.mark.parametrize('kwargs', KINDS)
@pytest.mark.parametrize('strict', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dynamic_batch_height_and_width(strict, kwargs, tmp_path):
    model = make_model(**kwargs)
    program = export(model, True, strict)
    # odd sizes, the smallest, and one whose first grid has as many tokens as the stored one but another shape
    assert_equal_at(program.module(), model, (*SIZES, (1, SMALLEST, SMALLEST), (1, 113, 227), (1, 64, 196)))
    torch.export.save(program, tmp_path / 'model.pt2')
    assert_equal_at(torch.export.load(tmp_path / 'model.pt2').module(), model, SIZES[2:])


@pytest.mark.slow
@pytest.mark.parametrize('dynamic', [False, True], ids=['static', 'dynamic'])
def test_aot_inductor_package(dynamic, tmp_path):
    model = make_model()
    path = torch._inductor.aoti_compile_and_package(export(model, dynamic), package_path=str(tmp_path / 'model.pt2'))
    assert_equal_at(torch._inductor.aoti_load_package(path), model, SIZES if dynamic else [SIZE])


def test_an_exported_program_can_be_trained():
    model, x = make_model(), make_input(*SIZE)
    program = export(model, False).module()
    loss_of(program(x)).backward()
    found = {name: grad.clone() for name, grad in gradients(program).items()}
    model.zero_grad()
    loss_of(model(x)).backward()
    torch.testing.assert_close(found, gradients(model), rtol=1e-4, atol=1e-6)
