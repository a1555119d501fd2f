""" A downloaded file is complete or does not exist, and is not larger than allowed, whatever the server sends. """
import io
import contextlib
import urllib.error

import pytest

from pvt_timm.download import download
from pvt_timm.files import MAX_BYTES, CheckpointError
from weights_conversion import inspect

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def url(hub):
    return hub.add_file('weights/x.pth', CONTENT)


def test_what_comes_is_saved(hub, url, tmp_path):
    file = tmp_path / 'x.pth'
    file.write_bytes(b'old')
    assert download(url, file, max_bytes=len(CONTENT)) == file
    assert file.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [file]
    assert download(hub.add_file('empty', b''), str(tmp_path / 'y')).read_bytes() == b''
    with pytest.raises(ValueError, match='http'):
        download(f'file://{file}', tmp_path / 'z')


@pytest.mark.parametrize('user', ['user:secret', 'secret'])
def test_a_user_in_the_address_is_refused_and_not_shown(url, tmp_path, user):
    with pytest.raises(ValueError, match='without a user and a password') as e:
        download(url.replace('://', f'://{user}@'), tmp_path / 'x.pth')
    assert 'secret' not in str(e.value)


def test_what_is_too_large_is_not_fetched(hub, url, tmp_path):
    with pytest.raises(CheckpointError, match='Expected at most 0.3 MB, x.pth has 0.3 MB'):
        download(url, tmp_path / 'x.pth', max_bytes=len(CONTENT) - 1)
    hub.fail('claim')
    with pytest.raises(CheckpointError, match='Expected at most 7858.4 MB, x.pth has 10000000.0 MB'):
        download(url, tmp_path / 'x.pth')
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_never_ends_is_left(hub, url, tmp_path):
    hub.fail('endless')
    with pytest.raises(CheckpointError, match='Expected at most 2.0 MB, x.pth has'):
        download(url, tmp_path / 'x.pth', max_bytes=2_000_000)
    assert hub.sent < 20_000_000  # with what fits into the buffers of both
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('kind, error, match', [
    ('truncate', ConnectionError, '128000 of 256000 bytes came'), ('part', ConnectionError, 'broke off'),
    ('drop', OSError, ''), (404, urllib.error.HTTPError, '404')])
def test_what_breaks_off_is_an_error(kind, error, match, hub, url, tmp_path):
    (tmp_path / 'x.pth').write_bytes(b'old')
    hub.fail(kind)
    with pytest.raises(error, match=match):
        download(url, tmp_path / 'x.pth')
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b'old']


def test_ctrl_c_leaves_nothing(url, tmp_path, monkeypatch):
    def interrupted(response):
        raise KeyboardInterrupt

    monkeypatch.setattr('pvt_timm.download._read', interrupted)
    with pytest.raises(KeyboardInterrupt):
        download(url, tmp_path / 'x.pth')
    assert list(tmp_path.iterdir()) == []


def test_bar(url, tmp_path):
    for progress in (True, False):
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            download(url, tmp_path / 'x.pth', progress=progress)
        assert ('100%' in err.getvalue()) == progress


def test_the_limit_of_a_command_holds_while_it_downloads(hub, url):
    hub.fail('endless')
    with pytest.raises(CheckpointError, match='Expected at most 1.0 MB'):
        inspect(url, max_bytes=1_000_000)
    assert hub.sent < 20_000_000 < MAX_BYTES
