""" Convert exported files to int8 (numbers of 8 bits): `pvt-timm export --int8 --calibrate FOLDER`.

Calibration runs the model on some images to find the range of its activations.
"""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch

from .extras import import_extra
from .images import image_files, natural_key

__all__ = ['CalibrationImages', 'Int8Change', 'find_images', 'measure_change', 'quantize_onnx', 'quantize_openvino']

Runner = Callable[[torch.Tensor], List[torch.Tensor]]

CALIBRATION_IMAGES = 300  # largest number of images for calibration, which are evenly spread over the folder


@dataclass
class CalibrationImages:
    """Image files for calibration and for measuring what int8 changes."""
    files: List[Path]
    classes: Optional[List[int]]  # index of the class of each file, if it is known
    load: Callable[[Path], torch.Tensor]  # turns a file into an input (C, H, W) of the model

    def some(self) -> Iterator[torch.Tensor]:
        """Yield the inputs (1, C, H, W) to calibrate with."""
        step = -(-len(self.files) // CALIBRATION_IMAGES)
        for file in self.files[::step]:
            yield self.load(file)[None]


@dataclass
class Int8Change:
    """What int8 changes in the outputs of a model, measured on the images of a folder."""
    images: int
    right_before: Optional[float]  # share of the images that are classified right, None without classes
    right_after: Optional[float]
    same_first: Optional[float]  # share of the images with the same most likely class, None for features
    mean_change: float  # of outputs, as a share of the largest value
    largest_change: float


def find_images(folder: Union[str, Path], labels: Sequence[str] = ()) -> Tuple[List[Path], Optional[List[int]]]:
    """Return the images of a folder and its subfolders, and the index of the class of each, None if not known.

    An image's class is known from the subfolder that it is in. If all subfolders have names from `labels`, these names
    are the classes. If there are as many subfolders as labels, but with other names, the subfolders in natural order
    are the classes, as in timm. Otherwise classes are not known. Images are those of `image_files`.

    Raises:
        OSError: A folder does not exist or cannot be read.
        ValueError: There is no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'No such folder: {folder}')
    files = [Path(file) for file in sorted(image_files(str(folder)), key=natural_key)]
    if not files:
        raise ValueError(f'Expected images in {folder}, found none')
    parts = [file.relative_to(folder).parts for file in files]
    names = sorted({part[0] for part in parts if len(part) > 1}, key=natural_key)
    if not names or any(len(part) == 1 for part in parts):
        return files, None
    if set(names) <= set(labels):
        index = {name: list(labels).index(name) for name in names}
    elif len(names) == len(labels):
        index = {name: i for i, name in enumerate(names)}
    else:
        return files, None
    return files, [index[part[0]] for part in parts]


def quantize_openvino(source: Path, path: Path, images: CalibrationImages, metadata: Dict[str, str]) -> None:
    """Quantise weights and activations of an OpenVINO model after training, with NNCF's settings for transformers.

    Weights use half of the range of int8. With the whole range, sums of products overflow on CPUs without VNNI, which
    have 16 bits for them.
    """
    nncf, openvino = import_extra('nncf'), import_extra('openvino')
    inputs = [x.numpy() for x in images.some()]
    model = nncf.quantize(
        openvino.Core().read_model(str(source)), nncf.Dataset(inputs), subset_size=len(inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE))
    for key, value in metadata.items():
        model.set_rt_info(value, ['pvt_timm', key])
    openvino.save_model(model, str(path), compress_to_fp16=False)


def quantize_onnx(source: Path, path: Path, images: CalibrationImages, metadata: Dict[str, str]) -> None:
    """Quantise linear layers and convolutions of an ONNX model, with fixed scales. Weights have one per channel.

    Activations are unsigned, which is faster on x86. Weights have 7 bits, as onnxruntime advises for CPUs without VNNI.
    """
    onnx = import_extra('onnx')
    quantization = import_extra('onnxruntime.quantization')

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.inputs = images.some()

        def get_next(self) -> Optional[Dict[str, Any]]:
            x = next(self.inputs, None)
            return None if x is None else {'image': x.numpy()}

    graph = onnx.load(str(source)).graph
    stacked = {weight.name for weight in graph.initializer if len(weight.dims) > 2}  # a matrix for each head
    quantization.quantize_static(
        str(source), str(path), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        # onnxruntime 1.23, the last one for Python 3.10, cannot multiply by stacked matrices with scales per channel
        nodes_to_exclude=[node.name for node in graph.node if node.op_type == 'MatMul' and node.input[1] in stacked],
        op_types_to_quantize=['MatMul', 'Gemm', 'Conv'], activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8, reduce_range=True, extra_options={'MatMulConstBOnly': True})
    proto = onnx.load(str(path))
    del proto.metadata_props[:]
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    onnx.save(proto, str(path))


def measure_change(before: Runner, after: Runner, images: CalibrationImages, metadata: Dict[str, str]) -> Int8Change:
    """Run a model before and after quantisation on all images, and return what changes."""
    is_classifier = json.loads(metadata['outputs']) == ['logits']
    right = [0, 0]
    same, total, largest = 0, 0., 0.
    for i, file in enumerate(images.files):
        x = images.load(file)[None]
        old, new = before(x), after(x)
        changes = [(b - a).abs() / a.abs().max().clamp(min=1e-12) for a, b in zip(old, new, strict=True)]
        total += sum(change.mean().item() for change in changes) / len(changes)
        largest = max(largest, *(change.max().item() for change in changes))
        if is_classifier:
            first = [int(outputs[0].argmax()) for outputs in (old, new)]
            same += first[0] == first[1]
            if images.classes is not None:
                right = [n + (index == images.classes[i]) for n, index in zip(right, first)]
    count = len(images.files)
    known = is_classifier and images.classes is not None
    return Int8Change(
        count, right[0] / count if known else None, right[1] / count if known else None,
        same / count if is_classifier else None, total / count, largest)
