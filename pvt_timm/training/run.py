""" `fit` trains as the settings say and writes checkpoints. `validate` measures a model and returns its figures. """
import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import pytorch_lightning as pl
import torch
import torch.nn as nn
from pytorch_lightning.callbacks import TQDMProgressBar
from timm.layers import to_2tuple

from ..detection import retinanet_coco
from ..detection.trained import KEY, describe_body, is_own, kind_of, widths_of
from ..files import check_folder, read_checkpoint, save_atomically
from ..labels import read_labels
from ..segmentation import ade20k_classes
from ..variants import VARIANTS
from .callbacks import LAST, Checkpoints, CompleteFiles, History
from .checkpoints import BUILDERS, copy_weights, load_any
from .coco import CocoAnnotations, CocoDataset
from .data import Augmented, Batches
from .label_maps import LabelMapDataset
from .modules import DetectorModule, SegmenterModule
from .published import OPENMMLAB, published_figures
from .settings import DetectorSettings, SegmenterSettings, Settings
from .transforms import detection_transform, segmentation_transform

__all__ = ['Validated', 'fit', 'is_first_process', 'validate']

AnySettings = Union[DetectorSettings, SegmenterSettings]

# Settings that may differ when training continues: those about the machine and about paths
_MAY_DIFFER = ('data', 'output', 'weights', 'backbone_weights', 'accelerator', 'devices', 'nodes', 'workers',
               'images_per_pass', 'grad_checkpointing')


@dataclasses.dataclass
class Validated:
    """The result of `validate`.

    Attributes:
        kind: Kind of the model, such as 'retinanet'.
        figures: The measured figures, from 0 to 1. A figure is -1 if there is nothing to measure.
        published: The published figures for this kind, PVT and size of images, in percent. None if there are none.
        own: Whether the weights are a checkpoint of this package, not of OpenMMLab or of the original code.
    """
    kind: str
    figures: Dict[str, float]
    published: Optional[Dict[str, float]]
    own: bool


def fit(settings: AnySettings) -> Dict[str, float]:
    """Train as `settings` say. If the output folder holds a checkpoint, training continues after its epoch.

    Returns:
        The figures of the last evaluation, from 0 to 1.

    Raises:
        ValueError: Settings, data or weights are wrong. The message says what.
        OSError: A file cannot be written. The last complete checkpoint is kept.
    """
    output = _folder(settings, 'output')
    _check(settings)
    before = read_checkpoint(output / LAST) if (output / LAST).is_file() else None
    if before is not None:
        _check_same(before, settings, output)
    history, checkpoints = History(output), Checkpoints(output)
    trainer = _trainer(settings, [history, checkpoints])
    images_per_pass, passes = _passes(settings, trainer.world_size)
    trainer.accumulate_grad_batches = passes
    parts: Any = _detector_parts(settings) if isinstance(settings, DetectorSettings) else _segmenter_parts(settings)
    model, train, held_out, module_args = parts
    if before is not None and before[KEY]['categories'] != list(model.categories):
        raise ValueError(
            f'Expected the same classes as at the start of the training in {output}, '
            f'{_few(before[KEY]["categories"])}, got {_few(model.categories)}')
    steps_per_epoch, epochs = _epochs(settings, len(train))
    trainer.fit_loop.max_epochs = epochs
    if settings.epochs is not None:
        trainer.check_val_every_n_epoch = settings.eval_every
    total_steps = steps_per_epoch * epochs
    module_args.update(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    module: Any
    if isinstance(settings, DetectorSettings):
        module, transform = DetectorModule(model, settings, **module_args), detection_transform(settings.flip)
    else:
        module = SegmenterModule(model, settings, **module_args)
        transform = segmentation_transform(
            settings.scale, settings.scale_range, settings.crop, settings.crop_max_share, settings.flip,
            settings.distort)
    data = Batches(
        held_out, Augmented(train, transform), steps_per_epoch, settings.images_per_step, images_per_pass,
        settings.seed, settings.workers, stack=isinstance(settings, SegmenterSettings))
    history.title = f'{settings.kind} on {_variant(model)}, {len(train)} images'
    if settings.grad_checkpointing:
        model.backbone.body.set_grad_checkpointing(True)
    output.mkdir(parents=True, exist_ok=True)
    if before is not None:
        done = before['epoch'] + 1
        if done >= epochs:
            _say(f'the training is finished: {output / LAST} is from its last epoch')
            return dict(before[KEY]['figures'])
        _say(f'going on after epoch {done} of {epochs} from {output / LAST}')
    if before is None and 2 * settings.warmup_steps > total_steps and is_first_process():
        warnings.warn(
            f'The learning rate rises during the first {settings.warmup_steps} steps, and the whole training has '
            f'{total_steps} steps: give fewer --warmup-steps, or train for longer.', stacklevel=2)
    with _quiet():
        trainer.fit(module.train(), datamodule=data, ckpt_path=None if before is None else str(output / LAST))
    return dict(module.figures)


def validate(settings: AnySettings, predictions: Optional[Path] = None) -> Validated:
    """Evaluate the model in `settings.weights`.

    Args:
        settings: Only the settings of weights, model, data and machine are used.
        predictions: Folder to write boxes.json and masks.json into, in COCO's results format.

    Raises:
        ValueError: Settings, data or weights are wrong. The message says what.
    """
    if not settings.weights:
        raise ValueError('Expected --weights FILE, the model to validate, such as the best.ckpt that fit writes')
    root = _folder(settings, 'data')
    trainer = _trainer(settings, [])
    model, own = _source(settings)
    channels = _channels(model)
    module: Any
    if isinstance(settings, DetectorSettings):
        annotations = CocoAnnotations(
            root / settings.val_annotations, root / settings.val_images, masks=kind_of(model) == 'mask_rcnn')
        labels = _labels(model, annotations)
        held_out: Any = CocoDataset(annotations, labels, channels=channels)
        module = DetectorModule(model, settings, annotations.truth(), _reversed(labels))
    else:
        held_out = LabelMapDataset(
            root / settings.val_images, root / settings.val_labels, model.num_classes, settings.reduce_zero_label,
            channels)
        module = SegmenterModule(model, settings)
    if predictions is not None:
        check_folder(predictions)
    with _quiet():
        trainer.validate(module.eval(), datamodule=Batches(held_out, workers=settings.workers), verbose=False)
    if predictions is not None and trainer.is_global_zero:
        predictions.mkdir(parents=True, exist_ok=True)
        for kind, name in (('box', 'boxes.json'), ('mask', 'masks.json')):
            if kind in module.evaluation.kinds:
                _write_json(predictions / name, module.evaluation.results(kind))
    if settings.weights == 'retinanet_coco':
        published = OPENMMLAB.get(_variant(model))
    else:
        published = published_figures(kind_of(model), _variant(model), _min_size(model), model.num_classes)
    return Validated(kind_of(model), dict(module.figures), published, own)


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content).encode()
    save_atomically(path, lambda f: f.write(text))


# ---- settings --------------------------------------------------------------------------------------------------------

def _folder(settings: Settings, name: str) -> Path:
    value = getattr(settings, name)
    if not value:
        what = next(f.metadata['what'] for f in dataclasses.fields(settings) if f.name == name)
        raise ValueError(f'Expected --{name} FOLDER, the {what}')
    return Path(value)


def _check(settings: AnySettings) -> None:
    """Refuse settings that are out of range or contradict each other."""
    if (settings.epochs is None) == (settings.steps is None):
        raise ValueError('Expected either epochs or steps in the settings')
    for name in ('epochs', 'steps', 'eval_every', 'images_per_step', 'images_per_pass', 'nodes', 'out_channels'):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f'Expected 1 or more for {name}, got {value}')
    for name in ('lr', 'weight_decay', 'warmup_steps', 'workers', 'clip_grad'):
        value = getattr(settings, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f'Expected a finite number, 0 or more, for {name}, got {value}')
    if not 0 <= settings.frozen_stages <= 4:
        raise ValueError(f'Expected 0 to 4 for frozen_stages, got {settings.frozen_stages}')
    if settings.steps is not None and settings.steps % settings.eval_every:
        raise ValueError(f'Expected steps to be a multiple of eval_every ({settings.eval_every}), got {settings.steps}')
    if settings.weights and settings.backbone_weights:
        raise ValueError('Expected weights or backbone_weights, not both: weights include those of the backbone')


def _passes(settings: Settings, processes: int) -> Tuple[int, int]:
    """Return how many images a process computes at a time, and how many times it does so per step."""
    whole = settings.images_per_step
    at_a_time = settings.images_per_pass or whole // processes
    if at_a_time < 1 or whole % (at_a_time * processes):
        raise ValueError(
            f'Expected images_per_step to be a multiple of {max(at_a_time, 1) * processes} (images_per_pass times the '
            f'number of processes, {processes}), got {whole}')
    return at_a_time, whole // (at_a_time * processes)


def _epochs(settings: Settings, images: int) -> Tuple[int, int]:
    """Return the steps of an epoch, and the number of epochs. With `steps`, an epoch ends with each evaluation."""
    if settings.steps is not None:
        return settings.eval_every, settings.steps // settings.eval_every
    assert settings.epochs is not None
    return -(-images // settings.images_per_step), settings.epochs


def _check_same(before: Dict[str, Any], settings: Settings, output: Path) -> None:
    """Refuse to continue a training with other settings than it was begun with."""
    if KEY not in before or 'loops' not in before:
        raise ValueError(f'Expected a checkpoint that fit has written, {output / LAST} is not one')
    then, now = before[KEY]['settings'], dataclasses.asdict(settings)
    for name in sorted(then.keys() | now.keys()):
        if name not in _MAY_DIFFER and then.get(name) != now.get(name):
            raise ValueError(
                f'The training in {output} was started with {name}={then.get(name)!r}, now it is {now.get(name)!r}: '
                'choose another --output, or give the same settings as before')


# ---- models and data -------------------------------------------------------------------------------------------------

def _source(settings: AnySettings) -> Tuple[Any, bool]:
    """Return the whole model in `settings.weights`, and whether they are a checkpoint of this package."""
    is_detector = isinstance(settings, DetectorSettings)
    weights = str(settings.weights)
    if weights == 'retinanet_coco' and is_detector:
        return retinanet_coco(settings.model or 'pvt_small'), False
    checkpoint = read_checkpoint(weights)
    model = load_any(checkpoint, 'detector' if is_detector else 'segmenter')
    if settings.model not in (None, _variant(model)):
        raise ValueError(f'Expected {settings.model} in {weights}, got {_variant(model)}')
    return model, is_own(checkpoint)


def _build(settings: AnySettings, num_classes: int, categories: Sequence[str], **sizes: Any) -> Any:
    """Return a new model with the weights that training starts from."""
    source = _source(settings)[0] if settings.weights else None
    if source is not None and kind_of(source) != settings.kind:
        raise ValueError(f'Expected a {settings.kind} in {settings.weights}, got a {kind_of(source)}')
    model_args = {**settings.model_args, 'drop_path_rate': settings.drop_path}
    widths: Dict[str, Any] = {'out_channels': 256}
    name = settings.model or 'pvt_small'
    if source is not None:
        name, seen = describe_body(source.state_dict())
        seen['img_size'] = tuple(seen['img_size'])
        if to_2tuple(settings.model_args.get('img_size', seen['img_size'])) != seen['img_size']:
            raise ValueError(
                f'Expected no img_size in model_args, or {seen["img_size"]} as in {settings.weights}, got '
                f'{settings.model_args["img_size"]}')
        model_args = {**source.backbone.model_args, **model_args, **seen}
        widths = widths_of(source.state_dict())
    elif settings.backbone_weights:
        model_args['pretrained_cfg_overlay'] = dict(file=settings.backbone_weights)
    if settings.out_channels is not None:
        widths['out_channels'] = settings.out_channels
    pretrained = source is None and (settings.pretrained or bool(settings.backbone_weights))
    if name.partition('.')[0] not in VARIANTS:
        raise ValueError(f'Expected one of {", ".join(VARIANTS)} as model, with or without a tag, got {name!r}')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # new layers are the same in all processes, and if the command is repeated
        try:
            model = BUILDERS[settings.kind](
                name, num_classes, pretrained_backbone=pretrained, model_args=model_args,
                **{**widths, **sizes, **settings.head_args})
        except TypeError as e:  # for an unknown argument
            raise ValueError(f'model_args or head_args do not fit: {e}') from e
        if settings.kind == 'retinanet' and widths['out_channels'] < 256:
            _start_narrow_head(model)
    if hasattr(model, 'roi_heads'):
        _clear_background(model.roi_heads)
    model.categories = list(categories)
    if source is not None:
        _take_normalisation(model, source, but=settings.head_args)
        new = copy_weights(model, source)
        if new:
            _say(f'the classes differ from those of {settings.weights}, so these weights are new: {", ".join(new)}')
    return model


def _take_normalisation(model: Any, source: Any, but: Mapping[str, Any]) -> None:
    """Let `model` normalise images as `source` does. Values that are in `but` are not changed."""
    where, there = (getattr(m, 'transform', m) for m in (model, source))
    for name in ('image_mean', 'image_std', 'mean', 'std'):
        if hasattr(there, name) and name not in but:
            setattr(where, name, getattr(there, name))


def _clear_background(roi_heads: Any) -> None:
    """Set the weights that torchvision has for boxes and masks of the background to 0.

    They are never used or trained, and OpenMMLab's models do not have them. As zeros, they stay the same when a model
    is converted to OpenMMLab's format and back.
    """
    layers = [(roi_heads.box_predictor.bbox_pred, 4)]
    if roi_heads.mask_predictor is not None:
        layers.append((roi_heads.mask_predictor.mask_fcn_logits, 1))
    for layer, rows in layers:
        layer.weight.data[:rows] = 0
        layer.bias.data[:rows] = 0


def _start_narrow_head(model: Any) -> None:
    """Initialise the layers of a RetinaNet's head with He's method.

    torchvision initialises them as published, with a standard deviation of 0.01. That is meant for 256 channels: with
    64 channels, activations almost vanish after four layers.
    """
    for branch in (model.head.classification_head, model.head.regression_head):
        for layer in branch.conv.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)


def _detector_parts(settings: DetectorSettings) -> Tuple[Any, CocoDataset, CocoDataset, Dict[str, Any]]:
    """Return the model, the data to train on, the data to evaluate on, and arguments for the module."""
    root = _folder(settings, 'data')
    masks = settings.kind == 'mask_rcnn'
    train = CocoAnnotations(root / settings.train_annotations, root / settings.train_images, masks)
    held_out = CocoAnnotations(root / settings.val_annotations, root / settings.val_images, masks)
    model = _build(
        settings, len(train.categories), list(train.categories.values()), min_size=tuple(settings.min_size),
        max_size=settings.max_size)
    labels = _labels(model, held_out)
    train_set = CocoDataset(train, _labels(model, train), masks, True, settings.keep_empty, _channels(model))
    if train_set.left_out:
        _say(f'left out of {train.file}: {train_set.left_out}')
    return model, train_set, CocoDataset(held_out, labels, channels=_channels(model)), dict(
        truth=held_out.truth(), category_ids=_reversed(labels))


def _segmenter_parts(settings: SegmenterSettings) -> Tuple[Any, LabelMapDataset, LabelMapDataset, Dict[str, Any]]:
    """Return the same as `_detector_parts`, for a segmenter."""
    root = _folder(settings, 'data')
    categories, palette = _classes(settings.classes, root)
    train, held_out = (
        LabelMapDataset(root / images, root / labels, len(categories), settings.reduce_zero_label)
        for images, labels in (
            (settings.train_images, settings.train_labels), (settings.val_images, settings.val_labels)))
    model = _build(settings, len(categories), categories, min_size=settings.min_size, max_size=settings.max_size)
    model.palette = palette
    train.channels = held_out.channels = _channels(model)
    return model, train, held_out, {}


def _classes(classes: Any, root: Path) -> Tuple[List[str], List[Tuple[int, ...]]]:
    """Return the names and colours of classes. The setting is their number, a file with names, or the names."""
    if classes is None:
        raise ValueError('Expected --classes: the names of the classes, a file with one name a line, or their number')
    names = classes if isinstance(classes, list) else [classes]
    palette: List[Tuple[int, ...]] = []
    if len(names) == 1:
        only = str(names[0])
        files = [file for file in (Path(only), root / only) if file.is_file()]
        if only.isdecimal() and int(only) == 150:
            names, palette = ade20k_classes()
        elif only.isdecimal():
            names = [f'class {i}' for i in range(int(only))]
        elif files:
            names = read_labels(files[0])
    if len(set(names)) < len(names):
        raise ValueError(f'Expected classes of different names, got {_few(sorted(names))}')
    if len(names) < 2:
        raise ValueError(
            f'Expected two classes or more, got {len(names)}. The background may be one of them')
    return names, palette


def _labels(model: Any, annotations: CocoAnnotations) -> Dict[int, int]:
    """Return the model's label of each category id: by name, or by order if the model has no names."""
    names = list(annotations.categories.values())
    if model.categories and set(names) != set(model.categories):
        only_here = [name for name in names if name not in model.categories]
        only_there = [name for name in model.categories if name not in names]
        raise ValueError(
            f'Expected the same classes in the model and in {annotations.file}. Only the file has '
            f'{_few(only_here)}, only the model has {_few(only_there)}')
    if len(names) != model.num_classes:
        raise ValueError(f'Expected {model.num_classes} categories in {annotations.file}, got {len(names)}')
    order = list(model.categories) or names
    return {id: order.index(name) + model.first_label for id, name in annotations.categories.items()}


def _reversed(labels: Dict[int, int]) -> Dict[int, int]:
    return {label: id for id, label in labels.items()}


def _few(names: Sequence[str]) -> str:
    return ', '.join(map(repr, names[:5])) + (f' and {len(names) - 5} more' if len(names) > 5 else '') or 'none'


def _channels(model: Any) -> int:
    """Return the number of channels that images are read with."""
    if model.in_chans not in (1, 3):
        raise ValueError(f'Expected a model for images with 1 or 3 channels, got one for {model.in_chans}')
    return model.in_chans


def _variant(model: Any) -> str:
    return describe_body(model.state_dict())[0]


def _min_size(model: Any) -> int:
    return model.transform.min_size[-1] if hasattr(model, 'transform') else model.min_size


# ---- Lightning -------------------------------------------------------------------------------------------------------

def _trainer(settings: Settings, callbacks: Sequence[Any]) -> Any:
    """Return Lightning's trainer with the settings of the machine. `callbacks` are empty unless it is for training."""
    devices: Any = settings.devices if settings.devices == 'auto' else _number_of_devices(settings.devices)
    nodes = settings.nodes
    if 'TORCHELASTIC_RUN_ID' in os.environ:  # torchrun has started the processes
        devices = int(os.environ['LOCAL_WORLD_SIZE'])
        nodes = int(os.environ['WORLD_SIZE']) // devices
    bar = [TQDMProgressBar()] if sys.stdout.isatty() else []  # in a log file it would print a line per step
    try:
        with _quiet():
            return pl.Trainer(
                accelerator=settings.accelerator, devices=devices, num_nodes=nodes, precision=settings.precision,
                gradient_clip_val=settings.clip_grad, callbacks=[*callbacks, *bar], plugins=[CompleteFiles()],
                logger=False, enable_checkpointing=bool(callbacks), enable_progress_bar=bool(bar),
                enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False, max_epochs=1)
    except pl.utilities.exceptions.MisconfigurationException as e:
        raise ValueError(f'Lightning refuses accelerator, devices or precision: {e}') from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Lightning's log messages, and its warnings that do not apply here."""
    loggers = [logging.getLogger(name) for name in ('pytorch_lightning', 'lightning_fabric')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for text in (
                r'.*does not have many workers', r'.*sync_dist=True', r'.*isinstance\(treespec', r'.*in eval mode at'):
            warnings.filterwarnings('ignore', text)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


def _number_of_devices(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"Expected a number of devices or 'auto', got {text!r}")
    return int(text)


def is_first_process() -> bool:
    """Return whether this is the process that prints messages.

    Lightning sets LOCAL_RANK in the processes that it starts, torchrun sets RANK too.
    """
    return os.environ.get('RANK', os.environ.get('LOCAL_RANK', '0')) == '0'


def _say(text: str) -> None:
    if is_first_process():
        print(f'pvt-timm: {text}', file=sys.stderr, flush=True)
