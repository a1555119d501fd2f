""" The numbers are the original's: against transformers, a plain reference, and the original code. """
import pytest
import timm
import torch

import pvt_timm  # noqa: F401
from pvt_timm import checkpoint_filter_fn
from pvt_timm.checkpoints import from_timm
from pvt_timm.pvt import find_variant
from reference import features, images, load_original, logits, max_diff, randomize, tokens

PUBLISHED = ('pvt_tiny', 'pvt_small', 'pvt_medium', 'pvt_large')
SLOW_LARGER = [
    'pvt_tiny', 'pvt_small', *(pytest.param(name, marks=pytest.mark.slow) for name in ('pvt_medium', 'pvt_large'))]
# the original's position embedding logic holds at these (no stage but the first has 3136 tokens, nor it by chance)
ORIGINAL_SIZES = [(224, 224), (230, 230), (256, 320), (96, 64)]
SIZES = [(32, 32), (224, 224), (230, 230), (448, 448), (112, 448), (256, 320)]


@pytest.fixture(scope='module')
def models():
    """Classifiers with random float64 weights, made on demand."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = randomize(timm.create_model(name, dtype=torch.float64)).eval()
        return made[name]

    return get


@pytest.fixture(scope='module')
def dense_models(models):
    """Features-only models with the weights of the classifiers."""
    made = {}

    def get(name, state_dict):
        if name not in made:
            made[name] = timm.create_model(
                name, features_only=True, pretrained=True, dtype=torch.float64,
                pretrained_cfg_overlay=dict(state_dict=state_dict)).eval()
        return made[name]

    return get


def original_state(model):
    return from_timm(model.state_dict(), 'original')[0]


def transformers_model(model):
    """transformers' PVT with the weights of `model` and the original's eps."""
    transformers = pytest.importorskip('transformers')

    config = transformers.PvtConfig(depths=list(model.depths), num_labels=model.num_classes)
    hf = transformers.PvtForImageClassification(config)
    hf = hf.to(next(model.parameters()).dtype).eval()
    hf.load_state_dict(from_timm(model.state_dict(), 'transformers')[0])
    changed = 0
    for name, m in hf.named_modules():
        if isinstance(m, torch.nn.LayerNorm) and ('patch_embeddings' in name or name.endswith('self.layer_norm')):
            m.eps = 1e-5
            changed += 1
    assert changed == 4 + sum(model.depths[:3])
    return hf


def logits_and_tokens(hf, x):
    kept = []
    with hf.pvt.register_forward_hook(lambda module, args, output: kept.append(output.last_hidden_state)):
        return hf(x).logits, kept[0]


@torch.no_grad()
@pytest.mark.parametrize('name', SLOW_LARGER)
def test_transformers(models, name):
    model = models(name)
    hf = transformers_model(model)
    x = images(1, 3, 224, 224)
    want, want_tokens = logits_and_tokens(hf, x)
    got_tokens = model.forward_features(x)
    got = model.forward_head(got_tokens)
    assert got_tokens.shape == (1, 50, 512)
    assert want.abs().mean() > 0.1  # not the equality of two zeros
    assert max_diff(got_tokens, want_tokens) <= 1e-10
    assert max_diff(got, want) <= 1e-10
    if name == 'pvt_tiny':
        for norm in (m for m in hf.modules() if isinstance(m, torch.nn.LayerNorm)):
            norm.eps = 1e-6  # as transformers ships it: the test sees this difference
        assert max_diff(got, hf(x).logits) > 1e-10


@torch.no_grad()
@pytest.mark.parametrize('name', SLOW_LARGER)
def test_transformers_float32(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()  # weights of the scale that the original starts with
    hf = transformers_model(model)
    x = images(1, 3, 224, 224, dtype=torch.float32)
    want, want_tokens = logits_and_tokens(hf, x)
    got_tokens = model.forward_features(x)
    assert max_diff(model.forward_head(got_tokens), want) <= 1e-5
    assert max_diff(got_tokens, want_tokens) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_classifier_reference(models, size):
    model = models('pvt_tiny')
    sd = original_state(model)
    x = images(1, 3, *size)
    assert max_diff(model.forward_features(x), tokens(sd, x)) <= 1e-10
    assert max_diff(model(x), logits(sd, x)) <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_dense_reference(models, dense_models, size):
    sd = original_state(models('pvt_tiny'))
    x = images(1, 3, *size)
    want = features(sd, x)
    got = dense_models('pvt_tiny', models('pvt_tiny').state_dict())(x)
    assert [tuple(f.shape) for f in got] == [
        (1, c, size[0] // r, size[1] // r) for c, r in zip((64, 128, 320, 512), (4, 8, 16, 32))]
    for a, b in zip(got, want, strict=True):
        assert max_diff(a, b) <= 1e-10


@torch.no_grad()
@pytest.mark.slow
def test_dense_reference_detection_size(models, dense_models):
    sd = original_state(models('pvt_tiny'))
    x = images(1, 3, 800, 1344)
    for a, b in zip(dense_models('pvt_tiny', models('pvt_tiny').state_dict())(x), features(sd, x), strict=True):
        assert max_diff(a, b) <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize('name', [*PUBLISHED, 'pvt_huge_v2'])
def test_all_variants_reference(models, dense_models, name):
    # the widths of huge_v2 with few blocks: its 306 million parameters in float64 are too many for a quick test
    kwargs = dict(depths=(1, 2, 1, 1)) if name == 'pvt_huge_v2' else {}
    heads = (2, 4, 8, 12) if name == 'pvt_huge_v2' else (1, 2, 5, 8)
    if kwargs:
        model = randomize(timm.create_model(name, dtype=torch.float64, **kwargs)).eval()
        dense = timm.create_model(
            name, features_only=True, pretrained=True, dtype=torch.float64,
            pretrained_cfg_overlay=dict(state_dict=model.state_dict()), **kwargs).eval()
    else:
        model = models(name)
        dense = dense_models(name, model.state_dict())
    sd = original_state(model)
    x = images(2, 3, 70, 45)
    assert max_diff(model(x), logits(sd, x, heads)) <= 1e-10
    for a, b in zip(dense(x), features(sd, x, heads), strict=True):
        assert max_diff(a, b) <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize('size', [(32, 32), (33, 47), (96, 40), (224, 160)], ids=str)
def test_small_model_reference(models, dense_models, size):
    model = models('test_pvt')
    sd = original_state(model)
    x = images(1, 3, *size)
    assert max_diff(model(x), logits(sd, x, img_size=(32, 32))) <= 1e-10
    got = dense_models('test_pvt', model.state_dict())(x)
    for a, b in zip(got, features(sd, x, img_size=(32, 32)), strict=True):
        assert max_diff(a, b) <= 1e-10


@torch.no_grad()
def test_non_square_training_grid():
    model = randomize(timm.create_model('test_pvt', img_size=(64, 160), dtype=torch.float64)).eval()
    sd = original_state(model)
    for size in ((64, 160), (160, 64), (70, 50)):
        x = images(1, 3, *size)
        assert max_diff(model(x), logits(sd, x, img_size=(64, 160))) <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize('size', [(224, 224), (160, 96)], ids=str)
def test_float32_and_unfused(models, size):
    model = models('pvt_tiny')
    sd = original_state(model)
    x = images(1, 3, *size)
    want = logits(sd, x)
    unfused = timm.create_model('pvt_tiny', dtype=torch.float64).eval()
    unfused.load_state_dict(model.state_dict())
    for stage in unfused.stages:
        for block in stage.blocks:
            block.attn.fused_attn = False
    assert max_diff(unfused(x), want) <= 1e-10
    single = timm.create_model('pvt_tiny').eval()
    single.load_state_dict(model.state_dict())
    assert (single(x.float()).double() - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameter_counts(name):
    count = dict(pvt_tiny=13_229_288, pvt_small=24_485_864, pvt_medium=44_208_104, pvt_large=61_369_320)[name]
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(original_state(model)) == dict(pvt_tiny=161, pvt_small=301, pvt_medium=517, pvt_large=751)[name]
    assert len(from_timm(model.state_dict(), 'transformers')[0]) == dict(
        pvt_tiny=177, pvt_small=333, pvt_medium=573, pvt_large=833)[name]
    assert find_variant(model.depths, model.embed_dims) == name


# The original code, where there is a checkout of it

@torch.no_grad()
@pytest.mark.parametrize('size', ORIGINAL_SIZES, ids=str)
def test_original_classifier(models, size):
    original = load_original('classification').pvt_tiny().double().eval()
    sd = original_state(models('pvt_tiny'))
    original.load_state_dict(sd)
    x = images(2, 3, *size)
    assert max_diff(models('pvt_tiny')(x), original(x)) <= 1e-10
    assert max_diff(logits(sd, x), original(x)) <= 1e-10  # the reference of the other tests is right too


@torch.no_grad()
@pytest.mark.parametrize('name', SLOW_LARGER)
def test_original_variants(models, name):
    original = getattr(load_original('classification'), name)().double().eval()
    original.load_state_dict(original_state(models(name)))
    x = images(1, 3, 224, 224)
    assert max_diff(models(name)(x), original(x)) <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize('task', ['detection', 'segmentation'])
@pytest.mark.parametrize('size', ORIGINAL_SIZES, ids=str)
def test_original_dense(models, dense_models, task, size):
    kwargs = dict(pretrained=None) if task == 'detection' else {}
    original = load_original(task).pvt_tiny(**kwargs).double().eval()
    state = models('pvt_tiny').state_dict()
    missing, unexpected = original.load_state_dict(original_state(models('pvt_tiny')), strict=False)
    assert not missing and {k.split('.')[0] for k in unexpected} == {'cls_token', 'norm', 'head'}
    x = images(1, 3, *size)
    for a, b in zip(dense_models('pvt_tiny', state)(x), original(x), strict=True):
        assert max_diff(a, b) <= 1e-10


@torch.no_grad()
@pytest.mark.slow
def test_original_dense_detection_size(models, dense_models):
    original = load_original('detection').pvt_tiny(pretrained=None).double().eval()
    original.load_state_dict(original_state(models('pvt_tiny')), strict=False)
    x = images(1, 3, 800, 1344)
    for a, b in zip(dense_models('pvt_tiny', models('pvt_tiny').state_dict())(x), original(x), strict=True):
        assert max_diff(a, b) <= 1e-10


@torch.no_grad()
def test_original_fails_where_documented(models):
    original = load_original('classification').pvt_tiny().double().eval()
    original.load_state_dict(original_state(models('pvt_tiny')))
    with pytest.raises(RuntimeError):
        original(images(1, 3, 448, 448))
    x = images(1, 3, 112, 448)
    assert max_diff(models('pvt_tiny')(x), original(x)) > 1e-3  # a square layout laid over another one


@torch.no_grad()
def test_dense_mode_is_the_default_of_features_only(models):
    model = models('test_pvt')
    plain = timm.create_model('test_pvt', class_token=False, dtype=torch.float64).eval()
    assert isinstance(plain.norm, torch.nn.Identity) and plain.stages[-1].cls_token is None
    plain.load_state_dict(checkpoint_filter_fn(model.state_dict(), plain))
    x = images(2, 3, 64, 64)
    want = features(original_state(model), x, img_size=(32, 32))[-1]
    assert max_diff(plain.forward_features(x), want) <= 1e-10
    assert max_diff(plain(x), plain.head(want.mean((2, 3)))) <= 1e-10


@torch.no_grad()
def test_class_token_in_features_only(models):
    model = models('test_pvt')
    net = timm.create_model(
        'test_pvt', features_only=True, class_token=True, pretrained=True, dtype=torch.float64,
        pretrained_cfg_overlay=dict(state_dict=model.state_dict())).eval()
    x = images(2, 3, 64, 96)
    got = net(x)
    want = model.forward_intermediates(x, intermediates_only=True)
    for a, b in zip(got, want, strict=True):
        assert max_diff(a, b) <= 1e-12
    sd = original_state(model)
    dense = features(sd, x, img_size=(32, 32))
    assert max_diff(got[2], dense[2]) <= 1e-10 < max_diff(got[3], dense[3])  # the token takes part in stage 4
