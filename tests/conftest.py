""" Fixtures for all tests. No test reaches a real model hub, and none uses the caches of the user who runs them. """
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # the tests run in parallel, their operators need not

from tests.support import loopback  # noqa: E402
from tests.support.skips import (  # noqa: E402, F401
    pytest_addoption, pytest_sessionfinish, pytest_terminal_summary)

ROOT = Path(__file__).resolve().parent.parent

# huggingface_hub reads its settings when it is imported, so the server has to be there before that.
assert 'huggingface_hub' not in sys.modules, 'run pytest without the plugin that imports huggingface_hub'
_scratch = tempfile.TemporaryDirectory(prefix='pvt_timm_tests_')
_server = loopback.LoopbackServer()
_env = loopback.isolate(Path(_scratch.name), _server)
os.environ.clear()
os.environ.update(_env)


def pytest_unconfigure(config):
    _server.close()
    _scratch.cleanup()


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    """Give every test empty caches of the hub and of torch, and an empty server. Subprocesses have them too."""
    import huggingface_hub.file_download  # noqa: F401

    _server.clear()
    root = tmp_path_factory.mktemp('caches')
    for name, value in loopback.isolate(root, _server).items():
        monkeypatch.setenv(name, value)
    for name, module in list(sys.modules.items()):  # older clients copy the settings into the modules that use them
        for setting in ('HF_HOME', 'HF_HUB_CACHE'):
            if name.startswith('huggingface_hub') and setting in vars(module):
                monkeypatch.setattr(module, setting, os.environ[setting])
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def hub():
    """Return the loopback server. `HF_ENDPOINT` points to it in all tests."""
    return _server


@pytest.fixture
def client_env(own_caches):
    """Return an environment for subprocesses, with this test's caches, the loopback server and this repository."""
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))}


@pytest.fixture
def no_waits(monkeypatch):
    """Let the hub's client retry without pauses."""
    monkeypatch.setattr('time.sleep', lambda seconds: None)


@pytest.fixture
def token(monkeypatch):
    """Set a token for uploads. The client needs one, the server does not check it."""
    monkeypatch.setenv('HF_TOKEN', 'hf_loopback')
