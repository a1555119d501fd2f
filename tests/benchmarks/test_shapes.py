""" The generated shapes of benchmarks/demos. The demo trains on them and writes the files that it documents. """
import json
import subprocess
import sys

import numpy as np
import pytest

from tests.support.scripts import BENCHMARKS, import_script

pytest.importorskip('pycocotools')

shapes = import_script('demos', 'shapes')


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


def test_what_is_written_is_read_again(tmp_path):
    from pvt_timm.training.coco import CocoAnnotations, CocoDataset
    from pvt_timm.training.label_maps import LabelMapDataset

    samples = shapes.make_samples(5, seed=3, low=40, high=60)
    shapes.write_split(samples, tmp_path, 'train')
    annotations = CocoAnnotations(tmp_path / 'train.json', tmp_path / 'train', masks=True)
    assert annotations.categories == {1: 'disc', 2: 'box', 3: 'triangle'}
    objects = CocoDataset(annotations, {1: 0, 2: 1, 3: 2}, masks=True, training=True)
    classes = LabelMapDataset(tmp_path / 'train', tmp_path / 'train_labels', 4)
    for i, sample in enumerate(samples):
        image, target = objects[i]
        assert (image.permute(1, 2, 0).numpy() == sample.image).all()
        assert target['boxes'].tolist() == sample.boxes.tolist() and target['labels'].tolist() == sample.labels.tolist()
        assert (target['masks'].numpy() == sample.masks).all()
        assert (classes[i][1].numpy() == sample.semantic).all()


@pytest.mark.slow
@pytest.mark.parametrize('kind, score', [
    ('retinanet', 'box/AP50'), ('mask_rcnn', 'mask/AP50'), ('semantic_fpn', 'mIoU')])
def test_demo(tmp_path, kind, score):
    pytest.importorskip('matplotlib')
    pytest.importorskip('pytorch_lightning')
    subprocess.run(
        [sys.executable, BENCHMARKS / 'demos' / 'run_shapes.py', kind, '--images', '8', '--held-out', '8',
         '--work', tmp_path / 'work', '--results', tmp_path / 'results', '--steps', '4', '--eval-every', '2',
         '--images-per-step', '2', '--workers', '0', '--accelerator', 'cpu'], check=True, timeout=300)
    name = f'shapes_{kind}'
    result = json.loads((tmp_path / 'results' / f'{name}.json').read_text())
    assert len(result['losses']) == 4 and np.isfinite(result['losses']).all()
    assert [row['step'] for row in result['evaluations']] == [2, 4] and 0 <= result['final'][score] <= 1
    assert sorted(p.name for p in (tmp_path / 'results').iterdir()) == [
        f'{name}.json', f'{name}.png', f'{name}_curve.png']
