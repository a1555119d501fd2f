""" Models with weights, labels and preprocessing, as the command line uses them. No random weights ever. """
import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import timm
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.models import get_pretrained_cfg, split_model_name_tag

from ..checkpoints import describe, map_to_timm
from ..files import find_checkpoint, read_checkpoint
from ..pvt import PyramidVisionTransformer, checkpoint_filter_fn, find_variant
from .zoo import MODELS, default_cfgs

__all__ = ['Classifier', 'UserError', 'extract', 'load_model', 'open_image', 'predict']


class UserError(Exception):
    """Something that the user can put right. The message is one line that says what and how."""


@contextlib.contextmanager
def user_errors(prefix: str = '', kinds=(ValueError, OSError, RuntimeError, MemoryError)) -> Iterator[None]:
    """Turn what the libraries raise into a `UserError` of one line."""
    try:
        yield
    except UserError:
        raise
    except kinds as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else ' '.join(str(e).split()) or type(e).__name__
        raise UserError(reason if reason.startswith('Cannot load') else f'{prefix}{reason}') from e


@dataclass
class Classifier:
    """A model with weights and what belongs to it.

    Attributes:
        model: In evaluation mode.
        name: Model and tag, or model and name of the file or folder.
        data: timm's data config (input_size, mean, std, interpolation, crop_pct...).
        labels: Name of every class, None for a backbone without a head.
    """
    model: PyramidVisionTransformer
    name: str
    data: Dict[str, Any]
    labels: Optional[List[str]]


def load_model(
        model: Optional[str] = None,
        checkpoint: Optional[Union[str, Path]] = None,
        dense: bool = False,
        img_size: Optional[Tuple[int, int]] = None,
) -> Classifier:
    """Create a model with its weights.

    Args:
        model: Name, with or without a tag, or 'hf-hub:owner/repo'. With a checkpoint it may be left out, as the
            checkpoint says what it is.
        checkpoint: File in any format that `checkpoints.py` knows, or folder with one (timm's or transformers').
        dense: For features: without class token, final norm and head.
        img_size: Height and width to prepare images for, by default those that the weights were trained with.

    Raises:
        UserError: The model is not known, or has no (fitting) weights, or they cannot be had.
    """
    kwargs = dict(class_token=False, num_classes=0, global_pool='avg') if dense else {}
    if checkpoint is None:
        loaded = _load_published(model, kwargs)
    else:
        if model is not None:
            _check_name(model)
        path = Path(checkpoint)
        if not path.exists():
            raise UserError(f'No such checkpoint: {path}')
        config = _read_config(path) if path.is_dir() else {}
        if 'architecture' in config:
            loaded = _load_folder(path, config, model, kwargs)
        else:
            loaded = _load_file(path, config, model, kwargs)
    if not dense and loaded.model.num_classes == 0:
        raise UserError(f'{loaded.name} is a backbone without a classifier: use `features`, or weights with a head')
    if img_size is not None:
        _check_size(img_size)
        smallest = loaded.model.min_input_size
        if min(img_size) < smallest:
            raise UserError(
                f'Expected an image size of at least {smallest}x{smallest}, got {img_size[0]}x{img_size[1]}')
        loaded.data['input_size'] = (loaded.data['input_size'][0], *img_size)
    loaded.model.eval()
    return loaded


def _check_size(img_size: Tuple[int, int], what: str = 'image size') -> None:
    """Refuse what would only end in a lack of memory, at Pillow's limit for images."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and img_size[0] * img_size[1] > limit:
        raise UserError(f'Expected an {what} of {limit} pixels at most, got {img_size[0]}x{img_size[1]}')


def _check_name(name: str) -> None:
    """Refuse what is not one of our models and tags."""
    model, tag = split_model_name_tag(name)
    if model not in MODELS:
        raise UserError(f"Unknown model '{name}', expected one of {', '.join(MODELS)} (see `list`)")
    tags = [t for t in default_cfgs[model].cfgs if default_cfgs[model].cfgs[t].has_weights]
    if tag and tag not in tags:
        known = ', '.join(f'{model}.{t}' for t in tags) or 'no pretrained weights at all'
        raise UserError(f"Unknown tag in '{name}', there is {known}")


def _load_published(name: str, kwargs: Dict[str, Any]) -> Classifier:
    hub = name.startswith(('hf-hub:', 'hf_hub:', 'local-dir:'))
    if not hub:
        _check_name(name)
        cfg = get_pretrained_cfg(name)
        if not cfg.has_weights:
            raise UserError(f'There are no published weights for {name}: give some with --checkpoint')
        if not kwargs and cfg.num_classes == 0:
            raise UserError(
                f'{name} is a backbone without a classifier: use `features`, or a model with a head (see `list`)')
        tag = split_model_name_tag(name)[1] or cfg.tag
        name = f'{split_model_name_tag(name)[0]}.{tag}'
    try:
        with user_errors(f'Cannot load {name}: '):
            model = timm.create_model(name, pretrained=True, **kwargs)
    except UserError as e:
        raise UserError(f'{e} (--checkpoint takes weights from a file, --model test_pvt needs no network)') from e
    return _with_data(model, name, model.pretrained_cfg)


def _read_config(folder: Path) -> Dict[str, Any]:
    file = folder / 'config.json'
    try:
        config = json.loads(file.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise UserError(f'Cannot read {file}: {e}') from e
    if not isinstance(config, dict):
        raise UserError(f'Expected a JSON object in {file}, got {type(config).__name__}')
    return config


def _load_folder(path: Path, config: Dict[str, Any], name: Optional[str], kwargs: Dict[str, Any]) -> Classifier:
    """A folder that timm's `save_for_hf` or `weights_conversion` wrote."""
    architecture = config['architecture']
    if architecture not in MODELS:
        raise UserError(f"Expected one of {', '.join(MODELS)} in {path / 'config.json'}, got '{architecture}'")
    if name is not None and split_model_name_tag(name)[0] != architecture:
        raise UserError(f'Expected a checkpoint of {name}, but {path} holds {architecture}')
    with user_errors(f'Cannot load {path}: ', Exception):  # timm reads its config.json without checks
        model = timm.create_model(f'local-dir:{path}', pretrained=True, **kwargs)
    return _with_data(model, f'{architecture} from {path.name}', model.pretrained_cfg)


def _load_file(path: Path, config: Dict[str, Any], name: Optional[str], kwargs: Dict[str, Any]) -> Classifier:
    """A checkpoint file, or a folder with one (and transformers' config.json)."""
    with user_errors():
        file = find_checkpoint(path)
        checkpoint = read_checkpoint(file)
    with user_errors(f'Cannot use {file}: '):
        info = describe(map_to_timm(checkpoint).state_dict)
        variant = find_variant(info.depths, info.embed_dims)
        if variant is None:
            raise ValueError(
                f'depths {info.depths} with channels {info.embed_dims} are those of none of {", ".join(MODELS)}')
        if name is not None and split_model_name_tag(name)[0] != variant:
            raise UserError(f'Expected a checkpoint of {name}, but {file} holds {variant}')
        if not kwargs and not info.class_token:
            raise UserError(
                f'{file} holds a backbone without a classifier: use `features`, or weights with a head')
        model = timm.create_model(
            variant, **{'num_classes': info.num_classes, **kwargs}, in_chans=info.in_chans, img_size=info.img_size)
        model.load_state_dict(checkpoint_filter_fn(checkpoint, model), strict=True)
    cfg = dict(model.pretrained_cfg)
    cfg['input_size'] = (info.in_chans, *info.img_size)
    labels = config.get('id2label')
    if isinstance(labels, dict) and len(labels) == model.num_classes:
        cfg['label_names'] = [str(labels[k]) for k in sorted(labels, key=int)]
    return _with_data(model, f'{variant} from {path.name}', cfg)


def _with_data(model: torch.nn.Module, name: str, cfg: Dict[str, Any]) -> Classifier:
    if not isinstance(model, PyramidVisionTransformer):
        raise UserError(f'Expected a PVT v1 model, got {type(model).__name__} from {name}')
    data = resolve_model_data_config(model, pretrained_cfg=cfg)
    channels = model.in_chans
    if channels not in (1, 3):
        raise UserError(f'Expected a model for images with 1 or 3 channels, {name} takes {channels}')
    for key in ('mean', 'std'):
        if len(data[key]) != channels:
            data[key] = (sum(data[key]) / len(data[key]),) * channels
    data['input_size'] = (channels, *data['input_size'][1:])
    return Classifier(model, name, data, _labels(model.num_classes, cfg))


def _labels(num_classes: int, cfg: Dict[str, Any]) -> Optional[List[str]]:
    """Names of the classes: the weights' own, for 1000 classes those of ImageNet-1K, otherwise numbers."""
    if not num_classes:
        return None
    names = cfg.get('label_names')
    descriptions = cfg.get('label_descriptions') or {}
    if isinstance(names, dict):
        names = [names.get(i, names.get(str(i), f'class {i}')) for i in range(num_classes)]
    if names and len(names) == num_classes:
        if isinstance(descriptions, (list, tuple)):
            return [str(d) for d in descriptions] if len(descriptions) == num_classes else [str(n) for n in names]
        return [str(descriptions.get(n, n)) for n in names]
    if num_classes == 1000:
        return ImageNetInfo('imagenet-1k').label_descriptions()
    return [f'class {i}' for i in range(num_classes)]


def open_image(path: Union[str, Path], channels: int = 3) -> Image.Image:
    """Open an image upright, as RGB or grey levels.

    Raises:
        UserError: There is no such file, or it is not an image, or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f'No such file: {path}')
    if path.is_dir():
        raise UserError(f'Expected an image file, {path} is a folder')
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith('I;16'):  # Pillow would clip at 255
                image = image.point(lambda v: v / 257).convert('L')
            elif image.mode in ('P', 'PA', 'LA'):
                image = image.convert('RGBA')
            return image.convert('RGB' if channels == 3 else 'L')
    except UnidentifiedImageError as e:
        raise UserError(f'Not an image that Pillow can read: {path}') from e
    except MemoryError as e:
        raise UserError(f'Not enough memory to open {path}') from e
    except Image.DecompressionBombError as e:
        raise UserError(f'Refused as too large: {path}: {e}') from e
    except Exception as e:  # the readers of damaged files raise all sorts
        raise UserError(f'Cannot read the image {path}, it may be damaged: {" ".join(str(e).split())}') from e


@torch.inference_mode()
def predict(classifier: Classifier, image: Image.Image, topk: int = 5) -> List[Tuple[int, float]]:
    """Most likely classes of an image with their probabilities.

    Raises:
        UserError: Not enough memory, or the weights give no numbers.
    """
    resized = fit_size(*image.size, short=max(classifier.data['input_size'][1:]), multiple=1)
    _check_size(resized, 'image that resizes to an area')
    transform = create_transform(**classifier.data, is_training=False)
    with user_errors('Cannot run the model: '):
        logits = classifier.model(transform(image)[None])[0].float()
    if not logits.isfinite().all():
        raise UserError(f'{classifier.name} gives values that are not finite, the weights are damaged')
    values, indices = logits.softmax(-1).topk(min(topk, logits.numel()))
    return list(zip(indices.tolist(), values.tolist()))


def fit_size(width: int, height: int, short: int, multiple: int) -> Tuple[int, int]:
    """Height and width with `short` as the shorter side and about the same aspect, in whole multiples."""
    scale = short / min(width, height)
    return tuple(max(multiple, int(math.floor(n * scale / multiple + 0.5)) * multiple) for n in (height, width))


@torch.inference_mode()
def extract(
        classifier: Classifier,
        image: Image.Image,
        img_size: Optional[Tuple[int, int]] = None,
) -> Tuple[List[torch.Tensor], Tuple[int, int]]:
    """Dense features of a whole image.

    Args:
        classifier: From `load_model(..., dense=True)`.
        image: The image, it is not cropped.
        img_size: Height and width to resize it to. By default its shorter side gets the training size and the
            longer one keeps the aspect to within 32 pixels.

    Returns:
        The feature map (C, H, W) of every stage, and the height and width that the image was resized to.

    Raises:
        UserError: Not enough memory, or the weights give no numbers.
    """
    model, data = classifier.model, classifier.data
    if img_size is None:
        img_size = fit_size(*image.size, short=min(data['input_size'][1:]), multiple=model.reductions[-1])
    _check_size(img_size)
    squash = dict(data, input_size=(data['input_size'][0], *img_size), crop_pct=1., crop_mode='squash')
    with user_errors('Cannot run the model: '):
        x = create_transform(**squash, is_training=False)(image)
        features = model.forward_intermediates(x[None], intermediates_only=True)
    if not all(f.isfinite().all() for f in features):
        raise UserError(f'{classifier.name} gives values that are not finite, the weights are damaged')
    return [f[0].contiguous() for f in features], tuple(img_size)
