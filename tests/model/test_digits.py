""" The digits as an image folder, and what `test_pvt` scores on the held-out ones. """
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_dataset, create_loader, resolve_model_data_config

import pvt_timm
from pvt_timm import digits
from pvt_timm.cli.main import main

PACKAGE = Path(pvt_timm.__file__).parent


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return digits.write_digits(tmp_path_factory.mktemp('digits') / 'data')


def test_folder_is_complete_and_the_same_every_time(folder):
    train, held_out = (sorted(folder.glob(f'{split}/*/*.png')) for split in ('train', 'validation'))
    assert (len(train), len(held_out)) == (1437, 360)
    assert {f.name for f in train}.isdisjoint(f.name for f in held_out)
    assert [len(list(folder.glob(f'validation/{label}/*.png'))) for label in range(10)] == [36] * 10
    assert sorted(p.name for p in folder.iterdir()) == ['train', 'validation']

    # the pixels, which unlike the compressed files do not depend on the versions of the libraries
    digest = hashlib.sha256()
    for file in train + held_out:
        with Image.open(file) as image:
            assert (image.mode, image.size) == ('L', (32, 32))
            digest.update(f'{file.parent.name}/{file.name}'.encode())
            digest.update(np.asarray(image).tobytes())
    assert digest.hexdigest() == '093a9aad32ca441f3a119b8f2e76977024c3d2f1c723709fbdbec769ae5b9927'


def test_bundled_digits_are_held_out(folder):
    bundled = list((PACKAGE / 'data' / 'digits').glob('*.png'))
    assert len(bundled) == 40
    for path in bundled:
        label, name = path.name.split('_')
        assert np.array_equal(np.array(Image.open(path)), np.array(Image.open(folder / 'validation' / label / name)))


def test_held_out_score_is_what_the_recipe_says(folder):
    model = timm.create_model('test_pvt', pretrained=True).eval()
    config = resolve_model_data_config(model)
    assert config['input_size'] == (3, 32, 32)
    dataset = create_dataset('', root=str(folder), split='validation')
    assert dataset.reader.class_to_idx == {str(i): i for i in range(10)}
    loader = create_loader(
        dataset, config['input_size'], 60, interpolation=config['interpolation'], mean=config['mean'],
        std=config['std'], crop_pct=config['crop_pct'], num_workers=0, use_prefetcher=False)
    with torch.inference_mode():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
    said = re.search(r'(\d+) of (\d+) held-out digits right', (PACKAGE / 'recipes' / 'digits.yaml').read_text())
    assert [right, len(dataset)] == [int(n) for n in said.groups()] == [357, 360]


def test_weights_are_small_and_native():
    file = PACKAGE / 'weights' / 'test_pvt_digits.safetensors'
    assert file.stat().st_size < 1_000_000
    want = timm.create_model('test_pvt').state_dict()
    assert {k: (v.shape, v.dtype) for k, v in load_file(file).items()} == {
        k: (v.shape, torch.float32) for k, v in want.items()}


def test_command(tmp_path, capsys):
    assert main(['digits', str(tmp_path / 'new')]) == 0
    (tmp_path / 'file').write_text('')
    (tmp_path / 'half' / 'validation').mkdir(parents=True)
    for name in ('new', 'half', 'file'):
        assert main(['digits', str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert 'File exists' in error and str(tmp_path / name) in error and error.count('\n') == 1
    assert not (tmp_path / 'half' / 'train').exists()


def test_an_interrupted_folder_holds_no_split(tmp_path, monkeypatch):
    images = iter(range(500))
    monkeypatch.setattr(Image.Image, 'save', lambda *args: next(images))
    with pytest.raises(StopIteration):
        digits.write_digits(tmp_path / 'data')
    assert not list((tmp_path / 'data').iterdir())
