""" Fine-tuning PVT-Tiny with a new head at 64 pixels, frozen and unfrozen, with timm's train.py.

    TIMM_CHECKOUT=... python benchmarks/training/finetune.py

The published weights need a network, so the start is trained here: PVT-Tiny on the digits 0 to 4. Then a new head for
the digits 5 to 9 is trained with the `finetune` recipe, once with a frozen backbone and once without. Writes
results/finetune.json and results/finetune.png. Takes about 5 minutes on 2 free cores.
"""
import argparse
import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict

import torch

from training_runs import read_summary, run

from pvt_timm.files import save_atomically

# With these options only the head is trained: timm does not train layers whose share of the learning rate is below 0.5
FREEZE = ('--layer-decay', '0.01', '--layer-decay-no-opt-scale', '0.5', '--drop-path', '0')

RESULTS = Path(__file__).resolve().parents[1] / 'results'


def half(source: Path, target: Path, labels: range, train: int, validation: int) -> Path:
    """Copy the first images of some of the digits into a new image folder, and return this folder."""
    for split, count in (('train', train), ('validation', validation)):
        for label in labels:
            folder = target / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted((source / split / str(label)).iterdir())[:count]:
                shutil.copy(file, folder)
    return target


def finetune(data: Path, output: Path, epochs: int = 8, start_epochs: int = 8, train: int = 80) -> Dict[str, Any]:
    first = half(data, output / 'digits04', range(5), train, 36)
    second = half(data, output / 'digits59', range(5, 10), train // 2, 36)
    common = ['--model', 'pvt_tiny', '--num-classes', '5', '--img-size', '64', '--device', 'cpu', '--workers', '1',
              '--batch-size', '20', '--output', output, '--hflip', '0', '--seed', '0', '--checkpoint-hist', '1']
    scratch = ['--config', 'digits', *common, '--lr', '5e-4', '--drop-path', '0', '--amp', '--amp-dtype', 'bfloat16']
    tune = ['--config', 'finetune', *common, '--data-dir', second, '--epochs', epochs, '--warmup-epochs', '1',
            '--pretrained-path', output / 'start' / 'last.pth.tar']
    runs = {
        'start': [*scratch, '--data-dir', first, '--epochs', start_epochs, '--warmup-epochs', '1'],
        'frozen': [*tune, '--lr', '5e-3', *FREEZE],
        'unfrozen': [*tune, '--lr', '5e-4'],
    }
    results: Dict[str, Any] = {'train_images': {'start': 5 * train, 'others': 5 * (train // 2)}, 'held_out': 180}
    for name, args in runs.items():
        run([*args, '--experiment', name], timeout=1800)
        rows = read_summary(output / name).values()
        results[name] = {key: [round(row[key], 5) for row in rows] for key in ('train_loss', 'eval_loss', 'eval_top1')}
        print(name, results[name], flush=True)
    with torch.serialization.safe_globals([argparse.Namespace]):
        weights = {name: torch.load(output / name / 'last.pth.tar', map_location='cpu', weights_only=True)['state_dict']
                   for name in ('start', 'frozen', 'unfrozen')}
    for name in ('frozen', 'unfrozen'):
        results[name]['changed'] = sum(
            not torch.equal(w, weights['start'][k]) for k, w in weights[name].items() if not k.startswith('head.'))
    results['backbone_parameters'] = sum(not k.startswith('head.') for k in weights['start'])
    return results


def draw(results: Dict[str, Any], file: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), constrained_layout=True)
    for name, label, color in (('unfrozen', 'all layers', 'tab:red'), ('frozen', 'head only', 'tab:blue')):
        r = results[name]
        epochs = range(1, len(r['train_loss']) + 1)
        axes[0].plot(epochs, r['train_loss'], color=color, label=label, marker='.')
        axes[1].plot(epochs, r['eval_top1'], color=color, label=label, marker='.')
    axes[0].set_ylabel('training loss')
    axes[1].set_ylabel('top-1 on 180 held-out digits (%)')
    axes[1].axhline(20, color='k', lw=0.8, ls=':', label='chance')
    for ax in axes:
        ax.set_xlabel('epoch')
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=9)
    fig.suptitle('PVT-Tiny at 64 pixels, trained on digits 0 to 4, with a new head for 5 to 9', fontsize=10)
    save_atomically(file, lambda f: fig.savefig(f, dpi=110, format='png'))
    plt.close(fig)


def main() -> None:
    import timm
    from pvt_timm.digits import write_digits
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--redraw', action='store_true', help='only draw the results again')
    parser.add_argument('--work', metavar='DIR', help='folder that keeps the files of the runs, to continue from them')
    args = parser.parse_args()
    file = RESULTS / 'finetune.json'
    if not args.redraw:
        with contextlib.ExitStack() as stack:
            work = Path(args.work or stack.enter_context(tempfile.TemporaryDirectory()))
            data = work / 'digits'
            results = finetune(data if data.exists() else write_digits(data), work)
        results.update(torch=torch.__version__, timm=timm.__version__)
        RESULTS.mkdir(exist_ok=True)
        save_atomically(file, lambda f: f.write((json.dumps(results, indent=1) + '\n').encode()))
    draw(json.loads(file.read_text()), RESULTS / 'finetune.png')


if __name__ == '__main__':
    main()
