""" Run timm's own test suite on the models of this package: `PYTHONPATH=.:tests/support python -m conformance.runner`.

`--merged` runs it on a copy of timm that holds the family itself. Further arguments go to pytest.

timm's wheel holds no tests, its source distribution does. The one of the installed version is fetched with pip (kept in
`PVT_TIMM_CACHE`, by default `pvt_timm` in the user's cache folder), unpacked into a temporary folder, and run there by
pytest with `plugin.py`. The only change to the unpacked files is that our names are appended to the lists of `FILTERS`.
"""
import argparse
import ast
import collections
import contextlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path
from typing import Any, Dict, List, Optional

import timm

import loopback

from . import weights
from .cases import FILES, FILTERS, MERGED, NAME_ARGUMENTS, reason

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / 'tests'))
from merge_into_timm import merge  # noqa: E402


def fetch_sdist(version: str = timm.__version__, cache: Optional[Path] = None) -> Path:
    """The source distribution of a timm version, from the cache or by pip.

    Raises:
        RuntimeError: pip could not get it (the message holds pip's).
    """
    if cache is None:
        cache = Path(os.environ.get('PVT_TIMM_CACHE') or Path.home() / '.cache' / 'pvt_timm')
    cache.mkdir(parents=True, exist_ok=True)
    sdist = cache / f'timm-{version}.tar.gz'
    if sdist.is_file() and tarfile.is_tarfile(sdist):
        return sdist
    download = ['download', '--quiet', '--no-deps', '--no-binary', ':all:', f'timm=={version}']
    with tempfile.TemporaryDirectory(dir=cache) as tmp:
        run = subprocess.run(
            [sys.executable, '-m', 'pip', *download, '--dest', tmp], capture_output=True, text=True)
        if run.returncode:
            # An old pip cannot read timm's build requirements (or there is no pip): again with a new one.
            venv.create(Path(tmp) / 'venv', with_pip=True)
            python = str(Path(tmp) / 'venv' / ('Scripts' if os.name == 'nt' else 'bin') / 'python')
            subprocess.run([python, '-m', 'pip', 'install', '--quiet', '--upgrade', 'pip'], capture_output=True)
            run = subprocess.run([python, '-m', 'pip', *download, '--dest', tmp], capture_output=True, text=True)
        found = list(Path(tmp).glob('timm-*.tar.gz'))
        if run.returncode or not found:
            raise RuntimeError(f'Cannot get the source distribution of timm {version} with pip: {run.stderr.strip()}')
        os.replace(found[0], sdist)
    return sdist


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack the tests of a source distribution, add our names to their filter lists, return their folder."""
    with tarfile.open(sdist) as tar:
        members = [m for m in tar.getmembers() if m.isfile() and Path(m.name).parts[1:2] in (('tests',),)]
        for m in members:
            # not under its name, which is that of this package's tests too
            target = folder / 'timm_tests' / Path(*Path(m.name).parts[2:])
            if '..' in target.parts:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(tar.extractfile(m).read())
    tests = folder / 'timm_tests'
    for file in FILES:
        if (tests / file).is_file():
            add_filters(tests / file)
    # timm's own settings are not part of `tests/`, only the names of the markers are needed
    (folder / 'pytest.ini').write_text('[pytest]\n')
    return tests


def add_filters(file: Path) -> None:
    """Append our names to the lists that are assigned at the top level of a file."""
    lines = file.read_text().splitlines(keepends=True)
    nodes = [
        node for node in ast.parse(''.join(lines)).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) in FILTERS]
    for node in reversed(nodes):
        name = node.targets[0].id
        lines.insert(node.end_lineno, f'{name} += {FILTERS[name]!r}  # added by pvt_timm\n')
    file.write_text(''.join(lines))


def functions_with_names(tests: Path) -> List[str]:
    """Names of all test functions in timm's tests that take a model name."""
    names = []
    for file in sorted(tests.glob('test_*.py')):
        arguments = NAME_ARGUMENTS if file.name in FILES else ('model_name',)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith('test_'):
                if any(a.arg in arguments for a in node.args.args):
                    names.append(node.name)
    return sorted(set(names))


def run(arguments: List[str] = (), merged: bool = False, capture: bool = True) -> Dict[str, Any]:
    """Run timm's tests, on this package or on a copy of timm that the family is merged into.

    Args:
        arguments: More arguments for pytest.
        merged: Run on such a copy.
        capture: Keep the output of pytest instead of printing it.

    Returns:
        `tests` (file, function, model, outcome, seconds, message of each), `functions` that take a model name, `timm`
        (version), `family` (module of the models), `imported` (whether pvt_timm was), `returncode` and `output`.
    """
    with tempfile.TemporaryDirectory(prefix='pvt_timm_') as tmp, contextlib.ExitStack() as stack:
        tmp = Path(tmp)
        tests = unpack(fetch_sdist(), tmp / 'timm')
        server = loopback.LoopbackServer()
        stack.callback(server.close)
        weights.add_weights(server, tmp / 'weights')
        env = loopback.isolate(tmp / 'home', server)
        env['PVT_CONFORMANCE_REPORT'] = str(tmp / 'report.json')
        env['PVT_CONFORMANCE_MIRROR'] = server.url
        family = ROOT
        if merged:
            env[MERGED] = '1'
            family = merge(tmp / 'merged').parent
        env['PYTHONPATH'] = os.pathsep.join((str(family), str(ROOT / 'tests' / 'support')))
        for name in ('GITHUB_ACTIONS', 'TORCH_DEVICE', 'TORCH_BACKEND', 'PYTEST_ADDOPTS'):
            env.pop(name, None)  # they drop or change timm's tests
        done = subprocess.run(
            [
                sys.executable, '-m', 'pytest', '-p', 'conformance.plugin', '-p', 'no:cacheprovider',
                '--rootdir', str(tests.parent), '-c', str(tests.parent / 'pytest.ini'), '-q', '--no-header',
                '-W', 'ignore', *[str(tests / f) for f in FILES if (tests / f).is_file()], *arguments],
            env=env, cwd=tmp, text=True,
            stdout=subprocess.PIPE if capture else None, stderr=subprocess.STDOUT if capture else None)
        report = tmp / 'report.json'
        if not report.is_file():
            raise RuntimeError(f"timm's tests could not be run:\n{done.stdout or ''}")
        return dict(
            json.loads(report.read_text()), functions=functions_with_names(tests),
            returncode=done.returncode, output=done.stdout or '')


def table(result: Dict[str, Any]) -> str:
    """Counts per test function."""
    counts = collections.defaultdict(collections.Counter)
    seconds = collections.Counter()
    for test in result['tests']:
        key = (test['file'], test['function'])
        counts[key][test['outcome']] += 1
        seconds[key] += test['seconds']
    lines = [f'timm {result["timm"]}, tests of its own suite on our models, from {result["family"]}']
    for key in sorted(counts):
        outcomes = ', '.join(f'{n} {outcome}' for outcome, n in sorted(counts[key].items()))
        lines.append(f'  {key[0][:-3]}::{key[1]:<55} {outcomes:<24} {seconds[key]:6.1f} s')
    total = sum(counts.values(), collections.Counter())
    outcomes = ', '.join(f'{n} {outcome}' for outcome, n in sorted(total.items()))
    lines.append(f'  {len(counts)} functions: {outcomes} in {sum(seconds.values()):.0f} s')
    reasons = collections.defaultdict(list)
    for function in result['functions']:
        if function not in {k[1] for k in counts}:
            reasons[(reason(function) or 'NO REASON GIVEN')].append(function)
    for why, functions in reasons.items():
        lines.append(f'  not run, {why}: {", ".join(functions)}')
    return '\n'.join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--merged', action='store_true')
    args, arguments = parser.parse_known_args()
    result = run(arguments, merged=args.merged, capture=False)
    print(table(result))
    return result['returncode']


if __name__ == '__main__':
    sys.exit(main())
