""" Draw feature pyramids in false colours. Needs matplotlib (the `draw` extra). """
from pathlib import Path
from typing import Any, Callable, List, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..files import save_atomically
from .errors import clean

__all__ = ['draw_pyramid', 'false_colour', 'new_figure', 'pca', 'picture_text', 'save_picture', 'with_gaps']

# Arrangements of the image (I) and four levels (0 to 3), for images from the narrowest to the widest
_MOSAICS = ('I0123', 'II01;II23', 'II;II;01;23', 'I;0;1;2;3')


def new_figure(**kwargs: Any) -> Any:
    """Return matplotlib's `Figure` without pyplot, so that no window is opened."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('Drawing needs the `draw` extra of pvt-timm: pip install matplotlib') from e
    return Figure(dpi=150, **kwargs)


def picture_text(text: Any, limit: int = 200) -> str:
    """Return text of unknown origin as one line for a picture.

    '$' is escaped, because matplotlib takes it for the start of a formula. The text is cut off after `limit`
    characters, because the memory for a picture grows with its longest line.
    """
    return clean(text, limit).replace('$', r'\$')


def save_picture(output: Union[str, Path], write: Callable[[Any], Any]) -> None:
    """Create a picture's folder, if it does not exist, and the picture, with what `write` writes into the open file."""
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    save_atomically(output, write)


def pca(features: torch.Tensor) -> torch.Tensor:
    """Return the scores (3, H, W) of the first three principal components of a feature map (C, H, W), in float64."""
    x = features.flatten(1).double()
    x = x - x.mean(1, keepdim=True)
    _, vectors = torch.linalg.eigh(x @ x.T)  # ascending
    return (vectors[:, -3:].flip(1).T @ x).unflatten(1, features.shape[1:])


def false_colour(levels: Sequence[torch.Tensor], image: torch.Tensor) -> List[np.ndarray]:
    """Return three principal components of every feature map (C, H, W) as red, green and blue (H, W, 3), 0 to 1.

    The sign of a principal component is arbitrary. Here it is chosen so that every level looks like the level before
    it, and the first level like the image (3, H, W). So a colour has a similar meaning in all levels, as far as
    possible.
    """
    colours = []
    before = image.double().mean(0, keepdim=True).expand(3, -1, -1)
    for level in levels:
        scores = pca(level)
        reference = F.interpolate(before[None], size=scores.shape[1:], mode='area')[0]
        reference = reference - reference.mean((1, 2), keepdim=True)
        before = torch.where((scores * reference).sum((1, 2), keepdim=True) < 0, -scores, scores)
        # percentiles, as a few outliers would leave everything else grey
        low, high = np.quantile(before.numpy(), (.02, .98), axis=(1, 2), keepdims=True)
        flat = high - low <= 1e-6 * level.abs().max().item()  # constant, except for rounding
        colour = np.where(flat, .5, (before.numpy() - low) / np.where(flat, 1, high - low))
        colours.append(colour.clip(0, 1).transpose(1, 2, 0))
    return colours


def with_gaps(pixels: np.ndarray, cells: Tuple[int, int], cell_size: Tuple[int, int]) -> np.ndarray:
    """Return a sheet of images (H, W, 3) with white gaps between the images. A gap is an eighth of an image wide.

    Args:
        pixels: The sheet, or a feature map of the sheet, with values in bytes or from 0 to 1.
        cells: Rows and columns of images.
        cell_size: Height and width that each image is enlarged to. They are multiples of the image's own.
    """
    white = 255 if pixels.dtype == np.uint8 else 1
    for axis in (0, 1):
        pixels = pixels.repeat(cell_size[axis] * cells[axis] // pixels.shape[axis], axis)
        gap = np.full_like(pixels.take(range(cell_size[axis] // 8), axis), white)
        parts = []
        for part in np.split(pixels, cells[axis], axis):
            parts += [part, gap]
        pixels = np.concatenate(parts[:-1], axis)
    return pixels


def draw_pyramid(
        image: Image.Image, features: Sequence[torch.Tensor], img_size: Tuple[int, int], output: Union[str, Path],
        title: str, name: str = 'image', note: str = '', cells: Tuple[int, int] = (1, 1)) -> None:
    """Draw an image and its four feature levels, each labelled with stride, channels, height and width.

    Args:
        image: The part of the image that the model saw, at any size.
        features: Feature maps (C, H, W), the finest first.
        img_size: Height and width that the model saw.
        output: File to write. Its extension says the format (png, pdf, svg, jpg...).
        title: Line at the top of the picture.
        name: Name of the image, written above the image.
        note: Line at the bottom, before the explanation of the colours.
        cells: If the image is a sheet of images: its rows and columns. Gaps are drawn between them.
    """
    image = image.convert('RGB')
    image.thumbnail((2000, 2000))
    rgb = np.array(image)
    height, width = img_size
    panels = {'I': (f'{picture_text(name, 60)}\n{height} × {width} pixels', rgb)}
    colours = false_colour(features, torch.from_numpy(rgb).permute(2, 0, 1))
    for i, (level, colour) in enumerate(zip(features, colours)):
        C, H, W = level.shape
        panels[str(i)] = f'stride {round(height / H)}\n{C} channels, {H} × {W}', colour

    mosaic = _MOSAICS[sum(width > aspect * height for aspect in (0.5, 2, 4))].split(';')
    inches = 12.8 if len(mosaic[0]) > 2 else 7.2  # a slide or a page
    panel = inches / len(mosaic[0]) * height / width
    figure = new_figure(figsize=(inches, min(8.6, (panel + 0.5) * len(mosaic) + 0.7)), layout='constrained')
    for key, axes in figure.subplot_mosaic('\n'.join(mosaic)).items():
        text, pixels = panels[key]
        if cells != (1, 1):
            pixels = with_gaps(pixels, cells, (height // cells[0], width // cells[1]))
        axes.imshow(pixels, interpolation='nearest', extent=(0, width, height, 0))
        axes.set_title(text, loc='left', fontsize=10)
        axes.set_anchor('N')
        axes.set_axis_off()
    figure.suptitle(picture_text(title, 100), fontsize=15, weight='bold')
    below = f'{picture_text(note)}\nColours: first three principal components of each level. Sizes: height × width.'
    figure.supxlabel(below.strip(), fontsize=9)
    # the format is given, because matplotlib cannot take it from the name of the temporary file
    save_picture(output, lambda f: figure.savefig(f, format=Path(output).suffix.lstrip('.').lower() or 'png'))
