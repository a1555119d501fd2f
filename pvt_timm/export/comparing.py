""" Compare the outputs of an exported file with those of PyTorch. """
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
import torch.nn as nn

from .graphs import Graph, Size

__all__ = [
    'AT_THE_END', 'HALF_TOLERANCE', 'TOLERANCE', 'compare', 'compare_detections', 'distance', 'scores_to_compare',
    'sizes_to_check', 'thresholds_of',
]

Runner = Callable[[torch.Tensor], List[torch.Tensor]]

# Largest allowed difference from PyTorch's outputs, as a share of the largest value, or of 1 if that is larger. For
# boxes it is a share of the longer side of the image
TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2
# Masks have a larger tolerance: in a small box their values go from 0 to 1 within a pixel or less, so a small shift of
# the box changes them a lot
MASK_TOLERANCE = 5e-2
# An object whose score is less than this above the lowest score of a list may be missing in the other list
AT_THE_END = 1e-4
# Number of objects that are needed in each image to compare detectors
_ENOUGH = 10


def sizes_to_check(img_size: Tuple[int, int], smallest: int, dynamic: bool) -> List[Size]:
    """Return the sizes to compare at: that of the export and, for a dynamic target, two others.

    One of these is larger, the other one is not divisible by the strides.
    """
    height, width = img_size
    if not dynamic:
        return [(1, height, width)]
    odd = max(smallest, height // 2) + 3, max(smallest, width // 2) + 17
    return [(1, height, width), (2, height + 96, width + 32), (3, *odd)]


@torch.no_grad()
def compare(
        run: Runner, reference: nn.Module, graph: Graph, sizes: Sequence[Size], tolerance: float) -> Dict[Size, float]:
    """Return the largest difference of outputs at each size, as a share of the largest value or of 1.

    Raises:
        ValueError: A difference is larger than `tolerance`, or an output has another shape.
    """
    differences = {}
    for size in sizes:
        x = graph.example(*size)
        largest = 0.
        for name, actual, expected in zip(graph.outputs, run(x), reference(x), strict=True):
            if actual.shape != expected.shape:
                raise ValueError(f'{name} has the shape {tuple(actual.shape)} for {size}, not {tuple(expected.shape)}')
            difference = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
            largest = max(largest, difference.item() if actual.isfinite().all() else float('inf'))
        differences[size] = largest
    if max(differences.values()) > tolerance:
        found = ', '.join(f'{"x".join(map(str, size))}: {value:.1e}' for size, value in differences.items())
        raise ValueError(f'Outputs differ from those of PyTorch by more than {tolerance:.0e} of the largest: {found}')
    return differences


# detectors ------------------------------------------------------------------------------------------------------------

def thresholds_of(model: Any) -> Any:
    """Return the part of a detector with the limits `score_thresh` (lowest score) and `detections_per_img`."""
    return model if hasattr(model, 'score_thresh') else model.roi_heads


@torch.no_grad()
def scores_to_compare(reference: Any, graph: Graph) -> float:
    """Return the `score_thresh` to compare a detector with: the detector's own, or 0 if it finds too few objects.

    Without objects, any two files would agree.
    """
    part = thresholds_of(reference.model)
    own = part.score_thresh
    try:
        part.score_thresh = 0.
        scores = [reference(graph.example(*size))[1].sort(descending=True)[0] for size in graph.example_sizes()]
    finally:
        part.score_thresh = own
    enough = [found[:_ENOUGH][-1].item() for found in scores if len(found)]
    if not enough:
        raise ValueError('The detector finds nothing in random images at any score, so its file cannot be compared')
    return own if min(enough) > own + AT_THE_END else 0.


@torch.no_grad()
def compare_detections(run: Runner, reference: Any, graph: Graph, tolerance: float) -> Dict[Size, float]:
    """Return the largest difference of boxes (as a share of the longer side), scores and masks, at each size.

    Each object has to be in the lists of the file and of PyTorch, except those at the end of a list. A list ends at a
    certain score or number of objects, so rounding decides which objects are the last ones.

    Raises:
        ValueError: An object is missing in one of the lists, or masks have another size.
    """
    part = thresholds_of(reference.model)
    differences = {}
    compared = 0
    for size in graph.example_sizes():
        image = graph.example(*size)
        actual, expected = ([output.float() for output in outputs] for outputs in (run(image), reference(image)))
        if len(actual) > 3 and actual[3].shape[1:] != expected[3].shape[1:]:
            shapes = [tuple(masks.shape) for masks in (actual[3], expected[3])]
            raise ValueError(f'masks have the shape {shapes[0]} for {size}, not {shapes[1]}')
        lowest = part.score_thresh
        for scores in (actual[1], expected[1]):
            if len(scores) == part.detections_per_img:
                lowest = max(lowest, scores.min().item())
        compared += int((expected[1] > lowest + AT_THE_END).sum())
        side = max(size[1:])
        forth, missing = distance(actual, expected, lowest + AT_THE_END, side, tolerance)
        back, left_over = distance(expected, actual, lowest + AT_THE_END, side, tolerance)
        if missing or left_over:
            raise ValueError(
                f'Objects differ from those of PyTorch in an image of {size[1]}x{size[2]} pixels: of '
                f'{len(expected[1])} found by PyTorch and {len(actual[1])} by the file, {missing + left_over} have no '
                f'counterpart of the same class whose box, score and mask are the same to {tolerance:.0e}')
        differences[size] = max(forth, back)
    if not compared and part.score_thresh == 0:
        raise ValueError('The scores of all objects are alike to the fourth digit, as those of a detector that was not '
                         'trained are, so its file cannot be compared')
    return differences


def distance(
        some: List[torch.Tensor], others: List[torch.Tensor], lowest: float, side: int, tolerance: float,
) -> Tuple[float, int]:
    """Compare objects that have a score above `lowest` with the same objects in another list.

    Returns:
        The largest difference, and the number of objects that are not in the other list.
    """
    largest, missing = 0., 0
    boxes, scores, labels, *masks = some
    for i in (scores > lowest).nonzero()[:, 0].tolist():
        if not all(output[i].isfinite().all() for output in some):
            missing += 1
            continue
        away = (others[0] - boxes[i]).abs().amax(dim=1) / side
        away = torch.maximum(away, (others[1] - scores[i]).abs())
        away = away.masked_fill(others[2] != labels[i], float('inf'))
        near = (away <= tolerance).nonzero()[:, 0]  # masks are large, so only those of the nearest objects are compared
        away = away[near]
        if masks:
            of_masks = (others[3][near] - masks[0][i]).abs().amax(dim=(1, 2, 3))
            away = torch.maximum(away, of_masks)[of_masks <= max(tolerance, MASK_TOLERANCE)]
        if not len(away):
            missing += 1
            continue
        largest = max(largest, away.min().item())
    return largest, missing
