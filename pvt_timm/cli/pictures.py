""" Draw feature pyramids as false colour. Needs matplotlib (the `draw` extra). """
import math
from pathlib import Path
from typing import List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F

from ..files import save_atomically

__all__ = ['draw_pyramid', 'false_colour', 'pca']

INK, SUBTLE = '#1a1a1a', '#6b6b6b'


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


def _layout(aspect: float) -> Tuple[str, int, int]:
    """Arrangement of the image and four levels that comes closest to a slide, with its columns and rows."""
    arrangements = {'row': (5, 1), 'left': (4, 2), 'top': (2, 4), 'column': (1, 5)}
    best = min(arrangements, key=lambda k: abs(math.log(aspect * arrangements[k][0] / arrangements[k][1] / 1.6)))
    return best, *arrangements[best]


def draw_pyramid(
        image,
        features: Sequence[torch.Tensor],
        output: Union[str, Path],
        title: Optional[str] = None,
        img_size: Optional[Tuple[int, int]] = None,
        note: Optional[str] = None,
        cells: Tuple[int, int] = (1, 1),
) -> None:
    """Draw an image and its four feature levels, each labelled with stride, channels and size.

    Args:
        image: PIL image, all of it as the model saw it, at any size.
        features: Feature maps (C, H, W), the finest first.
        output: File to write, its extension says the format (png, pdf, svg, jpg...).
        title: Line above everything.
        img_size: Height and width that the model saw, those of `image` by default.
        note: Line below everything, before what the colours are.
        cells: Rows and columns of an image that is a sheet of images, to draw lines between them.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No such format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('Drawing needs the `draw` extra of pvt-timm: pip install matplotlib') from e
    import numpy as np

    output = Path(output)
    suffix = output.suffix.lower().lstrip('.')
    accepted = FigureCanvasAgg.get_supported_filetypes()
    if suffix not in accepted:
        raise ValueError(f"expected a file name that ends in .{', .'.join(sorted(accepted))}, got '{output.name}'")

    image = image.convert('RGB')
    image.thumbnail((2000, 2000))
    rgb = np.array(image)
    colours = false_colour(features, torch.from_numpy(rgb).permute(2, 0, 1))
    if img_size is None:
        img_size = rgb.shape[:2]
    height, width = img_size
    captions = [('image', f'{width} × {height} pixels')]
    for level in features:
        C, H, W = level.shape
        captions.append((f'stride {round(height / H)}', f'{C} channels, {W} × {H}'))

    # All in inches. Widths are chosen for a slide (or a page, if it is upright).
    aspect = min(max(width / height, 1 / 12), 12)
    arrangement, columns, rows = _layout(aspect)
    gap, margin, header, footer = .18, .25, .45 if title else 0., .45 if note else .28
    wide = arrangement in ('row', 'left')
    panel_w = ((12.8 if wide else 7.2) - 2 * margin - (columns - 1) * gap) / columns
    panel_h = panel_w / aspect
    if panel_h > 4:  # upright images
        panel_h = min(max(4, 1.8 / aspect), 6)
        panel_w = panel_h * aspect
    slot_w = max(panel_w, 1.8)  # narrow panels leave room for their captions
    two_lines = panel_w < 2.75
    caption = .62 if two_lines else .48
    step_x, step_y = slot_w + gap, panel_h + caption
    if arrangement == 'row':
        boxes = [(i * step_x, 0, panel_w, panel_h) for i in range(5)]
    elif arrangement == 'column':
        boxes = [(0, i * step_y, panel_w, panel_h) for i in range(5)]
    elif arrangement == 'left':  # the image is as high as two levels and the caption between them
        big_h = 2 * panel_h + caption
        boxes = [(0, 0, big_h * aspect, big_h)]
        boxes += [(big_h * aspect + gap + x * step_x, y * step_y, panel_w, panel_h) for y in (0, 1) for x in (0, 1)]
    else:  # the image is as wide as two levels and the gap between them
        big_w = 2 * panel_w + gap
        boxes = [(0, 0, big_w, big_w / aspect)]
        boxes += [(x * step_x, big_w / aspect + caption + y * step_y, panel_w, panel_h) for y in (0, 1) for x in (0, 1)]
    total_w = max(x + max(w, slot_w) for x, _, w, _ in boxes) + 2 * margin
    total_h = max(y + h for _, y, _, h in boxes) + caption + header + footer + margin

    figure = Figure(figsize=(total_w, total_h), dpi=150, facecolor='white')
    FigureCanvasAgg(figure)
    for (x, y, w, h), pixels, (name, size) in zip(boxes, [rgb, *[c.numpy() for c in colours]], captions):
        top = margin + header + y
        axes = figure.add_axes((
            (margin + x) / total_w, 1 - (top + h) / total_h, w / total_w, h / total_h))
        axes.imshow(pixels, interpolation='nearest', aspect='auto')
        for i in range(1, cells[0]):
            axes.axhline(pixels.shape[0] * i / cells[0] - .5, color='white', linewidth=1)
        for i in range(1, cells[1]):
            axes.axvline(pixels.shape[1] * i / cells[1] - .5, color='white', linewidth=1)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        text_y = 1 - (top + h + .09) / total_h
        figure.text((margin + x) / total_w, text_y, name, fontsize=12, weight='bold', color=INK, va='top')
        if two_lines:
            figure.text((margin + x) / total_w, text_y - .21 / total_h, size, fontsize=10.5, color=SUBTLE, va='top')
        else:
            figure.text((margin + x + w) / total_w, text_y, size, fontsize=10.5, color=SUBTLE, va='top', ha='right')
    if title:
        figure.text(margin / total_w, 1 - margin / total_h, title, fontsize=15, weight='bold', color=INK, va='top')
    notes = [note] if note else []
    notes.append('Colours: the first three principal components of each level')
    figure.text(margin / total_w, .14 / total_h, '\n'.join(notes), fontsize=9.5, color=SUBTLE, va='bottom')
    save_atomically(output, lambda f: figure.savefig(f, format=suffix))
