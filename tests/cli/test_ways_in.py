""" A checkpoint of train.py by every way in, in every format: the same logits, head included, or an error. """
import argparse

import pytest
import timm
import torch
from timm.utils import CheckpointSaver

from pvt_timm.cli.errors import EXPECTED, one_line
from pvt_timm.cli.predict import load_model
from pvt_timm.labels import LABELS_FILE
from weights_conversion import convert

NAMES = ['ant', 'bee', 'cat']
FORMATS = ('train.py', 'timm', 'original', 'transformers', 'mmdet')


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """Format to file, and what the model gives for an image."""
    root = tmp_path_factory.mktemp('ways')
    torch.manual_seed(0)
    model = timm.create_model('test_pvt', num_classes=3).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=.1)
    args = argparse.Namespace(model='test_pvt', img_size=64, mean=[.4], std=[.3], crop_pct=.9, interpolation='bilinear')
    saver = CheckpointSaver(
        model, torch.optim.AdamW(model.parameters()), args=args, checkpoint_dir=str(root), recovery_dir=str(root))
    saver.save_checkpoint(0, metric=1.)
    (root / LABELS_FILE).write_text(''.join(f'{name}\n' for name in NAMES))
    files = {'train.py': root / 'last.pth.tar'}
    for fmt in FORMATS[1:]:
        convert(files['train.py'], root / fmt, to=fmt, drop=('class_token', 'norm', 'head') if fmt == 'mmdet' else ())
        files[fmt] = next(p for p in (root / fmt).iterdir() if p.suffix in ('.pth', '.safetensors'))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        return files, x, model(x)


def create(overlay=None, **kwargs):
    return timm.create_model('test_pvt', num_classes=3, pretrained_cfg_overlay=overlay, **kwargs)


def command_line(file):
    loaded = load_model(checkpoint=file)
    assert loaded.labels == NAMES
    return loaded.model


def back(file):
    """Converted to timm, from wherever it is."""
    convert(file, file.parent / 'back', to='timm', force=True)
    return timm.create_model(f'local-dir:{file.parent / "back"}', pretrained=True)


# Way in -> what comes of FORMATS by it
EQUAL, DENSE, NO_CONFIG, TIMM_ONLY = 'equal', 'dense backbone', 'config.json', 'Missing key(s)'
WAYS = {
    'overlay': (
        lambda file, hub: create(dict(file=str(file)), pretrained=True, img_size=64),
        (EQUAL, EQUAL, EQUAL, EQUAL, DENSE)),
    'checkpoint_path': (  # timm maps no names there
        lambda file, hub: create(checkpoint_path=str(file)),
        (EQUAL, EQUAL, TIMM_ONLY, TIMM_ONLY, TIMM_ONLY)),
    'url': (  # torch.hub reads plain tensors only
        lambda file, hub: create(
            dict(file='', hf_hub_id=None, url=hub.add_file(f'/{file.name}', file), num_classes=3), pretrained=True,
            img_size=64),
        ('argparse.Namespace', EQUAL, EQUAL, EQUAL, DENSE)),
    'local-dir': (  # timm wants its own config.json
        lambda file, hub: timm.create_model(f'local-dir:{file.parent}', pretrained=True),
        (NO_CONFIG, EQUAL, NO_CONFIG, 'architecture', NO_CONFIG)),
    'command line': (lambda file, hub: command_line(file), (EQUAL, EQUAL, EQUAL, EQUAL, 'without a classifier')),
    'back': (lambda file, hub: back(file), (EQUAL, EQUAL, EQUAL, EQUAL, 'no head')),
}


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('fmt', FORMATS)
def test_equal_or_refused(checkpoints, hub, way, fmt):
    files, x, expected = checkpoints
    load, outcomes = WAYS[way]
    outcome = outcomes[FORMATS.index(fmt)]
    if outcome not in (EQUAL, 'no head'):
        with pytest.raises((*EXPECTED, KeyError)) as e:
            load(files[fmt], hub)
        assert outcome in one_line(e.value)
        return
    model = load(files[fmt], hub).eval()
    assert bool(model.num_classes) == (outcome == EQUAL)
    if outcome == EQUAL:
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=0, atol=2e-6)
