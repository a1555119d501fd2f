""" The settings of a run of `fit` or `validate`: a recipe or a YAML file, and options that replace values of it.

Every field of `DetectorSettings` and `SegmenterSettings` is a key of a YAML file and an option of the command, with
'-' for '_'. Does not need the `train` extra.
"""
import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    Any, ClassVar, Dict, List, Mapping, Optional, Tuple, Type, TypeVar, Union, get_args, get_origin,
    get_type_hints)

import yaml

from ..recipes import DETECTOR_RECIPES, SEGMENTER_RECIPES

__all__ = ['DetectorSettings', 'SegmenterSettings', 'Settings', 'add_options', 'read_settings', 'settings_from']

AnySettings = TypeVar('AnySettings', bound='Settings')


def option(default: Any, what: str, choices: Optional[Tuple[str, ...]] = None) -> Any:
    """Return a field with its default, its text for `--help`, and its allowed values (any value if None)."""
    metadata = dict(what=what, choices=choices)
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Settings:
    """The settings that detectors and segmenters share."""
    recipes: ClassVar[Dict[str, Path]] = {}
    default_recipe: ClassVar[str]  # recipe that `validate` uses by default

    data: Optional[str] = option(
        None, 'folder of the data set, to which the paths of images and annotations are relative')
    output: Optional[str] = option(
        None, 'folder for checkpoints, curve and history; if it has a checkpoint, fit continues from it')
    weights: Optional[str] = option(
        None, 'whole model to start from, or to validate: a file of this package, of OpenMMLab or of the original code')

    # model
    model: Optional[str] = option(None, 'name of the PVT (default pvt_small, or that of the weights)')
    pretrained: bool = option(True, "start from the PVT's published weights, unless other weights are given")
    backbone_weights: Optional[str] = option(None, 'file with weights of only the PVT, in any supported format')
    model_args: Dict[str, Any] = option({}, 'more arguments for the PVT, such as img_size=128 in_chans=1')
    out_channels: Optional[int] = option(None, 'channels of the pyramid (default 256, or those of the weights)')
    head_args: Dict[str, Any] = option({}, 'more arguments for the class of the model, such as score_thresh=0.1')
    drop_path: float = option(0.1, 'rate of stochastic depth')
    frozen_stages: int = option(0, 'first stages of the PVT that are not trained, 0 to 4')
    grad_checkpointing: bool = option(False, 'compute features twice in a step, for less memory')

    # steps
    epochs: Optional[int] = option(None, 'passes over the images (give this or --steps)')
    steps: Optional[int] = option(None, 'optimizer steps (give this or --epochs)')
    eval_every: int = option(1, 'evaluate after this many epochs, or steps if steps are set')
    images_per_step: int = option(16, 'images per optimizer step in all processes together')
    images_per_pass: Optional[int] = option(
        None, 'images that a process computes at a time. If they are fewer than its images of a step, it does so '
        'several times per step (default all)')
    lr: float = option(1e-4, 'learning rate')
    weight_decay: float = option(1e-4, 'weight decay')
    schedule: str = option('step', 'how the learning rate decreases', ('step', 'poly', 'cosine'))
    lr_drops: List[int] = option(
        [], 'for schedule step: epochs, or steps if steps are set, after which the learning rate is divided by 10')
    poly_power: float = option(0.9, 'for schedule poly: exponent')
    warmup_steps: int = option(0, 'steps in which the learning rate grows to its value')
    warmup_start: float = option(0.001, 'share of the learning rate in the first step of warm-up')
    clip_grad: Optional[float] = option(None, 'largest norm of the gradients')
    flip: float = option(0.5, 'probability of a horizontal flip, 0 where left and right matter')
    seed: int = option(0, 'seed of all random numbers')

    # machine
    precision: str = option('32-true', "Lightning's: 32-true, bf16-mixed, 16-mixed")
    accelerator: str = option('auto', "Lightning's: auto, cpu, gpu")
    devices: str = option(
        'auto', 'number of devices of this machine, or of processes on its CPU; with torchrun, its processes are used')
    nodes: int = option(1, 'number of machines; with torchrun, its machines are used')
    workers: int = option(4, 'worker processes that read images, for each training process')


@dataclass
class DetectorSettings(Settings):
    """A detector on COCO-style annotations."""
    kind: str = option('retinanet', 'the detector', ('retinanet', 'faster_rcnn', 'mask_rcnn'))
    min_size: List[int] = option(
        [800], 'shorter side of resized images. Of several values, training takes a random one, evaluation the last')
    max_size: int = option(1333, 'limit of the longer side of resized images')
    train_images: str = option('train2017', 'folder of training images')
    train_annotations: str = option('annotations/instances_train2017.json', 'annotations of training images')
    val_images: str = option('val2017', 'folder of images to evaluate on')
    val_annotations: str = option('annotations/instances_val2017.json', 'annotations of images to evaluate on')
    keep_empty: bool = option(False, 'also train on images without objects')

    recipes = DETECTOR_RECIPES
    default_recipe = 'retinanet_coco_1x'


@dataclass
class SegmenterSettings(Settings):
    """A segmenter on images and label maps."""
    kind: str = option('semantic_fpn', 'the segmenter', ('semantic_fpn',))
    classes: Union[None, int, str, List[str]] = option(
        None, 'names of the classes, a file with one name a line, or their number')
    reduce_zero_label: bool = option(False, 'value 0 means no class, and classes count from 1, as in ADE20K')
    min_size: int = option(512, 'shorter side of resized images in evaluation')
    max_size: int = option(2048, 'limit of their longer side')
    scale: List[int] = option([2048, 512], 'limits of the longer and the shorter side of resized images in training')
    scale_range: List[float] = option([0.5, 2.0], 'smallest and largest random factor for these limits')
    crop: int = option(512, 'side of the crops in training')
    crop_max_share: float = option(0.75, 'largest share of a crop that one class may have')
    distort: bool = option(True, 'change brightness, contrast, saturation and hue in training')
    train_images: str = option('images/training', 'folder of training images')
    train_labels: str = option('annotations/training', 'folder of label maps of training images')
    val_images: str = option('images/validation', 'folder of images to evaluate on')
    val_labels: str = option('annotations/validation', 'folder of label maps of images to evaluate on')

    recipes = SEGMENTER_RECIPES
    default_recipe = 'semantic_fpn_ade20k_40k'


def _convert(name: str, value: Any, kind: Any) -> Any:
    """Return a value of YAML as the type of its field. A value of another type raises ValueError, with its name."""
    if get_origin(kind) is Union:
        if value is None and type(None) in get_args(kind):
            return None
        for one in get_args(kind):
            if one is not type(None):
                try:
                    return _convert(name, value, one)
                except ValueError:
                    pass
        expected = ' or '.join(_type_name(one) for one in get_args(kind) if one is not type(None))
        raise ValueError(f'Expected {expected} for {name}, got {value!r}')
    origin = get_origin(kind) or kind
    if origin is list and not isinstance(value, (str, dict)):
        values = value if isinstance(value, (list, tuple)) else [value]
        return [_convert(name, v, get_args(kind)[0]) for v in values]
    if origin is float and not isinstance(value, bool):
        try:
            number = float(value)  # in YAML, 1e-4 is text
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
        raise ValueError(f'Expected {_type_name(kind)} for {name}, got {value!r}')
    if origin is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # devices: 2
    if isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
        return value
    raise ValueError(f'Expected {_type_name(kind)} for {name}, got {value!r}')


def _type_name(kind: Any) -> str:
    names = {int: 'an integer', float: 'a finite number', str: 'a text', bool: 'true or false',
             dict: 'names and values', list: 'a list'}
    return names[get_origin(kind) or kind]


def settings_from(kind: Type[AnySettings], values: Mapping[str, Any], where: str) -> AnySettings:
    """Return settings made of names and values.

    Args:
        kind: `DetectorSettings` or `SegmenterSettings`.
        values: Names and values, as in a YAML file. Missing settings have their defaults.
        where: Source of the values, for error messages.

    Raises:
        ValueError: A name is not known, or a value has the wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = [str(name) for name in values if name not in fields]
    if unknown:
        raise ValueError(f'Not known in {where}: {", ".join(unknown)}. Known are {", ".join(fields)}')
    hints = get_type_hints(kind)
    settings = kind(**{name: _convert(name, value, hints[name]) for name, value in values.items()})
    for name, f in fields.items():
        choices = f.metadata['choices']
        if choices and getattr(settings, name) not in choices:
            raise ValueError(f'Expected one of {", ".join(choices)} for {name}, got {getattr(settings, name)!r}')
    return settings


def read_settings(
        kind: Type[AnySettings], config: Optional[str], given: Mapping[str, Any], below: Mapping[str, Any] = {},
) -> AnySettings:
    """Return the settings of a recipe or a YAML file, with some of its values replaced.

    Args:
        kind: `DetectorSettings` or `SegmenterSettings`.
        config: Name of a recipe, or a YAML file.
        given: Settings that replace those of `config`. If both values are dicts, they are merged.
        below: Settings that are used if `config` and `given` do not have them.
    """
    values = dict(below)
    if config is not None:
        file = kind.recipes[config] if config in kind.recipes else Path(config)
        if not file.is_file():
            raise ValueError(f"Expected a YAML file or a recipe ({', '.join(kind.recipes)}) as config, got '{config}'")
        try:
            content = yaml.safe_load(file.read_text(encoding='utf-8'))
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise ValueError(f'Cannot read the config {file}: {e}') from e
        if not isinstance(content, dict):
            raise ValueError(f'Expected names and values in {file}')
        settings_from(kind, content, str(file))  # an error in the file is reported with the file's name
        values.update(content)
    for name, value in given.items():
        before = values.get(name)
        values[name] = {**before, **value} if isinstance(value, dict) and isinstance(before, dict) else value
    return settings_from(kind, values, config or 'the settings')


class _Pairs(argparse.Action):
    """Collects NAME=VALUE arguments as a dict. The values are parsed as YAML."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Optional[str] = None) -> None:
        pairs = {}
        for text in values:
            name, equals, value = text.partition('=')
            if not equals or not name:
                parser.error(f'argument {option_string}: expected NAME=VALUE, got {text!r}')
            pairs[name] = yaml.safe_load(value)
        setattr(namespace, self.dest, pairs)


def add_options(parser: argparse.ArgumentParser, kind: Type[Settings]) -> None:
    """Add an option for every field. Options that are not given are missing in the result of the parser."""
    group = parser.add_argument_group('settings', 'replace those of --config')
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        hint = hints[f.name]
        default: Any = f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        what = f.metadata['what'] + (f' (default {_shown(default)})' if default not in (None, {}, []) else '')
        arguments: Dict[str, Any] = dict(
            dest=f.name, default=argparse.SUPPRESS, help=what.replace('%', '%%'), choices=f.metadata['choices'])
        origin = get_origin(hint) or hint
        kinds = [origin] if origin is not Union else [get_origin(one) or one for one in get_args(hint)]
        if bool in kinds:
            del arguments['choices']
            arguments['action'] = argparse.BooleanOptionalAction
        elif dict in kinds:
            arguments.update(nargs='+', action=_Pairs, metavar='NAME=VALUE')
        elif list in kinds:
            arguments.update(nargs='+', type=_list_item(hint), metavar='VALUE')
        else:
            arguments['type'] = next(one for one in (float, int, str) if one in kinds)
            if not arguments['choices']:
                arguments['metavar'] = {int: 'N', float: 'X', str: 'TEXT'}[arguments['type']]
        group.add_argument('--' + f.name.replace('_', '-'), **arguments)


def _list_item(hint: Any) -> Any:
    """Return the type of the items of a list."""
    if get_origin(hint) is Union:
        return str
    return get_args(hint)[0]


def _shown(value: Any) -> str:
    return ' '.join(map(str, value)) if isinstance(value, list) else str(value)
