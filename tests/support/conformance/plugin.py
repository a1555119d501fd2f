""" pytest plugin that points timm's own tests at the models of this package.

`runner.py` loads it (`pytest -p tests.support.conformance.plugin`) in the process that runs timm's tests. The plugin

- imports `pvt_timm`, unless timm itself has the models,
- removes all models but ours from lists of model names,
- adds our models to tests in which names are written out (`EXTENDED`),
- sends downloads from urls to the loopback server,
- writes the results to `PVT_CONFORMANCE_REPORT`.
"""
import json
import os
import sys
from pathlib import Path
from urllib.parse import urlparse

import pytest
import timm
from timm.models import _registry

from .cases import EXTENDED, MERGED, MODELS, NAME_ARGUMENTS, is_ours

if MERGED not in os.environ:
    import pvt_timm  # noqa: F401  registers the models

_outcomes = {}

for _tag in timm.list_pretrained([f'{name}*' for name in MODELS]):
    _cfg = _registry._model_pretrained_cfgs[_tag]
    if _cfg.url and not _cfg.hf_hub_id:
        _cfg.url = f'{os.environ["PVT_CONFORMANCE_MIRROR"]}{urlparse(_cfg.url).path}'


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Keep only our models in a `parametrize` mark, and add further ones of ours."""
    name = metafunc.definition.originalname or metafunc.definition.name
    markers = metafunc.definition.own_markers
    for i, mark in enumerate(markers):
        if mark.name != 'parametrize':
            continue
        argnames = mark.args[0]
        argnames = [n.strip() for n in argnames.split(',')] if isinstance(argnames, str) else list(argnames)
        arg = next((n for n in argnames if n in NAME_ARGUMENTS), None)
        if arg is None:
            continue
        models = [(_model(value, argnames.index(arg)), value) for value in [*mark.args[1], *EXTENDED.get(name, [])]]
        ours = [value for model, value in models if is_ours(model)]
        if ours:
            markers[i] = pytest.mark.parametrize(mark.args[0], ours, **mark.kwargs).mark


def _model(value, index):
    value = getattr(value, 'values', value)  # pytest.param
    value = value[index] if isinstance(value, (tuple, list)) else value
    return value if isinstance(value, str) else ''


def pytest_collection_modifyitems(config, items):
    keep, drop = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, 'callspec') else {}
        names = [params[n] for n in NAME_ARGUMENTS if isinstance(params.get(n), str)]
        (keep if names and is_ours(names[0], item.originalname) else drop).append(item)
    config.hook.pytest_deselected(items=drop)
    items[:] = keep


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    entry = _outcomes.setdefault(item.nodeid, dict(
        function=item.originalname,
        model=next(item.callspec.params[n] for n in NAME_ARGUMENTS if n in item.callspec.params),
        outcome='passed', message=''))
    if report.outcome != 'passed':
        entry.update(outcome=report.outcome, message=str(report.longrepr)[-4000:])


def pytest_sessionfinish(session):
    Path(os.environ['PVT_CONFORMANCE_REPORT']).write_text(json.dumps(dict(
        tests=list(_outcomes.values()),
        family=timm.model_entrypoint('pvt_tiny').__module__, imported='pvt_timm' in sys.modules)), encoding='utf-8')
