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
    """Write a model as a file for another runtime, and compare its outputs with PyTorch's.

    The input is called 'image'. The outputs are 'logits' for a classifier and a segmenter, 'stage0', 'stage1'... for
    features (B, C, H, W), and 'boxes' (N, 4), 'scores' (N,), 'labels' (N,) and 'masks' (N, 1, H, W) for a detector. A
    detector takes one image (C, H, W) of any size with values from 0 to 1. Its labels count from 0, without background.

    Args:
        model: A PVT, a detector of `pvt_timm.detection` or a segmenter of `pvt_timm.segmentation`.
        target: 'onnx', 'openvino', 'torch' (torch.export) or 'executorch'. Detectors: the first two.
        output: File to write. For OpenVINO it is the .xml, beside which a .bin of the same name is written. A .bin that
            is there without its .xml is not replaced: it is something else, such as a checkpoint.
        features: The feature maps of all stages, without a class token and head. The model has to be a dense one
            (`class_token=False`).
        img_size: Height and width that the graph is optimised for, the only ones for targets of a fixed size (default
            that of `pretrained_cfg`). Not for detectors, which resize their images.
        half: Weights in float16. Images and outputs stay float32.
        preprocessing: timm's data config, for the metadata (default that of the model).
        labels: Names of the classes, for the metadata (default `categories` of detectors and segmenters).
        name: Name of the model, for the metadata.
        calibration: Images to quantise to int8 with, for classifiers and features, and for 'onnx' and 'openvino'. What
            that changes is in the result.

    Raises:
        ImportError: The package of the target is not there.
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
        raise ValueError(f'Expected an img_size of at least {kind.smallest} for {target}, got {graph.img_size}')
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

    If it finds too little in the images that it is compared on, the same graph with a lower score is compared first.
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
    """What an exported file says of itself: 'model', 'input', 'outputs', 'labels', 'preprocessing', 'version'.

    Raises:
        ValueError: The name of the file ends in none of the targets' suffixes, or it was not written by `export`.
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
    """The targets that can do something, by the name of the field of `Target`."""
    return ', '.join(name for name, kind in TARGETS.items() if getattr(kind, what))


def _import_packages(packages: Sequence[str]) -> None:
    for package in packages:
        import_extra(package)


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in training or in evaluation mode as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


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
