"""Detectors and segmenter of this package, compared with OpenMMLab's own models with the same random weights.

'original' is a checkpoint with the names of the original code: its backbone, with OpenMMLab's heads.
"""
import functools

import pytest
import torch
import torchvision
from torchvision.models.detection.image_list import ImageList

pytest.importorskip('mmdet', reason='needs mmdet 3.3.0, mmcv-lite 2.1.0, mmengine 0.10.7 and setuptools<80')
pytest.importorskip('mmseg', reason='needs mmsegmentation 1.2.2')

from tests.support.mmdet_reference import build, predict  # noqa: E402
from tests.support.reference import max_diff, pvt_checkout  # noqa: E402
from pvt_timm.detection import (  # noqa: E402
    detector_to_mmdet, faster_rcnn_from_mmdet, mask_rcnn_from_mmdet, retinanet_from_mmdet)
from pvt_timm.segmentation import segmenter_to_mmseg, semantic_fpn_from_mmseg  # noqa: E402

LOAD = dict(
    retinanet=retinanet_from_mmdet, mask_rcnn=mask_rcnn_from_mmdet, faster_rcnn=faster_rcnn_from_mmdet,
    semantic_fpn=semantic_fpn_from_mmseg)
MODELS = [(kind, code) for kind in LOAD for code in ('mmdet', 'original')]
MODELS.remove(('faster_rcnn', 'original'))  # which has no config of it


def build_both(kind, code, letter='t', delta_std=None):
    """Return OpenMMLab's model in float32, and ours with its weights.

    Deltas of trained boxes are below 1. With a standard deviation above 2, some deltas reach the limits.
    """
    delta_std = delta_std or dict(retinanet=3.).get(kind, 1.)
    theirs = build(kind, letter, delta_std, pvt_checkout() if code == 'original' else None)
    return theirs, LOAD[kind]({'meta': {}, 'state_dict': theirs.state_dict()})


@functools.lru_cache
def both(kind, code):
    return [m.double() for m in build_both(kind, code)]


def smooth_image(h, w):
    """Return a smooth image of bytes (3, H, W)."""
    coarse = torch.rand(1, 3, max(h // 24, 2), max(w // 24, 2), generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(coarse, size=(h, w), mode='bilinear')[0] * 255).round().to(torch.uint8)


def prepare(ours, size):
    """Return an image that the detector does not resize, and the input that its backbone gets."""
    image = smooth_image(*size).double() / 255
    ours.transform.min_size, ours.transform.max_size = (min(size),), max(size)
    x = ours.transform([image])[0].tensors
    assert x.shape[2] % 32 == x.shape[3] % 32 == 0
    return image, x


@torch.no_grad()
def differences(ours, theirs, x, size):
    """Return the largest differences between the outputs of necks and heads, before any threshold.

    Both models get mmdetection's proposals.
    """
    maps, features = theirs.extract_feat(x), ours.backbone(x)
    pairs = dict(features=(features.values(), maps))
    if hasattr(theirs, 'rpn_head'):
        from mmdet.structures import DetDataSample
        sample = DetDataSample(metainfo=dict(img_shape=size, scale_factor=(1., 1.)))
        our_scores, our_deltas = ours.rpn.head(list(features.values()))
        scores, deltas = theirs.rpn_head(maps)
        proposals = theirs.rpn_head.predict(maps, [sample], rescale=False)[0].bboxes
        assert len(proposals) > 100
        rois = torch.cat([torch.zeros_like(proposals[:, :1]), proposals], dim=1)
        boxes = theirs.roi_head._bbox_forward(maps, rois)
        heads = ours.roi_heads
        logits, box_deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, [proposals], [size])))
        pairs.update(
            rpn_scores=(our_scores, scores), rpn_deltas=(our_deltas, deltas),
            proposals=(ours.rpn(ImageList(x, [size]), features)[0], [proposals]),
            box_logits=([logits.roll(-1, dims=1)], [boxes['cls_score']]),
            box_deltas=([box_deltas[:, 4:]], [boxes['bbox_pred']]))
        if heads.has_mask():
            masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, [proposals[:200]], [size])))
            pairs['mask_logits'] = [masks[:, 1:]], [theirs.roi_head._mask_forward(maps, rois[:200])['mask_preds']]
    else:
        found = ours.head(list(features.values()))
        for key, n, levels in zip(('cls_logits', 'bbox_regression'), (80, 4), theirs.bbox_head(maps)):
            pairs[key] = found[key], [torch.cat([v.permute(0, 2, 3, 1).reshape(-1, n) for v in levels])]
    assert all(torch.cat([v.flatten() for v in b]).std() > 0.1 for _, b in pairs.values())
    return {k: max(max_diff(v, w) for v, w in zip(a, b, strict=True)) for k, (a, b) in pairs.items()}


def detections(theirs, ours, image, x, original, resized):
    """Return the detections of both models, with our labels."""
    with torch.no_grad():
        a = ours([image])[0]
    b = predict(theirs, x, original, resized)
    b['labels'] = b['labels'] + ours.first_label
    return a, b


def share_of_identical(a, b, box_tol=0.01, score_tol=1e-4):
    """Return the share of all detections that both models have: same label, nearly the same box and score."""
    hits = 0
    for x, y in ((a, b), (b, a)):
        same = (x['labels'][:, None] == y['labels'][None])
        same &= (x['boxes'][:, None] - y['boxes'][None]).abs().amax(dim=2) <= box_tol
        same &= (x['scores'][:, None] - y['scores'][None]).abs() <= score_tol
        hits += int(same.any(dim=1).sum())
    return hits / max(len(a['labels']) + len(b['labels']), 1)


# ---- detectors


@pytest.mark.parametrize('size', [(160, 224), (256, 256), (33, 500), (250, 333)])
@pytest.mark.parametrize('kind, code', [m for m in MODELS if m[0] != 'semantic_fpn'])
def test_detector_float64(kind, code, size):
    theirs, ours = both(kind, code)
    image, x = prepare(ours, size)
    assert max(differences(ours, theirs, x, size).values()) <= 1e-8
    a, b = detections(theirs, ours, image, x, size, size)
    assert share_of_identical(a, b, 1e-6, 1e-8) >= (1 if kind == 'retinanet' else 0.999)
    assert torch.equal(a['labels'], b['labels'])
    assert len(b['labels']) == 100 if kind == 'retinanet' else len(b['labels']) > 20
    if kind == 'mask_rcnn':
        masks = a['masks'][:, 0] >= 0.5
        assert (masks == b['masks']).double().mean() >= 0.999
        assert (masks & b['masks']).sum() / (masks | b['masks']).sum() >= 0.999


@pytest.mark.parametrize('original', [(120, 200), (480, 640), (40, 400)])
def test_retinanet_on_resized_images(original):
    """Both models find the same boxes if images are resized by the published rule (sides of 256 and 426)."""
    mmcv = pytest.importorskip('mmcv')
    theirs, ours = build_both('retinanet', 'mmdet', delta_std=0.3)  # boxes near their anchors, for float32
    image = smooth_image(*original)
    ours.transform.min_size, ours.transform.max_size = (256,), 426
    resized = mmcv.imrescale(image.permute(1, 2, 0).numpy()[..., ::-1].copy(), (426, 256))  # BGR, on bytes
    data = theirs.data_preprocessor(dict(inputs=[torch.from_numpy(resized).permute(2, 0, 1)]), False)
    image = image.float() / 255
    x = ours.transform([image])[0]
    assert x.image_sizes == [resized.shape[:2]]
    assert max_diff(x.tensors, data['inputs']) * 0.226 <= 1.5 / 255  # only the rounding to bytes
    assert share_of_identical(*detections(theirs, ours, image, x.tensors, original, resized.shape[:2])) >= 0.99


def test_mask_rcnn_on_resized_images():
    theirs, ours = both('mask_rcnn', 'mmdet')
    image = smooth_image(120, 200).double() / 255
    ours.transform.min_size, ours.transform.max_size = (256,), 426
    x = ours.transform([image])[0]
    a, b = detections(theirs, ours, image, x.tensors, (120, 200), x.image_sizes[0])
    assert share_of_identical(a, b, 1e-4, 1e-8) >= 0.999  # torchvision's factor to go back is in float32
    assert ((a['masks'][:, 0] >= 0.5) != b['masks']).double().mean() <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('code', ['mmdet', 'original'])
@pytest.mark.parametrize('kind, letter, size', [
    ('retinanet', 's', (256, 320)), ('retinanet', 'm', (256, 320)), ('retinanet', 'l', (256, 320)),
    ('mask_rcnn', 's', (800, 1333)), ('mask_rcnn', 'l', (320, 448)),
])
def test_other_variants_float64(kind, letter, size, code):
    theirs, ours = (m.double() for m in build_both(kind, code, letter))
    assert max(differences(ours, theirs, prepare(ours, size)[1], size).values()) <= 1e-8


# ---- training


def random_targets(counts, size, first_label):
    """Return random targets with boxes of at least 45 pixels.

    A smaller box could lie inside of several anchors. These would have the same IoU, and rounding would decide which
    one is the best.
    """
    generator = torch.Generator().manual_seed(0)
    h, w = size
    targets = []
    for count in counts:
        sides = 45 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 60
        corners = torch.rand(count, 2, generator=generator, dtype=torch.float64) * (torch.tensor([w, h]) - sides)
        targets.append(dict(
            boxes=torch.cat([corners, corners + sides], dim=1),
            labels=torch.randint(first_label, 80 + first_label, (count,), generator=generator)))
    return targets


@pytest.mark.parametrize('counts', [(3,), (1, 12), (5, 0), (0, 0), (9, 1, 4)])
def test_retinanet_loss(counts):
    """Losses equal mmdetection's, for one image and for several.

    mmdetection divides by the positive anchors of all images, torchvision by those of each image.
    """
    from mmengine.structures import InstanceData
    theirs, ours = both('retinanet', 'mmdet')
    size = (160, 224)
    image, _ = prepare(ours, size)
    images = [image.roll(37 * i, dims=2) for i in range(len(counts))]
    targets = random_targets(counts, size, ours.first_label)
    ours.train()
    with torch.no_grad():
        found = ours(images, targets)
        scores, deltas = theirs.bbox_head(theirs.extract_feat(ours.transform(images)[0].tensors))
        expected = theirs.bbox_head.loss_by_feat(
            scores, deltas, [InstanceData(bboxes=t['boxes'], labels=t['labels']) for t in targets],
            [dict(img_shape=size, pad_shape=size)] * len(counts))
    ours.eval()
    for name, key in (('loss_cls', 'classification'), ('loss_bbox', 'bbox_regression')):
        # they add 1e-7 to what they divide by, and take anchors in float32
        assert found[key].item() == pytest.approx(sum(expected[name]).item(), rel=3e-7, abs=1e-12), name


@pytest.mark.parametrize('kind', ['retinanet', 'faster_rcnn'])
def test_anchors_are_matched_with_the_same_objects(kind):
    """With many overlapping boxes, anchors get the same objects as in mmdetection.

    The best anchor of an object gets this object, even if it overlaps another object more.
    """
    from mmengine.structures import InstanceData
    theirs, ours = both(kind, 'mmdet')
    size = (160, 224)
    part = ours if kind == 'retinanet' else ours.rpn
    maps = list(ours.backbone(torch.zeros(1, 3, *size, dtype=torch.float64)).values())
    anchors, = part.anchor_generator(ImageList(torch.zeros(1, 3, *size), [size]), maps)
    assigner = (theirs.bbox_head if kind == 'retinanet' else theirs.rpn_head).assigner
    low_best = torch.tensor([[0, 0, 223, 6.]])  # an object that no anchor is near to
    for target in random_targets((40, 12, 1), size, 0):
        boxes = torch.cat([target['boxes'], low_best.double()])
        expected = assigner.assign(
            InstanceData(priors=anchors), InstanceData(bboxes=boxes, labels=torch.zeros(len(boxes)).long())).gt_inds
        matched = part.proposal_matcher(torchvision.ops.box_iou(boxes, anchors))
        assert (matched >= 0).sum() > 1
        # theirs: 0 for no object, -1 for neither; ours: -1 and -2
        assert torch.equal(matched + 1, expected)


# ---- Semantic FPN


@pytest.mark.parametrize('size', [(160, 256), (256, 256), (512, 512), (64, 480)])
@pytest.mark.parametrize('code', ['mmdet', 'original'])
def test_semantic_fpn_float64(code, size):
    theirs, ours = both('semantic_fpn', code)
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a = ours(x)
        b = theirs.inference(x, [dict(img_shape=size, ori_shape=size, pad_shape=size)] * 2)
    assert b.std() > 0.1 and len(b.argmax(1).unique()) > 20
    assert max_diff(a, b) <= 1e-10
    assert torch.equal(a.argmax(dim=1), b.argmax(dim=1))


def test_semantic_fpn_of_an_image_of_another_size():
    """`segment` equals the resizing of mmcv and mmsegmentation.

    mmcv resizes a test image twice (AlignResize of the original code, ResizeToMultiple), here as floats. mmsegmentation
    resizes the result to the image's own size.
    """
    mmcv = pytest.importorskip('mmcv')
    theirs, ours = both('semantic_fpn', 'mmdet')
    ours.min_size, ours.max_size = 128, 256
    seen = []
    handle = ours.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = smooth_image(90, 131).double() / 255
    labels = ours.segment(image)
    handle.remove()
    assert seen[0].shape == (1, 3, 128, 192)  # 128 by 186, up to a multiple of 32
    resized = mmcv.imrescale(image.permute(1, 2, 0).numpy(), (256, 128))
    assert resized.shape == (128, 186, 3)
    resized = mmcv.imresize_to_multiple(resized, divisor=32, scale_factor=1)
    expected = torchvision.transforms.functional.normalize(
        torch.from_numpy(resized).permute(2, 0, 1), ours.mean, ours.std)
    assert max_diff(seen[0][0], expected) <= 1e-6  # OpenCV's weights are float32
    meta = dict(img_shape=(128, 192), ori_shape=(90, 131), pad_shape=(128, 192))
    with torch.no_grad():
        logits = theirs.inference(seen[0], [meta])
    expected = torch.nn.functional.interpolate(logits, size=(90, 131), mode='bilinear').argmax(dim=1)[0]
    assert torch.equal(labels, expected)


# ---- and back


@pytest.mark.parametrize('kind, code', MODELS)
def test_there_and_back_is_bitwise(kind, code):
    theirs, ours = both(kind, code)
    expected = theirs.state_dict()
    out = (segmenter_to_mmseg if kind == 'semantic_fpn' else detector_to_mmdet)(ours, code)
    assert sorted(out) == sorted(expected)
    for k, v in expected.items():
        ours_k, v = (out[k][:, 1:], v[:, 1:]) if k.endswith('pos_embed4') else (out[k], v)  # a row that is never used
        assert torch.equal(ours_k, v), k
    theirs.load_state_dict(out, strict=True)


def test_file_as_mmengine_saves_it(tmp_path):
    """A file of mmengine that also holds a training log is read."""
    from mmengine.logging import MessageHub
    hub = MessageHub.get_instance('test_file_as_mmengine_saves_it')
    hub.update_scalar('train/loss', 0.5)
    hub.update_info('iter', 3)
    theirs = build('semantic_fpn')
    names, palette = [f'class {i}' for i in range(150)], [[i, 0, 0] for i in range(150)]
    torch.save({
        'meta': dict(dataset_meta=dict(classes=names, palette=palette),
                     cfg="test_pipeline = [dict(type='Resize', scale=(1024, 256))]"),
        'state_dict': theirs.state_dict(), 'message_hub': hub.state_dict()}, tmp_path / 'iter_3.pth')
    ours = semantic_fpn_from_mmseg(tmp_path / 'iter_3.pth')
    assert torch.equal(ours.head.classifier.weight, theirs.decode_head.conv_seg.weight)
    assert ours.categories == names and ours.palette[7] == (7, 0, 0)
    assert (ours.min_size, ours.max_size) == (256, 1024)


@pytest.mark.parametrize('size', [(224, 224), (160, 256)])
def test_the_tag_of_a_detector_is_its_backbone(size, tmp_path):
    """`pvt_tiny.retinanet_coco` equals mmdetection's backbone, and so do files converted from it."""
    import timm
    from pvt_timm import create_from_checkpoint
    from weights_conversion import convert

    theirs = build('retinanet', 't').backbone.double().eval()
    file = tmp_path / 'x.pth'
    torch.save({'state_dict': {f'backbone.{k}': v.float() for k, v in theirs.state_dict().items()}}, file)
    theirs.float().double()
    overlay = dict(file=str(file), url=None, hf_hub_id=None)
    tag = timm.create_model('pvt_tiny.retinanet_coco', True, features_only=True, pretrained_cfg_overlay=overlay)
    convert(file, tmp_path / 'out')
    again = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, features_only=True)
    direct = create_from_checkpoint(file, features_only=True)
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs(x)
        for model in (tag, again, direct):
            for ours, maps in zip(model.double().eval()(x), expected):
                assert max_diff(ours, maps) <= 1e-10 * max(1, maps.abs().max().item())
