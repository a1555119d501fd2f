""" The commands `detect` and `segment`: objects and regions of images, printed, as JSON and drawn. """
import argparse
import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from ..detection import coco_categories, retinanet_coco
from ..training.checkpoints import load_any
from .errors import clean
from .overlays import SMALLEST_SHARE, draw_detections, draw_segments
from .predict import check_finite, check_in_chans, open_image, refusing_overflow

__all__ = ['coco_results', 'run_detect', 'run_segment']

Rows = List[Dict[str, Any]]


def run_detect(args: argparse.Namespace) -> None:
    if args.prefix is not None and not args.checkpoint:
        raise ValueError('Expected --checkpoint with --prefix, the models of --model have one detector each')
    if args.format == 'coco' and not args.json:
        raise ValueError('Expected --json with --format coco')
    _run(args, _load_detector, _detect, 'objects')


def run_segment(args: argparse.Namespace) -> None:
    args.format = 'plain'
    _run(args, lambda args: load_any(args.checkpoint, 'segmenter', args.prefix), _segment, 'classes')


def _run(args: argparse.Namespace, load: Callable[..., Any], find: Callable[..., Rows], key: str) -> None:
    for path in args.images:  # before weights are read or downloaded
        os.stat(path)
    pictures = {path: args.output / f'{Path(path).stem}_{args.command}.png' for path in args.images if args.output}
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        if len(set(pictures.values())) < len(args.images):
            raise ValueError('Expected images of different names, as their pictures are called after them')
    model = load(args)
    name = Path(args.checkpoint).name if args.checkpoint else args.model
    check_in_chans(model.in_chans, name)
    check_finite(model, name)
    results = []
    for path in args.images:
        image = open_image(path, model.in_chans)
        with refusing_overflow(model, name):
            rows = find(model, image, args, pictures.get(path))
        results.append({'image': path, 'width': image.width, 'height': image.height, key: rows})
        if not args.json:
            _print(path, rows, key, pictures)
    if args.json:
        out: Any = dict(model=type(model).__name__.removeprefix('Pvt'), images=[
            {**result, key: [_rounded(row) for row in result[key]]} for result in results])
        if args.format == 'coco':
            out = coco_results(results, model.categories)
        print(json.dumps(out, indent=2, allow_nan=False))


def _print(path: str, rows: Rows, key: str, pictures: Dict[str, Path]) -> None:
    drawn = f', drawn in {clean(pictures[path], 4096)}' if pictures else ''
    print(f'{clean(path, 4096)}: {len(rows)} {key}{drawn}')
    shown = [row for row in rows if row.get('share', 1) >= SMALLEST_SHARE]
    for row in shown:
        at = '  at ' + ', '.join(f'{x:.0f}' for x in row['box']) if 'box' in row else ''
        print(f'  {row.get("score", row.get("share")):6.1%}  {clean(row["name"])}{at}', flush=True)
    if len(shown) < len(rows):
        print(f'  and {len(rows) - len(shown)} below {SMALLEST_SHARE:.1%}', flush=True)


def _rounded(row: Dict[str, Any]) -> Dict[str, Any]:
    """A row as JSON shows it: scores and shares with six digits, boxes with hundredths of pixels."""
    row = dict(row)
    for key in ('score', 'share'):
        if key in row:
            row[key] = round(row[key], 6)
    if 'box' in row:
        row['box'] = [round(x, 2) for x in row['box']]
    return row


# ---- detect ----------------------------------------------------------------------------------------------------------

def _load_detector(args: argparse.Namespace) -> Any:
    if args.checkpoint is None:
        return retinanet_coco(args.model.removesuffix('.retinanet_coco'))
    return load_any(args.checkpoint, 'detector', args.prefix)


def _detect(model: Any, image: Image.Image, args: argparse.Namespace, picture: Optional[Path]) -> Rows:
    with torch.inference_mode():
        found = model([to_tensor(image)])[0]
    keep = found['scores'] >= args.threshold
    found = {k: v[keep] for k, v in found.items()}
    labels = (found['labels'] - model.first_label).tolist()
    rows: Rows = [
        dict(label=i, name=model.categories[i] if model.categories else f'class {i}', score=score, box=box)
        for i, score, box in zip(labels, found['scores'].tolist(), found['boxes'].tolist())]
    masks = [mask[0] >= 0.5 for mask in found.get('masks', ())]
    for row, mask in zip(rows, masks):
        row['mask'] = run_lengths(mask)
    if picture:
        draw_detections(image, rows, masks, picture)
    return rows


def run_lengths(mask: torch.Tensor) -> Dict[str, Any]:
    """A mask (H, W) as COCO's uncompressed run lengths: column by column, starting with those outside."""
    values, counts = mask.T.flatten().unique_consecutive(return_counts=True)
    return dict(size=list(mask.shape), counts=[0] * int(values[0]) + counts.tolist())


def compressed(counts: Sequence[int]) -> str:
    """Run lengths as COCO's text: from the fourth on what they differ from the one two before, in characters of five
    bits each, the lowest first, where a sixth bit says that more follow."""
    text = []
    for i, count in enumerate(counts):
        rest = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits = rest & 31
            rest >>= 5
            more = rest != (-1 if bits & 16 else 0)  # the highest bit is the sign
            text.append(chr(48 + bits + 32 * more))
    return ''.join(text)


def coco_results(results: Sequence[Dict[str, Any]], categories: Sequence[str]) -> Rows:
    """Objects in COCO's results format, as pycocotools' `loadRes` and COCO's servers take it.

    Args:
        results: A dict per image: 'image' (its path) and 'objects', whose boxes are x1, y1, x2, y2.
        categories: Names of the classes.

    Returns:
        A dict per object: 'image_id', 'category_id', 'bbox' (x, y, width, height), 'score' and, where there are masks,
        'segmentation'. An image's id is the number that its file is called after if that is so for all of them (as in
        COCO: 000000000139.jpg is 139), else they are 1, 2, 3... as given. A category's id is COCO's where the names of
        the classes are COCO's 80, else 1 for the first class, 2 for the second...
    """
    stems = [Path(result['image']).stem for result in results]
    by_name = all(stem.isascii() and stem.isdigit() for stem in stems) and len(set(map(int, stems))) == len(stems)
    image_ids = [int(stem) for stem in stems] if by_name else range(1, len(stems) + 1)
    coco = coco_categories()
    category_ids = list(coco) if list(categories) == list(coco.values()) else None
    rows: Rows = []
    for image_id, result in zip(image_ids, results):
        for found in result['objects']:
            x1, y1, x2, y2 = found['box']
            label = found['label']
            row = dict(
                image_id=image_id, category_id=category_ids[label] if category_ids else label + 1,
                bbox=[x1, y1, x2 - x1, y2 - y1], score=found['score'])
            if 'mask' in found:
                row['segmentation'] = dict(size=found['mask']['size'], counts=compressed(found['mask']['counts']))
            rows.append(row)
    return rows


# ---- segment ---------------------------------------------------------------------------------------------------------

def _segment(model: Any, image: Image.Image, args: argparse.Namespace, picture: Optional[Path]) -> Rows:
    labels = model.segment(to_tensor(image))
    counts = labels.flatten().bincount()
    names = model.categories or [f'class {i}' for i in range(model.num_classes)]
    rows: Rows = [
        dict(label=i, name=names[i], share=counts[i].item() / labels.numel())
        for i in counts.argsort(descending=True, stable=True).tolist() if counts[i]]
    if picture:
        draw_segments(image, labels, rows, model.palette, picture)
    return rows
