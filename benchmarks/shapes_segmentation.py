"""Train a segmentation_models_pytorch decoder on PVT features with generated shapes, and measure mIoU.

    python benchmarks/shapes_segmentation.py
    python benchmarks/shapes_segmentation.py --decoder Unet --model pvt_tiny
"""
import argparse
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F

import pvt_timm  # noqa: F401  registers the models
from shapes import CLASSES, COLORS, make_samples

SIZE = 128
DECODERS = {  # narrow ones, the defaults take most of the time
    'FPN': dict(decoder_pyramid_channels=64, decoder_segmentation_channels=64),
    'Unet': dict(decoder_channels=(128, 64, 48, 32, 16)),
    'UPerNet': dict(decoder_channels=64),
    'Segformer': dict(decoder_segmentation_channels=64),
    # takes a whole model, not a features_only one
    'DPT': dict(decoder_intermediate_channels=(48, 64, 96, 128), decoder_fusion_channels=64,
                class_token=False, num_classes=0, decoder_readout='ignore'),
}


def batch_of(samples):
    return torch.stack([s.tensor() for s in samples]), torch.stack([torch.from_numpy(s.semantic) for s in samples])


@torch.no_grad()
def segment(model, samples, batch_size: int = 32):
    model.eval()
    return torch.cat([
        model(batch_of(samples[i:i + batch_size])[0]).argmax(dim=1) for i in range(0, len(samples), batch_size)])


def iou_of(predicted: torch.Tensor, truth: torch.Tensor, num_classes: int):
    """IoU per class over all pixels of all images."""
    counts = torch.bincount((truth * num_classes + predicted).flatten(), minlength=num_classes ** 2)
    counts = counts.reshape(num_classes, num_classes).double()
    both = counts.diag()
    return (both / (counts.sum(dim=0) + counts.sum(dim=1) - both).clamp(min=1)).tolist()


def draw_curve(history, path: Path, title: str) -> None:
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    losses = history['loss']
    left.plot(range(1, len(losses) + 1), losses, color='#333333', lw=0.9)
    left.set(xlabel='step', ylabel='training loss', ylim=(0, None))
    steps = [row['step'] for row in history['held_out']]
    for n, (name, color) in enumerate(zip(('background', *CLASSES), ('#999999', *COLORS))):
        right.plot(steps, [row['iou'][n] for row in history['held_out']], color=color, lw=1, label=name)
    right.plot(steps, [row['miou'] for row in history['held_out']], '-o', color='#222222', ms=4, label='mean')
    right.axhline(0.8, color='#999999', lw=0.8, ls='--')
    right.annotate('0.8', (steps[0], 0.8), textcoords='offset points', xytext=(2, 3), color='#777777', fontsize=8)
    right.set(xlabel='step', ylabel='IoU, held-out images', ylim=(0, 1))
    right.legend(frameon=False, loc='lower right')
    for ax in (left, right):
        ax.spines[['top', 'right']].set_visible(False)
    fig.suptitle(title, fontsize=11)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def draw_masks(samples, predicted, path: Path, title: str) -> None:
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch
    palette = np.asarray([(0.93, 0.93, 0.93), *map(to_rgb, COLORS)])
    rows = ('image', 'annotated', 'predicted')
    fig, axes = plt.subplots(3, len(samples), figsize=(1.55 * len(samples), 5.4), constrained_layout=True)
    for column, (sample, found) in enumerate(zip(samples, predicted)):
        for row, picture in enumerate((sample.image, palette[sample.semantic], palette[found.numpy()])):
            axes[row, column].imshow(picture, interpolation='nearest')
            axes[row, column].set(xticks=[], yticks=[])
            axes[row, column].spines[:].set_visible(False)
    for ax, name in zip(axes[:, 0], rows):
        ax.set_ylabel(name)
    fig.legend(handles=[Patch(color=c, label=n) for n, c in zip(CLASSES, COLORS)], loc='outside lower center',
               ncols=3, frameon=False)
    fig.suptitle(title, fontsize=11)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--decoder', choices=list(DECODERS), default='FPN')
    parser.add_argument('--model', default='test_pvt', help='timm name of the backbone')
    parser.add_argument('--steps', type=int, default=1000)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--lr', type=float, default=1.5e-3)
    parser.add_argument('--images', type=int, default=2000, help='training images')
    parser.add_argument('--held-out', type=int, default=120)
    parser.add_argument('--eval-every', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', type=Path, default=Path(__file__).parent / 'results')
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    random.seed(args.seed)
    num_classes = len(CLASSES) + 1
    train = make_samples(args.images, seed=args.seed + 1, low=SIZE, high=SIZE)
    held_out = make_samples(args.held_out, seed=args.seed + 2, low=SIZE, high=SIZE)
    truth = batch_of(held_out)[1]
    model = getattr(smp, args.decoder)(
        f'tu-{args.model}', encoder_weights=None, classes=num_classes, **DECODERS[args.decoder])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)

    start, start_cpu = time.perf_counter(), time.process_time()
    history = dict(loss=[], held_out=[])
    for step in range(1, args.steps + 1):
        model.train()
        images, masks = batch_of(random.sample(train, args.batch_size))
        if random.random() < 0.5:
            images, masks = images.flip(3), masks.flip(2)
        loss = F.cross_entropy(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history['loss'].append(round(loss.item(), 4))
        if step % args.eval_every == 0 or step == args.steps:
            predicted = segment(model, held_out)
            iou = iou_of(predicted, truth, num_classes)
            miou = sum(iou) / num_classes
            history['held_out'].append(
                dict(step=step, seconds=round(time.perf_counter() - start, 1), miou=miou, iou=iou))
            print(f'step {step}  loss {loss.item():.3f}  mIoU {miou:.3f}  {time.perf_counter() - start:.0f} s, '
                  f'{time.process_time() - start_cpu:.0f} s of CPU',
                  flush=True)

    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    args.output.mkdir(parents=True, exist_ok=True)
    name = f'shapes_{args.decoder.lower()}'
    final = history['held_out'][-1]
    title = f'{args.decoder} on {args.model}, {args.images} generated images, {cpu_seconds / 60:.1f} CPU minutes'
    draw_curve(history, args.output / f'{name}_curve.png', title)
    draw_masks(held_out[:8], predicted[:8], args.output / f'{name}.png',
               f"{args.decoder} on {args.model}: held-out images, mIoU {final['miou']:.2f}")
    result = dict(
        config={k: v for k, v in vars(args).items() if k != 'output'}, seconds=round(seconds, 1),
        cpu_seconds=round(cpu_seconds, 1), threads=torch.get_num_threads(), load=os.getloadavg()[0],
        torch=torch.__version__, smp=smp.__version__,
        parameters=sum(p.numel() for p in model.parameters()), final=final, history=history)
    path = args.output / f'{name}.json'
    path.with_suffix('.tmp').write_text(json.dumps(result, indent=1))
    os.replace(path.with_suffix('.tmp'), path)


if __name__ == '__main__':
    main()
