""" Draw feature pyramids as false colour. Needs matplotlib (the `draw` extra). """
import math
from pathlib import Path
from typing import List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..files import save_atomically
from .errors import UserError

__all__ = ['draw_pyramid', 'false_colour', 'pca']

SUBTLE = '#6b6b6b'


def pca(features: torch.Tensor, num_components: int = 3) -> torch.Tensor:
    """Scores of the first principal components.

    Args:
        features: Feature map (C, H, W).
        num_components: How many, those that are not there (too few positions) are 0.

    Returns:
        Scores (num_components, H, W), float64. The largest loading of every component is positive.
    """
    C, H, W = features.shape
    x = features.reshape(C, H * W).T.double()
    x = x - x.mean(0)
    # a rank below that of numerical noise gives no component
    U, S, V = torch.linalg.svd(x, full_matrices=False)
    keep = int((S > S.max().clamp(min=1e-12) * 1e-6).sum().clamp(max=num_components)) if S.numel() else 0
    scores = torch.zeros(num_components, H * W, dtype=torch.float64)
    if keep:
        loadings = V[:keep]
        signs = loadings.gather(1, loadings.abs().argmax(1, keepdim=True)).sign()
        scores[:keep] = (U[:, :keep] * S[:keep]).T * signs
    return scores.reshape(num_components, H, W)


def false_colour(levels: Sequence[torch.Tensor], image: torch.Tensor) -> List[torch.Tensor]:
    """Feature maps to colours: three principal components of every level as red, green and blue.

    A component's sign is free. It is chosen so that every level looks most like the one before it, the first one like
    the image, so that a colour keeps its meaning down the pyramid as far as it can.

    Args:
        levels: Feature maps (C, H, W), the finest first.
        image: The image (3, H, W).

    Returns:
        Colours (H, W, 3) between 0 and 1 for every level.
    """
    colours = []
    before = image.double().mean(0, keepdim=True).expand(3, -1, -1)
    for level in levels:
        scores = pca(level.float())
        reference = F.interpolate(before[None], size=scores.shape[1:], mode='area')[0]
        reference = reference - reference.mean((1, 2), keepdim=True)
        signs = (scores * reference).sum((1, 2), keepdim=True).sign()
        scores = scores * torch.where(signs == 0, 1, signs)
        # percentiles, as a few outliers would leave everything else grey
        flat = scores.flatten(1)
        low, high = torch.quantile(_sample(flat), torch.tensor([.02, .98], dtype=flat.dtype), dim=1)[:, :, None, None]
        span = (high - low)
        scaled = torch.where(span > 1e-12, (scores - low) / span.clamp(min=1e-12), torch.full_like(scores, .5))
        colours.append(scaled.clamp(0, 1).permute(1, 2, 0))
        before = scores
    return colours


def _sample(x: torch.Tensor, limit: int = 1_000_000) -> torch.Tensor:
    return x[:, ::math.ceil(x.shape[1] / limit)]  # torch.quantile takes 16 million values at most


# Arrangements of the image (I) and four levels (0 to 3). For the shapes that are wide enough a slide, else a page.
_MOSAICS = ('I0123', 'II01;II23', 'II;II;01;23', 'I;0;1;2;3')


def _mosaic(aspect: float) -> List[str]:
    """Rows of the arrangement that comes closest to a slide where every panel has the given width over height."""
    mosaics = [mosaic.split(';') for mosaic in _MOSAICS]
    return min(mosaics, key=lambda rows: abs(math.log(aspect * len(rows[0]) / len(rows) / 1.6)))


def draw_pyramid(
        image: Image.Image,
        features: Sequence[torch.Tensor],
        output: Union[str, Path],
        title: Optional[str] = None,
        img_size: Optional[Tuple[int, int]] = None,
        note: str = '',
        cells: Tuple[int, int] = (1, 1),
) -> None:
    """Draw an image and its four feature levels, each labelled with stride, channels, height and width.

    Args:
        image: All of it as the model saw it, at any size.
        features: Feature maps (C, H, W), the finest first.
        output: File to write, its extension says the format (png, pdf, svg, jpg...).
        title: Line above everything.
        img_size: Height and width that the model saw, those of `image` by default.
        note: Line below everything, before what the colours are.
        cells: Rows and columns of an image that is a sheet of images, to draw lines between them.

    Raises:
        UserError: matplotlib is not installed.
        ValueError: No such format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as e:
        raise UserError('Drawing needs the `draw` extra of pvt-timm: pip install matplotlib') from e

    image = image.convert('RGB')
    image.thumbnail((2000, 2000))
    rgb = np.array(image)
    height, width = img_size or rgb.shape[:2]
    panels = {'I': ('image', f'{height} × {width} pixels', rgb)}
    colours = false_colour(features, torch.from_numpy(rgb).permute(2, 0, 1))
    for i, (level, colour) in enumerate(zip(features, colours)):
        C, H, W = level.shape
        panels[str(i)] = f'stride {round(height / H)}', f'{C} channels, {H} × {W}', colour.numpy()

    aspect = min(max(width / height, 1 / 12), 12)
    rows = _mosaic(aspect)
    panel = (12.8 if len(rows[0]) > 2 else 7.2) / len(rows[0])  # inches
    panel = min(panel, 6 * aspect)
    size = max(panel, 2.5) * len(rows[0]), (panel / aspect + .33) * len(rows) + .7
    figure = Figure(figsize=size, dpi=150, layout=ConstrainedLayoutEngine(w_pad=.08, h_pad=.06))
    FigureCanvasAgg(figure)
    for key, axes in figure.subplot_mosaic('\n'.join(rows)).items():
        name, caption, pixels = panels[key]
        axes.imshow(pixels, interpolation='nearest', extent=(0, width, height, 0))
        axes.set_axis_off()
        axes.set_anchor('N')
        for i in range(1, cells[0]):
            axes.axhline(height * i / cells[0], color='white', linewidth=1)
        for i in range(1, cells[1]):
            axes.axvline(width * i / cells[1], color='white', linewidth=1)
        if panel < 2.3:  # too narrow for both in a line
            axes.set_title(f'{name}\n{caption}', loc='left', fontsize=10)
        else:
            axes.set_title(name, loc='left', fontsize=12, weight='bold')
            axes.set_title(caption, loc='right', fontsize=10, color=SUBTLE)
    if title:
        figure.suptitle(title, fontsize=15, weight='bold')
    figure.supxlabel(
        f'{note}\nColours: first three principal components of each level. Sizes: height × width.'.strip(),
        fontsize=9, color=SUBTLE)
    # the format by itself, as matplotlib would take it from a name that the temporary file does not have
    save_atomically(output, lambda f: figure.savefig(f, format=Path(output).suffix.lstrip('.').lower() or 'png'))
