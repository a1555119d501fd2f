""" The commands of recipes/README.md, unchanged: from an image folder to predictions in timm and transformers. """
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from pvt_timm.detection import detector_to_mmdet, pvt_retinanet
from pvt_timm.cli.predict import load_model, predict
from pvt_timm.digits import write_digits

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / 'pvt_timm' / 'recipes' / 'README.md').read_text(encoding='utf-8')
pytestmark = pytest.mark.slow

NAMES = ['ant', 'bee', 'cat']
PROGRAMS = {'pvt-timm': 'pvt_timm', 'pvt-convert': 'weights_conversion'}
QUICK = ['--epochs', '3', '--warmup-epochs', '0', '--batch-size', '16', '--workers', '0', '--lr', '2e-3']


def blocks(language):
    return re.findall(rf'^```{language}\n(.*?)^```', TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope='module')
def trained(train_py, tmp_path_factory):
    """Run the five commands of recipes/README.md. Return their folder and what they print."""
    pytest.importorskip('sklearn')
    folder = tmp_path_factory.mktemp('trained')
    digits = write_digits(folder / 'digits')
    for split, count in (('train', 48), ('validation', 16)):
        for i, name in enumerate(NAMES):
            (folder / 'images' / split / name).mkdir(parents=True)
            for file in sorted((digits / split / str(i)).iterdir())[:count]:
                shutil.copy(file, folder / 'images' / split / name)
    shutil.copy(sorted((digits / 'validation' / '1').iterdir())[20], folder / 'photo.jpg')
    torch.save(timm.create_model('pvt_tiny').state_dict(), folder / 'start.pth')
    commands = [shlex.split(line) for line in blocks('bash')[0].splitlines()]
    assert len(commands) == 5 and commands[0][0] == 'curl'
    shutil.copy(train_py, folder)  # for curl
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    outputs = {}
    for command in commands[1:]:
        command[:1] = [sys.executable, '-m', PROGRAMS[command[0]]]
        if 'train' in command:
            command += [*QUICK, '--pretrained-path', 'start.pth']
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        outputs[command[3]] = done.stdout + done.stderr
    return folder, outputs


def test_five_commands(trained):
    folder, outputs = trained
    log = outputs['train']
    assert 'device: cpu' in log and 'CUDA' not in log and 'Train: 2' in log
    photo, best = outputs['predict'].splitlines()[:2]
    mine = load_model(checkpoint=folder / 'output/mine/model_best.pth.tar')
    assert mine.labels == NAMES and mine.data['input_size'] == (3, 64, 64)
    index, probability = predict(mine, Image.open(folder / 'photo.jpg').convert('RGB'), 1)[0]
    assert best.split() == [f'{probability:.2%}', NAMES[index]]
    for other in ('mine-timm', 'mine-transformers'):
        theirs = load_model(checkpoint=folder / other)
        data = dict(mine.data, crop_pct=theirs.data['crop_pct']) if 'transformers' in other else mine.data
        assert (theirs.labels, theirs.data) == (NAMES, data)


def test_snippets(trained, monkeypatch):
    folder, outputs = trained
    monkeypatch.chdir(folder)
    monkeypatch.setattr('timm.layers.config._USE_FUSED_ATTN', timm.layers.config._USE_FUSED_ATTN)
    space = {}
    torch.save({'state_dict': detector_to_mmdet(pvt_retinanet('test_pvt', 80, out_channels=16))}, 'retinanet.pth')
    for code in (block for block in blocks('python') if not block.startswith('_base_')):  # OpenMMLab's config
        if all(map(importlib.util.find_spec, re.findall(r'^(?:from|import) (\w+)', code, re.MULTILINE))):
            exec(compile(code, 'recipes/README.md', 'exec'), space)
            assert space['label'] == outputs['predict'].split()[2]
    model, image = space['model'], space['image']
    with torch.no_grad():
        assert image.shape[2:] == (64, 64)
        encoder = timm.create_model('local-dir:mine-timm', pretrained=True, features_only=True).eval()
        for other in (space['segmenter'].eval().encoder(image)[-4:], space['detector'].eval().backbone.body(image)):
            assert all(map(torch.equal, encoder(image), other))
        assert space['from_class_token'].shape[1] == 4 and space['from_class_token'].sum() > 0
        if 'same' in space:
            assert torch.equal(space['same'].eval()(image), space['again'].eval().net(image))
        if 'merged' in space:
            torch.testing.assert_close(space['merged'].eval()(image), model(image), rtol=1e-5, atol=1e-5)
    for cam in ('fine', 'coarse'):
        assert cam not in space or space[cam].max() > 0
