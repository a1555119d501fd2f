""" timm's scripts, unmodified, on these models and real images (scikit-learn's digits).

They are in no package of timm's. `TIMM_CHECKOUT` names a checkout of https://github.com/huggingface/pytorch-image-models.
"""
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import pvt_timm

CHECKOUT = os.environ.get('TIMM_CHECKOUT')
SCRIPTS = (
    'train.py', 'validate.py', 'inference.py', 'benchmark.py', 'onnx_export.py', 'avg_checkpoints.py',
    'clean_checkpoint.py')
MODELS = ('test_pvt', 'pvt_tiny')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHECKOUT, reason='TIMM_CHECKOUT does not name a checkout of huggingface/pytorch-image-models'),
]


@pytest.fixture(scope='module')
def scripts(tmp_path_factory):
    """Copies of the scripts, without the timm that lies next to them, so that they use the installed one."""
    folder = tmp_path_factory.mktemp('scripts')
    for name in SCRIPTS:
        shutil.copy(Path(CHECKOUT) / name, folder / name)
    return folder


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """An image folder with a few digits of each class."""
    from pvt_timm.digits import write_digits

    full = write_digits(tmp_path_factory.mktemp('all'))
    folder = tmp_path_factory.mktemp('digits')
    for split, count in (('train', 4), ('validation', 2)):
        for label in range(10):
            target = folder / split / str(label)
            target.mkdir(parents=True)
            for file in sorted((full / split / str(label)).iterdir())[:count]:
                shutil.copy(file, target)
    return folder


def run(client_env, folder, *arguments):
    env = dict(client_env, OMP_NUM_THREADS='2', PYTHONPATH=os.pathsep.join(
        filter(None, (str(Path(__file__).parents[2]), os.environ.get('PYTHONPATH')))))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=env, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def result_of(done):
    """What a script prints as JSON behind a line `--result`."""
    result = json.JSONDecoder().raw_decode(done.stdout.split('--result')[1].lstrip())[0]
    return result[0] if isinstance(result, list) else result


def launch(client_env, folder, script, *arguments):
    """Scripts without `--device-modules` go through this package's launcher."""
    return run(client_env, folder, '-m', 'pvt_timm', 'run', script, *arguments)


def size(model):
    return ('--img-size', 32) if model == 'test_pvt' else ('--img-size', 64)


@pytest.mark.parametrize('model', MODELS)
def test_train_and_checkpoint_scripts(model, scripts, digits, client_env, tmp_path):
    done = run(
        client_env, tmp_path, scripts / 'train.py', '--device-modules', 'pvt_timm', '--device', 'cpu',
        '--data-dir', digits, '--model', model, *size(model), '--num-classes', 10, '--batch-size', 10, '--epochs', 2,
        '--opt', 'adamw', '--lr', 1e-3, '--workers', 0, '--no-prefetcher', '--output', tmp_path, '--experiment', 'run',
        '--model-ema', '--seed', 0)
    assert f'Model {model} created' in done.stdout + done.stderr
    folder = tmp_path / 'run'
    with open(folder / 'summary.csv') as f:
        rows = list(csv.DictReader(f))
    assert [int(r['epoch']) for r in rows] == [0, 1] and all(float(r['train_loss']) > 0 for r in rows)
    checkpoint = folder / 'model_best.pth.tar'

    launch(
        client_env, tmp_path, scripts / 'avg_checkpoints.py', '--input', folder, '--output', tmp_path / 'average.pth')
    launch(
        client_env, tmp_path, scripts / 'clean_checkpoint.py', '--checkpoint', checkpoint, '--output',
        tmp_path / 'clean.pth', '--no-hash')
    for name in ('average.pth', 'clean.pth'):
        state_dict = torch.load(tmp_path / name, weights_only=True)
        assert 'stages.3.cls_token' in state_dict
        result = result_of(launch(
            client_env, tmp_path, scripts / 'validate.py', digits, '--model', model, *size(model), '--num-classes', 10,
            '--checkpoint', tmp_path / name, '--device', 'cpu', '--batch-size', 10, '--workers', 0, '--no-prefetcher',
            '--split', 'validation'))
        assert result['model'] == model and 0 <= result['top1'] <= 100


@pytest.mark.parametrize('options', [
    ('--train-img-sizes', 32, 64),
    ('--kd-model-name', 'test_pvt'),
    ('--opt', 'muon'),
], ids=str)
def test_options_of_train(options, scripts, digits, client_env, tmp_path):
    if options[0] not in (scripts / 'train.py').read_text():
        pytest.skip(f'this checkout of timm has no {options[0]}')
    run(
        client_env, tmp_path, scripts / 'train.py', '--device-modules', 'pvt_timm', '--device', 'cpu',
        '--data-dir', digits, '--model', 'test_pvt', '--num-classes', 10, '--batch-size', 10,
        '--epochs', 1, '--lr', 1e-3, '--workers', 0, '--no-prefetcher', '--output', tmp_path, '--experiment', 'run',
        *options)
    with open(tmp_path / 'run' / 'summary.csv') as f:
        row, = csv.DictReader(f)
    assert 0 < float(row['train_loss']) < 10 and 0 < float(row['eval_loss']) < 10


@pytest.mark.parametrize('reparam', [[], ['--reparam']], ids=['plain', 'reparam'])
def test_validate(reparam, scripts, digits, client_env, tmp_path):
    """The bundled weights recognise the digits."""
    done = launch(
        client_env, tmp_path, scripts / 'validate.py', digits, '--model', 'test_pvt', '--pretrained', '--device', 'cpu',
        '--batch-size', 10, '--workers', 0, '--no-prefetcher', '--split', 'validation', *reparam)
    assert result_of(done)['top1'] >= 90


def test_inference(scripts, digits, client_env, tmp_path):
    pytest.importorskip('pandas', reason='inference.py needs pandas')
    launch(
        client_env, tmp_path, scripts / 'inference.py', digits / 'validation', '--model', 'test_pvt', '--pretrained',
        '--device', 'cpu', '--batch-size', 10, '--workers', 0, '--topk', 1, '--results-dir', tmp_path,
        '--results-file', 'result', '--results-format', 'csv', '--fullname')
    with open(tmp_path / 'result.csv') as f:
        rows = list(csv.DictReader(f))
    correct = [Path(r['filename']).parent.name == r['label'] for r in rows]
    assert len(rows) == 20 and sum(correct) >= 18


def test_inference_of_pvt_tiny(scripts, digits, client_env, tmp_path):
    pytest.importorskip('pandas', reason='inference.py needs pandas')
    checkpoint = tmp_path / 'pvt_tiny.pth'  # without one, the script wants the published weights
    torch.save(pvt_timm.pvt_tiny().state_dict(), checkpoint)
    launch(
        client_env, tmp_path, scripts / 'inference.py', digits / 'validation', '--model', 'pvt_tiny', '--img-size', 64,
        '--checkpoint', checkpoint,
        '--device', 'cpu', '--batch-size', 10, '--workers', 0, '--topk', 1, '--results-dir', tmp_path,
        '--results-file', 'result', '--results-format', 'json')
    assert (tmp_path / 'result.json').stat().st_size > 0


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('arguments', [['--bench', 'infer', '--reparam'], ['--bench', 'train']], ids=['infer', 'train'])
def test_benchmark(arguments, model, scripts, client_env, tmp_path):
    result = result_of(launch(
        client_env, tmp_path, scripts / 'benchmark.py', '--model', model, '--device', 'cpu', '--num-warm-iter', 1,
        '--num-bench-iter', 10, '--batch-size', 2, *size(model), *arguments))
    assert result['model'] == model and 'error' not in result
    assert float(result['infer_samples_per_sec' if 'infer' in arguments else 'train_samples_per_sec']) > 0


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('arguments', [
    ['--check-forward'],
    ['--dynamic-size'],
    ['--dynamo'],
    ['--reparam'],
], ids=['static', 'dynamic', 'dynamo', 'reparam'])
def test_onnx_export(arguments, model, scripts, client_env, tmp_path):
    ort = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    if model == 'pvt_tiny' and arguments != ['--dynamic-size']:
        pytest.skip('the other forms are run on test_pvt')
    torch.manual_seed(0)
    reference = timm.create_model(model, num_classes=10).eval()
    torch.save(reference.state_dict(), tmp_path / 'weights.pth')
    launch(
        client_env, tmp_path, scripts / 'onnx_export.py', 'model.onnx', '--model', model, '--num-classes', 10,
        '--checkpoint', tmp_path / 'weights.pth', '--img-size', 64, '--batch-size', 2, *arguments)
    session = ort.InferenceSession(str(tmp_path / 'model.onnx'), providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    for size in ((64, 64), (96, 160)) if '--dynamic-size' in arguments else ((64, 64),):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = reference(x)
        torch.testing.assert_close(
            torch.from_numpy(session.run(None, {name: x.numpy()})[0]), expected, rtol=0, atol=1e-4)
