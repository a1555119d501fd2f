""" timm's own test suite, of the installed version, on our models. See `conformance/runner.py`. """
import collections

import pytest
import timm

import pvt_timm  # noqa: F401  registers the models
from conformance.cases import EXCLUDED, MODELS, reason
from conformance.runner import add_filters, run, table

# What timm's own lists of models must have given to all of our models, so that an empty run cannot pass
EVERY_MODEL = (
    'test_model_forward',
    'test_model_backward',
    'test_model_default_cfgs_non_std',
    'test_model_load_pretrained',
    'test_model_features_pretrained',
    'test_model_forward_torchscript',
    'test_model_forward_features',
    'test_model_forward_intermediates_features',
    'test_model_forward_intermediates',
    'test_model_forward_fx',
    'test_model_backward_fx',
    'test_model_forward_fx_torchscript',
)
pytestmark = [pytest.mark.slow, pytest.mark.conformance, pytest.mark.timeout(1800)]


@pytest.fixture(scope='module')
def result():
    return run(['--tb=short'])


def test_all_pass(result, capsys):
    with capsys.disabled():
        print('\n' + table(result))
    assert result['tests'] and result['returncode'] == 0, result['output']
    wrong = [t for t in result['tests'] if t['outcome'] != 'passed']  # skipped ones too
    assert not wrong, wrong


def test_every_model_runs(result):
    ran = collections.defaultdict(set)
    for test in result['tests']:
        ran[test['function']].add(test['model'].partition('.')[0])
    missing = {f: sorted(set(MODELS) - ran[f]) for f in EVERY_MODEL if set(MODELS) - ran[f]}
    assert not missing
    tags = {t['model'] for t in result['tests'] if t['function'] == 'test_model_load_pretrained'}
    assert tags == {tag for tag in timm.list_pretrained() if tag.partition('.')[0] in MODELS}


def test_every_function_runs_or_has_a_reason(result):
    ran = {t['function'] for t in result['tests']}
    unexplained = [f for f in result['functions'] if f not in ran and not reason(f)]
    assert not unexplained, 'run these on our models or write down in EXCLUDED why not'
    both = ran & set(EXCLUDED)
    assert not both, 'these run, so a reason why not is out of date'


def test_filters_are_added_to_the_lists_of_timm(tmp_path):
    file = tmp_path / 'test_models.py'
    file.write_text("NON_STD_FILTERS = [\n    'vit_*',\n]\nNUM = len(NON_STD_FILTERS)\nFEAT_INTER_FILTERS = ['eva']\n")
    add_filters(file)
    names = {}
    exec(compile(file.read_text(), file, 'exec'), names)
    assert names['NON_STD_FILTERS'] == ['vit_*', *(f'{n}*' for n in MODELS)] and names['NUM'] == len(MODELS) + 1
    assert names['FEAT_INTER_FILTERS'] == ['eva', 'pvt']


@pytest.mark.parametrize('pool', ['max', 'catavgmax', 'map'])
def test_unsupported_pooling_is_refused(pool):
    """What timm's `test_catavgmax_unsupported` asks, with our type of error."""
    with pytest.raises(ValueError, match='global_pool'):
        timm.create_model('test_pvt', global_pool=pool)
    model = timm.create_model('test_pvt', num_classes=5)
    with pytest.raises(ValueError, match='global_pool'):
        model.reset_classifier(7, pool)
    assert model.num_classes == 5 and model.global_pool == 'token'
