""" The ImageNet check, on the labelled digits: the same logic with the score that `test_pvt` is known for. """
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from pvt_timm.digits import write_digits

ROOT = Path(__file__).parents[2]
NAME = 'test_pvt.digits'


@pytest.fixture(scope='module')
def imagenet():
    spec = importlib.util.spec_from_file_location('imagenet', ROOT / 'benchmarks' / 'training' / 'imagenet.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp('digits') / 'data', ['validation'])


@pytest.fixture
def run(imagenet, folder, monkeypatch):
    def run(*args, published=99.17, data=folder):
        monkeypatch.setattr(imagenet, 'PUBLISHED', {NAME: published})
        return imagenet.main(['--data-dir', str(data), '--models', NAME, '--workers', '0', '--device', 'cpu', *args])
    return run


def test_within_and_beyond_what_is_allowed(run, capsys, tmp_path):
    assert run('--json', str(tmp_path / 'r.json')) == 0
    result = json.loads((tmp_path / 'r.json').read_text())['models'][NAME]
    assert (result['right'], result['images'], result['ok']) == (357, 360, True)
    assert result['top1'] == pytest.approx(100 * 357 / 360)
    assert ' ok' in capsys.readouterr().out
    # 0.17 above what is claimed here, and 0.23 below
    assert run(published=99.0) == 1
    assert 'NOT within' in capsys.readouterr().out
    assert run(published=99.4) == 1
    assert run('--allowed', '0.3', published=99.4) == 0


def test_published_numbers(imagenet):
    assert imagenet.PUBLISHED == {
        'pvt_tiny.in1k': 75.1, 'pvt_small.in1k': 79.8, 'pvt_medium.in1k': 81.2, 'pvt_large.in1k': 81.7}


def test_scores_follow_the_labels(run, imagenet, folder, tmp_path):
    """Images of one class in another's folder count as wrong."""
    shutil.copytree(folder, tmp_path / 'data')
    validation = tmp_path / 'data' / 'validation'
    (validation / '0').rename(validation / 'x')
    (validation / '1').rename(validation / '0')
    (validation / 'x').rename(validation / '1')
    result = imagenet.evaluate(NAME, tmp_path / 'data', workers=0)
    assert result['right'] <= 357 - 70


def test_damaged_image_stops_and_is_named(run, capsys, folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'data')
    file = next((tmp_path / 'data/validation/5').iterdir())
    file.write_bytes(file.read_bytes()[:60])
    assert run(data=tmp_path / 'data') == 2
    error = capsys.readouterr().err
    assert file.name in error and error.count('\n') == 1


@pytest.mark.parametrize('change', ['one class', 'too many', 'no split', 'none'])
def test_wrong_folder(run, capsys, folder, tmp_path, change):
    data = tmp_path / 'data'
    if change == 'one class':
        shutil.copytree(folder / 'validation' / '0', data / 'validation' / '0')
    elif change == 'too many':
        shutil.copytree(folder, data)
        shutil.copytree(folder / 'validation' / '0', data / 'validation' / 'extra')
    elif change == 'no split':
        shutil.copytree(folder / 'validation', data)
    assert run(data=data) == 2
    error = capsys.readouterr().err
    assert {'one class': 'got 1', 'too many': 'got 11'}.get(change, "'validation'") in error


def test_wrong_weights(run, imagenet, capsys, folder, tmp_path, monkeypatch):
    import timm
    from safetensors.torch import save_file
    save_file(timm.create_model('test_pvt').state_dict(), tmp_path / 'w.safetensors')
    monkeypatch.setattr(imagenet, 'PUBLISHED', {'pvt_tiny.in1k': 75.1})
    args = ['--data-dir', str(folder), '--models', 'pvt_tiny.in1k', '--workers', '0', '--device', 'cpu']
    assert imagenet.main([*args, '--checkpoints', str(tmp_path / 'w.safetensors')]) == 2
    assert 'holds test_pvt' in capsys.readouterr().err
    assert imagenet.main([*args[:2], '--models', 'resnet50']) == 2
    assert imagenet.main([*args, '--checkpoints', 'a', 'b']) == 2
