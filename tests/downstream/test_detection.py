"""torchvision's detectors on PVT: the backbone helper, the published detectors, whole checkpoints, bad input."""
import copy
import hashlib
import inspect
import io
import math
import threading
import warnings

import pytest
import timm
import torch
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

import pvt_timm  # noqa: F401
from pvt_timm.detection import (
    PvtFasterRCNN, coco_categories, describe_heads, detector_from_mmdet, detector_to_mmdet, faster_rcnn_from_mmdet,
    mask_rcnn_from_mmdet, pvt_faster_rcnn, pvt_fpn_backbone, pvt_mask_rcnn, pvt_retinanet, retinanet_coco,
    retinanet_from_mmdet)
from pvt_timm.detection.parts import AlignedRoIAlign, paste_masks
from pvt_timm.segmentation import semantic_fpn

SIZES = dict(out_channels=32, model_args=dict(img_size=64), min_size=64, max_size=128)
SMALL = dict(
    retinanet=SIZES, faster_rcnn=dict(SIZES, box_channels=48), mask_rcnn=dict(SIZES, box_channels=48, mask_channels=24))
BUILD = dict(retinanet=pvt_retinanet, faster_rcnn=pvt_faster_rcnn, mask_rcnn=pvt_mask_rcnn)
LOAD = dict(retinanet=retinanet_from_mmdet, faster_rcnn=faster_rcnn_from_mmdet, mask_rcnn=mask_rcnn_from_mmdet)


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def target(*rows, labels=None):
    return dict(boxes=boxes(*rows), labels=torch.tensor(labels or [1] * len(rows), dtype=torch.int64))


def build_small(kind, num_classes=3, **kwargs):
    """Return a detector with 32 channels whose scores and boxes differ."""
    torch.manual_seed(0)
    model = BUILD[kind]('test_pvt', num_classes, **{**SMALL[kind], **kwargs})
    for m in (model.head if kind == 'retinanet' else model.rpn).modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight)
    return model.eval()


@pytest.fixture(scope='module')
def small_retinanet():
    return build_small('retinanet', score_thresh=0.02)


@pytest.fixture(scope='module', params=list(BUILD))
def detector(request, small_retinanet):
    return small_retinanet if request.param == 'retinanet' else build_small(request.param)


# ---- backbone


@pytest.mark.parametrize('extra, names, sides', [
    (None, ['0', '1', '2', '3'], [16, 8, 4, 2]),
    ('pool', ['0', '1', '2', '3', 'pool'], [16, 8, 4, 2, 1]),
    ('p6p7', ['0', '1', '2', '3', 'p6', 'p7'], [16, 8, 4, 2, 1, 1]),
    ('p6p7_on_input', ['0', '1', '2', '3', 'p6', 'p7'], [16, 8, 4, 2, 1, 1]),
])
def test_backbone_levels(extra, names, sides):
    backbone = pvt_fpn_backbone('test_pvt', out_channels=24, extra_levels=extra)
    out = backbone(torch.rand(2, 3, 64, 64))
    assert list(out) == names
    assert [tuple(x.shape) for x in out.values()] == [(2, 24, s, s) for s in sides]
    assert backbone.out_channels == 24


def test_backbone_refuses_other_levels():
    with pytest.raises(ValueError, match=r"extra_levels in \('pool', 'p6p7', 'p6p7_on_input', None\), got 'p6'"):
        pvt_fpn_backbone('test_pvt', extra_levels='p6')


@pytest.mark.parametrize('build', [pvt_fpn_backbone, *BUILD.values()])
def test_nothing_is_downloaded_unasked(build):
    assert [p.default for name, p in inspect.signature(build).parameters.items() if 'pretrained' in name] == [False]


def test_stages_can_be_frozen():
    backbone = pvt_fpn_backbone('test_pvt', model_args=dict(drop_path_rate=0.5, proj_drop_rate=0.5), frozen_stages=2)
    detector = build_small('retinanet', frozen_stages=2).train()
    for part in (backbone.train(), detector.backbone):
        for name, p in part.named_parameters():
            assert p.requires_grad != name.startswith(('body.stages_0.', 'body.stages_1.')), name
        for i in range(4):
            assert {m.training for m in part.body.get_submodule(f'stages_{i}').modules()} == {i > 1}
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        first, second = (backbone.body(x)[:3] for _ in range(2))  # without dropout and drop path in what is frozen
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[2], second[2])
    assert all(p.requires_grad for p in pvt_fpn_backbone('test_pvt').parameters())
    with pytest.raises(ValueError, match='frozen_stages from 0 to 4, got 5'):
        build_small('mask_rcnn', frozen_stages=5)


@pytest.mark.parametrize('wrong', [
    lambda: pvt_fpn_backbone('pvt_tiny', pretrained=True, img_size=64),
    lambda: pvt_fpn_backbone('pvt_tiny', pretrained=True, model_args=dict(img_sise=64)),
    lambda: pvt_retinanet('pvt_tiny', pretrained_backbone=True, img_size=64),
    lambda: pvt_retinanet('pvt_tiny', pretrained_backbone=True, model_args=dict(img_sise=64)),
    lambda: pvt_mask_rcnn('pvt_tiny', pretrained_backbone=True, drop_path_rate=0.1),
    lambda: semantic_fpn('pvt_tiny', pretrained_backbone=True, drop_path_rate=0.1),
    lambda: semantic_fpn('pvt_tiny', pretrained_backbone=True, model_args=dict(drop_path=0.1)),
    lambda: retinanet_coco('pvt_tiny', min_sise=64),
    lambda: retinanet_coco('pvt_tiny', drop_path_rate=0.1),
])
def test_wrong_keywords_are_refused_before_a_download(wrong, monkeypatch, hub):
    """Unknown keywords raise TypeError before anything is downloaded.

    Arguments of the backbone belong into `model_args`.
    """
    monkeypatch.setattr('pvt_timm.detection.openmmlab.load_state_dict_from_url', lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr('timm.models._builder.load_pretrained', lambda *args, **kwargs: 1 / 0)
    with pytest.raises(TypeError, match='unexpected keyword argument'):
        wrong()


@pytest.mark.parametrize('in_chans, mean, std', [
    (1, (.449,), (.226,)), (3, (.485, .456, .406), (.229, .224, .225)), (4, (.449,) * 4, (.226,) * 4)])
def test_images_of_other_channels(in_chans, mean, std):
    """For other numbers of channels, means and deviations are averages, as in `pvt-timm predict`."""
    for kind in BUILD:
        model = build_small(kind, model_args=dict(img_size=64, in_chans=in_chans))
        assert (model.transform.image_mean, model.transform.image_std, model.in_chans) == (mean, std, in_chans)
        model([torch.rand(in_chans, 64, 96)])
        model.train()([torch.rand(in_chans, 64, 96)], [with_masks(target((1, 1, 50, 50)))])
    own = build_small('retinanet', model_args=dict(in_chans=in_chans), image_mean=[0.] * in_chans)
    assert own.transform.image_mean == [0.] * in_chans


@pytest.mark.parametrize('kind', list(BUILD))
def test_subclasses_can_be_written_and_converted(kind):
    base = type(build_small(kind))

    class Own(base):
        def __init__(self, backbone, num_classes, loss_weight=1., **kwargs):
            super().__init__(backbone, num_classes, **kwargs)
            self.loss_weight = loss_weight

    torch.manual_seed(0)
    model = Own.on_pvt('test_pvt', 3, loss_weight=2., **SMALL[kind])
    assert model.loss_weight == 2 and model.transform.min_size == (64,)
    again = LOAD[kind](detector_to_mmdet(model))
    for k, v in again.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[k], v), k
    with pytest.raises(TypeError, match='Own got unexpected keyword arguments: min_sise'):
        Own.on_pvt('test_pvt', 3, min_sise=600)
    with pytest.raises(ValueError, match='a detector of this package or of a subclass, got a RetinaNet'):
        detector_to_mmdet(RetinaNet(pvt_fpn_backbone('test_pvt'), 3))


@pytest.mark.parametrize('cls, levels', [
    (RetinaNet, dict(out_indices=(1, 2, 3), extra_levels='p6p7')), (FasterRCNN, {})])
def test_torchvision_detectors_script(cls, levels):
    torch.manual_seed(0)
    model = cls(pvt_fpn_backbone('test_pvt', out_channels=16, **levels), 3, min_size=64, max_size=128).eval()
    images = [torch.rand(3, 64, 80)]
    _, scripted = torch.jit.script(model)(images)
    for k, v in model(images)[0].items():
        torch.testing.assert_close(scripted[0][k], v)


# ---- detectors as published


@pytest.mark.parametrize('kind, first_stride, base, octave', [('retinanet', 8, 4, 3), ('faster_rcnn', 4, 8, 1)])
def test_anchors_are_centred_on_fixed_strides_and_not_rounded(kind, first_stride, base, octave):
    model = build_small(kind)
    generator = (model if kind == 'retinanet' else model.rpn).anchor_generator
    grids = ((50, 84), (25, 42), (13, 21), (7, 11), (4, 6))
    images = ImageList(torch.zeros(1, 3, 400, 672), [(400, 667)])
    anchors, = generator(images, [torch.zeros(1, 1, *grid) for grid in grids])
    levels = anchors.split([3 * octave * h * w for h, w in grids])
    for stride, level, (h, w) in zip((first_stride * 2 ** i for i in range(5)), levels, grids):
        level = level.reshape(h, w, 3, octave, 4)  # ratio, then scale
        for row, column, ratio, scale in ((0, 0, 0, 0), (h - 1, w - 1, 2, octave - 1), (h // 2, 3, 1, octave // 2)):
            side = stride * base * 2 ** (scale / octave)
            height, width = side * (0.5, 1, 2)[ratio] ** 0.5, side / (0.5, 1, 2)[ratio] ** 0.5
            cx, cy = column * stride, row * stride
            expected = torch.tensor([cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2])
            torch.testing.assert_close(level[row, column, ratio, scale], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize('coder_of, scale', [
    (lambda: build_small('retinanet').box_coder, 1),
    (lambda: build_small('mask_rcnn').rpn.box_coder, 1),
    (lambda: build_small('mask_rcnn').roi_heads.box_coder, 10),
])
def test_box_coders_bound_the_size_on_both_sides(coder_of, scale):
    """The sides of a box are at most 1000 / 16 times as long or as short as those of its anchor."""
    codes = torch.tensor([[0.1 * scale, -0.2 * scale, -100., 100., -0.3 * scale, 0., 100., 0.]])
    first, second = coder_of().decode_single(codes, boxes((0, 0, 10, 20))).reshape(2, 4)
    for decoded, cx, cy, w, h in (
            (first, 6, 6, 10 * 16 / 1000, 20 * 1000 / 16), (second, 2, 10, 10 * 1000 / 16, 20)):
        torch.testing.assert_close(
            decoded, torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]), rtol=1e-4, atol=1e-3)


def test_settings_are_the_published_ones():
    model, retinanet = pvt_mask_rcnn('test_pvt'), pvt_retinanet('pvt_tiny')
    assert sum(p.numel() for p in retinanet.parameters()) == 22_964_212  # of mmdetection's model
    assert pvt_faster_rcnn('test_pvt').num_classes == model.num_classes == retinanet.num_classes == 80
    rpn, heads = model.rpn, model.roi_heads
    assert {m.dilation for m in heads.mask_head.modules() if isinstance(m, torch.nn.Conv2d)} == {(1, 1)}
    assert rpn._pre_nms_top_n == dict(training=2000, testing=1000)
    assert rpn._post_nms_top_n == dict(training=1000, testing=1000)
    assert (rpn.nms_thresh, heads.nms_thresh, heads.score_thresh, heads.detections_per_img) == (.7, .5, .05, 100)
    assert heads.box_roi_pool.output_size == (7, 7) and heads.mask_roi_pool.output_size == (14, 14)
    assert heads.box_predictor.cls_score.weight.shape == (81, 1024)
    assert heads.mask_predictor.mask_fcn_logits.weight.shape == (81, 256, 1, 1)
    assert (retinanet.score_thresh, retinanet.nms_thresh, retinanet.detections_per_img) == (0.05, 0.5, 100)
    for transform in (model.transform, retinanet.transform):
        assert (transform.min_size, transform.max_size) == ((800,), 1333)
        assert transform.normalize(torch.tensor([.485, .456, .406])[:, None, None]).abs().max() == 0
        assert transform.normalize(torch.tensor([.714, .680, .631])[:, None, None]).flatten().tolist() == pytest.approx(
            [1, 1, 1])


def test_pooling_is_aligned_and_at_fixed_strides():
    """Pooled cells are aligned. On maps that hold their own coordinates, a cell holds those of its centre."""
    maps = {}
    for i, stride in enumerate((4, 8, 16, 32)):
        side = 512 // stride
        x = (torch.arange(side) + 0.5) * stride
        maps[str(i)] = torch.stack([x.expand(side, side), x[:, None].expand(side, side), torch.full((side, side), i)])
    maps = {k: v[None] for k, v in maps.items()}
    rois = boxes((100, 60, 128, 80), (40, 70, 170, 180), (20, 30, 300, 290), (30, 20, 490, 500))
    out = AlignedRoIAlign(7)(maps, [rois], [(1, 1)])  # the size of the image does not matter
    assert out[:, 2].amax(dim=(1, 2)).tolist() == out[:, 2].amin(dim=(1, 2)).tolist() == [0, 1, 2, 3]
    centres = (torch.arange(7) + 0.5) / 7
    for roi, pooled in zip(rois, out):
        torch.testing.assert_close(pooled[0, 3], roi[0] + (roi[2] - roi[0]) * centres, rtol=0, atol=1e-3)
        torch.testing.assert_close(pooled[1, :, 3], roi[1] + (roi[3] - roi[1]) * centres, rtol=0, atol=1e-3)


@pytest.mark.parametrize('box', [
    (2.5, 3.25, 20.75, 17.5), (0, 0, 32, 24), (-9, -5, 7, 50), (28, 20, 31.9, 23.9), (5.2, 5.2, 5.4, 5.4)])
def test_pasted_masks_are_sampled_at_pixel_centres(box):
    """Masks are sampled at the centres of pixels. The masks hold their own coordinates, 0 to 1."""
    x1, y1, x2, y2 = box
    own = (torch.arange(28, dtype=torch.float64) + 0.5) / 28
    masks = torch.stack([own.expand(28, 28), own[:, None].expand(28, 28)])[:, None]
    pasted = paste_masks(masks, torch.tensor([box, box], dtype=torch.float64), (24, 32))
    assert pasted.shape == (2, 1, 24, 32)
    u = ((torch.arange(32, dtype=torch.float64) + 0.5 - x1) / (x2 - x1)).expand(24, 32)
    v = ((torch.arange(24, dtype=torch.float64) + 0.5 - y1) / (y2 - y1))[:, None].expand(24, 32)
    inside = ((u - 0.5).abs() <= own[-1] - 0.5) & ((v - 0.5).abs() <= own[-1] - 0.5)
    torch.testing.assert_close(pasted[:, 0, inside], torch.stack([u, v])[:, inside], rtol=0, atol=1e-9)
    outside = ((u - 0.5).abs() > own[-1]) | ((v - 0.5).abs() > own[-1])
    assert not pasted[:, 0, outside].any()


def pasted_one_by_one(masks, boxes, size):
    """Paste masks one by one, each within its box and one pixel around, as mmdetection does."""
    out = masks.new_zeros(len(masks), 1, *size)
    for n, (mask, (x1, y1, x2, y2)) in enumerate(zip(masks, boxes.tolist())):
        left, right = max(math.floor(x1) - 1, 0), min(math.ceil(x2) + 1, size[1])
        top, bottom = max(math.floor(y1) - 1, 0), min(math.ceil(y2) + 1, size[0])
        x = (torch.arange(left, right).to(mask) + 0.5 - x1) / (x2 - x1) * 2 - 1
        y = (torch.arange(top, bottom).to(mask) + 0.5 - y1) / (y2 - y1) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing='xy'), dim=-1)
        out[n, :, top:bottom, left:right] = torch.nn.functional.grid_sample(
            mask[None], grid[None], align_corners=False)[0]
    return out


@pytest.mark.parametrize('dtype, atol', [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_pasted_masks_are_those_of_a_loop(dtype, atol):
    """`paste_masks` equals a loop over masks, for thin, tiny and large boxes, also at the image's edges."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 2, generator=generator, dtype=dtype) * torch.tensor([1300., 100.])
    sides = torch.rand(60, 2, generator=generator, dtype=dtype) ** 3 * torch.tensor([900., 150.]) + 0.2
    rows = torch.cat([corners, corners + sides], dim=1)
    rows[:4] = torch.tensor([[0, 0, 1333, 120], [-9, -9, 1400, 200], [1332.5, 3, 1333, 90], [7, 7, 8, 8]], dtype=dtype)
    masks = torch.rand(60, 1, 28, 28, generator=generator, dtype=dtype)
    pasted = paste_masks(masks, rows, (120, 1333))
    expected = pasted_one_by_one(masks, rows, (120, 1333))
    assert pasted.dtype == dtype and expected.count_nonzero() > 100_000
    torch.testing.assert_close(pasted, expected, rtol=0, atol=atol)
    assert paste_masks(masks[:0], rows[:0], (3, 5)).shape == (0, 1, 3, 5)


def test_coordinates_of_half_precision_maps_are_not_rounded():
    """With bfloat16 maps, coordinates stay in float32.

    In bfloat16, numbers near 1,000 have steps of 4 to 8, so boxes and masks would move by several pixels.
    """
    generator = torch.Generator().manual_seed(0)
    maps = {str(i): torch.rand(1, 4, 1024 // s, 1024 // s, generator=generator).bfloat16()
            for i, s in enumerate((4, 8, 16, 32))}
    rois = boxes((1003.3, 501.7, 1018.9, 517.1), (901.2, 811.4, 1013.6, 1009.8), (530.7, 330.1, 1021.3, 1019.2))
    pooled = AlignedRoIAlign(7)(maps, [rois], [(1024, 1024)])
    expected = AlignedRoIAlign(7)({k: v.float() for k, v in maps.items()}, [rois], [(1024, 1024)])
    assert pooled.dtype == torch.bfloat16
    assert torch.equal(pooled, expected.bfloat16())
    masks = torch.rand(3, 1, 28, 28, generator=generator).bfloat16()
    expected = paste_masks(masks.float(), rois, (1024, 1024))
    assert torch.equal(paste_masks(masks, rois, (1024, 1024)), expected)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(paste_masks(masks.float(), rois, (1024, 1024)), expected)


@pytest.mark.parametrize('size, resized', [
    ((480, 640), (800, 1067)), ((427, 640), (800, 1199)), ((333, 500), (800, 1201)), ((100, 1000), (133, 1333)),
    ((1, 1), (800, 800)), ((1, 4000), (1, 1333)), ((2000, 3), (1333, 2)),
])
def test_resizing_rounds_and_keeps_a_pixel(size, resized):
    model = pvt_retinanet('test_pvt', 2)
    image, moved = model.transform.eval().resize(torch.rand(3, *size), target((0, 0, size[1], size[0])))
    assert tuple(image.shape[1:]) == resized
    torch.testing.assert_close(moved['boxes'], boxes((0, 0, resized[1], resized[0])))


def test_boxes_outside_of_the_image_are_dropped(small_retinanet):
    logits = torch.full((1, 9, 3), -20.)
    logits[0, :2, 1] = torch.tensor([3., 2.])
    anchors = torch.zeros(9, 4) + torch.tensor([70., 10., 80., 20.])  # right of the image
    anchors[1] = torch.tensor([10., 10., 80., 20.])
    outputs = dict(cls_logits=[logits], bbox_regression=[torch.zeros(1, 9, 4)])
    model = copy.copy(small_retinanet)
    model.score_thresh, model.detections_per_img = 0.05, 1  # those dropped take nobody's place
    found = model.postprocess_detections(outputs, [[anchors]], [(64, 64)])[0]
    torch.testing.assert_close(found['boxes'], boxes((10, 10, 64, 20)))
    assert found['labels'].tolist() == [1]
    torch.testing.assert_close(found['scores'], torch.tensor([2.]).sigmoid())


def test_one_image_equals_a_batch_of_different_sizes(detector):
    generator = torch.Generator().manual_seed(0)
    model = copy.deepcopy(detector).double()  # no ties between scores
    images = [torch.rand(3, h, w, generator=generator).double() for h, w in ((64, 64), (64, 64), (1, 1), (40, 90))]
    with torch.no_grad():
        alone, first, mixed = model(images[:1])[0], model(images[:2])[0], model(images)
    assert len(alone['labels']) > 20 and alone['labels'].min() >= model.first_label
    for k in alone:
        torch.testing.assert_close(alone[k], first[k], rtol=1e-8, atol=1e-8)
    for image, found in zip(images, mixed):
        assert len(found['boxes']) <= 100
        assert (found['boxes'] <= torch.tensor([image.shape[2], image.shape[1]] * 2) + 1e-3).all()
        if 'masks' in found:
            assert found['masks'].shape == (len(found['boxes']), 1, *image.shape[1:])
            assert 0 <= found['masks'].min() and found['masks'].max() <= 1


def test_nothing_detected(detector):
    model = copy.deepcopy(detector)
    (model.roi_heads if model.first_label else model).score_thresh = 1.
    with torch.no_grad():
        found = model([torch.rand(3, 50, 60)])[0]
    assert {k: tuple(v.shape) for k, v in found.items()} == dict(
        boxes=(0, 4), scores=(0,), labels=(0,), **(dict(masks=(0, 1, 50, 60)) if 'masks' in found else {}))


def test_half_precision_keeps_boxes_in_float32(detector):
    """With bfloat16 weights or autocast on a CPU, outputs have their usual dtypes.

    On a CPU, `roi_align` has no half precision.
    """
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    half = copy.deepcopy(detector).to(torch.bfloat16)
    with torch.no_grad():
        found = half([image.to(torch.bfloat16)])[0]
        again = copy.deepcopy(half).float()([image])[0]  # the anchors are not left rounded
        expected = detector([image])[0]
        with torch.autocast('cpu', torch.bfloat16):
            mixed = detector([image])[0]
    for some in (found, mixed):
        assert {k: v.dtype for k, v in some.items()} == {k: v.dtype for k, v in expected.items()}
        assert all(v.isfinite().all() for v in some.values()) and len(some['boxes']) > 20
    assert abs(len(again['boxes']) - len(expected['boxes'])) <= 10 and len(expected['boxes']) > 20
    generator = (detector.rpn if detector.first_label else detector).anchor_generator
    assert generator.cell_anchors[0].dtype == torch.float32


@pytest.mark.parametrize('kind', list(BUILD))
def test_half_precision_trains(kind):
    model = build_small(kind).to(torch.bfloat16).train()
    losses = model([torch.rand(3, 64, 96).bfloat16()], [with_masks(target((10, 10, 60, 50)))])
    sum(losses.values()).backward()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def detections_found_again(found, others):
    """Return the share of detections that `others` has too: same label, and nearly the same box, score and mask."""
    same = found['labels'][:, None] == others['labels']
    same &= (found['boxes'][:, None] - others['boxes']).abs().amax(dim=2) < 0.05
    same &= (found['scores'][:, None] - others['scores']).abs() < 1e-4
    if 'masks' in found:
        same &= (found['masks'][:, None] - others['masks'][None]).abs().amax(dim=(2, 3, 4)) < 0.1
    return same.any(dim=1).float().mean().item()


@pytest.mark.parametrize('kind', ['retinanet', pytest.param('faster_rcnn', marks=pytest.mark.slow), 'mask_rcnn'])
def test_onnx_of_images_of_other_content_and_size(kind):
    onnxruntime = pytest.importorskip('onnxruntime')
    model = build_small(kind)
    part = model if kind == 'retinanet' else model.roi_heads
    part.score_thresh = 0.3
    keys = list(model([torch.rand(3, 64, 96)])[0])
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the exporter
        torch.onnx.export(
            model, ([torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))],), file, dynamo=False,
            opset_version=17, input_names=['image'], output_names=keys, dynamic_axes={'image': {1: 'h', 2: 'w'}})
    session = onnxruntime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    generator = torch.Generator().manual_seed(1)
    counts = []
    for size in ((64, 96), (64, 96), (96, 64), (50, 141), (200, 100), (37, 53)):
        image = torch.rand(3, *size, generator=generator)
        with torch.no_grad():
            expected = model([image])[0]
        found = dict(zip(keys, map(torch.from_numpy, session.run(None, {'image': image.numpy()}))))
        counts.append(len(expected['boxes']))
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
        assert detections_found_again(found, expected) == detections_found_again(expected, found) == 1
    assert len(set(counts)) > 3 and min(counts) > 3  # not one number that the graph could hold


@pytest.mark.parametrize('kind', list(BUILD))
def test_training_lowers_the_loss(kind):
    """The loss decreases on two images of different sizes, one of them without objects."""
    model = build_small(kind).train()
    images = [torch.zeros(3, 64, 64), torch.zeros(3, 64, 80)]
    images[0][:, 10:44, 12:50] = 1
    targets = [target((12, 10, 50, 44), labels=[2]), target()]
    if kind == 'mask_rcnn':
        targets = [dict(t, masks=(x[:1].repeat(len(t['boxes']), 1, 1) > 0).byte()) for t, x in zip(targets, images)]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(16):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def with_masks(found, height=64, width=96):
    """Return a target with a mask for each box. Detectors without masks ignore the masks."""
    masks = torch.zeros(len(found['boxes']), height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, found['boxes'].nan_to_num().round().long().clamp(min=0).tolist()):
        mask[y1:y2, x1:x2] = 1
    return dict(found, masks=masks)


def test_retinanet_loss_of_several_images_is_that_of_all_their_anchors():
    """The loss is divided by the positive anchors of all images.

    OpenMMLab does so. torchvision takes the mean of the losses of the images.
    """
    model = build_small('retinanet').train()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    targets = [target((2, 2, 62, 62), labels=[2]), target((4, 4, 30, 30), (20, 30, 60, 62), (1, 30, 33, 60))]
    with torch.no_grad():
        both, alone = model(images, targets), [model([i], [t]) for i, t in zip(images, targets)]
        anchors, = model.anchor_generator(
            ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]), list(model.backbone(torch.zeros(1, 3, 64, 64)).values()))
    counts = [int((model.proposal_matcher(box_iou(t['boxes'], anchors)) >= 0).sum()) for t in targets]
    assert counts[0] != counts[1] and min(counts) > 1
    for name, loss in both.items():
        summed = sum(found[name].item() * count for found, count in zip(alone, counts))
        assert loss.item() == pytest.approx(summed / sum(counts), rel=1e-5)
    mean = sum(found['classification'].item() for found in alone) / 2
    assert both['classification'].item() != pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize('targets, message', [
    (lambda first: [target(), target()], r'one target per image \(1\), got 2'),
    (lambda first: [target((1, 1, 5, 5), labels=[3 + first])], 'labels from . to .*, got . in target 0'),
    (lambda first: [target((1, 1, 5, 5), labels=[first - 1])], 'labels from . to .*, got '),
    (lambda first: [target((1, 1, 5, 5), labels=[1, 1])], r'one label per box \(1\)'),
    (lambda first: [dict(target((1, 1, 5, 5)), labels=torch.ones(1))], 'labels of type torch.int64 in target 0, got'),
    (lambda first: [target((1, 1, float('nan'), 9))], 'target 0, got NaN'),
    (lambda first: [target((1, 1, 9, 9), (60, 40, 20, 10))],
     r'x1 < x2 and y1 < y2 \(not x, y, width, height\) in target 0, got \[60.0, 40.0, 20.0, 10.0\] as box 1'),
    (lambda first: [target((1, 9, 5, 9))], 'x1 < x2 and y1 < y2'),
    (lambda first: [target((50, 1, 97.5, 9))], 'inside of their image, 96 wide and 64 high, in target 0'),
    (lambda first: [target((50, 1, 60, 66))], 'inside of their image'),
    (lambda first: [target((-2, 1, 60, 9))], 'inside of their image'),
    (lambda first: [dict(target(), boxes=torch.zeros(4), masks=torch.zeros(0))],
     r'boxes of shape \(N, 4\) in target 0, got \(4,\)'),
    (lambda first: [dict(labels=torch.ones(1, dtype=torch.int64))], "a tensor 'boxes' in target 0, got NoneType"),
])
def test_wrong_targets_are_refused(detector, targets, message):
    given = [with_masks(t) if t.get('boxes', torch.zeros(1)).ndim == 2 else t for t in targets(detector.first_label)]
    with pytest.raises(ValueError, match=message):
        detector([torch.rand(3, 64, 96)], given)


@pytest.mark.parametrize('change, message', [
    (lambda masks: masks * 255, 'masks of 0 and 1 in target 0, got 255'),
    (lambda masks: masks[:1], r'shape \(2, 64, 96\), one per box .*target 0, got \(1, 64, 96\)'),
    (lambda masks: masks[:, :32], r'as large as the image, in target 0, got \(2, 32, 96\)'),
    (lambda masks: masks[:, None], r'got \(2, 1, 64, 96\): take masks\[:, 0\] >= 0.5 of what a model returned'),
    (lambda masks: masks.float(), 'torch.uint8 or torch.bool in target 0, got torch.float32'),
    (lambda masks: None, "a tensor 'masks' in target 0, got NoneType"),
])
def test_wrong_masks_are_refused(change, message):
    found = with_masks(target((1, 1, 50, 50), (30, 20, 90, 60)))
    with pytest.raises(ValueError, match=message):
        build_small('mask_rcnn').train()([torch.rand(3, 64, 96)], [dict(found, masks=change(found['masks']))])


def test_right_targets_are_taken():
    """Boxes at the edge and slightly outside are accepted, as rounded annotations have them.

    Only Mask R-CNN reads masks.
    """
    found = target((0, 0, 96, 64), (-0.6, 10, 30, 64.7))
    for kind in BUILD:
        for masks in (torch.uint8, torch.bool):
            given = with_masks(found)
            given['masks'] = given['masks'].to(masks) if kind == 'mask_rcnn' else torch.full((1, 2, 3), 255.)
            losses = build_small(kind).train()([torch.rand(3, 64, 96)], [given])
            assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize('image, message', [
    (torch.rand(3, 64, 96) * 255, r'image 1 to hold values from 0 to 1, got values up to 25\d.* \(divide by 255\)'),
    ((torch.rand(3, 64, 96) * 255).byte(), 'image 1 to hold floats from 0 to 1, got torch.uint8'),
    (torch.rand(1, 64, 96), r'image 1 to be of shape \(3, height, width\), got \(1, 64, 96\)'),
    (torch.rand(1, 3, 64, 96), r'image 1 to be of shape'),
])
def test_wrong_images_are_refused(detector, image, message):
    for mode in (True, False):
        model = copy.deepcopy(detector).train(mode)
        with pytest.raises(ValueError, match=message):
            model([torch.rand(3, 64, 96), image], [with_masks(target((1, 1, 50, 50)))] * 2)


def test_images_from_0_to_255_where_they_are_normalised():
    image = torch.rand(3, 64, 96)
    mean, std = (torch.tensor(x) for x in ((.485, .456, .406), (.229, .224, .225)))
    expected = build_small('retinanet').transform([image])[0].tensors
    model = build_small('retinanet', image_mean=(255 * mean).tolist(), image_std=(255 * std).tolist())
    torch.testing.assert_close(model.transform([255 * image])[0].tensors, expected)
    model([255 * image])


@pytest.mark.parametrize('kind', list(BUILD))
def test_keywords_count_or_are_refused(kind):
    model = build_small(kind, size_divisible=96, fixed_size=(80, 48))
    batch = model.transform([torch.rand(3, 64, 64)])[0]
    assert batch.image_sizes == [(48, 80)] and batch.tensors.shape == (1, 3, 96, 96)
    with pytest.raises(TypeError, match='unexpected keyword arguments: min_sise'):
        build_small(kind, min_sise=600)


# ---- whole checkpoints of mmdetection and the original code


@pytest.mark.parametrize('fmt, eps', [('mmdet', {1e-6}), ('original', {1e-5, 1e-6})])
@pytest.mark.parametrize('kind', list(LOAD))
def test_checkpoint_lands(kind, fmt, eps, tmp_path):
    detector = build_small(kind, 80)
    state_dict = detector_to_mmdet(detector, fmt)
    assert describe_heads({f'student.{k}': v for k, v in state_dict.items()}) == (
        dict(retinanet='RetinaNet', faster_rcnn='Faster R-CNN', mask_rcnn='Mask R-CNN')[kind], 80)
    file = tmp_path / 'detector.pth'
    torch.save({'meta': {'epoch': 12, 'CLASSES': tuple(coco_categories().values())}, 'state_dict': state_dict}, file)
    model = LOAD[kind](file, min_size=64, max_size=96)
    assert not model.training and model.num_classes == 80 and model.backbone.out_channels == 32
    background = ('bbox_pred', 'mask_fcn_logits')  # rows that mmdetection does not have
    for k, v in detector.state_dict().items():
        rows = 0 if not any(f'predictor.{x}' in k for x in background) else v.shape[0] // 81
        assert torch.equal(model.state_dict()[k][rows:], v[rows:]), k
        assert not model.state_dict()[k][:rows].any(), k
    assert {m.eps for m in model.backbone.body.modules() if isinstance(m, torch.nn.LayerNorm)} == eps
    assert model.categories[0] == 'person' and model.categories[-1] == 'toothbrush'


def test_the_background_is_the_last_class_there():
    model = build_small('mask_rcnn')
    heads = model.roi_heads
    theirs = detector_to_mmdet(model)
    assert torch.equal(theirs['roi_head.bbox_head.fc_cls.bias'], heads.box_predictor.cls_score.bias[[1, 2, 3, 0]])
    assert torch.equal(theirs['roi_head.bbox_head.fc_reg.weight'], heads.box_predictor.bbox_pred.weight[4:])
    assert torch.equal(
        theirs['roi_head.mask_head.conv_logits.weight'], heads.mask_predictor.mask_fcn_logits.weight[1:])


def test_checkpoint_of_other_classes_and_wrappers():
    few = build_small('retinanet', 2)
    bare = detector_to_mmdet(few)
    two = {f'{who}.{k}': v for who in ('teacher', 'student') for k, v in bare.items()}
    wrapped = {'state_dict': {f'module.{k}': v for k, v in bare.items()}, 'meta': {'dataset_meta': {'classes': 'ab'}}}
    named = {'state_dict': bare, 'meta': {'classes': ('x', 'y'), 'dataset_meta': {'classes': ('a', 'b')}}}
    for checkpoint, names, prefix in (
            (bare, [], None), (wrapped, [], None), (named, ['a', 'b'], None), (two, [], 'student.backbone'),
            (two, [], 'student.backbone.'), (two, [], 'student'), (two, [], 'student.'), (bare, [], '')):
        model = retinanet_from_mmdet(checkpoint, prefix=prefix)
        assert model.num_classes == 2 and model.categories == names
        assert torch.equal(model.head.regression_head.bbox_reg.weight, few.head.regression_head.bbox_reg.weight)
    with pytest.raises(ValueError, match="(?s)'student.backbone.'.*'teacher.backbone.'"):
        retinanet_from_mmdet(two)
    faster = {f'other.{k}': v for k, v in detector_to_mmdet(build_small('faster_rcnn', 2)).items()}
    for prefix, kind in (('other.backbone', PvtFasterRCNN), ('student.backbone', type(few))):
        assert type(detector_from_mmdet({**two, **faster}, prefix)) is kind


@pytest.mark.parametrize('kind', list(LOAD))
def test_fine_tuning_of_a_checkpoint_with_other_classes(kind, caplog):
    """With another number of classes, only layers whose shapes depend on it are new.

    The log names these layers. The backbone gets its arguments.
    """
    detector = build_small(kind, 80)
    checkpoint = {'state_dict': detector_to_mmdet(detector), 'meta': {'CLASSES': tuple(coco_categories().values())}}
    new = dict(
        retinanet=['head.classification_head.cls_logits'],
        faster_rcnn=['roi_heads.box_predictor.bbox_pred', 'roi_heads.box_predictor.cls_score'],
        mask_rcnn=['roi_heads.box_predictor.bbox_pred', 'roi_heads.box_predictor.cls_score',
                   'roi_heads.mask_predictor.mask_fcn_logits'])[kind]
    args = dict(model_args=dict(drop_path_rate=0.3), frozen_stages=1, min_size=64)
    model = LOAD[kind](checkpoint, num_classes=3, **args)
    assert f'for 80 classes: all but {", ".join(new)}, which are new for 3 classes' in caplog.text
    assert model.num_classes == 3 and model.categories == [] and not model.training
    for k, v in model.state_dict().items():
        if k.startswith(tuple(new)):
            assert v.shape != detector.state_dict()[k].shape
        else:
            assert torch.equal(v, detector.state_dict()[k]), k
    assert {m.eps for m in model.backbone.body.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    assert max(getattr(m, 'drop_prob', 0.) or 0. for m in model.backbone.modules()) == pytest.approx(0.3)
    assert not any(p.requires_grad for p in model.backbone.body.stages_0.parameters())
    losses = model.train()([torch.rand(3, 64, 96)], [with_masks(target((10, 10, 60, 50), labels=[2]))])
    sum(losses.values()).backward()

    caplog.clear()
    same = LOAD[kind](checkpoint, num_classes=80, **args)
    assert 'new' not in caplog.text and same.categories[0] == 'person'
    many = LOAD[kind]({'state_dict': detector_to_mmdet(build_small(kind, 3))}, num_classes=80)
    assert many.num_classes == 80 and many.categories == []  # not COCO's: nobody has trained it on them


def config_of(kind='retinanet', pipeline='', **model):
    """Return a config as OpenMMLab's training saves it: Python code as text."""
    heads = dict(
        retinanet=dict(bbox_head=dict(type='RetinaHead')), mask_rcnn=dict(roi_head=dict(type='StandardRoIHead')))
    lines = [f'model = {dict(heads[kind], **model)!r}', 'test_cfg = dict(type="TestLoop")']
    return '\n'.join([*lines, pipeline])


@pytest.mark.parametrize('pipeline, sizes', [
    ("test_pipeline = [dict(type='Resize', img_scale=(1066, 640), keep_ratio=True)]", (640, 1066)),
    # as mmengine formats it, and the other way round
    ("test_pipeline = [\n    dict(scale=(\n        800,\n        1333,\n    ), type='mmdet.Resize'),\n]", (800, 1333)),
    ("data = dict(test=dict(pipeline=[dict(type='MultiScaleFlipAug', img_scale=(900, 700))]),\n"
     "            train=dict(pipeline=[dict(type='Resize', img_scale=[(1333, 480), (1333, 960)])]))", (700, 900)),
    ("train_pipeline = [dict(type='Resize', scale=(500, 400))]", (800, 1333)),  # says nothing of testing
    ("test_dataloader = dict(dataset=dict(dataset=dict(pipeline=[dict(type='Resize', scale=(64, 32))])))", (32, 64)),
])
def test_image_size_is_that_of_the_config(pipeline, sizes):
    state_dict = detector_to_mmdet(build_small('retinanet'))
    checkpoint = dict(state_dict=state_dict, meta=dict(cfg=config_of(pipeline=pipeline)))
    model = retinanet_from_mmdet(checkpoint)
    assert (model.transform.min_size[0], model.transform.max_size) == sizes
    assert retinanet_from_mmdet(checkpoint, min_size=96).transform.min_size == (96,)


@pytest.mark.parametrize('kind, model, named', [
    ('retinanet', dict(bbox_head=dict(anchor_generator=dict(octave_base_scale=2))), 'octave_base_scale'),
    ('retinanet', dict(bbox_head=dict(anchor_generator=dict(ratios=[1., 2., 3.]))), 'ratios'),
    ('retinanet', dict(bbox_head=dict(bbox_coder=dict(target_stds=[.1, .1, .2, .2]))), 'target_stds'),
    ('retinanet', dict(bbox_head=dict(loss_cls=dict(use_sigmoid=False))), 'use_sigmoid'),
    ('retinanet', dict(bbox_head=dict(type='ATSSHead')), 'bbox_head.type'),
    ('retinanet', dict(test_cfg=dict(nms=dict(type='soft_nms', iou_threshold=.5))), 'nms.type'),
    ('retinanet', dict(test_cfg=dict(score_thr=7)), 'score_thr'),
    ('retinanet', dict(backbone=dict(type='PyramidVisionTransformer', norm_cfg=dict(type='LN', eps=1e-3))), 'norm_cfg'),
    ('retinanet', dict(backbone=dict(type='PyramidVisionTransformer', act_cfg=dict(type='ReLU'))), 'act_cfg'),
    ('retinanet', dict(backbone=dict(type='PyramidVisionTransformer', use_conv_ffn=True)), 'use_conv_ffn'),
    ('retinanet', dict(data_preprocessor=dict(mean=[0, 0, 0], std=[1, 1, 1], bgr_to_rgb=False)), 'BGR'),
    ('retinanet', dict(neck=dict(add_extra_convs='on_output')), 'add_extra_convs'),
    ('mask_rcnn', dict(rpn_head=dict(anchor_generator=dict(scales=[4]))), 'scales'),
    ('mask_rcnn', dict(rpn_head=dict(bbox_coder=dict(target_stds=[.1] * 4))), 'target_stds'),
    ('mask_rcnn', dict(roi_head=dict(bbox_roi_extractor=dict(finest_scale=28))), 'finest_scale'),
    ('mask_rcnn', dict(test_cfg=dict(rcnn=dict(mask_thr_binary=.3))), 'mask_thr_binary'),
])
def test_settings_without_a_counterpart_are_refused_by_name(kind, model, named):
    checkpoint = dict(state_dict=detector_to_mmdet(build_small(kind)), meta=dict(cfg=config_of(kind, **model)))
    with pytest.raises(ValueError, match=named):
        LOAD[kind](checkpoint)


def test_settings_with_a_counterpart_are_obeyed():
    model = dict(
        test_cfg=dict(nms_pre=77, score_thr=.3, nms=dict(type='nms', iou_threshold=.4), max_per_img=5, min_bbox_size=0),
        data_preprocessor=dict(mean=[0, 51, 102], std=[51, 255, 102], bgr_to_rgb=True))
    state_dict = detector_to_mmdet(build_small('retinanet'))
    found = retinanet_from_mmdet(dict(state_dict=state_dict, meta=dict(cfg=config_of(**model))))
    assert (found.topk_candidates, found.score_thresh, found.nms_thresh, found.detections_per_img) == (77, .3, .4, 5)
    assert found.transform.image_mean == [0, .2, .4] and found.transform.image_std == [.2, 1, .4]
    heads = dict(backbone=dict(type='PyramidVisionTransformer', num_heads=[2, 4, 4, 4]))
    found = retinanet_from_mmdet(dict(state_dict=state_dict, meta=dict(cfg=config_of(**heads))))
    assert [stage.blocks[0].attn.num_heads for stage in found.backbone.body.children()] == [2, 4, 4, 4]
    old = dict(config="model = dict(bbox_head=dict(type='RetinaHead'))\ntest_cfg = dict(score_thr=0.2)\n")
    assert retinanet_from_mmdet(dict(state_dict=state_dict, meta=old)).score_thresh == .2
    model = dict(test_cfg=dict(
        rpn=dict(nms_pre=70, max_per_img=60, nms=dict(type='nms', iou_threshold=.6)),
        rcnn=dict(score_thr=.1, nms=dict(type='nms', iou_threshold=.4), max_per_img=7, mask_thr_binary=.5)))
    found = mask_rcnn_from_mmdet(dict(
        state_dict=detector_to_mmdet(build_small('mask_rcnn')), meta=dict(cfg=config_of('mask_rcnn', **model))))
    assert (found.rpn.pre_nms_top_n(), found.rpn.post_nms_top_n(), found.rpn.nms_thresh) == (70, 60, .6)
    heads = found.roi_heads
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (.1, .4, 7)


@pytest.mark.parametrize('pipeline, named', [
    ("test_pipeline = [dict(type='Resize', scale=(640, 480), keep_ratio=False)]", 'keep_ratio'),
    ("test_pipeline = [dict(type='TestTimeAug', scales=[(640, 480), (1333, 800)])]", 'several sizes'),
    ("test_pipeline = [dict(type='Resize', scale='x')]", 'a size of images')])
def test_sizes_that_are_none_are_refused(pipeline, named):
    state_dict = detector_to_mmdet(build_small('retinanet'))
    with pytest.raises(ValueError, match=named):
        retinanet_from_mmdet(dict(state_dict=state_dict, meta=dict(cfg=config_of(pipeline=pipeline))))


def test_leftovers_of_training_are_left_out(caplog):
    state_dict = detector_to_mmdet(build_small('retinanet'))
    more = {
        **{f'ema_{k.replace(".", "_")}': v + 1 for k, v in state_dict.items()},
        'data_preprocessor.mean': torch.ones(3, 1, 1), 'auxiliary_head.conv.weight': torch.ones(2)}
    model = retinanet_from_mmdet({'state_dict': {**state_dict, **more}})
    expected = retinanet_from_mmdet(state_dict).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    for name in ('ema_*', 'data_preprocessor.* (1)', 'auxiliary_head.* (1)'):
        assert name in caplog.text


def without(*parts):
    return lambda d: [d.pop(k) for k in list(d) if k.startswith(parts)]


def with_(name, *shape):
    return lambda d: d.update({name: torch.ones(shape)})


@pytest.mark.parametrize('kind, change, message', [
    ('retinanet', without('neck.fpn_convs.4.conv.bias'), 'Missing in the checkpoint: neck.fpn_convs.4.conv.bias'),
    ('retinanet', without('neck', 'bbox_head'), r'\(bbox_head.retina_cls\), got a model with nothing beside'),
    ('retinanet', without('backbone'), 'Expected a PVT v1 checkpoint'),
    ('retinanet', with_('neck.lateral_convs.0.conv.weight', 16, 64, 1, 1),
     r'Wrong shape .*neck.lateral_convs.0.conv.weight \[16, 64, 1, 1\] instead of \[16, 32, 1, 1\]'),
    ('retinanet', with_('bbox_head.retina_cls.weight', 28, 32, 3, 3), r'Wrong shape .*retina_cls.weight \[28,'),
    ('retinanet', without('backbone.layers.1.1.1.norm1.bias'), 'Missing in the checkpoint: .*norm1.bias'),
    ('mask_rcnn', with_('roi_head.mask_head.convs.4.conv.bias', 24), 'Not part .*convs.4'),
    # one box for all classes
    ('mask_rcnn', with_('roi_head.bbox_head.fc_reg.weight', 4, 48), r'fc_reg.weight \[4, 48\] instead of \[12, 48\]'),
    ('mask_rcnn', with_('roi_head.bbox_head.fc_reg.bias'), r'fc_reg.bias \[\] instead of \[12\]'),
    ('mask_rcnn', with_('roi_head.mask_head.conv_logits.weight', 3), 'Wrong shape .*convs.0.conv.weight'),
    # one mask for all classes
    ('mask_rcnn', with_('roi_head.mask_head.conv_logits.weight', 1, 24, 1, 1),
     r'in the checkpoint: roi_head.mask_head.conv_logits.weight \[1, 24, 1, 1\] instead of \[3, 24, 1, 1\].$'),
    # as GFL has it, beside what a RetinaNet has too
    ('retinanet', lambda d: d.update({'bbox_head.gfl_cls.weight': d.pop('bbox_head.retina_cls.weight')}),
     r'RetinaNet \(bbox_head.retina_cls\), got a model with bbox_head \(cls_convs, gfl_cls, reg_convs,'),
    ('retinanet', lambda d: d.update(epoch=3), 'Not part of the model, in the checkpoint: epoch'),
    ('retinanet', with_('backbone.adapter.weight', 3), 'Not part of the model, in the checkpoint: backbone.adapter'),
    ('faster_rcnn', without('roi_head'),
     r'\(roi_head.bbox_head.fc_cls\), got a model with neck \(.*\), rpn_head \(rpn_cls, rpn_conv, rpn_reg\) beside'),
])
def test_checkpoint_errors_name_what_is_wrong(kind, change, message):
    state_dict = detector_to_mmdet(build_small(kind))
    change(state_dict)
    with pytest.raises(ValueError, match=message):
        LOAD[kind]({'state_dict': state_dict})


def test_other_models_are_refused(tmp_path):
    mask_rcnn = detector_to_mmdet(build_small('mask_rcnn'))
    other = build_small('retinanet')
    other.backbone.body = timm.create_model('pvt_tiny', embed_dims=(32, 64, 160, 256), features_only=True)
    torch.save({'state_dict': mask_rcnn, 'meta': threading.Thread}, tmp_path / 'evil.pth')
    for load, checkpoint, message in (
            (retinanet_from_mmdet, mask_rcnn, 'Expected a RetinaNet, got a Mask R-CNN'),
            (faster_rcnn_from_mmdet, mask_rcnn, 'Expected a Faster R-CNN, got a Mask R-CNN'),
            (retinanet_from_mmdet, timm.create_model('test_pvt').state_dict(), 'got a timm model'),
            (retinanet_from_mmdet, detector_to_mmdet(other),
             r'PVT v1 variant, got depths \(2, 2, 2, 2\) and channels \(32, 64, 160'),
            (mask_rcnn_from_mmdet, tmp_path / 'evil.pth', 'threading.Thread')):
        with pytest.raises(ValueError, match=message):
            load(checkpoint)


# ---- the published file by url


def test_pretrained_detector_by_url(tmp_path, monkeypatch):
    """The file is downloaded once and checked. A wrong file is not kept, and an error in arguments deletes nothing."""
    model = build_small('retinanet', 80)
    file, cache = tmp_path / 'plain.pth', tmp_path / 'cache'
    torch.save({'meta': {}, 'state_dict': detector_to_mmdet(model)}, file)
    name = f'retinanet_pvt-t_fpn_1x_coco-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth'
    cfg = timm.models.get_pretrained_cfg('pvt_tiny.retinanet_coco')
    cfg = timm.models.PretrainedCfg(**{**cfg.to_dict(), 'url': (tmp_path / name).as_uri()})
    monkeypatch.setitem(pvt_timm.pvt.default_cfgs['pvt_tiny'].cfgs, 'retinanet_coco', cfg)

    (tmp_path / name).write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(RuntimeError, match='invalid hash value'):
        retinanet_coco('pvt_tiny', cache_dir=str(cache))
    assert not (cache / name).exists()
    (tmp_path / name).write_bytes(file.read_bytes())
    assert retinanet_coco('pvt_tiny', cache_dir=str(cache), num_classes=5).num_classes == 5
    with pytest.raises(TypeError):
        retinanet_coco('pvt_tiny', cache_dir=str(cache), min_sise=64)
    assert (cache / name).read_bytes() == file.read_bytes()
    (tmp_path / name).unlink()
    loaded = retinanet_coco('pvt_tiny', cache_dir=str(cache), min_size=64, max_size=96)  # from the cache
    for k, v in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[k], v), k
    assert loaded.categories[15] == coco_categories()[17] == 'cat' and list(coco_categories())[79] == 90
    with pytest.raises(ValueError, match=r"\('pvt_tiny', 'pvt_small', 'pvt_medium'\), got 'pvt_large'"):
        retinanet_coco('pvt_large')
