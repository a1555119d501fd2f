"""OpenMMLab's RetinaNet in torchvision against mmdetection's own model with the same random weights."""
import pytest
import torch

pytest.importorskip('mmdet', reason='needs mmdet 3.3.0, mmcv-lite 2.1.0, mmengine 0.10.7 and setuptools<80')

from mmdet_reference import build_retinanet, predict  # noqa: E402
from pvt_timm.detection import retinanet_from_mmdet  # noqa: E402


@pytest.fixture(scope='module')
def models():
    theirs = build_retinanet('t')
    ours = retinanet_from_mmdet({'meta': {}, 'state_dict': theirs.state_dict()})
    return theirs, ours


@pytest.fixture(scope='module')
def calm_models():
    """Boxes near their anchors as trained models have them, for comparisons in float32."""
    theirs = build_retinanet('t', delta_std=0.3)
    return theirs, retinanet_from_mmdet(theirs.state_dict())


def smooth_image(h, w, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, max(h // 24, 2), max(w // 24, 2), generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=(h, w), mode='bilinear')[0]
    return (image * 255).round().to(torch.uint8)


def heads(ours, theirs, x):
    """Class scores and box deltas of both models, (anchors, classes) and (anchors, 4)."""
    with torch.no_grad():
        scores, deltas = theirs.bbox_head(theirs.neck(theirs.backbone(x)))
        a = ours.head(list(ours.backbone(x).values()))
    scores = torch.cat([s.permute(0, 2, 3, 1).reshape(-1, 80) for s in scores])
    deltas = torch.cat([d.permute(0, 2, 3, 1).reshape(-1, 4) for d in deltas])
    return (a['cls_logits'][0].sigmoid(), a['bbox_regression'][0]), (scores.sigmoid(), deltas)


def share_of_identical(a, b, box_tol=0.01, score_tol=1e-4):
    """Share of all detections that the other model has too: same label, near box and score."""
    hits = 0
    for x, y in ((a, b), (b, a)):
        same = (x['labels'][:, None] == y['labels'][None])
        same &= (x['boxes'][:, None] - y['boxes'][None]).abs().amax(dim=2) <= box_tol
        same &= (x['scores'][:, None] - y['scores'][None]).abs() <= score_tol
        hits += int(same.any(dim=1).sum())
    return hits / max(len(a['labels']) + len(b['labels']), 1)


@pytest.mark.parametrize('size', [(160, 224), (224, 224), (448, 448), (33, 500), (250, 333)])
def test_scores_and_deltas_float64(models, size):
    theirs, ours = (m.double() for m in models)
    image = smooth_image(*size).double() / 255
    ours.transform.min_size, ours.transform.max_size = (min(size),), max(size)
    x = ours.transform([image])[0].tensors
    (s1, d1), (s2, d2) = heads(ours, theirs, x)
    score_diff, delta_diff = (s1 - s2).abs().max().item(), (d1 - d2).abs().max().item()
    print(f'{size}: scores {score_diff:.1e}, deltas {delta_diff:.1e} (size {d2.abs().max().item():.1f})')
    assert s2.std() > 0.01 and d2.std() > 0.1
    assert score_diff <= 1e-8 and delta_diff <= 1e-8

    with torch.no_grad():
        a = ours([image])[0]
    b = predict(theirs, x, size, size)
    assert len(b['labels']) == 100
    assert share_of_identical(a, b, 1e-6, 1e-8) == 1
    assert torch.equal(a['labels'], b['labels'])
    torch.testing.assert_close(a['boxes'], b['boxes'], rtol=0, atol=1e-6)
    torch.testing.assert_close(a['scores'], b['scores'], rtol=0, atol=1e-8)


@pytest.mark.parametrize('original', [(120, 200), (231, 170), (480, 640), (40, 400), (100, 100)])
def test_detections_on_resized_images(calm_models, original):
    """From image to boxes at the resize rule of the published models, a shorter side of 256 and a longest of 426."""
    mmcv = pytest.importorskip('mmcv')
    theirs, ours = calm_models
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
    same_input = predict(theirs, x.tensors, original, resized.shape[:2])
    exact = share_of_identical(a, same_input)
    off = (x.tensors - data['inputs']).abs().max().item() * 0.226
    close = share_of_identical(a, b, 1, 0.02)
    print(f'{original} -> {resized.shape[:2]}: {len(b["labels"])} detections, {exact:.1%} identical on the same '
          f'resized image. mmcv resizes bytes: pixels differ by up to {off:.4f}, {close:.0%} of the detections by '
          f'less than 1 pixel and 0.02')
    assert exact >= 0.99
    assert off <= 1.5 / 255  # only the rounding to bytes


@pytest.mark.slow
@pytest.mark.parametrize('letter', ['s', 'm'])
def test_other_variants_float64(letter):
    theirs = build_retinanet(letter, seed=1).double()
    ours = retinanet_from_mmdet(theirs.state_dict()).double()
    x = torch.randn(1, 3, 256, 320, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (s1, d1), (s2, d2) = heads(ours, theirs, x)
    assert (s1 - s2).abs().max() <= 1e-8 and (d1 - d2).abs().max() <= 1e-8


@pytest.mark.slow
def test_published_size_float64(models):
    theirs, ours = (m.double() for m in models)
    image = smooth_image(800, 1333).double() / 255
    ours.transform.min_size, ours.transform.max_size = (800,), 1333
    x = ours.transform([image])[0].tensors
    assert x.shape[2:] == (800, 1344)
    (s1, d1), (s2, d2) = heads(ours, theirs, x)
    print(f'800x1333: scores {(s1 - s2).abs().max():.1e}, deltas {(d1 - d2).abs().max():.1e}')
    assert (s1 - s2).abs().max() <= 1e-8 and (d1 - d2).abs().max() <= 1e-8
    with torch.no_grad():
        a = ours([image])[0]
    b = predict(theirs, x, (800, 1333), (800, 1333))
    assert share_of_identical(a, b, 1e-6, 1e-8) == 1
