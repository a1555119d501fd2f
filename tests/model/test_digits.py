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

import pvt_timm  # noqa: F401
from pvt_timm import digits

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / 'pvt_timm' / 'recipes' / 'digits.yaml'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return digits.write_digits(tmp_path_factory.mktemp('digits') / 'data')


def stated_score():
    """Right ones and the percentage, as the recipe says them."""
    pattern = r'(\d+) of (\d+) held-out digits right \(([\d.]+)%\)'
    right, total, percent = re.search(pattern, RECIPE.read_text()).groups()
    assert f'{100 * int(right) / int(total):.2f}' == percent
    return int(right), int(total)


def test_folder_is_complete_and_the_same_every_time(folder, tmp_path):
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


def test_upscale_is_bilinear():
    image = np.random.RandomState(0).randint(0, 17, (8, 8))
    reference = torch.nn.functional.interpolate(
        torch.tensor(image)[None, None].double(), scale_factor=4, mode='bilinear', align_corners=False)[0, 0] * 255 / 16
    assert np.abs(digits.upscale(image) - reference.numpy()).max() <= 0.5


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
    assert (right, len(dataset)) == stated_score()
    assert right / len(dataset) >= 0.97


def test_weights_are_small_and_native():
    file = ROOT / 'pvt_timm' / 'weights' / 'test_pvt_digits.safetensors'
    assert file.stat().st_size < 1_000_000
    want = timm.create_model('test_pvt').state_dict()
    assert {k: (v.shape, v.dtype) for k, v in load_file(file).items()} == {
        k: (v.shape, torch.float32) for k, v in want.items()}


def test_command(tmp_path, capsys):
    assert digits.main([str(tmp_path / 'new')]) == 0
    assert '1437 images' in capsys.readouterr().out
    assert digits.main([str(tmp_path / 'new')]) == 2
    error = capsys.readouterr().err
    assert 'exists' in error and error.count('\n') == 1
    (tmp_path / 'file').write_text('')
    assert digits.main([str(tmp_path / 'file')]) == 2
    assert str(tmp_path / 'file') in capsys.readouterr().err
