""" The `train` command: timm's unmodified train.py with the models registered, checked input, and recovery.

    torchrun --nproc-per-node=8 --max-restarts=3 -m pvt_timm train train.py --config pvt_small --data-dir DIR \
        --output output --experiment NAME

When the output folder of the experiment holds a checkpoint, training goes on after its epoch: with weights, their
average, optimizer and schedule as they were. So the same command starts and continues, and torchrun's restart after a
crash loses no more than the epoch it happened in.
"""
import argparse
import functools
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import yaml
from timm.data.readers.img_extensions import get_img_extensions
from timm.models import get_pretrained_cfg, is_model, split_model_name_tag
from timm.utils import natural_key

from ..checkpoints import describe, map_to_timm
from ..pvt import find_variant
from ..files import read_checkpoint
from .predict import UserError, user_errors

__all__ = ['add_train', 'check_checkpoint', 'check_data', 'check_images', 'check_output', 'latest_checkpoint']

# the folder names that timm takes for a split
_SPLITS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'))


# checks ---------------------------------------------------------------------------------------------------------------

def check_output(output: os.PathLike, create: bool = True) -> None:
    """Refuse an output folder that cannot be written.

    Args:
        output: The folder.
        create: Create it. Otherwise its nearest existing parent is looked at.

    Raises:
        UserError: It cannot be written.
    """
    folder = Path(output).absolute()
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
            if not folder.is_dir():
                raise NotADirectoryError(f'{folder} is not a folder')
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(f'Expected an output folder that can be written, got {output}: {e}') from e


def _split_folder(data_dir: Path, split: str) -> Path:
    """The folder of a split as timm finds it, which takes the whole data folder where it finds none."""
    names = [split, *next((names for names in _SPLITS if split in names), ())]
    for name in names:
        if (data_dir / name).is_dir():
            return data_dir / name
    raise UserError(f"Expected {data_dir} to hold a folder '{split}' with one folder of images per class")


def _classes(folder: Path) -> List[str]:
    """Names of the classes of an image folder in the order of their labels."""
    extensions = get_img_extensions(as_set=True)
    names = set()
    for root, _, files in os.walk(folder, followlinks=True):
        if root != str(folder) and any(os.path.splitext(f)[1].lower() in extensions for f in files):
            names.add(os.path.basename(root))
    return sorted(names, key=natural_key)


def check_data(
        data_dir: os.PathLike,
        num_classes: Optional[int] = None,
        splits: Sequence[str] = ('train', 'validation'),
) -> List[str]:
    """Refuse an image folder that would train wrongly without an error.

    Args:
        data_dir: Folder with a folder per split.
        num_classes: Outputs of the model, None if they follow the data.
        splits: Names of the splits, the first one is that for training.

    Returns:
        Names of the classes.

    Raises:
        UserError: No images, a single class, splits with different classes, or more classes than outputs.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(f'No such data folder: {data_dir}')
    first: List[str] = []
    for split in splits:
        folder = _split_folder(data_dir, split)
        classes = _classes(folder)
        if not classes:
            raise UserError(f'Expected one folder of images per class in {folder}, found no image')
        if len(classes) == 1:
            raise UserError(f"Expected at least two classes in {folder}, found only '{classes[0]}'")
        if first and classes != first:
            other = sorted(set(first) ^ set(classes), key=natural_key)
            raise UserError(
                f'Expected the same classes in {folder} as in the training split, '
                f'only one of them has {", ".join(other[:5])}{" ..." if len(other) > 5 else ""}')
        first = first or classes
    if num_classes is not None and len(first) > num_classes:
        raise UserError(
            f'Expected at most {num_classes} classes, the outputs of the model, but {data_dir} has {len(first)}: '
            f'labels up to {len(first) - 1}. Set --num-classes {len(first)}')
    return first


def check_images(data_dir: os.PathLike, splits: Sequence[str] = ('train', 'validation')) -> int:
    """Decode every image. (timm's loader puts the next image in the place of one that it cannot read.)

    Returns:
        Number of images.

    Raises:
        UserError: Names the damaged ones.
    """
    from PIL import Image
    extensions = get_img_extensions(as_set=True)
    bad, total = [], 0
    for split in splits:
        for root, _, files in os.walk(_split_folder(Path(data_dir), split), followlinks=True):
            for name in sorted(f for f in files if os.path.splitext(f)[1].lower() in extensions):
                total += 1
                try:
                    with Image.open(os.path.join(root, name)) as image:
                        image.convert('RGB')
                except Exception:  # Pillow's readers raise all sorts
                    bad.append(os.path.join(root, name))
    if bad:
        more = f' and {len(bad) - 10} more' if len(bad) > 10 else ''
        raise UserError(f'{len(bad)} of {total} images cannot be read: {", ".join(bad[:10])}{more}')
    return total


def check_checkpoint(file: os.PathLike, model: str, wanted_by: str) -> None:
    """Refuse weights of another variant.

    Args:
        file: The checkpoint, in any known format.
        model: Name of the model.
        wanted_by: What asks for that model, for the message.

    Raises:
        UserError: No such file, not a PVT checkpoint, or one of another variant.
    """
    if not Path(file).is_file():
        raise UserError(f'No such checkpoint: {file}')
    with user_errors(f'Cannot use {file}: '):
        info = describe(map_to_timm(read_checkpoint(file)).state_dict)
    variant = find_variant(info.depths, info.embed_dims)
    wanted = split_model_name_tag(model)[0]
    if variant != wanted:
        raise UserError(f'Expected a checkpoint of {wanted} for {wanted_by}, but {file} holds {variant or "another"}')


def num_classes_of(model: str) -> Optional[int]:
    """Outputs that a model has if nothing else is said."""
    if not is_model(model):
        raise UserError(f"Unknown model '{model}'")
    cfg = get_pretrained_cfg(model)
    return cfg.num_classes if cfg is not None else None


# recovery -------------------------------------------------------------------------------------------------------------

def _read_state(file: Path) -> Dict[str, Any]:
    """A checkpoint of train.py without its tensors in memory."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, map_location='cpu', mmap=True, weights_only=True)


def latest_checkpoint(folder: os.PathLike) -> Optional[Tuple[Path, Dict[str, Any]]]:
    """The checkpoint with the most epochs among those that train.py wrote at the end of one.

    A file that cannot be read (a full disk, a power cut) is passed over with a word on stderr. `recovery-*` files are
    not taken: they are from the middle of an epoch, and train.py would leave out the rest of it.

    Returns:
        The file and what it says (`epoch`, `arch`), or None if there is none.
    """
    best = None
    folder = Path(folder)
    files = [folder / 'last.pth.tar', *folder.glob('checkpoint-*.pth.tar')]
    epochs = {f: int(m[1]) for f in files if (m := re.search(r'checkpoint-(\d+)\.pth', f.name))}
    for file in sorted(files, key=lambda f: epochs.get(f, sys.maxsize), reverse=True):
        if not file.is_file() or (best is not None and epochs.get(file, -1) <= best[1]['epoch']):
            continue
        try:
            state = _read_state(file)
            found = {'epoch': int(state['epoch']), 'arch': state.get('arch'), 'complete': 'optimizer' in state}
        except Exception as e:
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            print(f'pvt-timm: passing over {file}, it cannot be read: {reason}', file=sys.stderr)
            continue
        if found['complete'] and (best is None or found['epoch'] > best[1]['epoch']):
            best = file, found
    return best


def _keep_best(folder: Path, epoch: int) -> None:
    """Keep the best weights so far under another name: after a restart train.py compares with nothing before it."""
    best, kept = folder / 'model_best.pth.tar', folder / f'model_best_until_epoch_{epoch}.pth.tar'
    if best.is_file() and not kept.exists():
        try:
            os.link(best, kept)
        except OSError as e:
            print(f'pvt-timm: cannot keep {best} as {kept}: {e}', file=sys.stderr)


def _allow_cpu_processes() -> None:
    """timm gives DistributedDataParallel the device of the process, which it refuses if that is a CPU."""
    ddp = torch.nn.parallel.DistributedDataParallel
    original = ddp.__init__

    @functools.wraps(original)
    def init(self, module, device_ids=None, *args, **kwargs):
        if device_ids and all(str(device).partition(':')[0] == 'cpu' for device in device_ids):
            device_ids = None
        original(self, module, device_ids, *args, **kwargs)

    ddp.__init__ = init


# the command ----------------------------------------------------------------------------------------------------------

def add_train(subparsers) -> None:
    """Add the `train` command."""
    parser = subparsers.add_parser(
        'train', help="run timm's train.py, checked and with recovery",
        usage='%(prog)s [-h] [--check-images] SCRIPT [ARGS ...]',
        description="Run timm's train.py with ARGS and with the models registered, after checking the data, the "
                    'weights and the output folder. --config also takes the name of a recipe. Goes on after the last '
                    'epoch if the folder of the experiment holds a checkpoint (--resume FILE for another one).')
    parser.add_argument('--check-images', action='store_true', help='decode every image first and name damaged ones')
    parser.add_argument('script', metavar='SCRIPT', help="timm's train.py")
    parser.add_argument('args', nargs=argparse.REMAINDER, metavar='ARGS', help='its arguments')
    parser.set_defaults(func=run_train)


def _read_arguments(args: Sequence[str]) -> Tuple[argparse.Namespace, List[str]]:
    """What the checks need of train.py's arguments and config, and all of its arguments with the path of the config."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for names in (('--config', '-c'), ('--output',), ('--experiment',), ('--resume',), ('--data-dir',), ('--model',),
                  ('--pretrained-path',), ('--initial-checkpoint',), ('--dataset',), ('--class-map',)):
        parser.add_argument(*names, default='')
    parser.add_argument('--train-split', default='train')
    parser.add_argument('--val-split', default='validation')
    parser.add_argument('--num-classes', type=int)
    parser.add_argument('--pretrained', action='store_true')
    try:
        config = parser.parse_known_args(args)[0].config
        args = list(args)
        if config:
            from ..recipes import recipe_names, recipe_path
            if not Path(config).is_file() and config in recipe_names():
                config = str(recipe_path(config))
                args += ['--config', config]  # the last one counts
            if not Path(config).is_file():
                raise UserError(f'No such config: {config} (and no recipe: {", ".join(recipe_names())})')
            with user_errors(f'Cannot read {config}: ', (OSError, ValueError, yaml.YAMLError)):
                values = yaml.safe_load(Path(config).read_text(encoding='utf-8'))
                if not isinstance(values, dict):
                    raise ValueError(f'expected names and values, got {type(values).__name__}')
            parser.set_defaults(**values)
        known = parser.parse_known_args(args)[0]
    except argparse.ArgumentError as e:
        raise UserError(e) from e
    return known, args


def run_train(args: argparse.Namespace) -> None:
    """Check, find the checkpoint to go on from, and run the script in this process."""
    from .main import run_script

    if not Path(args.script).is_file():
        raise UserError(f"No such script: {args.script}. It is timm's train.py, see `recipe`")
    known, script_args = _read_arguments(args.args)
    if not known.experiment:
        raise UserError('Expected --experiment NAME (and --output DIR), the folder to go on from after a crash')
    folder = Path(known.output or './output/train', known.experiment)
    check_output(folder)
    first = os.environ.get('RANK', '0') == '0' and os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0'
    resume = None if known.resume else latest_checkpoint(folder)
    if first:
        _check_arguments(known, args.check_images, resume is not None)
    if resume is not None:
        file, state = resume
        if known.model and state['arch'] and state['arch'] != known.model:
            raise UserError(
                f'Expected a checkpoint of {known.model} to go on from, but {file} holds {state["arch"]}. '
                f'Take another --experiment')
        script_args += ['--resume', str(file)]
        if os.environ.get('RANK', '0') == '0':
            _keep_best(folder, state['epoch'])
            print(f'pvt-timm: going on after epoch {state["epoch"]} from {file}', file=sys.stderr, flush=True)
    _allow_cpu_processes()
    run_script(args.script, script_args)


def _check_arguments(known: argparse.Namespace, images: bool, resuming: bool) -> None:
    if known.model:
        num_classes = known.num_classes or num_classes_of(known.model)
        if not resuming:
            for file in filter(None, (known.pretrained_path, known.initial_checkpoint)):
                check_checkpoint(file, known.model, f'--config {known.config}' if known.config else '--model')
            if known.pretrained_path and not known.pretrained:
                raise UserError('Expected --pretrained with --pretrained-path, without it no weights are loaded')
        if known.resume:
            check_checkpoint(known.resume, known.model, '--resume')
        if not known.dataset or known.dataset.startswith('folder'):
            splits = [s for s in (known.train_split, known.val_split) if s]
            if not known.data_dir:
                raise UserError('Expected --data-dir DIR, a folder with train/ and validation/')
            if not known.class_map:
                check_data(known.data_dir, num_classes, splits)
            if images:
                check_images(known.data_dir, splits)
