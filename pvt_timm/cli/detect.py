""" The commands `detect` and `segment`: find objects or regions in images, and print, save or draw them. """
import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from PIL import Image
from timm.models import get_pretrained_cfg

from ..detection import coco_categories, retinanet_coco
from ..files import check_folder
from ..training.checkpoints import load_any
from .classifiers import check_finite, check_in_chans, refusing_overflow
from .errors import clean
from .many import (
    ImageFile, Loaded, Stream, as_image, as_pixels, checked_images, output_file, print_json, refuse_inputs)
from .network import cannot_load, check_pretrained
from .overlays import SMALLEST_SHARE, draw_detections, draw_segments
from .processes import Processes
from .results import RECORD_SUFFIXES, Column, Table, fingerprint, settings_of

__all__ = ['coco_results', 'have_numbers', 'published_detector', 'run_detect', 'run_segment']

Rows = List[Dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """The result for one image."""
    rows: Rows  # a dict for each object, or for each class of a segmented image
    areas: Any  # to draw: masks (H, W) of the objects, or the class of each pixel (H, W)


@dataclass(frozen=True)
class Task:
    """What differs between `detect` and `segment`."""
    key: str  # name of an image's rows in the JSON
    load: Callable[[argparse.Namespace], Any]
    find: Callable[[Any, torch.Tensor, argparse.Namespace], List[Found]]
    draw: Callable[[Image.Image, Found, Any, Path], None]
    table: Table


def run_detect(args: argparse.Namespace) -> None:
    if args.prefix is not None and not args.checkpoint:
        raise ValueError('Expected --checkpoint with --prefix: published weights hold only one detector')
    if args.format == 'coco' and not args.json:
        raise ValueError('Expected --json with --format coco')
    with Processes() as processes:
        _run(args, DETECT, processes)


def run_segment(args: argparse.Namespace) -> None:
    args.format = 'plain'
    with Processes() as processes:
        _run(args, SEGMENT, processes)


def _run(args: argparse.Namespace, task: Task, processes: Processes) -> None:
    pictures_folder, args.output = _split_outputs(args.output or [])
    results = output_file(args, task.table, processes)

    def checked() -> Tuple[List[ImageFile], Dict[str, Path]]:
        images = checked_images(args, results)
        return images, _pictures(images, pictures_folder, args.command, args.checkpoint)

    files, pictures = processes.from_first(checked)  # before weights are read or downloaded
    stream = Stream(args, processes)
    model = task.load(args)
    name = Path(args.checkpoint).name if args.checkpoint else args.model
    check_in_chans(model.in_chans, name)
    check_finite(model, name)
    settings: Dict[str, Any] = {}
    if results is not None:
        settings = dict(
            command=args.command, model=type(model).__name__, weights=fingerprint(model),
            model_settings=settings_of(model), dtype=args.dtype, classes=list(model.categories),
            threshold=getattr(args, 'threshold', None),
            pictures=str(pictures_folder.absolute()) if pictures_folder else None)
    stream.place(model)

    def compute(images: List[Loaded], pixels: torch.Tensor) -> List[Dict[str, Any]]:
        with refusing_overflow(model, name):
            found = task.find(model, pixels.to(torch.float32).div(255).to(stream.dtype), args)
        records = []
        for loaded, one in zip(images, found):
            if pictures:
                picture = pictures[loaded.file.path]
                task.draw(as_image(loaded.pixels), one, model, picture)
            rows = one.rows if args.format == 'coco' else [_rounded(row) for row in one.rows]
            records.append(
                {'image': loaded.file.path, 'width': loaded.width, 'height': loaded.height, task.key: rows})
        return records

    if results is not None:
        count = stream.write(
            files, model.in_chans, as_pixels, compute, results, settings, info=dict(model=name))
        if processes.is_first:
            print(f'{clean(args.output, 4096)}: {task.key} of {count:,} images')
        stream.say()
        return
    numbered = have_numbers(file.path for file in files)
    # the images that can be read may be numbered, even if not all images are: this is known at the end
    waits = args.format == 'coco' and args.skip_errors and not numbered
    records: Iterable[Dict[str, Any]] = stream.records(
        files, model.in_chans, as_pixels, compute, prints=not waits)
    if args.format == 'coco':
        if waits:
            records = list(records)
            numbered = have_numbers(record['image'] for record in records)
        print_json(coco_results(records, model.categories, numbered))
    elif args.json:
        print_json(records, 'images', model=type(model).__name__.removeprefix('Pvt'))
    else:
        for record in records:
            _print(record['image'], record[task.key], task.key, pictures)
    stream.say()


def _split_outputs(outputs: Sequence[Path]) -> Tuple[Optional[Path], Optional[Path]]:
    """Return the folder for pictures and the file for results from the values of `--output`.

    A value is the file if it has the extension of a supported format, otherwise the folder.

    Raises:
        ValueError: Two folders or two files are given, or a folder that does not exist has a name with an extension.
    """
    files = [path for path in outputs if path.suffix.lower() in RECORD_SUFFIXES]
    folders = [path for path in outputs if path not in files]
    if len(files) > 1 or len(folders) > 1:
        raise ValueError('Expected one folder for pictures and one file for results at most as --output')
    for folder in folders:
        if folder.suffix and not folder.is_dir():  # meant as a file of an unsupported format, such as results.json
            raise ValueError(
                f'Expected an --output that ends in {", ".join(RECORD_SUFFIXES)}, or a folder for pictures (the name '
                f'of a new folder must not have a dot), got {folder}')
    return folders[0] if folders else None, files[0] if files else None


def _pictures(
        files: Sequence[ImageFile], folder: Optional[Path], command: str, checkpoint: Optional[str],
) -> Dict[str, Path]:
    """Return the picture to write for each image, by the image's path. No folder is created.

    A picture is named after its image, without the image's extension. If the names of two images differ only in the
    extension, their pictures' names include it.

    Raises:
        ValueError: Two images would have the same picture, or a picture would replace an image or the checkpoint.
        OSError: The folder cannot be created or written to.
    """
    if folder is None:
        return {}
    names = {file.path: Path(file.name) for file in files}  # an image that is given twice has one picture
    without_extension = Counter(name.with_suffix('') for name in names.values())
    pictures = {}
    for path, name in names.items():
        start = name.stem if without_extension[name.with_suffix('')] == 1 else name.name
        pictures[path] = folder / name.parent / f'{start}_{command}.png'
    if len(set(pictures.values())) < len(pictures):
        raise ValueError('Expected images of different names, because each picture is named after its image')
    refuse_inputs(pictures.values(), files, checkpoint)
    check_folder(folder)
    return pictures


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
    """Return a copy of a row with scores and shares rounded to six decimals, and boxes to hundredths of a pixel."""
    row = dict(row)
    for key in ('score', 'share'):
        if key in row:
            row[key] = round(row[key], 6)
    if 'box' in row:
        row['box'] = [round(x, 2) for x in row['box']]
    return row


_IMAGE = (
    Column('image', 'string'), Column('width', 'int64'), Column('height', 'int64'), Column('label', 'int64'),
    Column('name', 'string'))


# ---- detect ----------------------------------------------------------------------------------------------------------

def _load_detector(args: argparse.Namespace) -> Any:
    if args.checkpoint is None:
        return published_detector(args.model)
    return load_any(args.checkpoint, 'detector', args.prefix)


def published_detector(model: str) -> Any:
    """Return OpenMMLab's RetinaNet on a variant, which is given with or without the tag `retinanet_coco`.

    Raises:
        ValueError: There is none on this variant, or it cannot be downloaded. The message says what helps.
    """
    name = model.removesuffix('.retinanet_coco')
    check_pretrained(f'{name}.retinanet_coco')
    try:
        return retinanet_coco(name)
    except OSError as e:
        cfg: Any = get_pretrained_cfg(f'{name}.retinanet_coco')
        raise cannot_load(f'{name}.retinanet_coco', e, cfg.url) from e


def _detect(model: Any, images: torch.Tensor, args: argparse.Namespace) -> List[Found]:
    """Return the objects in images (B, C, H, W) with values from 0 to 1."""
    return [_objects(model, found, args.threshold) for found in model(list(images))]


def _objects(model: Any, found: Dict[str, torch.Tensor], threshold: float) -> Found:
    found = {name: value.cpu() for name, value in found.items()}
    keep = found['scores'] >= threshold
    found = {k: v[keep] for k, v in found.items()}
    labels = (found['labels'] - model.first_label).tolist()
    rows: Rows = [
        dict(label=i, name=model.categories[i] if model.categories else f'class {i}', score=score, box=box)
        for i, score, box in zip(labels, found['scores'].tolist(), found['boxes'].tolist())]
    masks = [mask[0] >= 0.5 for mask in found.get('masks', ())]
    for row, mask in zip(rows, masks):
        row['mask'] = run_lengths(mask)
    return Found(rows, masks)


def _object_rows(record: Dict[str, Any]) -> List[Tuple[Any, ...]]:
    """Return a row of the table for each object of an image."""
    image = record['image'], record['width'], record['height']
    return [(*image, row['label'], row['name'], row['score'], *row['box']) for row in record['objects']]


DETECT = Task(
    key='objects',
    load=_load_detector,
    find=_detect,
    draw=lambda image, found, model, picture: draw_detections(image, found.rows, found.areas, picture),
    table=Table((*_IMAGE, Column('score', 'float64'), *(Column(x, 'float64') for x in ('x1', 'y1', 'x2', 'y2'))),
                _object_rows))


def run_lengths(mask: torch.Tensor) -> Dict[str, Any]:
    """Return a mask (H, W) as COCO's uncompressed run lengths.

    They count the pixels column by column: first those outside the mask, then those inside, and so on in turn.
    """
    values, counts = mask.T.flatten().unique_consecutive(return_counts=True)
    return dict(size=list(mask.shape), counts=[0] * int(values[0]) + counts.tolist())


def compressed(counts: Sequence[int]) -> str:
    """Return run lengths as COCO's compressed text.

    From the fourth on, each run length is replaced by its difference from the one two places before. A number is
    written in groups of five bits, the lowest first, with one character per group. A sixth bit in the character says
    that more groups follow.
    """
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


def have_numbers(paths: Iterable[str]) -> bool:
    """Return whether the file name of each image is a different number, as in COCO (000000000139.jpg)."""
    stems = [Path(path).stem for path in paths]
    return all(stem.isascii() and stem.isdigit() for stem in stems) and len(set(map(int, stems))) == len(stems)


def coco_results(
        results: Iterable[Dict[str, Any]], categories: Sequence[str], numbered: bool) -> Iterator[Dict[str, Any]]:
    """Yield objects in COCO's results format, which pycocotools' `loadRes` and COCO's servers read.

    Args:
        results: A dict per image: 'image' (its path) and 'objects', whose boxes are x1, y1, x2, y2.
        categories: Names of the classes.
        numbered: Whether the number in an image's file name is its id (000000000139.jpg has the id 139), see
            `have_numbers`. Otherwise the ids are 1, 2, 3... in the order of `results`.

    Yields:
        A dict per object: 'image_id', 'category_id', 'bbox' (x, y, width, height), 'score' and, if there are masks,
        'segmentation'. If the classes have the names of COCO's 80 classes, in COCO's order, the ids of categories are
        COCO's. Otherwise the first class has the id 1, the second has 2...
    """
    coco = coco_categories()
    category_ids = list(coco) if list(categories) == list(coco.values()) else None
    for number, result in enumerate(results, start=1):
        image_id = int(Path(result['image']).stem) if numbered else number
        for found in result['objects']:
            x1, y1, x2, y2 = found['box']
            label = found['label']
            row = dict(
                image_id=image_id, category_id=category_ids[label] if category_ids else label + 1,
                bbox=[x1, y1, x2 - x1, y2 - y1], score=found['score'])
            if 'mask' in found:
                row['segmentation'] = dict(size=found['mask']['size'], counts=compressed(found['mask']['counts']))
            yield row


# ---- segment ---------------------------------------------------------------------------------------------------------

def _load_segmenter(args: argparse.Namespace) -> Any:
    return load_any(args.checkpoint, 'segmenter', args.prefix)


def _segment(model: Any, images: torch.Tensor, args: argparse.Namespace) -> List[Found]:
    """Return the regions of images (B, C, H, W) with values from 0 to 1."""
    return [_regions(model, labels) for labels in model.segment(images).cpu()]


def _regions(model: Any, labels: torch.Tensor) -> Found:
    counts = labels.flatten().bincount()
    names = model.categories or [f'class {i}' for i in range(model.num_classes)]
    rows: Rows = [
        dict(label=i, name=names[i], share=counts[i].item() / labels.numel())
        for i in counts.argsort(descending=True, stable=True).tolist() if counts[i]]
    return Found(rows, labels)


def _region_rows(record: Dict[str, Any]) -> List[Tuple[Any, ...]]:
    """Return a row of the table for each class of an image."""
    image = record['image'], record['width'], record['height']
    return [(*image, row['label'], row['name'], row['share']) for row in record['classes']]


SEGMENT = Task(
    key='classes',
    load=_load_segmenter,
    find=_segment,
    draw=lambda image, found, model, picture: draw_segments(image, found.areas, found.rows, model.palette, picture),
    table=Table((*_IMAGE, Column('share', 'float64')), _region_rows))
