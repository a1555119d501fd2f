""" The command `features`: draw the feature maps of images, or save them as tensors. """
import argparse
import os
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch
from safetensors.torch import save

from ..files import check_folder, save_atomically
from .classifiers import Classifier, check_output, load_model, open_image
from .errors import clean, filled
from .many import (
    ImageFile, Loaded, Stream, Transformed, Whole, add_images, add_many_options, as_image, find_images, normalise,
    refuse_inputs)
from .pictures import draw_pyramid
from .processes import Processes
from .results import as_text

__all__ = ['add_features_options', 'run_features']

_FILE_SUFFIXES = ('.png', '.pdf', '.svg', '.jpg', '.jpeg', '.safetensors')
# Default of --batch-size. The maps of one image of 800x1344 pixels take 30 MB, and computing them takes many times that
_MAPS_OF_A_BATCH = 4


def add_features_options(command: argparse.ArgumentParser) -> None:
    add_images(command)
    command.add_argument(
        '--output', type=filled, metavar='FILE|DIR', help='picture to write (.png, .pdf, .svg ...). For several '
        'images, a folder to write a .png for each image into. Existing files are replaced')
    command.add_argument(
        '--save', type=filled, metavar='FILE|DIR', help='file for the features (.safetensors: stage0 to stage3). For '
        'several images, a folder to write a file for each image into, named after the image. Existing files are '
        'replaced')
    command.add_argument(
        '--crop', action='store_true', help="use only the image's centre, as `predict` does. By default the whole "
        'image is resized to sides that are multiples of 32, the shorter side as long as in training. With --img-size '
        'the whole image is resized to that size without keeping its proportions')
    add_many_options(
        command, _MAPS_OF_A_BATCH, '. Images of different sizes go one by one, unless --crop or --img-size gives them '
        'the same')


class _Targets:
    """The files to write for each image: `pictures` and `features`, each by the path of the image."""

    def __init__(self, args: argparse.Namespace, files: List[ImageFile]):
        """
        Raises:
            ValueError: Two images, or the picture and the features of one image, would be written to the same file. Or
                the file for features has the extension of another format. Or there are several images and only a file
                is given.
            OSError: The folder of an output does not exist, or a folder cannot be created or written to.
        """
        alone = len(args.images) == 1 and not os.path.isdir(args.images[0])
        self.pictures = _outputs(args.output, files, '.png', alone)
        self.features = _outputs(args.save, files, '.safetensors', alone)
        for paths in (self.pictures, self.features):
            if len(set(paths.values())) < len(paths):
                raise ValueError(
                    'Expected images of different names, because each output file is named after its image. Images in '
                    'different subfolders may have the same name if the folder above them is given in their place')
        for path in self.features.values():
            if path.suffix.lower() not in ('', '.safetensors'):
                raise ValueError(f'Expected a file that ends in .safetensors as --save, got {path}')
        drawn = {os.path.realpath(path) for path in self.pictures.values()}
        for path in self.features.values():
            if os.path.realpath(path) in drawn:
                raise ValueError(f'Expected two files for --output and --save, got {path} for both')


def _outputs(option: Optional[str], files: List[ImageFile], suffix: str, alone: bool) -> Dict[str, Path]:
    """Return the file to write for each image, by the image's path. `option` is this file, or the folder for files."""
    if option is None:
        return {}
    is_folder = os.path.isdir(option) or option.endswith(('/', os.sep))
    if alone and not is_folder:
        os.stat(Path(option).absolute().parent)
        return {files[0].path: Path(option)}
    if not is_folder and Path(option).suffix.lower() in _FILE_SUFFIXES:
        raise ValueError(f'Expected a folder for the output files of several images, got the file name {option}')
    check_folder(option)
    return {file.path: Path(option, file.name + suffix) for file in files}


def run_features(args: argparse.Namespace) -> None:
    with Processes() as processes:
        _extract_all(args, processes)


def _extract_all(args: argparse.Namespace, processes: Processes) -> None:
    if not (args.output or args.save):
        raise ValueError('Expected --output for pictures, --save for tensors, or both')
    files, targets = processes.from_first(lambda: _checked(args))  # before weights are downloaded
    stream = Stream(args, processes)
    classifier = load_model(args.model, args.checkpoint, dense=True, img_size=args.img_size, prefix=args.prefix)
    data, model = classifier.data, classifier.model
    prepare = Transformed(data) if args.crop else Whole(data, args.img_size, model.reductions[-1])
    classifier.model = model = stream.place(model)

    def compute(images: List[Loaded], pixels: torch.Tensor) -> List[List[torch.Tensor]]:
        x = normalise(pixels, data).to(stream.dtype)
        maps = model.forward_intermediates(x, intermediates_only=True)
        for level in maps:
            check_output(level, classifier.name)
        return [[level[i].float().cpu().contiguous() for level in maps] for i in range(len(images))]

    share = processes.share(files)
    for loaded, maps in stream.results(share, data['input_size'][0], prepare, compute, prints=True):
        size = loaded.pixels.shape[1:]
        how = 'centre, ' if args.crop else ''
        shapes = ', '.join('x'.join(map(str, level.shape)) for level in maps)
        picture, tensors = targets.pictures.get(loaded.file.path), targets.features.get(loaded.file.path)
        if picture:
            _draw(loaded, maps, size, picture, classifier, args.crop)
            print(f'{clean(picture, 4096)}: {shapes} ({how}{size[0]}x{size[1]})', flush=True)
        if tensors:
            _save(maps, tensors, classifier.name)
            names = ', '.join(f'stage{i}' for i in range(len(maps)))
            print(f'{clean(tensors, 4096)}: {names} ({how}{size[0]}x{size[1]})', flush=True)
    stream.refuse_none()
    stream.say()


def _checked(args: argparse.Namespace) -> Tuple[List[ImageFile], _Targets]:
    files = find_images(args.images)
    targets = _Targets(args, files)
    refuse_inputs((*targets.pictures.values(), *targets.features.values()), files, args.checkpoint)
    return files, targets


def _save(maps: List[torch.Tensor], path: Path, name: str) -> None:
    content = save({f'stage{i}': level for i, level in enumerate(maps)}, metadata={'model': as_text(name)})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(path, lambda f: f.write(content))


def _draw(
        loaded: Loaded, maps: List[torch.Tensor], size: Tuple[int, int], picture: Path, classifier: Classifier,
        crop: bool) -> None:
    if crop:  # what the model saw
        image = as_image(loaded.pixels)
    else:
        image = open_image(loaded.file.path, classifier.data['input_size'][0])
    draw_pyramid(
        image, maps, size, picture, f'Features of {classifier.name}', Path(loaded.file.name).name)
