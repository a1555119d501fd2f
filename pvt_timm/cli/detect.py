""" The commands `detect` and `segment`: objects and regions of images, printed, as JSON and drawn. """
import argparse
import json
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image

from ..checkpoints import unwrap
from ..detection import (
    PvtMaskRCNN, PvtRetinaNet, describe_heads, faster_rcnn_from_mmdet, mask_rcnn_from_mmdet, retinanet_coco,
    retinanet_from_mmdet)
from ..files import read_checkpoint, save_atomically
from ..segmentation import SemanticFpn, semantic_fpn_from_mmseg
from .errors import UserError
from .predict import open_image

__all__ = ['add_detect', 'add_segment', 'draw_detections', 'draw_segments']

_LOADERS = {
    'RetinaNet': retinanet_from_mmdet,
    'Faster R-CNN': faster_rcnn_from_mmdet,
    'Mask R-CNN': mask_rcnn_from_mmdet,
    'Semantic FPN': semantic_fpn_from_mmseg,
}
# Told apart by most people with a colour deficiency too, and white text can be read on them
_COLORS = ('#d1495b', '#1f77b4', '#2a8c55', '#8e5bb5', '#b8741a', '#17808a', '#c2488f', '#5f6b2d', '#4455a8', '#7a4b3a')


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image files')
    parser.add_argument('--prefix', help='what stands before the names of the backbone, if the file has several')
    parser.add_argument('--output', type=Path, metavar='DIR', help='folder for pictures, one per image')
    parser.add_argument('--json', action='store_true', help='for machines')


def add_detect(subparsers: Any) -> None:
    parser = subparsers.add_parser('detect', help='find the objects in images')
    _add_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument('--model', default='pvt_small', metavar='NAME',
                       help="OpenMMLab's RetinaNet on pvt_tiny, pvt_small (default) or pvt_medium, trained on COCO")
    which.add_argument('--checkpoint', metavar='FILE',
                       help='a RetinaNet, Faster or Mask R-CNN of mmdetection or of the original code')
    parser.add_argument('--threshold', type=float, default=0.5, help='lowest score of an object (default 0.5)')
    parser.set_defaults(func=run_detect)


def add_segment(subparsers: Any) -> None:
    parser = subparsers.add_parser('segment', help='assign a class to every pixel of images')
    _add_arguments(parser)
    parser.add_argument('--checkpoint', required=True, metavar='FILE',
                        help='a Semantic FPN of mmsegmentation or of the original code')
    parser.set_defaults(func=run_segment)


def _load(path: str, command: str, prefix: Optional[str]) -> Any:
    checkpoint = read_checkpoint(path)
    found = describe_heads(unwrap(checkpoint)[0])
    wanted = 'segment' if found and found[0] == 'Semantic FPN' else 'detect'
    if found is None:
        raise UserError(
            f'{path} holds no RetinaNet, Faster R-CNN, Mask R-CNN or Semantic FPN of OpenMMLab or the original code')
    if wanted != command:
        raise UserError(f'{path} holds a {found[0]}: use `{wanted}`')
    return _LOADERS[found[0]](checkpoint, prefix=prefix)


def _prepare(args: argparse.Namespace) -> None:
    """Before weights are read or downloaded: the images are there, and so is the folder for pictures."""
    for path in args.images:
        os.stat(path)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        names = [_picture(args, path) for path in args.images]
        if len(set(names)) < len(names):
            raise UserError('Expected images of different names, as their pictures are called after them')


def _picture(args: argparse.Namespace, path: str) -> Path:
    return args.output / f'{Path(path).stem}_{args.command}.png'


def _tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


# detect ---------------------------------------------------------------------------------------------------------------

def run_detect(args: argparse.Namespace) -> None:
    _prepare(args)
    model = _load(args.checkpoint, 'detect', args.prefix) if args.checkpoint else retinanet_coco(args.model)
    results = []
    for path in args.images:
        image = open_image(path)
        with torch.inference_mode():
            found = model([_tensor(image)])[0]
        keep = found['scores'] >= args.threshold
        found = {k: v[keep] for k, v in found.items()}
        labels = [int(label) - model.first_label for label in found['labels']]
        names = [model.categories[i] if model.categories else f'class {i}' for i in labels]
        rows = [
            dict(label=i, name=name, score=round(score, 4), box=[round(x, 2) for x in box])
            for i, name, score, box in zip(labels, names, found['scores'].tolist(), found['boxes'].tolist())]
        for row, mask in zip(rows, found.get('masks', ())):
            row['mask'] = run_lengths(mask[0] >= 0.5)
        results.append(dict(image=str(path), width=image.width, height=image.height, objects=rows))
        if args.output:
            draw_detections(image, found, names, _picture(args, path))
        if not args.json:
            print(f'{path}: {len(rows)} objects' + (f', drawn in {_picture(args, path)}' if args.output else ''))
            for row in rows:
                print('  {:6.1%}  {}  at {}'.format(
                    row['score'], row['name'], ', '.join(f'{x:.0f}' for x in row['box'])), flush=True)
    if args.json:
        print(json.dumps(dict(model=_title(model), threshold=args.threshold, images=results), indent=2))


def _title(model: Any) -> str:
    kinds = ((PvtRetinaNet, 'RetinaNet'), (PvtMaskRCNN, 'Mask R-CNN'), (SemanticFpn, 'Semantic FPN'))
    return next((name for kind, name in kinds if isinstance(model, kind)), 'Faster R-CNN')


def run_lengths(mask: torch.Tensor) -> Dict[str, List[int]]:
    """A mask (H, W) as COCO's uncompressed run lengths: column by column, starting with those outside."""
    flat = mask.T.flatten().to(torch.int8)
    ends = torch.where(flat.diff(prepend=flat.new_zeros(1)))[0].tolist() + [len(flat)]
    return dict(size=list(mask.shape), counts=[end - start for start, end in zip([0, *ends], ends)])


def draw_detections(
        image: Image.Image,
        found: Dict[str, torch.Tensor],
        names: Sequence[str],
        output: Union[str, Path],
) -> None:
    """Draw objects over an image: boxes with names and scores, and masks where there are any.

    Args:
        image: The image.
        found: 'boxes' (N, 4), 'scores' (N,) and perhaps 'masks' (N, 1, H, W) from 0 to 1.
        names: Name of each object.
        output: File to write.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle
    kinds = sorted(set(names), key=lambda name: (-list(names).count(name), name))
    colors = [_COLORS[kinds.index(name) % len(_COLORS)] for name in names]
    pixels = np.asarray(image, dtype=np.float32) / 255
    for mask, color in zip(found.get('masks', ()), colors):
        on = mask[0].numpy() >= 0.5
        pixels[on] = 0.5 * pixels[on] + 0.5 * np.asarray(to_rgb(color))
    figure, axes, unit = _canvas(image)
    axes.imshow(pixels, interpolation='lanczos', extent=(0, image.width, image.height, 0))
    # the best one on top
    for (x1, y1, x2, y2), score, name, color in reversed(list(zip(
            found['boxes'].tolist(), found['scores'].tolist(), names, colors))):
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=2))
        above = y1 > 18 * unit  # else there is no room for the name above the box
        right = x1 > image.width - 110 * unit
        axes.text(
            x2 - 2 * unit if right else x1 + 2 * unit, y1 if above else y1 + 3 * unit, f'{name} {score:.0%}',
            fontsize=10, color='white', weight='bold', ha='right' if right else 'left',
            va='bottom' if above else 'top', clip_on=True,
            bbox=dict(facecolor=color, edgecolor=color, boxstyle='square,pad=0.2', linewidth=1))
    axes.set_xlim(0, image.width)
    axes.set_ylim(image.height, 0)
    save_atomically(output, lambda f: figure.savefig(f, format='png'))


# segment --------------------------------------------------------------------------------------------------------------

def run_segment(args: argparse.Namespace) -> None:
    _prepare(args)
    model = _load(args.checkpoint, 'segment', args.prefix)
    names = model.categories or [f'class {i}' for i in range(model.num_classes)]
    palette = model.palette or [_rgb(_COLORS[i % len(_COLORS)]) for i in range(model.num_classes)]
    results = []
    for path in args.images:
        image = open_image(path)
        labels = model.segment(_tensor(image))
        share = torch.bincount(labels.flatten(), minlength=model.num_classes) / labels.numel()
        order = [i for i in share.argsort(descending=True, stable=True).tolist() if share[i]]
        results.append(dict(image=str(path), width=image.width, height=image.height, classes=[
            dict(label=i, name=names[i], share=round(share[i].item(), 4)) for i in order]))
        if args.output:
            draw_segments(image, labels, names, palette, _picture(args, path))
        if not args.json:
            print(f'{path}: {len(order)} classes' + (f', drawn in {_picture(args, path)}' if args.output else ''))
            for i in order:
                print(f'  {share[i].item():6.1%}  {names[i]}', flush=True)
    if args.json:
        print(json.dumps(dict(model=_title(model), images=results), indent=2))


def _rgb(color: str) -> Tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def draw_segments(
        image: Image.Image,
        labels: torch.Tensor,
        names: Sequence[str],
        palette: Sequence[Tuple[int, ...]],
        output: Union[str, Path],
        most: int = 14,
) -> None:
    """Draw classes of pixels over an image, with a legend of the largest ones.

    Args:
        image: The image.
        labels: Class (H, W) of every pixel.
        names: Names of all classes.
        palette: Their colours, from 0 to 255.
        output: File to write.
        most: Most classes in the legend.
    """
    from matplotlib.patches import Patch
    colors = np.asarray(palette, dtype=np.float32) / 255
    classes, counts = labels.unique(return_counts=True)
    order = [int(classes[i]) for i in counts.argsort(descending=True)]
    pixels = 0.4 * np.asarray(image, dtype=np.float32) / 255 + 0.6 * colors[labels.numpy()]
    figure, axes, _ = _canvas(image, legend=True)
    axes.imshow(pixels, interpolation='nearest', extent=(0, image.width, image.height, 0))
    share = {int(c): int(n) / labels.numel() for c, n in zip(classes, counts)}
    handles = [Patch(facecolor=colors[i], label=f'{names[i].split(";")[0]}  {share[i]:.0%}') for i in order[:most]]
    if len(order) > most:
        rest = sum(share[i] for i in order[most:])
        handles.append(Patch(facecolor='none', label=f'and {len(order) - most} more  {rest:.0%}'))
    figure.legend(handles=handles, loc='outside right upper', frameon=False, fontsize=11, handlelength=1.2,
                  handleheight=1.2, labelspacing=0.6)
    save_atomically(output, lambda f: figure.savefig(f, format='png'))


def _canvas(image: Image.Image, legend: bool = False) -> Tuple[Any, Any, float]:
    """A figure of the image's shape, its axes, and how many pixels of the image a point is."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as e:
        raise UserError('Drawing needs the `draw` extra of pvt-timm: pip install matplotlib') from e
    width, height = image.size
    inches = 9 / max(width, height)
    size = max(width * inches, 2.), max(height * inches, 2.)
    figure = Figure(
        figsize=(size[0] + (2.4 if legend else 0), size[1]), dpi=150,
        layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axis_off()
    return figure, axes, 1 / (inches * 72)
