"""Train Semantic FPN on PVT with generated shapes, and measure mIoU.

    python benchmarks/demos/shapes_segmentation.py
    python benchmarks/demos/shapes_segmentation.py --model pvt_tiny --no-pretrained
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from pvt_timm.segmentation import semantic_fpn
from shapes import CLASSES, COLORS
from shapes_training import draw_curve, parser, save_figure, train, write

NAMES = ('background', *CLASSES)
SIZE = 128

def batch_of(samples):
    """Images normalised as timm does, and their classes."""
    images = torch.stack([s.tensor() for s in samples])
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images - mean) / std, torch.stack([torch.from_numpy(s.semantic) for s in samples])


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
    save_figure(fig, path)


def main() -> None:
    args = parser(__doc__, steps=4000, batch_size=16, lr=3e-3, eval_every=200).parse_args()

    torch.manual_seed(args.seed)
    model = semantic_fpn(
        args.model, len(NAMES), pretrained_backbone=args.pretrained, out_channels=64, channels=64,
        model_args=dict(img_size=SIZE))

    def loss_of(samples, flip):
        images, masks = batch_of(samples)
        if flip:
            images, masks = images.flip(3), masks.flip(2)
        return F.cross_entropy(model(images), masks)

    def evaluate(samples):
        iou = iou_of(segment(model, samples), batch_of(samples)[1], len(NAMES))
        return dict(mIoU=sum(iou) / len(iou), **dict(zip(NAMES, iou)))

    run = train(model, args, (SIZE, SIZE), loss_of, evaluate)
    name = 'shapes_semantic_fpn'
    write(name, args, model, run)
    lines = {n: dict(color=c, lw=1) for n, c in zip(NAMES, ('#999999', *COLORS))}
    lines['mIoU'] = dict(color='#222222', marker='o')
    draw_curve(
        run['history'], lines, 0.8, 'IoU, held-out images', args.output / f'{name}_curve.png',
        f'Semantic FPN on {args.model}, {args.images} generated images, {run["cpu_seconds"] / 60:.1f} CPU minutes')
    some = run['held_out'][:8]
    draw_masks(some, segment(model, some), args.output / f'{name}.png',
               f"Semantic FPN on {args.model}: held-out images, mIoU {run['history']['held_out'][-1]['mIoU']:.2f}")


if __name__ == '__main__':
    main()
