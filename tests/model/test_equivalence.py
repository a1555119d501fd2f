""" The outputs equal those of transformers, of a plain reference, and of the original code. """
import copy

import pytest
import timm
import torch

from pvt_timm import checkpoint_filter_fn
from pvt_timm.formats.mapping import from_timm
from pvt_timm.pvt import Attention
from tests.support.reference import features, images, load_original, logits, max_diff, randomize, tokens

PUBLISHED = ('pvt_tiny', 'pvt_small', 'pvt_medium', 'pvt_large')
SLOW_LARGER = ['pvt_tiny', *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED[1:])]


def dense_of(name, state_dict, **kwargs):
    return timm.create_model(
        name, features_only=True, pretrained=True, dtype=torch.float64,
        pretrained_cfg_overlay=dict(state_dict=state_dict), **kwargs).eval()


@pytest.fixture(scope='module')
def models():
    """Return a function that creates a classifier with random float64 weights, and a dense backbone with the same."""
    made = {}

    def get(name):
        if name not in made:
            # the widths of huge_v2 with few blocks: its 306 million parameters in float64 are too many for a quick test
            kwargs = dict(depths=(1, 2, 1, 1)) if name == 'pvt_huge_v2' else {}
            model = randomize(timm.create_model(name, dtype=torch.float64, **kwargs)).eval()
            made[name] = model, dense_of(name, model.state_dict(), **kwargs)
        return made[name]

    return get


def original_state(model):
    return from_timm(model.state_dict(), 'original')[0]


def assert_equal(got, want, tolerance=1e-10):
    for a, b in zip(got, want, strict=True):
        assert max_diff(a, b) <= tolerance


# transformers

def transformers_model(model):
    """Return transformers' PVT with the weights of `model` and the eps of the original code."""
    transformers = pytest.importorskip('transformers')

    config = transformers.PvtConfig(depths=list(model.depths), num_labels=model.num_classes)
    hf = transformers.PvtForImageClassification(config)
    hf = hf.to(next(model.parameters()).dtype).eval()
    hf.load_state_dict(from_timm(model.state_dict(), 'transformers')[0])
    norms = [m for name, m in hf.named_modules() if isinstance(m, torch.nn.LayerNorm) and (
        'patch_embeddings' in name or name.endswith('self.layer_norm'))]
    assert len(norms) == 4 + sum(model.depths[:3])
    for norm in norms:
        norm.eps = 1e-5
    return hf


def logits_and_tokens(hf, x):
    return hf(x).logits, hf.pvt(x).last_hidden_state


@torch.no_grad()
@pytest.mark.parametrize('name', SLOW_LARGER)
def test_transformers(models, name):
    model, _ = models(name)
    hf = transformers_model(model)
    x = images(1, 3, 224, 224)
    want = logits_and_tokens(hf, x)
    assert want[1].shape == (1, 50, 512) and want[0].abs().mean() > 0.1  # not the equality of two zeros
    assert_equal((model(x), model.forward_features(x)), want)
    if name == 'pvt_tiny':
        for norm in (m for m in hf.modules() if isinstance(m, torch.nn.LayerNorm)):
            norm.eps = 1e-6  # as transformers ships it: the test sees this difference
        assert max_diff(model(x), hf(x).logits) > 1e-10


@torch.no_grad()
@pytest.mark.parametrize('name', SLOW_LARGER)
def test_transformers_float32(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()  # weights of the scale that the original starts with
    x = images(1, 3, 224, 224, dtype=torch.float32)
    assert_equal((model(x), model.forward_features(x)), logits_and_tokens(transformers_model(model), x), 1e-5)


# A plain reference

@torch.no_grad()
@pytest.mark.parametrize('name, size', [
    *(('pvt_tiny', size) for size in ((32, 32), (224, 224), (230, 230), (112, 448), (256, 320))),
    pytest.param('pvt_tiny', (448, 448), marks=pytest.mark.slow),
    *(('test_pvt', size) for size in ((32, 32), (33, 47), (96, 40), (224, 160))),
    pytest.param('pvt_tiny', (800, 1344), marks=pytest.mark.slow),
    *(pytest.param(name, (70, 45), marks=[pytest.mark.slow] * (name in ('pvt_medium', 'pvt_large')))
      for name in (*PUBLISHED, 'pvt_huge_v2')),
], ids=str)
def test_reference(models, name, size):
    model, dense = models(name)
    sd = original_state(model)
    kwargs = dict(img_size=(32, 32)) if name == 'test_pvt' else {}
    kwargs.update(dict(heads=(2, 4, 8, 12)) if name == 'pvt_huge_v2' else {})
    x = images(1, 3, *size)
    assert_equal([model.forward_features(x), model(x)], [tokens(sd, x, **kwargs), logits(sd, x, **kwargs)])
    got = dense(x)
    assert [tuple(f.shape) for f in got] == [
        (1, c, size[0] // r, size[1] // r) for c, r in zip(model.embed_dims, (4, 8, 16, 32))]
    assert_equal(got, features(sd, x, **kwargs))


@torch.no_grad()
@pytest.mark.parametrize('size', [(224, 224), (160, 96)], ids=str)
def test_float32_and_unfused(models, size):
    model, _ = models('pvt_tiny')
    x = images(1, 3, *size)
    want = logits(original_state(model), x)
    unfused = copy.deepcopy(model)
    for attention in (m for m in unfused.modules() if isinstance(m, Attention)):
        attention.fused_attn = False
    assert max_diff(unfused(x), want) <= 1e-10
    single = copy.deepcopy(model).float()
    assert (single(x.float()).double() - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize('name, count', zip(
    (*PUBLISHED, 'pvt_huge_v2'), (13_229_288, 24_485_864, 44_208_104, 61_369_320, 304_945_512)))
def test_parameter_counts(name, count):
    assert sum(p.numel() for p in timm.create_model(name, device='meta').parameters()) == count


@torch.no_grad()
def test_dense_mode_is_the_default_of_features_only(models):
    model, _ = models('test_pvt')
    plain = timm.create_model('test_pvt', class_token=False, dtype=torch.float64).eval()
    assert isinstance(plain.norm, torch.nn.Identity) and plain.stages[-1].cls_token is None
    plain.load_state_dict(checkpoint_filter_fn(model.state_dict(), plain))
    x = images(2, 3, 64, 64)
    want = features(original_state(model), x, img_size=(32, 32))[-1]
    assert_equal((plain.forward_features(x), plain(x)), (want, plain.head(want.mean((2, 3)))))


@torch.no_grad()
def test_class_token_in_features_only(models):
    model, dense = models('test_pvt')
    x = images(2, 3, 64, 96)
    got = dense_of('test_pvt', model.state_dict(), class_token=True)(x)
    assert_equal(got, model.forward_intermediates(x, intermediates_only=True), 1e-12)
    without = dense(x)
    assert max_diff(got[2], without[2]) <= 1e-10 < max_diff(got[3], without[3])  # the token takes part in stage 4


# The original code, where there is a checkout of it

def original_model(task, name, model):
    kwargs = dict(pretrained=None) if task == 'detection' else {}
    original = getattr(load_original(task), name)(**kwargs).double().eval()
    missing, unexpected = original.load_state_dict(original_state(model), strict=False)
    left = set() if task == 'classification' else {'cls_token', 'norm', 'head'}
    assert not missing and {k.split('.')[0] for k in unexpected} == left
    return original


@torch.no_grad()
@pytest.mark.parametrize('task, name, size', [
    # the original's position embedding logic holds at these (no stage but the first has 3136 tokens, nor it by chance)
    *((task, 'pvt_tiny', size) for task in ('classification', 'detection', 'segmentation')
      for size in ((224, 224), (230, 230), (256, 320), (96, 64))),
    ('classification', 'pvt_small', (224, 224)),
    pytest.param('classification', 'pvt_medium', (224, 224), marks=pytest.mark.slow),
    pytest.param('classification', 'pvt_large', (224, 224), marks=pytest.mark.slow),
    pytest.param('detection', 'pvt_tiny', (800, 1344), marks=pytest.mark.slow)], ids=str)
def test_original(models, task, name, size):
    model, dense = models(name)
    x = images(1 if task == 'detection' else 2, 3, *size)
    want = original_model(task, name, model)(x)
    if task == 'classification':  # the reference of the other tests is right too
        assert_equal((model(x), logits(original_state(model), x)), (want, want))
    else:
        assert_equal(dense(x), want)


@torch.no_grad()
def test_original_fails_where_documented(models):
    model, _ = models('pvt_tiny')
    original = original_model('classification', 'pvt_tiny', model)
    with pytest.raises(RuntimeError):
        original(images(1, 3, 448, 448))
    x = images(1, 3, 112, 448)
    assert max_diff(model(x), original(x)) > 1e-3  # a square layout laid over another one
