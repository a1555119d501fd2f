""" `pvt-convert publish` against the loopback hub: small stand-ins for all public checkpoints. """
import dataclasses
import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch

import convert_files as files
from pvt_timm import pvt
from pvt_timm.checkpoints import map_to_timm
from pvt_timm.files import read_checkpoint
from weights_conversion import sources
from weights_conversion.cli import main

DEPTHS = {'pvt_tiny': (1, 1, 1, 1), 'pvt_small': (1, 2, 1, 1), 'pvt_medium': (1, 1, 2, 1), 'pvt_large': (2, 1, 1, 1)}
# The driver of a subprocess: the same small variants, hashes and urls
DRIVER = '''
import json, sys
import pytest
sys.path[:0] = json.loads(sys.argv[1])
from test_publish import pretend
pretend(pytest.MonkeyPatch(), *json.loads(sys.argv[2]))
from weights_conversion.cli import main
sys.exit(main(sys.argv[3:]))
'''


def pretend(monkeypatch, hashes, urls):
    """Make the variants narrow and shallow, and the public files those with `hashes` at `urls`."""
    for name, depths in DEPTHS.items():
        monkeypatch.setitem(pvt.VARIANTS, name, dict(depths=depths, embed_dims=(8, 16, 40, 64), num_heads=(1, 2, 5, 8)))
    for tag, sha256 in hashes.items():
        monkeypatch.setitem(sources.SHA256, tag, sha256)
    known = timm.models._registry._model_pretrained_cfgs
    for tag, url in urls.items():
        monkeypatch.setitem(known, tag, dataclasses.replace(known[tag], url=url))


@pytest.fixture
def public(hub, token, tmp_path, monkeypatch):
    """The public files on the loopback server: tag -> file, and what `pretend` was given."""
    pretend(monkeypatch, {}, {})
    found, urls = {}, {}
    for tag in sources.SHA256:
        variant, _, weights = tag.partition('.')
        cfg = timm.models.get_pretrained_cfg(tag)
        if weights == 'in1k':
            found[tag] = files.save(
                files.make('transformers', variant, 1000, fill=files.random_values), tmp_path / f'{tag}.safetensors')
            repo, _, revision = cfg.hf_hub_id.partition('@')
            hub.add_repo(repo, {'model.safetensors': found[tag], 'config.json': '{"model_type": "pvt"}'},
                         commit=revision or None)
        else:
            from pvt_timm.detection import detector_to_mmdet, pvt_retinanet
            torch.manual_seed(0)
            model = pvt_retinanet(variant, num_classes=3, out_channels=16)
            path = files.save({'meta': {}, 'state_dict': detector_to_mmdet(model)}, tmp_path / f'{tag}.pth')
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
            found[tag] = path.rename(tmp_path / f'{tag}_1x-{digest}.pth')
            urls[tag] = hub.add_file(f'v2.0/{found[tag].name}', found[tag])
    hashes = {tag: hashlib.sha256(path.read_bytes()).hexdigest()[:8 if tag in urls else 64]
              for tag, path in found.items()}
    pretend(monkeypatch, hashes, urls)
    return found, json.dumps([hashes, urls])


def test_killed_and_started_again(public, hub, client_env, tmp_path):
    found, pretended = public
    out = tmp_path / 'out'
    argv = [sys.executable, '-c', DRIVER, json.dumps(sys.path[:1] + [str(Path(__file__).parent), str(
        Path(files.__file__).parent)]), pretended, 'publish', '--to', 'me', '-o', str(out)]
    env = {**client_env, 'HF_TOKEN': hub.TOKEN}
    first = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL)
    while sum('model.safetensors' in hub.repo_files(f'me/{tag}') for tag in found) < 2:
        assert first.poll() is None
        time.sleep(.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not hub.has_repo('me/pvt_medium.retinanet_coco')

    second = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    for tag in found:
        assert hub.commit_messages(f'me/{tag}') == ['initial commit', 'Upload converted PVT weights'], tag
    assert hub.count('GET', '/cdn/.*Zetatech/pvt-tiny-224/model') == 1  # what was finished is not fetched again
    uploads = hub.count('PUT')
    assert uploads <= 11  # one more than there are large files, if one was on its way
    assert main(['publish', '--to', 'me', '-o', str(out), '-q']) == 0
    assert hub.count('PUT') == uploads and all(len(hub.commit_messages(f'me/{tag}')) == 2 for tag in found)

    for tag, path in found.items():
        check_repository(tag, path)


def check_repository(tag, path):
    """What was uploaded holds the bits of the public file, in timm, transformers and torchvision."""
    import transformers
    from huggingface_hub import hf_hub_download

    repo, source = f'me/{tag}', read_checkpoint(path)
    expected = map_to_timm(source).state_dict
    model = timm.create_model(f'hf-hub:{repo}', pretrained=True)
    assert files.same(model.state_dict(), expected)
    kind = 'AutoModelForImageClassification' if tag.endswith('in1k') else 'AutoModel'
    wrapped = getattr(transformers, kind).from_pretrained(repo)
    assert files.same({k.removeprefix('timm_model.'): v for k, v in wrapped.state_dict().items()}, expected)
    card = Path(hf_hub_download(repo, 'README.md')).read_text()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    for text in (f'# {tag}\n', sha256, 'license: apache-2.0', 'not measured', 'library_name: timm'):
        assert text in card
    assert ('Verified' in card) == tag.endswith('in1k')  # mmdetection is not there
    snippet = {}
    exec(re.search(r'```python\n(.*?)```', card, re.DOTALL)[1], snippet)
    if not tag.endswith('in1k'):
        from pvt_timm.detection import retinanet_from_mmdet
        assert files.same(snippet['detector'].state_dict(), retinanet_from_mmdet(source).state_dict())
    else:
        body = snippet['detector'].backbone.body.state_dict()
        assert files.same(body, {k.replace('stages.', 'stages_'): v for k, v in model.state_dict().items()
                                 if k.startswith('stages.') and 'cls_token' not in k and k != 'stages.3.pos_embed'}
                          | {'stages_3.pos_embed': expected['stages.3.pos_embed'][:, 1:]})


def test_commands_of_the_readme(public, hub, tmp_path, monkeypatch):
    """A dry run writes the folders, some are uploaded, cards say what was measured."""
    monkeypatch.chdir(tmp_path)
    measured = {tag: dict(top1=75.123, top5=92.5, images=50000) for tag in ('pvt_tiny.in1k', 'pvt_large.in1k')}
    Path('results.json').write_text(json.dumps(dict(torch='2.9', timm='1.0', models=measured)))
    text = (Path(__file__).parents[2] / 'weights_conversion' / 'README.md').read_text()
    commands = [line.replace('OWNER', 'me') for line in text.splitlines() if line.startswith('pvt-convert publish')]
    uploaded = []
    for command in commands:
        assert main([*shlex.split(command)[1:], '-q']) == 0
        uploaded.append(sum(hub.has_repo(f'me/{tag}') for tag in sources.SHA256))
        cards = {tag: Path('published', tag, 'README.md').read_text() for tag in sources.SHA256}
        assert '75.1% top-1' in cards['pvt_tiny.in1k'] and 'box AP 40.4' in cards['pvt_small.retinanet_coco']
        found = [tag for tag, card in cards.items() if 'not measured' not in card]
        assert found == (list(measured) if '--measured' in command else [])
    assert uploaded == [0, 2, 7]
    assert cards['pvt_tiny.in1k'].count('75.123% top-1') == 1
    assert hub.repo_files('me/pvt_tiny.in1k')['README.md'].decode() == cards['pvt_tiny.in1k']
    assert len(hub.commit_messages('me/pvt_tiny.in1k')) == 3 and len(hub.commit_messages('me/pvt_small.in1k')) == 2


def test_another_file_is_refused(public, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sources.SHA256, 'pvt_tiny.in1k', '0' * 64)
    assert main(['publish', '--to', 'me', '-o', str(tmp_path / 'out')]) == 2
    assert 'damaged' in capsys.readouterr().err and not (tmp_path / 'out').exists()
    assert main(['publish', '--to', 'me', '--only', 'pvt_huge.in1k']) == 2
    assert main(['publish', '--to', 'me/you']) == 2
    assert hub.count('POST') == 0
