""" Fixtures for all tests. No test reaches a real model hub and none touches the caches of whoever runs them. """
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # the tests run in parallel, their operators need not

sys.path.insert(0, str(Path(__file__).parent / 'support'))
import loopback  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

# huggingface_hub reads its settings when it is imported, so the server has to be there before that.
if 'huggingface_hub' in sys.modules:
    raise pytest.UsageError('huggingface_hub was imported before tests/conftest.py: run pytest without that plugin.')
_scratch = tempfile.TemporaryDirectory(prefix='pvt_timm_tests_')
_server = loopback.LoopbackServer()
os.environ.update(loopback.isolate(Path(_scratch.name), _server))
for _name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE'):
    os.environ.pop(_name, None)


def pytest_unconfigure(config):
    _server.close()
    _scratch.cleanup()


def pytest_addoption(parser):
    parser.addoption(
        '--allowed-skips', metavar='FILE',
        help='Fail if a test is skipped for a reason that matches no line (regular expression) of FILE.')


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Ends the run with an error if a skip is not on the list of `--allowed-skips`."""
    path = session.config.getoption('allowed_skips')
    reporter = session.config.pluginmanager.get_plugin('terminalreporter')
    if path is None or reporter is None or hasattr(session.config, 'workerinput'):
        return
    lines = Path(path).read_text(encoding='utf-8').splitlines()
    allowed = [line for line in lines if line and not line.startswith('#')]
    skipped = [report.longrepr[2] for report in reporter.stats.get('skipped', []) if isinstance(report.longrepr, tuple)]
    for reason in sorted({reason for reason in skipped if not any(re.search(line, reason) for line in allowed)}):
        reporter.write_line(f'\nNot on {path}: {reason}', red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    """Every test has empty hub and torch caches, in this process and, through the environment, in subprocesses."""
    import huggingface_hub.file_download  # noqa: F401
    from huggingface_hub import constants

    root = tmp_path_factory.mktemp('caches')
    for name, value in loopback.isolate(root, _server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, 'HF_HOME', str(root / 'hf'))
    for name, module in list(sys.modules.items()):  # older clients copy it into the modules that use it
        if name.startswith('huggingface_hub') and 'HF_HUB_CACHE' in vars(module):
            monkeypatch.setattr(module, 'HF_HUB_CACHE', str(root / 'hf' / 'hub'))
    yield root


@pytest.fixture
def hub():
    """The loopback server, empty. `HF_ENDPOINT` points to it for all tests."""
    _server.clear()
    yield _server
    _server.clear()


@pytest.fixture
def hub_cache(own_caches):
    """Folder of the hub's cache of this test."""
    return own_caches / 'hf' / 'hub'


@pytest.fixture
def torch_cache(own_caches):
    """Folder where `torch.hub` keeps the downloads of this test."""
    return own_caches / 'torch' / 'hub' / 'checkpoints'


@pytest.fixture
def client_env(own_caches):
    """Environment for a client in a subprocess: this test's caches, the loopback server and this repository."""
    env = loopback.isolate(own_caches, _server)
    env['PYTHONPATH'] = os.pathsep.join(filter(None, (str(ROOT), env.get('PYTHONPATH'))))
    return env


@pytest.fixture
def no_waits(monkeypatch):
    """The hub's client retries without pauses."""
    import huggingface_hub.file_download
    import huggingface_hub.utils._http
    import time

    class Time:
        def __getattr__(self, name):
            return getattr(time, name)

        def sleep(self, seconds):
            pass

    for module in (huggingface_hub.file_download, huggingface_hub.utils._http):
        if hasattr(module, 'time'):
            monkeypatch.setattr(module, 'time', Time())


@pytest.fixture
def token(monkeypatch):
    """A token for uploads, set for this process and subprocesses (request it before `client_env`)."""
    monkeypatch.setenv('HF_TOKEN', loopback.LoopbackServer.TOKEN)
    return loopback.LoopbackServer.TOKEN
