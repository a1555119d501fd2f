"""torchvision's detectors on PVT: the backbone helper, RetinaNet as published, whole checkpoints, bad input."""
import copy
import hashlib
import http.server
import threading

import pytest
import timm
import torch
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

import pvt_timm  # noqa: F401
from pvt_timm.checkpoints import from_timm
from pvt_timm.detection import (
    ClippedBoxCoder,
    FixedStrideAnchors,
    check_detection_inputs,
    coco_categories,
    pvt_fpn_backbone,
    pvt_retinanet,
    retinanet_coco,
    retinanet_from_mmdet,
)
from pvt_timm.detection import _NECK_AND_HEAD

SMALL = dict(out_channels=32, model_args=dict(img_size=64), min_size=64, max_size=128)


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def target(*rows, labels=None):
    return dict(boxes=boxes(*rows), labels=torch.zeros(len(rows), dtype=torch.int64) if labels is None else labels)


@pytest.fixture(scope='module')
def small_retinanet():
    torch.manual_seed(0)
    model = pvt_retinanet('test_pvt', 3, score_thresh=0.02, **SMALL)
    for m in model.head.modules():  # scores and boxes that differ
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight)
    return model.eval()


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
    assert list(out) == backbone.names == names
    assert [tuple(x.shape) for x in out.values()] == [(2, 24, s, s) for s in sides]
    assert backbone.out_channels == 24


def test_backbone_takes_features_of_timm():
    torch.manual_seed(0)
    backbone = pvt_fpn_backbone('test_pvt', out_indices=(1, 2, 3), extra_levels=None, out_channels=16).eval()
    plain = timm.create_model('test_pvt', features_only=True, out_indices=(1, 2, 3)).eval()
    plain.load_state_dict(backbone.body.state_dict())
    x = torch.rand(1, 3, 70, 96)
    named = {str(i): f for i, f in enumerate(plain(x))}
    for a, b in zip(backbone(x).values(), backbone.fpn(named).values()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_backbone_scripts_and_holds_no_unused_parameter():
    torch.manual_seed(0)
    backbone = pvt_fpn_backbone('test_pvt', out_channels=16, out_indices=(1, 2, 3), extra_levels='p6p7')
    x = torch.rand(1, 3, 64, 96)
    sum(v.sum() for v in backbone(x).values()).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []
    scripted = torch.jit.script(backbone.eval())
    for a, b in zip(backbone(x).values(), scripted(x).values()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('arguments, message', [
    (dict(extra_levels='p6'), r"extra_levels in \('pool', 'p6p7', 'p6p7_on_input', None\), got 'p6'"),
    (dict(out_channels=0), 'out_channels of at least 1, got 0'),
    (dict(out_indices=(2, 1)), r'rising stage indices .* got \(2, 1\)'),
    (dict(out_indices=()), r'rising stage indices .* got \(\)'),
    (dict(out_indices=(0, 4)), r'0 to 3.*got \(0, 4\)'),
    (dict(output_stride=16), 'Expected output_stride 32'),
])
def test_backbone_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        pvt_fpn_backbone('test_pvt', **arguments)


# ---- torchvision's own detectors


def test_torchvision_detectors_train_and_detect_on_mixed_sizes():
    torch.manual_seed(0)
    images = [torch.rand(3, 64, 80), torch.rand(3, 90, 50)]
    targets = [target((5, 5, 40, 50), labels=torch.tensor([1])), target()]
    masks = [dict(t, masks=torch.ones(len(t['boxes']), *x.shape[1:], dtype=torch.uint8))
             for t, x in zip(targets, images)]
    sizes = dict(min_size=64, max_size=128)
    pyramid = AnchorGenerator(((16,), (32,), (64,), (96,), (128,)), ((0.5, 1.0, 2.0),) * 5)
    models = [
        (RetinaNet(pvt_fpn_backbone('test_pvt', out_channels=16, extra_levels='pool'), 3, **sizes), targets),
        (FasterRCNN(pvt_fpn_backbone('test_pvt', out_channels=16), 3, rpn_anchor_generator=pyramid, **sizes), targets),
        (MaskRCNN(pvt_fpn_backbone('test_pvt', out_channels=16), 3, rpn_anchor_generator=pyramid, **sizes), masks),
    ]
    for model, target_list in models:
        losses = model.train()(images, target_list)
        sum(losses.values()).backward()
        assert all(x.isfinite() for x in losses.values())
        grads = [p.grad for p in model.backbone.body.parameters()]
        assert all(g is not None and g.isfinite().all() for g in grads)
        found = model.eval()(images)
        for x, got in zip(images, found):
            assert set(got) >= {'boxes', 'scores', 'labels'}
            if len(got['boxes']):
                assert got['boxes'].min() >= 0 and got['boxes'][:, 2].max() <= x.shape[2] + 1e-3


def test_torchvision_detector_scripts():
    torch.manual_seed(0)
    backbone = pvt_fpn_backbone('test_pvt', out_channels=16, out_indices=(1, 2, 3), extra_levels='p6p7')
    model = RetinaNet(backbone, 3, min_size=64, max_size=128, score_thresh=0.).eval()
    images = [torch.rand(3, 64, 80)]
    _, scripted = torch.jit.script(model)(images)
    for k, v in model(images)[0].items():
        torch.testing.assert_close(scripted[0][k], v)


# ---- RetinaNet as published


def test_anchors_are_centred_on_fixed_strides_and_not_rounded():
    maps = [torch.zeros(1, 1, *g) for g in ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))]
    images = ImageList(torch.zeros(1, 3, 800, 1344), [(800, 1333)])
    anchors = FixedStrideAnchors()(images, maps)[0]
    assert len(anchors) == 9 * sum(x[0, 0].numel() for x in maps)
    start = 0
    for stride, x in zip((8, 16, 32, 64, 128), maps):
        h, w = x.shape[2:]
        level = anchors[start:start + 9 * h * w].reshape(h, w, 3, 3, 4)  # ratio, then scale
        start += 9 * h * w
        for row, column, ratio, scale in ((0, 0, 0, 0), (h - 1, w - 1, 2, 2), (h // 2, 3, 1, 1)):
            side = stride * 4 * 2 ** (scale / 3)
            height, width = side * (0.5, 1, 2)[ratio] ** 0.5, side / (0.5, 1, 2)[ratio] ** 0.5
            cx, cy = column * stride, row * stride
            expected = torch.tensor([cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2])
            torch.testing.assert_close(level[row, column, ratio, scale], expected, rtol=0, atol=1e-3)


def test_box_coder_bounds_the_size_on_both_sides():
    coder = ClippedBoxCoder((1., 1., 1., 1.))
    anchor = boxes((0, 0, 10, 20))
    decoded = coder.decode_single(torch.tensor([[0.1, -0.2, -100., 100.]]), anchor)[0]
    width, height = decoded[2] - decoded[0], decoded[3] - decoded[1]
    torch.testing.assert_close(width, torch.tensor(10 * 16 / 1000), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(height, torch.tensor(20 * 1000 / 16), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close((decoded[0] + decoded[2]) / 2, torch.tensor(6.0))
    torch.testing.assert_close((decoded[1] + decoded[3]) / 2, torch.tensor(6.0))


@pytest.mark.parametrize('size, resized', [
    ((480, 640), (800, 1067)), ((427, 640), (800, 1199)), ((333, 500), (800, 1201)), ((100, 1000), (133, 1333)),
    ((1, 1), (800, 800)), ((1, 4000), (1, 1333)), ((2000, 3), (1333, 2)),
])
def test_resizing_rounds_and_keeps_a_pixel(size, resized):
    model = pvt_retinanet('test_pvt', 2)
    scale = min(1333 / max(size), 800 / min(size))
    assert resized == tuple(max(int(n * scale + 0.5), 1) for n in size)
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
    model.score_thresh = 0.05
    found = model.postprocess_detections(outputs, [[anchors]], [(64, 64)])[0]
    torch.testing.assert_close(found['boxes'], boxes((10, 10, 64, 20)))
    assert found['labels'].tolist() == [1]
    torch.testing.assert_close(found['scores'], torch.tensor([2.]).sigmoid())


def test_postprocessing_equals_torchvision_where_no_box_leaves_the_image(small_retinanet):
    model = small_retinanet
    generator = torch.Generator().manual_seed(0)
    anchors = boxes((20, 20, 40, 44)).repeat(60, 1) + torch.rand(60, 1, generator=generator) * 15
    outputs = dict(
        cls_logits=[torch.randn(1, 60, 3, generator=generator)],
        bbox_regression=[torch.randn(1, 60, 4, generator=generator) * 0.1])
    ours = model.postprocess_detections(outputs, [[anchors]], [(64, 64)])[0]
    theirs = RetinaNet.postprocess_detections(model, outputs, [[anchors]], [(64, 64)])[0]
    assert len(ours['labels']) > 10
    for k in ours:
        torch.testing.assert_close(ours[k], theirs[k])


def test_one_image_equals_a_batch_of_different_sizes(small_retinanet):
    generator = torch.Generator().manual_seed(0)
    model = copy.deepcopy(small_retinanet).double()  # no ties between scores
    images = [torch.rand(3, h, w, generator=generator).double() for h, w in ((64, 64), (64, 64), (1, 1), (40, 90))]
    with torch.no_grad():
        alone, first = model(images[:1])[0], model(images[:2])[0]
        mixed = model(images)
        none = model([])
    assert len(alone['labels']) > 20
    for k in alone:
        torch.testing.assert_close(alone[k], first[k], rtol=1e-8, atol=1e-8)
    assert none == []
    for image, found in zip(images, mixed):
        assert len(found['boxes']) <= 100
        assert found['boxes'].isfinite().all()
        assert (found['boxes'] <= torch.tensor([image.shape[2], image.shape[1]] * 2) + 1e-3).all()


def test_memory_format_and_contiguity_do_not_matter(small_retinanet):
    generator = torch.Generator().manual_seed(0)
    model = copy.deepcopy(small_retinanet).double()
    image = torch.rand(3, 64, 96, generator=generator).double()
    batch = image[None].to(memory_format=torch.channels_last)
    turned = image.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.zeros(3, 64, 192, dtype=torch.float64)
    wide[:, :, ::2] = image
    with torch.no_grad():
        expected = model([image])[0]
        others = [model(batch)[0], model([turned])[0], model([wide[:, :, ::2]])[0]]
    assert len(expected['labels']) > 20
    for other in others:
        for k in expected:
            torch.testing.assert_close(other[k], expected[k], rtol=1e-8, atol=1e-8)


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


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = pvt_retinanet('test_pvt', 3, **SMALL).train()
    images = [torch.zeros(3, 64, 64), torch.zeros(3, 64, 80)]
    images[0][:, 10:44, 12:50] = 1
    targets = [target((12, 10, 50, 44), labels=torch.tensor([2])), target()]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(12):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('call, message', [
    (lambda m, x: m([x[0].mul(255).byte()]), r'image 0 as floats from 0 to 1, got torch.uint8'),
    (lambda m, x: m([x[0], x[0].double()]), r'image 1 of torch.float32, got torch.float64'),
    (lambda m, x: m([x[0].double()]), r'image 0 of torch.float32, got torch.float64'),
    (lambda m, x: m([x[0][0]]), r'image 0 as a tensor \(3, height, width\), got \[64, 64\]'),
    (lambda m, x: m([x[0][:, :0]]), r'got \[3, 0, 64\]'),
    (lambda m, x: m([x[0].permute(1, 2, 0)]), r'got \[64, 64, 3\]'),
    (lambda m, x: m([x[0].numpy()]), r'got ndarray'),
    (lambda m, x: m.train()([], []), 'at least one image to train on'),
    (lambda m, x: m.train()(x), 'Expected targets in training'),
    (lambda m, x: m.train()(x, []), r'one target per image \(1\), got 0'),
    (lambda m, x: m.train()(x, [dict(boxes=boxes())]), 'target 0, missing: labels'),
    (lambda m, x: m.train()(x, [target((1, 1, 5, 5), labels=torch.tensor([3]))]), 'from 0 to 2, got 3 in target 0'),
    (lambda m, x: m.train()(x, [target((1, 1, 5, 5), labels=torch.tensor([-1]))]), 'labels from 0 to 2, got -1'),
    (lambda m, x: m.train()(x, [target((1, 1, 5, 5), labels=torch.tensor([1., ]))]), 'int64'),
    (lambda m, x: m.train()(x, [target((1, 1, 5, 5), labels=torch.tensor([1, 1]))]), r'int64 \(1,\), one per box'),
    (lambda m, x: m.train()(x, [target((1, 1, 5, 5), (3, 3, 3, 9))]), r'got \[3.0, 3.0, 3.0, 9.0\] in target 0, box 1'),
    (lambda m, x: m.train()(x, [target((5, 5, 1, 1))]), 'x1 < x2 and y1 < y2'),
    (lambda m, x: m.train()(x, [target((1, 1, float('nan'), 9))]), 'x1 < x2 and y1 < y2'),
    (lambda m, x: m.train()(x, [dict(boxes=torch.tensor([]), labels=torch.zeros(0).long())]), r'torch.zeros\(0, 4\)'),
])
def test_bad_input_is_refused(small_retinanet, call, message):
    model = copy.copy(small_retinanet)
    with pytest.raises(ValueError, match=message):
        call(model, [torch.rand(3, 64, 64)])
    small_retinanet.eval()


def test_check_for_detectors_with_a_background_class():
    image, good = torch.rand(3, 64, 64), target((1, 1, 5, 5), labels=torch.tensor([1]))
    check_detection_inputs([image], [good], num_classes=2, first_label=1)
    with pytest.raises(ValueError, match='labels from 1 to 1, got 0'):
        check_detection_inputs([image], [target((1, 1, 5, 5))], num_classes=2, first_label=1)


@pytest.mark.parametrize('call, message', [
    (lambda: pvt_retinanet('test_pvt', 0), 'num_classes of at least 1'),
    (lambda: retinanet_coco('pvt_large'), r"model_name in \('pvt_tiny', 'pvt_small', 'pvt_medium'\), got 'pvt_large'"),
])
def test_factories_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- whole checkpoints of mmdetection


def as_mmdet(model, fmt='mmdet'):
    """The state dict that mmdetection would save for the weights of `model`."""
    ours = model.state_dict()
    features = {k.removeprefix('backbone.body.').replace('stages_', 'stages.'): v
                for k, v in ours.items() if k.startswith('backbone.body.')}
    out = {f'backbone.{k}': v for k, v in from_timm(features, fmt)[0].items()}
    for here, there, count in _NECK_AND_HEAD:
        for n in range(count):
            for p in ('weight', 'bias'):
                out[there.format(n=n, p=p)] = ours[here.format(n=n, p=p)]
    return out


@pytest.fixture(scope='module')
def detector():
    torch.manual_seed(0)
    return pvt_retinanet('pvt_tiny', 80, out_channels=16, score_thresh=0.)


@pytest.mark.parametrize('fmt, eps', [('mmdet', {1e-6}), ('original', {1e-5, 1e-6})])
def test_checkpoint_lands(detector, fmt, eps, tmp_path):
    state_dict = as_mmdet(detector, fmt)
    file = tmp_path / 'detector.pth'
    torch.save({'meta': {'epoch': 12, 'CLASSES': tuple(coco_categories().values())}, 'state_dict': state_dict}, file)
    model = retinanet_from_mmdet(file, min_size=64, max_size=96)
    assert not model.training and model.num_classes == 80 and model.backbone.out_channels == 16
    for k, v in detector.state_dict().items():
        assert torch.equal(model.state_dict()[k], v), k
    assert {m.eps for m in model.backbone.body.modules() if isinstance(m, torch.nn.LayerNorm)} == eps
    assert model.categories[0] == 'person' and model.categories[-1] == 'toothbrush'
    assert model.category_ids[0] == 1 and model.category_ids[-1] == 90 and len(model.category_ids) == 80
    assert len(model([torch.rand(3, 40, 60)])) == 1


def test_checkpoint_of_other_classes_and_wrappers(detector):
    torch.manual_seed(1)
    few = pvt_retinanet('pvt_tiny', 2, out_channels=16)
    bare = as_mmdet(few)
    prefixed = {f'module.{k}': v for k, v in bare.items()}
    wrapped = {'state_dict': prefixed, 'meta': {'dataset_meta': {'classes': ('a', 'b')}}}
    for checkpoint, names in ((bare, []), (wrapped, ['a', 'b'])):
        model = retinanet_from_mmdet(checkpoint)
        assert model.num_classes == 2 and model.categories == names and model.category_ids == []
        assert torch.equal(model.head.regression_head.bbox_reg.weight, few.head.regression_head.bbox_reg.weight)


def test_checkpoint_errors_name_what_is_wrong(detector, tmp_path):
    good = as_mmdet(detector)

    def error(change, message):
        state_dict = dict(good)
        change(state_dict)
        with pytest.raises(ValueError, match=message):
            retinanet_from_mmdet({'state_dict': state_dict})

    error(lambda d: d.pop('neck.fpn_convs.4.conv.bias'), r'missing neck.fpn_convs.4.conv.bias \(1 missing, 0 unknown\)')
    error(lambda d: d.update({'neck.fpn_convs.0.bn.weight': torch.ones(1)}), 'not part of it: neck.fpn_convs.0.bn')
    error(lambda d: [d.pop(k) for k in list(d) if not k.startswith('backbone.')], 'Expected neck and bbox_head')
    error(lambda d: [d.pop(k) for k in list(d) if k.startswith('backbone.')], 'Expected a PVT v1 checkpoint')
    error(lambda d: d.update({'bbox_head.retina_cls.weight': torch.ones(10, 16, 3, 3)}), '9 anchors, got 10 rows')
    error(lambda d: d.update({'neck.lateral_convs.0.conv.weight': torch.ones(16, 64, 1, 1)}), 'Wrong shape .*inner_b')
    error(lambda d: d.pop('backbone.layers.1.1.2.norm1.bias'), 'Missing in the checkpoint: .*stages_1.*norm1.bias')
    error(lambda d: d.update({'backbone.layers.9.1.2.gamma': torch.ones(1)}), 'Not part of a PVT v1 model')
    with pytest.raises(ValueError, match='got a timm model'):
        retinanet_from_mmdet(timm.create_model('pvt_tiny').state_dict())
    file = tmp_path / 'evil.pth'
    torch.save({'state_dict': good, 'meta': threading.Thread}, file)
    with pytest.raises(Exception, match='[Ww]eights.only'):
        retinanet_from_mmdet(file)


# ---- the published file by url


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder served over loopback, and a cache folder."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    yield tmp_path, f'http://127.0.0.1:{server.server_address[1]}'
    server.shutdown()
    server.server_close()
    thread.join()


def point_to(monkeypatch, url):
    cfg = timm.models.get_pretrained_cfg('pvt_tiny.retinanet_coco')
    cfg = timm.models.PretrainedCfg(**{**cfg.to_dict(), 'url': url})
    monkeypatch.setattr('pvt_timm.detection.get_pretrained_cfg', lambda name: cfg)


def test_urls_are_those_of_the_tags_and_carry_hashes():
    from torch.hub import HASH_REGEX
    for name in ('pvt_tiny', 'pvt_small', 'pvt_medium'):
        url = timm.models.get_pretrained_cfg(f'{name}.retinanet_coco').url
        assert url.startswith('https://download.openmmlab.com/mmdetection/v2.0/pvt/retinanet_pvt-')
        assert len(HASH_REGEX.search(url).group(1)) == 8


def test_pretrained_detector_by_url(detector, served, monkeypatch):
    folder, root = served
    file = folder / 'plain.pth'
    torch.save({'meta': {}, 'state_dict': as_mmdet(detector)}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    name = f'retinanet_pvt-t_fpn_1x_coco-{digest}.pth'
    cached = folder / 'cache' / 'hub' / 'checkpoints' / name

    def attempt(message):
        with pytest.raises(RuntimeError, match=message):
            retinanet_coco('pvt_tiny')
        assert not cached.exists()

    point_to(monkeypatch, f'{root}/{name}')
    attempt(r'Cannot load the weights of pvt_tiny\.retinanet_coco from http.*404')
    (folder / name).write_bytes(file.read_bytes()[:-1000])
    attempt(r'Cannot load the weights of pvt_tiny\.retinanet_coco .*hash')
    (folder / name).write_bytes(file.read_bytes())
    model = retinanet_coco('pvt_tiny', min_size=64, max_size=96)
    assert cached.exists()
    for k, v in detector.state_dict().items():
        assert torch.equal(model.state_dict()[k], v), k
    assert model.categories[15] == 'cat' and model.category_ids[15] == 17
    (folder / name).unlink()
    retinanet_coco('pvt_tiny')  # from the cache


def test_detector_without_weights_is_ready_for_coco():
    model = retinanet_coco('pvt_tiny', pretrained=False)
    assert sum(p.numel() for p in model.parameters()) == 22_964_212  # of mmdetection's model
    assert len(model.category_ids) == 80 and not model.training
