""" Options of pytest that say which tests may be skipped. These hooks are those of tests/conftest.py. """
import re
from collections import Counter
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption(
        '--allowed-skips', metavar='FILE', help='fail on a skip whose reason matches no regular expression in FILE')
    parser.addoption(
        '--needed', metavar='NAMES', default='',
        help='comma-separated: fail on a skip whose reason holds one of these names, also if FILE allows it')


def _skipped(config):
    """Return the reports of skipped tests, and of skipped files with tests."""
    reports = config.pluginmanager.get_plugin('terminalreporter').stats.get('skipped', [])
    return [report for report in reports if isinstance(report.longrepr, tuple)]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    config = session.config
    if hasattr(config, 'workerinput'):
        return
    path = config.getoption('allowed_skips')
    lines = Path(path).read_text(encoding='utf-8').splitlines() if path else ['.*']
    allowed = [line for line in lines if line and not line.startswith('#')]
    needed = [name for name in config.getoption('needed').split(',') if name]
    reporter = config.pluginmanager.get_plugin('terminalreporter')
    for reason in sorted({report.longrepr[2] for report in _skipped(config)}):
        missing = [name for name in needed if name in reason]
        if missing:
            reporter.write_line(f'\nNeeded here ({", ".join(missing)}): {reason}', red=True)
        elif not any(re.search(line, reason) for line in allowed):
            reporter.write_line(f'\nNot on {path}: {reason}', red=True)
        else:
            continue
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    """If skips are checked, print the names of tests that were skipped because a checkout is missing."""
    if config.getoption('allowed_skips') is None:
        return
    for name in ('PVT_CHECKOUT', 'TIMM_CHECKOUT'):
        skipped = [report for report in _skipped(config) if name in report.longrepr[2]]
        counts = Counter(report.nodeid.partition('[')[0] for report in skipped)
        if counts:
            terminalreporter.section(f'not run without {name}: {len(skipped)} tests')
            for test, count in sorted(counts.items()):
                terminalreporter.write_line(f'{count:4d} {test}')
