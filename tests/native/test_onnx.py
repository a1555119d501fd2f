""" ONNX by both exporters of torch gives the same outputs in onnxruntime, also at sizes that were not exported. """
import pytest
import torch

from forms import SIZES, assert_equal_at, make_input, make_model

onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

KINDS = [pytest.param({}, id='classification'), pytest.param(dict(features_only=True), id='features')]
AXES = {0: 'batch', 2: 'height', 3: 'width'}


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    s = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    name = s.get_inputs()[0].name
    return lambda x: s.run(None, {name: x.numpy()})


def export(model, path, dynamic, dynamo):
    x = make_input(2, 256, 320)
    if dynamo:
        axes = {i: torch.export.Dim.DYNAMIC for i in AXES}
        torch.onnx.export(
            model, (x,), str(path), dynamo=True, input_names=['x'], dynamic_shapes=(axes,) if dynamic else None,
            verbose=False)
    else:
        torch.onnx.export(
            model, (x,), str(path), dynamo=False, input_names=['x'], dynamic_axes={'x': AXES} if dynamic else None)
    return session(path)


@pytest.mark.parametrize('kwargs', KINDS)
@pytest.mark.parametrize('dynamic', [False, True], ids=['static', 'dynamic'])
def test_torchscript_exporter(kwargs, dynamic, tmp_path):
    model = make_model(**kwargs)
    form = export(model, tmp_path / 'model.onnx', dynamic, dynamo=False)
    assert_equal_at(form, model, SIZES if dynamic else ((2, 256, 320),))


@pytest.mark.slow
@pytest.mark.parametrize('kwargs,dynamic', [
    pytest.param({}, False, id='classification-static'),
    pytest.param({}, True, id='classification-dynamic'),
    pytest.param(dict(features_only=True), True, id='features-dynamic'),
])
def test_dynamo_exporter(kwargs, dynamic, tmp_path):
    model = make_model(**kwargs)
    form = export(model, tmp_path / 'model.onnx', dynamic, dynamo=True)
    assert_equal_at(form, model, SIZES if dynamic else ((2, 256, 320),))


@pytest.mark.slow
@pytest.mark.parametrize('dynamo', [False, True], ids=['torchscript', 'dynamo'])
def test_pvt_tiny(dynamo, tmp_path):
    model = make_model('pvt_tiny')
    assert_equal_at(export(model, tmp_path / 'model.onnx', True, dynamo), model)
