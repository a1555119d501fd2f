""" The commands `train` and `run`: timm's unmodified scripts with the models registered, `train` with recovery.

    torchrun --nproc-per-node=8 --max-restarts=3 -m pvt_timm train train.py --config pvt_small --data-dir DIR \
        --output output --experiment NAME

When the folder of the experiment holds a checkpoint, training goes on after its epoch: with weights, their average and
optimizer as they were. So the same command starts and continues, and torchrun's restart after a crash loses no more
than the epoch it happened in.
"""
import argparse
import functools
import os
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm.data
import torch
import yaml

from ..files import read_checkpoint, save_atomically
from ..labels import LABELS_FILE
from ..recipes import load_recipe, recipe_names
from .errors import UserError, one_line

__all__ = ['add_run', 'add_train', 'latest_checkpoint', 'machine_settings']


def add_run(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        'run', help='run a Python script with the models registered',
        usage='%(prog)s [-h] SCRIPT [ARGS ...]',
        description="Run a Python script, such as timm's validate.py, as `python SCRIPT ARGS ...` would, with the "
                    "models registered. For several processes: torchrun --nproc-per-node=2 -m pvt_timm run SCRIPT")
    parser.add_argument('script', metavar='SCRIPT', help='the script')
    parser.set_defaults(func=run_run)


def run_run(args: argparse.Namespace) -> List[str]:
    if not Path(args.script).is_file():
        raise UserError(f'No such script: {args.script}')
    return [args.script, *args.script_args]


def add_train(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        'train', help="run timm's train.py, with recovery",
        usage='%(prog)s [-h] SCRIPT [ARGS ...]',
        description="Run timm's train.py with ARGS and with the models registered. --config also takes the name of a "
                    f"recipe ({', '.join(recipe_names())}). Device and mixed precision are what the machine has unless "
                    "ARGS say it. Goes on after the last epoch if the folder of the experiment holds a checkpoint "
                    "(--resume FILE for another one), and keeps the names of the classes there.")
    parser.add_argument('script', metavar='SCRIPT', help="timm's train.py")
    parser.set_defaults(func=run_train)


def run_train(args: argparse.Namespace) -> List[str]:
    """Choose what the machine has, find the checkpoint to go on from. Returns the command line of the script."""
    command = run_run(args)
    given = given_arguments(args.script_args)
    config = given.get('config') or given.get('c')
    settings = _read_config(config) if config else {}
    machine = machine_settings(settings, given)
    settings.update(machine)
    now = {**settings, **given}
    if not now.get('experiment'):
        raise UserError('Expected --experiment NAME (and --output DIR), the folder to go on from after a crash')
    if machine:
        _say('on this machine ' + ', '.join(f'{name}: {value}' for name, value in machine.items()))
    folder = Path(now.get('output') or './output/train', now['experiment'])
    latest = None if now.get('resume') else latest_checkpoint(folder)
    if latest is not None:
        file, state = latest
        before = vars(state['args']) if isinstance(state.get('args'), argparse.Namespace) else {}
        epochs = _epochs({**before, **now})
        if epochs is not None and state['epoch'] + 1 >= epochs:
            _say(f'nothing left to do, {file} is that of the last of {epochs} epochs (--epochs N for more)')
            return []
        _say(f'going on after epoch {state["epoch"]} from {file}, with its weights, optimizer, learning rate and '
             f'weight decay{_without_effect(before, now)}')
        command += ['--resume', str(file)]
    if settings:
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(settings, sort_keys=False).encode()
        save_atomically(folder / 'settings.yaml', lambda f: f.write(text))
        command += ['--config', str(folder / 'settings.yaml')]  # the last one counts
    _keep_class_names(folder)
    _allow_cpu_processes()
    return command


def _say(text: str) -> None:
    if os.environ.get('RANK', '0') == '0':
        print(f'pvt-timm: {text}', file=sys.stderr, flush=True)


# arguments ------------------------------------------------------------------------------------------------------------

def given_arguments(argv: Sequence[str]) -> Dict[str, Any]:
    """Arguments of a script whose parser is not known: texts, lists of them, and True where nothing follows."""
    given: Dict[str, Any] = {}
    name = ''
    for arg in argv:
        if re.match('--?[a-zA-Z]', arg):
            name, equals, value = arg.lstrip('-').partition('=')
            name = name.replace('-', '_')
            given[name] = value if equals else True
        elif name:
            before = given[name]
            given[name] = arg if before is True else [*(before if isinstance(before, list) else [before]), arg]
    return given


def _read_config(config: str) -> Dict[str, Any]:
    """The settings of a recipe by its name, or of a YAML file."""
    if not Path(config).is_file():
        return load_recipe(config)
    try:
        settings = yaml.safe_load(Path(config).read_text(encoding='utf-8'))
    except yaml.YAMLError as e:
        raise UserError(f'Cannot read {config}: {e}') from e
    if not isinstance(settings, dict):
        raise UserError(f'Expected names and values in {config}, got {type(settings).__name__}')
    return settings


def machine_settings(settings: Dict[str, Any], given: Dict[str, Any]) -> Dict[str, Any]:
    """Device and mixed precision that this machine has.

    Args:
        settings: What a config sets, by train.py's names.
        given: What the command line sets. It is left as it is.

    Returns:
        What has to be set instead, or besides.
    """
    machine: Dict[str, Any] = {}
    device = {**settings, **given}.get('device')
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator.type if accelerator is not None else 'cpu'
        if device != 'cuda':  # train.py's default
            machine['device'] = device
    if not settings.get('amp') or 'amp' in given or 'amp_dtype' in given:
        return machine
    wanted = settings.get('amp_dtype', 'float16')
    if device == 'cpu':
        if not _cpu_has_bfloat16():  # it would be emulated, many times slower than float32
            machine['amp'] = False
        elif wanted != 'bfloat16':
            machine['amp_dtype'] = 'bfloat16'
    elif wanted == 'bfloat16' and str(device).startswith('cuda'):
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            machine['amp_dtype'] = 'float16'
    return machine


def _cpu_has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# recovery -------------------------------------------------------------------------------------------------------------

def latest_checkpoint(folder: 'os.PathLike[str]') -> Optional[Tuple[Path, Dict[str, Any]]]:
    """The checkpoint with the most epochs among those that train.py wrote at the end of one.

    A file that cannot be read (a full disk, a power cut) is passed over with a word on stderr where an older one is
    there. `recovery-*` files are not taken: they are from the middle of an epoch, and train.py would leave out the
    rest of it.

    Returns:
        The file and what it holds, or None if there is none.

    Raises:
        UserError: None of those that are there can be read.
    """
    folder = Path(folder)
    found: List[Tuple[Path, Dict[str, Any]]] = []
    broken: List[str] = []
    for file in [folder / 'last.pth.tar', *folder.glob('checkpoint-*.pth.tar')]:
        if file.is_file():
            try:
                state = read_checkpoint(file)
                if not isinstance(state.get('epoch'), int) or 'optimizer' not in state:
                    raise ValueError('it holds no epoch and optimizer')
                found.append((file, state))
            except (ValueError, OSError) as e:
                broken.append(f'{file}: {one_line(e)}')
    if broken and not found:
        raise UserError(f'Cannot go on from {broken[0]} (--experiment NAME or an empty folder to start anew)')
    for line in broken:
        _say(f'passing over {line}')
    return max(found, key=lambda item: item[1]['epoch'], default=None)


def _epochs(args: Dict[str, Any]) -> Optional[int]:
    """How many epochs train.py does in all, None where that is not plain."""
    if 'epochs' not in args or float(args.get('lr_cycle_limit', 1)) != 1 or args.get('start_epoch') is not None:
        return None
    more = float(args.get('cooldown_epochs', 0))
    if args.get('warmup_prefix'):
        more += float(args.get('warmup_epochs', 0))
    return int(float(args['epochs']) + more)


def _without_effect(before: Dict[str, Any], now: Dict[str, Any]) -> str:
    """Which arguments differ from the checkpoint's but are those of its optimizer."""
    names = ('lr', 'lr_base', 'lr_base_size', 'lr_base_scale', 'weight_decay', 'momentum', 'opt_eps', 'opt_betas')
    other = [f'--{name.replace("_", "-")} {now[name]} (was {before[name]})' for name in names
             if name in now and name in before and not _same(now[name], before[name])]
    return f': without effect is {", ".join(other)}' if other else ''


def _same(one: Any, other: Any) -> bool:
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return str(one) == str(other)


# timm's scripts as they are -------------------------------------------------------------------------------------------

def _keep_class_names(folder: Path) -> None:
    """Listen in on timm's `create_dataset` for the names of the classes, which no checkpoint holds."""
    create_dataset = timm.data.create_dataset

    @functools.wraps(create_dataset)
    def create(*args: Any, **kwargs: Any) -> Any:
        dataset = create_dataset(*args, **kwargs)
        class_to_idx = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
        if class_to_idx and kwargs.get('is_training') and os.environ.get('RANK', '0') == '0':
            text = ''.join(f'{name}\n' for name in sorted(class_to_idx, key=class_to_idx.get))
            folder.mkdir(parents=True, exist_ok=True)
            save_atomically(folder / LABELS_FILE, lambda f: f.write(text.encode()))
        return dataset

    timm.data.create_dataset = create


def _allow_cpu_processes() -> None:
    """timm gives DistributedDataParallel the device of the process, which it refuses if that is a CPU."""
    ddp = torch.nn.parallel.DistributedDataParallel
    original = ddp.__init__

    @functools.wraps(original)
    def init(self: Any, module: torch.nn.Module, device_ids: Any = None, *args: Any, **kwargs: Any) -> None:
        if device_ids and all(str(device).partition(':')[0] == 'cpu' for device in device_ids):
            device_ids = None
        original(self, module, device_ids, *args, **kwargs)

    ddp.__init__ = init  # type: ignore[method-assign]
