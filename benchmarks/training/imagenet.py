""" Measure the ImageNet-1K top-1 of the published weights and compare it with the published numbers.

    python benchmarks/training/imagenet.py --data-dir IMAGENET [--device cuda] [--json results.json]

IMAGENET/validation (or val) holds one folder per class. The run stops if an image cannot be decoded. (timm's
validate.py would use the next image instead.) The exit code is 0 if all models are within the allowed difference, 1 if
one is not, and 2 after an error.
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets

import pvt_timm  # noqa: F401
from pvt_timm.cli.errors import run_command
from pvt_timm.cli.predict import load_model, open_image
from pvt_timm.files import save_atomically
from pvt_timm.training.published import compare as compare_figures
from pvt_timm.variants import TOP1

PUBLISHED = {name: top1 for name, top1 in TOP1.items() if name.endswith('.in1k')}

# Half a unit of the published digit, and 0.1 for another version of the JPEG decoder and of the bicubic resize (50 of
# the 50,000 images).
ALLOWED = 0.15


class Images(torch.utils.data.Dataset):
    """Images with labels. The item of a file that cannot be read is the error message, which `evaluate` raises."""

    def __init__(self, samples: List[Tuple[str, int]], transform) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        try:
            return self.transform(open_image(path)), label
        except ValueError as e:
            return str(e), label


def collate(batch):
    errors = [image for image, _ in batch if isinstance(image, str)]
    if errors:
        return errors, None
    return torch.stack([image for image, _ in batch]), torch.tensor([label for _, label in batch])


def find_samples(data_dir: os.PathLike, split: str, num_classes: int) -> List[Tuple[str, int]]:
    """Return files and labels of a split.

    Raises:
        ValueError: The split does not exist, or has not one folder for each of the model's classes.
    """
    names = [split, 'val'] if split == 'validation' else [split]
    folder = next((Path(data_dir, name) for name in names if Path(data_dir, name).is_dir()), None)
    if folder is None:
        raise ValueError(f"Expected {data_dir} to hold a folder '{split}' with one folder of images per class")
    samples, classes = find_images_and_targets(str(folder))
    if len(classes) != num_classes or '' in classes:
        raise ValueError(
            f'Expected {num_classes} folders of images in {folder}, one per class of the model, got {len(classes)}')
    return samples


@torch.inference_mode()
def evaluate(
        name: str,
        data_dir: os.PathLike,
        split: str = 'validation',
        checkpoint: Optional[str] = None,
        device: str = 'cpu',
        batch_size: int = 128,
        workers: int = 4,
) -> Dict[str, Any]:
    """Return the score of a model. Images are resized and cropped as its data config says.

    Args:
        name: Model with tag.
        data_dir: Folder with the split.
        split: Name of the split.
        checkpoint: File with weights instead of the published ones.
        device: Device to run on.
        batch_size: Images per forward pass.
        workers: Processes that read images.

    Returns:
        `top1` and `top5` in percent, `images`, `seconds`.

    Raises:
        ValueError: An image cannot be read, folders are wrong, or there are no weights.
    """
    if checkpoint is None:
        model = load_model(name).model
    else:
        model = load_model(name.partition('.')[0], checkpoint).model
    config = resolve_model_data_config(model)
    samples = find_samples(data_dir, split, model.num_classes)
    model.to(device)
    loader = torch.utils.data.DataLoader(
        Images(samples, create_transform(**config, is_training=False)), batch_size, num_workers=workers,
        collate_fn=collate)
    right1 = right5 = 0
    start = time.monotonic()
    for images, labels in loader:
        if labels is None:
            raise ValueError(f'{images[0]} (no score without it)')
        logits = model(images.to(device)).float().cpu()
        if not logits.isfinite().all():
            raise ValueError(f'{name} gives values that are not finite')
        found = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        right1 += int(found[:, 0].sum())
        right5 += int(found.sum())
    return dict(
        top1=100 * right1 / len(samples), top5=100 * right5 / len(samples), images=len(samples), right=right1,
        seconds=round(time.monotonic() - start, 1), crop_pct=config['crop_pct'], interpolation=config['interpolation'])


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='folder with the split')
    parser.add_argument('--split', default='validation', help='name of the split (default validation, or val)')
    parser.add_argument('--models', nargs='+', default=list(PUBLISHED), metavar='MODEL', help='default all')
    parser.add_argument('--checkpoints', nargs='+', metavar='FILE', help='files with weights, one per model')
    parser.add_argument(
        '--allowed', type=float, default=ALLOWED, help=f'allowed difference in percent (default {ALLOWED})')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--workers', type=int, default=4)
    parser.add_argument('--json', metavar='FILE', help='file to write the results to')
    args = parser.parse_args(argv)
    return run_command('imagenet.py', lambda: compare(args))


def compare(args: argparse.Namespace) -> int:
    """Evaluate the models and compare their scores. Returns 1 if one differs by more than allowed, otherwise 0."""
    results: Dict[str, Any] = {}
    unknown = [m for m in args.models if m not in PUBLISHED]
    if unknown:
        raise ValueError(f'No published top-1 for {", ".join(unknown)}, there is {", ".join(PUBLISHED)}')
    checkpoints = args.checkpoints or [None] * len(args.models)
    if len(checkpoints) != len(args.models):
        raise ValueError(f'Expected one checkpoint for each of {len(args.models)} models, got {len(checkpoints)}')
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f'No such folder: {Path(args.json).parent}')
    for name, checkpoint in zip(args.models, checkpoints):
        r = evaluate(name, args.data_dir, args.split, checkpoint, args.device, args.batch_size, args.workers)
        r['published'] = PUBLISHED[name]
        r['difference'] = round(r['top1'] - PUBLISHED[name], 4)
        figures = {'top-1': r['top1'], 'top-5': r['top5']}
        lines, r['ok'] = compare_figures(figures, {'top-1': PUBLISHED[name]}, args.allowed)
        results[name] = r
        print('\n'.join([name, *lines]), flush=True)
        if args.json:  # written after every model, since each one takes long
            text = json.dumps(dict(
                torch=torch.__version__, timm=timm.__version__, device=args.device, allowed=args.allowed,
                models=results), indent=1) + '\n'
            save_atomically(args.json, lambda f, text=text: f.write(text.encode()))
    return 0 if all(r['ok'] for r in results.values()) else 1


if __name__ == '__main__':
    sys.exit(main())
