""" Load classifiers and backbones with their weights, labels and preprocessing, and open images, for the commands. """
import contextlib
import logging
import math
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
from .network import cannot_load, check_pretrained, check_source

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
    """A model with weights, its preprocessing and its labels."""
    model: PyramidVisionTransformer  # in evaluation mode
    name: str  # model and tag, or model and name of the file or folder
    data: Dict[str, Any]  # timm's data config (input_size, mean, std, interpolation, crop_pct...)
    labels: List[str]  # name of every class, empty for a backbone without a head
    multi_label: bool = False  # whether each class has an independent probability (sigmoid instead of softmax)


def load_model(
        model: Optional[str] = None, checkpoint: Optional[Union[str, Path]] = None, dense: bool = False,
        img_size: Optional[Tuple[int, int]] = None, labels: Optional[Union[str, Path]] = None,
        prefix: Optional[str] = None, headless: bool = False) -> Classifier:
    """Return a model with its weights. The weights are never random.

    The arguments that are not described here are the options of `pvt-timm predict`.

    Args:
        dense: For feature maps: the model has no class token, final norm and head.
        headless: For embeddings: the model has a class token but no head, and the weights need not have a head.

    Raises:
        ValueError: The model is unknown, or has no weights, or the weights do not fit, or `img_size` has more pixels
            than Pillow's limit for images. Errors of libraries that read the checkpoint are raised unchanged.
    """
    if img_size and math.prod(img_size) > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f'Expected a size of {Image.MAX_IMAGE_PIXELS} pixels at most, got {img_size}')
    if checkpoint is None and model is not None and model.startswith('hf-hub:'):
        model, checkpoint = None, model
    if prefix is not None and checkpoint is None:
        raise ValueError('Expected --checkpoint with --prefix: published weights hold only one model')
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
        check_source(checkpoint)
        with read_weights(checkpoint, model=variant, prefix=prefix, labels=labels, img_size=img_size) as weights:
            if not kwargs and weights.problem_type == 'regression':
                raise ValueError(
                    f'Expected weights of a classifier, {Path(weights.source.name).name} predicts numbers (regression)')
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
    """Refuse a model with a number of channels that image files do not have."""
    if in_chans not in (1, 3):
        raise ValueError(f'Expected a model for images with 1 or 3 channels, {name} takes {in_chans}')


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Refuse a model whose weights contain NaN or infinity."""
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise ValueError(f'{name} has weights that are not finite, it is damaged')


@contextlib.contextmanager
def refusing_overflow(model: torch.nn.Module, name: str) -> Iterator[None]:
    """Let the model raise ValueError, inside of this context, if it computes NaN or infinity.

    These would look like a result: no objects, or the first class. The outputs of the layers after the PVT are checked,
    as NaN and infinity of the PVT reach these layers.
    """
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
    """Refuse NaN and infinity in an output of a model. Call this before the output is converted to another type.

    Raises:
        ValueError: The output contains NaN or infinity. In float16 this can happen with good weights too, because its
            largest number is 65504.
    """
    if output.isfinite().all():
        return
    if output.dtype == torch.float16:
        raise ValueError(f'{name} computes numbers that are not finite in float16: try --dtype bfloat16 or float32')
    raise ValueError(f'{name} computes numbers that are not finite, its weights are too large or damaged')


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
    """Open an image as RGB or, with `channels` 1, as grey levels. It is turned upright if its EXIF data say so.

    Raises:
        ValueError: The file does not exist, or is not an image, or is damaged, or the image is too thin to be resized.
    """
    try:
        with Image.open(path) as image:
            if max(image.size) > 100 * min(image.size):  # with a shorter side of 224 pixels it would fill the memory
                raise ValueError(f'its sides, {image.width}x{image.height} pixels, differ by more than a factor of 100')
            image.load()
            return as_seen(image, channels)
    except Exception as e:  # for damaged files, Pillow raises errors of many types
        raise ValueError(f'Cannot read the image {path}: {one_line(e)}') from e


@torch.inference_mode()
def predict(classifier: Classifier, image: Image.Image, topk: int = 5) -> List[Tuple[int, float]]:
    """Return the `topk` most likely classes of an image, with their probabilities.

    The probabilities of all classes add up to 1, except for a multi-label classifier.
    """
    transform = create_transform(**classifier.data, is_training=False)
    logits = classifier.model(transform(image)[None])[0]
    check_output(logits, classifier.name)
    logits = logits.float()
    values, indices = probabilities(classifier, logits).topk(min(topk, logits.numel()))
    return list(zip(indices.tolist(), values.tolist()))


def probabilities(classifier: Classifier, logits: torch.Tensor) -> torch.Tensor:
    """Return the probability of every class from logits (..., classes)."""
    return logits.sigmoid() if classifier.multi_label else logits.softmax(-1)


@torch.inference_mode()
def extract(
        classifier: Classifier, image: Image.Image, img_size: Optional[Tuple[int, int]] = None,
) -> Tuple[List[torch.Tensor], Tuple[int, int]]:
    """Return the feature maps (C, H, W) of a whole image, and the height and width that the image was resized to.

    Args:
        classifier: Returned by `load_model` with `dense`.
        img_size: Height and width to resize the image to. By default `whole_size` chooses them.
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
    """Return height and width for an image of `size` (width, height), so that its shorter side becomes `shorter`.

    Both are rounded to multiples of `stride`. Apart from this rounding, the aspect ratio stays the same.
    """
    width, height = size
    scale = shorter / min(size) / stride
    return max(1, round(height * scale)) * stride, max(1, round(width * scale)) * stride


def whole_image(data: Dict[str, Any], img_size: Tuple[int, int]) -> Dict[str, Any]:
    """Return timm's data config changed to resize the whole image to `img_size` (height, width), without a crop."""
    return dict(data, input_size=(data['input_size'][0], *img_size), crop_pct=1., crop_mode='squash')
