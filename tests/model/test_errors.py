""" What cannot work is refused, and the message says what is accepted. """
import pytest
import timm
import torch

from pvt_timm import PyramidVisionTransformer
from pvt_timm.pvt import Attention


def refused(error, call, *parts, **kwargs) -> str:
    with pytest.raises(error) as info:
        call(**kwargs)
    text = str(info.value)
    assert '\n' not in text
    for part in parts:
        assert part in text, text
    return text


def create(**kwargs):
    return timm.create_model('test_pvt', **kwargs)


@pytest.fixture(scope='module', params=['classifier', 'dense', 'features'])
def model(request):
    kwargs = dict(classifier={}, dense=dict(class_token=False), features=dict(features_only=True))[request.param]
    return create(**kwargs).eval()


@pytest.mark.parametrize('size', [(31, 32), (32, 31), (16, 64), (1, 1), (64, 4)])
def test_small_input(model, size):
    text = refused(ValueError, lambda: model(torch.zeros(1, 3, *size)), 'at least 32x32', f'{size[0]}x{size[1]}')
    assert 'Resize or pad' in text


@pytest.mark.parametrize('shape', [(1, 4, 64, 64), (1, 1, 64, 64), (3, 64, 64), (1, 3, 64), (1, 1, 3, 64, 64), ()])
def test_channels(model, shape):
    refused(ValueError, lambda: model(torch.zeros(shape)), '(batch, 3, height, width)', str(list(shape)), 'in_chans')


def test_channels_of_other_models():
    model = create(in_chans=1)
    refused(ValueError, lambda: model(torch.zeros(1, 3, 32, 32)), '(batch, 1, height, width)')
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)


def test_large_patches_have_a_larger_minimum():
    model = PyramidVisionTransformer(
        img_size=64, patch_size=8, embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    assert model.min_input_size == 64
    refused(ValueError, lambda: model(torch.zeros(1, 3, 63, 64)), 'at least 64x64')
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize('kwargs', [{}, dict(num_classes=0), dict(class_token=False)])
@pytest.mark.parametrize('pool', ['max', 'avgmax', 'map', 'fast', 1, True])
def test_global_pool(kwargs, pool):
    text = refused(ValueError, create, "'avg', ''", repr(pool), global_pool=pool, **kwargs)
    assert "('token', 'avg', '')" in text or kwargs == dict(class_token=False)
    model = create(**kwargs)
    before = model.global_pool, model.head
    refused(ValueError, lambda: model.reset_classifier(3, pool), "'avg', ''")
    assert (model.global_pool, model.head) == before


def test_token_pool_needs_the_token():
    kwargs = dict(class_token=False, global_pool='token')
    text = refused(ValueError, create, "('avg', '')", "'token' needs the class token", **kwargs)
    assert text.startswith('Expected global_pool in')


@pytest.mark.parametrize('indices', [(4,), (0, 4), (-5,), (1, 1), (0, -4), (), 0, 5, -1, ('a',), 1.5, 'all'])
def test_out_indices(indices):
    refused(ValueError, create, '1 to 4', '0 to 3', features_only=True, out_indices=indices)


@pytest.mark.parametrize('indices', [(4,), (-5,), (1, 1), [], 0, 5])
def test_indices_of_intermediates(indices):
    model = create()
    x = torch.zeros(1, 3, 32, 32)
    refused(ValueError, lambda: model.forward_intermediates(x, indices=indices), '1 to 4', '0 to 3')
    stages = len(model.stages)
    refused(ValueError, lambda: model.prune_intermediate_layers(indices), '1 to 4', '0 to 3')
    assert len(model.stages) == stages and model(x).shape == (1, 10)


@pytest.mark.parametrize('kwargs', [{}, dict(features_only=True)])
@pytest.mark.parametrize('stride', [8, 16, 4, 64, None, '32'])
def test_output_stride(kwargs, stride):
    if stride is None:  # timm drops arguments that are None
        create(output_stride=stride, **kwargs)
    else:
        refused(ValueError, create, 'output_stride 32', '4, 8, 16, 32', 'FPN', output_stride=stride, **kwargs)
    create(output_stride=32, **kwargs)


@pytest.mark.parametrize('kwargs', [dict(bogus=1), dict(drop=0.1), dict(embed_dim=64, foo=2), dict(window_size=7)])
@pytest.mark.parametrize('features', [{}, dict(features_only=True)])
def test_unknown_keywords(kwargs, features):
    text = refused(TypeError, create, *map(repr, kwargs), **kwargs, **features)
    for name in ('drop_path_rate', 'img_size', 'global_pool', 'sr_ratios', 'out_indices'):
        assert name in text
    with pytest.raises(TypeError):
        PyramidVisionTransformer(**kwargs)


@pytest.mark.parametrize('kwargs, parts', [
    (dict(features_only=True, feature_cls='tuple'), ("'list'", "'hook'", "'tuple'")),
    (dict(features_only=True, output_fmt='NLC'), ("'NCHW'", "'NLC'")),
    (dict(features_only=True, output_fmt='NHWC'), ("'NCHW'", "'NHWC'")),
    (dict(output_fmt='NHWC'), ("'NLC' or 'NCHW'", "'NHWC'")),
    (dict(img_size=31), ('32x32', '31x31')),
    (dict(img_size=(64, 16)), ('32x32', '64x16')),
    (dict(weight_init='xavier'), ("'' or 'skip'", "'xavier'")),
    (dict(embed_dims=(8, 16, 16)), ('4 embed_dims', 'got 3')),
    (dict(num_heads=(1, 2)), ('4 num_heads', 'got 2')),
    (dict(embed_dims=(16, 32, 40, 60)), ('divisible', '60', '8')),
    (dict(sr_ratios=(4, 2, 1, 2), img_size=64), ('sr_ratio 1', 'class token', 'got 2')),
])
def test_constructor_arguments(kwargs, parts):
    refused(ValueError, create, *parts, **kwargs)


def test_methods():
    model = create()
    x = torch.zeros(1, 3, 32, 32)
    refused(ValueError, lambda: model.forward_intermediates(x, output_fmt='NLC'), "'NCHW'", "'NLC'")
    refused(ValueError, lambda: model.init_weights('jax'), "''", "'jax'")
    refused(ValueError, lambda: model.set_input_size(16), '32x32', '16x16')
    refused(ValueError, lambda: model.set_input_size((64, 64), patch_size=8), 'patch_size 4', '8')
    assert model.stages[0].grid_size == (8, 8) and model(x).shape == (1, 10)
    with pytest.raises(ValueError, match='divisible by num_heads'):
        Attention(10, num_heads=3)


def test_unknown_tag_and_name():
    with pytest.raises(RuntimeError, match='pvt_giant'):
        timm.create_model('pvt_giant')
    with pytest.raises(RuntimeError, match='in22k'):
        timm.create_model('pvt_tiny.in22k')
