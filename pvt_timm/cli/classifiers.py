""" Classifiers and backbones with their weights, labels and preprocessing, for the commands; images for them. """
import contextlib
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.models import get_pretrained_cfg, split_model_name_tag

from ..images import as_seen
from ..labels import labels_in, read_labels
from ..pvt import PyramidVisionTransformer, PyramidVisionTransformerStage
from ..variants import VARIANTS
from ..weights import read_weights
from .errors import EXPECTED, one_line
from .network import cannot_load, check_hub, check_pretrained

__all__ = [
    'DEFAULT_MODEL', 'Classifier', 'check_finite', 'check_in_chans', 'check_output', 'extract', 'load_model',
    'open_image', 'predict', 'probabilities', 'refusing_overflow', 'whole_image',
    'whole_size',
]

_logger = logging.getLogger(__name__)

DEFAULT_MODEL = 'pvt_small'
_NO_HEAD = 'is a backbone without a classifier: use `features` or `embed`, or weights with a head'


@dataclass
class Classifier:
    """A model with weights and what belongs to it."""
    model: PyramidVisionTransformer  # in evaluation mode
    name: str  # model and tag, or model and name of the file or folder
    data: Dict[str, Any]  # timm's data config (input_size, mean, std, interpolation, crop_pct...)
    labels: List[str]  # name of every class, none for a backbone without a head
    multi_label: bool = False  # whether every class has a probability of its own


def load_model(
        model: Optional[str] = None, checkpoint: Optional[Union[str, Path]] = None, dense: bool = False,
        img_size: Optional[Tuple[int, int]] = None, labels: Optional[Union[str, Path]] = None,
        prefix: Optional[str] = None, headless: bool = False) -> Classifier:
    """A model with its weights, never with random ones. Arguments are the options of `pvt-timm predict`.

    Args:
        dense: For features: without class token, final norm and head.
        headless: For embeddings: without head, which the weights need not have. The class token is kept.

    Raises:
        ValueError: The model is not known, or has no (fitting) weights, or `img_size` has more pixels than Pillow's
            limit for images. What the libraries raise where weights cannot be had or read is left alone.
    """
    if img_size and math.prod(img_size) > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f'Expected a size of {Image.MAX_IMAGE_PIXELS} pixels at most, got {img_size}')
    if checkpoint is None and model is not None and model.startswith('hf-hub:'):
        model, checkpoint = None, model
    if prefix is not None and checkpoint is None:
        raise ValueError('Expected --checkpoint with --prefix, the published weights hold one model each')
    variant = split_model_name_tag(model)[0] if model else None
    if variant not in (None, *VARIANTS):
        raise ValueError(f"Unknown model '{model}', expected one of {', '.join(VARIANTS)} (see `list`)")
    kwargs: Dict[str, Any] = {}
    if dense:
        kwargs = dict(class_token=False, num_classes=0, global_pool='avg')
    elif headless:
        kwargs = dict(num_classes=0)
    notes: List[str] = []
    multi_label = False
    if checkpoint is None:
        name, network = _load_published(model or DEFAULT_MODEL, kwargs)
    else:
        _check_source(checkpoint)
        with read_weights(checkpoint, model=variant, prefix=prefix, labels=labels, img_size=img_size) as weights:
            if not kwargs and weights.problem_type == 'regression':
                raise ValueError(f'Expected weights of a classifier, {Path(weights.source.name).name} predicts numbers')
            network = weights.create_model(**kwargs)
            name, notes = f'{weights.variant} with weights from {Path(weights.source.name).name}', weights.notes
            multi_label = weights.multi_label
    if not kwargs and not network.num_classes:
        raise ValueError(f'{name} {_NO_HEAD}')
    if not kwargs and network.global_pool == '':
        raise ValueError(f"Expected a model that gives one prediction for an image, {name} has global_pool=''")
    check_in_chans(network.in_chans, name)
    check_finite(network, name)

    data = resolve_model_data_config(network)
    data['input_size'] = (network.in_chans, *(img_size or data['input_size'][1:]))
    count = network.num_classes
    names = read_labels(labels, count) if labels else labels_in(network.pretrained_cfg)
    if names is None or len(names) != count:
        names = list(ImageNetInfo().label_descriptions()) if count == 1000 else [f'class {i}' for i in range(count)]
    for note in notes:
        _logger.warning(f'{name}: {note}')
    return Classifier(network.eval(), name, data, names, multi_label)


def check_in_chans(in_chans: int, name: str) -> None:
    """Refuse a model that no image file is for."""
    if in_chans not in (1, 3):
        raise ValueError(f'Expected a model for images with 1 or 3 channels, {name} takes {in_chans}')


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Refuse a model with NaN or infinity among its weights."""
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise ValueError(f'{name} has weights that are not finite, it is damaged')


@contextlib.contextmanager
def refusing_overflow(model: torch.nn.Module, name: str) -> Iterator[None]:
    """Inside of it the model raises ValueError where a layer after its PVT, whose NaN or infinity reach that layer,
    gives NaN or infinity. They would pass for a result: no objects, or the first class."""
    def check(layer: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        check_output(output, name)

    stages = [m for m in model.modules() if isinstance(m, PyramidVisionTransformerStage)]
    inside = {m for stage in stages for m in stage.modules()}
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) and m not in inside]
    handles = [layer.register_forward_hook(check) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_output(output: torch.Tensor, name: str) -> None:
    """Refuse NaN and infinity, in what a model gives before it is converted to another type.

    Raises:
        ValueError: There are some. The largest number of float16 is 65504, so there good weights may give them too.
    """
    if output.isfinite().all():
        return
    if output.dtype == torch.float16:
        raise ValueError(f'{name} computes numbers that are not finite in float16: try --dtype bfloat16 or float32')
    raise ValueError(f'{name} computes numbers that are not finite, its weights are too large or damaged')


def _check_source(checkpoint: Union[str, Path]) -> None:
    """Say at once that the hub of a checkpoint cannot be reached. A file or folder needs none."""
    match = re.fullmatch(r'hf-hub:([^@:]+)(?:@([^:]+))?', str(checkpoint))
    if match is None:
        return
    try:
        check_hub(match[1], match[2])
    except OSError as e:
        raise ValueError(
            f'Cannot load {checkpoint}: {one_line(e, 500)} (--checkpoint FILE takes a file of this machine)') from e


def _load_published(name: str, kwargs: Dict[str, Any]) -> Tuple[str, Any]:
    cfg: Any = get_pretrained_cfg(name)
    name = f'{split_model_name_tag(name)[0]}.{cfg.tag}'
    if not kwargs and cfg.num_classes == 0:  # before it is downloaded
        raise ValueError(f'{name} {_NO_HEAD}')
    if not cfg.has_weights:  # before a large model is built
        raise ValueError(f'{split_model_name_tag(name)[0]} has no published weights: give some with --checkpoint')
    check_pretrained(name)
    try:
        return name, timm.create_model(name, pretrained=True, **kwargs)
    except EXPECTED as e:
        raise cannot_load(name, e, cfg.url) from e


def open_image(path: Union[str, Path], channels: int = 3) -> Image.Image:
    """Open an image upright, as RGB or grey levels.

    Raises:
        ValueError: There is no such file, or it is not an image, or damaged, or too thin to be resized.
    """
    try:
        with Image.open(path) as image:
            if max(image.size) > 100 * min(image.size):  # with 224 pixels for the shorter one it would fill the memory
                raise ValueError(f'its sides, {image.width}x{image.height} pixels, differ by more than a factor of 100')
            image.load()
            return as_seen(image, channels)
    except Exception as e:  # the readers of damaged files raise all sorts
        raise ValueError(f'Cannot read the image {path}: {one_line(e)}') from e


@torch.inference_mode()
def predict(classifier: Classifier, image: Image.Image, topk: int = 5) -> List[Tuple[int, float]]:
    """Most likely classes of an image with their probabilities, which add up to 1 unless there are several labels."""
    transform = create_transform(**classifier.data, is_training=False)
    logits = classifier.model(transform(image)[None])[0]
    check_output(logits, classifier.name)
    logits = logits.float()
    values, indices = probabilities(classifier, logits).topk(min(topk, logits.numel()))
    return list(zip(indices.tolist(), values.tolist()))


def probabilities(classifier: Classifier, logits: torch.Tensor) -> torch.Tensor:
    """The probability of every class, of logits (..., classes)."""
    return logits.sigmoid() if classifier.multi_label else logits.softmax(-1)


@torch.inference_mode()
def extract(
        classifier: Classifier, image: Image.Image, img_size: Optional[Tuple[int, int]] = None,
) -> Tuple[List[torch.Tensor], Tuple[int, int]]:
    """Feature maps (C, H, W) of a whole image, from a dense model, and the height and width that it was resized to.

    That is `img_size`, or by default what `whole_size` says.
    """
    model = classifier.model
    if img_size is None:
        img_size = whole_size(image.size, min(classifier.data['input_size'][1:]), model.reductions[-1])
    x = create_transform(**whole_image(classifier.data, img_size), is_training=False)(image)
    features = [f[0].contiguous() for f in model.forward_intermediates(x[None], intermediates_only=True)]
    for feature in features:
        check_output(feature, classifier.name)
    return features, img_size


def whole_size(size: Tuple[int, int], shorter: int, stride: int) -> Tuple[int, int]:
    """Height and width for an image of `size` (width, height) whose shorter side becomes `shorter`.

    Both are multiples of `stride`. But for that the aspect stays.
    """
    width, height = size
    scale = shorter / min(size) / stride
    return max(1, round(height * scale)) * stride, max(1, round(width * scale)) * stride


def whole_image(data: Dict[str, Any], img_size: Tuple[int, int]) -> Dict[str, Any]:
    """timm's data config for all of an image, squashed to `img_size` (height, width), in place of its centre."""
    return dict(data, input_size=(data['input_size'][0], *img_size), crop_pct=1., crop_mode='squash')
