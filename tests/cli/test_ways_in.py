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


def overlay(file, hub):
    return timm.create_model(
        'test_pvt', pretrained=True, num_classes=3, img_size=64, pretrained_cfg_overlay=dict(file=str(file)))


def checkpoint_path(file, hub):
    return timm.create_model('test_pvt', num_classes=3, checkpoint_path=str(file))


def url(file, hub):
    address = hub.add_file(f'/{file.parent.name}-{file.name}', file)
    return timm.create_model(
        'test_pvt', pretrained=True, num_classes=3, img_size=64,
        pretrained_cfg_overlay=dict(file='', hf_hub_id=None, url=address, num_classes=3))


def local_dir(file, hub):
    return timm.create_model(f'local-dir:{file.parent}', pretrained=True)


def command_line(file, hub):
    loaded = load_model(checkpoint=file)
    assert loaded.labels == NAMES
    return loaded.model


def back(file, hub):
    """Converted to timm, from wherever it is."""
    convert(file, file.parent / 'back', to='timm', force=True)
    return timm.create_model(f'local-dir:{file.parent / "back"}', pretrained=True)


def outcome(way, file, x, expected, hub):
    try:
        model = way(file, hub).eval()
    except (*EXPECTED, KeyError) as e:
        return one_line(e)
    if not model.num_classes:
        return 'no head'
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=2e-6)
    return 'equal'


# the formats' column is in the order of FORMATS
EQUAL, DENSE, NO_CONFIG, TIMM_ONLY = 'equal', 'dense backbone', 'config.json', 'Missing key(s)'


@pytest.mark.parametrize('way, outcomes', [
    (overlay, (EQUAL, EQUAL, EQUAL, EQUAL, DENSE)),
    (checkpoint_path, (EQUAL, EQUAL, TIMM_ONLY, TIMM_ONLY, TIMM_ONLY)),  # timm maps no names there
    (url, ('argparse.Namespace', EQUAL, EQUAL, EQUAL, DENSE)),  # torch.hub reads plain tensors only
    (local_dir, (NO_CONFIG, EQUAL, NO_CONFIG, 'architecture', NO_CONFIG)),  # timm wants its own config.json
    (command_line, (EQUAL, EQUAL, EQUAL, EQUAL, 'without a classifier')),
    (back, (EQUAL, EQUAL, EQUAL, EQUAL, 'no head')),
])
def test_every_cell_is_equal_or_refused(checkpoints, hub, way, outcomes):
    files, x, expected = checkpoints
    for fmt, wanted in zip(FORMATS, outcomes):
        got = outcome(way, files[fmt], x, expected, hub)
        assert got == EQUAL if wanted == EQUAL else wanted in got, f'{way.__name__}, {fmt}: {got}'
