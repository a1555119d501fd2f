""" ONNX by both exporters of torch gives the same outputs in onnxruntime, also at sizes that were not exported. """
import pytest
import torch

from forms import KINDS, SIZES, assert_equal_at, make_input, make_model

onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

AXES = {0: 'batch', 2: 'height', 3: 'width'}


@pytest.mark.parametrize('kwargs', KINDS)
@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.parametrize('dynamo', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_same_in_onnxruntime(dynamo, dynamic, kwargs, tmp_path):
    model, path = make_model(**kwargs), str(tmp_path / 'model.onnx')
    axes = {}
    if dynamic and dynamo:
        axes = dict(dynamic_shapes=({i: torch.export.Dim.DYNAMIC for i in AXES},))
    elif dynamic:
        axes = dict(dynamic_axes={'x': AXES})
    torch.onnx.export(model, (make_input(2, 256, 320),), path, dynamo=dynamo, input_names=['x'], **axes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    assert_equal_at(lambda x: session.run(None, {'x': x.numpy()}), model, SIZES if dynamic else [(2, 256, 320)])
