"""OpenMMLab's detectors and segmenter in this package against their own models with the same random weights.

'original' is the original code's backbone under the heads of its config, so its key layout.
"""
import functools

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

pytest.importorskip('mmdet', reason='needs mmdet 3.3.0, mmcv-lite 2.1.0, mmengine 0.10.7 and setuptools<80')
pytest.importorskip('mmseg', reason='needs mmsegmentation 1.2.2')

from mmdet_reference import build, predict  # noqa: E402
from reference import max_diff, pvt_checkout  # noqa: E402
from pvt_timm.detection import (  # noqa: E402
    detector_to_mmdet, faster_rcnn_from_mmdet, mask_rcnn_from_mmdet, retinanet_from_mmdet)
from pvt_timm.segmentation import segmenter_to_mmseg, semantic_fpn_from_mmseg  # noqa: E402

LOAD = dict(
    retinanet=retinanet_from_mmdet, mask_rcnn=mask_rcnn_from_mmdet, faster_rcnn=faster_rcnn_from_mmdet,
    semantic_fpn=semantic_fpn_from_mmseg)
SIZES = [(160, 224), (256, 256), (33, 500), (250, 333)]


def build_both(kind, code, letter='t', delta_std=3.0, seed=0):
    checkout = pvt_checkout() if code == 'original' else None
    theirs = build(kind, letter, seed, delta_std, checkout)
    ours = LOAD[kind]({'meta': {}, 'state_dict': theirs.state_dict()})
    return theirs, ours


@pytest.fixture(scope='module', params=['mmdet', 'original'])
def code(request):
    return request.param


@pytest.fixture(scope='module')
def both(code):
    """Both models in float64, made on demand."""
    return functools.lru_cache(
        lambda kind, delta_std=3.: [m.double() for m in build_both(kind, code, delta_std=delta_std)])


def smooth_image(h, w, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, max(h // 24, 2), max(w // 24, 2), generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=(h, w), mode='bilinear')[0]
    return (image * 255).round().to(torch.uint8)


def prepare(ours, size):
    """An image of this size that the detector leaves at its size, and what its backbone gets."""
    image = smooth_image(*size).double() / 255
    ours.transform.min_size, ours.transform.max_size = (min(size),), max(size)
    x = ours.transform([image])[0].tensors
    assert x.shape[2] % 32 == x.shape[3] % 32 == 0
    return image, x


def retinanet_outputs(ours, theirs, x):
    """Class scores and box deltas of both models, (anchors, classes) and (anchors, 4)."""
    with torch.no_grad():
        scores, deltas = theirs.bbox_head(theirs.neck(theirs.backbone(x)))
        a = ours.head(list(ours.backbone(x).values()))
    scores = torch.cat([s.permute(0, 2, 3, 1).reshape(-1, 80) for s in scores])
    deltas = torch.cat([d.permute(0, 2, 3, 1).reshape(-1, 4) for d in deltas])
    return (a['cls_logits'][0].sigmoid(), a['bbox_regression'][0]), (scores.sigmoid(), deltas)


def detections(theirs, ours, image, x, original, resized):
    """What both find, under our labels."""
    with torch.no_grad():
        a = ours([image])[0]
    b = predict(theirs, x, original, resized)
    b['labels'] = b['labels'] + ours.first_label
    return a, b


def share_of_identical(a, b, box_tol=0.01, score_tol=1e-4):
    """Share of all detections that the other model has too: same label, near box and score."""
    hits = 0
    for x, y in ((a, b), (b, a)):
        same = (x['labels'][:, None] == y['labels'][None])
        same &= (x['boxes'][:, None] - y['boxes'][None]).abs().amax(dim=2) <= box_tol
        same &= (x['scores'][:, None] - y['scores'][None]).abs() <= score_tol
        hits += int(same.any(dim=1).sum())
    return hits / max(len(a['labels']) + len(b['labels']), 1)


# ---- RetinaNet


@pytest.mark.parametrize('size', SIZES)
def test_retinanet_float64(both, size):
    theirs, ours = both('retinanet')
    image, x = prepare(ours, size)
    (s1, d1), (s2, d2) = retinanet_outputs(ours, theirs, x)
    assert s2.std() > 0.01 and d2.std() > 0.1
    assert max_diff(s1, s2) <= 1e-8 and max_diff(d1, d2) <= 1e-8

    a, b = detections(theirs, ours, image, x, size, size)
    assert len(b['labels']) == 100
    assert share_of_identical(a, b, 1e-6, 1e-8) == 1
    assert torch.equal(a['labels'], b['labels'])


@pytest.mark.parametrize('original', [(120, 200), (480, 640), (40, 400)])
def test_retinanet_on_resized_images(original):
    """From image to boxes at the resize rule of the published models, a shorter side of 256 and a longest of 426."""
    mmcv = pytest.importorskip('mmcv')
    theirs, ours = build_both('retinanet', 'mmdet', delta_std=0.3)  # boxes near their anchors, for float32
    image = smooth_image(*original)
    ours.transform.min_size, ours.transform.max_size = (256,), 426
    with torch.no_grad():
        a = ours([image.float() / 255])[0]

    resized = mmcv.imrescale(image.permute(1, 2, 0).numpy()[..., ::-1].copy(), (426, 256))  # BGR, on bytes
    data = theirs.data_preprocessor(dict(inputs=[torch.from_numpy(resized).permute(2, 0, 1)]), False)
    b = predict(theirs, data['inputs'], original, resized.shape[:2])
    x = ours.transform([image.float() / 255])[0]
    assert x.image_sizes == [resized.shape[:2]]
    assert x.tensors.shape == data['inputs'].shape
    exact = share_of_identical(a, predict(theirs, x.tensors, original, resized.shape[:2]))
    off = (x.tensors - data['inputs']).abs().max().item() * 0.226
    print(f'{original} -> {resized.shape[:2]}: {exact:.1%} identical on the same resized image, on that of mmcv '
          f'{share_of_identical(a, b, 1, 0.02):.0%} to 1 pixel and 0.02')
    assert exact >= 0.99
    assert off <= 1.5 / 255  # only the rounding to bytes


@pytest.mark.slow
@pytest.mark.parametrize('letter', ['s', 'm', 'l'])
def test_other_variants_float64(letter, code):
    theirs, ours = (m.double() for m in build_both('retinanet', code, letter, seed=1))
    x = torch.randn(1, 3, 256, 320, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (s1, d1), (s2, d2) = retinanet_outputs(ours, theirs, x)
    assert max_diff(s1, s2) <= 1e-8 and max_diff(d1, d2) <= 1e-8


# ---- Mask R-CNN and Faster R-CNN


def two_stage_differences(ours, theirs, x, size):
    """Largest differences of what the heads say before thresholds, on the proposals of mmdetection."""
    from mmdet.structures import DetDataSample
    sample = DetDataSample(metainfo=dict(img_shape=size, scale_factor=(1., 1.)))
    with torch.no_grad():
        maps = theirs.extract_feat(x)
        features = ours.backbone(x)
        scores, deltas = theirs.rpn_head(maps)
        our_scores, our_deltas = ours.rpn.head(list(features.values()))
        proposals = theirs.rpn_head.predict(maps, [sample], rescale=False)[0].bboxes
        our_proposals = ours.rpn(ImageList(x, [size]), features)[0][0]
        rois = torch.cat([torch.zeros_like(proposals[:, :1]), proposals], dim=1)
        boxes = theirs.roi_head._bbox_forward(maps, rois)
        heads = ours.roi_heads
        logits, box_deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, [proposals], [size])))
        out = dict(
            features=max(max_diff(a, b) for a, b in zip(features.values(), maps)),
            rpn_scores=max(max_diff(a, b) for a, b in zip(our_scores, scores)),
            rpn_deltas=max(max_diff(a, b) for a, b in zip(our_deltas, deltas)),
            proposals=max_diff(our_proposals, proposals) if our_proposals.shape == proposals.shape else float('inf'),
            box_logits=max_diff(logits.roll(-1, dims=1), boxes['cls_score']),
            box_deltas=max_diff(box_deltas[:, 4:], boxes['bbox_pred']))
        if heads.has_mask():
            masks = theirs.roi_head._mask_forward(maps, rois[:200])['mask_preds']
            ours_masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, [proposals[:200]], [size])))
            out['mask_logits'] = max_diff(ours_masks[:, 1:], masks)
            assert masks.std() > 0.1
    assert boxes['cls_score'].std() > 0.1 and boxes['bbox_pred'].std() > 0.1 and len(proposals) > 100
    return out


@pytest.mark.parametrize('size', SIZES)
def test_mask_rcnn_float64(both, size):
    theirs, ours = both('mask_rcnn', 1.)
    image, x = prepare(ours, size)
    assert all(v <= 1e-8 for v in two_stage_differences(ours, theirs, x, size).values())
    a, b = detections(theirs, ours, image, x, size, size)
    share = share_of_identical(a, b, 1e-6, 1e-8)
    assert torch.equal(a['labels'], b['labels']) and len(b['labels']) > 20
    masks = a['masks'][:, 0] >= 0.5
    pixels = (masks == b['masks']).double().mean().item()
    inside = 1 - (masks != b['masks']).sum().item() / (masks | b['masks']).sum().item()
    print(f'{size}: {len(b["labels"])} detections, {share:.3%} identical; mask pixels {pixels:.4%}, of those in a mask '
          f'{inside:.4%}')
    assert share >= 0.999 and pixels >= 0.999 and inside >= 0.999


def test_mask_rcnn_on_resized_images(both):
    theirs, ours = both('mask_rcnn', 1.)
    original = (120, 200)
    image = smooth_image(*original).double() / 255
    ours.transform.min_size, ours.transform.max_size = (256,), 426
    x = ours.transform([image])[0]
    a, b = detections(theirs, ours, image, x.tensors, original, x.image_sizes[0])
    share = share_of_identical(a, b, 1e-4, 1e-8)  # torchvision's factor to go back is in float32
    different = ((a['masks'][:, 0] >= 0.5) != b['masks']).double().mean().item()
    assert share >= 0.999 and different <= 1e-3


def test_faster_rcnn_float64():
    theirs, ours = (m.double() for m in build_both('faster_rcnn', 'mmdet', delta_std=1.))
    image, x = prepare(ours, (160, 224))
    assert all(v <= 1e-8 for v in two_stage_differences(ours, theirs, x, (160, 224)).values())
    a, b = detections(theirs, ours, image, x, (160, 224), (160, 224))
    # mmdetection goes back to the original image before the last NMS where there is no mask head
    assert share_of_identical(a, b, 1e-6, 1e-8) >= 0.999


@pytest.mark.slow
@pytest.mark.parametrize('letter', ['s', 'l'])
def test_mask_rcnn_of_other_variants_at_the_published_size(letter):
    theirs, ours = (m.double() for m in build_both('mask_rcnn', 'mmdet', letter, delta_std=1.))
    image, x = prepare(ours, (800, 1333) if letter == 's' else (320, 448))
    assert all(v <= 1e-8 for v in two_stage_differences(ours, theirs, x, tuple(image.shape[1:])).values())


# ---- Semantic FPN


@pytest.mark.parametrize('size', [(160, 256), (256, 256), (512, 512), (64, 480)])
def test_semantic_fpn_float64(both, size):
    theirs, ours = both('semantic_fpn')
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a = ours(x)
        b = theirs.inference(x, [dict(img_shape=size, ori_shape=size, pad_shape=size)] * 2)
    assert b.std() > 0.1 and len(b.argmax(1).unique()) > 20
    assert max_diff(a, b) <= 1e-10
    assert torch.equal(a.argmax(dim=1), b.argmax(dim=1))


def test_semantic_fpn_of_an_image_of_another_size(both):
    """`segment` against mmsegmentation's resize to the image's own size, on the same resized image."""
    theirs, ours = both('semantic_fpn')
    image = smooth_image(90, 131).double() / 255
    ours.min_size, ours.max_size = 128, 256
    seen = []
    handle = ours.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    labels = ours.segment(image)
    handle.remove()
    assert seen[0].shape == (1, 3, 128, 192)  # 128 by 186.3, up to a multiple of 32
    meta = dict(img_shape=(128, 192), ori_shape=(90, 131), pad_shape=(128, 192))
    with torch.no_grad():
        logits = theirs.inference(seen[0], [meta])
        expected = torch.nn.functional.interpolate(logits, size=(90, 131), mode='bilinear').argmax(dim=1)[0]
    assert torch.equal(labels, expected)


# ---- and back


@pytest.mark.parametrize('kind', list(LOAD))
def test_there_and_back_is_bitwise(kind, code):
    if kind == 'faster_rcnn' and code == 'original':
        pytest.skip('the original code has no config of it')
    theirs, ours = build_both(kind, code)
    expected = theirs.state_dict()
    out = (segmenter_to_mmseg if kind == 'semantic_fpn' else detector_to_mmdet)(ours, code)
    assert list(sorted(out)) == list(sorted(expected))
    for k, v in expected.items():
        ours_k, v = (out[k][:, 1:], v[:, 1:]) if k.endswith('pos_embed4') else (out[k], v)  # a row that is never used
        assert torch.equal(ours_k, v), k
    theirs.load_state_dict(out, strict=True)


def test_file_as_mmengine_saves_it(tmp_path):
    """With its training log beside the weights."""
    from mmengine.logging import MessageHub
    hub = MessageHub.get_instance('test_file_as_mmengine_saves_it')
    hub.update_scalar('train/loss', 0.5)
    hub.update_info('iter', 3)
    theirs = build('semantic_fpn')
    names, palette = [f'class {i}' for i in range(150)], [[i, 0, 0] for i in range(150)]
    torch.save({
        'meta': dict(dataset_meta=dict(classes=names, palette=palette), cfg='scale=(1024, 256)'),
        'state_dict': theirs.state_dict(), 'message_hub': hub.state_dict()}, tmp_path / 'iter_3.pth')
    ours = semantic_fpn_from_mmseg(tmp_path / 'iter_3.pth')
    assert torch.equal(ours.head.classifier.weight, theirs.decode_head.conv_seg.weight)
    assert ours.categories == names and ours.palette[7] == (7, 0, 0)
    assert (ours.min_size, ours.max_size) == (256, 1024)
