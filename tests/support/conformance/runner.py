""" Runs timm's own test suite on the models of this package, or on a copy of timm that has the models itself.

timm's wheel has no tests, but its source distribution has. The source distribution of the installed version is fetched
with pip and unpacked into a temporary folder. There pytest runs the tests with `plugin.py`. The only change to the
unpacked files is that our names are added to the lists of `FILTERS`.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List

import timm

from tests.merge_into_timm import merge
from tests.support import loopback
from tests.support.convert_files import serve

from .cases import FILES, FILTERS, MERGED, MODELS, NAME_ARGUMENTS

ROOT = Path(__file__).resolve().parents[3]


def fetch_tests(folder: Path) -> Path:
    """Unpack the tests of the installed timm, add our names to their filter lists, and return their folder."""
    subprocess.run([
        sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm',
        f'timm=={timm.__version__}', '--dest', str(folder)], check=True)
    sdist, = folder.glob('timm-*.tar.gz')
    shutil.unpack_archive(sdist, folder)  # `filter=` is not in every Python 3.10 and 3.11
    # not under its name, which is that of this package's tests too
    tests = Path(str(sdist).removesuffix('.tar.gz'), 'tests').rename(folder / 'timm_tests')
    for file in tests.glob('test_*.py'):
        text = file.read_text()
        for name, ours in FILTERS.items():  # lists that are assigned at the top level
            text = re.sub(rf'^{name} = \[', rf'{name} = [*{ours!r}, ', text, flags=re.MULTILINE)
        file.write_text(text)
    # timm's own settings are not part of `tests/`, only the names of the markers are needed
    (folder / 'pytest.ini').write_text('[pytest]\n')
    return tests


def functions_with_names(tests: Path) -> List[str]:
    """Return the names of all test functions of timm that take a model name."""
    names = set()
    for file in tests.glob('test_*.py'):
        arguments = NAME_ARGUMENTS if file.name in FILES else ('model_name',)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith('test_'):
                if any(a.arg in arguments for a in node.args.args):
                    names.add(node.name)
    return sorted(names)


def run(merged: bool) -> Dict[str, Any]:
    """Run timm's tests, on this package or (`merged`) on a copy of timm that the family is merged into.

    Returns:
        `tests` (function, model, outcome, message of each), `functions` that take a model name, `family` (module of the
        models), `imported` (whether pvt_timm was), `returncode` and `output`.
    """
    server = loopback.LoopbackServer()
    with tempfile.TemporaryDirectory(prefix='pvt_timm_') as tmp:
        tmp = Path(tmp)
        tests = fetch_tests(tmp)
        for tag in timm.list_pretrained([f'{name}*' for name in MODELS], exclude_filters='test_pvt*'):
            serve(server, tag, timm.create_model(tag.partition('.')[0]))
        env = loopback.isolate(tmp / 'home', server)
        report = tmp / 'report.json'
        env.update(PVT_CONFORMANCE_REPORT=str(report), PVT_CONFORMANCE_MIRROR=server.url)
        family = ROOT
        if merged:
            env[MERGED] = '1'
            family = merge(tmp / 'merged').parent
        env['PYTHONPATH'] = os.pathsep.join((str(family), str(ROOT)))
        for name in ('GITHUB_ACTIONS', 'TORCH_DEVICE', 'TORCH_BACKEND', 'PYTEST_ADDOPTS'):
            env.pop(name, None)  # they drop or change timm's tests
        done = subprocess.run(
            [
                sys.executable, '-m', 'pytest', '-p', 'tests.support.conformance.plugin', '-p', 'no:cacheprovider',
                '--rootdir', str(tmp), '-c', str(tmp / 'pytest.ini'), '-q', '--no-header', '--tb=short', '-W', 'ignore',
                *[str(tests / f) for f in FILES if (tests / f).is_file()]],
            env=env, cwd=tmp, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        server.close()
        assert report.is_file(), done.stdout
        return dict(
            json.loads(report.read_text()), functions=functions_with_names(tests),
            returncode=done.returncode, output=done.stdout)
