""" The commands `predict`, `demo` and `list`. """
import argparse
import importlib.util
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple
from urllib.parse import urlsplit

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import get_pretrained_cfg
from torch.utils.flop_counter import FlopCounterMode

from ..files import check_folder
from ..variants import TOP1, VARIANTS
from .classifiers import (
    DEFAULT_MODEL, Classifier, check_output, extract, load_model, open_image, predict, probabilities)
from .errors import clean
from .many import Loaded, Stream, Transformed, checked_images, normalise, output_file, print_json
from .pictures import draw_pyramid
from .processes import Processes
from .results import Column, Table, fingerprint, settings_of

__all__ = [
    'Classifier', 'extract', 'load_model', 'open_image', 'predict', 'run_demo', 'run_list', 'run_predict']

DIGITS = Path(__file__).resolve().parents[1] / 'data' / 'digits'


# ---- predict ---------------------------------------------------------------------------------------------------------

def _rows(record: Dict[str, Any]) -> List[Tuple[Any, ...]]:
    """Return a row for each class that is predicted for an image."""
    rows = []
    for rank, item in enumerate(record['predictions'], start=1):
        rows.append((record['image'], rank, item['index'], item['label'], item['probability']))
    return rows


PREDICTIONS = Table((
    Column('image', 'string'),
    Column('rank', 'int64'),
    Column('index', 'int64'),
    Column('label', 'string'),
    Column('probability', 'float64'),
), _rows)


def run_predict(args: argparse.Namespace) -> None:
    with Processes() as processes:
        _predict_all(args, processes)


def _predict_all(args: argparse.Namespace, processes: Processes) -> None:
    results = output_file(args, PREDICTIONS, processes)
    files = processes.from_first(lambda: checked_images(args, results))  # before weights are downloaded
    stream = Stream(args, processes)
    classifier = load_model(args.model, args.checkpoint, img_size=args.img_size, labels=args.labels, prefix=args.prefix)
    settings: Dict[str, Any] = {}
    if results is not None:
        settings = dict(
            command='predict', model=classifier.name, weights=fingerprint(classifier.model),
            model_settings=settings_of(classifier.model), multi_label=classifier.multi_label, dtype=args.dtype,
            preprocessing=classifier.data, labels=classifier.labels, topk=args.topk)
    classifier.model = stream.place(classifier.model, class_token_only=classifier.model.global_pool == 'token')

    def compute(images: List[Loaded], pixels: torch.Tensor) -> List[Dict[str, Any]]:
        logits = classifier.model(normalise(pixels, classifier.data).to(stream.dtype))
        check_output(logits, classifier.name)
        logits = logits.float()
        values, indices = probabilities(classifier, logits).topk(min(args.topk, logits.shape[1]))
        return [
            _record(classifier, loaded, found, shares)
            for loaded, found, shares in zip(images, indices.tolist(), values.tolist())]

    channels, prepare = classifier.data['input_size'][0], Transformed(classifier.data)
    if results is not None:
        count = stream.write(
            files, channels, prepare, compute, results, settings, info=dict(model=classifier.name))
        if processes.is_first:
            print(f'{clean(args.output, 4096)}: predictions of {count:,} images')
        stream.say()
        return
    records = stream.records(files, channels, prepare, compute)
    if args.json:
        print_json(records, 'images', model=classifier.name, img_size=classifier.data['input_size'][1:])
    else:
        for record in records:
            print(clean(record['image'], 4096))
            for item in record['predictions']:
                print(f'  {item["probability"]:7.2%}  {clean(item["label"])}', flush=True)
    stream.say()


def _record(
        classifier: Classifier, loaded: Loaded, indices: Sequence[int], shares: Sequence[float]) -> Dict[str, Any]:
    """Return the record of an image: its path and its most likely classes."""
    top = [
        dict(index=index, label=classifier.labels[index], probability=round(probability, 6))
        for index, probability in zip(indices, shares)]
    return dict(image=loaded.file.path, predictions=top)


# ---- demo and list ---------------------------------------------------------------------------------------------------

def run_demo(args: argparse.Namespace) -> None:
    check_folder(args.output)
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

    # All digits in one image, a column per digit. Its size and shape differ from those that the model was trained on.
    sheet = Image.fromarray(np.hstack([np.vstack([*map(np.asarray, images)]) for images in by_digit.values()]))
    backbone = load_model('test_pvt', dense=True)
    draw_pyramid(
        sheet, *extract(backbone, sheet, (sheet.height, sheet.width)), picture, f'Features of {backbone.name}',
        f'{count} handwritten digits as one image', cells=(len(by_digit['0']), len(by_digit)),
        note='A column for each digit. The model does not see the gaps. At stride 32 a digit is one position.')
    print(f'Features of all of them as one image of {sheet.height}x{sheet.width} (height x width): '
          f'{clean(picture, 4096)}')
    print(f'\nNext, with your own image (weights come from the Hugging Face Hub):\n'
          f'  python -m pvt_timm predict photo.jpg --model {DEFAULT_MODEL}')


def run_list(args: argparse.Namespace) -> None:
    print(f'{"model":<26} {"params":>8} {"GMACs":>7}  {"at":<7} {"top-1":>6}  weights')
    addresses: Dict[str, List[str]] = {}
    for name in (name for variant in VARIANTS for name in timm.list_models(variant, include_tags=True)):
        cfg: Any = get_pretrained_cfg(name)
        model = timm.create_model(name, num_classes=cfg.num_classes, device='meta', weight_init='skip')
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model.eval()(torch.empty(1, *cfg.input_size, device='meta'))
        params, gmacs = sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9
        places = []
        if cfg.hf_hub_id:
            places.append('Hugging Face Hub')
            addresses.setdefault(name, []).append(f'hf-hub:{cfg.hf_hub_id}')
        if cfg.url:
            places.append(urlsplit(cfg.url).hostname or '')
            addresses.setdefault(name, []).append(cfg.url)
        if cfg.file:
            places.append('in the package')
        decimals = 2 if gmacs > 0.01 else 4
        size = 'x'.join(map(str, cfg.input_size[1:]))
        print(f'{name.removesuffix(".untrained"):<26} {params:6.2f} M {gmacs:7.{decimals}f}  {size:<7} '
              f'{TOP1.get(name, "-"):>6}  {", ".join(places) or "none"}')
    print('\ntop-1: ImageNet-1K as published (test_pvt: held-out digits). retinanet_coco: backbones, no classifier.')
    print('\nWhere the weights come from, the first address is tried first:')
    for name, some in addresses.items():
        print(f'  {name}')
        for address in some:
            print(f'    {address}')
