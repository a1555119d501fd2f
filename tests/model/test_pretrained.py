""" Pretrained weights through the real clients: huggingface_hub and torch.hub, against a loopback server. """
import argparse
import os
import subprocess
import sys
import traceback
from collections import OrderedDict

import pytest
import timm
import torch
from safetensors.torch import save as safetensors_bytes

import pvt_timm  # noqa: F401
from pvt_timm.checkpoints import drop_parts, from_timm
from reference import images, randomize

IN1K = ('pvt_tiny', 'pvt_small', 'pvt_medium', 'pvt_large')
COCO = ('pvt_tiny', 'pvt_small', 'pvt_medium')
FAULTS = ('truncate', 'short', 'garbage', 'html', 'drop', 404, 500)


def slow_but(name, names):
    return [pytest.param(n, marks=() if n == name else pytest.mark.slow) for n in names]


@pytest.fixture(scope='module')
def tiny():
    """A pvt_tiny with random weights, and its state dict."""
    return randomize(timm.create_model('pvt_tiny')).eval()


@pytest.fixture(scope='module')
def tiny_safetensors(tiny):
    return transformers_bytes(tiny)


@pytest.fixture(scope='module')
def saved(tiny, tmp_path_factory):
    """Checkpoint files of the tiny model, by name."""
    folder = tmp_path_factory.mktemp('checkpoints')
    original = from_timm(tiny.state_dict(), 'original')[0]
    torch.save(original, folder / 'original.pth')
    torch.save(OrderedDict(original), folder / 'legacy.pth', _use_new_zipfile_serialization=False)
    torch.save(dict(model=original, epoch=3, lr_scheduler={'last_epoch': 3}), folder / 'wrapped.pth')
    torch.save(dict(model=original, args=argparse.Namespace(lr=1)), folder / 'snapshot.pth')
    torch.save(retinanet(tiny), folder / 'retinanet.pth')
    lame = dict(original)
    del lame['block3.1.attn.q.bias']
    torch.save(lame, folder / 'incomplete.pth')
    small = timm.create_model('pvt_small', embed_dims=(64, 64, 64, 64), num_heads=(1, 1, 1, 1))
    torch.save(from_timm(small.state_dict(), 'original')[0], folder / 'other.pth')
    return folder


def transformers_bytes(model) -> bytes:
    return safetensors_bytes({k: v.contiguous() for k, v in from_timm(model.state_dict(), 'transformers')[0].items()},
                             metadata={'format': 'pt'})


def retinanet(model):
    """What OpenMMLab's files hold: the detector, its metadata, and no class token, norm or head."""
    state = drop_parts(model.state_dict(), ('class_token', 'norm', 'head'))
    out = OrderedDict((f'backbone.{k}', v) for k, v in from_timm(state, 'mmdet')[0].items())
    out['neck.lateral_convs.0.conv.weight'] = torch.zeros(256, 128, 1, 1)
    out['bbox_head.retina_cls.bias'] = torch.zeros(720)
    out._metadata = OrderedDict(version=1)
    meta = dict(mmdet_version='2.16.0', CLASSES=('person', 'bicycle'), config='model = dict()', epoch=12, hook_msgs={},
                env_info='sys.platform: linux', seed=None)
    return dict(meta=meta, state_dict=out)


def hub_repo(name):
    repo_id, _, revision = timm.get_pretrained_cfg(f'{name}.in1k').hf_hub_id.partition('@')
    return repo_id, revision or None


def serve_hub(hub, name, data):
    repo_id, revision = hub_repo(name)
    hub.add_repo(repo_id, {'model.safetensors': data, 'config.json': '{}'}, commit=revision)


def from_url(name, url, **kwargs):
    """Create a model with the original release's url redirected to the loopback server."""
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=None, url=url), **kwargs)


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def the_error(call, *parts) -> str:
    """Error that `call` raises: one line with `parts` in it."""
    with pytest.raises(RuntimeError) as info:
        call()
    text = str(info.value)
    assert '\n' not in text and len(text) < 900, text
    assert text.startswith('Cannot load the weights of pvt_'), text
    for part in parts:
        assert part in text, text
    assert text in ''.join(traceback.format_exception_only(info.value))
    return text


def leftovers(folder):
    """Files in a cache that hold weights or parts of them."""
    return sorted(
        str(f.relative_to(folder)) for f in folder.rglob('*')
        if f.is_file() and '.locks' not in f.parts and '.no_exist' not in f.parts and 'refs' not in f.parts
        and f.name != 'CACHEDIR.TAG' and f.name != '.gitignore')


# Weights land exactly

@pytest.mark.parametrize('name', slow_but('pvt_small', IN1K))
def test_hub(hub, name):
    source = randomize(timm.create_model(name), seed=3)
    serve_hub(hub, name, transformers_bytes(source))
    model = timm.create_model(f'{name}.in1k', pretrained=True)
    assert same(model, source)
    assert model.pretrained_cfg['num_classes'] == 1000 and model.pretrained_cfg['crop_pct'] == 0.875
    assert hub.count('GET', 'model.safetensors') == 1 and hub.count('HEAD') + hub.count('GET') == len(hub.requests)
    assert same(timm.create_model(name, pretrained=True), source)  # the default tag, from the cache
    assert hub.count('GET', 'model.safetensors') == 1


def test_pinned_revision(hub, tiny_safetensors, tiny):
    repo_id, revision = hub_repo('pvt_tiny')
    assert len(revision) == 40
    serve_hub(hub, 'pvt_tiny', tiny_safetensors)
    hub.add_repo(repo_id, {'model.safetensors': b'something else that was pushed later'})
    assert same(timm.create_model('pvt_tiny', pretrained=True), tiny)


@pytest.mark.parametrize('name', slow_but('pvt_tiny', IN1K))
def test_original_url(hub, tmp_path, name):
    source = randomize(timm.create_model(name), seed=4)
    torch.save(from_timm(source.state_dict(), 'original')[0], tmp_path / 'x.pth')
    url = hub.add_file(f'releases/{name}.pth', tmp_path / 'x.pth')
    assert same(from_url(f'{name}.in1k', url), source)


@pytest.mark.parametrize('file', ['original.pth', 'legacy.pth', 'wrapped.pth'])
def test_original_forms(hub, saved, tiny, file):
    assert same(from_url('pvt_tiny', hub.add_file(file, saved / file)), tiny)


@pytest.mark.parametrize('name', slow_but('pvt_small', COCO))
def test_retinanet(hub, tmp_path, name, monkeypatch):
    source = randomize(timm.create_model(name), seed=5).eval()
    torch.save(retinanet(source), tmp_path / 'x.pth')
    url = timm.get_pretrained_cfg(f'{name}.retinanet_coco').url
    assert url.startswith('https://download.openmmlab.com/')
    overlay = dict(url=hub.add_file(url.rpartition('/')[2], tmp_path / 'x.pth'))
    net = timm.create_model(
        f'{name}.retinanet_coco', pretrained=True, features_only=True, pretrained_cfg_overlay=overlay).eval()
    want = timm.create_model(
        name, pretrained=True, features_only=True, pretrained_cfg_overlay=dict(state_dict=source.state_dict())).eval()
    assert same(net, want)
    assert not [k for k in net.state_dict() if 'cls_token' in k or k.startswith(('norm', 'head'))]
    x = images(1, 3, 64, 96, dtype=torch.float32)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(net(x), want(x), strict=True))
    model = timm.create_model(f'{name}.retinanet_coco', pretrained=True, pretrained_cfg_overlay=overlay)
    assert not model.class_token and model.num_classes == 0
    state = source.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key][:, 1:] if key == 'stages.3.pos_embed' else state[key])


def test_retinanet_without_overlay(hub, saved, tiny, monkeypatch):
    """As a user types it: only the host differs."""
    import urllib.request

    url = timm.get_pretrained_cfg('pvt_tiny.retinanet_coco').url
    hub.add_file(url.partition('.com/')[2], saved / 'retinanet.pth')
    real = urllib.request.urlopen
    asked = []

    def urlopen(request, *args, **kwargs):
        asked.append(request.full_url)
        request.full_url = request.full_url.replace('https://download.openmmlab.com', hub.url)
        return real(request, *args, **kwargs)

    monkeypatch.setattr(torch.hub, 'urlopen', urlopen)
    net = timm.create_model('pvt_tiny.retinanet_coco', pretrained=True, features_only=True)
    assert asked == [url]
    assert torch.equal(net.state_dict()['stages_0.pos_embed'], tiny.state_dict()['stages.0.pos_embed'])
    assert net.feature_info.channels() == [64, 128, 320, 512]


def test_retinanet_has_no_class_token(hub, saved):
    overlay = dict(url=hub.add_file('x.pth', saved / 'retinanet.pth'))
    with pytest.raises(ValueError, match='class_token=False'):
        timm.create_model('pvt_tiny.retinanet_coco', pretrained=True, class_token=True, pretrained_cfg_overlay=overlay)
    assert not hub.requests
    the_error(lambda: from_url('pvt_tiny', overlay['url']), 'class token', 'features_only=True')


@pytest.mark.parametrize('route', ['hub', 'url'])
def test_other_heads_and_channels(hub, saved, tiny, tiny_safetensors, route):
    serve_hub(hub, 'pvt_tiny', tiny_safetensors)
    url = hub.add_file('original.pth', saved / 'original.pth')

    def create(**kwargs):
        if route == 'url':
            return from_url('pvt_tiny', url, **kwargs)
        return timm.create_model('pvt_tiny', pretrained=True, **kwargs)

    state = tiny.state_dict()
    torch.manual_seed(0)
    five = create(num_classes=5).state_dict()
    assert five['head.weight'].shape == (5, 512) and five['head.weight'].std() < 0.03
    assert all(torch.equal(v, state[k]) for k, v in five.items() if not k.startswith('head.'))
    none = create(num_classes=0)
    assert none(torch.zeros(1, 3, 32, 32)).shape == (1, 512)
    assert none.state_dict().keys() == {k for k in state if not k.startswith('head.')}
    grey = create(in_chans=1).state_dict()
    key = 'stages.0.patch_embed.proj.weight'
    assert torch.allclose(grey.pop(key), state[key].sum(1, keepdim=True), atol=1e-6)
    assert all(torch.equal(v, state[k]) for k, v in grey.items())
    both = create(in_chans=4, num_classes=7, global_pool='avg')
    assert both(torch.zeros(1, 4, 32, 32)).shape == (1, 7)


def test_other_image_size(hub, tiny, tiny_safetensors):
    serve_hub(hub, 'pvt_tiny', tiny_safetensors)
    model = timm.create_model('pvt_tiny', pretrained=True, img_size=(128, 256)).eval()
    assert model.stages[0].pos_embed.shape == (1, 32 * 64, 64)
    x = images(1, 3, 128, 256, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(model(x), tiny(x), rtol=1e-4, atol=1e-4)


def test_dtype(hub, tiny, tiny_safetensors):
    serve_hub(hub, 'pvt_tiny', tiny_safetensors)
    model = timm.create_model('pvt_tiny', pretrained=True, dtype=torch.bfloat16)
    for k, v in model.state_dict().items():
        assert v.dtype == torch.bfloat16 and torch.equal(v, tiny.state_dict()[k].bfloat16()), k


# Faults: a clear error, nothing corrupt left behind, and the next try succeeds

@pytest.mark.parametrize('kind', FAULTS)
def test_hub_faults(hub, hub_cache, tiny, tiny_safetensors, no_waits, kind):
    serve_hub(hub, 'pvt_tiny', tiny_safetensors)
    hub.fail(kind, r'/cdn/.*model\.safetensors')
    expected = {
        'truncate': 'without sending complete', 'short': 'incomplete', 'garbage': 'damaged', 404: '404', 500: '500',
        'drop': 'disconnected', 'html': 'incomplete'}[kind]
    the_error(lambda: timm.create_model('pvt_tiny', pretrained=True), expected, 'Zetatech/pvt-tiny-224')
    assert leftovers(hub_cache) == []
    hub.heal()
    assert same(timm.create_model('pvt_tiny', pretrained=True), tiny)


@pytest.mark.parametrize('kind', [404, 500, 'drop'])
def test_hub_does_not_answer(hub, hub_cache, tiny, tiny_safetensors, no_waits, kind):
    serve_hub(hub, 'pvt_tiny', tiny_safetensors)
    hub.fail(kind, '/resolve/')
    expected = 'disconnected' if kind == 'drop' else str(kind)
    the_error(lambda: timm.create_model('pvt_tiny', pretrained=True), expected)
    assert not hub_cache.exists() or leftovers(hub_cache) == []
    hub.heal()
    assert same(timm.create_model('pvt_tiny', pretrained=True), tiny)


def test_hub_transient_fault(hub, tiny, tiny_safetensors, no_waits):
    serve_hub(hub, 'pvt_tiny', tiny_safetensors)
    hub.fail('truncate', '/cdn/', times=1)
    hub.fail(503, '/resolve/', times=2)
    assert same(timm.create_model('pvt_tiny', pretrained=True), tiny)


def test_hub_missing(hub, tiny_safetensors, no_waits):
    repo_id, revision = hub_repo('pvt_tiny')

    def create():
        return timm.create_model('pvt_tiny', pretrained=True)

    the_error(create, 'no such repository', repo_id, 'v2/pvt_tiny.pth')
    hub.add_repo(repo_id, {'model.safetensors': tiny_safetensors}, commit='1' * 40)
    the_error(create, 'no such revision', revision)
    hub.add_repo(repo_id, {'config.json': '{}'}, commit=revision)
    the_error(create, 'no such file', 'model.safetensors')
    hub.add_repo(repo_id, {'model.safetensors': tiny_safetensors}, commit=revision, private=True)
    the_error(create, 'no such repository, or it is private')
    hub.add_repo(repo_id, {'model.safetensors': tiny_safetensors}, commit=revision, gated=True)
    the_error(create, 'restricted')
    hub.add_repo(repo_id, {'model.safetensors': tiny_safetensors}, commit=revision)
    create()


def test_hub_wrong_variant(hub, hub_cache, saved, tiny, tiny_safetensors):
    other = timm.create_model('test_pvt')
    serve_hub(hub, 'pvt_tiny', transformers_bytes(other))
    the_error(lambda: timm.create_model('pvt_tiny', pretrained=True), 'depths (2, 2, 2, 2)', '(1, 2, 2, 1) and')
    assert leftovers(hub_cache) == []
    serve_hub(hub, 'pvt_tiny', tiny_safetensors)
    assert same(timm.create_model('pvt_tiny', pretrained=True), tiny)


@pytest.mark.parametrize('kind', FAULTS)
def test_url_faults(hub, torch_cache, saved, tiny, kind):
    url = hub.add_file('pvt_tiny.pth', saved / 'original.pth')
    hub.fail(kind, 'pvt_tiny.pth')
    expected = {404: 'HTTP error 404', 500: 'HTTP error 500', 'drop': 'closed connection'}.get(kind, 'damaged')
    the_error(lambda: from_url('pvt_tiny', url), expected, url)
    assert leftovers(torch_cache) == []
    hub.heal()
    assert same(from_url('pvt_tiny', url), tiny)


@pytest.mark.parametrize('kind', ['truncate', 'short', 'garbage'])
def test_url_faults_of_other_formats(hub, torch_cache, saved, tiny, kind):
    for file in ('legacy.pth', 'retinanet.pth'):
        url = hub.add_file(file, saved / file)
        hub.fail(kind, file, times=1)
        features = dict(features_only=True) if file == 'retinanet.pth' else {}
        the_error(lambda: from_url('pvt_tiny', url, **features), 'damaged', url)  # noqa: B023
        assert leftovers(torch_cache) == []
        net = from_url('pvt_tiny', url, **features)
        assert len(net.state_dict()) > 100
        (torch_cache / file).unlink()


def test_url_no_server(hub, torch_cache):
    the_error(lambda: from_url('pvt_tiny', 'http://127.0.0.1:1/pvt_tiny.pth'), 'cannot connect', 'refused')
    the_error(lambda: from_url('pvt_tiny', 'http://127.0.0.1:1/'), 'http://127.0.0.1:1/')


@pytest.mark.parametrize('file, expected', [
    ('other.pth', 'depths (2, 2, 2, 2)'),
    ('incomplete.pth', 'stages.2.blocks.1.attn.q.bias'),
    ('snapshot.pth', 'argparse.Namespace'),
])
def test_url_wrong_content(hub, torch_cache, saved, tiny, file, expected):
    url = hub.add_file('pvt_tiny.pth', saved / file)
    the_error(lambda: from_url('pvt_tiny', url), expected, url)
    assert leftovers(torch_cache) == []
    assert same(from_url('pvt_tiny', hub.add_file('pvt_tiny.pth', saved / 'original.pth')), tiny)


class Foreign:
    def __reduce__(self):
        return os.system, ('touch executed',)


def test_nothing_is_executed(hub, torch_cache, saved, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for legacy in (False, True):
        torch.save(dict(model=tiny.state_dict(), extra=Foreign()), 'x.pth', _use_new_zipfile_serialization=not legacy)
        url = hub.add_file('pvt_tiny.pth', tmp_path / 'x.pth')
        the_error(lambda: from_url('pvt_tiny', url), 'other than tensors', 'system')  # noqa: B023
        assert leftovers(torch_cache) == [] and not (tmp_path / 'executed').exists()


def test_kept_and_named(hub, torch_cache, saved, tiny):
    """A bad file that was in the cache before is not ours to delete."""
    url = hub.add_file('pvt_tiny.pth', saved / 'original.pth')
    torch_cache.mkdir(parents=True)
    (torch_cache / 'pvt_tiny.pth').write_bytes((saved / 'original.pth').read_bytes()[:1000])
    the_error(lambda: from_url('pvt_tiny', url), 'damaged', f'{torch_cache / "pvt_tiny.pth"} was kept', 'delete it')
    assert (torch_cache / 'pvt_tiny.pth').stat().st_size == 1000 and not hub.requests
    (torch_cache / 'pvt_tiny.pth').unlink()
    assert same(from_url('pvt_tiny', url), tiny)


def test_kept_in_hub_cache(hub, hub_cache, tiny, tiny_safetensors):
    serve_hub(hub, 'pvt_tiny', tiny_safetensors)
    timm.create_model('pvt_tiny', pretrained=True)
    blob, = hub_cache.glob('*/blobs/*')
    blob.write_bytes(tiny_safetensors[:5000])
    text = the_error(lambda: timm.create_model('pvt_tiny', pretrained=True), 'damaged', 'was kept')
    pointer = text.partition('The cached file ')[2].partition(' was kept')[0]
    os.remove(os.path.realpath(pointer))
    os.remove(pointer)
    assert same(timm.create_model('pvt_tiny', pretrained=True), tiny)


def test_cache_dir(hub, hub_cache, torch_cache, saved, tiny, tiny_safetensors, tmp_path):
    serve_hub(hub, 'pvt_tiny', tiny_safetensors)
    url = hub.add_file('pvt_tiny.pth', saved / 'original.pth')
    for where, create in (
            ('a', lambda: timm.create_model('pvt_tiny', pretrained=True, cache_dir=tmp_path / 'a')),
            ('b', lambda: from_url('pvt_tiny', url, cache_dir=tmp_path / 'b')),
    ):
        (tmp_path / where).mkdir()
        hub.fail('garbage', times=1)
        the_error(create, 'damaged')
        assert leftovers(tmp_path / where) == []
        assert same(create(), tiny)
        assert leftovers(tmp_path / where)
    assert not hub_cache.exists() and not (torch_cache.exists() and leftovers(torch_cache))


def test_other_errors_are_left_alone(hub, tiny_safetensors):
    """A wrong argument is not reported as trouble with the weights, and costs no download."""
    serve_hub(hub, 'pvt_tiny', tiny_safetensors)
    for error, kwargs in (
            (ValueError, dict(global_pool='max')),
            (TypeError, dict(bogus=1)),
            (ValueError, dict(features_only=True, out_indices=(9,))),
            (ValueError, dict(features_only=True, feature_cls='tuple')),
            (ValueError, dict(output_stride=8)),
            (ValueError, dict(img_size=16)),
    ):
        with pytest.raises(error) as info:
            timm.create_model('pvt_tiny', pretrained=True, **kwargs)
        assert 'Cannot load' not in str(info.value)
    assert not hub.requests


def test_no_weights():
    with pytest.raises(RuntimeError, match='no pretrained weights for pvt_huge_v2') as info:
        timm.create_model('pvt_huge_v2', pretrained=True, depths=(1, 1, 1, 1))
    assert 'pretrained=False' in str(info.value)


def test_hf_hub_source(hub, tiny, tiny_safetensors):
    """`hf-hub:` needs a config.json of timm, weights of any format do."""
    hub.add_repo('someone/pvt', {
        'config.json': '{"architecture": "pvt_tiny", "num_classes": 1000, "pretrained_cfg": {"num_classes": 1000, '
                       '"input_size": [3, 224, 224], "first_conv": "stages.0.patch_embed.proj", "classifier": "head"}}',
        'model.safetensors': tiny_safetensors})
    assert same(timm.create_model('hf-hub:someone/pvt', pretrained=True), tiny)
    hub.add_repo('someone/pvt', {**hub.repo_files('someone/pvt'), 'model.safetensors': b'no'})
    the_error(lambda: timm.create_model('hf-hub:someone/pvt', pretrained=True), 'damaged', 'someone/pvt')


def test_save_for_hf(hub, token, tiny):
    """timm's own upload, and back."""
    timm.models.push_to_hf_hub(tiny, 'someone/tuned', model_config=dict(label_names=['x'] * 1000))
    assert {'config.json', 'model.safetensors', 'README.md'} <= set(hub.repo_files('someone/tuned'))
    assert same(timm.create_model('hf-hub:someone/tuned', pretrained=True), tiny)


# Offline

CREATE = """
import sys, timm, torch, pvt_timm
for name in sys.argv[1:]:
    try:
        model = timm.create_model(name, pretrained=True)
        print(float(sum(v.double().sum() for v in model.state_dict().values())))
    except Exception as e:
        print(type(e).__name__, e)
"""


def create_in_subprocess(env, *names, code=CREATE):
    run = subprocess.run([sys.executable, '-c', code, *names], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == len(names), run.stdout
    return lines


def test_offline(hub, client_env, hub_cache, tiny, tiny_safetensors):
    """The tag of pvt_tiny names a revision, that of pvt_small does not: both are found in the cache."""
    assert hub_repo('pvt_tiny')[1] and not hub_repo('pvt_small')[1]
    small = randomize(timm.create_model('pvt_small'), seed=6)
    serve_hub(hub, 'pvt_tiny', tiny_safetensors)
    serve_hub(hub, 'pvt_small', transformers_bytes(small))
    offline = dict(client_env, HF_HUB_OFFLINE='1')
    for name, text in zip(IN1K, create_in_subprocess(offline, 'pvt_tiny', 'pvt_small')):
        assert text.startswith(f'RuntimeError Cannot load the weights of {name}.in1k from'), text
        assert 'HF_HUB_OFFLINE is set and the file is not in the cache' in text
    assert not hub.requests and (not hub_cache.exists() or leftovers(hub_cache) == [])

    models = [timm.create_model(name, pretrained=True) for name in ('pvt_tiny', 'pvt_small')]
    assert same(models[0], tiny) and same(models[1], small)
    requests = len(hub.requests)
    sums = [float(sum(v.double().sum() for v in model.state_dict().values())) for model in models]
    assert [float(x) for x in create_in_subprocess(offline, 'pvt_tiny.in1k', 'pvt_small.in1k')] == sums
    assert len(hub.requests) == requests


@pytest.mark.slow
def test_hub_unreachable(client_env):
    env = dict(client_env, HF_ENDPOINT='http://127.0.0.1:1')
    code = CREATE.replace('for', 'import time; time.sleep = lambda s: None\nfor', 1)  # the client waits between tries
    text, = create_in_subprocess(env, 'pvt_tiny', code=code)
    assert 'cannot get it from http://127.0.0.1:1' in text and 'refused' in text
