""" The command `embed`: compute one vector per image, for many images, and write them to one file. """
import argparse
from typing import Any, Dict, List, Optional

import numpy as np
import torch

from .classifiers import check_output, load_model
from .errors import clean
from .many import (
    Loaded, Stream, Transformed, add_images, add_many_options, add_output_options, checked_images, normalise)
from .processes import Processes
from .results import VECTOR_SUFFIXES, Results, fingerprint, settings_of

__all__ = ['LAYERS', 'add_embed_options', 'embed', 'run_embed']

LAYERS = ('token', 'patches', 'stage0', 'stage1', 'stage2', 'stage3')


def add_embed_options(command: argparse.ArgumentParser) -> None:
    add_images(command)
    add_output_options(
        command, 'file for the paths of the images (`file`) and their vectors (`embedding`)',
        formats=', '.join(VECTOR_SUFFIXES), required=True)
    command.add_argument(
        '--layer', choices=LAYERS,
        help='token: the class token; patches: the mean of the other tokens; stage0 to stage3: the mean over the '
        'feature map of that stage. Token and patches are taken after the final norm, where the model has one: a model '
        "for feature maps has no class token and no final norm (default the layer that the model's classifier uses)")
    add_many_options(command)


def embed(model: Any, x: torch.Tensor, layer: str) -> torch.Tensor:
    """Return the vectors (B, length) of images (B, C, H, W).

    Args:
        layer: One of `LAYERS`. 'token' needs a model with a class token.
    """
    if layer.startswith('stage'):
        maps = model.forward_intermediates(
            x, indices=[int(layer.removeprefix('stage'))], stop_early=True, intermediates_only=True)
        return maps[0].mean((2, 3))
    tokens = model.forward_features(x)
    if model.output_nchw:
        tokens = tokens.flatten(2).transpose(1, 2)
    if layer == 'patches':
        return tokens[:, model.num_prefix_tokens:].mean(1)
    return tokens[:, 0]


def choose_layer(model: Any, layer: Optional[str]) -> str:
    """Return `layer`, by default the layer that the model's classifier uses."""
    if layer is not None:
        return layer
    return 'token' if model.num_prefix_tokens and model.global_pool != 'avg' else 'patches'


def run_embed(args: argparse.Namespace) -> None:
    with Processes() as processes:
        _embed_all(args, processes)


def _embed_all(args: argparse.Namespace, processes: Processes) -> None:
    results = Results(args.output, overwrite=args.overwrite)
    files = processes.from_first(lambda: checked_images(args, results))  # before weights are downloaded
    stream = Stream(args, processes)
    classifier = load_model(args.model, args.checkpoint, img_size=args.img_size, prefix=args.prefix, headless=True)
    layer = choose_layer(classifier.model, args.layer)
    if layer == 'token' and not classifier.model.num_prefix_tokens:
        raise ValueError(f'Expected a model with a class token for --layer token, {classifier.name} has none')

    settings: Dict[str, Any] = dict(
        command='embed', model=classifier.name, weights=fingerprint(classifier.model),
        model_settings=settings_of(classifier.model), layer=layer, dtype=args.dtype, preprocessing=classifier.data)

    def compute(images: List[Loaded], pixels: torch.Tensor) -> List[np.ndarray]:
        vectors = embed(classifier.model, normalise(pixels, classifier.data).to(stream.dtype), layer)
        check_output(vectors, classifier.name)
        return list(vectors.float().cpu().numpy())

    pools_token = classifier.model.global_pool == 'token'
    classifier.model = stream.place(classifier.model, class_token_only=layer == 'token' and pools_token)
    count = stream.write(
        files, classifier.data['input_size'][0], Transformed(classifier.data), compute, results, settings,
        info=dict(model=classifier.name, layer=layer))
    if processes.is_first:
        print(f'{clean(args.output, 4096)}: {count:,} vectors, {layer} of {clean(classifier.name)}')
    stream.say()
