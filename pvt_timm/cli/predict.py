""" The commands `predict`, `features`, `demo` and `list`, and their models: with weights, labels and preprocessing. """
import argparse
import contextlib
import importlib.util
import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch.utils.flop_counter import FlopCounterMode

from ..files import refuse_same_file, save_atomically
from ..images import as_seen
from ..labels import labels_in, read_labels
from ..pvt import TOP1, VARIANTS, PyramidVisionTransformer, PyramidVisionTransformerStage
from ..weights import read_weights
from .errors import EXPECTED, clean, one_line
from .pictures import draw_pyramid

__all__ = ['extract', 'load_model', 'open_image', 'predict', 'run_demo', 'run_features', 'run_list', 'run_predict']

_logger = logging.getLogger(__name__)

DEFAULT_MODEL = 'pvt_small'
_NO_HEAD = 'is a backbone without a classifier: use `features`, or weights with a head'
DIGITS = Path(__file__).resolve().parents[1] / 'data' / 'digits'


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
        prefix: Optional[str] = None) -> Classifier:
    """A model with its weights, never with random ones. Arguments are the options of `pvt-timm predict`.

    Args:
        dense: For features: without class token, final norm and head.

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
    kwargs: Dict[str, Any] = dict(class_token=False, num_classes=0, global_pool='avg') if dense else {}
    notes: List[str] = []
    multi_label = False
    if checkpoint is None:
        name, network = _load_published(model or DEFAULT_MODEL, kwargs)
    else:
        with read_weights(checkpoint, model=variant, prefix=prefix, labels=labels, img_size=img_size) as weights:
            if not dense and weights.problem_type == 'regression':
                raise ValueError(f'Expected weights of a classifier, {Path(weights.source.name).name} predicts numbers')
            network = weights.create_model(**kwargs)
            name, notes = f'{weights.variant} from {Path(weights.source.name).name}', weights.notes
            multi_label = weights.multi_label
    if not dense and not network.num_classes:
        raise ValueError(f'{name} {_NO_HEAD}')
    if not dense and network.global_pool == '':
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
        _check_output(output, name)

    stages = [m for m in model.modules() if isinstance(m, PyramidVisionTransformerStage)]
    inside = {m for stage in stages for m in stage.modules()}
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) and m not in inside]
    handles = [layer.register_forward_hook(check) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_output(output: torch.Tensor, name: str) -> None:
    if not output.isfinite().all():
        raise ValueError(f'{name} computes numbers that are not finite, its weights are too large or damaged')


def _load_published(name: str, kwargs: Dict[str, Any]) -> Tuple[str, Any]:
    cfg: Any = get_pretrained_cfg(name)
    name = f'{split_model_name_tag(name)[0]}.{cfg.tag}'
    if not kwargs and cfg.num_classes == 0:  # before it is downloaded
        raise ValueError(f'{name} {_NO_HEAD}')
    if not cfg.has_weights:  # before a large model is built
        raise ValueError(f'{split_model_name_tag(name)[0]} has no published weights: give some with --checkpoint')
    try:
        return name, timm.create_model(name, pretrained=True, **kwargs)
    except EXPECTED as e:
        cure = f' (--checkpoint FILE takes a download of {cfg.url}, `pvt-timm demo` and --model test_pvt need none)'
        raise ValueError(f'Cannot load {name}: {one_line(e, 500)}{cure if cfg.url else ""}') from e


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
    logits = classifier.model(transform(image)[None])[0].float()
    _check_output(logits, classifier.name)
    probabilities = logits.sigmoid() if classifier.multi_label else logits.softmax(-1)
    values, indices = probabilities.topk(min(topk, logits.numel()))
    return list(zip(indices.tolist(), values.tolist()))


@torch.inference_mode()
def extract(
        classifier: Classifier, image: Image.Image, img_size: Optional[Tuple[int, int]] = None,
) -> Tuple[List[torch.Tensor], Tuple[int, int]]:
    """Feature maps (C, H, W) of a whole image, from a dense model, and the height and width that it was resized to.

    That is `img_size`. By default the shorter side gets the training size, and the aspect stays to within 32 pixels.
    """
    model, data = classifier.model, classifier.data
    if img_size is None:
        stride, scale = model.reductions[-1], min(data['input_size'][1:]) / min(image.size)
        h, w = (max(1, round(n * scale / stride)) * stride for n in (image.height, image.width))
        img_size = h, w
    squash = dict(data, input_size=(data['input_size'][0], *img_size), crop_pct=1., crop_mode='squash')
    x = create_transform(**squash, is_training=False)(image)
    features = [f[0].contiguous() for f in model.forward_intermediates(x[None], intermediates_only=True)]
    for feature in features:
        _check_output(feature, classifier.name)
    return features, img_size


# the commands ---------------------------------------------------------------------------------------------------------

def run_predict(args: argparse.Namespace) -> None:
    for path in args.images:  # before weights are downloaded
        os.stat(path)
    classifier = load_model(args.model, args.checkpoint, img_size=args.img_size, labels=args.labels, prefix=args.prefix)
    results = []
    for path in args.images:
        image = open_image(path, classifier.data['input_size'][0])
        top = [
            dict(index=index, label=classifier.labels[index], probability=round(probability, 6))
            for index, probability in predict(classifier, image, args.topk)]
        results.append(dict(image=str(path), predictions=top))
        if not args.json:
            print(clean(path, 4096))
            for item in top:
                print(f'  {item["probability"]:7.2%}  {clean(item["label"])}', flush=True)
    if args.json:
        print(json.dumps(dict(
            model=classifier.name, img_size=classifier.data['input_size'][1:], images=results),
            indent=2, allow_nan=False))


def run_features(args: argparse.Namespace) -> None:
    for path in (args.image, *(Path(p).absolute().parent for p in (args.output, args.save) if p)):
        os.stat(path)  # before weights are downloaded
    for path in filter(None, (args.output, args.save)):
        refuse_same_file(path, args.image, args.checkpoint)
    classifier = load_model(args.model, args.checkpoint, dense=True, img_size=args.img_size, prefix=args.prefix)
    image = open_image(args.image, classifier.data['input_size'][0])
    features, size = extract(classifier, image, args.img_size)
    draw_pyramid(image, features, size, args.output, classifier.name)
    print(f'{clean(args.output, 4096)}: {", ".join("x".join(map(str, f.shape)) for f in features)}')
    if args.save:
        content = save({f'stage{i}': f for i, f in enumerate(features)}, metadata={'model': classifier.name})
        save_atomically(args.save, lambda f: f.write(content))
        print(f'{clean(args.save, 4096)}: {", ".join(f"stage{i}" for i in range(len(features)))}')


def run_demo(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    picture = args.output / 'pyramid.png'
    classifier = load_model('test_pvt')
    by_digit = {str(i): [open_image(file) for file in sorted(DIGITS.glob(f'{i}_*.png'))] for i in range(10)}
    count = sum(map(len, by_digit.values()))
    print(f'{classifier.name}: {count} handwritten digits that were held out of its training\n')
    print('digit  predicted  probability of each')
    right = 0
    for digit, images in by_digit.items():
        top = [predict(classifier, image, 1)[0] for image in images]
        names = [classifier.labels[index] for index, _ in top]
        right += names.count(digit)
        print(f'{digit:<5}  {" ".join(names):<9}  {" ".join(f"{probability:4.0%}" for _, probability in top)}')
    print(f'\n{right} of {count} right')
    if importlib.util.find_spec('matplotlib') is None:
        print("Their features are drawn with the `draw` extra: pip install 'pvt-timm[draw]'")
        return

    # One sheet, a column per digit: an image of another size and shape than the model was trained on.
    sheet = Image.fromarray(np.hstack([np.vstack([*map(np.asarray, images)]) for images in by_digit.values()]))
    backbone = load_model('test_pvt', dense=True)
    draw_pyramid(
        sheet, *extract(backbone, sheet, (sheet.height, sheet.width)), picture, backbone.name,
        cells=(len(by_digit['0']), len(by_digit)),
        note=f'{count} handwritten digits, a column each for 0 to 9. At stride 32 a digit is one position.')
    print(f'Features of all of them as one image of {sheet.height}x{sheet.width} (height x width): '
          f'{clean(picture, 4096)}')
    print(f'\nNext, with your own image (weights come from the Hugging Face Hub):\n'
          f'  python -m pvt_timm predict photo.jpg --model {DEFAULT_MODEL}')


def run_list(args: argparse.Namespace) -> None:
    print(f'{"model":<26} {"params":>8} {"GMACs":>7}  {"at":<7} {"top-1":>6}  weights')
    for name in (name for variant in VARIANTS for name in timm.list_models(variant, include_tags=True)):
        cfg: Any = get_pretrained_cfg(name)
        model = timm.create_model(name, num_classes=cfg.num_classes, device='meta', weight_init='skip')
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model.eval()(torch.empty(1, *cfg.input_size, device='meta'))
        params, gmacs = sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9
        weights = cfg.hf_hub_id and f'hf-hub:{cfg.hf_hub_id}', cfg.url, cfg.file and 'in the package'
        decimals = 2 if gmacs > 0.01 else 4
        size = 'x'.join(map(str, cfg.input_size[1:]))
        print(f'{name.removesuffix(".untrained"):<26} {params:6.2f} M {gmacs:7.{decimals}f}  {size:<7} '
              f'{TOP1.get(name, "-"):>6}  {" or ".join(filter(None, weights)) or "none"}')
    print('\ntop-1: ImageNet-1K as published (test_pvt: held-out digits). retinanet_coco: backbones, no classifier.')
