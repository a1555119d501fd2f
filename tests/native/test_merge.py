""" `pvt.py` in a copy of timm. timm's own tests run there too, see test_timm_conformance.py. """
import json
import os
import subprocess
import sys

import pytest
import timm
import torch

from tests import merge_into_timm
from pvt_timm import _input

# What a model of few blocks computes, in timm and here
PROGRAM = '''
import json, sys
import timm, torch

def facts(model):
    x = torch.linspace(-1, 1, 3 * 64 * 96).reshape(1, 3, 64, 96)
    outputs = model(x) if isinstance(model(x), list) else [model(x)]
    return [list(model.state_dict()), [output.flatten()[:50].tolist() for output in outputs]]

result = {}
for name, kwargs in (('classifier', {}), ('features', dict(features_only=True))):
    torch.manual_seed(0)
    result[name] = facts(timm.create_model('pvt_tiny', depths=(1, 1, 1, 1), **kwargs).eval())
result['modules'] = sorted({name.partition('.')[0] for name in sys.modules if name.startswith('pvt_timm')})
result['file'] = timm.__file__
print(json.dumps(result))
'''


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    if not _input.RECORDS_INPUT:
        pytest.skip(f'timm {timm.__version__} has no models/_input.py, which pvt.py imports there')
    return merge_into_timm.merge(tmp_path_factory.mktemp('merged'))


def test_import_lines_are_all_that_differs(copy):
    before, after = (folder.read_text() for folder in (merge_into_timm.PACKAGE / 'pvt.py', copy / 'models' / 'pvt.py'))
    changed = merge_into_timm.changed_lines(before, after)
    assert len(changed) == sum(before.count(f'\nfrom {here}') for here in merge_into_timm.PLACES) == 7
    assert 'pvt_timm' not in after and 'timm.models' not in after


@pytest.mark.parametrize('change', [
    ('mlp_layer: Callable[..., nn.Module] = Mlp', 'mlp_layer: Callable[..., nn.Module] = SlicedMlp'),
    ('from ._input import update_model_input_size\n', ''),
    ('import fit_to_model', 'import fit_to_model as fit'),
    ('import logging', 'import warnings'),
])
def test_any_other_change_is_refused(change):
    before = (merge_into_timm.PACKAGE / 'pvt.py').read_text()
    assert before.count(change[0])
    with pytest.raises(ValueError, match='Expected'):
        merge_into_timm.changed_lines(before, before.replace(*change))


def test_models_of_the_copy(copy, tmp_path):
    """The copy of timm has the same weights and outputs as this package, without importing it."""
    env = {**os.environ, 'PYTHONPATH': str(copy.parent)}
    run = subprocess.run(
        [sys.executable, '-c', PROGRAM], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result['file'] == str(copy / '__init__.py') and result['modules'] == []
    for name, kwargs in (('classifier', {}), ('features', dict(features_only=True))):
        torch.manual_seed(0)
        model = timm.create_model('pvt_tiny', depths=(1, 1, 1, 1), **kwargs).eval()
        x = torch.linspace(-1, 1, 3 * 64 * 96).reshape(1, 3, 64, 96)
        output = model(x)
        keys, values = result[name]
        assert keys == list(model.state_dict())
        got = output if isinstance(output, list) else [output]
        for a, b in zip(got, values, strict=True):
            torch.testing.assert_close(a.flatten()[:50], torch.tensor(b), rtol=1e-5, atol=1e-6)


def test_style_of_the_copy(copy):
    """The copy follows pycodestyle and pyflakes with 120 columns, as timm's guide says.

    timm has no settings for ruff.
    """
    pytest.importorskip('ruff')
    files = [copy / 'models' / 'pvt.py', copy / 'models' / '_pvt_formats']
    run = subprocess.run(
        [sys.executable, '-m', 'ruff', 'check', '--isolated', '--no-cache', '--line-length', '120',
         '--select', 'E,F,W', *map(str, files)],
        capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
