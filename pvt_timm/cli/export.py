""" The command `export`: a model as a file for another runtime. """
import argparse
import json
from pathlib import Path
from typing import Any, Dict, Optional

import torch
from timm.data import create_transform

from ..export import TARGETS, Exported, export
from ..int8 import CalibrationImages, Int8Change, find_images
from .errors import clean
from ..files import refuse_same_file
from .predict import Classifier, load_model, open_image

__all__ = ['add_export_options', 'run_export']


def add_export_options(command: argparse.ArgumentParser) -> None:
    command.add_argument('--to', required=True, choices=list(TARGETS), help='the runtime')
    suffixes = ', '.join(f'{kind.suffix} for {name}' for name, kind in TARGETS.items())
    command.add_argument('--output', required=True, type=Path, metavar='FILE', help=f'file to write ({suffixes})')
    command.add_argument('--features', action='store_true', help='the maps of all stages, in place of the logits')
    command.add_argument('--half', action='store_true', help='weights in float16')
    command.add_argument('--int8', action='store_true', help='weights and activations in 8 bits (onnx and openvino)')
    command.add_argument(
        '--calibrate', type=Path, metavar='FOLDER', help='images for --int8, in folders named after the classes to '
        'have the accuracy measured')
    command.add_argument('--labels', metavar='FILE', help='names of the classes (default those of the weights)')
    command.add_argument('--json', action='store_true', help='for machines')


def run_export(args: argparse.Namespace) -> None:
    if args.int8 != (args.calibrate is not None):
        raise ValueError('Expected --int8 and --calibrate FOLDER together')
    if args.calibrate is not None:
        find_images(args.calibrate)  # before weights are downloaded
    refuse_same_file(args.output, args.checkpoint)
    classifier = load_model(
        args.model, args.checkpoint, dense=args.features, img_size=args.img_size, labels=args.labels,
        prefix=args.prefix)
    calibration = _calibration_images(classifier, args.calibrate) if args.calibrate is not None else None
    done = export(
        classifier.model, args.to, args.output, features=args.features, img_size=classifier.data['input_size'][1:],
        half=args.half, preprocessing=classifier.data, labels=classifier.labels, name=classifier.name,
        calibration=calibration)
    if args.json:
        print(json.dumps(_as_json(classifier.name, done), indent=2))
        return
    print(f'{done.path}: {clean(classifier.name)} for {done.target}, {done.bytes / 1e6:.1f} MB, {done.seconds:.0f} s')
    differences = ', '.join(f'{_size(size)}: {value:.0e}' for size, value in done.differences.items())
    print(f'  largest difference from PyTorch, as a share of the largest value: {differences}')
    if done.int8 is not None:
        for line in _int8_lines(done.int8):
            print(f'  {line}')


def _calibration_images(classifier: Classifier, folder: Path) -> CalibrationImages:
    transform: Any = create_transform(**classifier.data, is_training=False)
    channels = classifier.data['input_size'][0]

    def load(file: Path) -> torch.Tensor:
        return transform(open_image(file, channels))

    files, classes = find_images(folder, classifier.labels)
    return CalibrationImages(files, classes, load)


def _size(size: Any) -> str:
    return 'x'.join(map(str, size))


def _int8_lines(change: Int8Change) -> Any:
    yield f'int8 on {change.images} images: outputs change by {change.mean_change:.1%} of the largest value on ' \
          f'average, {change.largest_change:.1%} at most'
    if change.same_first is not None:
        yield f'the most likely class stays the same for {change.same_first:.1%}'
    if change.right_before is not None:
        yield f'right before {change.right_before:.2%}, after {change.right_after:.2%}'


def _as_json(name: str, done: Exported) -> Dict[str, Any]:
    int8: Optional[Dict[str, Any]] = None if done.int8 is None else dict(vars(done.int8))
    return dict(
        model=name, target=done.target, file=str(done.path), outputs=done.outputs, bytes=done.bytes,
        seconds=round(done.seconds, 1),
        differences={_size(size): value for size, value in done.differences.items()}, int8=int8)
