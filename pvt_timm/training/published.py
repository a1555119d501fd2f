""" The published figures of detection and segmentation, and how close measured figures have to be to them. """
from typing import Dict, List, Mapping, Optional, Tuple

__all__ = ['ALLOWED', 'OPENMMLAB', 'PAPER', 'compare', 'published_figures']

ALLOWED = 0.2  # 0.05 for the rounding of the published figure, the rest for other JPEG decoders and other resizing

# Percent on COCO val2017, of the 1x schedule; (kind, model, shorter side of images) -> figures
PAPER: Dict[Tuple[str, str, int], Dict[str, float]] = {
    ('retinanet', 'pvt_tiny', 800): {'box/AP': 36.7},
    ('retinanet', 'pvt_small', 800): {'box/AP': 40.4},
    ('retinanet', 'pvt_small', 640): {'box/AP': 38.7},
    ('retinanet', 'pvt_medium', 800): {'box/AP': 41.9},
    ('retinanet', 'pvt_large', 800): {'box/AP': 42.6},
    ('mask_rcnn', 'pvt_tiny', 800): {'box/AP': 36.7, 'mask/AP': 35.1},
    ('mask_rcnn', 'pvt_small', 800): {'box/AP': 40.4, 'mask/AP': 37.8},
    ('mask_rcnn', 'pvt_medium', 800): {'box/AP': 42.0, 'mask/AP': 39.0},
    ('mask_rcnn', 'pvt_large', 800): {'box/AP': 42.9, 'mask/AP': 39.5},
    # on ADE20K's validation set, of the original code, which is better than the paper's table
    ('semantic_fpn', 'pvt_tiny', 512): {'mIoU': 36.6},
    ('semantic_fpn', 'pvt_small', 512): {'mIoU': 41.9},
    ('semantic_fpn', 'pvt_medium', 512): {'mIoU': 43.5},
    ('semantic_fpn', 'pvt_large', 512): {'mIoU': 43.5},
}
# Of the files that OpenMMLab publishes, which `retinanet_coco` loads
OPENMMLAB = {'pvt_tiny': {'box/AP': 36.6}, 'pvt_small': {'box/AP': 40.4}, 'pvt_medium': {'box/AP': 41.7}}


def published_figures(kind: str, model: str, min_size: int, num_classes: int) -> Optional[Dict[str, float]]:
    """Return the published figures of a model, in percent, None if there are none."""
    expected = 150 if kind == 'semantic_fpn' else 80
    return PAPER.get((kind, model, min_size)) if num_classes == expected else None


def compare(
        measured: Mapping[str, float], published: Mapping[str, float], allowed: float = ALLOWED,
) -> Tuple[List[str], bool]:
    """Return lines that show measured and published figures, all in percent, and whether they are close enough.

    Args:
        measured: Measured figures by name.
        published: Published figures by name. Some may be missing.
        allowed: Largest allowed difference.
    """
    lines, near = [], True
    width = max(map(len, measured), default=0)
    for name, value in measured.items():
        line = f'{name:{width}s} {value:8.2f}'
        if name in published:
            difference = value - published[name]
            ok = round(abs(difference), 6) <= allowed
            near = near and ok
            line += (f'   published {published[name]:6.2f}   difference {difference:+.2f}   '
                     f'{"ok" if ok else f"NOT within {allowed}"}')
        lines.append(line)
    return lines, near
