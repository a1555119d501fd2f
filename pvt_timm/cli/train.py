""" The commands `train` and `run`. Both run unmodified scripts of timm with the models of this package registered.

`train` also recovers from a crash: if the folder of the experiment holds a checkpoint, training continues after the
epoch of this checkpoint. So the same command starts and continues a training. A restart by torchrun loses no more than
the epoch in which the crash happened.
"""
import argparse
import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import timm.data
import torch
import yaml
from timm.models import get_pretrained_cfg
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from ..files import read_checkpoint, save_atomically
from ..fused import has_amx
from ..images import natural_key
from ..labels import LABELS_FILE, labels_text
from ..recipes import RECIPES
from .datasets import read_as_seen
from .errors import Parser, clean, one_line
from .many import machine_device
from .network import check_hub_model, check_pretrained

__all__ = ['latest_checkpoint', 'machine_settings', 'run_run', 'run_train']

# Settings of train.py that are read here
_TEXT = ('experiment', 'output', 'resume', 'device', 'amp_dtype', 'model')
_NUMBERS = ('num_classes', 'in_chans', 'img_size')
# Options of train.py that say how long a run is
_SCHEDULE = {
    '--epochs': int, '--sched': str, '--warmup-epochs': int, '--cooldown-epochs': int, '--lr-cycle-limit': int,
    '--lr-cycle-mul': float}


def run_run(args: argparse.Namespace) -> List[str]:
    """Return the script's command line. timm's validate.py gets the device of the machine, unless `--device` is given.

    Its own default is cuda, on every machine.
    """
    command = _script(args)
    script = Path(args.script)
    is_validate = script.name == 'validate.py'
    has_device = "'--device'" in script.read_text(encoding='utf-8', errors='replace')  # a user's own script may not
    if is_validate and has_device and machine_device() != 'cuda':
        command[1:1] = ['--device', machine_device()]  # in front: the last --device counts, also an abbreviated one
    model = _value_of(args.script_args, '--model', '-m')
    # validate.py loads pretrained weights whenever it has no others
    pretrained = '--pretrained' in args.script_args or is_validate
    pretrained = pretrained and not _value_of(args.script_args, '--checkpoint', '--pretrained-path')
    if model:
        check_hub_model(model, pretrained)
    if model and pretrained:
        check_pretrained(model)
    read_as_seen()
    return command


def _value_of(script_args: Sequence[str], *names: str) -> Optional[str]:
    """Return the value of an option in the arguments of a script, None without it. Other options are ignored.

    If the option is given several times, the last one counts, as in argparse.
    """
    parser = Parser(prog='pvt-timm run', add_help=False, allow_abbrev=False)
    parser.add_argument(*names, dest='value', nargs='?')
    return parser.parse_known_args(script_args)[0].value


def _script(args: argparse.Namespace) -> List[str]:
    """Return the command line of a script."""
    if not Path(args.script).is_file():
        raise ValueError(f'No such script: {args.script}')
    return [args.script, *args.script_args]


def run_train(args: argparse.Namespace) -> List[str]:
    """Choose settings for this machine, find the checkpoint to continue from, and return the script's command line.

    Messages are printed on stderr at the end, because nothing may be printed before the one line of an error.
    """
    command = _script(args)
    parser = Parser(prog='pvt-timm train', add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument('-c', '--config')
    for name in _TEXT:
        parser.add_argument(f'--{name.replace("_", "-")}')
    for name in _NUMBERS:
        parser.add_argument(f'--{name.replace("_", "-")}', type=int)
    parser.add_argument('--amp', action='store_true')
    given = {**vars(parser.parse_known_args(args.script_args)[0]), **_length_and_weights(args.script_args)}
    settings = _read_config(given['config']) if 'config' in given else {}
    lines: List[str] = []
    device = {**settings, **given}.get('device')
    if device is not None:
        _check_device(device)
    machine = machine_settings(settings, given)
    settings.update(machine)
    now = {**settings, **given}
    if not now.get('experiment'):
        raise ValueError('Expected --experiment NAME (and --output DIR): a crashed training is continued from DIR/NAME')
    folder = Path(now.get('output') or './output/train', now['experiment'])
    if machine:
        lines.append('on this machine ' + ', '.join(f'{name}: {value}' for name, value in machine.items()))
    latest = None if now.get('resume') else latest_checkpoint(folder, lines.append, now)
    if latest is not None:
        end = _finished(latest, now)
        if end is not None:  # train.py would print an empty list of results
            _say(end)
            return []
        command += ['--resume', str(latest)]
    # train.py loads them also before it continues from a checkpoint
    pretrained = bool(now.get('pretrained')) and not (now.get('pretrained_path') or now.get('initial_checkpoint'))
    check_hub_model(now.get('model') or '', pretrained)
    if pretrained:
        check_pretrained(now.get('model') or '', '--pretrained-path')
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(settings, sort_keys=False).encode()
    save_atomically(folder / 'settings.yaml', lambda f: f.write(text))
    command += ['--config', str(folder / 'settings.yaml')]  # train.py uses the last --config
    read_as_seen()
    _keep_class_names(folder)
    _refuse_epochs_without_a_batch()
    if now.get('device') == 'cpu':
        _allow_cpu_processes()
        if now.get('amp') and now.get('amp_dtype') == 'bfloat16':
            timm.layers.set_fused_attn(False)  # a step is 1.15x as fast without, see benchmarks/README.md
    for line in lines:
        _say(line)
    return command


def _length_and_weights(script_args: Sequence[str]) -> Dict[str, Any]:
    """Return the options on the command line that say how long the run is and where its weights come from.

    Abbreviated options are ignored: train.py's `--lr` would be an abbreviation of `--lr-cycle-limit`.
    """
    parser = Parser(prog='pvt-timm train', add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for option, kind in _SCHEDULE.items():
        parser.add_argument(option, type=kind)
    for name in ('--pretrained-path', '--initial-checkpoint'):
        parser.add_argument(name)
    for name in ('--pretrained', '--warmup-prefix'):
        parser.add_argument(name, action='store_true')
    return vars(parser.parse_known_args(script_args)[0])


def _say(text: str) -> None:
    if os.environ.get('RANK', '0') == '0':
        print(f'pvt-timm: {clean(text, 1000)}', file=sys.stderr, flush=True)


def _read_config(config: str) -> Dict[str, Any]:
    """Return the settings of a YAML file, or of the recipe with that name.

    Settings that have to be text are checked. In YAML, `experiment: 2024` is a number, and train.py does not accept a
    number as a name.
    """
    file = Path(config) if Path(config).is_file() else RECIPES.get(config)
    if file is None:
        raise ValueError(f"Expected a YAML file or a recipe ({', '.join(RECIPES)}), got '{config}'")
    try:
        settings: Dict[str, Any] = {**yaml.safe_load(file.read_text(encoding='utf-8'))}
    except (yaml.YAMLError, TypeError) as e:
        raise ValueError(f'Expected names and values in {config}: {e}') from e
    for name in settings:
        if not isinstance(name, str):
            raise ValueError(f'Expected names and values in {config}, got {name!r} as a name: put it in quotes')
    for name in _TEXT:
        if not isinstance(settings.get(name, ''), (str, type(None))):
            raise ValueError(f'Expected text as {name} in {config}, got {settings[name]!r}: put it in quotes')
    return settings


def _check_device(device: str) -> None:
    try:
        torch.device(device)
    except RuntimeError as e:
        raise ValueError(f"Expected a device such as cpu, cuda or cuda:1, got '{device}'") from e


def machine_settings(settings: Dict[str, Any], given: Dict[str, Any]) -> Dict[str, Any]:
    """Return the device and mixed precision that suit this machine and differ from a config's `settings`.

    Settings that are `given` on the command line are not changed.
    """
    machine: Dict[str, Any] = {}
    device = {**settings, **given}.get('device')
    if device is None:
        device = machine_device()
        if device != 'cuda':  # train.py's default
            machine['device'] = device
    if settings.get('amp') and not given.keys() & {'amp', 'amp_dtype'}:
        if device == 'cpu' and not (torch.cpu._is_avx512_bf16_supported() or has_amx()):
            machine['amp'] = False  # bfloat16 would be emulated, many times slower than float32
        elif device == 'cpu':
            machine['amp_dtype'] = 'bfloat16'
        elif device.startswith('cuda') and not torch.cuda.is_bf16_supported(including_emulation=False):
            machine['amp_dtype'] = 'float16'
    return machine


def latest_checkpoint(
        folder: Path, say: Callable[[str], None] = _say, settings: Optional[Dict[str, Any]] = None) -> Optional[Path]:
    """Return the newest checkpoint in `folder` that can be read, None if there is no checkpoint at all.

    Only checkpoints from the end of an epoch are used. `recovery-*` files are ignored: they are from the middle of an
    epoch, and train.py would skip the rest of that epoch.

    Args:
        say: Called with a line for each checkpoint that cannot be read, and for the one that is returned.
        settings: Settings of the run that continues from the checkpoint. The model has to be the same.

    Raises:
        ValueError: There are checkpoints but none can be read, or the newest readable one has another model.
    """
    numbered = sorted(folder.glob('checkpoint-*.pth.tar'), key=lambda file: natural_key(file.name), reverse=True)
    broken: List[str] = []
    for file in filter(Path.is_file, [folder / 'last.pth.tar', *numbered]):  # last.pth.tar is a copy of the newest one
        try:
            state = read_checkpoint(file)
            if not {'epoch', 'optimizer'} <= state.keys():
                raise ValueError('it does not hold the epoch and the state of the optimizer')
        except (ValueError, OSError) as e:
            broken.append(f'{file}: {one_line(e)}')
            continue
        _check_same_model(file, state.get('args'), settings or {})
        for line in broken:
            say(f'this checkpoint is not used: {line}')
        say(f'going on after epoch {clean(state["epoch"], 20)} from {file}: weights, optimizer, learning rate and '
            f'weight decay are taken from this file, other values for them in the options or the config have no effect')
        return file
    if broken:
        raise ValueError(f'Cannot go on from {broken[0]} (to start anew, give another --experiment)')
    return None


def _check_same_model(file: Path, trained: Any, settings: Dict[str, Any]) -> None:
    """Refuse to continue if the model's settings in a checkpoint differ from those of the run.

    Settings that are not known for both of them are not compared.

    Args:
        file: The checkpoint.
        trained: The arguments that train.py saved in the checkpoint.
        settings: Settings of the run.
    """
    before = _model_settings(trained if isinstance(trained, dict) else {})
    now = _model_settings(settings)
    for name in before.keys() & now.keys():
        if before[name] != now[name]:
            option = name.replace('_', '-')
            raise ValueError(
                f'Cannot go on from {file}: it was trained with --{option} {clean(before[name], 60)}, now it is '
                f'{clean(now[name], 60)} (to start anew, give another --experiment)')


def _finished(latest: Path, now: Dict[str, Any]) -> Optional[str]:
    """Return a message if a run is finished: its latest checkpoint is from its last epoch. Otherwise return None.

    Args:
        latest: The latest checkpoint.
        now: Settings of the command line and the config. For those that are missing, the settings in the checkpoint
            are used.
    """
    state = read_checkpoint(latest)
    before = state.get('args')
    settings = {**(before if isinstance(before, dict) else {}), **now}
    epoch = state.get('epoch')
    if type(epoch) is not int or not {'epochs', 'sched'} <= settings.keys():
        return None
    # this setting does not change the number of epochs
    settings['sched_on_updates'] = False
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    try:
        epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(argparse.Namespace(**settings)))[1]
    except (AttributeError, TypeError, ValueError, AssertionError):  # train.py reports wrong settings itself
        return None
    if epoch + 1 < epochs:
        return None
    best = latest.with_name('model_best.pth.tar')
    weights = f'{best} (best epoch), {latest}' if best.is_file() else str(latest)
    return f'the run is finished, all {epochs} epochs are done: {weights}. To train for longer, give a larger --epochs'


def _model_settings(said: Dict[str, Any]) -> Dict[str, Any]:
    """Return the settings that the shapes of a model's weights depend on, as far as `said` has them.

    The number of classes is by default that of the model's pretrained weights.
    """
    found: Dict[str, Any] = {}
    if isinstance(said.get('model'), str):
        found['model'] = said['model'].partition('.')[0]  # without the tag, which only chooses weights to start from
        default: Any = get_pretrained_cfg(said['model'])
        if default is not None:
            found['num_classes'] = default.num_classes
    for name in _NUMBERS:
        if isinstance(said.get(name), int):
            found[name] = said[name]
    return found


def _keep_class_names(folder: Path) -> None:
    """Make timm's `create_dataset` save the names of the classes in `folder`. timm's checkpoints do not hold them."""
    create_dataset = timm.data.create_dataset

    def create(*args: Any, **kwargs: Any) -> Any:
        dataset = create_dataset(*args, **kwargs)
        class_to_idx = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
        if class_to_idx and kwargs.get('is_training'):
            content = labels_text([str(name) for name in sorted(class_to_idx, key=class_to_idx.get)])
            save_atomically(folder / LABELS_FILE, lambda f: f.write(content))
        return dataset

    timm.data.create_dataset = create


def _refuse_epochs_without_a_batch() -> None:
    """Make timm's `create_loader` end the command if the training set does not fill one batch in each process.

    timm leaves out the images that do not fill a batch. With fewer images than that it would train nothing, and not
    say so.
    """
    create_loader = timm.data.create_loader

    def create(dataset: Any, *args: Any, **kwargs: Any) -> Any:
        loader = create_loader(dataset, *args, **kwargs)
        if kwargs.get('is_training') and hasattr(dataset, '__len__') and not len(loader):
            count = torch.distributed.get_world_size() if kwargs.get('distributed') else 1
            # the script is running, outside of `run_command`: its errors would have a traceback
            _say(f'error: Expected at least {count * kwargs["batch_size"]} images to train on, one batch in each '
                 f'process, got {len(dataset)}: give a smaller --batch-size, and also --lr, because timm otherwise '
                 f'lowers the learning rate with the batch size')
            raise SystemExit(2)
        return loader

    timm.data.create_loader = create


def _allow_cpu_processes() -> None:
    """Make training with several processes work on a CPU.

    timm passes the device of the process to DistributedDataParallel, which refuses a CPU. So this argument is dropped.
    """
    ddp: Any = torch.nn.parallel.DistributedDataParallel
    init = ddp.__init__

    def without_devices(self: Any, module: Any, device_ids: Any = None, **kwargs: Any) -> None:
        if kwargs.get('broadcast_buffers'):
            del kwargs['broadcast_buffers']  # True is the default, and newer versions of torch warn of the argument
        init(self, module, **kwargs)

    ddp.__init__ = without_devices
