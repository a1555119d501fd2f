""" What a checkpoint says about its model: written, read, and refused where it is not what it should be. """
import pytest
import torch

from pvt_timm.detection import pvt_faster_rcnn, pvt_mask_rcnn, pvt_retinanet
from pvt_timm.segmentation import semantic_fpn
from pvt_timm.training import load_trained
from pvt_timm.training.checkpoints import KEY, copy_weights, describe_model, is_own

SMALL = dict(out_channels=16, model_args=dict(img_size=64))
MODELS = {
    'retinanet': lambda **kw: pvt_retinanet('test_pvt', 3, **SMALL, **kw),
    'faster_rcnn': lambda **kw: pvt_faster_rcnn('test_pvt', 3, box_channels=24, **SMALL, **kw),
    'mask_rcnn': lambda **kw: pvt_mask_rcnn('test_pvt', 3, box_channels=24, mask_channels=12, **SMALL, **kw),
    'semantic_fpn': lambda **kw: semantic_fpn('test_pvt', 3, channels=20, **SMALL, **kw),
}


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize('kind', MODELS)
def test_a_model_comes_back_from_its_checkpoint_and_from_its_weights(tmp_path, kind):
    torch.manual_seed(0)
    sizes = dict(min_size=96, max_size=160)
    model = MODELS[kind](**sizes)
    model.categories = ['ant', 'bee', 'cat']
    where = model if kind == 'semantic_fpn' else model.transform
    if kind == 'semantic_fpn':
        model.palette, where.mean = [(1, 2, 3), (4, 5, 6), (7, 8, 9)], (0.1, 0.2, 0.3)
    else:
        where.image_mean = [0.1, 0.2, 0.3]
    for module in model.backbone.body.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    head_args = {} if kind == 'semantic_fpn' else (
        dict(score_thresh=0.3) if kind == 'retinanet' else dict(box_score_thresh=0.3))
    file = tmp_path / 'model.pth'
    torch.save({KEY: describe_model(model, {}, head_args), 'state_dict': model.state_dict()}, file)
    torch.load(file, weights_only=True)
    again = load_trained(file)
    assert equal(again, model) and type(again) is type(model) and not again.training
    assert again.categories == ['ant', 'bee', 'cat'] and again.num_classes == 3
    there = again if kind == 'semantic_fpn' else again.transform
    assert (there.min_size, there.max_size) == (where.min_size, 160)
    if kind == 'semantic_fpn':
        assert again.palette == model.palette and tuple(there.mean) == (0.1, 0.2, 0.3)
    else:
        assert list(there.image_mean) == [0.1, 0.2, 0.3]
        assert (again.score_thresh if kind == 'retinanet' else again.roi_heads.score_thresh) == 0.3
    assert {m.eps for m in again.backbone.body.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}

    for weights in (model.state_dict(), {'state_dict': {f'net.{k}': v for k, v in model.state_dict().items()}}):
        torch.save(weights, file)
        assert is_own(weights)
        bare = load_trained(file, min_size=70)
        assert equal(bare, model) and type(bare) is type(model) and bare.categories == []


def test_stochastic_depth_is_for_training_only():
    model = MODELS['retinanet']()
    said = describe_model(model, dict(img_size=64, drop_path_rate=0.5, pretrained_cfg_overlay={}))
    assert said['model_args'] == dict(img_size=[64, 64], in_chans=3, embed_norm_eps=1e-5)


def damaged(**values):
    return lambda said, weights: said.update(values)


@pytest.mark.parametrize('damage, message', [
    (damaged(kind='yolo'), "a known kind and model under 'pvt_timm'"),
    (damaged(model='hf-hub:somebody/else'), "a known kind and model under 'pvt_timm'"),
    (damaged(model_args=dict(pretrained_cfg=dict(file='/etc/passwd'))), 'arguments of a PVT .* got pretrained_cfg'),
    (damaged(num_classes=4), 'cls_logits'),
    (damaged(num_classes=10 ** 9), 'cls_logits'),
    (damaged(num_classes='x'), 'cls_logits'),
    (damaged(kind=[1]), "a known kind and model under 'pvt_timm'"),
    (damaged(model_args=5), 'a dict for model_args'),
    (damaged(head_args=dict(zzz=1)), 'zzz'),
    (damaged(head_args=dict(out_channels=10 ** 9)), 'out_channels'),
    (damaged(categories=5), '3 names of classes or none, got int'),
    (damaged(palette=5), '3 colours'),
    (damaged(palette=[[1, 2, 999]] * 3), '3 colours'),
    (damaged(categories=['a']), '3 names of classes or none, got 1'),
    (lambda said, weights: weights.popitem(), 'bbox_reg'),
    (lambda said, weights: weights.update(more=torch.ones(1)), 'more'),
    (lambda said, weights: next(iter(weights.values())).fill_(float('nan')), 'finite numbers .* pos_embed|pos_embed'),
    (lambda said, weights: weights.clear(), "keys 'backbone.body"),
])
def test_what_is_wrong_is_said(damage, message):
    model = MODELS['retinanet']()
    model.categories = ['a', 'b', 'c']
    said = describe_model(model)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    damage(said, weights)
    with pytest.raises(ValueError, match=message):
        load_trained({KEY: said, 'state_dict': weights})


def test_weights_of_something_else():
    model = MODELS['retinanet']()
    weights = {k: v for k, v in model.state_dict().items() if 'cls_logits' not in k}
    with pytest.raises(ValueError, match='its head is none of these'):
        load_trained(weights)
    with pytest.raises(ValueError, match='got keys layer.weight'):
        load_trained({'layer.weight': torch.ones(1)})


@pytest.mark.parametrize('kind', MODELS)
def test_only_layers_of_classes_are_new(kind):
    torch.manual_seed(0)
    source, model = MODELS[kind](), MODELS[kind]()
    assert copy_weights(model, source) == [] and equal(model, source)
    source.categories, model.categories = ['a', 'b', 'c'], ['a', 'b', 'd']
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    new = copy_weights(model, source)
    assert new and all(('cls' in n and 'rpn' not in n) or 'box_predictor' in n or 'mask_fcn_logits' in n
                       or n.startswith('head.classifier.') for n in new)
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]) != (name in new), name
