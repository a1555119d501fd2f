""" Models as files for other runtimes: `export(model, 'onnx', 'pvt.onnx')`, on the command line `pvt-timm export`.

What is written is the smaller graph of `pvt_timm.simplify`. Every file is read back by the runtime that it is for, and
compared with the model in PyTorch, before it gets its name. It says how images have to be prepared, and what the
classes are called (`read_metadata`).
"""
import contextlib
import io
import json
import logging
import os
import shutil
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.data import resolve_model_data_config

from .extras import import_extra
from .int8 import CalibrationImages, Int8Change, measure_change, quantize_onnx, quantize_openvino
from .pvt import PyramidVisionTransformer
from .simplified import simplify
from .version import __version__

__all__ = ['TARGETS', 'Exported', 'export', 'read_metadata']

PathLike = Union[str, 'os.PathLike[str]']
Runner = Callable[[torch.Tensor], List[torch.Tensor]]
Size = Tuple[int, int, int]  # batch, height, width

# How far outputs may be from PyTorch's, as a share of the largest value or of 1
TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2


@dataclass
class Graph:
    """What a target gets: images (B, C, H, W) to outputs, as one module."""
    module: nn.Module
    in_chans: int
    img_size: Tuple[int, int]
    outputs: List[str]
    metadata: Dict[str, str]
    half: bool

    def example(self, batch: int, height: int, width: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(batch, self.in_chans, height, width, generator=generator)


@dataclass(frozen=True)
class Target:
    """A kind of file and the runtime that reads it."""
    suffix: str
    packages: Tuple[str, ...]  # that have to be there
    write: Callable[[Graph, Path], None]
    load: Callable[[Path], Runner]
    read_metadata: Callable[[Path], Dict[str, str]]
    quantize: Optional[Callable[[Path, Path, CalibrationImages, Dict[str, str]], None]] = None  # to int8
    int8_packages: Tuple[str, ...] = ()
    smallest: int = 32  # side of images in pixels
    below: bool = False  # whether smaller images are possible where they have the size of the export
    dynamic: bool = True  # whether batch and size of images may be others than those of the export


@dataclass
class Exported:
    """What was written, and how far its outputs are from PyTorch's."""
    path: Path
    target: str
    outputs: List[str]
    bytes: int  # of all its files
    seconds: float  # to write and to check it
    differences: Dict[Size, float] = field(default_factory=dict)  # by batch, height, width; before int8
    int8: Optional[Int8Change] = None


def export(
        model: nn.Module,
        target: str,
        output: PathLike,
        features: bool = False,
        img_size: Optional[Union[int, Tuple[int, int]]] = None,
        half: bool = False,
        preprocessing: Optional[Dict[str, Any]] = None,
        labels: Sequence[str] = (),
        name: str = '',
        calibration: Optional[CalibrationImages] = None,
) -> Exported:
    """Write a classifier or a feature pyramid as a file for another runtime, and compare its outputs with PyTorch's.

    The input is called 'image', the outputs 'logits', or 'stage0', 'stage1'... for features (B, C, H, W).

    Args:
        model: A PVT.
        target: 'onnx', 'openvino', 'torch' (torch.export) or 'executorch'.
        output: File to write. For OpenVINO it is the .xml, beside which a .bin of the same name is written.
        features: The feature maps of all stages, without a class token and head. The model has to be a dense one
            (`class_token=False`).
        img_size: Height and width that the graph is optimised for, the only ones for targets of a fixed size (default
            that of `pretrained_cfg`).
        half: Weights in float16. Images and outputs stay float32.
        preprocessing: timm's data config, for the metadata (default that of the model).
        labels: Names of the classes, for the metadata.
        name: Name of the model, for the metadata.
        calibration: Images to quantise to int8 with, for 'onnx' and 'openvino'. What that changes is in the result.

    Raises:
        ImportError: The package of the target is not there.
        ValueError: An argument is not one of the expected ones, or outputs differ from PyTorch's. Nothing is written.
    """
    started = time.monotonic()
    kind, path = _target_of(target, output)
    if calibration is not None:
        if kind.quantize is None:
            able = ', '.join(name for name, other in TARGETS.items() if other.quantize)
            raise ValueError(f'Expected one of {able} as target for int8, got {target}')
        if half:
            raise ValueError('Expected half precision or int8, not both')
        for package in kind.int8_packages:
            import_extra(package)
    graph = _graph(model, features, img_size, half, preprocessing, labels, name)
    if min(graph.img_size) < kind.smallest and not kind.below:
        raise ValueError(f'Expected an img_size of at least {kind.smallest} for {target}, got {graph.img_size}')
    with _folder_beside(path) as folder:
        aside = folder / path.name
        with _quiet():
            kind.write(graph, aside)
        reference = _OutputsOf(model.eval(), features)
        differences = compare(kind.load(aside), reference, graph, kind, HALF_TOLERANCE if half else TOLERANCE)
        change = None
        if calibration is not None and kind.quantize is not None:
            before = kind.load(aside)
            (folder / 'int8').mkdir()
            with _quiet():
                kind.quantize(aside, folder / 'int8' / path.name, calibration, graph.metadata)
            aside = folder / 'int8' / path.name
            change = measure_change(before, kind.load(aside), calibration, graph.metadata)
        size = move_into_place(aside, path)
    return Exported(path, target, graph.outputs, size, time.monotonic() - started, differences, change)


def read_metadata(path: PathLike) -> Dict[str, Any]:
    """What an exported file says of itself: 'model', 'input', 'outputs', 'labels', 'preprocessing', 'version'.

    Raises:
        ValueError: The name of the file ends in none of the targets' suffixes, or it was not written by `export`.
    """
    path = Path(path)
    for kind in TARGETS.values():
        if path.suffix == kind.suffix:
            _import_packages(kind)
            try:
                return {key: json.loads(value) for key, value in kind.read_metadata(path).items()}
            except (KeyError, RuntimeError) as e:
                raise ValueError(f'Expected a file that was written by `export`, got {path}') from e
    raise ValueError(f'Expected a file that ends in {", ".join(k.suffix for k in TARGETS.values())}, got {path.name}')


def _target_of(target: str, output: PathLike) -> Tuple[Target, Path]:
    if target not in TARGETS:
        raise ValueError(f'Expected one of {", ".join(TARGETS)} as target, got {target!r}')
    kind, path = TARGETS[target], Path(output).absolute()
    if path.suffix != kind.suffix:
        raise ValueError(f'Expected a file name that ends in {kind.suffix} for {target}, got {path.name}')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'No such folder: {path.parent}')
    _import_packages(kind)
    return kind, path


def _import_packages(kind: Target) -> None:
    for package in kind.packages:
        import_extra(package)


class _OutputsOf(nn.Module):
    """Images to a tuple of outputs, float32 whatever the model computes in."""

    def __init__(self, model: nn.Module, features: bool, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model, self.features, self.dtype = model, features, dtype

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        x = x.to(self.dtype)
        if self.features:
            outputs = self.model.forward_intermediates(x, intermediates_only=True)  # type: ignore[operator]
        else:
            outputs = [self.model(x)]
        return tuple(_to_float(output) for output in outputs)


def _to_float(x: torch.Tensor) -> torch.Tensor:
    if x.ndim == 4:  # maps are channels_last: so seen, torch.export does not ask for which sizes that holds
        return x.permute(0, 2, 3, 1).float().permute(0, 3, 1, 2)
    return x.float()


def _graph(
        model: nn.Module, features: bool, img_size: Optional[Union[int, Tuple[int, int]]], half: bool,
        preprocessing: Optional[Dict[str, Any]], labels: Sequence[str], name: str) -> Graph:
    if not isinstance(model, PyramidVisionTransformer):
        raise ValueError(f'Expected a PyramidVisionTransformer, got {type(model).__name__}')
    if features and model.class_token:
        raise ValueError('Expected a dense model for features, made with class_token=False')
    if not features and not model.num_classes:
        raise ValueError('Expected a model with a classifier, or features=True')
    if {(p.dtype, p.device.type) for p in model.parameters()} != {(torch.float32, 'cpu')}:
        raise ValueError('Expected a model in float32 on the CPU')
    data = dict(preprocessing or resolve_model_data_config(model))
    if img_size is None:
        img_size = tuple(data['input_size'][1:])
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    data['input_size'] = (model.in_chans, height, width)
    outputs = [f'stage{i}' for i in range(len(model.stages))] if features else ['logits']
    said = dict(
        model=name or type(model).__name__, version=__version__, input='image', outputs=outputs, labels=list(labels),
        preprocessing={key: list(value) if isinstance(value, tuple) else value for key, value in data.items()})
    small = simplify(model, (height, width))
    dtype = torch.float16 if half else torch.float32
    return Graph(
        _OutputsOf(small.to(dtype), features, dtype).eval(), model.in_chans, (height, width), outputs,
        {key: json.dumps(value) for key, value in said.items()}, half)


def sizes_to_check(graph: Graph, kind: Target) -> List[Size]:
    """Three sizes: that of the export, and where the target can a larger one and one that no stride divides."""
    height, width = graph.img_size
    if not kind.dynamic:
        return [(1, height, width)]
    odd = max(kind.smallest, height // 2) + 3, max(kind.smallest, width // 2) + 17
    return [(1, height, width), (2, height + 96, width + 32), (3, *odd)]


@torch.no_grad()
def compare(run: Runner, reference: nn.Module, graph: Graph, kind: Target, tolerance: float) -> Dict[Size, float]:
    """The largest difference of outputs at each of `sizes_to_check`, as a share of the largest value or of 1.

    Raises:
        ValueError: It is more than `tolerance`, or an output has another shape.
    """
    differences = {}
    for size in sizes_to_check(graph, kind):
        x = graph.example(*size)
        largest = 0.
        for name, actual, expected in zip(graph.outputs, run(x), reference(x), strict=True):
            if actual.shape != expected.shape:
                raise ValueError(f'{name} has the shape {tuple(actual.shape)} for {size}, not {tuple(expected.shape)}')
            difference = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
            largest = max(largest, difference.item() if actual.isfinite().all() else float('inf'))
        differences[size] = largest
    if max(differences.values()) > tolerance:
        found = ', '.join(f'{"x".join(map(str, size))}: {value:.1e}' for size, value in differences.items())
        raise ValueError(f'Outputs differ from those of PyTorch by more than {tolerance:.0e} of the largest: {found}')
    return differences


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A new folder beside a file, which is gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix=f'.{path.stem}-', dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(aside: Path, path: Path) -> int:
    """Move a file, and what was written beside it, to where it belongs, itself last. Returns the bytes of all."""
    files = sorted((file for file in aside.parent.iterdir() if file.is_file()), key=lambda file: file == aside)
    size = sum(file.stat().st_size for file in files)
    for file in files:
        file.replace(path.parent / file.name)
    return size


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of themselves."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(level)


# the targets ----------------------------------------------------------------------------------------------------------

def _explicit_attention(module: nn.Module) -> None:
    """Attention as products and a softmax, which engines know, in place of PyTorch's kernel."""
    for m in module.modules():
        if hasattr(m, 'fused_attn'):
            setattr(m, 'fused_attn', False)  # noqa: B010


def _write_onnx(graph: Graph, path: Path) -> None:
    import onnx

    _explicit_attention(graph.module)
    axes = {'image': {0: 'batch', 2: 'height', 3: 'width'}}
    for output in graph.outputs:
        axes[output] = {0: 'batch'}
        if output != 'logits':
            axes[output].update({2: f'{output}_height', 3: f'{output}_width'})
    # the older exporter: its graphs take images from 32 pixels on, those of the newer one from 64
    torch.onnx.export(
        graph.module, (graph.example(2, 256, 320),), str(path), dynamo=False, opset_version=17,
        input_names=['image'], output_names=graph.outputs, dynamic_axes=axes)
    proto = onnx.load(str(path))
    for key, value in graph.metadata.items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


def _load_onnx(path: Path) -> Runner:
    onnxruntime = import_extra('onnxruntime')
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return lambda x: [torch.from_numpy(output) for output in session.run(None, {'image': x.numpy()})]


def _onnx_metadata(path: Path) -> Dict[str, str]:
    onnx = import_extra('onnx')
    said = {item.key: item.value for item in onnx.load(str(path), load_external_data=False).metadata_props}
    return {key: said[key] for key in _KEYS}


def _write_openvino(graph: Graph, path: Path) -> None:
    openvino = import_extra('openvino')
    _explicit_attention(graph.module)
    module = graph.module
    if graph.half:  # OpenVINO stores float16 and computes in what the device is good at
        module = module.float()
        module.dtype = torch.float32  # type: ignore[assignment]
    model = openvino.convert_model(
        module, example_input=graph.example(2, 256, 320), input=[-1, graph.in_chans, -1, -1])
    model.inputs[0].get_tensor().set_names({'image'})
    for port, name in zip(model.outputs, graph.outputs, strict=True):
        port.get_tensor().set_names({name})
    for key, value in graph.metadata.items():
        model.set_rt_info(value, ['pvt_timm', key])
    openvino.save_model(model, str(path), compress_to_fp16=graph.half)


def _load_openvino(path: Path) -> Runner:
    openvino = import_extra('openvino')
    # exactly what is in the file: by default a CPU with bfloat16 may compute in it
    compiled = openvino.Core().compile_model(str(path), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda x: [torch.from_numpy(output.copy()) for output in compiled(x.numpy()).values()]


def _openvino_metadata(path: Path) -> Dict[str, str]:
    openvino = import_extra('openvino')
    model = openvino.Core().read_model(str(path))
    return {key: str(model.get_rt_info(['pvt_timm', key]).value) for key in _KEYS}


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
        '.onnx', ('onnx', 'onnxruntime'), _write_onnx, _load_onnx, _onnx_metadata, quantize_onnx,
        ('onnxruntime.quantization',)),
    'openvino': Target(
        '.xml', ('openvino',), _write_openvino, _load_openvino, _openvino_metadata, quantize_openvino, ('nncf',),
        smallest=64, below=True),
    'torch': Target('.pt2', (), _write_torch, _load_torch, _torch_metadata, smallest=64),
    'executorch': Target(
        '.pte', ('executorch.runtime',), _write_executorch, _load_executorch, _executorch_metadata, dynamic=False),
}
