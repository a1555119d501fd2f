""" The commands `detect` and `segment`: objects and regions of images, printed, as JSON and drawn. """
import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image, ImageColor
from torchvision.transforms.functional import to_tensor

from ..detection import detector_from_mmdet, retinanet_coco
from ..files import save_atomically
from ..segmentation import semantic_fpn_from_mmseg
from .errors import clean
from .pictures import new_figure, picture_text
from .predict import open_image

__all__ = ['draw_detections', 'draw_segments', 'run_detect', 'run_segment']

Rows = List[Dict[str, Any]]

# Told apart by most people with a colour deficiency too, and white text can be read on them
_COLORS = ('#d1495b', '#1f77b4', '#2a8c55', '#8e5bb5', '#b8741a', '#17808a', '#c2488f', '#5f6b2d', '#4455a8', '#7a4b3a')


def run_detect(args: argparse.Namespace) -> None:
    _run(args, _load_detector, _detect, 'objects')


def run_segment(args: argparse.Namespace) -> None:
    _run(args, lambda args: semantic_fpn_from_mmseg(args.checkpoint, args.prefix), _segment, 'classes')


def _run(args: argparse.Namespace, load: Callable[..., Any], find: Callable[..., Rows], key: str) -> None:
    for path in args.images:  # before weights are read or downloaded
        os.stat(path)
    pictures = {path: args.output / f'{Path(path).stem}_{args.command}.png' for path in args.images if args.output}
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        if len(set(pictures.values())) < len(args.images):
            raise ValueError('Expected images of different names, as their pictures are called after them')
    model = load(args)
    results = []
    for path in args.images:
        image = open_image(path)
        rows = find(model, image, args, pictures.get(path))
        results.append({'image': path, 'width': image.width, 'height': image.height, key: rows})
        if not args.json:
            drawn = f', drawn in {clean(pictures[path], 4096)}' if pictures else ''
            print(f'{clean(path, 4096)}: {len(rows)} {key}{drawn}')
            for row in rows:
                at = '  at ' + ', '.join(f'{x:.0f}' for x in row['box']) if 'box' in row else ''
                print(f'  {row.get("score", row.get("share")):6.1%}  {clean(row["name"])}{at}', flush=True)
    if args.json:
        print(json.dumps(dict(model=type(model).__name__.removeprefix('Pvt'), images=results), indent=2))


def _load_detector(args: argparse.Namespace) -> Any:
    if args.checkpoint is None:
        return retinanet_coco(args.model.removesuffix('.retinanet_coco'))
    return detector_from_mmdet(args.checkpoint, args.prefix)


def _detect(model: Any, image: Image.Image, args: argparse.Namespace, picture: Optional[Path]) -> Rows:
    with torch.inference_mode():
        found = model([to_tensor(image)])[0]
    keep = found['scores'] >= args.threshold
    found = {k: v[keep] for k, v in found.items()}
    labels = (found['labels'] - model.first_label).tolist()
    rows: Rows = [
        dict(label=i, name=model.categories[i] if model.categories else f'class {i}', score=round(score, 4),
             box=[round(x, 2) for x in box])
        for i, score, box in zip(labels, found['scores'].tolist(), found['boxes'].tolist())]
    masks = [mask[0] >= 0.5 for mask in found.get('masks', ())]
    for row, mask in zip(rows, masks):
        row['mask'] = run_lengths(mask)
    if picture:
        draw_detections(image, rows, masks, picture)
    return rows


def run_lengths(mask: torch.Tensor) -> Dict[str, List[int]]:
    """A mask (H, W) as COCO's uncompressed run lengths: column by column, starting with those outside."""
    values, counts = mask.T.flatten().unique_consecutive(return_counts=True)
    return dict(size=list(mask.shape), counts=[0] * int(values[0]) + counts.tolist())


def draw_detections(image: Image.Image, objects: Rows, masks: Sequence[torch.Tensor], output: Path) -> None:
    """Draw objects, the best one first, over an image: boxes with names and scores, and masks (H, W) if any."""
    kinds = list(dict.fromkeys(row['name'] for row in objects))
    colors = [_COLORS[kinds.index(row['name']) % len(_COLORS)] for row in objects]
    pixels = np.array(image)
    for mask, color in zip(masks, colors):
        pixels[mask.numpy()] = (pixels[mask.numpy()] + np.array(ImageColor.getrgb(color))) / 2
    with _picture(pixels, output, 'lanczos') as axes:
        for row, color in reversed(list(zip(objects, colors))):
            x1, y1, x2, y2 = row['box']
            axes.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=color, linewidth=2)
            axes.annotate(
                f'{picture_text(row["name"], 60)} {row["score"]:.0%}', (x1, y1), (2, 2), textcoords='offset points',
                va='bottom', color='white', weight='bold', bbox=dict(color=color, boxstyle='square,pad=0.2'),
                annotation_clip=False)


def _segment(model: Any, image: Image.Image, args: argparse.Namespace, picture: Optional[Path]) -> Rows:
    labels = model.segment(to_tensor(image))
    counts = labels.flatten().bincount()
    names = model.categories or [f'class {i}' for i in range(model.num_classes)]
    rows: Rows = [
        dict(label=i, name=names[i], share=round(counts[i].item() / labels.numel(), 4))
        for i in counts.argsort(descending=True, stable=True).tolist() if counts[i]]
    if picture:
        palette = model.palette or [ImageColor.getrgb(_COLORS[i % len(_COLORS)]) for i in range(model.num_classes)]
        draw_segments(image, labels, rows, palette, picture)
    return rows


def draw_segments(
        image: Image.Image, labels: torch.Tensor, classes: Rows, palette: Sequence[Tuple[int, ...]], output: Path,
) -> None:
    """Draw the class (H, W) of every pixel over an image, with a legend of the first 14 of `classes`."""
    colors = np.array(palette)
    pixels = (0.4 * np.array(image) + 0.6 * colors[labels.numpy()]).astype(np.uint8)
    handles, texts = [], []
    with _picture(pixels, output, 'nearest') as axes:
        for row in classes[:14]:
            texts.append(f'{picture_text(row["name"].split(";")[0], 60)}  {row["share"]:.0%}')
            handles.append(axes.scatter([], [], s=120, marker='s', color=colors[row['label']] / 255))
        if len(classes) > 14:
            texts.append(f'and {len(classes) - 14} more')
            handles.append(axes.scatter([], [], alpha=0))
        axes.legend(
            handles, texts, loc='upper left', bbox_to_anchor=(1, 1), frameon=False, fontsize=11, borderaxespad=0)


@contextlib.contextmanager
def _picture(pixels: np.ndarray, output: Path, interpolation: str) -> Iterator[Any]:
    """Axes over an image in which a unit is a pixel of it, written as a picture at the end."""
    figure = new_figure(figsize=(9, 9))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(pixels, interpolation=interpolation, extent=(0, pixels.shape[1], pixels.shape[0], 0))
    axes.set_axis_off()
    axes.autoscale(False)
    yield axes
    save_atomically(output, lambda f: figure.savefig(f, format='png', bbox_inches='tight', pad_inches=0.05))
