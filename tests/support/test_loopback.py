""" The loopback hub against the real huggingface_hub client, so that the tests built on it can be trusted. """
import subprocess
import sys
import urllib.error
import urllib.request

import huggingface_hub
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.utils import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

OLD, NEW = 'a' * 40, 'b' * 40
DATA = bytes(range(256)) * 400


@pytest.fixture
def repo(hub):
    hub.add_repo('someone/model', {'config.json': '{"old": 1}', 'model.safetensors': DATA[::-1]}, commit=OLD)
    hub.add_repo('someone/model', {'config.json': '{}', 'sub/x.txt': 'x', 'model.safetensors': DATA}, commit=NEW)
    return 'someone/model'


def test_download(hub, repo, hub_cache):
    path = hf_hub_download(repo, 'model.safetensors')
    assert path.startswith(str(hub_cache)) and open(path, 'rb').read() == DATA
    assert open(hf_hub_download(repo, 'config.json')).read() == '{}'
    assert open(hf_hub_download(repo, 'config.json', revision=OLD)).read() == '{"old": 1}'
    gets = hub.count('GET', 'model.safetensors')
    assert hf_hub_download(repo, 'model.safetensors') == path and hub.count('GET', 'model.safetensors') == gets


def test_look_up(hub, repo):
    api = HfApi()
    info = api.model_info(repo, files_metadata=True)
    assert info.sha == NEW and {s.rfilename: s.size for s in info.siblings}['model.safetensors'] == len(DATA)
    assert api.model_info(repo, revision=OLD).sha == OLD
    assert sorted(api.list_repo_files(repo)) == ['config.json', 'model.safetensors', 'sub/x.txt']
    assert api.file_exists(repo, 'config.json') and not api.file_exists(repo, 'nothing')
    assert [f.path for f in api.get_paths_info(repo, ['model.safetensors', 'nothing'])] == ['model.safetensors']
    assert open(snapshot_download(repo) + '/sub/x.txt').read() == 'x'


def test_not_found(hub, repo):
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo, 'nothing')
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(repo, 'config.json', revision='c' * 40)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download('someone/else', 'config.json')


@pytest.mark.skipif(int(huggingface_hub.__version__.split('.')[0]) < 1, reason='huggingface_hub < 1 does not resume')
@pytest.mark.parametrize('kind', ['truncate', 'drop'])
def test_client_resumes_after_one_fault(hub, repo, no_waits, kind):
    hub.fail(kind, 'cdn/', method='GET', times=1)
    assert open(hf_hub_download(repo, 'model.safetensors'), 'rb').read() == DATA
    assert hub.count('GET', 'cdn/') == 2


@pytest.mark.parametrize('kind', ['truncate', 'short', 'drop', 404, 500])
def test_client_gives_up(hub, repo, no_waits, hub_cache, kind):
    hub.fail(kind, 'cdn/')
    with pytest.raises(Exception):  # noqa: B017
        hf_hub_download(repo, 'model.safetensors')
    hub.heal()
    assert open(hf_hub_download(repo, 'model.safetensors'), 'rb').read() == DATA


def test_plain_files(hub, tmp_path):
    (tmp_path / 'x').write_bytes(DATA)
    url = hub.add_file('a/x.pth', tmp_path / 'x')
    assert urllib.request.urlopen(url).read() == DATA
    assert urllib.request.urlopen(hub.add_redirect('b/x.pth', url)).read() == DATA
    with pytest.raises(urllib.error.HTTPError, match='404'):
        urllib.request.urlopen(hub.url + '/nothing')
    request = urllib.request.Request(url, headers={'Range': 'bytes=100-199'})
    assert urllib.request.urlopen(request).read() == DATA[100:200]
    hub.fail('garbage', 'x.pth')
    assert urllib.request.urlopen(url).read() == bytes(len(DATA))


def test_upload(hub, token, tmp_path):
    api = HfApi()
    assert api.whoami()['name'] == 'loopback'
    api.create_repo('someone/new')
    api.create_repo('someone/new', exist_ok=True)
    (tmp_path / 'model.safetensors').write_bytes(DATA)
    (tmp_path / 'README.md').write_text('---\nlibrary_name: timm\n---\nHello\n')
    api.upload_folder(repo_id='someone/new', folder_path=tmp_path, commit_message='All of it')
    assert hub.repo_files('someone/new') == {
        'model.safetensors': DATA, 'README.md': (tmp_path / 'README.md').read_bytes()}
    assert hub.commit_messages('someone/new')[-1] == 'All of it'
    assert open(hf_hub_download('someone/new', 'model.safetensors'), 'rb').read() == DATA
    api.upload_file(path_or_fileobj=b'{}', path_in_repo='config.json', repo_id='someone/new')
    assert hub.repo_files('someone/new')['config.json'] == b'{}' and len(hub.repo_files('someone/new')) == 3


def test_upload_needs_a_token(hub):
    with pytest.raises(Exception, match='401'):
        HfApi().create_repo('someone/new')
    assert not hub.has_repo('someone/new')


def test_subprocess(hub, repo, client_env, hub_cache):
    code = "from huggingface_hub import hf_hub_download; print(hf_hub_download('someone/model', 'config.json'))"
    run = subprocess.run([sys.executable, '-c', code], env=client_env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stdout.startswith(str(hub_cache)), run.stderr
