"""The training loop, the curves and the result files of shapes_detection.py and shapes_segmentation.py."""
import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import torch

from pvt_timm.files import save_atomically
from shapes import Sample, make_samples

History = Dict[str, List[Any]]


def parser(description: str, steps: int, batch_size: int, lr: float, eval_every: int) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument('--model', default='test_pvt', help='timm name of the backbone')
    out.add_argument('--pretrained', action=argparse.BooleanOptionalAction, default=True,
                     help='start from its pretrained weights, those of test_pvt come with the package')
    out.add_argument('--steps', type=int, default=steps)
    out.add_argument('--batch-size', type=int, default=batch_size)
    out.add_argument('--lr', type=float, default=lr)
    out.add_argument('--images', type=int, default=2000, help='training images')
    out.add_argument('--held-out', type=int, default=120)
    out.add_argument('--eval-every', type=int, default=eval_every)
    out.add_argument('--seed', type=int, default=0)
    out.add_argument('--output', type=Path, default=Path(__file__).resolve().parents[1] / 'results')
    return out


def train(
        model: torch.nn.Module,
        args: argparse.Namespace,
        sides: Sequence[int],
        loss_of: Callable[[List[Sample], bool], torch.Tensor],
        evaluate: Callable[[List[Sample]], Dict[str, Any]],
) -> Dict[str, Any]:
    """Train with AdamW and a one-cycle schedule.

    Args:
        model: What to train.
        args: Those of `parser`.
        sides: Shortest and longest side of the images.
        loss_of: Samples, and whether to flip them, to the loss.
        evaluate: Held-out samples to scores.

    Returns:
        'history' (the loss per step and scores with step and seconds), 'held_out' samples, 'seconds' and 'cpu_seconds'.
    """
    random.seed(args.seed)
    samples = make_samples(args.images, seed=args.seed + 1, low=sides[0], high=sides[1])
    held_out = make_samples(args.held_out, seed=args.seed + 2, low=sides[0], high=sides[1])
    optimizer = torch.optim.AdamW([
        dict(params=[p for p in model.parameters() if p.ndim > 1]),
        dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.)], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    history: History = dict(loss=[], held_out=[])
    start, start_cpu = time.perf_counter(), time.process_time()
    for step in range(1, args.steps + 1):
        model.train()
        loss = loss_of(random.sample(samples, args.batch_size), random.random() < 0.5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history['loss'].append(round(loss.item(), 4))
        if step % args.eval_every == 0 or step == args.steps:
            scores = evaluate(held_out)
            seconds = time.perf_counter() - start
            history['held_out'].append(dict(step=step, seconds=round(seconds, 1), **scores))
            recent = history['loss'][-25:]
            print(f'step {step} of {args.steps}  loss {sum(recent) / len(recent):.3f}  '
                  + '  '.join(f'{k} {v:.3f}' for k, v in scores.items()) + f'  {seconds:.0f} s', flush=True)
    return dict(
        history=history, held_out=held_out, seconds=round(time.perf_counter() - start, 1),
        cpu_seconds=round(time.process_time() - start_cpu, 1))


def write(name: str, args: argparse.Namespace, model: torch.nn.Module, run: Dict[str, Any]) -> None:
    """Write the figures of a run as `args.output/name.json`."""
    result = dict(
        config={k: v for k, v in vars(args).items() if k != 'output'}, seconds=run['seconds'],
        cpu_seconds=run['cpu_seconds'], threads=torch.get_num_threads(), load=os.getloadavg()[0],
        torch=torch.__version__, parameters=sum(p.numel() for p in model.parameters()),
        final=run['history']['held_out'][-1], history=run['history'])
    args.output.mkdir(parents=True, exist_ok=True)
    save_atomically(args.output / f'{name}.json', lambda f: f.write(json.dumps(result, indent=1).encode()))


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure and close it."""
    import matplotlib.pyplot as plt
    path.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(path, lambda f: figure.savefig(f, dpi=130, format='png'))
    plt.close(figure)


def draw_curve(
        history: History,
        lines: Dict[str, Dict[str, Any]],
        target: float,
        label: str,
        path: Path,
        title: str,
) -> None:
    """Loss beside the scores of held-out images.

    Args:
        history: Of `train`.
        lines: Name of a score to arguments of matplotlib's `plot`.
        target: Drawn as a dashed line.
        label: Of the axis of scores.
        path: File to write.
        title: Above both.
    """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    losses = history['loss']
    width = max(len(losses) // 40, 1)
    smooth = [sum(losses[max(0, i - width):i + 1]) / len(losses[max(0, i - width):i + 1]) for i in range(len(losses))]
    left.plot(range(1, len(losses) + 1), losses, color='#bbbbbb', lw=0.8, label='per step')
    left.plot(range(1, len(losses) + 1), smooth, color='#333333', lw=1.6, label=f'mean of {width + 1}')
    left.set(xlabel='step', ylabel='training loss', ylim=(0, sorted(losses)[int(0.99 * len(losses))] * 1.05))
    left.legend(frameon=False)
    steps = [row['step'] for row in history['held_out']]
    for name, style in lines.items():
        right.plot(steps, [row[name] for row in history['held_out']], **{'label': name, 'ms': 4, **style})
    right.axhline(target, color='#999999', lw=0.8, ls='--')
    right.annotate(str(target), (steps[0], target), textcoords='offset points', xytext=(2, 3), color='#777777',
                   fontsize=8)
    right.set(xlabel='step', ylabel=label, ylim=(0, 1))
    right.legend(frameon=False, loc='lower right')
    for axis in (left, right):
        axis.spines[['top', 'right']].set_visible(False)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)
