""" benchmarks/training/imagenet.py on the labelled digits, with the known score of `test_pvt`. """
import json
import shutil

import pytest
import timm
from safetensors.torch import save_file

from pvt_timm.digits import write_digits
from tests.support.scripts import import_script

imagenet = import_script('training', 'imagenet')

NAME = 'test_pvt.digits'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp('digits') / 'data')


@pytest.fixture
def data(folder, tmp_path):
    """Return a copy of the data set, which a test may change."""
    return shutil.copytree(folder, tmp_path / 'data')


@pytest.fixture
def run(monkeypatch):
    def run(data, *args, published=99.17, name=NAME):
        monkeypatch.setattr(imagenet, 'PUBLISHED', {name: published})
        return imagenet.main(['--data-dir', str(data), '--models', name, '--workers', '0', '--device', 'cpu', *args])
    return run


def test_within_and_beyond_what_is_allowed(run, folder, capsys, tmp_path):
    assert run(folder, '--json', str(tmp_path / 'r.json')) == 0
    result = json.loads((tmp_path / 'r.json').read_text())['models'][NAME]
    assert (result['right'], result['images'], result['ok']) == (357, 360, True)
    assert result['top1'] == pytest.approx(100 * 357 / 360)
    for published in (99.0, 99.4):  # 0.17 below what is measured, and 0.23 above
        assert run(folder, published=published) == 1
        assert 'NOT within' in capsys.readouterr().out
    assert run(folder, '--allowed', '0.3', published=99.4) == 0


def test_scores_follow_the_labels(data):
    """If the folders of two classes swap their names, the images in them count as wrong."""
    validation = data / 'validation'
    (validation / '0').rename(validation / 'x')
    (validation / '1').rename(validation / '0')
    (validation / 'x').rename(validation / '1')
    assert imagenet.evaluate(NAME, data, workers=0)['right'] <= 357 - 70


def test_damaged_image_stops_and_is_named(run, data, capsys):
    file = next((data / 'validation' / '5').iterdir())
    file.write_bytes(file.read_bytes()[:60])
    assert run(data) == 2
    error = capsys.readouterr().err
    assert file.name in error and error.count('\n') == 1


@pytest.mark.parametrize('change, message', [
    (lambda validation: shutil.rmtree(validation / '0'), 'got 9'),
    (shutil.rmtree, "'validation'"),
])
def test_wrong_folder(run, data, capsys, change, message):
    change(data / 'validation')
    assert run(data) == 2
    assert message in capsys.readouterr().err


def test_wrong_weights(run, folder, capsys, tmp_path):
    save_file(timm.create_model('test_pvt').state_dict(), tmp_path / 'w.safetensors')
    assert run(folder, '--checkpoints', str(tmp_path / 'w.safetensors'), name='pvt_tiny.in1k') == 2
    assert 'holds test_pvt' in capsys.readouterr().err
    assert run(folder, '--checkpoints', 'a', 'b') == 2
    assert run(folder, '--models', 'resnet50') == 2
