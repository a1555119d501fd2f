""" Prepare a model for export: as one module, which turns images into a tuple of outputs, with its metadata. """
import json
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import resolve_model_data_config

from ..detection.parts import PublishedDetector
from ..pvt import PyramidVisionTransformer
from ..segmentation import SemanticFpn
from ..simplified import simplify
from ..version import __version__

__all__ = ['Graph', 'Size', 'make_graph', 'reference_of']

Size = Tuple[int, int, int]  # batch, height, width

# Sizes (height, width) of the images on which a detector is compared with PyTorch. It resizes them itself
_DETECTOR_SIZES = ((480, 640), (375, 250), (333, 500))


@dataclass
class Graph:
    """A model as one module, with all that is needed to export it.

    Attributes:
        module: Turns images (B, C, H, W) into a tuple of outputs. That of a detector takes one image (C, H, W) with
            values from 0 to 1.
        in_chans: Channels of the images.
        img_size: Height and width that the graph is optimised for.
        outputs: Names of the outputs.
        metadata: Metadata for the file, each value as JSON.
        half: Whether weights are in float16.
        is_detector: Whether the model is a detector. The number of boxes depends on the content of the image.
    """
    module: nn.Module
    in_chans: int
    img_size: Tuple[int, int]
    outputs: List[str]
    metadata: Dict[str, str]
    half: bool
    is_detector: bool = False

    def example(self, batch: int, height: int, width: int) -> torch.Tensor:
        """Return random images. For a detector they have edges and areas of several sizes, so that it finds objects."""
        generator = torch.Generator().manual_seed(batch + height)
        if not self.is_detector:
            return torch.randn(batch, self.in_chans, height, width, generator=generator)
        image = torch.zeros(self.in_chans, height, width)
        for cells in (4, 12, 40):
            coarse = torch.rand(1, self.in_chans, cells, cells, generator=generator)
            image += F.interpolate(coarse, size=(height, width), mode='nearest')[0] / 3
        return image

    def example_sizes(self) -> List[Size]:
        """Return the sizes of images on which a detector is compared. It is exported with the first one."""
        return [(1, *size) for size in _DETECTOR_SIZES]

    @property
    def has_maps(self) -> bool:
        """Whether the outputs have a height and a width, which depend on the size of the images."""
        return self.outputs != ['logits'] or isinstance(getattr(self.module, 'model', None), SemanticFpn)


def make_graph(
        model: nn.Module,
        features: bool = False,
        img_size: Optional[Union[int, Tuple[int, int]]] = None,
        half: bool = False,
        preprocessing: Optional[Dict[str, Any]] = None,
        labels: Sequence[str] = (),
        name: str = '',
) -> Graph:
    """Return the simplified graph of a model, which is not changed. Arguments and errors are those of `export`."""
    if {(p.dtype, p.device.type) for p in model.parameters()} - {(torch.float32, 'cpu')}:
        raise ValueError('Expected a model in float32 on the CPU')
    if isinstance(model, PublishedDetector):
        return _detector_graph(model, features, img_size, half, preprocessing, labels, name)
    if isinstance(model, SemanticFpn):
        return _segmenter_graph(model, features, img_size, half, preprocessing, labels, name)
    if not isinstance(model, PyramidVisionTransformer):
        raise ValueError(
            f'Expected a PyramidVisionTransformer, a detector or a segmenter of this package, '
            f'got {type(model).__name__}')
    if features and model.class_token:
        raise ValueError('Expected a dense model for features, made with class_token=False')
    if not features and not model.num_classes:
        raise ValueError('Expected a model with a classifier, or features=True')
    data = dict(preprocessing or resolve_model_data_config(model))
    height, width = _as_pair(img_size, data['input_size'][1:])
    data['input_size'] = (model.in_chans, height, width)
    outputs = [f'stage{i}' for i in range(len(model.stages))] if features else ['logits']
    dtype = torch.float16 if half else torch.float32
    module = _OutputsOf(simplify(model, (height, width)).to(dtype), features, dtype).eval()
    metadata = _metadata(model, name, outputs, labels, data)
    return Graph(module, model.in_chans, (height, width), outputs, metadata, half)


def _segmenter_graph(
        model: SemanticFpn, features: bool, img_size: Optional[Union[int, Tuple[int, int]]], half: bool,
        preprocessing: Optional[Dict[str, Any]], labels: Sequence[str], name: str) -> Graph:
    if features:
        raise ValueError('Expected features of a backbone, got a segmenter')
    height, width = _as_pair(img_size, (model.min_size, model.min_size))
    data = dict(preprocessing or dict(
        input_size=(model.in_chans, height, width), mean=model.mean, std=model.std, interpolation='bilinear',
        min_size=model.min_size, max_size=model.max_size, size_divisible=32))
    dtype = torch.float16 if half else torch.float32
    module = _OutputsOf(simplify(model, (height, width)).to(dtype), False, dtype).eval()
    metadata = _metadata(model, name, ['logits'], labels or model.categories, data)
    return Graph(module, model.in_chans, (height, width), ['logits'], metadata, half)


def _detector_graph(
        model: PublishedDetector, features: bool, img_size: Optional[Union[int, Tuple[int, int]]], half: bool,
        preprocessing: Optional[Dict[str, Any]], labels: Sequence[str], name: str) -> Graph:
    if features:
        raise ValueError('Expected features of a backbone, got a detector')
    if img_size is not None:
        raise ValueError('Expected no img_size for a detector, which resizes images to its min_size and max_size')
    transform: Any = model.transform
    min_size = transform.min_size[-1]
    small: Any = simplify(model, (min_size, transform.max_size))
    if half:
        _round_to_half(small)
    outputs = ['boxes', 'scores', 'labels'] + (['masks'] if model.needs_masks else [])
    data = dict(preprocessing or dict(
        input_size=(model.in_chans, None, None), value_range=(0, 1), min_size=min_size, max_size=transform.max_size))
    metadata = _metadata(model, name, outputs, labels or model.categories, data)
    return Graph(_DetectionsOf(small).eval(), model.in_chans, _DETECTOR_SIZES[0], outputs, metadata, half, True)


def reference_of(model: nn.Module, graph: Graph, features: bool) -> nn.Module:
    """Return the module in PyTorch that a file's outputs are compared with, in float32 and in evaluation mode.

    For a detector in half precision, its weights are rounded as in the file. Boxes that overlap others too much are
    dropped, and which ones they are can change with the last digit of a weight. So other weights would give other lists
    of boxes.
    """
    if graph.is_detector:
        whole: Any = model.eval()
        return graph.module if graph.half else _DetectionsOf(whole)
    return _OutputsOf(model.eval(), features)


class _OutputsOf(nn.Module):
    """Turns images into a tuple of outputs. Images and outputs are float32 whatever the model computes in."""

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


class _DetectionsOf(nn.Module):
    """Turns one image (C, H, W) with values from 0 to 1 into the outputs of a detector.

    These are boxes (N, 4), scores (N,), labels (N,) that count from 0 and, if it has them, masks (N, 1, H, W).
    """

    def __init__(self, model: PublishedDetector):
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        found: Any = self.model([image])[0]
        masks = (found['masks'],) if self.model.needs_masks else ()
        return (found['boxes'], found['scores'], found['labels'] - self.model.first_label, *masks)


def _to_float(x: torch.Tensor) -> torch.Tensor:
    if x.ndim == 4:  # maps are channels_last. The permutation keeps torch.export from guarding on sizes because of it
        return x.permute(0, 2, 3, 1).float().permute(0, 3, 1, 2)
    return x.float()


@torch.no_grad()
def _round_to_half(model: nn.Module) -> None:
    """Round matrices and kernels to float16 numbers. Parameters with one number per channel are not rounded."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(parameter.half())


def _as_pair(img_size: Optional[Union[int, Tuple[int, int]]], default: Sequence[int]) -> Tuple[int, int]:
    if img_size is None:
        height, width = default
        return height, width
    return (img_size, img_size) if isinstance(img_size, int) else img_size


def _metadata(
        model: nn.Module, name: str, outputs: List[str], labels: Sequence[str], data: Dict[str, Any],
) -> Dict[str, str]:
    said = dict(
        model=name or type(model).__name__, version=__version__, input='image', outputs=outputs, labels=list(labels),
        preprocessing={key: list(value) if isinstance(value, tuple) else value for key, value in data.items()})
    return {key: json.dumps(value) for key, value in said.items()}
