""" The commands `predict`, `features`, `demo` and `list`, and their models: with weights, labels and preprocessing. """
import argparse
import importlib.util
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union
from urllib.parse import urlsplit

import timm
import torch
from PIL import Image, ImageOps
from safetensors.torch import save
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch.utils.flop_counter import FlopCounterMode

from .. import digits, pvt
from ..checkpoints import describe, map_to_timm, training_config
from ..files import find_checkpoint, read_checkpoint, save_atomically
from ..labels import labels_beside, labels_in, read_labels
from ..pvt import TOP1, VARIANTS, PyramidVisionTransformer, checkpoint_filter_fn, find_variant
from .errors import EXPECTED, UserError, one_line
from .pictures import draw_pyramid

__all__ = ['Classifier', 'add_demo', 'add_features', 'add_list', 'add_predict', 'extract', 'load_model', 'open_image',
           'predict', 'zoo']

DEFAULT_MODEL = 'pvt_small'
_NO_HEAD = 'is a backbone without a classifier: use `features`, or weights with a head'
DIGITS = Path(__file__).resolve().parents[1] / 'data' / 'digits'


@dataclass
class Classifier:
    """A model with weights and what belongs to it.

    Attributes:
        model: In evaluation mode.
        name: Model and tag, or model and name of the file or folder.
        data: timm's data config (input_size, mean, std, interpolation, crop_pct...).
        labels: Name of every class, none for a backbone without a head.
    """
    model: PyramidVisionTransformer
    name: str
    data: Dict[str, Any]
    labels: List[str]


def load_model(
        model: Optional[str] = None,
        checkpoint: Optional[Union[str, Path]] = None,
        dense: bool = False,
        img_size: Optional[Tuple[int, int]] = None,
        labels: Optional[Union[str, Path]] = None,
        prefix: Optional[str] = None,
) -> Classifier:
    """Create a model with its weights, never with random ones.

    Args:
        model: Name, with or without a tag, or 'hf-hub:owner/repo'. With a checkpoint it may be left out, as the
            checkpoint says what it is.
        checkpoint: File in any format that `checkpoints.py` knows, or folder with one (timm's or transformers').
        dense: For features: without class token, final norm and head.
        img_size: Height and width to prepare images for, by default those that the weights were trained with.
        labels: File with the names of the classes, instead of those that the weights come with.
        prefix: What stands before the names of the weights, needed where the checkpoint holds several PVTs.

    Raises:
        UserError: The model is not known, or has no (fitting) weights. What the libraries raise where weights cannot
            be had or read is left alone.
    """
    kwargs: Dict[str, Any] = dict(class_token=False, num_classes=0, global_pool='avg') if dense else {}
    if model is not None and ':' not in model and split_model_name_tag(model)[0] not in VARIANTS:
        raise UserError(f"Unknown model '{model}', expected one of {', '.join(VARIANTS)} (see `list`)")
    if checkpoint is not None:
        name, network, cfg, names = _load_checkpoint(Path(checkpoint), model, kwargs, img_size, prefix)
    else:
        name, network, cfg = _load_published(model or DEFAULT_MODEL, kwargs)
        names = None
    if not dense and not network.num_classes:
        raise UserError(f'{name} {_NO_HEAD}')
    if not isinstance(network, PyramidVisionTransformer):
        raise UserError(f'Expected a PVT v1 model, got {type(network).__name__} from {name}')

    data = resolve_model_data_config(network, pretrained_cfg=cfg)
    channels = network.in_chans
    if channels not in (1, 3):
        raise UserError(f'Expected a model for images with 1 or 3 channels, {name} takes {channels}')
    for key in ('mean', 'std'):
        values = tuple(data[key])
        data[key] = values if len(values) == channels else (sum(values) / len(values),) * channels
    data['input_size'] = (channels, *(img_size or data['input_size'][1:]))
    count = network.num_classes
    if labels is not None:
        names = read_labels(labels)
        if count and len(names) != count:
            raise UserError(f'Expected the names of {count} classes in {labels}, got {len(names)}')
    if names is None or len(names) != count:
        names = labels_in(network.pretrained_cfg)
    if count and (names is None or len(names) != count):
        names = list(ImageNetInfo().label_descriptions()) if count == 1000 else [f'class {i}' for i in range(count)]
    return Classifier(network.eval(), name, data, names if count and names else [])


def _load_published(name: str, kwargs: Dict[str, Any]) -> Tuple[str, torch.nn.Module, Dict[str, Any]]:
    if ':' not in name:
        cfg = get_pretrained_cfg(name)
        assert cfg is not None, 'a name that is registered has one'
        if not kwargs and cfg.num_classes == 0:  # before it is downloaded
            raise UserError(f'{name} {_NO_HEAD}')
        name = f'{split_model_name_tag(name)[0]}.{cfg.tag}'
    try:
        network: Any = timm.create_model(name, pretrained=True, **kwargs)
    except KeyError as e:
        raise UserError(f'{name} is no repository of timm: its config.json has no {e}') from e
    except EXPECTED as e:
        raise UserError(f'Cannot load {name}: {one_line(e)} (--checkpoint FILE takes weights from elsewhere)') from e
    return name, network, network.pretrained_cfg


def _read_json(file: Path) -> Dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as e:
        raise UserError(f'Cannot read {file}: {e}') from e
    if not isinstance(content, dict):
        raise UserError(f'Expected a JSON object in {file}, got {type(content).__name__}')
    return content


def _load_checkpoint(
        path: Path,
        model: Optional[str],
        kwargs: Dict[str, Any],
        img_size: Optional[Tuple[int, int]],
        prefix: Optional[str],
) -> Tuple[str, torch.nn.Module, Dict[str, Any], Optional[List[str]]]:
    """A checkpoint file, or a folder with one: name, model, its pretrained config, and the names of its classes."""
    file = find_checkpoint(path)
    checkpoint = read_checkpoint(file)
    config = _read_json(file.parent / 'config.json')
    preprocessor = _read_json(file.parent / 'preprocessor_config.json')
    inner = config.get('pretrained_cfg', {})
    if not isinstance(inner, dict):
        raise UserError(f"Expected a JSON object as 'pretrained_cfg' in {file.parent / 'config.json'}, got {inner}")

    # what is said of the weights: by their training, else by the config beside them
    said = training_config(checkpoint)
    cfg = {**inner, **{ours: preprocessor[theirs] for ours, theirs in (('mean', 'image_mean'), ('std', 'image_std'))
                       if theirs in preprocessor}, **said}
    size = cfg.pop('img_size', None)
    if size is None and 'input_size' in cfg:
        size = cfg['input_size'][1:]
    info = describe(map_to_timm(checkpoint, prefix=prefix).state_dict, to_2tuple(size) if size else img_size)
    variant = find_variant(info.depths, info.embed_dims)
    if variant is None:
        raise UserError(f'{file} holds none of {", ".join(VARIANTS)}: depths {info.depths}, channels {info.embed_dims}')
    wanted = split_model_name_tag(model)[0] if model else config.get('architecture', variant)
    if wanted != variant:
        raise UserError(f'Expected a checkpoint of {wanted}, but {file} holds {variant}')
    pool = config.get('global_pool') or cfg.pop('global_pool', None) or ('token' if info.class_token else 'avg')
    model_args = dict(
        num_classes=info.num_classes, class_token=info.class_token, in_chans=info.in_chans, img_size=info.img_size,
        global_pool=pool)
    network: Any = timm.create_model(variant, **{**model_args, **kwargs})
    network.load_state_dict(checkpoint_filter_fn(checkpoint, network, prefix), strict=True)

    names = labels_in(said.get('label_names')) or labels_beside(file) or labels_in(config)
    cfg = {**network.pretrained_cfg, **cfg, 'input_size': (info.in_chans, *to_2tuple(size or info.img_size))}
    return f'{variant} from {path.name}', network, cfg, names


def open_image(path: Union[str, Path], channels: int = 3) -> Image.Image:
    """Open an image upright, as RGB or grey levels.

    Raises:
        UserError: There is no such file, or it is not an image, or damaged.
    """
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith('I;16'):  # Pillow would clip at 255
                image = image.point(lambda v: v / 257).convert('L')
            elif image.mode in ('P', 'PA', 'LA'):
                image = image.convert('RGBA')
            return image.convert('RGB' if channels == 3 else 'L')
    except Exception as e:  # the readers of damaged files raise all sorts
        raise UserError(f'Cannot read the image {path}: {one_line(e)}') from e


def _check_pixels(height: int, width: int) -> None:
    """Refuse what would only end in a lack of memory, at Pillow's limit for images."""
    if height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise UserError(f'Expected an image of {Image.MAX_IMAGE_PIXELS} pixels at most, got {height}x{width}')


def _check_finite(classifier: Classifier, *outputs: torch.Tensor) -> None:
    if not all(x.isfinite().all() for x in outputs):
        raise UserError(f'{classifier.name} gives values that are not finite, the weights are damaged')


@torch.inference_mode()
def predict(classifier: Classifier, image: Image.Image, topk: int = 5) -> List[Tuple[int, float]]:
    """Most likely classes of an image with their probabilities."""
    _check_pixels(*fit_size(*image.size, short=max(classifier.data['input_size'][1:]), multiple=1))
    transform = create_transform(**classifier.data, is_training=False)
    logits = classifier.model(transform(image)[None])[0].float()
    _check_finite(classifier, logits)
    values, indices = logits.softmax(-1).topk(min(topk, logits.numel()))
    return list(zip(indices.tolist(), values.tolist()))


def fit_size(width: int, height: int, short: int, multiple: int) -> Tuple[int, int]:
    """Height and width with `short` as the shorter side and about the same aspect, in whole multiples."""
    scale = short / min(width, height)
    h, w = (max(multiple, int(math.floor(n * scale / multiple + 0.5)) * multiple) for n in (height, width))
    return h, w


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
    """
    model, data = classifier.model, classifier.data
    if img_size is None:
        img_size = fit_size(*image.size, short=min(data['input_size'][1:]), multiple=model.reductions[-1])
    _check_pixels(*img_size)
    squash = dict(data, input_size=(data['input_size'][0], *img_size), crop_pct=1., crop_mode='squash')
    x = create_transform(**squash, is_training=False)(image)
    features = model.forward_intermediates(x[None], intermediates_only=True)
    _check_finite(classifier, *features)
    return [f[0].contiguous() for f in features], img_size


# the commands ---------------------------------------------------------------------------------------------------------

def image_size(text: str) -> Tuple[int, int]:
    """'N' or 'HxW' to height and width."""
    height, _, width = text.partition('x')
    if not height.isdecimal() or not (width or height).isdecimal():
        raise argparse.ArgumentTypeError(f"expected N or H W in pixels, got '{text}'")
    return int(height), int(width or height)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 up, got '{text}'")
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--model', help='name with or without tag, see `list`, or hf-hub:OWNER/REPO '
        f'(default {DEFAULT_MODEL}, or what the checkpoint is)')
    parser.add_argument(
        '--checkpoint', metavar='FILE_OR_DIR', help='weights: a file of any known format, or a folder of timm or '
        'transformers (default the published ones)')
    parser.add_argument('--prefix', help='what stands before the names of the weights, if the checkpoint has several')
    parser.add_argument(
        '--img-size', type=image_size, metavar='N | H W',
        help='size that the model sees (default that of its training)')


def _load(args: argparse.Namespace, dense: bool = False) -> Classifier:
    model = args.model or (None if args.checkpoint else DEFAULT_MODEL)
    return load_model(model, args.checkpoint, dense, args.img_size, getattr(args, 'labels', None), args.prefix)


def _table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Columns of text, each aligned as its letter in `align` says (< or >)."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(f'{cell:{a}{w}}' for cell, a, w in zip(row, align, widths)).rstrip() for row in rows)


def add_predict(subparsers: Any) -> None:
    parser = subparsers.add_parser('predict', help='classify images')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image files')
    add_model_arguments(parser)
    parser.add_argument(
        '--labels', metavar='FILE', help='names of the classes: one a line, or JSON (default those that the weights '
        'come with)')
    parser.add_argument('--topk', type=positive, default=5, metavar='K', help='classes to show (default 5)')
    parser.add_argument('--json', action='store_true', help='for machines')
    parser.set_defaults(func=run_predict)


def run_predict(args: argparse.Namespace) -> None:
    for path in args.images:  # before weights are downloaded
        os.stat(path)
    classifier = _load(args)
    results = []
    for path in args.images:
        image = open_image(path, classifier.data['input_size'][0])
        top = [
            dict(index=index, label=classifier.labels[index], probability=round(probability, 6))
            for index, probability in predict(classifier, image, args.topk)]
        results.append(dict(image=str(path), predictions=top))
        if not args.json:
            print(path)
            for item in top:
                print(f'  {item["probability"]:7.2%}  {item["label"]}', flush=True)
    if args.json:
        print(json.dumps(dict(
            model=classifier.name, img_size=classifier.data['input_size'][1:], images=results), indent=2))


def add_features(subparsers: Any) -> None:
    parser = subparsers.add_parser('features', help='draw the feature pyramid of an image')
    parser.add_argument('image', metavar='IMAGE', help='image file')
    add_model_arguments(parser)
    parser.add_argument('--output', required=True, metavar='FILE', help='picture to write (.png, .pdf, .svg ...)')
    parser.add_argument('--save', metavar='FILE', help='also write the features (.safetensors)')
    parser.set_defaults(func=run_features)


def run_features(args: argparse.Namespace) -> None:
    for path in (args.image, *(Path(p).absolute().parent for p in (args.output, args.save) if p)):
        os.stat(path)  # before weights are downloaded
    classifier = _load(args, dense=True)
    image = open_image(args.image, classifier.data['input_size'][0])
    features, size = extract(classifier, image, args.img_size)
    draw_pyramid(image, features, args.output, title=classifier.name, img_size=size)
    print(f'{args.output}: {", ".join("x".join(map(str, f.shape)) for f in features)}')
    if args.save:
        content = save({f'stage{i}': f for i, f in enumerate(features)}, metadata={'model': classifier.name})
        save_atomically(args.save, lambda f: f.write(content))
        print(f'{args.save}: {", ".join(f"stage{i}" for i in range(len(features)))}')


def add_demo(subparsers: Any) -> None:
    parser = subparsers.add_parser('demo', help='classify handwritten digits and draw their features, without network')
    parser.add_argument('--output', default='pvt_demo', metavar='DIR', help='folder to write to (default pvt_demo)')
    parser.set_defaults(func=run_demo)


def run_demo(args: argparse.Namespace) -> None:
    picture = Path(args.output) / 'pyramid.png'
    picture.parent.mkdir(parents=True, exist_ok=True)
    classifier = load_model('test_pvt')
    by_digit: Dict[str, List[Image.Image]] = {}
    for file in sorted(DIGITS.glob('*.png')):  # named <label>_<index in scikit-learn's digits>.png
        by_digit.setdefault(file.name.partition('_')[0], []).append(open_image(file))
    count = sum(map(len, by_digit.values()))
    print(f'{classifier.name}: {count} handwritten digits that were held out of its training\n')
    rows, right = [('digit', 'predicted', 'probability of each')], 0
    for digit, images in by_digit.items():
        top = [predict(classifier, image, 1)[0] for image in images]
        names = [classifier.labels[index] for index, _ in top]
        right += names.count(digit)
        rows.append((digit, ' '.join(names), ' '.join(f'{probability:4.0%}' for _, probability in top)))
    print(_table(rows, '<<<'))
    print(f'\n{right} of {count} right')
    if importlib.util.find_spec('matplotlib') is None:
        print("Their features are drawn with the `draw` extra: pip install 'pvt-timm[draw]'")
        return

    # One sheet, a column per digit: an image of another size and shape than the model was trained on.
    side, deep = by_digit['0'][0].width, len(by_digit['0'])
    sheet = Image.new('RGB', (side * len(by_digit), side * deep))
    for x, images in enumerate(by_digit.values()):
        for y, image in enumerate(images):
            sheet.paste(image, (x * side, y * side))
    backbone = load_model('test_pvt', dense=True)
    draw_pyramid(
        sheet, extract(backbone, sheet, (sheet.height, sheet.width))[0], picture, title=backbone.name,
        cells=(deep, len(by_digit)),
        note=f'{count} handwritten digits, a column each for 0 to 9. At stride 32 a digit is one position.')
    print(f'Features of all of them as one image of {sheet.height}x{sheet.width} (height x width): {picture}')
    print(f'''
Next, with your own image (weights come from the Hugging Face Hub):
  python -m pvt_timm predict photo.jpg --model {DEFAULT_MODEL}
  python -m pvt_timm features photo.jpg --model {DEFAULT_MODEL} --output pyramid.png
or in Python:
  import timm, pvt_timm
  model = timm.create_model('{DEFAULT_MODEL}', pretrained=True, features_only=True)''')


def zoo() -> List[Dict[str, Any]]:
    """One row per model and tag.

    Returns:
        Dicts with model, tag (None without weights), params (as the tag's mode has them), macs at img_size, top1 (None
        if not known), classes (0 for a backbone without head), and hf_hub_id, url or file of the weights.
    """
    rows = []
    for name, default in {**pvt.default_cfgs, **digits.default_cfgs}.items():
        for tag, cfg in default.cfgs.items():
            model = timm.create_model(f'{name}.{tag}', num_classes=cfg.num_classes, device='meta', weight_init='skip')
            with FlopCounterMode(display=False) as counter, torch.inference_mode():
                model.eval()(torch.empty(1, *cfg.input_size, device='meta'))
            rows.append(dict(
                model=name,
                tag=tag if cfg.has_weights else None,
                params=sum(p.numel() for p in model.parameters()),
                macs=counter.get_total_flops() // 2,
                img_size=cfg.input_size[1:],
                top1=TOP1.get(f'{name}.{tag}'),
                classes=cfg.num_classes,
                hf_hub_id=cfg.hf_hub_id or None,
                url=str(cfg.url) if cfg.url else None,
                file=str(cfg.file) if cfg.file else None,
            ))
    return rows


def add_list(subparsers: Any) -> None:
    parser = subparsers.add_parser('list', help='models, their cost, accuracy and where the weights come from')
    parser.add_argument('--json', action='store_true', help='for machines')
    parser.set_defaults(func=run_list)


def run_list(args: argparse.Namespace) -> None:
    rows = zoo()
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    table = [('model', 'params', 'GMACs', 'at', 'top-1', 'weights')]
    for row in rows:
        hosts = [f'hf-hub:{row["hf_hub_id"].partition("@")[0]}'] if row['hf_hub_id'] else []
        hosts += [urlsplit(row['url']).netloc] if row['url'] else []
        table.append((
            f'{row["model"]}.{row["tag"]}' if row['tag'] else row['model'],
            f'{row["params"] / 1e6:.2f} M',
            f'{row["macs"] / 1e9:.2f}' if row['macs'] >= 1e7 else f'{row["macs"] / 1e9:.4f}',
            '{}x{}'.format(*row['img_size']),
            f'{row["top1"]:.1f}' if row['top1'] else '-',
            'in the package' if row['file'] else ' or '.join(hosts) or 'none',
        ))
    print(_table(table, '<>><><'))
    print('\ntop-1: ImageNet-1K as published (test_pvt: held-out digits). retinanet_coco: backbones, no classifier.')
