""" The models that the benchmarks compare ("contenders"), as functions of a batch. All PVTs have the same weights. """
import atexit
import contextlib
import copy
import functools
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import timm  # noqa: E402
import pvt_timm  # noqa: E402
from pvt_timm.formats.mapping import from_timm  # noqa: E402
from pvt_timm.formats.original import import_original  # noqa: E402

DTYPES = {'fp32': torch.float32, 'tf32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
# Largest allowed difference between the logits of a contender and those of our model in float32, as a share of the
# largest of these, which is about 1 to 2
TOLERANCE = {'fp32': 1e-4, 'tf32': 2e-2, 'bf16': 8e-2, 'fp16': 2e-2}
CPU = ('original', 'transformers', 'eager', 'fused', 'onnxruntime', 'openvino')
ENGINES = (
    'original', 'eager', 'unfused_attention', 'fused', 'fused_token', 'onnxruntime_export', 'onnxruntime_int8',
    'openvino_original', 'openvino_export', 'openvino_any_size', 'openvino_int8')
RUNTIMES = (
    'onnxruntime', 'onnxruntime_export', 'onnxruntime_int8', 'openvino', 'openvino_original', 'openvino_export',
    'openvino_any_size', 'openvino_int8')
CUDA = (
    'original', 'transformers', 'eager', 'channels_last', 'compiled', 'cuda_graph', 'sdpa_flash', 'sdpa_efficient',
    'sdpa_math', 'pvt_v2', 'resnet50')
TRAIN = ('original', 'transformers', 'eager', 'unfused_attention', 'checkpointed')
TRAIN_CUDA = (*TRAIN, 'pvt_v2', 'resnet50')
INT8_TOLERANCE = 0.3  # with random weights and images, which int8 is calibrated on too
NOT_PVT = ('pvt_v2', 'resnet50')
PVT_V2 = {'tiny': 'pvt_v2_b1', 'small': 'pvt_v2_b2', 'medium': 'pvt_v2_b3', 'large': 'pvt_v2_b4'}


def has_bf16() -> bool:
    """Return whether the CPU can multiply matrices in bfloat16."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Skipped(Exception):
    """Raised if a contender cannot run here. The message says why."""


@functools.cache  # drawing random weights takes longer than most measurements
def reference(variant: str) -> torch.nn.Module:
    """Return our model, with the weights that all PVTs get."""
    torch.manual_seed(0)
    model = timm.create_model(f'pvt_{variant}').eval()
    with torch.no_grad():
        model.head.weight.mul_(10)  # makes the logits of random weights about as large as those of trained ones, 1 to 2
    return model


def _original(variant: str) -> torch.nn.Module:
    checkout = os.environ.get('PVT_CHECKOUT')
    if not checkout:
        raise Skipped('no checkout of whai362/PVT: pass --pvt-checkout or set PVT_CHECKOUT')
    module = import_original(Path(checkout))
    model = getattr(module, f'pvt_{variant}')()
    model.load_state_dict(from_timm(reference(variant).state_dict(), 'original')[0])
    return model


class _Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


def _transformers(variant: str) -> torch.nn.Module:
    from transformers import PvtConfig, PvtForImageClassification
    ours = reference(variant)
    model = PvtForImageClassification(PvtConfig(depths=list(ours.depths), num_labels=1000))
    model.load_state_dict(from_timm(ours.state_dict(), 'transformers')[0])
    for name, m in model.named_modules():  # transformers has 1e-6 everywhere, which gives other outputs
        if isinstance(m, torch.nn.LayerNorm) and ('patch_embeddings' in name or 'attention.self' in name):
            m.eps = 1e-5
    return _Logits(model)


def module(name: str, variant: str) -> torch.nn.Module:
    """Return a contender that is a module of PyTorch, in float32 on CPU."""
    model = copy.deepcopy(_module(name, variant))
    if name == 'checkpointed':
        model.set_grad_checkpointing()
    if name == 'unfused_attention':  # as after `timm.layers.set_fused_attn(False)`
        for m in model.modules():
            if hasattr(m, 'fused_attn'):
                m.fused_attn = False
    return model


@functools.cache
def _module(name: str, variant: str) -> torch.nn.Module:
    if name == 'original':
        return _original(variant).eval()
    if name == 'transformers':
        return _transformers(variant).eval()
    if name == 'pvt_v2':
        return timm.create_model(PVT_V2[variant]).eval()
    if name == 'resnet50':
        import torchvision
        return torchvision.models.resnet50().eval()
    return reference(variant)


@functools.cache
def _folder() -> Path:
    """Return a folder for exported models, which is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix='pvt-benchmark-')
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _traced(name: str, variant: str, shape) -> str:
    """Return the ONNX file that PyTorch's exporter writes for 'eager' or 'original', for images of one shape."""
    path = _folder() / f'{name}_{variant}_{"x".join(map(str, shape))}.onnx'
    if not path.exists():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            torch.onnx.export(
                module(name, variant), (torch.zeros(shape),), str(path), dynamo=False, opset_version=17,
                input_names=['image'], output_names=['logits'])
    return str(path)


@functools.cache
def _exported(variant: str, target: str, int8: bool, height: int, width: int) -> str:
    """Return the file of `pvt-timm export --img-size HEIGHT WIDTH`. For int8 it is calibrated with random images."""
    from pvt_timm.export import TARGETS, export
    from pvt_timm.int8 import CalibrationImages

    def random_image(file: Path) -> torch.Tensor:
        return torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(int(file.stem)))

    images = CalibrationImages([Path(str(i)) for i in range(8)], None, random_image) if int8 else None
    name = f'export_{variant}_{height}x{width}_{"int8" if int8 else "fp32"}{TARGETS[target].suffix}'
    export(reference(variant), target, _folder() / name, img_size=(height, width), calibration=images)
    return str(_folder() / name)


def _onnxruntime(name, variant, shape, precision, threads) -> Callable:
    if precision != 'fp32':
        raise Skipped('its CPU provider has no bf16')
    import onnxruntime
    if name == 'onnxruntime':
        path = _traced('eager', variant, shape)
    else:
        path = _exported(variant, 'onnx', name == 'onnxruntime_int8', *shape[2:])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'image': x.numpy()})[0])


def _openvino(name, variant, shape, precision, threads) -> Callable:
    import openvino
    core = openvino.Core()
    if name in ('openvino_export', 'openvino_any_size', 'openvino_int8'):
        model = core.read_model(_exported(variant, 'openvino', name == 'openvino_int8', *shape[2:]))
        if name != 'openvino_any_size':
            model.reshape(list(shape))
    else:
        model = core.read_model(_traced('original' if name == 'openvino_original' else 'eager', variant, shape))
    compiled = core.compile_model(model, 'CPU', {
        'INFERENCE_PRECISION_HINT': {'fp32': 'f32', 'bf16': 'bf16'}[precision],
        'INFERENCE_NUM_THREADS': threads,
        'PERFORMANCE_HINT': 'LATENCY',
    })
    request = compiled.create_infer_request()

    def forward(x):
        out = request.infer({0: x.numpy()}, share_inputs=True, share_outputs=True)
        return torch.from_numpy(np.asarray(out[compiled.output(0)]))
    return forward


def _cuda_graph(model: torch.nn.Module, shape, dtype) -> Callable:
    static = torch.zeros(shape, device='cuda', dtype=dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(static)

    def forward(x, model=model):  # keeps the model alive: the graph only knows the addresses of its weights
        static.copy_(x)
        graph.replay()
        return out
    return forward


def _sdpa(model: torch.nn.Module, backend: str) -> Callable:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    backend = dict(
        flash=SDPBackend.FLASH_ATTENTION, efficient=SDPBackend.EFFICIENT_ATTENTION, math=SDPBackend.MATH)[backend]

    def forward(x):
        with sdpa_kernel(backend):
            return model(x)
    return forward


def build(
        name: str,
        variant: str,
        shape,
        precision: str,
        device: str = 'cpu',
        threads: Optional[int] = None,
) -> Callable:
    """Return a contender as a function that turns a batch of images, of type `input_dtype`, into logits.

    Raises:
        Skipped: The contender cannot run here.
    """
    threads = threads or torch.get_num_threads()
    try:
        if name.startswith('onnxruntime'):
            return _onnxruntime(name, variant, shape, precision, threads)
        if name.startswith('openvino'):
            return _openvino(name, variant, shape, precision, threads)
        if name == 'transformers' and tuple(shape[2:]) != (224, 224):
            raise Skipped('takes 224x224 only')
        dtype = DTYPES[precision]
        model = module(name, variant).requires_grad_(False).to(device=device, dtype=dtype)
    except ImportError as e:
        raise Skipped(f'{e.name or e}' + (' is not installed' if e.name else '')) from e
    if name in ('fused', 'fused_token'):
        return pvt_timm.fuse(model, inplace=True, class_token_only=name == 'fused_token')
    if name == 'channels_last':
        model = model.to(memory_format=torch.channels_last)
        return lambda x: model(x.to(memory_format=torch.channels_last))
    if name == 'compiled':
        torch._dynamo.reset()
        return torch.compile(model, dynamic=False)
    if name == 'cuda_graph':
        return _cuda_graph(model, shape, dtype)
    if name.startswith('sdpa_'):
        return _sdpa(model, name[5:])
    return model


def training_dtype(precision: str, device: str) -> torch.dtype:
    """Return the type of weights and images in training. On a GPU it is float32: bf16 and fp16 use autocast there."""
    return torch.float32 if device == 'cuda' else DTYPES[precision]


def autocast(precision: str, device: str) -> Any:
    """Return the context for a forward pass in training: autocast for bf16 and fp16 on a GPU, else an empty one."""
    mixed = device == 'cuda' and DTYPES[precision] != torch.float32
    return torch.autocast(device, DTYPES[precision]) if mixed else contextlib.nullcontext()


def tolerance(name: str, precision: str) -> float:
    """Return the allowed difference of a contender's logits from ours in float32, as a share of the largest of ours."""
    return INT8_TOLERANCE if name.endswith('int8') else TOLERANCE[precision]


def input_dtype(name: str, precision: str) -> torch.dtype:
    """Return the type of a contender's images. OpenVINO and onnxruntime take float32 and convert it themselves."""
    return torch.float32 if name in RUNTIMES else DTYPES[precision]


def set_precision(precision: str, device: str) -> None:
    """Use TF32 on a GPU if `precision` is 'tf32', otherwise switch it off."""
    if device == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == 'tf32'
