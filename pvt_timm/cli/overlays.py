""" Draw the pictures of `detect` and `segment`: boxes, masks, segments and names over an image. Needs matplotlib. """
import colorsys
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor

from .errors import clean
from .pictures import new_figure, picture_text, save_picture

__all__ = ['SMALLEST_SHARE', 'distinct_color', 'draw_detections', 'draw_segments']

Rows = List[Dict[str, Any]]
Color = Tuple[int, ...]  # red, green, blue, 0 to 255
Rectangle = Tuple[float, float, float, float]  # left, bottom, right, top in pixels of the picture, y pointing upwards

SMALLEST_SHARE = 0.005  # of an image. Classes with a smaller share are not in legends and not shown on the terminal

# Most people with a colour deficiency can tell these apart too, and white text on them is readable
_COLORS = ('#d1495b', '#1f77b4', '#2a8c55', '#8e5bb5', '#b8741a', '#17808a', '#c2488f', '#5f6b2d', '#4455a8', '#7a4b3a')
_INCHES = 9  # length of the longer side of an image in a picture
_LEAST_INCHES = 2  # length of any side of a picture at least, so that names fit beside thin images
_LEGEND = 14  # classes in a legend at most
_NAMED_SHARE = 0.02  # a class with this share of the image or more has its name on its segment too


def distinct_color(rank: int) -> Color:
    """Return red, green and blue of colour number `rank` (from 0). The first ten colours differ most."""
    if rank < len(_COLORS):
        return ImageColor.getrgb(_COLORS[rank])
    hue = rank * 0.618034 % 1  # with the golden ratio, every hue is far from those before it
    lightness, saturation = (0.35, 0.5, 0.62)[rank % 3], (0.85, 0.6)[rank % 2]
    return tuple(round(255 * x) for x in colorsys.hls_to_rgb(hue, lightness, saturation))


# ---- positions in a picture ------------------------------------------------------------------------------------------

def _overlap(a: Rectangle, b: Rectangle) -> float:
    """Return the area that two rectangles share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.) * max(height, 0.)


def _area(a: Rectangle) -> float:
    return (a[2] - a[0]) * (a[3] - a[1])


@dataclass
class _Canvas:
    """A picture that shows a whole image. Texts are placed inside of the picture, and its size does not change."""
    figure: Any
    axes: Any  # a unit is a pixel of the image, counted from its upper left corner
    renderer: Any
    width: float  # of the picture, in pixels of the picture
    height: float
    left: float  # left edge of the image in the picture
    bottom: float
    zoom: float  # pixels of the picture for one of the image
    image_height: int

    @classmethod
    def showing(cls, pixels: np.ndarray, interpolation: str) -> '_Canvas':
        h, w = pixels.shape[:2]
        inches = _INCHES / max(h, w)
        size = max(w * inches, _LEAST_INCHES), max(h * inches, _LEAST_INCHES)
        figure = new_figure(figsize=size)  # says what to install if matplotlib is missing
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        part = w * inches / size[0], h * inches / size[1]
        axes = figure.add_axes(((1 - part[0]) / 2, (1 - part[1]) / 2, *part))
        axes.imshow(pixels, interpolation=interpolation, extent=(0, w, h, 0), aspect='auto')
        axes.set_axis_off()
        axes.autoscale(False)
        width, height = (x * figure.dpi for x in size)
        return cls(
            figure, axes, FigureCanvasAgg(figure).get_renderer(), width, height, width * (1 - part[0]) / 2,
            height * (1 - part[1]) / 2, inches * figure.dpi, h)

    def of_box(self, box: Sequence[float]) -> Rectangle:
        """Return the rectangle in the picture of a box x1, y1, x2, y2 of the image."""
        x1, y1, x2, y2 = box
        top, bottom = self.image_height - y1, self.image_height - y2
        return (self.left + x1 * self.zoom, self.bottom + bottom * self.zoom,
                self.left + x2 * self.zoom, self.bottom + top * self.zoom)

    def text(self, text: str, **kwargs: Any) -> Any:
        """Create a text, which `move` has to place. Returns the text, its width and its height.

        A text that is wider than the picture is cut off.
        """
        text = clean(text, 80)
        artist = self.figure.text(0, 0, text, va='baseline', ha='left', parse_math=False, **kwargs)
        while True:
            extent = artist.get_window_extent(self.renderer)
            if extent.width <= self.width - 8 or len(text) < 4:
                return artist, extent.width, extent.height
            text = text[:-2].rstrip() + '…'
            artist.set_text(text)

    def move(self, artist: Any, left: float, bottom: float) -> None:
        """Move the lower left corner of a text to the given position."""
        extent = artist.get_window_extent(self.renderer)
        x, y = artist.get_position()
        artist.set_position((x + (left - extent.x0) / self.width, y + (bottom - extent.y0) / self.height))

    def save(self, output: Path) -> None:
        save_picture(output, lambda f: self.figure.savefig(f, format='png'))


def _place_label(
        width: float, height: float, box: Rectangle, boxes: Sequence[Rectangle], labels: Sequence[Rectangle],
        canvas: Tuple[float, float]) -> Rectangle:
    """Return the place of a box's label. It is inside of the picture and, if possible, hides no label and no whole box.

    Args:
        width: Width of the label.
        height: Height of the label.
        box: The box that the label belongs to.
        boxes: The other boxes.
        labels: Places of the labels that were placed before.
        canvas: Width and height of the picture.
    """
    left, bottom, right, top = box
    places = [
        (left, top), (left, bottom - height), (right - width, top), (right - width, bottom - height),  # outside
        (left, top - height), (right - width, top - height), (left, bottom), (right - width, bottom),  # inside
        (right, top - height), (left - width, top - height), (right, bottom), (left - width, bottom)]  # at the side
    for step in range(1, 5):  # further up, down or inwards
        places += [(left, top + step * height), (left, bottom - (step + 1) * height), (left, top - (step + 1) * height)]
    best: Any = None
    for order, (x, y) in enumerate(places):
        x, y = min(max(x, 0.), canvas[0] - width), min(max(y, 0.), canvas[1] - height)
        place = (x, y, x + width, y + height)
        on_labels = sum(_overlap(place, label) for label in labels) / _area(place)
        on_own = _overlap(place, box) / max(_area(box), 1.)
        on_others = max((_overlap(place, other) / max(_area(other), 1.) for other in boxes), default=0.)
        cost = 10 * on_labels + 2 * on_own + 0.5 * on_others + 0.02 * order
        if best is None or cost < best[0]:
            best = cost, place
    return best[1]


# ---- objects ---------------------------------------------------------------------------------------------------------

def draw_detections(image: Image.Image, objects: Rows, masks: Sequence[torch.Tensor], output: Path) -> None:
    """Draw objects over an image: boxes with names and scores, and masks (H, W) if there are any.

    Without masks, each class has a colour. With masks, each object has a colour. Where masks overlap, a pixel gets the
    colour of the object with the best score. The outlines of all masks are drawn.

    Args:
        objects: The objects, the one with the best score first.
        masks: A mask for each object, or none.
    """
    colors = _colors_of_objects(objects) if len(masks) else _colors_of_classes(objects)
    canvas = _Canvas.showing(_fill(np.array(image.convert('RGB')), masks, colors), 'lanczos')
    h, w = image.height, image.width
    for mask, color in zip(masks, colors):
        _draw_outline(canvas.axes, mask, color)
    line = 2.
    margin = line / 2 * canvas.figure.dpi / 72 / canvas.zoom  # so that all of the line is inside
    for row, color in reversed(list(zip(objects, colors))):
        x1, x2 = (min(max(x, margin), max(w - margin, margin)) for x in row['box'][::2])
        y1, y2 = (min(max(y, margin), max(h - margin, margin)) for y in row['box'][1::2])
        canvas.axes.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=_unit(color), linewidth=line)

    font = 10 if len(objects) <= 25 else 7
    pad = 0.2 * font * canvas.figure.dpi / 72
    boxes = [canvas.of_box(row['box']) for row in objects]
    labels: List[Rectangle] = []
    for i, (row, color) in enumerate(zip(objects, colors)):
        text, width, height = canvas.text(
            f'{row["name"]} {row["score"]:.0%}', color='white', weight='bold', fontsize=font,
            bbox=dict(color=_unit(color), boxstyle='square,pad=0.2'), zorder=len(objects) - i)
        others = boxes[:i] + boxes[i + 1:]
        place = _place_label(
            width + 2 * pad, height + 2 * pad, boxes[i], others, labels, (canvas.width, canvas.height))
        canvas.move(text, place[0] + pad, place[1] + pad)
        labels.append(place)
    canvas.save(output)


def _unit(color: Color) -> Tuple[float, ...]:
    return tuple(x / 255 for x in color)


def _colors_of_classes(objects: Rows) -> List[Color]:
    names = list(dict.fromkeys(row['name'] for row in objects))
    return [distinct_color(names.index(row['name']) % len(_COLORS)) for row in objects]


def _colors_of_objects(objects: Rows) -> List[Color]:
    """Return a colour for each object. Objects whose boxes overlap get different ones, if there are enough colours."""
    chosen: List[int] = []
    boxes: List[Rectangle] = [tuple(row['box']) for row in objects]
    for i, box in enumerate(boxes):
        costs = []
        for color in range(len(_COLORS)):
            same = [boxes[k] for k in range(i) if chosen[k] == color]
            costs.append((sum(_overlap(box, other) > 0 for other in same), len(same)))
        chosen.append(costs.index(min(costs)))
    return [distinct_color(color) for color in chosen]


def _fill(pixels: np.ndarray, masks: Sequence[torch.Tensor], colors: Sequence[Color]) -> np.ndarray:
    """Return the pixels, mixed half and half with the colours of masks. Where masks overlap, the first one counts."""
    if not len(masks):
        return pixels
    owner = np.full(pixels.shape[:2], -1)
    for i, mask in reversed(list(enumerate(masks))):
        owner[mask.numpy()] = i
    inside = owner >= 0
    filled = pixels.copy()
    filled[inside] = (pixels[inside] + np.array(colors)[owner[inside]]) / 2
    return filled


def _draw_outline(axes: Any, mask: torch.Tensor, color: Color) -> None:
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    if not len(rows):
        return
    top, left = int(rows[0]), int(columns[0])
    part = F.pad(mask[top:rows[-1] + 1, left:columns[-1] + 1].float(), (1, 1, 1, 1))  # closes outlines at the edges
    x, y = (np.arange(n) + start - 0.5 for n, start in zip(part.shape[::-1], (left, top)))
    axes.contour(x, y, part.numpy(), levels=[0.5], colors=[_unit(color)], linewidths=1.5)


# ---- classes of pixels -----------------------------------------------------------------------------------------------

def draw_segments(
        image: Image.Image, labels: torch.Tensor, classes: Rows, palette: Optional[Sequence[Color]], output: Path,
) -> None:
    """Draw the class (H, W) of every pixel over an image, with lines between classes and a legend.

    If a class covers 2% of the image or more, its name is written on it. The names tell classes of similar colours
    apart.

    Args:
        image: The image that was segmented.
        labels: A class per pixel.
        classes: The classes in the image, the largest first: 'label', 'name' and 'share' of the image.
        palette: Colour of every class. By default the largest class gets the first of `distinct_color`, and so on.
        output: File to write.
    """
    colors = {row['label']: palette[row['label']] if palette else distinct_color(rank)
              for rank, row in enumerate(classes)}
    table = np.zeros((int(labels.max()) + 1, 3))
    for label, color in colors.items():
        table[label] = color
    pixels = 0.4 * np.array(image.convert('RGB')) + 0.6 * table[labels.numpy()]
    pixels[_borders(labels).numpy()] *= 0.45
    canvas = _Canvas.showing(pixels.astype(np.uint8), 'nearest')
    placed: List[Rectangle] = []
    for row in classes:
        if row['share'] >= _NAMED_SHARE:
            _name_segment(canvas, labels == row['label'], row['name'].split(';')[0], placed)

    shown = [row for row in classes[:_LEGEND] if row['share'] >= SMALLEST_SHARE]
    handles, texts = [], []  # lists, because by itself the legend leaves out artists whose label starts with '_'
    for row in shown:
        handles.append(canvas.axes.scatter([], [], s=120, marker='s', color=[_unit(colors[row['label']])]))
        texts.append(f'{picture_text(row["name"].split(";")[0], 40)}  {row["share"]:.0%}')
    if len(classes) > len(shown):
        handles.append(canvas.axes.scatter([], [], alpha=0))
        texts.append(f'and {len(classes) - len(shown)} more')
    canvas.axes.legend(
        handles, texts, loc='upper left', bbox_to_anchor=(1, 1), frameon=False, fontsize=11, borderaxespad=0)
    save_picture(output, lambda f: canvas.figure.savefig(f, format='png', bbox_inches='tight', pad_inches=0.05))


def _borders(labels: torch.Tensor) -> torch.Tensor:
    """Return the lines between classes: a mask (H, W) of pixels whose neighbour below or right has another class."""
    borders = torch.zeros(labels.shape, dtype=torch.bool)
    borders[:-1] |= labels[:-1] != labels[1:]
    borders[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    reach = max(labels.shape) // 1300  # pixels to widen a line by on both sides, if the picture shows the image smaller
    wide = F.max_pool2d(borders[None].float(), 2 * reach + 1, stride=1, padding=reach)[0]
    return wide > 0 if max(labels.shape) > 100 else torch.zeros_like(borders)  # a small image would be full of lines


def _name_segment(canvas: _Canvas, inside: torch.Tensor, name: str, placed: List[Rectangle]) -> None:
    """Write a name where its class is widest, if there is room for it and it overlaps no other name."""
    from matplotlib.patheffects import withStroke

    text, width, height = canvas.text(name, color='white', weight='bold', fontsize=10, path_effects=[
        withStroke(linewidth=2.5, foreground='#222222')])
    (row, column), reach = _widest(inside)
    x, _, _, y = canvas.of_box((column, row, column, row))
    x, y = min(max(x - width / 2, 2), canvas.width - width - 2), min(max(y - height / 2, 2), canvas.height - height - 2)
    place = (x, y, x + width, y + height)
    if reach * canvas.zoom < height / 2 or any(_overlap(place, other) for other in placed):
        text.remove()
        return
    canvas.move(text, x, y)
    placed.append(place)


def _widest(inside: torch.Tensor) -> Tuple[Tuple[float, float], float]:
    """Return row and column of the pixel that is farthest from the edges of a region (H, W), and this distance.

    Position and distance are approximate, in pixels.
    """
    step = math.ceil(max(inside.shape) / 160)  # a coarse grid is enough
    part = F.pad(inside[::step, ::step].float()[None], (1, 1, 1, 1))
    depth = 0
    while True:
        smaller = -F.max_pool2d(-part, 3, stride=1, padding=1)
        if not smaller.any() or depth > 200:
            break
        part, depth = smaller, depth + 1
    cells = part[0].nonzero()
    if not len(cells):  # the region has no pixel on the coarse grid
        return (0., 0.), 0.
    row, column = cells[len(cells) // 2].tolist()
    return ((row - 1 + 0.5) * step, (column - 1 + 0.5) * step), (depth + 0.5) * step
