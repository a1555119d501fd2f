""" The commands `detector` and `segmenter`: train models on the user's data, and measure models. """
import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, Dict, List, Type

from ..detection.trained import KEY
from ..files import read_checkpoint
from ..training.published import ALLOWED, compare
from ..training.settings import DetectorSettings, SegmenterSettings, Settings, add_options, read_settings
from .errors import Parser, clean
from .network import check_pretrained

__all__ = ['add_training']

_COMMANDS: Dict[str, Type[Settings]] = {'detector': DetectorSettings, 'segmenter': SegmenterSettings}


def add_training(subparsers: Any) -> None:
    """Add the commands to those of `pvt-timm`."""
    for task, kind in _COMMANDS.items():
        what = 'COCO-style annotations' if task == 'detector' else 'images and label maps'
        command = subparsers.add_parser(task, help=f'train or validate a {task} on {what}')
        command.set_defaults(func=lambda args, command=command: command.print_help())
        modes = command.add_subparsers(dest='mode', metavar='MODE', title='modes')
        recipes = ', '.join(kind.recipes)
        for mode, func, about in (
                ('fit', run_fit, 'Train. After a crash, run the same command again to continue.'),
                ('validate', run_validate, 'Evaluate. Exit code 1 if the figures differ from the published ones.')):
            parser: Parser = modes.add_parser(mode, help=about, description=about)
            parser.set_defaults(func=func, settings_class=kind)
            parser.add_argument('--config', metavar='NAME|FILE', help=f'recipe ({recipes}) or YAML file')
            if mode == 'validate':
                if task == 'detector':
                    parser.add_argument(
                        '--predictions', type=Path, metavar='DIR',
                        help="folder to write boxes.json and masks.json into, in COCO's results format")
                parser.add_argument(
                    '--published', action=argparse.BooleanOptionalAction, default=None,
                    help='compare with the published figures (default if the weights are not from `fit`)')
                parser.add_argument(
                    '--allowed', type=float, default=ALLOWED, metavar='X',
                    help=f'allowed difference from the published figures, in percent (default {ALLOWED})')
                parser.add_argument(
                    '--json', action='store_true', help='print the figures as JSON, from 0 to 1 with all their digits')
            add_options(parser, kind)


def _given(args: argparse.Namespace) -> Dict[str, Any]:
    names = {f.name for f in dataclasses.fields(args.settings_class)}
    return {name: value for name, value in vars(args).items() if name in names}


def _lightning() -> None:
    try:
        import pycocotools  # noqa: F401
        import pytorch_lightning  # noqa: F401
        import torchmetrics  # noqa: F401
    except ImportError as e:
        raise ImportError(f"Training needs the `train` extra: pip install 'pvt-timm[train]' ({e})") from e


def _check_network(settings: Any, fit: bool = True) -> None:
    """Raise an error at once if published weights cannot be downloaded."""
    name = settings.model or 'pvt_small'
    if settings.weights == 'retinanet_coco':
        check_pretrained(f'{name}.retinanet_coco', '--weights')
    elif fit and settings.pretrained and not (settings.weights or settings.backbone_weights):
        check_pretrained(name, '--backbone-weights')


def run_fit(args: argparse.Namespace) -> None:
    if args.config is None:
        raise ValueError(f'Expected --config, a recipe ({", ".join(args.settings_class.recipes)}) or a YAML file')
    settings: Any = read_settings(args.settings_class, args.config, _given(args))
    _lightning()
    _check_network(settings)
    from ..training.run import fit, is_first_process

    figures = fit(settings)
    if is_first_process():
        _print(compare(_percent(figures), {})[0])


def run_validate(args: argparse.Namespace) -> int:
    given = _given(args)
    config, below = args.config, {}
    weights = given.get('weights')
    if weights and Path(weights).is_file():
        below = _settings_in(weights)
    if config is None and not below:
        config = args.settings_class.default_recipe
    settings: Any = read_settings(args.settings_class, config, given, below)
    _lightning()
    _check_network(settings, fit=False)
    from ..training.run import is_first_process, validate

    found = validate(settings, getattr(args, 'predictions', None))
    wanted = not found.own if args.published is None else args.published
    published = (found.published or {}) if wanted else {}
    if args.published and not published:
        raise ValueError(f'No figures are published for this {found.kind}')
    lines, near = compare(_percent(found.figures), published, args.allowed)
    if is_first_process():
        if args.json:
            shares = {name: round(value / 100, 6) for name, value in published.items()}
            print(json.dumps(dict(kind=found.kind, figures=found.figures, published=shares), indent=2))
        else:
            _print(lines)
    return 0 if near else 1


def _percent(figures: Dict[str, float]) -> Dict[str, float]:
    """Return figures in percent. COCO's -1, which means that there is nothing to measure, is not changed."""
    return {name: 100 * value if value >= 0 else value for name, value in figures.items()}


def _print(lines: List[str]) -> None:
    for line in lines:
        print(clean(line))


def _settings_in(weights: str) -> Dict[str, Any]:
    """Return the settings in a checkpoint of `fit` about the data: its paths, and the meaning of label maps."""
    said = read_checkpoint(weights).get(KEY)
    settings = said.get('settings') if isinstance(said, dict) else None
    if not isinstance(settings, dict):
        return {}
    names = ('kind', 'val_images', 'val_annotations', 'val_labels', 'reduce_zero_label', 'data', 'workers')
    return {name: settings[name] for name in names if name in settings}
