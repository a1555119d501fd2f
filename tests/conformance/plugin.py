""" pytest plugin that points timm's own tests at the models of this package.

Loaded by `runner.py` (`pytest -p tests.conformance.plugin`) in the process that runs timm's tests. It imports `pvt_timm`,
keeps our models only in every list of model names, adds them to the tests whose names are written out (`EXTENDED`), sends
downloads to a loopback server and writes the outcomes to `PVT_CONFORMANCE_REPORT`.
"""
import json
import os
from pathlib import Path

import pytest
import timm

import pvt_timm  # noqa: F401  registers the models

from . import weights
from .cases import EXTENDED, NAME_ARGUMENTS, is_ours

_outcomes = {}
_unused = set()  # test functions that take a model name and have none of ours
_server = None


def pytest_configure(config):
    global _server
    folder = os.environ.get('PVT_CONFORMANCE_WEIGHTS')
    if folder:
        _server = weights.serve(Path(folder))


def pytest_unconfigure(config):
    if _server is not None:
        _server.close()


def _split(argnames):
    return [n.strip() for n in argnames.split(',')] if isinstance(argnames, str) else list(argnames)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Replace the model names of a `parametrize` mark by ours."""
    name = metafunc.definition.originalname or metafunc.definition.name
    markers = metafunc.definition.own_markers
    for i, mark in enumerate(markers):
        if mark.name != 'parametrize':
            continue
        argnames = _split(mark.args[0])
        arg = next((n for n in argnames if n in NAME_ARGUMENTS), None)
        if arg is None:
            continue
        at = argnames.index(arg)

        def model_of(value):
            value = value.values if hasattr(value, 'values') and hasattr(value, 'marks') else value
            return value[at] if isinstance(value, (tuple, list)) else value

        ours = [v for v in mark.args[1] if isinstance(model_of(v), str) and is_ours(model_of(v))]
        if not ours:
            ours = EXTENDED.get(name, [])
        if ours:
            mark = pytest.mark.parametrize(mark.args[0], ours, **mark.kwargs).mark
            markers[i] = mark
        elif timm.is_model(str(model_of(mark.args[1][0])).split('.')[0]) if mark.args[1] else True:
            _unused.add(name)


def pytest_collection_modifyitems(config, items):
    keep, drop = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, 'callspec') else {}
        names = [params[n] for n in NAME_ARGUMENTS if isinstance(params.get(n), str)]
        (keep if names and is_ours(names[0]) else drop).append(item)
    config.hook.pytest_deselected(items=drop)
    items[:] = keep


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    entry = _outcomes.setdefault(item.nodeid, dict(
        file=Path(str(item.fspath)).name,
        function=item.originalname,
        model=next(item.callspec.params[n] for n in NAME_ARGUMENTS if n in item.callspec.params),
        outcome='passed', seconds=0., message=''))
    entry['seconds'] += report.duration
    if report.outcome != 'passed':
        entry['outcome'] = report.outcome
        entry['message'] = str(report.longrepr)[-4000:]


def pytest_sessionfinish(session):
    report = os.environ.get('PVT_CONFORMANCE_REPORT')
    if report:
        Path(report).write_text(json.dumps(dict(
            timm=timm.__version__, unused=sorted(_unused), tests=list(_outcomes.values()))))
