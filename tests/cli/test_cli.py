"""The command line: what it prints and writes, and that every user error is one line and exit code 2."""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import pvt_timm
from pvt_timm.formats.mapping import from_timm
from pvt_timm.cli.errors import run_command
from pvt_timm.cli.main import main
from pvt_timm.cli.predict import open_image
from weights_conversion.cli import main as convert_main
from tests.support.systems import needs_posix_shell, needs_utf8_names

DIGIT = next((Path(pvt_timm.__file__).parent / 'data' / 'digits').glob('3_*.png'))
TEST_PVT = ['--model', 'test_pvt']
DONE = re.compile(r'pvt-timm: 1 image on \w+ \(.*\)\n')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Return a folder with good and damaged weights and images."""
    root = tmp_path_factory.mktemp('files')
    model = timm.create_model('test_pvt', pretrained=True)
    state = model.state_dict()
    save_file(state, root / 'native.safetensors')
    torch.save({'model': from_timm(state, 'original')[0], 'args': argparse.Namespace(a=1)}, root / 'original.pth')
    torch.save({'state_dict': {k: v for k, v in state.items() if not k.startswith('head')}}, root / 'headless.pth')
    dense = timm.create_model('test_pvt', class_token=False, num_classes=0)
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in dense.state_dict().items()}}, root / 'dense.pth')
    save_file({k: v * float('nan') for k, v in state.items()}, root / 'nan.safetensors')
    save_file({k: v * 1e30 for k, v in state.items()}, root / 'huge.safetensors')
    save_for_hf(model, root / 'folder', model_config=dict(label_names=[f'digit {i}' for i in range(10)]))
    (root / 'transformers').mkdir()
    save_file({k: v.contiguous() for k, v in from_timm(state, 'transformers')[0].items()},
              root / 'transformers' / 'model.safetensors')
    (root / 'transformers' / 'config.json').write_text(json.dumps(
        {'model_type': 'pvt', 'id2label': {str(i): f'number {i}' for i in range(10)}}))

    (root / 'truncated.pth').write_bytes((root / 'original.pth').read_bytes()[:5000])
    (root / 'text.png').write_text('no image')
    (root / 'cut.png').write_bytes(DIGIT.read_bytes()[:200])
    Image.new('RGB', (20000, 2)).save(root / 'thin.png')
    Image.effect_noise((150, 90), 90).convert('RGB').save(root / 'photo.jpg')
    return root


# what it does ---------------------------------------------------------------------------------------------------------

def test_demo(cli, tmp_path):
    out = cli('demo', '--output', tmp_path / 'out')
    assert '40 of 40 right' in out and '--model pvt_small' in out
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['pyramid.png']
    with Image.open(tmp_path / 'out' / 'pyramid.png') as image:
        assert image.width > 1000


def test_list(cli):
    out = cli('list')
    table, note, addresses = out.rstrip().split('\n\n')
    rows = {line.split()[0]: ' '.join(line.split()[1:]) for line in table.splitlines()}
    assert rows['pvt_small.in1k'] == '24.49 M 3.82 224x224 79.8 Hugging Face Hub, github.com'
    assert rows['pvt_small.retinanet_coco'] == '23.97 M 3.81 224x224 - download.openmmlab.com'
    assert rows['pvt_huge_v2'] == '304.95 M 50.49 224x224 - none'
    assert rows['test_pvt.digits'] == '0.15 M 0.0009 32x32 99.2 in the package'
    assert note.startswith('top-1: ')
    small = addresses.splitlines()
    small = small[small.index('  pvt_small.in1k') + 1:]
    assert small[:2] == [
        '    hf-hub:Zetatech/pvt-small-224',
        '    https://github.com/whai362/PVT/releases/download/v2/pvt_small.pth']
    assert 'test_pvt' not in addresses and 'pvt_huge_v2' not in addresses
    # no line is too long, except for urls: a url has a line of its own, so that it can be copied
    lines = out.splitlines()
    assert max(len(line) for line in lines if '://' not in line) <= 110
    for line in lines:
        assert '://' not in line or len(line.split()) == 1, line


def predictions(cli, *argv):
    return json.loads(cli('predict', DIGIT, *argv, '--json'))['images'][0]['predictions']


def test_predict_is_timm(cli):
    model = timm.create_model('test_pvt', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        probabilities = model(transform(Image.open(DIGIT).convert('RGB'))[None]).softmax(-1)[0].tolist()
    found = {item['index']: item['probability'] for item in predictions(cli, *TEST_PVT, '--topk', 10)}
    assert found == pytest.approx(dict(enumerate(probabilities)), abs=2e-6)
    lines = cli('predict', DIGIT, *TEST_PVT, '--topk', 3).splitlines()
    assert len(lines) == 4 and lines[0] == str(DIGIT) and lines[1].split()[1] == '3'


@pytest.mark.parametrize('name', [
    'native.safetensors', 'original.pth', 'folder', 'transformers', 'transformers/model.safetensors'])
def test_predict_with_any_checkpoint(cli, files, name):
    found, reference = predictions(cli, '--checkpoint', files / name), predictions(cli, *TEST_PVT)
    assert [p['probability'] for p in found] == pytest.approx([p['probability'] for p in reference], abs=2e-6)
    word = {'folder': 'digit ', 'transformers': 'number '}.get(name.split('/')[0], '')
    assert found[0]['label'] == f'{word}3'


@pytest.mark.parametrize('size', [[64], [64, 96]])
def test_img_size_may_stand_before_the_image(cli, size):
    assert json.loads(cli('predict', *TEST_PVT, '--json', '--img-size', *size, DIGIT))['img_size'] == [64, size[-1]]


def test_imagenet_labels_and_input_channels(cli, files, tmp_path):
    torch.save(timm.create_model('pvt_tiny', in_chans=1).state_dict(), tmp_path / 'grey.pth')
    torch.save(timm.create_model('test_pvt', in_chans=4).state_dict(), tmp_path / 'four.pth')
    labels = timm.data.ImageNetInfo().label_descriptions()
    for item in predictions(cli, '--checkpoint', tmp_path / 'grey.pth', '--img-size', 64):
        assert item['label'] == labels[item['index']]
    assert 'takes 4' in cli('predict', files / 'photo.jpg', '--checkpoint', tmp_path / 'four.pth', fails=True)


def test_image_modes(tmp_path):
    grey = np.arange(64 * 48, dtype=np.uint8).reshape(64, 48)
    image = Image.fromarray(grey)
    image.save(tmp_path / '8.png')
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / '16.png')
    image.convert('P').save(tmp_path / 'palette.png')
    image.convert('LA').save(tmp_path / 'alpha.png')
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / 'turned.png', exif=exif)
    for name in ('8', '16', 'palette', 'alpha'):
        for channels, mode in ((1, 'L'), (3, 'RGB')):
            image = open_image(tmp_path / f'{name}.png', channels)
            assert image.mode == mode and np.array_equal(np.array(image.convert('L')), grey), name
    assert open_image(tmp_path / 'turned.png').size == (64, 48)


@pytest.mark.parametrize('channels', [1, 3])
def test_grey_images_of_more_than_8_bits(channels, tmp_path):
    """Grey images with more than 8 bits are scaled to 0 to 255, and other values are refused.

    Pillow alone would cut off values above 255, so 16-bit images would be white, and images with values from 0 to 1
    black.
    """
    ramp = np.linspace(0, 1, 64 * 48).reshape(48, 64)
    expected = np.floor(ramp * 255 + 0.5)
    images = {
        'x.pgm': Image.fromarray((ramp * 65535).astype(np.int32)), 'y.tif': Image.fromarray(ramp.astype(np.float32)),
        'z.tif': Image.fromarray((ramp * 255 + 0.5).astype(np.int32)),
        'x.png': Image.fromarray((ramp * 65535).astype(np.uint16))}
    for name, image in images.items():
        assert image.mode in ('I', 'F', 'I;16')
        image.save(tmp_path / name)
        pixels = np.array(open_image(tmp_path / name, channels)).astype(float)
        assert np.abs((pixels[..., 0] if channels == 3 else pixels) - expected).max() <= 1, name
    for values in (np.full((48, 64), 70000), np.full((48, 64), -1)):
        Image.fromarray(values.astype(np.int32)).save(tmp_path / 'a.tif')
        with pytest.raises(ValueError, match='expected 0 to 255 or 0 to 65535'):
            open_image(tmp_path / 'a.tif', channels)
    for values in (ramp * 255, ramp - 1, ramp * np.nan):
        Image.fromarray(values.astype(np.float32)).save(tmp_path / 'b.tif')
        with pytest.raises(ValueError, match='expected 0 to 1'):
            open_image(tmp_path / 'b.tif', channels)



@pytest.mark.parametrize('name', ['dense.pth', 'headless.pth', 'folder'])
def test_features(cli, files, tmp_path, name):
    cli('features', files / 'photo.jpg', '--checkpoint', files / name, '--img-size', 64, 96, '--output',
        tmp_path / 'pyramid.png', '--save', tmp_path / 'f.safetensors')
    saved = load_file(tmp_path / 'f.safetensors')
    assert [tuple(f.shape) for f in saved.values()] == [(16, 16, 24), (32, 8, 12), (40, 4, 6), (64, 2, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['f.safetensors', 'pyramid.png']
    with Image.open(tmp_path / 'pyramid.png') as image:
        assert len(image.convert('RGB').resize((200, 100)).getcolors(20000)) > 500


def test_features_are_those_of_features_only(cli, files, tmp_path):
    cli('features', DIGIT, *TEST_PVT, '--output', tmp_path / 'a.svg', '--save', tmp_path / 'a.safetensors')
    assert (tmp_path / 'a.svg').read_text().startswith('<?xml')
    model = timm.create_model('test_pvt', pretrained=True, features_only=True).eval()
    x = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(Image.open(DIGIT).convert('RGB'))
    with torch.inference_mode():
        for mine, timms in zip(load_file(tmp_path / 'a.safetensors').values(), model(x[None])):
            torch.testing.assert_close(mine, timms[0], rtol=0, atol=1e-5)  # on a CPU the command's model is fused
    out = cli('features', files / 'photo.jpg', *TEST_PVT, '--output', tmp_path / 'a.png')
    assert '16x8x16' in out  # 90x150 becomes 32x64, which keeps the aspect


def test_weights_that_cannot_be_downloaded(cli, hub, no_waits, files, monkeypatch):
    hub.add_repo('Zetatech/pvt-tiny-224', {'model.safetensors': files / 'native.safetensors', 'config.json': '{}'})
    hub.fail('truncate', 'model.safetensors')
    hub.fail(500, 'pytorch_model.bin')
    assert 'Cannot load pvt_tiny.in1k' in cli('predict', DIGIT, '--model', 'pvt_tiny', fails=True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert '--checkpoint' in cli('predict', DIGIT, '--model', 'pvt_tiny', fails=True)


# user errors ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('argv, says', [
    (['predict', 'nope.png', *TEST_PVT], 'No such file or directory: nope.png'),
    (['predict', '{files}/transformers', *TEST_PVT], 'Expected images in'),
    (['predict', '{files}/text.png', *TEST_PVT], 'cannot identify image'),
    (['predict', '{files}/cut.png', *TEST_PVT], 'cut.png: image file is truncated'),
    (['predict', '{files}/thin.png', *TEST_PVT, '--img-size', '224'], 'differ by more than a factor of 100'),
    (['predict'], 'required: IMAGE'),
    (['predict', '{digit}', '--model', 'pvt_smal'], "Unknown model 'pvt_smal', expected one of pvt_tiny"),
    (['predict', '{digit}', '--model', 'pvt_small.foo'], 'Invalid pretrained tag (foo)'),
    (['predict', '{digit}', '--model', 'pvt_huge_v2'], 'pvt_huge_v2 has no published weights'),
    (['predict', '{digit}', '--model', 'pvt_small.retinanet_coco'], 'without a classifier'),
    (['predict', '{digit}', *TEST_PVT, '--topk', '-1'], "expected a whole number from 1, got '-1'"),
    (['predict', '{digit}', *TEST_PVT, '--topk', 'x'], "expected a whole number from 1, got 'x'"),
    (['predict', '{digit}', '--model', ''], 'argument --model: expected a value, got an empty one'),
    (['predict', '{digit}', '--checkpoint', ''], 'argument --checkpoint: expected a value'),
    (['predict', '{digit}', *TEST_PVT, '--labels', ''], 'argument --labels: expected a value'),
    (['detect', '{digit}', '--checkpoint', ''], 'argument --checkpoint: expected a value'),
    (['detect', '{digit}', '--model', ''], 'argument --model: expected a value'),
    (['detect', '{digit}', '--output', ''], 'argument --output: expected a value'),
    (['detect', '{digit}', '--threshold', 'nan'], "expected a number from 0 to 1, got 'nan'"),
    (['detect', '{digit}', '--threshold', 'x'], "expected a number from 0 to 1, got 'x'"),
    (['demo', '--output', ''], 'argument --output: expected a value'),
    (['digits', ''], 'argument FOLDER: expected a value'),
    (['predict', '{digit}', '--\x1b[2J'], 'unrecognized arguments: --\\x1b[2J'),
    (['predict', '{digit}', *TEST_PVT, '--img-size', '31'], 'at least 32'),
    (['predict', '{digit}', *TEST_PVT, '--img-size', 'big'], "expected one or two whole numbers from 1, got 'big'"),
    (['predict', '{digit}', *TEST_PVT, '--img-size', '100000'], 'pixels at most'),
    (['predict', '{digit}', *TEST_PVT, '--nonsense'], 'unrecognized arguments: --nonsense'),
    (['predict', '{digit}', '--checkpoint', 'nope.pth'], 'nope.pth'),
    (['predict', '{digit}', '--checkpoint', '{digit}'], 'Expected a checkpoint'),
    (['predict', '{digit}', '--checkpoint', '{files}/truncated.pth'], 'truncated.pth is damaged'),
    (['predict', '{digit}', '--checkpoint', '{files}/headless.pth'], 'without a classifier'),
    (['predict', '{digit}', '--checkpoint', '{files}/nan.safetensors'], 'not finite'),
    (['predict', '{digit}', '--checkpoint', '{files}/huge.safetensors', '--json'],
     'computes numbers that are not finite'),
    (['features', '{digit}', '--checkpoint', '{files}/huge.safetensors', '--output', '{out}/x.png'],
     'computes numbers that are not finite'),
    (['predict', '{digit}', '--model', 'test_pvt', '--prefix', 'student'], 'Expected --checkpoint with --prefix'),
    (['predict', '{digit}', '--checkpoint', '{files}/folder', '--model', 'pvt_tiny'], 'holds test_pvt'),
    (['features', '{digit}', *TEST_PVT], 'Expected --output for pictures, --save for tensors, or both'),
    (['features', '{digit}', *TEST_PVT, '--output', '{out}/a.xyz'], "'xyz' is not supported"),
    (['features', '{digit}', *TEST_PVT, '--output', '{out}/none/a.png'], 'No such file or directory'),
    (['features', '{digit}', *TEST_PVT, '--output', '{out}/a.png', '--save', '{out}/none/a'], 'No such file or'),
    (['demo', '--output', '{digit}'], 'exists'),  # each system says that in other words
    (['nonsense'], "invalid choice: 'nonsense'"),
    (['run'], 'required: SCRIPT'),
    (['run', '{files}'], 'No such script'),
])
def test_user_errors(cli, files, tmp_path, caplog, argv, says):
    assert says in cli(*[a.format(files=files, digit=DIGIT, out=tmp_path) for a in argv], fails=True)
    assert not list(tmp_path.iterdir()) and not caplog.messages


@pytest.mark.parametrize('error, code, line', [
    (ValueError('a\nb  c'), 2, 'a b c'),
    (ValueError('\x1b[31m \udcff'), 2, '\\x1b[31m \\udcff'),
    (FileNotFoundError(2, 'No such file', 'x'), 2, 'No such file: x'),
    (RuntimeError('x' * 5000), 2, 'x' * 997 + '...'),
    (MemoryError(), 2, 'MemoryError'),
    (KeyboardInterrupt(), 130, None),
    (KeyError('a mistake of ours'), None, None), (TypeError('a mistake of ours'), None, None),
], ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else '')
def test_errors_are_one_line_and_mistakes_of_ours_a_traceback(capfd, error, code, line):
    def command():
        raise error
    if code is None:
        with pytest.raises(type(error)):
            run_command('prog', command)
        return
    assert run_command('prog', command) == code
    assert capfd.readouterr().err == (f'prog: error: {line}\n' if line else '')


@pytest.mark.parametrize('how', ['before', 'after', 'environment', 'no', 'no either'])
@pytest.mark.parametrize('prog', ['pvt-timm', 'pvt-convert'])
def test_debug_shows_the_traceback(prog, how, capsys, monkeypatch):
    """With --debug, a traceback comes before the line of the error. Without --debug, there is only the line."""
    argv = ['predict', 'nope\x1b.png'] if prog == 'pvt-timm' else ['nope\x1b.pth', '-o', 'nope']
    if how == 'before':
        argv = ['--debug', *argv]
    elif how == 'after':
        argv = [*argv, '--debug']
    elif how != 'no':
        monkeypatch.setenv('PVT_TIMM_DEBUG', '1' if how == 'environment' else '0')
    assert (main if prog == 'pvt-timm' else convert_main)(argv) == 2
    out, err = capsys.readouterr()
    *before, last = err.splitlines()
    assert out == '' and last.startswith(f'{prog}: error: No such file') and '\x1b' not in err
    assert bool(before) == (how in ('before', 'after', 'environment'))
    assert not before or before[0].startswith('Traceback') and any(' line ' in line for line in before)


def test_debug_of_a_script_is_its_own(tmp_path, monkeypatch, capsys):
    (tmp_path / 'a.py').write_text('import sys; print(sys.argv[1:])')
    monkeypatch.setattr(sys, 'argv', ['pvt-timm'])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    main(['--debug', 'run', str(tmp_path / 'a.py'), '--debug', '--x'])
    assert capsys.readouterr().out == "['--debug', '--x']\n"
    assert main(['--debug', 'run', str(tmp_path / 'none.py')]) == 2
    assert capsys.readouterr().err.startswith('Traceback')


@needs_utf8_names
def test_nothing_of_a_name_reaches_the_terminal(cli, tmp_path, monkeypatch):
    """Control characters in the names of images, outputs and folders are escaped before they are printed."""
    name = 'a\x1b[31m\x9b2Jb'
    monkeypatch.chdir(tmp_path)
    for suffix in ('png', 'jpg'):
        Image.open(DIGIT).convert('RGB').save(tmp_path / f'{name}.{suffix}')
    out = cli('predict', f'{name}.png', f'{name}.jpg', *TEST_PVT)
    out += cli('features', DIGIT, *TEST_PVT, '--output', f'{name}.svg', '--save', f'{name}.safetensors')
    out += cli('digits', name) + cli('demo', '--output', f'{name}-demo')
    assert out.count('a\\x1b[31m\\x9b2Jb') == 6 and all(line.isprintable() for line in out.splitlines())


def test_no_matplotlib(cli, monkeypatch, tmp_path):
    for name in [m for m in sys.modules if m.split('.')[0] == 'matplotlib'] + ['matplotlib']:
        monkeypatch.setitem(sys.modules, name, None)
    assert '`draw` extra' in cli('features', DIGIT, *TEST_PVT, '--output', tmp_path / 'a.png', fails=True)
    assert '`draw` extra' in cli('features', DIGIT, DIGIT, *TEST_PVT, '--output', tmp_path / 'a', fails=True)
    assert '`draw` extra' in cli('demo', '--output', tmp_path / 'a')
    assert not list(tmp_path.iterdir())


# processes ------------------------------------------------------------------------------------------------------------

SCRIPT = '''
import json, multiprocessing, os, sys
import neighbour

def double(x):
    return 2 * x

if __name__ == '__main__':
    timm = sys.modules.get('timm')
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        doubled = pool.map(double, [1, 2])
    print(json.dumps(dict(
        argv=sys.argv, path=sys.path[0], file=__file__, registered=timm and timm.is_model('pvt_small'), cwd=os.getcwd(),
        main=sys.modules['__main__'].double is double, doubled=doubled)))
    sys.exit(3)
'''


def test_run_is_like_python(python, tmp_path):
    script = tmp_path / 'scripts' / 'script.py'
    script.parent.mkdir()
    script.write_text(SCRIPT)
    (tmp_path / 'scripts' / 'neighbour.py').touch()
    args = ['scripts/script.py', '--', '--help', 'run', '-x', '--img-size', '3', '4']
    plain, ours = python(*args), python('-m', 'pvt_timm', 'run', *args)
    assert (plain.returncode, ours.returncode) == (3, 3), ours.stderr
    expected, got = json.loads(plain.stdout), json.loads(ours.stdout)
    assert not expected.pop('registered') and got.pop('registered')
    assert os.path.samefile(got['argv'].pop(0), script) and expected['argv'].pop(0) == args[0]
    assert got == expected and got['doubled'] == [2, 4]


def test_run_leaves_errors_to_the_script(tmp_path, monkeypatch):
    (tmp_path / 'bad.py').write_text('raise OSError("mine")\n')
    monkeypatch.setattr(sys, 'argv', ['pvt-timm'])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    with pytest.raises(OSError, match='mine'):
        main(['run', str(tmp_path / 'bad.py')])


def test_error_of_a_process(python):
    """A failing command has exit code 2, and prints one line on stderr and nothing else."""
    done = python('-m', 'pvt_timm', 'predict', 'nope.png')
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == 'pvt-timm: error: No such file or directory: nope.png\n'


@needs_utf8_names
def test_names_that_the_terminal_cannot_show(python, tmp_path):
    name = tmp_path / 'drei \udcff\u4e09.png'
    name.write_bytes(DIGIT.read_bytes())
    (tmp_path / 'labels.txt').write_text('\n'.join('零一二三四五六七八九'), encoding='utf-8')
    done = python('-m', 'pvt_timm', 'predict', name.name, *TEST_PVT, '--topk', 1, '--labels', 'labels.txt',
                  PYTHONIOENCODING='ascii', PYTHONUTF8='0', LC_ALL='C')
    assert (done.returncode, DONE.sub('', done.stderr)) == (0, '')
    assert done.stdout.startswith('drei ') and '\\u4e09' in done.stdout


NOTED = '''if True:
    import logging, sys, warnings
    from pvt_timm.cli.errors import run_command
    from pvt_timm.cli.main import main

    def noted(fails, debug):
        def command():
            warnings.warn('one')
            logging.getLogger('x').warning('two\\x1b')
            if fails:
                raise ValueError('three')
        return run_command('prog', command, debug)

    folder, image, bad_image = sys.argv[1:]
    for run in (
        lambda: noted(fails=True, debug=False),
        lambda: noted(fails=False, debug=False),
        lambda: noted(fails=True, debug=True),
        lambda: main(['predict', '--checkpoint', folder, image]),
        lambda: main(['predict', '--checkpoint', folder, image, bad_image]),
    ):
        code = run()
        print(f'exit code {code}', file=sys.stderr)
'''


def test_warnings_do_not_stand_before_an_error(python, files, tmp_path):
    """Warnings are printed if the command succeeds, or with --debug. Otherwise only the error is printed."""
    # the last two are a command of ours: a checkpoint whose names do not fit, with an image that cannot be read too
    folder = shutil.copytree(files / 'transformers', tmp_path / 'folder')
    (folder / 'config.json').write_text('{"id2label": {"0": "one of ten"}}')
    done = python('-c', NOTED, folder, DIGIT, files / 'text.png')
    assert done.returncode == 0, done.stderr
    *said, rest = re.split(r'exit code (\d)\n', done.stderr)
    assert rest == '' and said[1::2] == ['2', '0', '2', '0', '2']
    fails, warns, debug, predict, bad_image = said[::2]
    warnings = 'prog: warning: one\nprog: warning: two\\x1b\n'
    assert fails == 'prog: error: three\n' and warns == warnings and warnings in debug
    assert debug.endswith('prog: error: three\n') and 'left out 1 label names' in predict
    assert bad_image.count('\n') == 1 and bad_image.startswith('pvt-timm: error: Cannot')


INSPECT = 'weights_conversion inspect {files}/original.pth'
PREDICT = f'pvt_timm predict "{DIGIT}" {" ".join(TEST_PVT)}'


@pytest.mark.parametrize('program, redirect, code, says', [
    (PREDICT, '>&-', 0, '1 image on cpu'),
    pytest.param(INSPECT, '>&-', 0, '', marks=pytest.mark.slow),  # as the one before and after it
    (INSPECT, '>&- 2>&-', 0, ''),
    pytest.param(INSPECT, '>/dev/full', 2, 'No space left on device', marks=pytest.mark.skipif(
        not os.path.exists('/dev/full'), reason='needs /dev/full')),
])
@needs_posix_shell
def test_no_place_for_the_output(client_env, files, tmp_path, program, redirect, code, says):
    """If a stream is closed or the disk is full, the command prints at most one line and no traceback."""
    done = subprocess.run(
        f'"{sys.executable}" -m {program.format(files=files)} {redirect}', shell=True, cwd=tmp_path, env=client_env,
        capture_output=True, text=True, timeout=300)
    assert done.returncode == code and says in done.stderr and done.stderr.count('\n') == bool(says), done.stderr
    assert done.stdout == ''


@needs_posix_shell
def test_closed_pipe(client_env, tmp_path):
    done = subprocess.run(
        f'"{sys.executable}" -m {PREDICT} | true', shell=True, cwd=tmp_path, env=client_env, capture_output=True,
        text=True, timeout=300)
    assert (done.stdout, done.stderr) == ('', '')
