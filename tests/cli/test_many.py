"""Many images: folders, batches, devices, results as a file, images that cannot be read, no network."""
import argparse
import csv
import itertools
import json
import os
import pickle
import socket
import sys
import time
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from pvt_timm.cli import network
from pvt_timm.cli import results as results_module
from pvt_timm.cli.classifiers import check_output, load_model, open_image, predict, whole_size
from pvt_timm.cli.main import main
from pvt_timm.cli.many import (
    Stream, Transformed, Whole, as_pixels, choose_device, find_images, normalise, output_file, print_json)
from pvt_timm.cli.predict import PREDICTIONS
from pvt_timm.detection import detector_to_mmdet, pvt_mask_rcnn, pvt_retinanet
from pvt_timm.images import natural_key
from pvt_timm.segmentation import SemanticFpn, segmenter_to_mmseg, semantic_fpn
from tests.support.systems import symlink
from weights_conversion.cli import main as convert_main

TEST_PVT = ['--model', 'test_pvt']
SIZES = [(60, 80), (60, 80), (90, 70), (60, 80), (40, 100), (40, 100), (64, 64)]  # heights and widths


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Return a folder with images of several sizes, some of them in subfolders, and a file that is no image."""
    folder = tmp_path_factory.mktemp('photos')
    rng = np.random.default_rng(0)
    for i, size in enumerate(SIZES):
        file = folder / ('', 'in', 'in/side')[i % 3] / f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
    (folder / 'notes.txt').write_text('no image')
    return folder


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp('weights')
    torch.manual_seed(0)
    meta = dict(CLASSES=('cat', 'dog', 'emu'), cfg="test_pipeline = [dict(type='Resize', scale=(96, 64))]")
    small = dict(out_channels=16, model_args=dict(img_size=64))
    mask_rcnn = pvt_mask_rcnn('test_pvt', 3, box_channels=32, mask_channels=16, **small)
    torch.save(dict(state_dict=detector_to_mmdet(mask_rcnn), meta=meta), folder / 'mask_rcnn.pth')
    retinanet = pvt_retinanet('test_pvt', 3, **small)
    retinanet.head.classification_head.cls_logits.weight.data.mul_(30)  # scores of all sizes
    retinanet.head.classification_head.cls_logits.bias.data.add_(4)
    torch.save(dict(state_dict=detector_to_mmdet(retinanet), meta=meta), folder / 'retinanet.pth')
    segmenter = semantic_fpn('test_pvt', 150, channels=24, **small)
    segmenter.head.classifier.weight.data.mul_(100)  # more than one class
    torch.save(dict(state_dict=segmenter_to_mmseg(segmenter), meta=dict(cfg=meta['cfg'])), folder / 'segmenter.pth')
    return folder


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# which images ---------------------------------------------------------------------------------------------------------

def test_images_of_folders(tmp_path):
    """Images in folders are found by extension, in natural order. Links are followed, but never in circles.

    A file that is given by name is taken whatever its extension is.
    """
    for name in ('10.png', '2.JPG', 'x/1.jpeg', 'x/y/1.webp', 'notes.txt', '.hidden.png', 'plain'):
        (tmp_path / 'a' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'a' / name).touch()
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / '1.bmp').touch()
    symlink(tmp_path / 'a' / 'circle', tmp_path / 'a')
    symlink(tmp_path / 'a' / 'linked', tmp_path / 'b')
    found = find_images([str(tmp_path / 'a' / 'plain'), str(tmp_path / 'a')])
    names = ['plain', '2.JPG', '10.png', 'linked/1.bmp', 'x/1.jpeg', 'x/y/1.webp']
    assert [file.name for file in found] == names
    assert [file.path for file in found] == [str(tmp_path / 'a' / name) for name in names]


def test_folders_without_images(tmp_path):
    (tmp_path / 'notes.txt').touch()
    with pytest.raises(ValueError, match='Expected images in .*, found none'):
        find_images([str(tmp_path)])
    with pytest.raises(FileNotFoundError):
        find_images([str(tmp_path / 'none')])


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='a superuser reads every folder')
def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path):
    (tmp_path / 'inside').mkdir()
    (tmp_path / 'a.png').touch()
    (tmp_path / 'inside').chmod(0)
    try:
        with pytest.raises(PermissionError):
            find_images([str(tmp_path)])
    finally:
        (tmp_path / 'inside').chmod(0o700)


def test_a_folder_is_walked_under_its_own_name(tmp_path):
    """A folder that can also be reached through links is read under its own name, not under that of a link."""
    for name in ('b/x/1.png', 'b/2.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / 'a').mkdir()
    symlink(tmp_path / 'a' / 'to_x', tmp_path / 'b' / 'x')
    symlink(tmp_path / '0', tmp_path / 'b')
    assert [file.name for file in find_images([str(tmp_path)])] == ['b/2.png', 'b/x/1.png']


def test_odd_names_have_an_order(tmp_path):
    """Only the digits 0 to 9 count as numbers, and names that differ only in capital letters have a fixed order."""
    names = ['A.jpg', 'a.jpg', '1\u00b22.jpg', '2.jpg', '10.jpg', '\u0663.jpg']
    expected = ['1\u00b22.jpg', '2.jpg', '10.jpg', 'A.jpg', 'a.jpg', '\u0663.jpg']
    for order in (names, names[::-1]):
        assert sorted(order, key=natural_key) == expected
    (tmp_path / names[2]).touch()
    assert [file.name for file in find_images([str(tmp_path)])] == [names[2]]


# the same numbers -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('channels', [1, 3])
def test_pixels_are_those_of_timms_transform(photos, channels):
    """After `normalise`, pixels equal those of timm's transform exactly, although workers send bytes."""
    cfg = timm.data.resolve_model_data_config(timm.create_model('test_pvt'))
    cfg.update({name: cfg[name][:channels] for name in ('mean', 'std')}, input_size=(channels, 32, 32))
    image = open_image(photos / '0.png', channels)
    for data in (cfg, dict(cfg, input_size=(channels, 64, 96)), dict(cfg, crop_mode='squash', crop_pct=1.)):
        expected = timm.data.create_transform(**data, is_training=False)(image)
        pixels = torch.from_numpy(Transformed(data)(image).copy())
        assert torch.equal(normalise(pixels[None], data)[0], expected)


def test_readers_may_be_processes_that_are_started_anew(photos):
    """The functions that prepare images can be pickled, which worker processes need on Windows and macOS."""
    data = timm.data.resolve_model_data_config(timm.create_model('test_pvt'))
    image = open_image(photos / '0.png')
    for prepare in (Transformed(data), Whole(data, None, 32), as_pixels):
        assert np.array_equal(pickle.loads(pickle.dumps(prepare))(image), prepare(image))


def test_whole_size():
    assert whole_size((150, 90), 32, 32) == (32, 64)
    assert whole_size((1000, 10), 224, 32) == (224, 22400)
    assert Whole(dict(input_size=(3, 32, 32), mean=(0., 0., 0.), std=(1., 1., 1.), interpolation='bicubic'),
                 None, 32)(Image.new('RGB', (150, 90))).shape == (3, 32, 64)


@pytest.mark.parametrize('batch_size, workers', [(1, 0), (3, 0), (16, 2)])
def test_predict(cli, photos, batch_size, workers):
    out = json.loads(cli('predict', photos, *TEST_PVT, '--json', '--topk', 3, '--batch-size', batch_size, '--workers',
                         workers))
    assert list(out) == ['model', 'img_size', 'images'] and out['img_size'] == [32, 32]
    classifier = load_model('test_pvt')
    assert [record['image'] for record in out['images']] == [file.path for file in find_images([str(photos)])]
    for record in out['images']:
        assert list(record) == ['image', 'predictions']
        expected = predict(classifier, open_image(record['image']), 3)
        for item, (index, probability) in zip(record['predictions'], expected, strict=True):
            assert (item['index'], item['label']) == (index, str(index))
            assert item['probability'] == pytest.approx(probability, abs=2e-6)


def test_predictions_as_a_file(cli, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(results_module, '_PART_IMAGES', 2)
    printed = json.loads(cli('predict', photos, *TEST_PVT, '--json', '--topk', 2))['images']
    for suffix in ('jsonl', 'csv'):
        out = cli('predict', photos, *TEST_PVT, '--topk', 2, '--output', tmp_path / f'x.{suffix}')
        assert out == f'{tmp_path}/x.{suffix}: predictions of 7 images\n'
    assert lines_of(tmp_path / 'x.jsonl') == printed
    with open(tmp_path / 'x.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 14 and rows[1]['rank'] == '2'
    items = [(record['image'], item) for record in printed for item in record['predictions']]
    for row, (image, item) in zip(rows, items):
        assert row['image'] == image and float(row['probability']) == item['probability']
        assert (row['label'], int(row['index'])) == (item['label'], item['index'])
    assert sorted(file.name for file in tmp_path.iterdir()) == ['x.csv', 'x.jsonl']
    assert '--overwrite' in cli('predict', photos, *TEST_PVT, '--output', tmp_path / 'x.csv', fails=True)


@pytest.mark.parametrize('command', ['predict', 'detect', 'segment'])
def test_tables_in_parquet(cli, photos, weights, tmp_path, command):
    """A Parquet table holds the same columns and values as CSV, and the columns have types."""
    parquet = pytest.importorskip('pyarrow.parquet')
    model = {'predict': TEST_PVT, 'detect': ['--checkpoint', weights / 'retinanet.pth', '--threshold', '0.01'],
             'segment': ['--checkpoint', weights / 'segmenter.pth']}[command]
    for suffix in ('csv', 'parquet'):
        cli(command, photos, *model, '--output', tmp_path / f'x.{suffix}')
    with open(tmp_path / 'x.csv', newline='') as f:
        header, *rows = csv.reader(f)
    table = parquet.read_table(tmp_path / 'x.parquet')
    assert table.column_names == header and len(rows) > 7
    assert [[str(x) for x in row.values()] for row in table.to_pylist()] == rows
    kinds = {'image': 'string', 'label': 'string' if command == 'predict' else 'int64'}
    assert {name: str(table.schema.field(name).type) for name in kinds} == kinds


@pytest.mark.parametrize('name', ['mask_rcnn', 'retinanet'])
def test_detections_do_not_depend_on_the_batch(cli, photos, weights, tmp_path, name):
    """Detections are the same one by one and in batches, where only images of one size go together."""
    argv = ['detect', photos, '--checkpoint', weights / f'{name}.pth', '--threshold', '0.01']
    alone = json.loads(cli(*argv, '--json'))['images']
    together = json.loads(cli(*argv, '--json', '--batch-size', 7, '--workers', 2))['images']
    assert sum(len(record['objects']) for record in alone) > 20
    for one, other in zip(alone, together, strict=True):
        assert one['image'] == other['image'] and (one['width'], one['height']) == (other['width'], other['height'])
        assert [x['label'] for x in one['objects']] == [x['label'] for x in other['objects']]
        for a, b in zip(one['objects'], other['objects']):
            assert a['box'] == pytest.approx(b['box'], abs=0.02) and a['score'] == pytest.approx(b['score'], abs=1e-5)
            assert a.get('mask') == b.get('mask')
    cli(*argv, '--output', tmp_path / 'x.jsonl')
    assert lines_of(tmp_path / 'x.jsonl') == alone


def test_segments_do_not_depend_on_the_batch(cli, photos, weights, tmp_path, monkeypatch):
    """Segments are the same one by one and in batches, where only images of one size go together."""
    seen, segment = [], SemanticFpn.segment

    def noted(self, images):
        seen.append(segment(self, images))
        return seen[-1]

    monkeypatch.setattr(SemanticFpn, 'segment', noted)
    argv = ['segment', photos, '--checkpoint', weights / 'segmenter.pth']
    alone = json.loads(cli(*argv, '--json'))['images']
    maps, seen[:] = list(seen), []
    together = json.loads(cli(*argv, '--json', '--batch-size', 7))['images']
    sizes = [(record['height'], record['width']) for record in alone]
    assert [tuple(batch.shape) for batch in maps] == [(1, *size) for size in sizes]
    assert [tuple(batch.shape) for batch in seen] == [
        (len(list(group)), *size) for size, group in itertools.groupby(sizes)] and len(seen) < len(maps)
    maps, in_batches = ([labels for batch in batches for labels in batch] for batches in (maps, seen))
    for one, other in zip(maps, in_batches, strict=True):  # a pixel may have two classes of almost the same logits
        assert len(one.unique()) > 1 and (one == other).float().mean() > 0.998
    for one, other in zip(alone, together, strict=True):
        assert (one['image'], one['width'], one['height']) == (other['image'], other['width'], other['height'])
        shares = [{row['label']: row['share'] for row in record['classes']} for record in (one, other)]
        for label in {*shares[0], *shares[1]}:
            assert shares[0].get(label, 0) == pytest.approx(shares[1].get(label, 0), abs=0.002)
    cli(*argv, '--output', tmp_path / 'x.jsonl', '--batch-size', 7)
    assert lines_of(tmp_path / 'x.jsonl') == together


def test_pictures_and_results_together(cli, photos, weights, tmp_path):
    """Of two `--output`, the one with an extension is the file. Pictures are in subfolders as their images are."""
    argv = ['segment', photos, '--checkpoint', weights / 'segmenter.pth', '--output', tmp_path / 'pictures']
    cli(*argv, '--output', tmp_path / 'x.csv')
    assert len(list((tmp_path / 'pictures').rglob('*.png'))) == 7
    assert (tmp_path / 'pictures' / 'in' / 'side' / '2_segment.png').is_file()
    with open(tmp_path / 'x.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    for file in find_images([str(photos)]):
        shares = [float(row['share']) for row in rows if row['image'] == file.path]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert 'at most' in cli(*argv, '--output', tmp_path / 'more', fails=True)
    assert '--json or --output FILE, not both' in cli(*argv, '--json', '--output', tmp_path / 'y.csv', fails=True)


# features -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('batch_size', [1, 7])
def test_features_of_many_images(cli, photos, tmp_path, batch_size):
    """Each image gets a file of its own name, with the same feature maps as the image alone."""
    out = cli('features', photos, *TEST_PVT, '--save', tmp_path / 'maps', '--batch-size', batch_size)
    assert out.count('\n') == 7 and '(32x64)' in out  # 40x100, to multiples of 32
    model = timm.create_model('test_pvt', pretrained=True, features_only=True).eval()
    data = timm.data.resolve_model_data_config(model)
    for file in find_images([str(photos)]):
        image = open_image(file.path)
        squash = dict(data, input_size=(3, *whole_size(image.size, 32, 32)), crop_pct=1., crop_mode='squash')
        x = timm.data.create_transform(**squash, is_training=False)(image)
        with torch.inference_mode():
            expected = model(x[None])
        saved = load_file(tmp_path / 'maps' / f'{file.name}.safetensors')
        for i, level in enumerate(expected):
            torch.testing.assert_close(saved[f'stage{i}'], level[0], rtol=0, atol=2e-5)
    assert len(list((tmp_path / 'maps').rglob('*.*'))) == 7


def test_features_at_a_size_lose_the_proportions(cli, photos, tmp_path, capsys):
    """With --img-size the whole image is resized to that size, and the help of --crop says so."""
    image = photos / 'in' / '4.png'  # 40x100
    cli('features', image, *TEST_PVT, '--img-size', 64, 96, '--save', tmp_path / 'x.safetensors')
    model = timm.create_model('test_pvt', pretrained=True, features_only=True, img_size=(64, 96)).eval()
    data = dict(timm.data.resolve_model_data_config(model), input_size=(3, 64, 96), crop_pct=1., crop_mode='squash')
    x = timm.data.create_transform(**data, is_training=False)(open_image(image))
    with torch.inference_mode():
        expected = model(x[None])
    for saved, level in zip(load_file(tmp_path / 'x.safetensors').values(), expected, strict=True):
        torch.testing.assert_close(saved, level[0], rtol=0, atol=2e-5)
    with pytest.raises(SystemExit):
        main(['features', '--help'])
    assert 'With --img-size the whole image is resized to that size without keeping its proportions' in ' '.join(
        capsys.readouterr().out.split())


def test_centre_crop(cli, photos, tmp_path):
    image = str(photos / '0.png')
    out = cli('features', image, *TEST_PVT, '--crop', '--save', tmp_path / 'x.safetensors', '--output',
              tmp_path / 'x.png')
    assert out.count('(centre, 32x32)') == 2
    model = timm.create_model('test_pvt', pretrained=True, features_only=True).eval()
    x = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(Image.open(image).convert('RGB'))
    with torch.inference_mode():
        expected = model(x[None])
    for saved, level in zip(load_file(tmp_path / 'x.safetensors').values(), expected):
        torch.testing.assert_close(saved, level[0], rtol=0, atol=2e-5)


def test_pictures_of_many_images(cli, photos, tmp_path):
    cli('features', photos / '0.png', photos / 'in', *TEST_PVT, '--output', tmp_path / 'drawn')
    names = sorted(str(file.relative_to(tmp_path / 'drawn')) for file in (tmp_path / 'drawn').rglob('*.png'))
    assert names == ['0.png.png', '1.png.png', '4.png.png', 'side/2.png.png', 'side/5.png.png']


@pytest.mark.parametrize('argv, says', [
    (['{photos}', '--save', '{tmp}/x.safetensors'], 'Expected a folder for the output files of several images'),
    (['{photos}/0.png', '{photos}/in/1.png', '--output', '{tmp}/x.png'], 'Expected a folder'),
    (['{photos}/0.png', '{tmp}/0.png', '--save', '{tmp}/maps'], 'because each output file is named after its image'),
    (['{tmp}/0', '{tmp}/0.png', '--output', '{tmp}'], '0.png is read and would be replaced'),
    (['{photos}/0.png', '--save', '{tmp}/maps.npz'], 'Expected a file that ends in .safetensors as --save'),
    (['{photos}/0.png', '--save', '{tmp}/x', '--output', '{tmp}/../{name}/x'], 'Expected two files'),
    (['{photos}/0.png', '--save', ''], 'argument --save: expected a value'),
    (['{photos}/0.png', '--output', ''], 'argument --output: expected a value'),
])
def test_files_that_would_be_one(cli, photos, tmp_path, argv, says):
    for name in ('0', '0.png'):
        (tmp_path / name).write_bytes((photos / '0.png').read_bytes())
    argv = [arg.format(photos=photos, tmp=tmp_path, name=tmp_path.name) for arg in argv]
    assert says in cli('features', *argv, *TEST_PVT, fails=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ['0', '0.png']


# errors ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def hundred(tmp_path_factory):
    """Return a folder with 100 images. One of them is not an image."""
    folder = tmp_path_factory.mktemp('hundred')
    rng = np.random.default_rng(0)
    for i in range(100):
        Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(folder / f'{i}.png')
    (folder / '70.png').write_text('no image')
    return folder


@pytest.mark.parametrize('command', ['predict', 'detect', 'segment'])
def test_a_broken_image_among_100(cli, hundred, weights, tmp_path, command, capsys, caplog):
    checkpoint = {'predict': TEST_PVT, 'detect': ['--checkpoint', weights / 'retinanet.pth'],
                  'segment': ['--checkpoint', weights / 'segmenter.pth']}[command]
    argv = [command, hundred, *checkpoint, '--output', tmp_path / 'x.jsonl']
    error = cli(*argv, fails=True)
    assert f'Cannot read the image {hundred}/70.png' in error and '--skip-errors' in error
    assert not (tmp_path / 'x.jsonl').exists() and (tmp_path / 'x.jsonl.parts').is_dir()
    assert main([str(arg) for arg in (*argv, '--skip-errors')]) == 0
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and int(err.split()[1]) < 60 and '1 could not be read' in err  # the rest
    assert [message for message in caplog.messages if f'{hundred}/70.png' in message]
    assert [line['image'] for line in lines_of(tmp_path / 'x.jsonl')] == [
        f'{hundred}/{i}.png' for i in range(100) if i != 70]
    assert [file.name for file in tmp_path.iterdir()] == ['x.jsonl']


def test_what_is_skipped_is_named_on_stderr(python, hundred):
    done = python('-m', 'pvt_timm', 'predict', hundred, *TEST_PVT, '--skip-errors', '--topk', 1, '--workers', 0)
    assert done.returncode == 0 and done.stdout.count('\n') == 2 * 99
    lines = sorted(done.stderr.splitlines())
    assert len(lines) == 2 and lines[0].startswith('pvt-timm: 99 images on ')
    assert lines[0].endswith('1 could not be read')
    assert lines[1].startswith(f'pvt-timm: warning: Cannot read the image {hundred}/70.png: cannot identify')


@pytest.mark.parametrize('command', ['predict', 'detect', 'segment', 'features'])
def test_no_image_that_can_be_read_is_an_error(cli, weights, tmp_path, command, caplog):
    """If no image can be read, the command fails even with --skip-errors, and names the first image."""
    argv = {'predict': [*TEST_PVT, '--json'], 'detect': ['--checkpoint', weights / 'retinanet.pth', '--json'],
            'segment': ['--checkpoint', weights / 'segmenter.pth'],
            'features': [*TEST_PVT, '--save', tmp_path / 'x.safetensors']}[command]
    (tmp_path / 'a.png').write_text('no image')
    error = cli(command, tmp_path / 'a.png', *argv, '--skip-errors', fails=True)
    assert f'None of the images could be read. The first one: Cannot read the image {tmp_path}/a.png' in error
    assert [file.name for file in tmp_path.iterdir()] == ['a.png']


def test_what_is_skipped_is_named_at_once_on_a_terminal(hundred, monkeypatch, capsys, caplog):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    stream = Stream(argparse.Namespace(
        command='predict', device='cpu', dtype='float32', batch_size=2, workers=0, skip_errors=True))
    files = find_images([str(hundred / '70.png'), str(hundred / '0.png')])
    for loaded, _ in stream.results(files, 3, as_pixels, lambda images, pixels: images):
        assert loaded.file.name == '0.png'
        assert f'pvt-timm: warning: Cannot read the image {hundred}/70.png' in capsys.readouterr().err
    assert stream.done == stream.skipped == 1 and not caplog.messages


def test_each_process_has_its_own_accelerator(monkeypatch):
    monkeypatch.setattr(torch, 'empty', lambda *args, device: None)  # as if the machine had it
    for name in ('cuda', 'xpu'):
        assert choose_device(name, 1) == torch.device(name, 1)
        assert choose_device(f'{name}:0', 1) == torch.device(name, 0)
    assert choose_device('cpu', 1) == torch.device('cpu')


def test_overflow_names_the_types_that_help():
    too_large = torch.full((2,), 1e30)
    with pytest.raises(ValueError, match='not finite in float16: try --dtype bfloat16 or float32'):
        check_output(too_large.half(), 'x')
    with pytest.raises(ValueError, match='its weights are too large or damaged'):
        check_output(too_large * 1e30, 'x')
    check_output(too_large, 'x')


def test_processes_do_not_print_at_once(tmp_path):
    two = types.SimpleNamespace(count=2)
    args = argparse.Namespace(output=None, json=True, overwrite=False)
    with pytest.raises(ValueError, match='Expected --output FILE with several processes'):
        output_file(args, PREDICTIONS, two)


# JSON -----------------------------------------------------------------------------------------------------------------

MODELS = {
    'predict': TEST_PVT,
    'detect': ['--checkpoint', '{weights}/mask_rcnn.pth', '--threshold', '0.01'],
    'detect coco': ['--checkpoint', '{weights}/mask_rcnn.pth', '--threshold', '0.01', '--format', 'coco'],
    'segment': ['--checkpoint', '{weights}/segmenter.pth'],
}


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Return a function that runs a command with --json.

    It returns the exit code, and what stdout held after each result and at the end.
    """
    results = Stream.results

    def run(*argv):
        held = []

        def noted(self, *args, **kwargs):
            for result in results(self, *args, **kwargs):
                yield result
                held.append((tmp_path / 'stdout').read_text())

        with open(tmp_path / 'stdout', 'w') as stdout, monkeypatch.context() as patch:
            patch.setattr(sys, 'stdout', stdout)
            patch.setattr(Stream, 'results', noted)
            code = main([*map(str, argv), '--json'])
        return code, held, (tmp_path / 'stdout').read_text()
    return run


def ended(text, command):
    """Return the list in an unfinished JSON document, whose end is added."""
    found = json.loads(text + (']' if 'coco' in command else ']}'))
    return found if 'coco' in command else found['images']


@pytest.mark.parametrize('batch_size', [1, 3])
@pytest.mark.parametrize('command', MODELS)
def test_json_is_printed_as_results_come(watched, photos, weights, command, batch_size):
    """Each image is printed before the next one is computed. At the end there is one document."""
    model = [arg.format(weights=weights) for arg in MODELS[command]]
    code, held, out = watched(command.split()[0], photos, *model, '--batch-size', batch_size)
    document = json.loads(out)
    assert code == 0 and out == json.dumps(document, indent=2) + '\n'
    if command == 'detect coco':
        ids = [int(Path(file.path).stem) for file in find_images([str(photos)])]
        assert ids[-1] == document[-1]['image_id'] and len(held) == len(SIZES)
        for i, text in enumerate(held, start=1):
            assert ended(text, command) == [row for row in document if row['image_id'] in ids[:i]]
        return
    assert list(document)[-1] == 'images' and len(document['images']) == len(held) == len(SIZES)
    for i, text in enumerate(held, start=1):
        assert ended(text, command) == document['images'][:i]


@pytest.mark.parametrize('command', MODELS)
def test_json_has_no_end_after_an_error(cli, watched, photos, weights, tmp_path, command, capsys):
    """After an error there are the results from before it. If there are none, nothing is printed."""
    model = [arg.format(weights=weights) for arg in MODELS[command]]
    command = [command.split()[0], *model]
    broken = tmp_path / '99.png'
    broken.write_text('no image')
    images = [photos / '0.png', photos / '3.png']
    whole = watched(*command, *images)[2]
    capsys.readouterr()
    code, held, out = watched(*command, *images, broken)
    err = capsys.readouterr().err
    assert code == 2 and err.count('\n') == 1 and f'Cannot read the image {broken}' in err
    assert len(held) == 2 and out == held[-1] + '\n' and whole.startswith(held[-1])
    assert whole[len(held[-1]):] in ('\n]\n', '\n  ]\n}\n')
    with pytest.raises(ValueError):
        json.loads(out)
    assert '99.png' in cli(*command, broken, *images, '--json', fails=True)


def test_json_without_results_has_an_empty_list(capsys):
    for others in (dict(), dict(name='images'), dict(name='images', model='x]')):
        print_json(iter([]), **others)
        expected = {'model': 'x]', 'images': []} if 'model' in others else {'images': []} if others else []
        assert capsys.readouterr().out == json.dumps(expected, indent=2) + '\n'


def test_coco_ids_of_the_images_that_can_be_read(watched, photos, weights, tmp_path):
    """Without the image that cannot be read, all names are numbers. So the numbers are the ids of the images."""
    model = [arg.format(weights=weights) for arg in MODELS['detect coco']]
    folder = tmp_path / 'some'
    folder.mkdir()
    for name in ('139.png', '42.png'):
        (folder / name).write_bytes((photos / '0.png').read_bytes())
    (folder / 'x.png').write_text('no image')
    code, held, out = watched('detect', folder, *model, '--skip-errors')
    assert code == 0 and {row['image_id'] for row in json.loads(out)} == {42, 139}
    (folder / 'x.png').write_bytes((photos / '0.png').read_bytes())
    code, held, out = watched('detect', folder, *model)
    assert code == 0 and {row['image_id'] for row in json.loads(out)} == {1, 2, 3} and held[0]


# no network -----------------------------------------------------------------------------------------------------------

ANY_SCRIPT = 'import sys\nprint(sys.argv)'
NEED_WEIGHTS = [
    (['predict', '{image}', '--model', 'pvt_tiny'], 'pvt_tiny.in1k', '--checkpoint'),
    (['features', '{image}', '--model', 'pvt_tiny', '--save', '{tmp}/x'], 'pvt_tiny.in1k', '--checkpoint'),
    (['embed', '{image}', '--model', 'pvt_small', '--output', '{tmp}/x.npz'], 'pvt_small.in1k', '--checkpoint'),
    (['embed', '{image}', '--model', 'pvt_small.retinanet_coco', '--output', '{tmp}/x.npz'],
     'pvt_small.retinanet_coco', '--checkpoint'),
    (['export', '--model', 'pvt_tiny', '--to', 'torch', '--output', '{tmp}/x.pt2'], 'pvt_tiny.in1k', '--checkpoint'),
    (['detect', '{image}'], 'pvt_small.retinanet_coco', '--checkpoint'),
    (['export', '--detector', '--model', 'pvt_tiny', '--to', 'onnx', '--output', '{tmp}/x.onnx'],
     'pvt_tiny.retinanet_coco', '--checkpoint'),
    (['export', '--detector', '--to', 'onnx', '--output', '{tmp}/x.onnx'], 'pvt_small.retinanet_coco', '--checkpoint'),
    (['train', '{tmp}/train.py', '--config', 'finetune', '--experiment', 'x', '--model', 'pvt_tiny'],
     'pvt_tiny.in1k', '--pretrained-path'),
    (['train', '{tmp}/train.py', '--pretrained', '--experiment', 'x', '--model', 'pvt_medium'],
     'pvt_medium.in1k', '--pretrained-path'),
    (['run', '{tmp}/train.py', '--model', 'pvt_tiny', '--pretrained', '--amp'], 'pvt_tiny.in1k', '--checkpoint'),
    (['run', '{tmp}/validate.py', '-m', 'pvt_tiny'], 'pvt_tiny.in1k', '--checkpoint'),
    (['run', '{tmp}/validate.py', '--model=pvt_tiny.in1k'], 'pvt_tiny.in1k', '--checkpoint'),
    (['run', '{tmp}/validate.py', '-mpvt_tiny'], 'pvt_tiny.in1k', '--checkpoint'),
    (['run', '{tmp}/validate.py', '--model', 'resnet18', '-m', 'pvt_tiny'], 'pvt_tiny.in1k', '--checkpoint'),
    (['detector', 'fit', '--config', 'finetune_detector', '--model', 'pvt_tiny', '--weights', 'retinanet_coco'],
     'pvt_tiny.retinanet_coco', '--weights'),
    (['detector', 'validate', '--weights', 'retinanet_coco'], 'pvt_small.retinanet_coco', '--weights'),
    (['segmenter', 'fit', '--config', 'finetune_segmenter', '--model', 'pvt_tiny'],
     'pvt_tiny.in1k', '--backbone-weights'),
]


@pytest.fixture
def scripts(tmp_path):
    for name in ('train.py', 'validate.py'):
        (tmp_path / name).write_text(ANY_SCRIPT)


@pytest.fixture(params=['no name', 'no answer'])
def cut_off(request, monkeypatch):
    """Cut off the network in one of two ways. Return what the error says of it."""
    def no_name(request, timeout):
        raise urllib.error.URLError(socket.gaierror(-3, 'Temporary failure in name resolution'))

    def no_answer(request, timeout):
        time.sleep(60)

    monkeypatch.setattr(urllib.request, 'urlopen', no_name if request.param == 'no name' else no_answer)
    monkeypatch.setattr(network, '_SECONDS', 0.1)
    return 'Temporary failure in name resolution' if request.param == 'no name' else 'no answer within'


@pytest.mark.parametrize('argv, model, option', NEED_WEIGHTS)
def test_no_network(cli, photos, tmp_path, monkeypatch, scripts, cut_off, argv, model, option):
    """Without network, a command fails within seconds, names an option that helps, and leaves no files."""
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    error = cli(*[arg.format(image=photos / '0.png', tmp=tmp_path) for arg in argv], fails=True)
    assert time.monotonic() - start < 30  # it was 59; a busy machine takes seconds to get here
    assert f'Cannot load {model}: no network to ' in error and cut_off in error
    url = timm.models.get_pretrained_cfg(model).url
    assert f'(download {url} elsewhere and give the file as {option} FILE; `pvt-timm demo` and --model' in error
    assert sorted(file.name for file in tmp_path.iterdir()) == ['train.py', 'validate.py']


URL = 'https://user:secret@example.com/x.pth?token=secret'
NEED_SOURCES = [
    (['predict', '{image}', '--checkpoint', URL], 'https://example.com/x.pth', '--checkpoint FILE'),
    (['predict', '{image}', '--model', 'hf-hub:some/pvt'], 'hf-hub:some/pvt', '--checkpoint FILE'),
    (['features', '{image}', '--checkpoint', 'hf-hub:some/pvt@old', '--save', '{tmp}/x'], 'hf-hub:some/pvt@old',
     '--checkpoint FILE'),
    (['embed', '{image}', '--checkpoint', 'hf-hub:some/pvt:sub/x.pth', '--output', '{tmp}/x.npz'],
     'hf-hub:some/pvt:sub/x.pth', '--checkpoint FILE'),
    (['export', '--checkpoint', 'HTTPS://example.com/x', '--to', 'torch', '--output', '{tmp}/x.pt2'],
     'https://example.com/x', '--checkpoint FILE'),
    (['train', '{tmp}/train.py', '--model', 'hf-hub:some/pvt', '--experiment', 'x'], 'hf-hub:some/pvt',
     '--model local-dir:FOLDER'),
    (['run', '{tmp}/train.py', '--model', 'hf_hub:some/pvt@old'], 'hf_hub:some/pvt@old', '--model local-dir:FOLDER'),
    (['pvt-convert', URL, '--output', '{tmp}/out'], 'https://example.com/x.pth', 'SOURCE'),
    (['pvt-convert', 'hf-hub:some/pvt', '--output', '{tmp}/out'], 'hf-hub:some/pvt', 'SOURCE'),
    (['pvt-convert', 'hf-hub:some/pvt', '--output', '{tmp}/out', '--to', 'mmdet', '--whole'], 'hf-hub:some/pvt',
     'SOURCE'),
    (['pvt-convert', 'inspect', 'hf-hub:some/pvt:x.pth'], 'hf-hub:some/pvt:x.pth', 'SOURCE'),
    (['pvt-convert', 'inspect', URL], 'https://example.com/x.pth', 'SOURCE'),
    (['pvt-convert', 'publish', '--to', 'me', '--dry-run', '-o', '{tmp}/out'],
     'hf-hub:Zetatech/pvt-tiny-224:model.safetensors', '`pvt-convert FILE --push`'),
]


@pytest.fixture
def either(cli, capsys):
    """Return a function that runs `pvt-timm`, or `pvt-convert` if it is the first word, which fails with one line."""
    def run(argv):
        if argv[0] != 'pvt-convert':
            return cli(*argv, fails=True)
        assert convert_main(argv[1:]) == 2
        out, err = capsys.readouterr()
        assert err.count('\n') == 1 and err.startswith('pvt-convert: error: '), err
        return err
    return run


@pytest.mark.parametrize('argv, source, option', NEED_SOURCES)
def test_no_network_to_a_source(either, photos, tmp_path, monkeypatch, scripts, cut_off, argv, source, option):
    """The same holds for a url and a repository of a hub, in all commands that take them. Secrets are not shown."""
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    error = either([arg.format(image=photos / '0.png', tmp=tmp_path) for arg in argv])
    assert time.monotonic() - start < 30
    assert f'Cannot load {source}: no network to ' in error and cut_off in error
    assert f'({option} takes a {"folder" if "local-dir" in option else "file"} of this machine)' in error
    assert 'secret' not in error
    assert sorted(file.name for file in tmp_path.iterdir()) == ['train.py', 'validate.py']


@pytest.mark.parametrize('argv', [
    ['pvt-convert', 'x.pth', '--output', '{tmp}/out', '--push', 'me/pvt'],
    ['pvt-convert', 'publish', '--to', 'me', '--output', '{tmp}/out', '--only', 'pvt_tiny.in1k']])
def test_no_network_for_an_upload(either, tmp_path, cut_off, argv):
    error = either([arg.format(tmp=tmp_path) for arg in argv])
    assert 'Cannot upload to me/pvt' in error and 'no network to ' in error and cut_off in error
    assert '(--dry-run uploads nothing)' in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize('argv', [
    ['run', 'train.py', '--model', 'pvt_tiny'],  # not pretrained
    ['run', 'train.py', '--pretrained', '--model', 'resnet18'],  # somebody else's
    ['run', 'train.py', '--pretrained', '--model', 'test_pvt'],  # in the package
    ['run', 'train.py', '--pretrained', '--model'],  # which the script says itself
    ['run', 'train.py', '--pretrained=yes', '-m', '-m'],
    ['run', 'train.py', '--pretrained', '--model', 'pvt_tiny', '--model', 'resnet18'],
    ['run', 'validate.py', '--model', 'pvt_tiny', '--checkpoint', 'x.pth'],
    ['train', 'train.py', '--pretrained', '--model', 'pvt_tiny', '--pretrained-path', 'x', '--experiment', 'x'],
    ['train', 'train.py', '--model', 'pvt_tiny', '--experiment', 'x'],
])
def test_scripts_that_need_no_network(scripts, argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm.data, 'create_dataset', timm.data.create_dataset)  # put back what `train` changes
    ddp = torch.nn.parallel.DistributedDataParallel
    monkeypatch.setattr(ddp, '__init__', ddp.__init__)
    monkeypatch.setattr(network, '_reach', lambda url: pytest.fail('the network was asked for'))
    started = []
    monkeypatch.setattr('pvt_timm.cli.main.run_script', started.append)
    assert main(argv) == 0
    start = started[0].index(argv[2])
    assert started[0][0] == argv[1] and started[0][start:start + len(argv) - 2] == argv[2:]


def test_weights_in_the_cache_need_no_network(cli, hub, photos, monkeypatch):
    cfg = timm.models.get_pretrained_cfg('pvt_tiny.in1k')
    repo, _, commit = cfg.hf_hub_id.partition('@')
    state = timm.create_model('pvt_tiny').state_dict()
    from safetensors.torch import save
    hub.add_repo(repo, {'model.safetensors': save(state), 'config.json': '{}'}, commit=commit)
    argv = ['predict', photos / '0.png', '--model', 'pvt_tiny', '--json', '--img-size', '64']
    first = cli(*argv)
    monkeypatch.setattr(network, '_reach', lambda url: pytest.fail('the network was asked for'))
    assert cli(*argv) == first


@pytest.mark.parametrize('offline', [False, True])
def test_sources_in_the_cache_need_no_network(hub, photos, tmp_path, monkeypatch, scripts, capsys, offline):
    """A repository that was downloaded before is used without network, also with HF_HUB_OFFLINE."""
    from safetensors.torch import save
    config = json.dumps({'architecture': 'test_pvt', 'num_classes': 10})
    content = save(timm.create_model('test_pvt', pretrained=True).state_dict())
    hub.add_repo('some/pvt', {'model.safetensors': content, 'config.json': config, 'sub/x.safetensors': content})
    monkeypatch.setattr('pvt_timm.cli.main.run_script', lambda argv: None)
    commands = [
        (main, 'predict', str(photos / '0.png'), '--model', 'hf-hub:some/pvt'),
        (main, 'predict', str(photos / '0.png'), '--checkpoint', 'hf-hub:some/pvt:sub/x.safetensors'),
        (convert_main, 'inspect', 'hf-hub:some/pvt'),
        (main, 'run', str(tmp_path / 'train.py'), '--model', 'hf-hub:some/pvt', '--pretrained'),
    ]
    for command, *argv in commands:
        assert command(argv) == 0
    hub.clear()
    hub.fail(500)
    monkeypatch.setattr(network, '_reach', lambda url: pytest.fail('the network was asked for'))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', offline)
    monkeypatch.setattr('time.sleep', lambda seconds: None)  # between attempts of the hub's client
    for command, *argv in commands:
        assert command(argv) == 0, capsys.readouterr().err


@pytest.mark.parametrize('argv', [['predict', '{image}', '--checkpoint'], ['pvt-convert', 'inspect']])
def test_a_url_is_asked_for_before_it_is_opened(either, photos, argv, hub, monkeypatch):
    """A host that is there costs one short request more. Its error is that of the download."""
    error = either([arg.format(image=photos / '0.png') for arg in argv] + [f'{hub.url}/none.pth'])
    assert '404' in error and 'no network' not in error
    assert hub.requests == [('HEAD', '/'), ('GET', '/none.pth')]
    hub.fail('drop')  # it is there, but gives no valid answer
    error = either([arg.format(image=photos / '0.png') for arg in argv] + [f'{hub.url}/none.pth'])
    assert 'no network' not in error and hub.count('GET', 'none') == 2


def test_a_host_that_answers_with_an_error_is_there(hub):
    hub.fail(500)
    network._reach(hub.url + '/anything')
    with pytest.raises(ConnectionError, match='no network to 127.0.0.1: .*refused'):
        network._reach('http://127.0.0.1:9/')


# going on -------------------------------------------------------------------------------------------------------------

def test_pictures_in_another_folder_are_other_settings(cli, photos, weights, tmp_path, monkeypatch):
    """A run does not continue with another folder for pictures, which would lack the first pictures."""
    argv = ['detect', photos, '--checkpoint', weights / 'retinanet.pth', '--output', tmp_path / 'x.jsonl', '--output']
    add = results_module.Results.add

    def add_and_end(self, file, row, state):
        add(self, file, row, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results_module.Results, 'add', add_and_end)
        assert main([str(arg) for arg in (*argv, tmp_path / 'one')]) == 130
    assert 'of a run with other settings (pictures)' in cli(*argv, tmp_path / 'two', fails=True)
    monkeypatch.chdir(tmp_path)
    cli(*argv, 'one')  # the same folder by another name
    assert len(list((tmp_path / 'one').rglob('*.png'))) == len(SIZES)
