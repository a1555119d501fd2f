""" timm's scripts, unmodified, on these models and real images (scikit-learn's digits).

timm's packages do not contain them: `TIMM_CHECKOUT` names a checkout of
https://github.com/huggingface/pytorch-image-models.
"""
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pvt_timm.digits import write_digits

CHECKOUT = os.environ.get('TIMM_CHECKOUT')
LOADER = ('--device', 'cpu', '--batch-size', 10, '--workers', 0)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHECKOUT, reason='TIMM_CHECKOUT does not name a checkout of huggingface/pytorch-image-models'),
]


@pytest.fixture(scope='module')
def scripts(tmp_path_factory):
    """Return a folder with copies of the scripts. There they use the installed timm, not that of the checkout."""
    folder = tmp_path_factory.mktemp('scripts')
    for script in Path(CHECKOUT).glob('*.py'):
        shutil.copy(script, folder)
    return folder


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Return an image folder with 4 digits of each class."""
    folder = write_digits(tmp_path_factory.mktemp('digits'))
    for label in folder.glob('*/*'):
        for file in sorted(label.iterdir())[4:]:
            file.unlink()
    return folder


@pytest.fixture
def run(scripts, client_env, tmp_path):
    """Return a function that runs a script in `tmp_path` and returns its stdout.

    With `--device-modules` the script runs by itself, otherwise through `pvt-timm run`.
    """
    def run(script, *arguments):
        launcher = () if '--device-modules' in arguments else ('-m', 'pvt_timm', 'run')
        done = subprocess.run(
            [sys.executable, *launcher, scripts / script, *map(str, arguments)], cwd=tmp_path,
            env=dict(client_env, OMP_NUM_THREADS='2'), capture_output=True, text=True, timeout=550)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        return done.stdout
    return run


@pytest.fixture
def train(run, digits, tmp_path):
    """Return a function that runs train.py and returns the rows of its summary."""
    def train(*arguments):
        run('train.py', '--device-modules', 'pvt_timm', *LOADER, '--no-prefetcher', '--data-dir', digits,
            '--num-classes', 10, '--lr', 1e-3, '--output', tmp_path, '--experiment', 'run', *arguments)
        with open(tmp_path / 'run' / 'summary.csv', encoding='utf-8') as f:
            return list(csv.DictReader(f))
    return train


def result_of(stdout):
    """Return the JSON that a script prints after `--result`."""
    result = json.JSONDecoder().raw_decode(stdout.split('--result')[1].lstrip())[0]
    return result[0] if isinstance(result, list) else result


def test_train_and_checkpoint_scripts(train, run, digits, tmp_path):
    model = '--model', 'pvt_tiny', '--img-size', 64
    rows = train(*model, '--epochs', 2, '--opt', 'adamw', '--model-ema', '--seed', 0)
    assert [int(r['epoch']) for r in rows] == [0, 1] and all(float(r['train_loss']) > 0 for r in rows)

    run('avg_checkpoints.py', '--input', 'run', '--output', 'average.pth')
    run('clean_checkpoint.py', '--checkpoint', 'run/model_best.pth.tar', '--output', 'clean.pth', '--no-hash')
    for name in ('average.pth', 'clean.pth'):
        assert 'stages.3.cls_token' in torch.load(tmp_path / name, weights_only=True)
        result = result_of(run(
            'validate.py', digits, *LOADER, '--no-prefetcher', '--split', 'validation', *model, '--num-classes', 10,
            '--checkpoint', name))
        assert result['model'] == 'pvt_tiny' and 0 <= result['top1'] <= 100


@pytest.mark.parametrize('options', [
    ('--train-img-sizes', 32, 64),
    ('--kd-model-name', 'test_pvt'),
    ('--opt', 'muon'),
], ids=str)
def test_options_of_train(options, train, scripts):
    if options[0] not in (scripts / 'train.py').read_text():
        pytest.skip(f'this checkout of timm has no {options[0]}')
    row, = train('--model', 'test_pvt', '--epochs', 1, *options)
    assert 0 < float(row['train_loss']) < 10 and 0 < float(row['eval_loss']) < 10


@pytest.mark.parametrize('reparam', [[], ['--reparam']], ids=['plain', 'reparam'])
def test_validate(reparam, run, digits):
    """validate.py finds that the weights of the package recognise the digits."""
    stdout = run(
        'validate.py', digits, *LOADER, '--no-prefetcher', '--split', 'validation', '--model', 'test_pvt',
        '--pretrained', *reparam)
    assert result_of(stdout)['top1'] >= 90


def test_inference(run, digits, tmp_path):
    pytest.importorskip('pandas')
    run('inference.py', digits / 'validation', *LOADER, '--model', 'test_pvt', '--pretrained', '--topk', 1,
        '--results-dir', tmp_path, '--results-file', 'result', '--results-format', 'csv', '--fullname')
    with open(tmp_path / 'result.csv', encoding='utf-8') as f:
        correct = [Path(r['filename']).parent.name == r['label'] for r in csv.DictReader(f)]
    assert len(correct) == 40 and sum(correct) >= 36


@pytest.mark.parametrize('arguments', [['--bench', 'infer', '--reparam'], ['--bench', 'train']], ids=['infer', 'train'])
def test_benchmark(arguments, run):
    result = result_of(run(
        'benchmark.py', '--model', 'test_pvt', '--img-size', 32, '--device', 'cpu', '--num-warm-iter', 1,
        '--num-bench-iter', 10, '--batch-size', 2, *arguments))
    assert float(result[f'{arguments[1]}_samples_per_sec']) > 0
