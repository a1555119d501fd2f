""" `pvt-convert publish` against the loopback hub: small stand-ins for all public checkpoints. """
import dataclasses
import hashlib
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch

from pvt_timm import pvt, variants
from pvt_timm.formats.mapping import map_to_timm
from pvt_timm.detection import detector_to_mmdet, pvt_retinanet, retinanet_from_mmdet
from pvt_timm.files import read_checkpoint
from pvt_timm import sources
from weights_conversion import convert, push
from weights_conversion.cli import main
from tests.support import convert_files as files

DEPTHS = {'pvt_tiny': (1, 1, 1, 1), 'pvt_small': (1, 2, 1, 1), 'pvt_medium': (1, 1, 2, 1), 'pvt_large': (2, 1, 1, 1)}


def entrypoint(name, args):
    """Return a function that creates a variant with the arguments `args`, as a function of pvt.py does."""
    return lambda pretrained=False, **kwargs: pvt._create_pvt(name, pretrained, **{**args, **kwargs})


@pytest.fixture
def public(hub, token, tmp_path, monkeypatch):
    """Put small variants and their public files on the loopback server. Return the file of each tag."""
    for name, depths in DEPTHS.items():
        args = dict(depths=depths, embed_dims=(8, 16, 40, 64), num_heads=(1, 2, 5, 8))
        monkeypatch.setitem(variants.VARIANTS, name, args)
        monkeypatch.setitem(timm.models._registry._model_entrypoints, name, entrypoint(name, args))
    known, found = timm.models._registry._model_pretrained_cfgs, {}
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
            torch.manual_seed(0)
            model = pvt_retinanet(variant, num_classes=3, out_channels=16)
            found[tag] = files.save({'meta': {}, 'state_dict': detector_to_mmdet(model)}, tmp_path / f'{tag}.pth')
            url = hub.add_file(f'v2.0/{tag}_1x.pth', found[tag])
            monkeypatch.setitem(known, tag, dataclasses.replace(known[tag], url=url))
        monkeypatch.setitem(sources.SHA256, tag, sha256_of(found[tag])[:len(sources.SHA256[tag])])
    return found


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_interrupted_and_started_again(public, hub, no_waits, tmp_path, capsys):
    out = tmp_path / 'out'
    argv = ['publish', '--to', 'me', '-o', str(out)]
    hub.fail(500, 'me/pvt_medium.in1k/commit')
    assert main(argv) == 2 and '500' in capsys.readouterr().err
    assert hub.repo_files('me/pvt_small.in1k') and not hub.has_repo('me/pvt_large.in1k')
    hub.heal()
    for _ in range(2):  # nothing is left to be done by the last one
        assert main(argv) == 0
        commits = [hub.commit_messages(f'me/{tag}') for tag in public]
        assert commits == [['initial commit', 'Upload converted PVT weights']] * 7
        assert hub.count('GET', '/cdn/') == 4 and hub.count('GET', '/v2.0/') == 3  # each is fetched once
    for tag, path in public.items():
        check_repository(tag, path)


def check_repository(tag, path):
    """Check that an upload has the bits of the public file, in timm, transformers and torchvision."""
    import transformers
    from huggingface_hub import hf_hub_download

    repo, source = f'me/{tag}', read_checkpoint(path)
    expected = map_to_timm(source).state_dict
    model = timm.create_model(f'hf-hub:{repo}', pretrained=True)
    assert files.same(model.state_dict(), expected)
    kind = 'AutoModelForImageClassification' if tag.endswith('in1k') else 'AutoModel'
    wrapped = getattr(transformers, kind).from_pretrained(repo)
    assert files.same({k.removeprefix('timm_model.'): v for k, v in wrapped.state_dict().items()}, expected)
    card = Path(hf_hub_download(repo, 'README.md')).read_text(encoding='utf-8')
    for text in (f'# {tag}\n', sha256_of(path), 'license: apache-2.0', 'not measured', 'library_name: timm'):
        assert text in card
    assert ('verified against' in card) == tag.endswith('in1k')  # mmdetection is not there
    snippet = {}
    exec(re.search(r'```python\n(.*?)```', card, re.DOTALL)[1], snippet)
    if not tag.endswith('in1k'):
        assert files.same(snippet['detector'].state_dict(), retinanet_from_mmdet(source).state_dict())
    else:
        body = snippet['detector'].backbone.body.state_dict()
        assert files.same(body, {k.replace('stages.', 'stages_'): v for k, v in model.state_dict().items()
                                 if k.startswith('stages.') and 'cls_token' not in k and k != 'stages.3.pos_embed'}
                          | {'stages_3.pos_embed': expected['stages.3.pos_embed'][:, 1:]})


def test_commands_of_the_readme(public, hub, tmp_path, monkeypatch):
    """With --dry-run, folders are written without an upload. Cards have the accuracy that was measured."""
    monkeypatch.chdir(tmp_path)
    measured = {tag: dict(top1=75.123, top5=92.5, images=50000) for tag in ('pvt_tiny.in1k', 'pvt_large.in1k')}
    Path('results.json').write_text(json.dumps(dict(torch='2.9', timm='1.0', models=measured)), encoding='utf-8')
    text = (Path(__file__).parents[2] / 'weights_conversion' / 'README.md').read_text()
    commands = [line.replace('OWNER', 'me') for line in text.splitlines() if line.startswith('pvt-convert publish')]
    uploaded = []
    for command in commands:
        assert main([*shlex.split(command)[1:], '-q']) == 0
        uploaded.append(sum(hub.has_repo(f'me/{tag}') for tag in sources.SHA256))
        cards = {tag: Path('published', tag, 'README.md').read_text(encoding='utf-8') for tag in sources.SHA256}
        assert '75.1% top-1' in cards['pvt_tiny.in1k'] and 'box AP 40.4' in cards['pvt_small.retinanet_coco']
        found = [tag for tag, card in cards.items() if 'not measured' not in card]
        assert found == (list(measured) if '--measured' in command else [])
    assert uploaded == [0, 2, 7]
    assert cards['pvt_tiny.in1k'].count('75.123% top-1') == 1
    assert hub.repo_files('me/pvt_tiny.in1k')['README.md'].decode() == cards['pvt_tiny.in1k']
    assert len(hub.commit_messages('me/pvt_tiny.in1k')) == 3 and len(hub.commit_messages('me/pvt_small.in1k')) == 2


@pytest.fixture
def written(public, tmp_path, capsys):
    """Return a function that runs `publish`. A folder written by `publish --dry-run` is its attribute `folder`."""
    def run(owner='me', *argv):
        code = main(['publish', '--to', owner, '--only', 'pvt_tiny.in1k', '-o', str(tmp_path / 'out'), '-q', *argv])
        return code, capsys.readouterr().err

    assert run('me', '--dry-run') == (0, '')
    run.folder = tmp_path / 'out' / 'pvt_tiny.in1k'
    return run


def test_the_card_is_made_for_its_owner(written, hub):
    """The card names the owner, even if the folder was first written for another owner."""
    for owner in ('me', 'a.team'):
        assert written(owner) == (0, '')
        card = hub.repo_files(f'{owner}/pvt_tiny.in1k')['README.md'].decode()
        repos = set(re.findall(r"['/:]([\w.-]+/pvt_tiny\.in1k)", card))
        assert repos == {f'{owner}/pvt_tiny.in1k'} and card.count(repos.pop()) == 5
    assert 'hf-hub:Zetatech/pvt-tiny-224' in card  # where it comes from stays


def test_nothing_but_what_was_written_is_uploaded(written, hub):
    files_of = sorted(p.name for p in written.folder.iterdir())
    (written.folder / 'id_rsa').write_text('secret')
    (written.folder / 'sub').mkdir()
    (written.folder / 'sub' / 'id_rsa').write_text('secret')
    assert written() == (0, '')
    assert sorted(hub.repo_files('me/pvt_tiny.in1k')) == files_of == ['README.md', 'config.json', 'model.safetensors']


@pytest.mark.parametrize('change, says', [
    (lambda folder: (folder / 'model.safetensors').write_bytes(
        (folder / 'model.safetensors').read_bytes()[:1000]), 'model.safetensors is not what was written, it has 1,000'),
    (lambda folder: (folder / 'model.safetensors').write_bytes(
        (folder / 'model.safetensors').read_bytes()[:-1] + b'?'), 'model.safetensors is not what was written'),
    (lambda folder: (folder / 'model.safetensors').unlink(), 'model.safetensors is missing'),
    (lambda folder: (folder / 'config.json').write_text('{}'), 'config.json is not what was written, it has 2 bytes'),
    (lambda folder: (folder / 'README.md').write_text('# Mine'), 'README.md is not what was written'),
    (lambda folder: (folder.parent / f'{folder.name}.json').unlink(), 'was not written by publish'),
    (lambda folder: (folder.parent / f'{folder.name}.json').write_text('[]'), 'Cannot read'),
])
def test_a_folder_that_was_changed_is_refused(change, says, written, hub):
    change(written.folder)
    before = {p: p.read_bytes() for p in written.folder.parent.rglob('*') if p.is_file()}
    code, err = written()
    assert code == 2 and says in err and err.count('\n') == 1 and 'Move ' in err
    assert not hub.has_repo('me/pvt_tiny.in1k')
    assert {p: p.read_bytes() for p in written.folder.parent.rglob('*') if p.is_file()} == before
    written.folder.rename(written.folder.with_name('away'))  # what the line says
    assert written() == (0, '') and hub.has_repo('me/pvt_tiny.in1k')


@pytest.mark.parametrize('moment', ['before the folder', 'after the folder'])
def test_killed_between_the_folder_and_what_stands_beside_it(moment, public, hub, tmp_path, monkeypatch):
    """After a kill at either moment, the next run publishes.

    The JSON file beside the folder is written before the folder itself.
    """
    argv = ['publish', '--to', 'me', '--only', 'pvt_tiny.in1k', '-o', str(tmp_path), '-q']
    replace = os.replace

    def stopped(source, target):
        if Path(target).name == 'pvt_tiny.in1k':
            if moment == 'after the folder':
                replace(source, target)
            raise KeyboardInterrupt
        replace(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', stopped)
        assert main(argv) == 130
    assert (tmp_path / 'pvt_tiny.in1k.json').exists()
    assert main(argv) == 0 and hub.has_repo('me/pvt_tiny.in1k')


@pytest.mark.parametrize('how', ['publish', 'convert'])
def test_a_public_repository_gets_nothing_private(how, public, hub, tmp_path, capsys):
    hub.add_repo('me/pvt_tiny.in1k', {'a': 'b'})
    argv = ['publish', '--to', 'me', '--only', 'pvt_tiny.in1k', '-o', str(tmp_path / 'out')]
    if how == 'convert':
        argv = [str(public['pvt_tiny.in1k']), '-o', str(tmp_path / 'out'), '--push', 'me/pvt_tiny.in1k']
    assert main([*argv, '--private', '-q']) == 2
    error = capsys.readouterr().err
    assert 'me/pvt_tiny.in1k is public' in error and error.count('\n') == 1
    assert list(hub.repo_files('me/pvt_tiny.in1k')) == ['a'] and not hub.is_private('me/pvt_tiny.in1k')
    hub.clear()
    argv = [*argv, *(['--force'] if how == 'convert' else [])]
    for _ in range(2):  # made, then there and private
        assert main([*argv, '--private', '-q']) == 0
        assert hub.is_private('me/pvt_tiny.in1k') and len(hub.repo_files('me/pvt_tiny.in1k')) >= 3


def test_what_is_pushed_from_python(hub, token, tmp_path):
    """`push` uploads what a conversion writes, and refuses a folder that has other files."""
    folder = convert(files.save(files.make('mmdet'), tmp_path / 'x.pth'), tmp_path / 'out', keep_source=True).output
    assert list(push(folder, 'me/x')['files']) == [
        'README.md', 'config.json', 'model.safetensors', 'source/x.pth']
    for name in ('id_rsa', 'epoch_1.pth', '.env'):
        Path(folder, name).write_text('secret', encoding='utf-8')
        with pytest.raises(ValueError, match=re.escape(name)):
            push(folder, 'me/y')
        Path(folder, name).unlink()
    with pytest.raises(ValueError, match='thesis'):
        push(folder, 'me/y', files=['README.md', 'thesis.tex'])
    assert not hub.has_repo('me/y')
    (tmp_path / 'out' / 'id_rsa').write_text('secret')  # the command names what it wrote
    assert main([str(tmp_path / 'x.pth'), '-o', folder, '--force', '--push', 'me/z', '-q']) == 0
    assert sorted(hub.repo_files('me/z')) == ['README.md', 'config.json', 'model.safetensors']


def test_an_empty_repository_is_no_reason_to_keep_quiet(hub, tmp_path, capsys):
    """An empty --push is an error. It happens if a shell runs `--push "$REPO"` and REPO is not set."""
    file = files.save(files.make('original'), tmp_path / 'x.pth')
    assert main([str(file), '-o', str(tmp_path / 'out'), '--push', '', '-q']) == 2
    assert capsys.readouterr().err.count('\n') == 1 and not (tmp_path / 'out').exists()


def test_another_file_is_refused(public, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sources.SHA256, 'pvt_tiny.in1k', '0' * 64)
    assert main(['publish', '--to', 'me', '-o', str(tmp_path / 'out')]) == 2
    assert 'damaged' in capsys.readouterr().err and not list((tmp_path / 'out').iterdir())
    for mistake in (['--only', 'pvt_huge.in1k'], ['--to', 'me/you']):
        assert main(['publish', '--to', 'me', *mistake]) == 2
    assert hub.count('POST') == 0


@pytest.mark.parametrize('content', [
    '[]', '3', '{', '{"models": []}', '{"torch": "2", "timm": "1", "models": {"pvt_tiny.in1k": {"top1": "high"}}}'])
def test_measured_must_be_results(content, hub, tmp_path, capsys):
    file = tmp_path / 'results.json'
    file.write_text(content)
    assert main(['publish', '--to', 'me', '--measured', str(file), '-o', str(tmp_path / 'out')]) == 2
    error = capsys.readouterr().err
    assert 'imagenet.py' in error and 'results.json' in error and error.count('\n') == 1
    assert not hub.requests and not (tmp_path / 'out').exists()
