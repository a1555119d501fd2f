""" The description of a model in its checkpoint is written and read, and refused if it is wrong. """
import pytest
import torch

from pvt_timm.detection import (
    PvtRetinaNet, detector_from_mmdet, faster_rcnn_from_mmdet, mask_rcnn_from_mmdet, pvt_faster_rcnn, pvt_mask_rcnn,
    pvt_retinanet, retinanet_from_mmdet)
from pvt_timm.detection.trained import KEY, describe_model, is_own, kind_of
from pvt_timm.segmentation import semantic_fpn, semantic_fpn_from_mmseg
from pvt_timm.training import load_trained
from pvt_timm.training.checkpoints import copy_weights, load_any

SMALL = dict(out_channels=16, model_args=dict(img_size=64))
MODELS = {
    'retinanet': lambda **kw: pvt_retinanet('test_pvt', 3, **SMALL, **kw),
    'faster_rcnn': lambda **kw: pvt_faster_rcnn('test_pvt', 3, box_channels=24, **SMALL, **kw),
    'mask_rcnn': lambda **kw: pvt_mask_rcnn('test_pvt', 3, box_channels=24, mask_channels=12, **SMALL, **kw),
    'semantic_fpn': lambda **kw: semantic_fpn('test_pvt', 3, channels=20, **SMALL, **kw),
}

# What reads weights of each kind. The first also reads those of OpenMMLab and of the original code
LOADERS = {
    'retinanet': (retinanet_from_mmdet, detector_from_mmdet, load_trained),
    'faster_rcnn': (faster_rcnn_from_mmdet, detector_from_mmdet, load_trained),
    'mask_rcnn': (mask_rcnn_from_mmdet, detector_from_mmdet, load_trained),
    'semantic_fpn': (semantic_fpn_from_mmseg, load_trained),
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
    torch.save({KEY: describe_model(model, head_args), 'state_dict': model.state_dict()}, file)
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


def checkpoint_of(model, start='model.', **more):
    """Return a checkpoint as `fit` writes it."""
    weights = {f'{start}{name}': value for name, value in model.state_dict().items()}
    return {KEY: describe_model(model), 'state_dict': weights, 'optimizer_states': [], **more}


def sizes_of(model):
    return getattr(model, 'transform', model)


@pytest.mark.parametrize('kind', MODELS)
def test_one_checkpoint_for_every_loader(tmp_path, kind):
    """Classes, image sizes and normalisation are those of the file, unless arguments replace them."""
    torch.manual_seed(0)
    model = MODELS[kind](min_size=96, max_size=160)
    model.categories = ['ant', 'bee', 'cat']
    mean, std = ('mean', 'std') if kind == 'semantic_fpn' else ('image_mean', 'image_std')
    setattr(sizes_of(model), mean, (0.1, 0.2, 0.3))
    setattr(sizes_of(model), std, (0.4, 0.5, 0.6))
    file = tmp_path / 'last.ckpt'
    torch.save(checkpoint_of(model), file)
    for load in LOADERS[kind]:
        for source in (file, str(file), torch.load(file, weights_only=True)):
            again = load(source)
            assert type(again) is type(model) and equal(again, model) and not again.training
            assert again.categories == ['ant', 'bee', 'cat']
            sizes = sizes_of(again)
            assert (sizes.min_size, sizes.max_size) == (sizes_of(model).min_size, 160)
            assert (*getattr(sizes, mean), *getattr(sizes, std)) == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
        assert sizes_of(load(file, min_size=70)).min_size in (70, (70,))
        frozen = load(file, frozen_stages=1, model_args=dict(drop_path_rate=0.5))
        assert not any(p.requires_grad for p in frozen.backbone.body.stages_0.parameters()) and equal(frozen, model)
        assert any(getattr(m, 'drop_prob', 0) > 0.3 for m in frozen.modules())
        with pytest.raises(TypeError, match='colour'):
            load(file, colour=1)
        bare = load(model.state_dict())
        assert type(bare) is type(model) and equal(bare, model) and bare.categories == []
        for key in ('model', 'state_dict_ema'):  # as others wrap them
            assert equal(load({key: model.state_dict(), 'epoch': 3}), model)
    other = [name for name in MODELS if name != kind]
    for name in other:
        with pytest.raises(ValueError, match='^Expected a .*, got a (RetinaNet|Faster R-CNN|Mask R-CNN|Semantic FPN)'):
            LOADERS[name][0](file)


def test_normalisation_that_is_asked_for_replaces_that_of_the_file():
    checkpoint = checkpoint_of(MODELS['retinanet']())
    assert load_trained(checkpoint, image_mean=[0.5, 0.6, 0.7]).transform.image_mean == [0.5, 0.6, 0.7]
    assert retinanet_from_mmdet(checkpoint, image_std=[0.5, 0.6, 0.7]).transform.image_std == [0.5, 0.6, 0.7]


@pytest.mark.parametrize('kind', MODELS)
def test_other_classes_are_new_ones(kind, caplog):
    torch.manual_seed(0)
    model = MODELS[kind]()
    model.categories = ['ant', 'bee', 'cat']
    for load in LOADERS[kind]:
        caplog.clear()
        new = load(checkpoint_of(model), num_classes=5)
        assert new.num_classes == 5 and new.categories == [] and 'new for 5 classes' in caplog.text
        own = model.state_dict()
        shapes = {name: value.shape for name, value in new.state_dict().items()}
        same = [name for name, value in own.items() if value.shape == shapes[name]]
        assert len(own) - len(same) in (2, 4, 6)  # weights and biases of the layers of classes
        assert all(torch.equal(own[name], new.state_dict()[name]) for name in same)
        assert load(checkpoint_of(model), num_classes=3).categories == ['ant', 'bee', 'cat']


@pytest.mark.parametrize('kind', MODELS)
def test_two_models_in_a_file_need_a_prefix(kind):
    """A file with two models, such as weights and their averages, is refused without a prefix."""
    torch.manual_seed(0)
    one, two = MODELS[kind](), MODELS[kind]()
    both = checkpoint_of(one, 'model.')
    both['state_dict'].update(checkpoint_of(two, 'teacher.net.')['state_dict'])
    for load in LOADERS[kind]:
        with pytest.raises(ValueError, match=r"Expected one model, got those under \['model.', 'teacher.net.'\]"):
            load(both)
        for prefix in ('teacher.net', 'teacher.net.', 'teacher.net.backbone', 'teacher.net.backbone.body.'):
            assert equal(load(both, prefix=prefix), two)
        assert equal(load(both, prefix='model'), one)
        with pytest.raises(ValueError, match="Expected a prefix of .*, got 'net'"):
            load(both, prefix='net')
        assert equal(load(one.state_dict(), prefix='backbone'), one)
    task = 'segmenter' if kind == 'semantic_fpn' else 'detector'
    assert equal(load_any(both, task, 'model.'), one)


def test_a_subclass_is_of_its_kind():
    class Mine(PvtRetinaNet):
        pass

    model = Mine.on_pvt('test_pvt', 3, **SMALL)
    assert describe_model(model)['kind'] == 'retinanet'
    assert type(load_trained(checkpoint_of(model))) is PvtRetinaNet
    with pytest.raises(ValueError, match='Expected a detector or segmenter of this package, got Linear'):
        kind_of(torch.nn.Linear(1, 1))


def test_arguments_that_no_weights_tell_are_kept():
    """All arguments that change what a PVT computes are saved.

    Default values and arguments that only training uses are not saved.
    """
    torch.manual_seed(0)
    args = dict(img_size=64, drop_path_rate=0.5, proj_drop_rate=0.1, pretrained_cfg_overlay={}, qkv_bias=True)
    model = pvt_retinanet('test_pvt', 3, out_channels=16, model_args=args)
    assert describe_model(model)['model_args'] == dict(img_size=[64, 64], in_chans=3, embed_norm_eps=1e-5)

    args = dict(img_size=64, num_heads=(4, 4, 4, 4), act_layer='relu', norm_eps=1e-4)
    model = pvt_retinanet('test_pvt', 3, out_channels=16, model_args=args).eval()
    said = describe_model(model)['model_args']
    assert said == dict(img_size=[64, 64], in_chans=3, embed_norm_eps=1e-5, num_heads=[4] * 4, act_layer='relu',
                        norm_eps=1e-4)
    again = retinanet_from_mmdet(checkpoint_of(model))
    assert describe_model(again)['model_args'] == said  # also from there on
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model.backbone(x).values(), again.backbone(x).values()))

    model = pvt_retinanet('test_pvt', 3, out_channels=16, model_args=dict(act_layer=torch.nn.ReLU))
    with pytest.raises(ValueError, match='a plain value for act_layer in model_args, .* got <class'):
        describe_model(model)


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
