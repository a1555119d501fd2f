"""The package as a whole: torch.hub, no code for one operating system only, the notes of a release."""
import re
import shutil
from pathlib import Path

import pytest

from pvt_timm.version import __version__

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_torch_hub(python):
    done = python('-c', f"""if True:
        import torch
        import timm
        model = torch.hub.load({str(ROOT)!r}, 'pvt_small', source='local', num_classes=3)
        print(type(model).__name__, tuple(model(torch.zeros(1, 3, 64, 64)).shape))
        for name in timm.list_models('*pvt_*', module='pvt') + ['test_pvt']:
            torch.hub.load({str(ROOT)!r}, name, source='local', device='meta')""")
    assert done.stdout == 'PyramidVisionTransformer (1, 3)\n', done.stderr


def test_no_paths_of_one_system():
    """The package uses no paths or modules that only Linux has. (ruff finds text without an encoding.)"""
    for file in (*ROOT.glob('pvt_timm/**/*.py'), *ROOT.glob('weights_conversion/**/*.py')):
        text = file.read_text(encoding='utf-8')
        found = re.findall(r'os\.rename\(|/dev/|/proc/|[\'"]/tmp|^import (?:fcntl|resource)\b', text, re.MULTILINE)
        assert not found, (file, found)


SKIPPED = '''
import pytest
@pytest.mark.parametrize('name', ['openvino', 'pyarrow.parquet'])
def test_skipped(name):
    pytest.skip(f'could not import {name!r}')
def test_passes():
    pass
'''


@pytest.mark.parametrize('allowed, options, says', [
    ("# why\n'(nncf|openvino|pyarrow.*)'\n", [], ''),
    ("'(nncf|openvino|pyarrow.*)'\n", ['-k', 'passes', '--needed', 'openvino'], ''),
    ("'(nncf|openvino|pyarrow.*)'\n", ['--needed', 'nncf,GPU'], ''),
    ("'(nncf|openvino|pyarrow.*)'\n", ['--needed', 'nncf,pyarrow'], 'Needed here (pyarrow): Skipped: could not'),
    ("'openvino'\n", [], "Not on allowed: Skipped: could not import 'pyarrow.parquet'"),
    (None, ['--needed', 'openvino'], 'Needed here (openvino): Skipped: could'),
    (None, [], ''),
])
def test_which_skips_fail_a_run(python, tmp_path, allowed, options, says):
    """A skip fails a run if its reason is not in the file of allowed ones, or names something that the run needs."""
    (tmp_path / 'test_it.py').write_text(SKIPPED)
    if allowed is not None:
        (tmp_path / 'allowed').write_text(allowed)
        options = [*options, '--allowed-skips=allowed']
    done = python('-m', 'pytest', '-q', '-p', 'tests.support.skips', '-p', 'no:cacheprovider', *options,
                  PYTEST_ADDOPTS='', PYTEST_DISABLE_PLUGIN_AUTOLOAD='1')
    assert done.returncode == bool(says) and says in done.stdout, done.stdout + done.stderr
    assert done.stdout.count('Needed here') + done.stdout.count('Not on') == bool(says)


def test_release_notes(python, tmp_path):
    """The script prints the section of the version, and refuses a wrong tag, date or address."""
    for name in ('.ci/release_notes.py', 'pvt_timm/version.py'):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    news = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8') + '\n## [0.0.1] - 2020-01-01\n\n- Older news\n'
    project = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    address = re.search(r'^Repository = "https://github\.com/(.+)"$', project, re.MULTILINE)[1]
    this, day = f'v{__version__}', '2026-01-31'
    for date, tag, repository, says in (
            (day, this, 'someone/pvt-timm', ''),
            ('soon', this, 'someone/pvt-timm', 'Expected a section'),
            (day, 'v9', 'someone/pvt-timm', 'Expected the tag'),
            (day, this, 'OWNER/pvt-timm', 'Expected the address'),
            (day, this, 'someone-else/pvt-timm', 'Expected the address')):
        text = re.sub(r'## \[(Unreleased\]|\d.*)', f'## [{__version__}] - {date}', news, count=1)
        (tmp_path / 'CHANGELOG.md').write_text(text, encoding='utf-8')
        (tmp_path / 'pyproject.toml').write_text(project.replace(address, repository), encoding='utf-8')
        done = python('.ci/release_notes.py', tag, GITHUB_REPOSITORY='someone/pvt-timm')
        assert done.returncode == bool(says) and says in done.stderr
        assert ('### Models' in done.stdout) != bool(says) and 'Older' not in done.stdout
