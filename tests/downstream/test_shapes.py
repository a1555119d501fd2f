""" The generated shapes, their scores, and that the demos of benchmarks/ train and write what they promise. """
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'benchmarks' / 'demos'))

pytest.importorskip('pycocotools')

import shapes  # noqa: E402


def test_samples_are_what_their_annotations_say():
    for sample in shapes.make_samples(20, seed=3, low=80, high=100):
        h, w = sample.image.shape[:2]
        assert sample.masks.sum(axis=0).max() == 1  # what is seen belongs to one object
        assert (sample.semantic > 0).sum() == sample.masks.sum()
        for (x1, y1, x2, y2), mask in zip(sample.boxes, sample.masks):
            assert 0 <= x1 < x2 <= w and 0 <= y1 < y2 <= h
            ys, xs = np.where(mask)
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x1, y1, x2, y2)
    one, other, third = (shapes.make_samples(1, seed=s)[0].image for s in (1, 1, 2))
    assert (one == other).all() and not (one.shape == third.shape and (one == third).all())


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_scores(kind):
    samples = shapes.make_samples(10, seed=5)
    found = [dict(
        boxes=torch.from_numpy(s.boxes), labels=torch.from_numpy(s.labels), scores=torch.ones(len(s.labels)),
        masks=torch.from_numpy(s.masks)[:, None].float()) for s in samples]

    def scores(found, categories):
        results = shapes.coco_results(found, range(1, 11), categories)
        return shapes.coco_scores(shapes.coco_annotations(samples), results, kind)

    assert scores(found, {0: 1, 1: 2, 2: 3})['AP'] == pytest.approx(1)
    assert scores([], {})['AP50'] == 0
    assert scores(found, {0: 2, 1: 3, 2: 1})['AP50'] < 0.2


@pytest.mark.parametrize('script, name, score', [
    (['shapes_detection.py'], 'shapes_retinanet', 'box AP50'),
    (['shapes_detection.py', '--detector', 'mask_rcnn'], 'shapes_mask_rcnn', 'mask AP50'),
    (['shapes_segmentation.py'], 'shapes_semantic_fpn', 'mIoU'),
])
def test_demos(tmp_path, script, name, score):
    pytest.importorskip('matplotlib')
    subprocess.run(
        [sys.executable, ROOT / 'benchmarks' / 'demos' / script[0], *script[1:], '--steps', '4', '--images', '8',
         '--held-out', '8', '--batch-size', '2', '--eval-every', '2', '--output', tmp_path], check=True, timeout=300)
    result = json.loads((tmp_path / f'{name}.json').read_text())
    assert len(result['history']['loss']) == 4 and all(np.isfinite(result['history']['loss']))
    assert [row['step'] for row in result['history']['held_out']] == [2, 4] and 0 <= result['final'][score] <= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [f'{name}.json', f'{name}.png', f'{name}_curve.png']
