""" Models as files for other runtimes: `export(model, 'onnx', 'pvt.onnx')`, on the command line `pvt-timm export`.

The model is first made smaller by `pvt_timm.simplify`. Every file is first written to a temporary folder. The runtime
that it is for reads it there, and its outputs are compared with those of the model in PyTorch. Only then the file is
moved to its place. Its metadata say how images have to be prepared, and name the classes (`read_metadata`).
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
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch.nn as nn

from ..extras import import_extra
from ..int8 import CalibrationImages, Int8Change, measure_change
from ..segmentation import SemanticFpn
from .comparing import (
    HALF_TOLERANCE, TOLERANCE, compare, compare_detections, scores_to_compare, sizes_to_check, thresholds_of)
from .graphs import Graph, Size, make_graph, reference_of
from .targets import TARGETS, Target

__all__ = ['TARGETS', 'Exported', 'export', 'read_metadata']

PathLike = Union[str, 'os.PathLike[str]']


@dataclass
class Exported:
    """The result of an export, and the differences of its outputs from PyTorch's."""
    path: Path
    target: str
    outputs: List[str]
    bytes: int  # size of all its files
    seconds: float  # time to write and compare it
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
    """Write a model as a file for another runtime, and compare its outputs with PyTorch's.

    The input is called 'image'. The outputs are 'logits' for a classifier and a segmenter, 'stage0', 'stage1'... for
    features (B, C, H, W), and 'boxes' (N, 4), 'scores' (N,), 'labels' (N,) and 'masks' (N, 1, H, W) for a detector. A
    detector takes one image (C, H, W) of any size with values from 0 to 1. Its labels count from 0, without background.

    Args:
        model: A PVT, a detector of `pvt_timm.detection` or a segmenter of `pvt_timm.segmentation`.
        target: 'onnx', 'openvino', 'torch' (torch.export) or 'executorch'. Detectors: the first two.
        output: File to write. For OpenVINO it is the .xml file, and a .bin file of the same name is written beside it.
            A .bin file that exists without its .xml file is not replaced: it may be a checkpoint.
        features: Whether to export the feature maps of all stages instead of the logits. The model has to be a dense
            one (`class_token=False`).
        img_size: Height and width that the graph is optimised for (default that of `pretrained_cfg`). For targets with
            a fixed size, they are the only ones. Not allowed for detectors, which resize images themselves.
        half: Whether to store weights in float16. Images and outputs stay float32.
        preprocessing: timm's data config, for the metadata (default that of the model).
        labels: Names of the classes, for the metadata (default `categories` of detectors and segmenters).
        name: Name of the model, for the metadata.
        calibration: Images for quantising to int8. Only classifiers and features, and only the targets 'onnx' and
            'openvino' can be quantised. The field `int8` of the result says what it changes.

    Raises:
        ImportError: The package of the target is not installed.
        ValueError: An argument is not one of the expected ones, or outputs differ from PyTorch's. Nothing is written.
    """
    started = time.monotonic()
    kind, path = _target_of(target, output)
    if calibration is not None:
        if kind.quantize is None:
            raise ValueError(f'Expected one of {_able("quantize")} as target for int8, got {target}')
        if half:
            raise ValueError('Expected half precision or int8, not both')
        _import_packages(kind.int8_packages)
    graph = make_graph(model, features, img_size, half, preprocessing, labels, name)
    if graph.is_detector:
        if not kind.detectors:
            raise ValueError(f'Expected one of {_able("detectors")} as target for detectors, got {target}')
        _import_packages(kind.detector_packages)
    elif isinstance(model, SemanticFpn) and not kind.segmenters:
        raise ValueError(f'Expected one of {_able("segmenters")} as target for segmenters, got {target}')
    elif min(graph.img_size) < kind.smallest and not kind.below:
        height, width = graph.img_size
        raise ValueError(
            f'Expected images of at least {kind.smallest}x{kind.smallest} for {target}, got {height}x{width}: choose '
            f'another img_size (--img-size {kind.smallest})')
    if calibration is not None and (graph.is_detector or not hasattr(model, 'stages')):
        raise ValueError('Expected a classifier or features for int8')
    with _modes_kept(model), _folder_beside(path) as folder:
        reference = reference_of(model, graph, features)
        aside = folder / path.name
        if graph.is_detector:
            differences = _write_detector(kind, graph, reference, aside)
        else:
            _write(kind, graph, aside)
            sizes = sizes_to_check(graph.img_size, kind.smallest, kind.dynamic)
            differences = compare(kind.load(aside), reference, graph, sizes, HALF_TOLERANCE if half else TOLERANCE)
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


def _write(kind: Target, graph: Graph, path: Path) -> None:
    with _quiet():
        kind.write(graph, path)


def _write_detector(kind: Target, graph: Graph, reference: Any, path: Path) -> Dict[Size, float]:
    """Write a detector and compare it. Returns the largest difference at each size.

    If the detector finds too few objects in the images for the comparison, the graph is first compared with a lower
    `score_thresh` (the lowest score of an object).
    """
    differences: Dict[Size, float] = {}
    parts = [thresholds_of(module.model) for module in (reference, graph.module)]
    own = parts[0].score_thresh
    lower = scores_to_compare(reference, graph)
    try:
        if lower != own:
            for part in parts:
                part.score_thresh = lower
            (path.parent / 'lower').mkdir()
            other = path.parent / 'lower' / path.name
            _write(kind, graph, other)
            differences = compare_detections(kind.load(other), reference, graph, TOLERANCE)
    finally:
        for part in parts:
            part.score_thresh = own
    _write(kind, graph, path)
    for size, difference in compare_detections(kind.load(path), reference, graph, TOLERANCE).items():
        differences[size] = max(difference, differences.get(size, 0.))
    return differences


def read_metadata(path: PathLike) -> Dict[str, Any]:
    """Return the metadata of an exported file: 'model', 'input', 'outputs', 'labels', 'preprocessing', 'version'.

    Raises:
        ValueError: The file's extension is not one of a target, or the file was not written by `export`.
    """
    path = Path(path)
    for kind in TARGETS.values():
        if path.suffix == kind.suffix:
            _import_packages(kind.packages)
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
    for beside in kind.files_beside(path):
        if beside.exists() and not path.exists():
            raise ValueError(
                f'{beside} would be replaced, and is not known to be a part of an export, as there is no {path.name}: '
                f'choose another name for the output.')
    _import_packages(kind.packages)
    return kind, path


def _able(what: str) -> str:
    """Return the names of the targets whose field `what` is set, such as 'detectors'."""
    return ', '.join(name for name, kind in TARGETS.items() if getattr(kind, what))


def _import_packages(packages: Sequence[str]) -> None:
    for package in packages:
        import_extra(package)


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore at the end which modules are in training mode and which are in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """Yield a new folder beside a file. It is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix=f'.{path.stem}-', dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(aside: Path, path: Path) -> int:
    """Move a file and the files beside it to the folder of `path`, the file itself last. Returns their bytes."""
    files = sorted((file for file in aside.parent.iterdir() if file.is_file()), key=lambda file: file == aside)
    size = sum(file.stat().st_size for file in files)
    for file in files:
        file.replace(path.parent / file.name)
    return size


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the messages and warnings of exporters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(level)
