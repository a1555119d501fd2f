""" The command `export`: a model as a file for another runtime. """
import argparse
import json
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch
from timm.data import create_transform

from ..export import TARGETS, Exported, export
from ..int8 import CalibrationImages, Int8Change, find_images
from ..files import checkpoints_among, refuse_same_file
from ..labels import read_labels
from ..training.checkpoints import load_any
from .errors import clean, filled
from .classifiers import DEFAULT_MODEL, Classifier, check_finite, load_model, open_image
from .detect import published_detector

__all__ = ['add_export_options', 'run_export']


def add_export_options(command: argparse.ArgumentParser) -> None:
    command.add_argument('--to', required=True, choices=list(TARGETS), help='runtime that the file is for')
    suffixes = ', '.join(f'{kind.suffix} for {name}' for name, kind in TARGETS.items())
    command.add_argument('--output', required=True, type=_path, metavar='FILE', help=f'file to write ({suffixes})')
    what = command.add_mutually_exclusive_group()
    what.add_argument(
        '--features', action='store_true', help='output the feature maps of all stages instead of the logits')
    what.add_argument(
        '--detector', action='store_true', help='export a detector (onnx and openvino only): the one in --checkpoint, '
        "or OpenMMLab's RetinaNet on --model (pvt_tiny, pvt_small, pvt_medium)")
    what.add_argument('--segmenter', action='store_true', help='export the segmenter in --checkpoint')
    command.add_argument('--half', action='store_true', help='store weights in float16')
    command.add_argument(
        '--int8', action='store_true', help='use weights and activations of 8 bits (onnx and openvino only)')
    command.add_argument(
        '--calibrate', type=_path, metavar='FOLDER', help='images for --int8. If they are in folders named after the '
        'classes, the accuracy is measured too')
    command.add_argument(
        '--labels', type=filled, metavar='FILE', help='names of the classes (default those of the weights)')
    command.add_argument('--json', action='store_true', help='print the result as JSON')


def _path(text: str) -> Path:
    return Path(filled(text))


def run_export(args: argparse.Namespace) -> None:
    if args.int8 != (args.calibrate is not None):
        raise ValueError('Expected --int8 and --calibrate FOLDER together')
    if args.int8 and (args.detector or args.segmenter):
        raise ValueError('Expected a classifier or --features with --int8')
    if args.calibrate is not None:
        find_images(args.calibrate)  # before weights are downloaded
    _refuse_checkpoint(args)
    if args.detector or args.segmenter:
        name, done = _export_whole(args)
    else:
        name, done = _export_pvt(args)
    if args.json:
        print(json.dumps(_as_json(name, done), indent=2))
        return
    print(f'{done.path}: {clean(name)} for {done.target}, {done.bytes / 1e6:.1f} MB, {done.seconds:.0f} s')
    differences = ', '.join(f'{_size(size)}: {value:.0e}' for size, value in done.differences.items())
    of_what = "of boxes as a share of an image's side, of scores and masks" if args.detector else (
        'as a share of the largest value')
    print(f'  largest difference from PyTorch, {of_what}: {differences}')
    if done.int8 is not None:
        for line in _int8_lines(done.int8):
            print(f'  {line}')


def _refuse_checkpoint(args: argparse.Namespace) -> None:
    """Refuse to replace the checkpoint: the given file, or any checkpoint in the given folder.

    Raises:
        ValueError: A file to write is the checkpoint.
    """
    if args.checkpoint is None:
        return
    checkpoints = [Path(args.checkpoint)]
    if checkpoints[0].is_dir():
        checkpoints = checkpoints_among(file for file in checkpoints[0].iterdir() if file.is_file())
    for path in (args.output, *TARGETS[args.to].files_beside(args.output)):
        refuse_same_file(path, *checkpoints)


def _export_pvt(args: argparse.Namespace) -> Tuple[str, Exported]:
    """Export a classifier or its feature maps. Returns the name of the model and the result."""
    classifier = load_model(
        args.model, args.checkpoint, dense=args.features, img_size=args.img_size, labels=args.labels,
        prefix=args.prefix)
    calibration = _calibration_images(classifier, args.calibrate) if args.calibrate is not None else None
    done = export(
        classifier.model, args.to, args.output, features=args.features, img_size=classifier.data['input_size'][1:],
        half=args.half, preprocessing=classifier.data, labels=classifier.labels, name=classifier.name,
        calibration=calibration)
    return classifier.name, done


def _export_whole(args: argparse.Namespace) -> Tuple[str, Exported]:
    """Export a detector or segmenter. Returns the name of the model and the result."""
    if args.checkpoint is None:
        if args.segmenter:
            raise ValueError('Expected --checkpoint with --segmenter: this command cannot download a segmenter')
        variant = (args.model or DEFAULT_MODEL).removesuffix('.retinanet_coco')
        if args.prefix is not None:
            raise ValueError('Expected --checkpoint with --prefix: published weights hold only one detector')
        name, model = f'RetinaNet on {variant}', published_detector(variant)
    else:
        if args.model is not None:
            raise ValueError(f'Expected no --model: the checkpoint says on which PVT its {_task(args)} is built')
        model = load_any(args.checkpoint, _task(args), args.prefix)
        name = f'{type(model).__name__.removeprefix("Pvt")} with weights from {Path(args.checkpoint).name}'
    check_finite(model, name)
    labels = read_labels(args.labels, model.num_classes) if args.labels else model.categories
    done = export(
        model, args.to, args.output, img_size=args.img_size, half=args.half, labels=labels, name=name)
    return name, done


def _task(args: argparse.Namespace) -> str:
    return 'detector' if args.detector else 'segmenter'


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
        yield f'accuracy before {change.right_before:.2%}, after {change.right_after:.2%}'


def _as_json(name: str, done: Exported) -> Dict[str, Any]:
    int8: Optional[Dict[str, Any]] = None if done.int8 is None else dict(vars(done.int8))
    return dict(
        model=name, target=done.target, file=str(done.path), outputs=done.outputs, bytes=done.bytes,
        seconds=round(done.seconds, 1),
        differences={_size(size): value for size, value in done.differences.items()}, int8=int8)
