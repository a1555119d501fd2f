""" The targets of an export: how a file of each kind is written, and how its runtime reads it. """
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn

from ..extras import import_extra
from ..int8 import CalibrationImages, quantize_onnx, quantize_openvino
from .comparing import Runner
from .graphs import Graph, Size

__all__ = ['TARGETS', 'Target']


@dataclass(frozen=True)
class Target:
    """A kind of file and the runtime that reads it."""
    suffix: str
    packages: Tuple[str, ...]  # that have to be installed
    write: Callable[[Graph, Path], None]
    load: Callable[[Path], Runner]
    read_metadata: Callable[[Path], Dict[str, str]]
    quantize: Optional[Callable[[Path, Path, CalibrationImages, Dict[str, str]], None]] = None  # to int8
    int8_packages: Tuple[str, ...] = ()
    detectors: bool = False  # whether detectors are supported: their last operations, and lists of any length
    detector_packages: Tuple[str, ...] = ()
    segmenters: bool = True  # whether segmenters are supported: resizing of maps for images of any size
    smallest: int = 32  # smallest side of images in pixels
    below: bool = False  # whether smaller images are possible if the model is exported with their size
    dynamic: bool = True  # whether batch and image size may differ from those of the export
    suffixes_beside: Tuple[str, ...] = ()  # extensions of the other files that belong to the file

    def files_beside(self, path: Path) -> List[Path]:
        """Return the other files that are written together with the file `path`."""
        return [path.with_suffix(suffix) for suffix in self.suffixes_beside]


def _explicit_attention(module: nn.Module) -> None:
    """Let attention layers use products and a softmax, which engines support, instead of PyTorch's kernel."""
    for m in module.modules():
        if hasattr(m, 'fused_attn'):
            setattr(m, 'fused_attn', False)  # noqa: B010


# ONNX -----------------------------------------------------------------------------------------------------------------

def _write_onnx(graph: Graph, path: Path) -> None:
    import onnx

    _trace_onnx(graph, path)
    proto = onnx.load(str(path))
    if graph.is_detector and graph.half:
        _store_half(proto)
    for key, value in graph.metadata.items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


def _trace_onnx(graph: Graph, path: Path) -> None:
    _explicit_attention(graph.module)
    if graph.is_detector:
        axes = {'image': {1: 'height', 2: 'width'}, **{output: {0: 'objects'} for output in graph.outputs}}
        if 'masks' in axes:
            axes['masks'].update({2: 'height', 3: 'width'})
        example = graph.example(*graph.example_sizes()[0])
    else:
        axes = {'image': {0: 'batch', 2: 'height', 3: 'width'}}
        for output in graph.outputs:
            axes[output] = {0: 'batch'}
            if graph.has_maps:
                axes[output].update({2: f'{output}_height', 3: f'{output}_width'})
        example = graph.example(2, 256, 320)
    # the older exporter, because its graphs accept images from 32 pixels on. Those of the newer one need 64 pixels
    torch.onnx.export(
        graph.module, (example,), str(path), dynamo=False, opset_version=17, input_names=['image'],
        output_names=graph.outputs, dynamic_axes=axes)


def _store_half(proto: Any) -> None:
    """Store large tensors in float16 if that changes none of their values, each followed by a cast to float32.

    The outputs stay the same to the last digit.
    """
    import onnx

    casts = []
    for tensor in proto.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        half = values.astype(np.float16)
        if values.size < 256 or not np.array_equal(half.astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(half, f'{name}_half'))
        casts.append(onnx.helper.make_node('Cast', [f'{name}_half'], [name], to=onnx.TensorProto.FLOAT))
    for cast in reversed(casts):
        proto.graph.node.insert(0, cast)


def _load_onnx(path: Path) -> Runner:
    onnxruntime = import_extra('onnxruntime')
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return lambda x: [torch.from_numpy(output) for output in session.run(None, {'image': x.numpy()})]


def _onnx_metadata(path: Path) -> Dict[str, str]:
    onnx = import_extra('onnx')
    said = {item.key: item.value for item in onnx.load(str(path), load_external_data=False).metadata_props}
    return {key: said[key] for key in _KEYS}


# OpenVINO -------------------------------------------------------------------------------------------------------------

def _write_openvino(graph: Graph, path: Path) -> None:
    openvino = import_extra('openvino')
    if graph.is_detector:  # converted from ONNX, where half precision does not change anchors and thresholds
        onnx_file = path.with_suffix('.onnx')
        _write_onnx(graph, onnx_file)
        model = openvino.convert_model(str(onnx_file))
        onnx_file.unlink()
    else:
        model = _convert(graph)
    model.inputs[0].get_tensor().set_names({'image'})
    for port, name in zip(model.outputs, graph.outputs, strict=True):
        port.get_tensor().set_names({name})
    for key, value in graph.metadata.items():
        model.set_rt_info(value, ['pvt_timm', key])
    openvino.save_model(model, str(path), compress_to_fp16=graph.half and not graph.is_detector)


def _convert(graph: Graph) -> Any:
    openvino = import_extra('openvino')
    _explicit_attention(graph.module)
    module = graph.module
    if graph.half:  # OpenVINO stores weights in float16, and chooses for the device what it computes in
        module = module.float()
        module.dtype = torch.float32  # type: ignore[assignment]
    return openvino.convert_model(
        module, example_input=graph.example(2, 256, 320), input=[-1, graph.in_chans, -1, -1])


def _load_openvino(path: Path) -> Runner:
    openvino = import_extra('openvino')
    # compute in float32, to compare exactly: by default OpenVINO may use bfloat16 on a CPU that has it
    compiled = openvino.Core().compile_model(str(path), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda x: [torch.from_numpy(output.copy()) for output in compiled(x.numpy()).values()]


def _openvino_metadata(path: Path) -> Dict[str, str]:
    openvino = import_extra('openvino')
    model = openvino.Core().read_model(str(path))
    return {key: str(model.get_rt_info(['pvt_timm', key]).value) for key in _KEYS}


# torch.export and ExecuTorch ------------------------------------------------------------------------------------------

def _program(graph: Graph, shape: Size, dynamic: bool) -> Any:
    shapes = None
    if dynamic:
        shapes = ({
            0: torch.export.Dim('batch', min=1, max=4096),
            2: torch.export.Dim('height', min=64, max=8192),
            3: torch.export.Dim('width', min=64, max=8192),
        },)
    with torch.no_grad():
        return torch.export.export(graph.module, (graph.example(*shape),), dynamic_shapes=shapes, strict=False)


def _write_torch(graph: Graph, path: Path) -> None:
    torch.export.save(
        _program(graph, (2, 256, 320), dynamic=True), str(path), extra_files={'pvt_timm': json.dumps(graph.metadata)})


def _load_torch(path: Path) -> Runner:
    module = torch.export.load(str(path)).module()
    return lambda x: list(module(x))


def _torch_metadata(path: Path) -> Dict[str, str]:
    files = {'pvt_timm': ''}
    torch.export.load(str(path), extra_files=files)
    return json.loads(files['pvt_timm'])


def _write_executorch(graph: Graph, path: Path) -> None:
    exir = import_extra('executorch.exir')
    xnnpack = import_extra('executorch.backends.xnnpack.partition.xnnpack_partitioner')
    edge = exir.to_edge_transform_and_lower(
        _program(graph, (1, *graph.img_size), dynamic=False), partitioner=[xnnpack.XnnpackPartitioner()],
        compile_config=exir.EdgeCompileConfig(_skip_dim_order=True),  # ambiguous at batch size 1
        constant_methods=dict(graph.metadata))
    path.write_bytes(edge.to_executorch().buffer)


def _load_executorch(path: Path) -> Runner:
    runtime = import_extra('executorch.runtime')
    method = runtime.Runtime.get().load_program(str(path)).load_method('forward')
    return lambda x: [output.clone() for output in method.execute([x])]


def _executorch_metadata(path: Path) -> Dict[str, str]:
    program = import_extra('executorch.runtime').Runtime.get().load_program(str(path))
    return {key: program.load_method(key).execute([])[0] for key in _KEYS}


_KEYS = ('model', 'version', 'input', 'outputs', 'labels', 'preprocessing')
TARGETS: Dict[str, Target] = {
    'onnx': Target(
        suffix='.onnx', packages=('onnx', 'onnxruntime'), write=_write_onnx, load=_load_onnx,
        read_metadata=_onnx_metadata, quantize=quantize_onnx, int8_packages=('onnxruntime.quantization',),
        detectors=True),
    'openvino': Target(
        suffix='.xml', packages=('openvino',), write=_write_openvino, load=_load_openvino,
        read_metadata=_openvino_metadata, quantize=quantize_openvino, int8_packages=('nncf',),
        detectors=True, detector_packages=('onnx',), smallest=64, below=True,
        suffixes_beside=('.bin',)),
    'torch': Target(
        suffix='.pt2', packages=(), write=_write_torch, load=_load_torch, read_metadata=_torch_metadata,
        segmenters=False, smallest=64),
    'executorch': Target(
        suffix='.pte', packages=('executorch.runtime',), write=_write_executorch, load=_load_executorch,
        read_metadata=_executorch_metadata, dynamic=False),
}
