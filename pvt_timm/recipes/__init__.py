""" Training recipes for timm's train.py, and the command that runs one on the machines at hand.

A recipe is a YAML file for `train.py --config`. In code: `recipe_path('pvt_small')`, `load_recipe('pvt_small')`.
"""
import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

import timm
import yaml

from ..cli.predict import UserError

__all__ = ['Plan', 'add_parser', 'build_command', 'load_recipe', 'plan', 'recipe_names', 'recipe_path']

# How many processes the batch size of a recipe is meant for, where it is not one.
PROCESSES = {'pvt_tiny': 8, 'pvt_small': 8, 'pvt_medium': 8, 'pvt_large': 8}

# Freezes all but the head: timm leaves layers out whose share of the learning rate is under the limit.
FREEZE = ('--layer-decay', '0.01', '--layer-decay-no-opt-scale', '0.5', '--drop-path', '0')

SCRIPT_URL = 'https://github.com/huggingface/pytorch-image-models/blob/v{}/train.py'


def recipe_names() -> List[str]:
    """Names of all recipes."""
    return sorted(file.stem for file in Path(__file__).parent.glob('*.yaml'))


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe.

    Raises:
        UserError: There is no such recipe.
    """
    if name not in recipe_names():
        raise UserError(f"Unknown recipe '{name}', expected one of {', '.join(recipe_names())}")
    return Path(__file__).parent / f'{name}.yaml'


def load_recipe(name: str) -> Dict[str, Any]:
    """What a recipe sets, by train.py's names."""
    return yaml.safe_load(recipe_path(name).read_text(encoding='utf-8'))


@dataclass
class Plan:
    """How a recipe runs on a number of processes with the images per step that it is meant for.

    Attributes:
        processes: Number of processes, one per GPU.
        batch_size: Images per process and forward pass.
        grad_accum_steps: Forward passes per step.
        intended: Images per step that the recipe is meant for.
        lr: Learning rate that train.py will compute.
    """
    processes: int
    batch_size: int
    grad_accum_steps: int
    intended: int
    lr: float

    @property
    def images_per_step(self) -> int:
        return self.processes * self.batch_size * self.grad_accum_steps


def plan(name: str, processes: int = 1) -> Plan:
    """Share the images of a step out among processes, in several passes where there are too few of them.

    Where the numbers do not divide the step is a little smaller, and train.py's learning rate follows it.
    """
    recipe = load_recipe(name)
    intended = recipe['batch_size'] * PROCESSES.get(name, 1)
    if processes > intended:
        raise UserError(f'Expected at most {intended} processes for {name}, one image each, got {processes}')
    batch_size = min(recipe['batch_size'], intended // processes)
    accum = intended // (batch_size * processes)
    lr = recipe.get('lr')
    if lr is None:
        lr = recipe['lr_base'] * batch_size * accum * processes / recipe['lr_base_size']
    return Plan(processes, batch_size, accum, intended, lr)


def build_command(
        name: str,
        gpus: int = 0,
        nodes: int = 1,
        data_dir: Optional[str] = None,
        output: str = 'output',
        script: str = 'train.py',
        model: Optional[str] = None,
        num_classes: Optional[int] = None,
        checkpoint: Optional[str] = None,
        freeze: bool = False,
) -> List[str]:
    """The command for a recipe, as arguments.

    Args:
        name: Name of the recipe.
        gpus: GPUs per machine, 0 for one process without a launcher.
        nodes: Number of machines.
        data_dir: Image folder with `train` and `validation`.
        output: Folder to write to.
        script: timm's train.py.
        model: Model instead of the recipe's.
        num_classes: Number of classes instead of the recipe's (or the weights').
        checkpoint: File with weights to start from, instead of the published ones.
        freeze: Train the head only.
    """
    shared = plan(name, max(gpus, 1) * nodes)
    recipe = load_recipe(name)
    command = ['python']
    if gpus or nodes > 1:
        command = ['torchrun', f'--nproc-per-node={max(gpus, 1)}', '--max-restarts=3']
        if nodes > 1:
            command += [
                f'--nnodes={nodes}', '--rdzv-backend=c10d', '--rdzv-endpoint=FIRST_MACHINE:29500', f'--rdzv-id={name}']
    command += ['-m', 'pvt_timm', 'train', script, '--config', name]
    command += ['--data-dir', data_dir or 'DATA_DIR', '--output', output, '--experiment', name]
    if shared.batch_size != recipe['batch_size']:
        command += ['--batch-size', str(shared.batch_size)]
    if shared.grad_accum_steps > 1:
        command += ['--grad-accum-steps', str(shared.grad_accum_steps)]
    if recipe.get('aug_repeats') and shared.processes == 1:
        command += ['--aug-repeats', '0']  # timm's loader refuses it in one process
    if model is not None:
        command += ['--model', model]
    if num_classes is not None:
        command += ['--num-classes', str(num_classes)]
    if checkpoint is not None:
        command += ['--pretrained', '--pretrained-path', checkpoint]
    if freeze:
        command += FREEZE
    return command


def add_parser(subparsers) -> None:
    """Add the `recipe` and `train` commands."""
    from ..cli.train import add_train

    parser = subparsers.add_parser(
        'recipe', help="print the command that trains with timm's train.py",
        description="Print the command that runs a recipe with timm's train.py, after checking the data and the "
                    'weights if they are given.')
    parser.add_argument('name', nargs='?', metavar='NAME', help=f'{", ".join(recipe_names())} (all are listed without)')
    parser.add_argument('--gpus', type=_count, default=0, metavar='N', help='GPUs per machine (default one process)')
    parser.add_argument('--nodes', type=_count, default=1, metavar='N', help='machines (default 1)')
    parser.add_argument('--data-dir', metavar='DIR', help='folder with train/<class>/* and validation/<class>/*')
    parser.add_argument('--output', default='output', metavar='DIR', help='folder to write to (default output)')
    parser.add_argument('--model', help="model instead of the recipe's")
    parser.add_argument('--num-classes', type=_count, metavar='N', help='classes (finetune: default those of the data)')
    parser.add_argument('--checkpoint', metavar='FILE', help='start from the weights in this file, with a new head')
    parser.add_argument('--freeze', action='store_true', help='train the head only')
    parser.add_argument('--script', default='train.py', metavar='FILE', help="timm's train.py (default train.py)")
    parser.set_defaults(func=run_recipe)
    add_train(subparsers)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 up, got '{text}'")
    return int(text)


def run_recipe(args: argparse.Namespace) -> None:
    """Print the command, and as comments what it amounts to."""
    from ..cli.train import check_checkpoint, check_data, check_output, num_classes_of

    if args.name is None:
        for name in recipe_names():
            print(f'{name:12s} {summary(name)}')
        return
    recipe = load_recipe(args.name)
    model = args.model or recipe['model']
    num_classes = args.num_classes
    expected = num_classes or recipe.get('num_classes')
    if args.checkpoint:
        check_checkpoint(args.checkpoint, model, f'recipe {args.name}' if not args.model else f'--model {model}')
    if args.data_dir:
        if expected is None and not recipe.get('pretrained') and not args.checkpoint:
            expected = num_classes_of(model)
        classes = check_data(args.data_dir, num_classes=expected)
        if expected is None:
            num_classes = len(classes)
    check_output(args.output, create=False)
    command = build_command(
        args.name, args.gpus, args.nodes, args.data_dir, args.output, args.script, args.model, num_classes,
        args.checkpoint, args.freeze)

    shared = plan(args.name, max(args.gpus, 1) * args.nodes)
    passes = f' x {shared.grad_accum_steps} passes' if shared.grad_accum_steps > 1 else ''
    print(f'# {summary(args.name)}: {recipe_path(args.name)}')
    print(f'# {shared.images_per_step} images per step ({shared.batch_size} x {shared.processes} processes{passes}), '
          f'learning rate {shared.lr:.3g}')
    if shared.images_per_step != shared.intended:
        print(f'# the recipe is meant for {shared.intended} images per step')
    if recipe.get('aug_repeats') and shared.processes == 1:
        print('# timm has repeated augmentation in several processes only, one runs without it')
    if args.nodes > 1:
        print('# run it on every machine; FIRST_MACHINE is the name of one of them, --output a folder that all share')
    if not Path(args.script).is_file():
        print(f'# {args.script}: {SCRIPT_URL.format(timm.__version__)}')
    print(_wrap(command))


def summary(name: str) -> str:
    """A recipe in a line."""
    recipe = load_recipe(name)
    kind = 'fine-tuning' if recipe.get('pretrained') else 'from scratch'
    return f'{recipe["model"]} {kind}, {recipe["epochs"]} epochs, drop path {recipe["drop_path"]}'


def _wrap(command: List[str], width: int = 100) -> str:
    """A command for the shell in lines that end in a backslash."""
    lines, line = [], ''
    words: List[str] = []
    for arg in command:
        quoted = shlex.quote(arg)
        if words and words[-1].startswith('-') and ' ' not in words[-1] and not arg.startswith('-'):
            words[-1] += f' {quoted}'  # an option stays with its value
        else:
            words.append(quoted)
    for word in words:
        if line and len(line) + len(word) > width:
            lines.append(line + ' \\')
            line = '    ' + word
        else:
            line = f'{line} {word}' if line else word
    return '\n'.join(lines + [line])
