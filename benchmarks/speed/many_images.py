"""Images per second of `pvt-timm embed` and `predict`, which read them from the disk, against the bare model.

    python benchmarks/speed/many_images.py                      # PVT-Small on photos: results/many_images.json
    python benchmarks/speed/many_images.py --device cuda --dtype bfloat16 --batch-size 256
    python benchmarks/speed/many_images.py --memory 20000       # memory of `embed` on 20000 images of 64 pixels

The bare model computes batches that are in memory already. It runs in the same process as the command's code, in turns
with it, so that other work of the machine slows both down. On a CPU both use the fast path of `pvt_timm.fuse`. Before a
time is shown, the outputs of the command's code are compared with those of the model on images from timm's transform.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from run import HERE, machine

import timm
from pvt_timm.cli.classifiers import Classifier, open_image
from pvt_timm.cli.embed import embed
from pvt_timm.cli.many import ImageFile, Stream, Transformed, find_images, normalise
from pvt_timm.files import save_atomically


def write_photos(folder: Path, count: int, height: int, width: int) -> None:
    """Write JPEG files of smooth noise. They take as long to decode as photos, white noise would take far longer."""
    rng = np.random.default_rng(0)
    for i in range(count):
        small = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(folder / f'{i}.jpg', quality=90)


def stream_options(args: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(
        device=args.device, dtype=args.dtype, batch_size=args.batch_size, workers=args.workers, skip_errors=False,
        command='embed')


def throughput(args: argparse.Namespace, folder: Path) -> dict:
    write_photos(folder, args.images, 375, 500)
    files = find_images([str(folder)])
    model = timm.create_model(args.model).eval()
    data = timm.data.resolve_model_data_config(model)
    classifier = Classifier(model, args.model, data, [])
    stream = Stream(stream_options(args))
    expected = in_python(model, data, files[:4])
    classifier.model = model = stream.place(model)
    x = torch.randn(args.batch_size, *data['input_size'], device=stream.device, dtype=stream.dtype)
    commands = {
        'embed': lambda batch: embed(model, batch, 'token'),
        'predict': lambda batch: model(batch).float().softmax(1).topk(5)[0],
    }

    def bare() -> float:
        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(len(files) // args.batch_size):
                model(x).float().cpu()
            return len(files) // args.batch_size * args.batch_size / (time.perf_counter() - start)

    def loaded(command: str) -> float:
        start = time.perf_counter()
        results = [result for _, result in stream.results(
            files, data['input_size'][0], Transformed(data),
            lambda images, pixels: commands[command](normalise(pixels, data).to(stream.dtype)).float().cpu().numpy())]
        seconds = time.perf_counter() - start
        if command == 'embed':
            error = np.abs(np.stack(results[:4]) - expected).max() / np.abs(expected).max()
            if error > (1e-4 if args.dtype == 'float32' else 5e-2):
                raise SystemExit(f'vectors differ by {error:.1e} of the largest value: nothing to time')
        return len(files) / seconds

    bare()
    loaded('embed')
    speeds: dict = {'bare': [], **{command: [] for command in commands}}
    for _ in range(args.rounds):
        speeds['bare'].append(bare())
        for command in commands:
            speeds[command].append(loaded(command))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = {
        command: statistics.median(ours / bare for ours, bare in zip(speeds[command], speeds['bare']))
        for command in commands}
    return dict(
        machine=machine('cuda' if stream.device.type == 'cuda' else 'cpu'), model=args.model, dtype=args.dtype,
        batch_size=args.batch_size, images=len(files), rounds=args.rounds,
        images_per_second={name: round(value, 1) for name, value in medians.items()},
        share_of_bare={name: round(value, 3) for name, value in ratios.items()})


def in_python(model: torch.nn.Module, data: dict, files: list[ImageFile]) -> np.ndarray:
    transform = timm.data.create_transform(**data, is_training=False)
    x = torch.stack([transform(open_image(file.path)) for file in files])
    with torch.inference_mode():
        return embed(model, x, 'token').numpy()


def memory(args: argparse.Namespace, folder: Path) -> dict:
    """Return the peak memory of `embed`, with its workers if it has any, on many small images and on a few."""
    peaks = {}
    for count in (64, args.memory):
        images = folder / str(count)
        images.mkdir()
        for i in range(count):  # small images, as only memory that grows with their number is of interest
            file = images / f'{i // 1000}' / f'{i}.png'
            file.parent.mkdir(exist_ok=True)
            Image.new('RGB', (64, 64), (i % 256, i // 256 % 256, 7)).save(file)
        command = [sys.executable, '-m', 'pvt_timm', 'embed', images, '--model', 'test_pvt', '--output',
                   folder / f'{count}.npz', '--batch-size', '64']
        if args.workers is not None:
            command += ['--workers', str(args.workers)]
        start = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command])
        peaks[count] = peak_of(psutil.Process(process.pid))
        if process.wait():
            raise SystemExit(f'exit code {process.returncode}')
        peaks[f'{count}, seconds'] = round(time.perf_counter() - start, 1)
    return dict(machine=machine('cpu'), peak_mb=peaks)


def peak_of(process: psutil.Process) -> float:
    """Return the peak memory of a process and its children together, in MB. Shared pages are counted once."""
    peak = 0.
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        total = 0
        for one in (process, *process.children(recursive=True)):
            try:
                total += one.memory_full_info().pss
            except psutil.Error:  # it ended
                pass
        peak = max(peak, total)
        time.sleep(0.5)
    return round(peak / 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='pvt_small')
    parser.add_argument('--images', type=int, default=192)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--workers', type=int)
    parser.add_argument('--device')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16', 'float16'))
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--memory', type=int, metavar='N', help='measure memory with N small images, not speed')
    parser.add_argument('--output', type=Path, default=HERE / 'results')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = (memory if args.memory else throughput)(args, Path(folder))
    print(json.dumps(results, indent=2))
    name = 'many_images_memory.json' if args.memory else 'many_images.json'
    save_atomically(args.output / name, lambda f: f.write(json.dumps(results, indent=2).encode() + b'\n'))


if __name__ == '__main__':
    main()
