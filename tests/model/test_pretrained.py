""" Pretrained weights, loaded with the real clients huggingface_hub and torch.hub from a loopback server. """
import copy
import logging
import pickle
import subprocess
import sys
import urllib.request
from urllib.parse import urlsplit

import pytest
import timm
import torch
from safetensors import SafetensorError

from tests.support.convert_files import same, save, serve, wrap
from pvt_timm import checkpoint_filter_fn
from pvt_timm._input import RECORDS_INPUT
from pvt_timm.formats.architecture import drop_parts
from pvt_timm.formats.mapping import from_timm
from tests.support.reference import images, randomize

IN1K = ('pvt_tiny', 'pvt_small', 'pvt_medium', 'pvt_large')


def slow_but(name, names):
    return [pytest.param(n, marks=() if n == name else pytest.mark.slow) for n in names]


@pytest.fixture(scope='module')
def tiny():
    return randomize(timm.create_model('pvt_tiny')).eval()


@pytest.fixture(params=['hub', 'url'])
def create(request, hub, tiny, tmp_path):
    """Return a function that creates a PVT-Tiny with weights from the hub, or from a url."""
    serve(hub, 'pvt_tiny.in1k', tiny)
    file = save(from_timm(tiny.state_dict(), 'original')[0], tmp_path / 'x.pth')
    url = hub.add_file('pvt_tiny.pth', file)
    overlay = dict(hf_hub_id=None, url=url) if request.param == 'url' else None
    return lambda **kwargs: timm.create_model('pvt_tiny', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


@pytest.fixture
def url_host(hub, monkeypatch):
    """Send requests for the tags' urls to the loopback server."""
    real = urllib.request.urlopen

    def urlopen(request, *args, **kwargs):
        if not request.full_url.startswith('http://127.0.0.1'):
            request.full_url = f'{hub.url}/{request.full_url.split("/", 3)[3]}'
        return real(request, *args, **kwargs)

    monkeypatch.setattr(torch.hub, 'urlopen', urlopen)


# Weights land exactly

@pytest.mark.parametrize('name', slow_but('pvt_small', IN1K))
def test_hub(hub, name):
    source = randomize(timm.create_model(name), seed=3)
    serve(hub, f'{name}.in1k', source)
    model = timm.create_model(f'{name}.in1k', pretrained=True)
    assert same(model, source)
    assert same(timm.create_model(name, pretrained=True), source)  # the default tag, from the cache
    assert hub.count('GET', 'model.safetensors') == 1


@pytest.mark.parametrize('name', slow_but('pvt_tiny', IN1K))
@pytest.mark.parametrize('form', ['zip', 'legacy', 'wrapped'])
def test_url_of_the_original(hub, url_host, tmp_path, name, form):
    source = randomize(timm.create_model(name), seed=4)
    state = from_timm(source.state_dict(), 'original')[0]
    wrapped = dict(model=state, epoch=3, lr_scheduler={'last_epoch': 3})
    hub.add_file(urlsplit(timm.get_pretrained_cfg(name).url).path, save(
        wrapped if form == 'wrapped' else state, tmp_path / 'x.pth', legacy=form == 'legacy'))
    assert same(timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=None)), source)


@pytest.mark.parametrize('name', slow_but('pvt_tiny', IN1K[:3]))
def test_retinanet(hub, url_host, own_caches, caplog, name):
    source = randomize(timm.create_model(name), seed=5)
    serve(hub, f'{name}.retinanet_coco', source)
    want = drop_parts(source.state_dict(), ('class_token', 'norm', 'head'))
    model = timm.create_model(f'{name}.retinanet_coco', pretrained=True)
    assert not model.class_token and model.num_classes == 0 and same(model.state_dict(), want)
    net = timm.create_model(f'{name}.retinanet_coco', pretrained=True, features_only=True)
    assert same(net.state_dict(), from_timm(want, 'timm_features')[0])

    downloads = own_caches / 'torch' / 'hub' / 'checkpoints'
    file, = downloads.iterdir()
    assert timm.create_model(f'{name}.retinanet_coco', pretrained=True, num_classes=5).head.weight.shape == (5, 512)
    assert '0 classes, the head for 5 is new' in caplog.text
    with pytest.raises(ValueError, match='class token'):
        timm.create_model(f'{name}.retinanet_coco', pretrained=True, class_token=True)
    assert [file] == list(downloads.iterdir())  # it was right, so it stays


def test_other_heads_channels_and_sizes(create, tiny):
    state = tiny.state_dict()
    five = create(num_classes=5)
    assert same(drop_parts(five.state_dict(), ['head']), drop_parts(state, ['head']))
    assert five.head.weight.shape == (5, 512) and five.head.weight.std() < 0.03
    assert same(create(num_classes=0), drop_parts(state, ['head']))
    assert create(in_chans=4, num_classes=7, global_pool='avg')(torch.zeros(1, 4, 32, 32)).shape == (1, 7)
    assert same(create(dtype=torch.bfloat16), {k: v.bfloat16() for k, v in state.items()})
    model = create(img_size=(128, 256)).eval()
    assert model.stages[0].pos_embed.shape == (1, 32 * 64, 64)
    x = images(1, 3, 128, 256, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(model(x), tiny(x), rtol=1e-4, atol=1e-4)


# A file of one's own

@pytest.mark.parametrize('fmt', ['timm', 'original', 'transformers'])
def test_own_head(tmp_path, caplog, fmt):
    """A head is kept if its classes fit, whatever the tag says. Otherwise a warning names the number of classes."""
    own = randomize(timm.create_model('test_pvt', num_classes=3), seed=7)
    file = str(save(wrap(from_timm(own.state_dict(), fmt)[0], 'state_dict'), tmp_path / 'x.pth'))
    overlay = dict(file=file)
    model = timm.create_model('test_pvt', pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    assert same(model, own) and not caplog.records and model.pretrained_cfg['num_classes'] == 3
    for n, kwargs in ((5, dict(num_classes=5)), (10, {})):
        caplog.clear()
        model = timm.create_model('test_pvt', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
        assert model.head.weight.shape == (n, 64) and torch.equal(model.norm.weight, own.norm.weight)
        assert caplog.record_tuples == [(
            'pvt_timm.pvt', logging.WARNING, f'The checkpoint has 3 classes, the head for {n} is new.')]
    caplog.clear()
    timm.create_model('test_pvt', pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    assert not caplog.records
    with pytest.raises(ValueError, match='head.weight'):  # nobody asked for other classes
        timm.create_model('test_pvt', pretrained=True, pretrained_cfg_overlay=dict(
            state_dict=drop_parts(own.state_dict(), ['head'])))
    if fmt == 'timm':
        assert same(timm.create_model('test_pvt', num_classes=3, checkpoint_path=file), own)
        return
    with pytest.raises(RuntimeError, match=r'Missing key\(s\)'):  # timm maps no names there
        timm.create_model('test_pvt', num_classes=3, checkpoint_path=file)


@pytest.mark.parametrize('source', ['state_dict', 'file', 'url', 'hf_hub_id'])
def test_own_head_from_any_source(hub, tmp_path, caplog, source):
    own = randomize(timm.create_model('test_pvt', num_classes=3), seed=7)
    file = save(own.state_dict(), tmp_path / 'x.pth')
    hub.add_repo('me/mine', {
        'model.safetensors': save(own.state_dict(), tmp_path / 'x.safetensors').read_bytes(), 'config.json': '{}'})
    where = dict(state_dict=own.state_dict(), file=str(file), url=hub.add_file('x.pth', file), hf_hub_id='me/mine')
    overlay = {'file': None, source: where[source]}
    model = timm.create_model('test_pvt', pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    assert same(model, own) and not caplog.records
    model = timm.create_model('test_pvt', pretrained=True, pretrained_cfg_overlay=overlay)
    assert [record.message for record in caplog.records] == ['The checkpoint has 3 classes, the head for 10 is new.']
    assert model.num_classes == 10 and torch.equal(model.norm.weight, own.norm.weight)


@pytest.mark.parametrize('source', ['url', 'hf_hub_id'])
def test_own_weights_go_into_the_cache_that_was_asked_for(hub, own_caches, tmp_path, source):
    own = timm.create_model('test_pvt')
    file = save(own.state_dict(), tmp_path / 'x.safetensors')
    hub.add_repo('me/mine', {'model.safetensors': file.read_bytes(), 'config.json': '{}'})
    where = dict(url=hub.add_file('x.pth', save(own.state_dict(), tmp_path / 'x.pth')), hf_hub_id='me/mine')
    overlay = {'file': None, source: where[source]}
    model = timm.create_model(
        'test_pvt', pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / 'cache')
    assert same(model, own) and list((tmp_path / 'cache').iterdir())
    assert not [path for path in own_caches.rglob('*') if path.is_file()]


def test_filter_changes_neither_checkpoint_nor_model():
    own = randomize(timm.create_model('test_pvt', num_classes=3, in_chans=4), seed=7)
    checkpoint = dict(own.state_dict())
    for model in (
            timm.create_model('test_pvt'),
            timm.create_model('test_pvt', num_classes=3, in_chans=4),
            timm.create_model('test_pvt', class_token=False, num_classes=0, img_size=64),
    ):
        before = copy.deepcopy((model.pretrained_cfg, model.state_dict()))
        filtered = checkpoint_filter_fn(checkpoint, model)
        assert model.pretrained_cfg == before[0] and model.pretrained_cfg['num_classes'] == 10
        assert same(model.state_dict(), before[1])
        assert list(checkpoint) == list(own.state_dict()) and same(checkpoint, own.state_dict())
        if model.in_chans == 4:
            assert same(filtered, own.state_dict())


@pytest.mark.parametrize('theirs, ours', [(1, 1), (1, 3), (2, 2), (4, 1), (4, 3), (4, 4), (4, 6), (3, 4)])
def test_own_channels(tmp_path, theirs, ours):
    own = randomize(timm.create_model('test_pvt', in_chans=theirs), seed=7)
    overlay = dict(file=str(save(own.state_dict(), tmp_path / 'x.pth')))

    def create():
        return timm.create_model('test_pvt', pretrained=True, in_chans=ours, pretrained_cfg_overlay=overlay)

    if not RECORDS_INPUT and (theirs not in (1, 3) or (theirs, ours) == (1, 3)):
        with pytest.raises((ValueError, RuntimeError, AssertionError)):  # timm < 1.0.31: not by random numbers
            create()
        return
    model = create()
    key = 'stages.0.patch_embed.proj.weight'
    got, want = model.state_dict(), own.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in got.items() if k != key)
    # timm repeats the channels, for one channel it sums them
    repeated = want[key].repeat(1, 6, 1, 1)[:, :ours] * theirs / ours
    assert torch.allclose(got[key], want[key].sum(1, keepdim=True) if ours == 1 else repeated, atol=1e-6)


# Faults end in an exception, never in random weights, and nothing is deleted

@pytest.mark.parametrize('kind', ['truncate', 'short', 'garbage', 'html', 'drop', 404, 500])
def test_faults(request, create, hub, tiny, no_waits, kind):
    hub.fail(kind, r'/cdn/.*model\.safetensors|pvt_tiny.pth')
    # what the clients say of a transfer: huggingface_hub has httpx, httpx2 or requests, whose errors are OSErrors
    errors = [OSError, *(sys.modules[name].HTTPError for name in ('httpx', 'httpx2') if name in sys.modules)]
    if kind not in (404, 500, 'drop'):  # and what torch and safetensors say of a file
        errors += [RuntimeError, pickle.UnpicklingError, SafetensorError]
    for _ in range(2):
        with pytest.raises(tuple(errors)):
            create()
    hub.heal()
    if kind in (404, 500, 'drop') or request.node.callspec.params['create'] == 'hub' and kind == 'truncate':
        # what came is not a file in the cache
        assert same(create(), tiny)


def test_wrong_variant_is_named_and_its_file_kept(hub, tiny):
    serve(hub, 'pvt_tiny.in1k', tiny)
    for _ in range(2):
        with pytest.raises(ValueError, match=r'with depths \(3, 8, 27, 3\) .*, got one with depths \(2, 2, 2, 2\)'):
            timm.create_model('pvt_tiny', pretrained=True, depths=(3, 8, 27, 3))
    assert same(timm.create_model('pvt_tiny', pretrained=True), tiny)
    assert hub.count('GET', 'model.safetensors') == 1


def test_wrong_arguments_cost_no_download(hub, tiny):
    serve(hub, 'pvt_tiny.in1k', tiny)
    for error, kwargs in ((AssertionError, dict(global_pool='max')), (TypeError, dict(bogus=1)),
                          (ValueError, dict(output_stride=8)), (AssertionError, dict(img_size=16))):
        with pytest.raises(error):
            timm.create_model('pvt_tiny', pretrained=True, **kwargs)
    assert not hub.requests
    with pytest.raises(RuntimeError, match='pvt_huge_v2'):
        timm.create_model('pvt_huge_v2', pretrained=True, depths=(1, 1, 1, 1))


def test_save_for_hf(hub, token, tiny):
    """A model that timm uploads to the hub can be loaded again."""
    timm.models.push_to_hf_hub(tiny, 'someone/tuned', model_config=dict(label_names=['x'] * 1000))
    assert {'config.json', 'model.safetensors', 'README.md'} <= set(hub.repo_files('someone/tuned'))
    assert same(timm.create_model('hf-hub:someone/tuned', pretrained=True), tiny)


OFFLINE = '''if True:
    import sys
    import timm
    import torch
    import pvt_timm

    def create():
        for name in sys.argv[1:]:
            torch.save(timm.create_model(name, True).state_dict(), name)

    try:
        create()
    except Exception as e:
        print(type(e).__name__, flush=True)
    sys.stdin.readline()  # until the files are in the cache
    create()
'''


def test_offline(hub, client_env, tiny, tmp_path):
    """Offline, files in the cache are used, even if the repository has a newer version."""
    small = randomize(timm.create_model('pvt_small'), seed=6)
    serve(hub, 'pvt_tiny.in1k', tiny)
    serve(hub, 'pvt_small.in1k', small)
    offline = subprocess.Popen(
        [sys.executable, '-c', OFFLINE, 'pvt_tiny', 'pvt_small'], env={**client_env, 'HF_HUB_OFFLINE': '1'},
        cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert offline.stdout.readline() == 'LocalEntryNotFoundError\n' and not hub.requests, offline.communicate()
    for name, source in (('pvt_tiny', tiny), ('pvt_small', small)):
        assert same(timm.create_model(name, pretrained=True), source)
    repo_id = timm.get_pretrained_cfg('pvt_tiny').hf_hub_id
    hub.add_repo(repo_id, {'model.safetensors': b'something else that was pushed later'})
    requests = len(hub.requests)
    err = offline.communicate('now\n', timeout=300)[1]
    assert offline.returncode == 0 and len(hub.requests) == requests, err
    assert same(torch.load(tmp_path / 'pvt_tiny'), tiny) and same(torch.load(tmp_path / 'pvt_small'), small)
