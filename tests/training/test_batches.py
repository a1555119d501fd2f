""" Batches do not depend on the number of processes. Also figures, schedules and settings. """
import argparse
import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip('pytorch_lightning')
pytest.importorskip('pycocotools')

from pvt_timm.recipes import DETECTOR_RECIPES, SEGMENTER_RECIPES  # noqa: E402
from pvt_timm.training.data import Augmented, EpochSampler, Share  # noqa: E402
from pvt_timm.training.metrics import COCO_FIGURES, CocoEvaluation, coco_figures, coco_rows, iou_figures  # noqa: E402
from pvt_timm.training.modules import learning_rate_factor  # noqa: E402
from pvt_timm.training.published import compare, published_figures  # noqa: E402
from pvt_timm.training.settings import (  # noqa: E402
    DetectorSettings, SegmenterSettings, add_options, read_settings, settings_from)


def test_epochs_are_the_same_for_all_numbers_of_processes():
    alone = EpochSampler(7, steps=3, images_per_step=4, seed=5)
    order = []
    for epoch in range(7):
        alone.set_epoch(epoch)
        images = list(alone)
        order += images
        assert len(images) == len(alone) == 12
        shares = [EpochSampler(7, 3, 4, 5, process, 2) for process in range(2)]
        for share in shares:
            share.set_epoch(epoch)
            assert len(share) == 6
        assert [x for both in zip(*shares) for x in both] == images
    rounds = [[i for i, _ in order[k:k + 7]] for k in range(0, 84, 7)]
    assert all(sorted(r) == list(range(7)) for r in rounds) and len(set(map(tuple, rounds))) > 8
    assert len({seed for _, seed in order}) == 84
    assert list(EpochSampler(7, 3, 4, 6)) != order[:12]


def test_shares_count_everything_once():
    for size in (1, 3, 4, 7):
        data = [(f'image {i}', i) for i in range(size)]
        for processes in (1, 2, 3):
            shares = [Share(data, process, processes) for process in range(processes)]
            assert len({len(share) for share in shares}) == 1
            items = [share[i] for share in shares for i in range(len(share))]
            assert sorted(target for _, target, counts in items if counts) == list(range(size))


def test_what_is_random_follows_from_the_seed_alone():
    data = Augmented([(0, 1)], lambda image, target: torch.rand(3).tolist())
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, again, other = data[0, 5], data[0, 5], data[0, 6]
    assert one == again != other and torch.equal(torch.random.get_rng_state(), before)


# ---- figures ---------------------------------------------------------------------------------------------------------

def detections(seed, boxes):
    rng = np.random.default_rng(seed)
    masks = torch.zeros(len(boxes), 1, 60, 80)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        mask[0, int(y1):int(y2), int(x1):int(x2)] = 0.9
    return dict(boxes=torch.tensor(boxes), scores=torch.from_numpy(rng.random(len(boxes), dtype=np.float32)),
                labels=torch.from_numpy(rng.integers(1, 3, len(boxes))), masks=masks)


def truth_and_found():
    rng = np.random.default_rng(0)
    truth = dict(info={}, categories=[dict(id=4, name='a'), dict(id=9, name='b')], images=[], annotations=[])
    found = {}
    for image_id in (40, 7, 12):
        truth['images'].append(dict(id=image_id, file_name='x', height=60, width=80))
        boxes = []
        for _ in range(6):
            x, y, w, h = rng.uniform(0, 40), rng.uniform(0, 20), rng.uniform(5, 40), rng.uniform(5, 40)
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            truth['annotations'].append(dict(
                id=len(truth['annotations']) + 1, image_id=image_id, category_id=int(rng.choice([4, 9])), area=w * h,
                iscrowd=int(rng.random() < 0.1), bbox=[x, y, w, h], segmentation=[polygon]))
            for _ in range(3):
                dx, dy = rng.normal(0, 2, 2)
                boxes.append([max(x + dx, 0), max(y + dy, 0), min(x + dx + w, 80), min(y + dy + h, 60)])
        found[image_id] = coco_rows(detections(image_id, boxes), image_id, {1: 4, 2: 9})
    return truth, found


@pytest.mark.parametrize('kind, coco_kind', [('box', 'bbox'), ('mask', 'segm')])
def test_figures_are_those_of_pycocotools(tmp_path, kind, coco_kind):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = truth_and_found()
    evaluation = CocoEvaluation(truth, masks=True)
    for image_id, rows in found.items():
        evaluation.update(image_id, rows)
    evaluation.gather()  # of one process
    figures = evaluation.figures()
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    (tmp_path / 'found.json').write_text(json.dumps(evaluation.results(kind)))
    with contextlib.redirect_stdout(io.StringIO()):
        expected = COCO(str(tmp_path / 'truth.json'))
        by_hand = COCOeval(expected, expected.loadRes(str(tmp_path / 'found.json')), coco_kind)
        by_hand.evaluate()
        by_hand.accumulate()
        by_hand.summarize()
    assert [figures[f'{kind}/{name}'] for name in COCO_FIGURES] == by_hand.stats.tolist()
    assert 0.02 < figures[f'{kind}/AP'] < 0.98
    assert evaluation.figures() == figures  # a second time


def test_no_detections_are_none_right():
    truth, _ = truth_and_found()
    figures = coco_figures(truth, [], 'bbox')
    assert figures['AP'] == 0 and figures['AR100'] == 0


def test_iou_is_that_of_the_confusion_matrix():
    torch.manual_seed(0)
    truth, found = torch.randint(4, (1000,)), torch.randint(4, (1000,))
    truth[truth == 3], found[found == 3] = 0, 0  # a class that is nowhere
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    for t, f in zip(truth.tolist(), found.tolist()):
        confusion[t, f] += 1
    figures = iou_figures(confusion, 'abcd')
    for i, name in enumerate('abc'):
        both, either = ((truth == i) & (found == i)).sum(), ((truth == i) | (found == i)).sum()
        assert figures[f'IoU/{name}'] == pytest.approx((both / either).item(), rel=1e-6)
    assert 'IoU/d' not in figures
    assert figures['mIoU'] == pytest.approx(sum(figures[f'IoU/{n}'] for n in 'abc') / 3)
    assert figures['accuracy'] == pytest.approx((truth == found).double().mean().item())


def test_published_figures():
    assert published_figures('retinanet', 'pvt_small', 800, 80) == {'box/AP': 40.4}
    assert published_figures('retinanet', 'pvt_small', 640, 80) == {'box/AP': 38.7}
    assert published_figures('mask_rcnn', 'pvt_tiny', 800, 80) == {'box/AP': 36.7, 'mask/AP': 35.1}
    assert published_figures('semantic_fpn', 'pvt_small', 512, 150) == {'mIoU': 41.9}
    assert published_figures('retinanet', 'pvt_small', 800, 3) is None
    lines, near = compare({'box/AP': 40.2, 'box/AP50': 60.0}, {'box/AP': 40.4})
    assert near and '40.20   published  40.40   difference -0.20   ok' in lines[0] and 'published' not in lines[1]
    lines, near = compare({'box/AP': 40.61}, {'box/AP': 40.4})
    assert not near and 'NOT within 0.2' in lines[0]


# ---- schedule and settings -------------------------------------------------------------------------------------------

def test_schedule_as_published():
    """Schedules equal mmcv's: linear warm-up, a tenth after epochs 8 and 11, polynomial."""
    settings = read_settings(DetectorSettings, 'mask_rcnn_coco_1x', {})
    factor = learning_rate_factor(settings, steps_per_epoch=7330, total_steps=12 * 7330)
    assert factor(0) == pytest.approx(0.001) and factor(250) == pytest.approx(1 - 0.5 * 0.999) and factor(500) == 1
    drops = [round(-math.log10(factor(epoch * 7330))) for epoch in range(1, 12)]
    assert drops == [0] * 7 + [1] * 3 + [2] and factor(8 * 7330 - 1) == 1
    settings = read_settings(SegmenterSettings, 'semantic_fpn_ade20k_40k', {})
    factor = learning_rate_factor(settings, steps_per_epoch=4000, total_steps=40_000)
    assert factor(0) == 1 and factor(20_000) == pytest.approx(0.5 ** 0.9) and factor(40_000) == 0
    cosine = learning_rate_factor(DetectorSettings(schedule='cosine', steps=100), 10, 100)
    assert cosine(0) == 1 and cosine(50) == pytest.approx(0.5) and cosine(100) == pytest.approx(0)


def test_recipes_are_as_published():
    for name, rate in (('retinanet_coco_1x', 1e-4), ('mask_rcnn_coco_1x', 2e-4)):
        s = read_settings(DetectorSettings, name, {})
        assert (s.lr, s.weight_decay, s.epochs, s.lr_drops, s.images_per_step) == (rate, 1e-4, 12, [8, 11], 16)
        assert (s.warmup_steps, s.warmup_start, s.clip_grad, s.drop_path, s.flip) == (500, 0.001, None, 0.1, 0.5)
        assert (s.min_size, s.max_size, s.keep_empty, s.kind) == ([800], 1333, False, name.partition('_coco')[0])
    s = read_settings(SegmenterSettings, 'semantic_fpn_ade20k_40k', {})
    assert (s.lr, s.weight_decay, s.steps, s.images_per_step, s.clip_grad) == (2e-4, 1e-4, 40_000, 32, None)
    assert (s.scale, s.scale_range, s.crop, s.crop_max_share) == ([2048, 512], [0.5, 2], 512, 0.75)
    assert (s.schedule, s.poly_power, s.warmup_steps, s.reduce_zero_label, s.classes) == ('poly', 0.9, 0, True, 150)


@pytest.mark.parametrize('kind, recipes', [
    (DetectorSettings, DETECTOR_RECIPES), (SegmenterSettings, SEGMENTER_RECIPES)])
def test_every_recipe_is_read(kind, recipes):
    assert len(recipes) >= 2
    for name in recipes:
        assert read_settings(kind, name, {}).kind


def test_what_is_given_replaces_the_config(tmp_path):
    file = tmp_path / 'mine.yaml'
    file.write_text('lr: 1e-3\nmodel_args: {img_size: 64}\nepochs: 3\nmin_size: 640\ndevices: 2\n')
    settings = read_settings(DetectorSettings, str(file), dict(epochs=5, model_args=dict(in_chans=1)))
    assert (settings.lr, settings.epochs, settings.min_size, settings.devices) == (1e-3, 5, [640], '2')
    assert settings.model_args == dict(img_size=64, in_chans=1)
    below = read_settings(DetectorSettings, str(file), {}, dict(epochs=1, val_images='there'))
    assert (below.epochs, below.val_images) == (3, 'there')


def test_options_are_the_fields():
    parser = argparse.ArgumentParser()
    add_options(parser, SegmenterSettings)
    assert vars(parser.parse_args([])) == {}
    given = vars(parser.parse_args(
        ['--lr', '1e-3', '--no-distort', '--classes', 'a', 'b', '--scale', '100', '50', '--model-args', 'img_size=64',
         'act_layer=gelu', '--epochs', '4']))
    assert given == dict(lr=1e-3, distort=False, classes=['a', 'b'], scale=[100, 50], epochs=4,
                         model_args=dict(img_size=64, act_layer='gelu'))
    parser.format_help()


@pytest.mark.parametrize('values, message', [
    (dict(learning_rate=1), 'Not known in here: learning_rate. Known are .*lr'),
    (dict(lr='fast'), "Expected a finite number for lr, got 'fast'"),
    (dict(lr=math.nan), 'Expected a finite number for lr, got nan'),
    (dict(weight_decay='-inf'), "Expected a finite number for weight_decay, got '-inf'"),
    (dict(clip_grad=math.inf), 'Expected a finite number for clip_grad, got inf'),
    (dict(drop_path=10 ** 400), 'Expected a finite number for drop_path'),
    (dict(epochs=1.5), 'Expected an integer for epochs, got 1.5'),
    (dict(epochs=True), 'Expected an integer for epochs'),
    (dict(pretrained='yes'), "Expected true or false for pretrained, got 'yes'"),
    (dict(min_size=['a']), "Expected an integer for min_size, got 'a'"),
    (dict(model_args=[1]), 'Expected names and values for model_args'),
    (dict(kind='yolo'), "Expected one of retinanet, faster_rcnn, mask_rcnn for kind, got 'yolo'"),
])
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        settings_from(DetectorSettings, values, 'here')


@pytest.mark.parametrize('text, message', [
    ('lr: [', 'Cannot read the config .*mine.yaml'), ('- 1', 'names and values in .*mine.yaml'),
    ('epoch: 2', 'Not known in .*mine.yaml: epoch')])
def test_wrong_files_are_named(tmp_path, text, message):
    (tmp_path / 'mine.yaml').write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(DetectorSettings, str(tmp_path / 'mine.yaml'), {})
    with pytest.raises(ValueError, match='a recipe .finetune_detector, .*none.yaml'):
        read_settings(DetectorSettings, 'none.yaml', {})
