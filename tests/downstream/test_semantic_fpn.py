"""Semantic FPN: shapes, training, whole checkpoints, bad input. test_openmmlab.py compares it with mmsegmentation."""
import pytest
import torch

import pvt_timm  # noqa: F401
from pvt_timm.detection import describe_heads
from pvt_timm.segmentation import ade20k_classes, segmenter_to_mmseg, semantic_fpn, semantic_fpn_from_mmseg


def build(num_classes=5, **kwargs):
    torch.manual_seed(0)
    return semantic_fpn(
        'test_pvt', num_classes, out_channels=16, channels=24, model_args=dict(img_size=64), **kwargs).eval()


@pytest.mark.parametrize('size', [(32, 32), (64, 96), (70, 133)])
def test_logits_have_the_size_of_the_image(size):
    with torch.no_grad():
        assert build()(torch.rand(2, 3, *size)).shape == (2, 5, *size)


@pytest.mark.parametrize('size, resized', [((1, 1), (64, 64)), ((40, 90), (64, 128)), ((3, 700), (32, 128))])
def test_segment_takes_any_image(size, resized):
    """`segment` takes images of any size. Images of ones show what the backbone gets."""
    model = build(min_size=64, max_size=128)
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    labels = model.segment(torch.ones(3, *size))
    assert labels.shape == size and labels.dtype == torch.int64
    ones = (1 - torch.tensor([.485, .456, .406])) / torch.tensor([.229, .224, .225])
    torch.testing.assert_close(seen, [ones[None, :, None, None].expand(1, 3, *resized)])


def resized_once_and_twice(image, shorter, longest):
    """Resize an image (1, 3, H, W) to a shorter side, then up to multiples of 32, and return it."""
    h, w = image.shape[2:]
    scale = min(shorter / min(h, w), longest / max(h, w))
    once = [int(n * scale + 0.5) for n in (h, w)]
    twice = [-(-n // 32) * 32 for n in once]
    for size in (once, twice):
        image = torch.nn.functional.interpolate(image, size=size, mode='bilinear')
    return image


@pytest.mark.parametrize('size', [(90, 131), (131, 90), (64, 64), (200, 33)])
def test_segment_resizes_twice_as_published(size):
    model = build(min_size=70, max_size=256)
    model.mean, model.std = (0., 0., 0.), (1., 1., 1.)
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    model.segment(image)
    torch.testing.assert_close(seen[0], resized_once_and_twice(image[None], 70, 256), rtol=0, atol=1e-6)


def test_segment_leaves_the_model_as_it_was():
    """`segment` changes no mode and no weights, even in training mode and with frozen parts.

    In training mode, BatchNorm would add the image to its statistics.
    """
    model = build(min_size=64, frozen_stages=1)
    image = torch.rand(3, 50, 70)
    expected = model.segment(image)
    model.train()
    model.head.branches[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.equal(model.segment(image), expected)
    assert {name: module.training for name, module in model.named_modules()} == modes and len(set(modes.values())) == 2
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('size', [(64, 96), (50, 133)])
def test_segment_takes_several_images_at_once(size):
    """Images that go through the model together get the classes that each of them gets alone."""
    model = build(min_size=64).double()
    images = torch.rand(3, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batches = []
    model.backbone.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    together = model.segment(images)
    assert together.shape == (3, *size) and len(together.unique()) > 1
    assert torch.equal(together, torch.stack([model.segment(image) for image in images]))
    assert batches == [3, 1, 1, 1]


@pytest.mark.parametrize('in_chans, mean', [(1, (.449,)), (3, (.485, .456, .406)), (5, (.449,) * 5)])
def test_images_of_other_channels(in_chans, mean):
    model = semantic_fpn('test_pvt', 4, channels=24, model_args=dict(in_chans=in_chans))
    assert model.mean == mean and len(model.std) == in_chans
    assert model.segment(torch.rand(in_chans, 40, 50)).shape == (40, 50)
    again = semantic_fpn_from_mmseg(segmenter_to_mmseg(model))
    assert again.in_chans == in_chans and again.mean == mean


@pytest.mark.parametrize('image, message', [
    (torch.rand(3, 40, 50) * 255, r'values from 0 to 1, got values up to 25\d'),
    (torch.zeros(3, 40, 50, dtype=torch.uint8), 'floats from 0 to 1, got torch.uint8'),
    (torch.rand(1, 40, 50), r'shape \(3, height, width\), got \(1, 40, 50\)'),
    (torch.rand(40, 50), r'shape \(3, height, width\), got \(40, 50\)'),
    (torch.rand(2, 1, 40, 50), r'shape \(3, height, width\), got \(1, 40, 50\)'),
    (torch.rand(0, 3, 40, 50), 'one image or more, got an empty batch'),
])
def test_wrong_images_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        build().segment(image)


def test_fine_tuning_of_a_checkpoint_with_other_classes(caplog):
    model = build(150)
    again = semantic_fpn_from_mmseg(
        segmenter_to_mmseg(model), num_classes=4, frozen_stages=2, model_args=dict(drop_path_rate=0.2))
    assert 'all but head.classifier, which are new for 4 classes' in caplog.text
    assert (again.num_classes, again.categories, again.palette) == (4, [], [])
    assert again.backbone.frozen_stages == 2
    for k, v in again.state_dict().items():
        assert k.startswith('head.classifier.') or torch.equal(v, model.state_dict()[k]), k
    assert semantic_fpn_from_mmseg(segmenter_to_mmseg(build(4)), num_classes=150).categories == []


def test_training_lowers_the_loss():
    model = build(drop_rate=0.).train()
    images = torch.zeros(2, 3, 64, 64)
    images[:, :, 16:48, 16:40] = 1
    labels = (images[:, 0] * 3).long()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('fmt, eps', [('mmdet', {1e-6}), ('original', {1e-5, 1e-6})])
def test_checkpoint_lands(fmt, eps, tmp_path):
    model = build(150)
    state_dict = segmenter_to_mmseg(model, fmt)
    assert describe_heads(state_dict) == ('Semantic FPN', 150)
    assert 'decode_head.scale_heads.3.4.bn.running_var' in state_dict
    torch.save({'state_dict': state_dict, 'meta': {'CLASSES': ('a', 'b')}}, tmp_path / 'x.pth')
    again = semantic_fpn_from_mmseg(tmp_path / 'x.pth')
    assert not again.training
    for k, v in model.state_dict().items():
        assert torch.equal(again.state_dict()[k], v), k
    assert {m.eps for m in again.backbone.body.modules() if isinstance(m, torch.nn.LayerNorm)} == eps
    assert again.categories[:2] == ['wall', 'building'] and again.palette[1] == (180, 120, 120)  # two names do not fit


def test_names_and_colours_of_ade20k():
    names, colors = ade20k_classes()
    assert len(names) == len(set(names)) == len(colors) == 150
    assert all(len(c) == 3 and 0 <= min(c) <= max(c) <= 255 for c in colors)


@pytest.mark.parametrize('color', ['red', (0, 0), ('0', '0', '0'), 7])
def test_colours_that_are_none(color):
    with pytest.raises(ValueError, match='as palette in the checkpoint'):
        semantic_fpn_from_mmseg({'state_dict': segmenter_to_mmseg(build()), 'meta': {'PALETTE': [color] * 5}})


@pytest.mark.parametrize('change, message', [
    (lambda d: d.pop('decode_head.scale_heads.3.2.bn.running_mean'), 'Missing .*scale_heads.3.2.bn.running_mean'),
    (lambda d: d.update({'other_head.conv.weight': torch.ones(1)}), 'Not part of the model.*other_head'),
    (lambda d: d.pop('decode_head.conv_seg.weight'),
     r'\(decode_head.conv_seg\), got a model with decode_head \(conv_seg, scale_heads\), neck \('),
])
def test_errors_name_what_is_wrong(change, message):
    state_dict = segmenter_to_mmseg(build())
    change(state_dict)
    with pytest.raises(ValueError, match=message):
        semantic_fpn_from_mmseg(state_dict)


def test_colours_are_bytes():
    for color, fits in (((1, 2, 255), True), ((1, 2, 256), False), ((-1, 2, 3), False)):
        checkpoint = {'state_dict': segmenter_to_mmseg(build()), 'meta': {'PALETTE': [color] * 5}}
        if fits:
            assert semantic_fpn_from_mmseg(checkpoint).palette == [color] * 5
        else:
            with pytest.raises(ValueError, match='0 to 255'):
                semantic_fpn_from_mmseg(checkpoint)


def test_one_class_and_a_threshold_are_refused():
    """A model with one class and a threshold is refused, as every pixel would get this class."""
    binary = semantic_fpn('test_pvt', 1, out_channels=16, channels=8, model_args=dict(img_size=64))
    for weights in (segmenter_to_mmseg(binary), binary.state_dict()):
        with pytest.raises(ValueError, match='binary'):
            semantic_fpn_from_mmseg({'state_dict': weights})
