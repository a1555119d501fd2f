""" The test suite of the installed timm on our models: with this package, and with the models merged into timm.

See `conformance/runner.py` and `merge_into_timm.py`.
"""
import collections

import pytest
import timm

import pvt_timm  # noqa: F401  registers the models
from tests.support.conformance.cases import MODELS, reason
from tests.support.conformance.runner import run

# What timm's own lists of models must have given to all of our models, so that an empty run cannot pass
EVERY_MODEL = (
    'test_model_forward', 'test_model_backward', 'test_model_default_cfgs_non_std', 'test_model_load_pretrained',
    'test_model_features_pretrained', 'test_model_forward_torchscript', 'test_model_forward_features',
    'test_model_forward_intermediates_features', 'test_model_forward_intermediates', 'test_model_forward_fx',
    'test_model_backward_fx', 'test_model_forward_fx_torchscript')
pytestmark = [pytest.mark.conformance, pytest.mark.timeout(3000)]


@pytest.fixture(scope='module', params=['package', 'merged'])
def result(request):
    return run(merged=request.param == 'merged')


def models_of(result):
    return {name for name in MODELS if name != 'test_pvt' or result['family'] == 'pvt_timm.pvt'}


def test_all_pass(result, capsys):
    functions = {t['function'] for t in result['tests']}
    with capsys.disabled():
        print(f"\ntimm {timm.__version__}: {len(result['tests'])} tests, {len(functions)} functions, "
              f"on the models of {result['family']}")
    assert result['tests'] and result['returncode'] == 0, result['output']
    wrong = [t for t in result['tests'] if t['outcome'] != 'passed']  # skipped ones too
    assert not wrong, wrong
    assert (result['family'], result['imported']) in (('pvt_timm.pvt', True), ('timm.models.pvt', False))


def test_every_model_runs(result):
    ran = collections.defaultdict(set)
    for test in result['tests']:
        ran[test['function']].add(test['model'].partition('.')[0])
    missing = {f: models_of(result) - ran[f] for f in EVERY_MODEL if models_of(result) - ran[f]}
    assert not missing
    tags = {t['model'] for t in result['tests'] if t['function'] == 'test_model_load_pretrained'}
    assert tags == {tag for tag in timm.list_pretrained() if tag.partition('.')[0] in models_of(result)}


def test_every_function_runs_or_has_a_reason(result):
    ran = {t['function'] for t in result['tests']}
    unexplained = [f for f in result['functions'] if f not in ran and not reason(f)]
    assert not unexplained, 'run these on our models or write down in EXCLUDED why not'
    assert not [f for f in ran if reason(f)], 'these run, so a reason why not is out of date'
