""" ONNX by both exporters of torch gives the same outputs in onnxruntime, also at sizes that were not exported. """
import pytest
import torch

from forms import KINDS, SIZES, assert_equal_at, make_input, make_model

onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

AXES = {0: 'batch', 2: 'height', 3: 'width'}


def assert_same_in_onnxruntime(model, path, dynamic, dynamo):
    axes = {}
    if dynamic and dynamo:
        axes = dict(dynamic_shapes=({i: torch.export.Dim.DYNAMIC for i in AXES},))
    elif dynamic:
        axes = dict(dynamic_axes={'x': AXES})
    torch.onnx.export(model, (make_input(2, 256, 320),), str(path), dynamo=dynamo, input_names=['x'], **axes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    assert_equal_at(
        lambda x: session.run(None, {'x': x.numpy()}), model, SIZES if dynamic else [(2, 256, 320)])


@pytest.mark.parametrize('kwargs', KINDS)
@pytest.mark.parametrize('dynamic', [False, True], ids=['static', 'dynamic'])
def test_torchscript_exporter(kwargs, dynamic, tmp_path):
    assert_same_in_onnxruntime(make_model(**kwargs), tmp_path / 'model.onnx', dynamic, dynamo=False)


@pytest.mark.slow
@pytest.mark.parametrize('name,kwargs,dynamic,dynamo', [
    pytest.param('test_pvt', {}, False, True, id='classification-static'),
    pytest.param('test_pvt', {}, True, True, id='classification-dynamic'),
    pytest.param('test_pvt', dict(features_only=True), True, True, id='features-dynamic'),
    pytest.param('pvt_tiny', {}, True, True, id='pvt_tiny-dynamic'),
    pytest.param('pvt_tiny', {}, True, False, id='pvt_tiny-torchscript'),
])
def test_slow_exports(name, kwargs, dynamic, dynamo, tmp_path):
    assert_same_in_onnxruntime(make_model(name, **kwargs), tmp_path / 'model.onnx', dynamic, dynamo)
