""" Compute COCO's twelve figures with pycocotools, and IoU from a confusion matrix, over all processes. """
import contextlib
import copy
import io
from typing import Any, Dict, List, Mapping, Sequence

import numpy as np
import torch

__all__ = ['COCO_FIGURES', 'CocoEvaluation', 'coco_figures', 'coco_rows', 'iou_figures']

# In pycocotools' order: average precision over IoU, at 0.5 and 0.75 and for small, medium and large objects, then
# average recall with 1, 10 and 100 detections per image and for the three sizes
COCO_FIGURES = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR1', 'AR10', 'AR100', 'ARs', 'ARm', 'ARl')

Rows = List[Dict[str, Any]]


def coco_rows(detections: Mapping[str, torch.Tensor], image_id: int, category_ids: Mapping[int, int]) -> Rows:
    """Return the detections of one image in COCO's results format, with 'segmentation' if there are masks.

    Args:
        detections: 'boxes', 'scores', 'labels' and, if there are any, 'masks' (N, 1, H, W) from 0 to 1, as torchvision
            returns them.
        image_id: Id of the image.
        category_ids: The category id of each label. Detections with other labels are left out.
    """
    from pycocotools import mask as coco_mask

    rows: Rows = []
    found = {name: x.detach().cpu() for name, x in detections.items()}
    for n, (box, score, label) in enumerate(zip(
            found['boxes'].double(), found['scores'].tolist(), found['labels'].tolist())):
        if label not in category_ids:
            continue
        x1, y1, x2, y2 = box.tolist()
        row: Dict[str, Any] = dict(
            image_id=image_id, category_id=category_ids[label], bbox=[x1, y1, x2 - x1, y2 - y1], score=score)
        if 'masks' in found:
            mask = (found['masks'][n, 0] >= 0.5).numpy().astype(np.uint8)
            encoded = coco_mask.encode(np.asfortranarray(mask))
            row['segmentation'] = dict(size=encoded['size'], counts=encoded['counts'].decode())
        rows.append(row)
    return rows


def coco_figures(truth: Dict[str, Any], rows: Rows, kind: str) -> Dict[str, float]:
    """Return COCO's twelve figures, from 0 to 1. A figure is -1 if there are no objects that it could be measured on.

    Args:
        truth: Content of an annotation file.
        rows: Detections in COCO's results format. Those of masks have no 'bbox', so that the size of an object is the
            area of its mask.
        kind: 'bbox' or 'segm'.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        expected, found = COCO(), COCO()
        expected.dataset = copy.deepcopy(truth)  # pycocotools writes into annotations and detections
        expected.createIndex()
        if rows:
            found = expected.loadRes(copy.deepcopy(rows))
        else:
            found.dataset = {**truth, 'annotations': []}
            found.createIndex()
        evaluation = COCOeval(expected, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(COCO_FIGURES, map(float, evaluation.stats)))


class CocoEvaluation:
    """Collects detections of images in all processes, and evaluates them against the annotations."""

    def __init__(self, truth: Dict[str, Any], masks: bool):
        self.truth = truth
        self.kinds = {'box': 'bbox', 'mask': 'segm'} if masks else {'box': 'bbox'}
        self.rows: Dict[int, Rows] = {}

    def reset(self) -> None:
        self.rows = {}

    def update(self, image_id: int, rows: Rows) -> None:
        self.rows[image_id] = rows

    def gather(self) -> None:
        """Add the detections of the other processes."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return
        parts: List[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, self.rows)
        self.rows = {image_id: rows for part in parts for image_id, rows in part.items()}

    def results(self, kind: str) -> Rows:
        """Return all 'box' or 'mask' detections in COCO's results format, sorted by image id."""
        left_out = 'segmentation' if kind == 'box' else 'bbox'
        return [
            {name: value for name, value in row.items() if name != left_out}
            for image_id in sorted(self.rows) for row in self.rows[image_id]]

    def figures(self) -> Dict[str, float]:
        """Return the figures 'box/AP', 'box/AP50' and so on, and with masks also 'mask/AP' and so on."""
        figures = {}
        for kind, coco_kind in self.kinds.items():
            found = coco_figures(self.truth, self.results(kind), coco_kind)
            figures.update({f'{kind}/{name}': value for name, value in found.items()})
        return figures


def iou_figures(confusion: torch.Tensor, categories: Sequence[str]) -> Dict[str, float]:
    """Return 'mIoU', 'accuracy' and the 'IoU/NAME' of every class, from 0 to 1.

    A class that occurs neither in the annotations nor in the predictions has no figure and is not part of the mean.

    Args:
        confusion: Numbers of pixels (classes, classes), by true class (row) and predicted class (column).
        categories: Names of the classes.
    """
    counts = confusion.cpu().double()
    both = counts.diag()
    either = counts.sum(dim=0) + counts.sum(dim=1) - both
    there = either > 0
    iou = both[there] / either[there]
    names = [name for name, is_there in zip(categories, there.tolist()) if is_there]
    figures = {'mIoU': iou.mean().item() if len(iou) else 0., 'accuracy': (both.sum() / counts.sum()).item()}
    figures.update({f'IoU/{name}': value for name, value in zip(names, iou.tolist())})
    return figures
