""" Run many images through a model, on any device. Images are found in folders, read in parallel and batched.

A command makes a `Stream` from its options. It iterates over `Stream.results` or `Stream.records`, or calls
`Stream.write` to write the results to one file. `print_json` prints results as JSON. An image that cannot be read ends
the command. With `--skip-errors` such images are named and counted, and the command continues.

timm's transforms prepare the images. Threads read them, or the worker processes of PyTorch's `DataLoader`. timm's
`create_loader` is made for images of one size with a class. It has no place for the name and the error of an image, and
no images of several sizes.
"""
import argparse
import functools
import itertools
import json
import logging
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # type: ignore[import-untyped]  # comes with huggingface_hub

from ..files import refuse_same_file
from ..fused import fuse
from ..images import image_files, natural_key
from .classifiers import open_image, whole_image, whole_size
from .errors import clean, filled, one_line
from .processes import ProcessEnded, Processes
from .results import Results, State, Table, file_state

__all__ = [
    'ImageFile', 'Loaded', 'Stream', 'Transformed', 'UnreadableImage', 'Whole', 'add_device_options', 'add_images',
    'add_many_options', 'add_output_options', 'as_image', 'as_pixels', 'checked_images', 'find_images',
    'machine_device', 'normalise', 'output_file', 'place', 'print_json', 'refuse_inputs', 'same_shapes', 'whole_number',
]

_logger = logging.getLogger(__name__)

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
BATCH_SIZE = 16  # larger batches are not faster on a CPU
_MOST_WORKERS = 16  # limit of the default of --workers

Prepare = Callable[[Image.Image], np.ndarray]  # turns an upright image into pixels (C, H, W) of 8 bits


# ---- options ---------------------------------------------------------------------------------------------------------

def add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'images', nargs='+', metavar='IMAGE', help='image files or folders. A folder stands for all images in it and '
        'in its subfolders, except hidden ones')


def add_output_options(
        parser: argparse.ArgumentParser,
        what: str = 'file for the results in place of printing them',
        more: str = '',
        metavar: str = 'FILE',
        formats: str = '.jsonl (a line per image), .csv or .parquet (a row per result)',
        **kwargs: Any) -> None:
    """Add `--output`, the file for the results, and `--overwrite`.

    Args:
        what: Beginning of the help of `--output`.
        more: End of the help of `--output`.
        formats: Extensions that the file may have, for the help.
        kwargs: Passed to `add_argument` for `--output`.
    """
    parser.add_argument(
        '--output', type=_path, metavar=metavar, help=f'{what}. Its extension sets the format: {formats}. '
        'FILE is written as a whole at the end. Until then the results are in the folder FILE.parts. After a crash the '
        'same command continues from this folder, also with torchrun. It is refused if a setting differs, or if an '
        f'image file was changed after its result was computed (its size in bytes or its time of change){more}',
        **kwargs)
    parser.add_argument('--overwrite', action='store_true', help='replace FILE if it exists')


def _path(text: str) -> Path:
    return Path(filled(text))


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--device', metavar='NAME', help='where the model runs: cpu, cuda, cuda:1, mps, xpu (default: the accelerator '
        'if there is one, otherwise the CPU)')
    parser.add_argument(
        '--dtype', choices=list(DTYPES), default='float32', help='type of the numbers that the model computes with '
        '(default float32). The other types are less exact, and faster on GPUs and on CPUs that support them')


def add_many_options(parser: argparse.ArgumentParser, batch_size: int = BATCH_SIZE, how: str = '') -> None:
    """Add the options of commands that take many images.

    Args:
        batch_size: Default of `--batch-size`.
        how: End of the help of `--batch-size`.
    """
    add_device_options(parser)
    parser.add_argument(
        '--batch-size', type=whole_number, default=batch_size, metavar='N',
        help=f'images that go through the model together (default {batch_size}){how}')
    parser.add_argument(
        '--workers', type=functools.partial(whole_number, smallest=0), metavar='N',
        help='processes that read images while the model computes. Default on a CPU, or for a few images: 0, then '
        f'threads read each batch before it is computed. Default on an accelerator: one per core, {_MOST_WORKERS} at '
        'most. On a CPU, try 1 or more if the images are on a slow disk')
    parser.add_argument(
        '--skip-errors', action='store_true', help='continue after an image that cannot be read. Each such image is '
        'named, and their number is printed at the end (default: the first one ends the command)')


def whole_number(text: str, smallest: int = 1) -> int:
    """Parse the value of an option that takes whole numbers from `smallest` up."""
    try:
        number = int(text)
    except ValueError:
        number = smallest - 1
    if number < smallest:
        raise argparse.ArgumentTypeError(f"expected a whole number from {smallest}, got '{text}'")
    return number


# ---- images ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ImageFile:
    """An image that the user named, or an image in a folder that the user named."""
    path: str  # as the user wrote it. In a folder: the folder as the user wrote it, and the path inside of it
    name: str  # name of the file, or path inside of the folder. The files written for the image are named after it


def find_images(paths: Sequence[str]) -> List[ImageFile]:
    """Return the images that `paths` name: files, and all images in folders and their subfolders.

    A file is taken whatever its extension is. In a folder, images are those of `image_files`, sorted in natural order
    (2 before 10).

    Raises:
        OSError: A file or folder does not exist or cannot be read.
        ValueError: There is no image in a folder.
    """
    found: List[ImageFile] = []
    for path in paths:
        os.stat(path)  # raises OSError, which names the path
        if not os.path.isdir(path):
            found.append(ImageFile(path, os.path.basename(path)))
            continue
        inside = sorted(image_files(path), key=natural_key)
        if not inside:
            raise ValueError(f'Expected images in {path}, found none')
        found.extend(ImageFile(file, os.path.relpath(file, path)) for file in inside)
    return found


# ---- output ----------------------------------------------------------------------------------------------------------

def output_file(args: argparse.Namespace, table: Table, processes: Processes) -> Optional[Results]:
    """Return the `Results` that a command with `--output FILE` writes to, None if it prints its results.

    Raises:
        ValueError: Several processes would print results, or both `--json` and `--output` are given, or `--overwrite`
            is given without `--output`.
    """
    if args.output is None:
        if args.overwrite:
            raise ValueError('Expected --output FILE for results with --overwrite. Pictures are always replaced')
        if processes.count > 1:
            raise ValueError(
                'Expected --output FILE with several processes, because each of them computes only some of the images')
        return None
    if args.json:
        raise ValueError('Expected --json or --output FILE, not both (--output FILE.jsonl writes the same results)')
    return Results(args.output, table, args.overwrite)


def checked_images(args: argparse.Namespace, results: Optional[Results]) -> List[ImageFile]:
    """Return the images of a command, after checking that its output can be written and replaces no input."""
    if results is not None:
        results.check()
    files = find_images(args.images)
    if results is not None:
        refuse_inputs([results.output], files, args.checkpoint)
    return files


def refuse_inputs(outputs: Iterable[Path], files: Sequence[ImageFile], checkpoint: Optional[str]) -> None:
    """Refuse outputs that would replace an input, also if they name the input through a link.

    Raises:
        ValueError: One of the outputs is an image or the checkpoint.
    """
    images = {os.path.realpath(file.path) for file in files}
    for path in outputs:
        refuse_same_file(path, checkpoint)
        if os.path.realpath(path) in images:
            raise ValueError(f'{path} is read and would be replaced: choose another name for the output.')


def print_json(elements: Iterable[Any], name: Optional[str] = None, **others: Any) -> None:
    """Print a JSON document that is a list, or holds a list. Each element is printed as soon as it is there.

    The text is that of `json.dumps` with an indent of 2. If an error comes before the first element, nothing is
    printed. After a later error the document has no end.

    Args:
        elements: The elements of the list.
        name: Name of the list in the document. If None, the document is the list.
        others: The other values of the document, which come before the list.
    """
    document = [] if name is None else {**others, name: []}
    start, end = json.dumps(document, indent=2, allow_nan=False).rsplit(']', 1)
    margin = '' if name is None else '  '
    count = 0
    try:
        for element in elements:
            text = json.dumps(element, indent=2, allow_nan=False).replace('\n', f'\n{margin}  ')
            print(f'{"," if count else start}\n{margin}  {text}', end='', flush=True)
            count += 1
    except BaseException:
        if count:
            print()  # the message of the error begins a new line on a terminal
        raise
    print(f'\n{margin}]{end}' if count else f'{start}]{end}')


# ---- reading ---------------------------------------------------------------------------------------------------------

@dataclass
class Transformed:
    """Turns an image into pixels with timm's evaluation transform: resizes the image and crops its centre."""
    data: Dict[str, Any]  # timm's data config (input_size, interpolation, crop_pct...)

    def __post_init__(self) -> None:
        # not normalised, as for timm's prefetcher: workers then send bytes, a quarter of the size of float32 numbers
        self.transform: Any = create_transform(**self.data, is_training=False, use_prefetcher=True)

    def __call__(self, image: Image.Image) -> np.ndarray:
        return np.asarray(self.transform(image))


@dataclass
class Whole:
    """Turns the whole image into pixels: resizes it without a crop."""
    data: Dict[str, Any]  # timm's data config
    img_size: Optional[Tuple[int, int]]  # height and width of the result. If None, `whole_size` chooses them
    stride: int

    def __call__(self, image: Image.Image) -> np.ndarray:
        size = self.img_size or whole_size(image.size, min(self.data['input_size'][1:]), self.stride)
        return Transformed(whole_image(self.data, size))(image)


def as_pixels(image: Image.Image) -> np.ndarray:
    """Return the pixels (C, H, W) of an image, which is not resized."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def as_image(pixels: np.ndarray) -> Image.Image:
    """Return the image that has the pixels (C, H, W). This is the reverse of `as_pixels`."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def normalise(pixels: torch.Tensor, data: Dict[str, Any]) -> torch.Tensor:
    """Return pixels (B, C, H, W) of 8 bits as normalised float32 numbers, the input of a model.

    The operations are those of `ToTensor` and `Normalize`, so the result equals that of timm's transform.

    Args:
        data: timm's data config of the model, with `mean` and `std`.
    """
    mean, std = (torch.tensor(data[name], device=pixels.device).view(-1, 1, 1) for name in ('mean', 'std'))
    return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


@dataclass
class Loaded:
    """An image that was read, or the reason why it could not be read (`error`)."""
    file: ImageFile
    pixels: np.ndarray  # (C, H, W) of 8 bits, empty if there is an error
    width: int = 0  # of the upright image
    height: int = 0
    error: str = ''
    state: State = field(default_factory=list)  # of the file before it was read


class _Images(Dataset):
    def __init__(self, files: Sequence[ImageFile], channels: int, prepare: Prepare):
        self.files, self.channels, self.prepare = files, channels, prepare

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Loaded:
        file = self.files[index]
        state = file_state(file.path)
        try:
            image = open_image(file.path, self.channels)
            try:
                pixels = np.ascontiguousarray(self.prepare(image))
            except Exception as e:  # an image that cannot be transformed counts as one that cannot be read
                raise ValueError(f'Cannot read the image {file.path}: {one_line(e)}') from e
        except ValueError as e:
            return Loaded(file, np.empty(0, np.uint8), error=str(e))
        return Loaded(file, pixels, image.width, image.height, state=state)


def same_shapes(batch: Sequence[Loaded]) -> Iterator[Tuple[List[Loaded], torch.Tensor]]:
    """Yield groups of consecutive images whose pixels have the same shape, each with its pixels (B, C, H, W)."""
    for _, group in itertools.groupby(batch, key=lambda loaded: loaded.pixels.shape):
        images = list(group)
        yield images, torch.from_numpy(np.stack([loaded.pixels for loaded in images]))


# ---- device ----------------------------------------------------------------------------------------------------------

def machine_device() -> str:
    """Return the type of the machine's accelerator (cuda, mps, xpu...), or cpu if it has none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else 'cpu'


def choose_device(name: Optional[str], local_rank: int = 0) -> torch.device:
    """Return the device called `name`, by default the accelerator of the machine or its CPU.

    On a machine with several GPUs, each process takes the GPU number `local_rank`, unless `name` has a number.

    Raises:
        ValueError: The machine has no such device.
    """
    if name is None:
        name = machine_device()
    try:
        device = torch.device(name)
        if device.type in ('cuda', 'xpu') and device.index is None and local_rank:
            device = torch.device(device.type, local_rank)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"Expected a device that this machine has, got --device '{name}': {one_line(e, 300)}") from e
    if device.type == 'meta':
        raise ValueError("Expected a device that computes, got --device 'meta'")
    return device


def place(model: Any, device: torch.device, dtype: torch.dtype, class_token_only: bool = False) -> Any:
    """Move a model to a device and a dtype, and return the same object. On a CPU, its fast path is used (`fuse`).

    Args:
        class_token_only: Whether only the class token is needed, so that the fast path may leave out the other tokens.
    """
    model = model.to(device=device, dtype=dtype).eval()
    return fuse(model, inplace=True, class_token_only=class_token_only) if device.type == 'cpu' else model


def _cores() -> int:
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- the stream ------------------------------------------------------------------------------------------------------

class UnreadableImage(ValueError):
    """Raised if an image cannot be read and errors are not skipped."""


class Stream:
    """Runs images through a model, as the options of a command say.

    Attributes:
        device: Device that the model has to be on, see `place`.
        dtype: Type that the model's parameters have to have.
        done: Number of images with a result.
        skipped: Number of images that could not be read.
    """

    def __init__(self, args: argparse.Namespace, processes: Optional[Processes] = None):
        self.processes = processes or Processes()
        self.device = choose_device(args.device, self.processes.local_rank)
        self.dtype = DTYPES[args.dtype]
        self.done = self.skipped = 0
        self._command: str = args.command
        self._batch_size: int = args.batch_size
        self._workers: Optional[int] = args.workers
        self._skip_errors: bool = args.skip_errors
        self._seconds = 0.
        self._first_error = ''

    def place(self, model: Any, class_token_only: bool = False) -> Any:
        """Move a model to `device` and `dtype`, and return the same object. See `place`."""
        return place(model, self.device, self.dtype, class_token_only)

    def results(
            self, files: Sequence[ImageFile], channels: int, prepare: Prepare,
            compute: Callable[[List[Loaded], torch.Tensor], Sequence[Any]],
            prints: bool = False) -> Iterator[Tuple[Loaded, Any]]:
        """Yield every image that can be read with its result, in the order of `files`.

        Args:
            files: Images to read.
            channels: Number of channels of the pixels, 1 or 3.
            prepare: Turns an image into pixels. Worker processes, or several threads at once, call it.
            compute: Computes results for images from their pixels (B, C, H, W), which have 8 bits and are on the
                device.
            prints: Whether the caller prints each result at once. On a terminal these results show the progress, so
                there is no progress bar.

        Raises:
            UnreadableImage: An image cannot be read, and errors are not skipped.
        """
        start = time.perf_counter()
        hidden = not sys.stderr.isatty() or not self.processes.is_first or (prints and sys.stdout.isatty())
        text = f'{self._command} on {self.device}'
        with tqdm(total=len(files), desc=text, unit='image', disable=hidden, leave=False, file=sys.stderr) as bar:
            for batch in self._batches(_Images(files, channels, prepare)):
                readable = list(self._readable(batch, bar))
                for images, pixels in same_shapes(readable):
                    with torch.inference_mode():
                        found = compute(images, pixels.to(self.device))
                    for loaded, result in zip(images, found):
                        yield loaded, result
                        self.done += 1
                error = next((loaded.error for loaded in batch if loaded.error), '')
                if error and not self._skip_errors:
                    raise UnreadableImage(error)
                bar.update(len(batch))
        self._seconds += time.perf_counter() - start

    def _batches(self, images: '_Images') -> Iterator[List[Loaded]]:
        """Yield images in batches, read by worker processes, or by threads of this process if there are none."""
        workers = self._worker_count(len(images))
        if workers:
            loader: Any = DataLoader(images, batch_size=self._batch_size, num_workers=workers, collate_fn=list)
            yield from loader
            return
        with ThreadPoolExecutor(min(_MOST_WORKERS, self._batch_size, self._cores())) as pool:
            for start in range(0, len(images), self._batch_size):
                numbers = range(start, min(start + self._batch_size, len(images)))
                yield list(pool.map(images.__getitem__, numbers))

    def records(
            self, files: Sequence[ImageFile], channels: int, prepare: Prepare,
            compute: Callable[[List[Loaded], torch.Tensor], Sequence[Any]], prints: bool = True) -> Iterator[Any]:
        """Yield the results as `results` does, without the images. At the end at least one has to be there.

        Raises:
            UnreadableImage: An image cannot be read, and errors are not skipped.
            ValueError: None of the images could be read.
        """
        for _, record in self.results(files, channels, prepare, compute, prints):
            yield record
        self.refuse_none()

    def write(
            self, files: Sequence[ImageFile], channels: int, prepare: Prepare,
            compute: Callable[[List[Loaded], torch.Tensor], Sequence[Any]],
            results: Results, settings: Dict[str, Any], info: Dict[str, str]) -> int:
        """Compute the results of images and write them to one file. Returns the number of results.

        With torchrun, each process computes its share of the images.

        Args:
            files, channels, prepare, compute: As for the method `results`.
            results: The object that writes the file.
            settings: Passed to `prepare` of `results`.
            info: Passed to `finish` of `results`.
        """
        by_path = {file.path: file for file in files}
        try:
            todo = self.processes.from_first(lambda: results.prepare(list(by_path), settings))
            self._write_parts(todo, by_path, channels, prepare, compute, results)
            unreadable = sum(self.processes.gather(self.skipped))
            return self.processes.from_first(lambda: results.finish(list(by_path), info, unreadable))
        except ProcessEnded as e:
            raise ProcessEnded(f'{e}: run the same command again, it continues from {results.folder}') from e
        finally:
            results.close()

    def _write_parts(
            self,
            todo: Sequence[str],
            by_path: Dict[str, ImageFile],
            channels: int,
            prepare: Prepare,
            compute: Callable[[List[Loaded], torch.Tensor], Sequence[Any]],
            results: Results) -> None:
        """Compute the results of this process's share of the images `todo`, and write them as parts (see `Results`)."""
        alone = self.processes.count == 1
        try:
            share = [by_path[path] for path in self.processes.share(todo)]
            for loaded, result in self.results(share, channels, prepare, compute):
                results.add(loaded.file.path, result, loaded.state)
            results.flush()
        except UnreadableImage as e:
            results.close_early(alone)
            kept = f' and continue from {results.folder}' if results.folder.is_dir() else ''
            raise UnreadableImage(f'{e} (add --skip-errors to leave out such images{kept})') from e
        except BaseException:
            results.close_early(alone)
            raise

    def _readable(self, batch: Sequence[Loaded], bar: Any) -> Iterator[Loaded]:
        """Yield the images of a batch that could be read.

        If errors are skipped, a warning names each image that could not be read: above the progress bar if there is
        one, otherwise at the end of the command. If errors are not skipped, this stops before the first such image.
        """
        for loaded in batch:
            if not loaded.error:
                yield loaded
            elif self._skip_errors:
                self.skipped += 1
                self._first_error = self._first_error or loaded.error
                if bar.disable:
                    _logger.warning(loaded.error)
                else:
                    bar.write(f'pvt-timm: warning: {clean(loaded.error, 1000)}', file=sys.stderr)
            else:
                return

    def _worker_count(self, images: int) -> int:
        if self._workers is not None:
            return self._workers
        # Workers would take cores from the model, which then waits for its slowest core: `predict` had 0.88 of the
        # speed of the model alone with a worker, 0.95 without (benchmarks/results/many_images.json)
        if self.device.type == 'cpu':
            return 0
        batches = math.ceil(images / self._batch_size)
        if batches < 3:  # starting processes would take longer than reading the images
            return 0
        return min(_MOST_WORKERS, batches, self._cores())

    def _cores(self) -> int:
        """Return the number of cores for this process."""
        return max(1, _cores() // self.processes.local_count)

    def refuse_none(self) -> None:
        """Raise an error if no image could be read. All processes call this, and their images are counted together.

        Raises:
            ValueError: Images were skipped, and none of them could be read.
        """
        counts = self.processes.gather((self.done, self.skipped, self._first_error))

        def check() -> None:
            errors = [error for _, skipped, error in counts if skipped]
            if errors and not any(done for done, _, _ in counts):
                raise ValueError(f'None of the images could be read. The first one: {errors[0]}')

        self.processes.from_first(check)

    def say(self) -> None:
        """Print one line on stderr: the number of images of all processes, the device and the speed."""
        counts = self.processes.gather((self.done, self.skipped, self._seconds))
        done, skipped = (sum(count[i] for count in counts) for i in (0, 1))
        seconds = max(count[2] for count in counts)
        if not self.processes.is_first:
            return
        how = str(self.dtype).removeprefix('torch.')
        if self.device.type == 'cpu':
            threads = torch.get_num_threads()
            how += ', 1 thread' if threads == 1 else f', {threads} threads'
        elif self.device.type == 'cuda':
            how += f', {clean(torch.cuda.get_device_name(self.device), 60)}'
        if self.processes.count > 1:
            how += f', {self.processes.count} processes'
        speed = f' in {seconds:.1f} s, {done / seconds:.1f} a second' if done > 1 else ''
        missing = f'; {skipped:,} could not be read' if skipped else ''
        images = '1 image' if done == 1 else f'{done:,} images'
        print(f'pvt-timm: {images} on {self.device} ({how}){speed}{missing}', file=sys.stderr, flush=True)
