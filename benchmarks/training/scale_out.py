""" Compare training in one process and in two, and kill a worker, with timm's train.py and torchrun on one machine.

    TIMM_CHECKOUT=... python benchmarks/training/scale_out.py

Writes results/scale_out.json and results/scale_out.png. Takes about 10 minutes on 2 cores. Three runs on the digits:
- whole: every step uses all 640 images, so one and two processes must follow the same curve, apart from rounding;
- batches: the digits recipe with 64 images per step. One and two processes draw different batches, so their curves
  agree only roughly;
- killed: two processes, one killed with SIGKILL in the middle of an epoch, against the same run without that.
"""
import argparse
import json
import platform
import re
import tempfile
import time
from pathlib import Path
from typing import Any, Dict

import torch

from pvt_timm.files import save_atomically

from training_runs import read_steps, read_summary, run, small_copy, worker

RESULTS = Path(__file__).resolve().parents[1] / 'results'

# No random numbers during training, so that runs can be compared number by number.
EXACT = ['--no-aug', '--drop-path', '0', '--smoothing', '0', '--log-interval', '1', '--workers', '1']


def whole(data: Path, output: Path, epochs: int = 40, images: int = 640) -> Dict[str, Any]:
    """Train with all images in every step, in one process and in two."""
    results = {}
    for processes in (1, 2):
        name = f'whole{processes}'
        args = ['--config', 'digits', '--data-dir', data, '--output', output, '--experiment', name, *EXACT,
                '--batch-size', images // processes, '--epochs', epochs, '--warmup-epochs', '5', '--model-ema',
                '--model-ema-decay', '0.9']
        run(args, processes)
        results[f'processes{processes}'] = [row['train_loss'] for row in read_summary(output / name).values()]
    one, two = results['processes1'], results['processes2']
    results['largest_difference'] = max(abs(a - b) for a, b in zip(one, two))
    states = [load_state(output / f'whole{p}')['state_dict'] for p in (1, 2)]
    results['largest_weight_difference'] = max(float((states[0][k] - states[1][k]).abs().max()) for k in states[0])
    return results


def batches(data: Path, output: Path, epochs: int = 20) -> Dict[str, Any]:
    """Train with the digits recipe, in one process and in two, and in one with another seed for comparison."""
    results = {}
    for name, processes, seed in (('processes1', 1, 0), ('processes2', 2, 0), ('processes1_other_seed', 1, 1)):
        args = ['--config', 'digits', '--data-dir', data, '--output', output, '--experiment', f'batches_{name}',
                '--batch-size', 64 // processes, '--epochs', epochs, '--seed', seed]
        run(args, processes)
        rows = read_summary(output / f'batches_{name}').values()
        results[name] = [row['train_loss'] for row in rows]
        results[f'{name}_top1'] = [row['eval_top1'] for row in rows]
    for name in ('processes2', 'processes1_other_seed'):
        results[f'largest_difference_{name}'] = max(abs(a - b) for a, b in zip(results['processes1'], results[name]))
    return results


def load_state(folder: Path) -> Dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(folder / 'last.pth.tar', map_location='cpu', weights_only=True)


def largest_difference(a: Any, b: Any) -> float:
    """Return the largest difference of all numbers in two structures of the same shape."""
    if isinstance(a, torch.Tensor):
        return float((a.double() - b.double()).abs().max()) if a.numel() else 0.
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f'{a.keys()} != {b.keys()}'
        return max((largest_difference(a[k], b[k]) for k in a), default=0.)
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        return max((largest_difference(x, y) for x, y in zip(a, b)), default=0.)
    if isinstance(a, (int, float)) and not isinstance(a, bool):
        return abs(a - b)
    assert a == b, f'{a} != {b}'
    return 0.


def killed(data: Path, output: Path, epochs: int = 6, kill_epoch: int = 3, batch_size: int = 8) -> Dict[str, Any]:
    """Train in two processes, once with one of them killed in the middle of an epoch and once without."""
    args = ['--config', 'digits', '--data-dir', data, '--output', output, *EXACT, '--batch-size', batch_size,
            '--epochs', epochs, '--warmup-epochs', '2', '--model-ema', '--model-ema-decay', '0.9']
    alone = run([*args, '--experiment', 'alone'], 2)

    event: Dict[str, Any] = {}

    def on_line(line, process):
        match = re.search(r'Train: (\d+) \[ *(\d+)/(\d+)', line)
        if match and not event and int(match[1]) == kill_epoch and int(match[2]) >= int(match[3]) // 3:
            victim = worker(process, rank=1)
            victim.kill()  # SIGKILL
            event.update(killed=time.monotonic(), pid=victim.pid)
        if match and event and 'again' not in event and int(match[2]) == 0:
            event['again'] = time.monotonic()

    log = run([*args, '--experiment', 'killed'], 2, max_restarts=2, on_line=on_line)
    assert event, 'nothing was killed'
    (output / 'killed.log').write_text(log)
    steps = read_steps(log)
    # after the restart, the first step of the epoch is there a second time
    restart = next(i for i in range(1, len(steps)) if steps[i]['epoch'] == kill_epoch and steps[i]['step'] == 0 and
                   steps[i - 1]['epoch'] == kill_epoch)
    rows, rows_alone = read_summary(output / 'killed'), read_summary(output / 'alone')
    state, state_alone = load_state(output / 'killed'), load_state(output / 'alone')
    return {
        'before_kill': steps[restart - 1],
        'after_restart': steps[restart],
        'same_step_left_alone': next(s for s in read_steps(alone) if s['epoch'] == kill_epoch and s['step'] == 0),
        'seconds_until_training_again': round(event['again'] - event['killed'], 1),
        'restarts': len(re.findall('going on after epoch', log)),
        'resumed_after_epoch': int(re.search(r'going on after epoch (\d+)', log)[1]),
        'train_loss': [row['train_loss'] for row in rows.values()],
        'train_loss_left_alone': [row['train_loss'] for row in rows_alone.values()],
        'learning_rate': [row['lr'] for row in rows.values()],
        'learning_rate_left_alone': [row['lr'] for row in rows_alone.values()],
        'top1': [row['eval_top1'] for row in rows.values()],
        'top1_left_alone': [row['eval_top1'] for row in rows_alone.values()],
        'largest_difference': {
            'loss': max(abs(rows[e]['train_loss'] - rows_alone[e]['train_loss']) for e in rows_alone),
            'weights': largest_difference(state['state_dict'], state_alone['state_dict']),
            'average': largest_difference(state['state_dict_ema'], state_alone['state_dict_ema']),
            'optimizer': largest_difference(state['optimizer'], state_alone['optimizer']),
        },
        'epochs_trained': [state['epoch'] + 1, state_alone['epoch'] + 1],
    }


def draw(results: Dict[str, Any], file: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    r = results['whole']
    axes[0].plot(r['processes1'], label='1 process', lw=3, color='tab:blue', alpha=0.4)
    axes[0].plot(r['processes2'], label='2 processes', lw=1, color='tab:red')
    axes[0].set_title(f'All images in every step\nlargest difference {r["largest_difference"]:.1e}', fontsize=10)
    r = results['batches']
    axes[1].plot(r['processes1'], label='1 process', color='tab:blue')
    axes[1].plot(r['processes2'], label='2 processes', color='tab:red')
    axes[1].plot(r['processes1_other_seed'], label='1 process, other seed', color='tab:gray', ls=':')
    axes[1].set_title('Digits recipe, 64 images per step', fontsize=10)
    r = results['killed']
    axes[2].plot(r['train_loss_left_alone'], label='left alone', lw=3, color='tab:blue', alpha=0.4)
    axes[2].plot(r['train_loss'], label='killed and resumed', lw=1, color='tab:red', marker='.')
    k = r['before_kill']
    axes[2].axvline(
        k['epoch'] - 1 + k['step'] / k['steps'], color='k', ls='--', lw=0.8, label='SIGKILL')
    axes[2].set_title(f'A worker killed in epoch {k["epoch"]}, step {k["step"]} of {k["steps"]}\n'
                      f'largest difference {r["largest_difference"]["loss"]:.1e}', fontsize=10)
    for ax in axes:
        ax.set_xlabel('epoch')
        ax.set_ylabel('training loss')
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=9)
    save_atomically(file, lambda f: fig.savefig(f, dpi=110, format='png'))
    plt.close(fig)


def main() -> None:
    import timm
    from pvt_timm.digits import write_digits
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--redraw', action='store_true', help='only draw the results again')
    parser.add_argument('--work', metavar='DIR', help="where to make the runs' temporary folder (default as usual)")
    args = parser.parse_args()
    file = RESULTS / 'scale_out.json'
    if not args.redraw:
        results = {'torch': torch.__version__, 'timm': timm.__version__, 'machine': platform.processor() or 'CPU'}
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            folder = Path(folder)
            data = write_digits(folder / 'digits')
            small = small_copy(data, folder / 'small', 64, 16)
            results['killed'] = killed(small, folder)
            results['whole'] = whole(small, folder)
            results['batches'] = batches(data, folder)
        save_atomically(file, lambda f: f.write((json.dumps(results, indent=1) + '\n').encode()))
    results = json.loads(file.read_text())
    draw(results, RESULTS / 'scale_out.png')
    print(json.dumps({k: {n: v for n, v in r.items() if not isinstance(v, list)} if isinstance(r, dict) else r
                      for k, r in results.items()}, indent=1))


if __name__ == '__main__':
    main()
