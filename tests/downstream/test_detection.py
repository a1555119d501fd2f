"""torchvision's detectors on PVT: the backbone helper, the published detectors, whole checkpoints, bad input."""
import copy
import hashlib
import inspect
import threading

import pytest
import timm
import torch
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.image_list import ImageList

import pvt_timm  # noqa: F401
from pvt_timm.detection import (
    PvtFasterRCNN, coco_categories, describe_heads, detector_from_mmdet, detector_to_mmdet, faster_rcnn_from_mmdet,
    mask_rcnn_from_mmdet, pvt_faster_rcnn, pvt_fpn_backbone, pvt_mask_rcnn, pvt_retinanet, retinanet_coco,
    retinanet_from_mmdet)
from pvt_timm.detection.parts import AlignedRoIAlign, paste_masks

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
    """A detector of 32 channels whose scores and boxes differ."""
    torch.manual_seed(0)
    model = BUILD[kind]('test_pvt', num_classes, **SMALL[kind], **kwargs)
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
    """By 16 to 1000 times, for each class of those that code them so."""
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
    """On maps that hold the coordinates of their own positions, a pooled cell holds that of its centre."""
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
    """Masks that hold the coordinates of their own positions, from 0 to 1 over the box."""
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


def test_half_precision_keeps_boxes_in_float32(small_retinanet):
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    half = copy.deepcopy(small_retinanet).to(torch.bfloat16)
    with torch.no_grad():
        found = half([image.to(torch.bfloat16)])[0]
        again = copy.deepcopy(half).float()([image])[0]  # the anchors are not left rounded
        expected = small_retinanet([image])[0]
    assert found['boxes'].dtype == torch.float32 and found['boxes'].isfinite().all()
    assert abs(len(again['boxes']) - len(expected['boxes'])) <= 10 and len(expected['boxes']) > 20
    assert small_retinanet.anchor_generator.cell_anchors[0].dtype == torch.float32


@pytest.mark.parametrize('kind', list(BUILD))
def test_training_lowers_the_loss(kind):
    """On images of two sizes, one of them without objects."""
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


@pytest.mark.parametrize('targets, message', [
    (lambda first: [target(), target()], r'one target per image \(1\), got 2'),
    (lambda first: [target((1, 1, 5, 5), labels=[3 + first])], 'labels from . to ., got . in target 0'),
    (lambda first: [target((1, 1, 5, 5), labels=[first - 1])], 'labels from . to ., got '),
    (lambda first: [target((1, 1, 5, 5), labels=[1, 1])], r'one label per box \(1\)'),
    (lambda first: [target((1, 1, float('nan'), 9))], 'target 0, got NaN'),
])
def test_wrong_targets_are_refused(detector, targets, message):
    with pytest.raises(ValueError, match=message):
        detector([torch.rand(3, 64, 64)], targets(detector.first_label))


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
            (bare, [], None), (wrapped, [], None), (named, ['a', 'b'], None), (two, [], 'student.backbone')):
        model = retinanet_from_mmdet(checkpoint, prefix=prefix)
        assert model.num_classes == 2 and model.categories == names
        assert torch.equal(model.head.regression_head.bbox_reg.weight, few.head.regression_head.bbox_reg.weight)
    with pytest.raises(ValueError, match="(?s)'student.backbone.'.*'teacher.backbone.'"):
        retinanet_from_mmdet(two)
    faster = {f'other.{k}': v for k, v in detector_to_mmdet(build_small('faster_rcnn', 2)).items()}
    for prefix, kind in (('other.backbone', PvtFasterRCNN), ('student.backbone', type(few))):
        assert type(detector_from_mmdet({**two, **faster}, prefix)) is kind


@pytest.mark.parametrize('meta, sizes', [
    (dict(config='dict(type="Resize", img_scale=(1066, 640)) dict(img_scale=(1066, 640))'), (640, 1066)),
    (dict(cfg='scale=(900, 700)'), (700, 900)),
    (dict(config='img_scale=(1333, 480) img_scale=(900, 700)'), (800, 1333)),  # several: the published one
])
def test_image_size_is_that_of_the_config(meta, sizes):
    state_dict = detector_to_mmdet(build_small('retinanet'))
    model = retinanet_from_mmdet(dict(state_dict=state_dict, meta=meta))
    assert (model.transform.min_size[0], model.transform.max_size) == sizes
    assert retinanet_from_mmdet(dict(state_dict=state_dict, meta=meta), min_size=96).transform.min_size == (96,)


def without(*parts):
    return lambda d: [d.pop(k) for k in list(d) if k.startswith(parts)]


def with_(name, *shape):
    return lambda d: d.update({name: torch.ones(shape)})


@pytest.mark.parametrize('kind, change, message', [
    ('retinanet', without('neck.fpn_convs.4.conv.bias'), 'Missing in the checkpoint: neck.fpn_convs.4.conv.bias'),
    ('retinanet', without('neck', 'bbox_head'), 'Expected a RetinaNet, got a model with nothing beside its backbone'),
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
    ('retinanet', lambda d: d.update(epoch=3), 'Not part of the model, in the checkpoint: epoch'),
    ('retinanet', with_('backbone.adapter.weight', 3), 'Not part of the model, in the checkpoint: backbone.adapter'),
    ('faster_rcnn', without('roi_head'), 'Expected a Faster R-CNN, got a model with neck, rpn_head beside'),
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
    """Downloaded once, checked, and never deleted: not by an error in the arguments, not by a file that is not it."""
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
    for wrong in (dict(num_classes=5), dict(min_sise=64)):
        with pytest.raises(TypeError):
            retinanet_coco('pvt_tiny', cache_dir=str(cache), **wrong)
        assert (cache / name).read_bytes() == file.read_bytes()
    (tmp_path / name).unlink()
    loaded = retinanet_coco('pvt_tiny', cache_dir=str(cache), min_size=64, max_size=96)  # from the cache
    for k, v in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[k], v), k
    assert loaded.categories[15] == coco_categories()[17] == 'cat' and list(coco_categories())[79] == 90
    with pytest.raises(ValueError, match=r"\('pvt_tiny', 'pvt_small', 'pvt_medium'\), got 'pvt_large'"):
        retinanet_coco('pvt_large')
