"""The command line: what it prints and writes, and that every user error is one line and exit code 2."""
import argparse
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import pvt_timm  # noqa: F401
from pvt_timm.checkpoints import from_timm
from pvt_timm.cli.errors import UserError, run_command
from pvt_timm.cli.main import main
from pvt_timm.cli.predict import open_image
from pvt_timm.pvt import VARIANTS

DIGITS = Path(pvt_timm.__file__).parent / 'data' / 'digits'
DIGIT = next(DIGITS.glob('3_*.png'))
TEST_PVT = ['--model', 'test_pvt']


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Weights and images, good and bad."""
    root = tmp_path_factory.mktemp('files')
    model = timm.create_model('test_pvt', pretrained=True)
    state = model.state_dict()
    save_file(state, root / 'native.safetensors')
    torch.save({'model': from_timm(state, 'original')[0], 'args': argparse.Namespace(a=1)}, root / 'original.pth')
    torch.save({'state_dict': {k: v for k, v in state.items() if not k.startswith('head')}}, root / 'headless.pth')
    dense = timm.create_model('test_pvt', class_token=False, num_classes=0)
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in dense.state_dict().items()}}, root / 'dense.pth')
    save_file({k: v * float('nan') for k, v in state.items()}, root / 'nan.safetensors')
    save_file({k: v for k, v in state.items() if 'blocks.0.attn.q' not in k}, root / 'gap.safetensors')
    save_for_hf(model, root / 'folder', model_config=dict(label_names=[f'digit {i}' for i in range(10)]))
    (root / 'transformers').mkdir()
    save_file({k: v.contiguous() for k, v in from_timm(state, 'transformers')[0].items()},
              root / 'transformers' / 'model.safetensors')
    (root / 'transformers' / 'config.json').write_text(json.dumps(
        {'model_type': 'pvt', 'id2label': {str(i): f'number {i}' for i in range(10)}}))

    (root / 'truncated.pth').write_bytes((root / 'original.pth').read_bytes()[:5000])
    (root / 'truncated.safetensors').write_bytes((root / 'native.safetensors').read_bytes()[:50000])
    for name, text in dict(badjson='{', list='[]', resnet='{"architecture": "resnet18"}', odd=(
            '{"architecture": "test_pvt", "pretrained_cfg": 5}')).items():
        (root / name).mkdir()
        (root / name / 'config.json').write_text(text)
        os.link(root / 'native.safetensors', root / name / 'model.safetensors')
    (root / 'empty').mkdir()
    (root / 'text.png').write_text('no image')
    (root / 'cut.png').write_bytes(DIGIT.read_bytes()[:200])
    Image.new('RGB', (20000, 2)).save(root / 'thin.png')
    photo = np.random.RandomState(0).randint(0, 255, (90, 150, 3), dtype=np.uint8)
    Image.fromarray(photo).save(root / 'photo.jpg')
    return root


# what it does ---------------------------------------------------------------------------------------------------------

def test_demo(cli, tmp_path):
    out = cli('demo', '--output', tmp_path / 'out')
    right, of = map(int, out.split(' right')[0].split('\n')[-1].split(' of '))
    assert of == len(list(DIGITS.glob('*.png'))) >= 20 and right >= .97 * of
    with Image.open(tmp_path / 'out' / 'pyramid.png') as image:
        assert image.width > 1000
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['pyramid.png']
    assert '--model pvt_small' in out


def test_bundled_digits_are_held_out(tmp_path):
    pytest.importorskip('sklearn')
    from pvt_timm.digits import write_digits
    write_digits(tmp_path)
    for path in DIGITS.glob('*.png'):
        label, name = path.name.split('_')
        assert np.array_equal(np.array(Image.open(path)), np.array(Image.open(tmp_path / 'validation' / label / name)))


def test_list(cli):
    out = cli('list')
    for text in ('pvt_tiny.in1k', 'pvt_huge_v2', 'test_pvt.digits', '24.49 M', '81.7', 'Zetatech/pvt-small-224'):
        assert text in out
    rows = {f'{r["model"]}.{r["tag"]}': r for r in json.loads(cli('list', '--json'))}
    assert {r['model'] for r in rows.values()} == set(VARIANTS) - {'test_pvt_owl'}  # another test's
    expected = dict(tiny=(13229288, 1.93, 75.1), small=(24485864, 3.82, 79.8), medium=(44208104, 6.66, 81.2),
                    large=(61369320, 9.81, 81.7))
    for variant, (params, gmacs, top1) in expected.items():
        row = rows[f'pvt_{variant}.in1k']
        assert (row['params'], round(row['macs'] / 1e9, 2), row['top1']) == (params, gmacs, top1)
        assert row['url'].startswith('https://') and row['hf_hub_id']
    assert rows['pvt_huge_v2.None']['url'] is None


def test_predict_is_timm(cli):
    model = timm.create_model('test_pvt', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        probabilities = model(transform(Image.open(DIGIT).convert('RGB'))[None]).softmax(-1)[0]
    items = json.loads(cli('predict', DIGIT, *TEST_PVT, '--json', '--topk', 10))['images'][0]['predictions']
    assert len(items) == 10
    for item in items:
        assert item['probability'] == pytest.approx(probabilities[item['index']].item(), abs=2e-6)
    lines = cli('predict', DIGIT, *TEST_PVT, '--topk', 3).splitlines()
    assert len(lines) == 4 and lines[0] == str(DIGIT) and lines[1].split()[1] == '3'


@pytest.mark.parametrize('name', [
    'native.safetensors', 'original.pth', 'folder', 'transformers', 'transformers/model.safetensors'])
def test_predict_with_any_checkpoint(cli, files, name):
    reference = json.loads(cli('predict', DIGIT, *TEST_PVT, '--json'))['images'][0]['predictions']
    predictions = json.loads(cli('predict', DIGIT, '--checkpoint', files / name, '--json'))['images'][0]['predictions']
    assert [p['probability'] for p in predictions] == pytest.approx([p['probability'] for p in reference], abs=2e-6)
    word = {'folder': 'digit ', 'transformers': 'number '}.get(name.split('/')[0], '')
    assert predictions[0]['label'] == f'{word}3'


@pytest.mark.parametrize('argv, size', [(['--img-size', '64'], [64, 64]), (['--img-size', '64', '96'], [64, 96])])
def test_img_size_may_stand_before_the_image(cli, argv, size):
    assert json.loads(cli('predict', *TEST_PVT, '--json', *argv, DIGIT))['img_size'] == size


def test_imagenet_labels_and_input_channels(cli, files, tmp_path):
    torch.save(timm.create_model('pvt_tiny', in_chans=1).state_dict(), tmp_path / 'grey.pth')
    torch.save(timm.create_model('test_pvt', in_chans=4).state_dict(), tmp_path / 'four.pth')
    out = cli('predict', files / 'photo.jpg', '--checkpoint', tmp_path / 'grey.pth', '--json', '--img-size', 64)
    labels = timm.data.ImageNetInfo().label_descriptions()
    for item in json.loads(out)['images'][0]['predictions']:
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


@pytest.mark.parametrize('name', ['native.safetensors', 'dense.pth', 'headless.pth', 'folder'])
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
            torch.testing.assert_close(mine, timms[0], rtol=0, atol=1e-6)
    out = cli('features', files / 'photo.jpg', *TEST_PVT, '--output', tmp_path / 'a.png')
    assert '16x8x16' in out  # 90x150 becomes 32x64, which keeps the aspect


def test_weights_from_the_hub(cli, hub, no_waits, files, tmp_path, monkeypatch):
    state = timm.create_model('pvt_tiny').state_dict()
    theirs = from_timm(state, 'transformers')[0]
    save_file({k: v.contiguous() for k, v in theirs.items()}, tmp_path / 'model.safetensors')
    save_file(state, tmp_path / 'native.safetensors')
    hub.add_repo('Zetatech/pvt-tiny-224', {'model.safetensors': tmp_path / 'model.safetensors', 'config.json': '{}'},
                 commit=timm.models.get_pretrained_cfg('pvt_tiny').hf_hub_id.partition('@')[2])
    argv = ['predict', files / 'photo.jpg', '--img-size', 64, '--json']

    hub.fail('truncate', 'model.safetensors')
    hub.fail(500, 'pytorch_model.bin')
    assert 'Cannot load pvt_tiny.in1k' in cli(*argv, '--model', 'pvt_tiny', fails=True)
    hub.heal()
    with monkeypatch.context() as m:
        m.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
        assert '--checkpoint' in cli(*argv, '--model', 'pvt_tiny', fails=True)
    from_hub, from_file = (cli(*argv, *which) for which in (
        ['--model', 'pvt_tiny'], ['--checkpoint', tmp_path / 'native.safetensors']))
    assert json.loads(from_hub)['images'] == json.loads(from_file)['images']


# user errors ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('argv, says', [
    (['predict', 'nope.png', *TEST_PVT], 'No such file or directory: nope.png'),
    (['predict', '{files}', *TEST_PVT], 'Is a directory'),
    (['predict', '{files}/text.png', *TEST_PVT], 'cannot identify image'),
    (['predict', '{files}/cut.png', *TEST_PVT], 'cut.png: image file is truncated'),
    (['predict', '{files}/thin.png', '--img-size', '224', *TEST_PVT], 'pixels at most'),
    (['predict'], 'required: IMAGE'),
    (['predict', '{digit}', '--model', 'pvt_smal'], "Unknown model 'pvt_smal', expected one of pvt_tiny"),
    (['predict', '{digit}', '--model', 'pvt_small.foo'], 'Invalid pretrained tag (foo)'),
    (['predict', '{digit}', '--model', 'pvt_huge_v2'], 'No pretrained weights exist for pvt_huge_v2'),
    (['features', '{digit}', '--model', 'pvt_huge_v2', '--output', '{out}/a.png'], 'No pretrained weights'),
    (['predict', '{digit}', '--model', 'pvt_small.retinanet_coco'], 'without a classifier'),
    (['predict', '{digit}', *TEST_PVT, '--topk', '0'], 'a number from 1 up'),
    (['predict', '{digit}', *TEST_PVT, '--img-size', '31'], 'at least 32'),
    (['predict', '{digit}', *TEST_PVT, '--img-size', 'big'], 'N or H W'),
    (['predict', '{digit}', *TEST_PVT, '--img-size', '100000'], 'pixels at most'),
    (['predict', '{digit}', *TEST_PVT, '--nonsense'], 'unrecognized arguments: --nonsense'),
    (['predict', '{digit}', '--checkpoint', 'nope.pth'], 'nope.pth'),
    (['predict', '{digit}', '--checkpoint', '{digit}'], 'Expected a checkpoint'),
    (['predict', '{digit}', '--checkpoint', '{files}/empty'], 'found none'),
    (['predict', '{digit}', '--checkpoint', '{files}/badjson'], 'Cannot read'),
    (['predict', '{digit}', '--checkpoint', '{files}/list'], 'Expected a JSON object'),
    (['predict', '{digit}', '--checkpoint', '{files}/odd'], "a JSON object as 'pretrained_cfg'"),
    (['predict', '{digit}', '--checkpoint', '{files}/resnet'], 'a checkpoint of resnet18'),
    (['predict', '{digit}', '--checkpoint', '{files}/truncated.pth'], 'truncated.pth is damaged'),
    (['predict', '{digit}', '--checkpoint', '{files}/truncated.safetensors'], 'damaged'),
    (['predict', '{digit}', '--checkpoint', '{files}/dense.pth'], 'without a classifier'),
    (['predict', '{digit}', '--checkpoint', '{files}/headless.pth'], 'without a classifier'),
    (['predict', '{digit}', '--checkpoint', '{files}/nan.safetensors'], 'not finite'),
    (['features', '{digit}', '--checkpoint', '{files}/nan.safetensors', '--output', '{out}/a.png'], 'not finite'),
    (['predict', '{digit}', '--checkpoint', '{files}/gap.safetensors'], 'stages.0.blocks.0.attn.q.weight'),
    (['predict', '{digit}', '--checkpoint', '{files}/folder', '--model', 'pvt_tiny'], 'holds test_pvt'),
    (['features', '{digit}', *TEST_PVT], 'required: --output'),
    (['features', '{digit}', *TEST_PVT, '--output', '{out}/a.xyz'], "'xyz' is not supported"),
    (['features', '{digit}', *TEST_PVT, '--output', '{out}/none/a.png'], 'No such file or directory'),
    (['features', '{digit}', *TEST_PVT, '--output', '{out}/a.png', '--save', '{out}/none/a'], 'No such file or'),
    (['demo', '--output', '{digit}'], 'File exists'),
    (['nonsense'], "invalid choice: 'nonsense'"),
    (['run'], 'required: SCRIPT'),
    (['run', '{files}'], 'No such script'),
])
def test_user_errors(cli, files, tmp_path, argv, says):
    assert says in cli(*[a.format(files=files, digit=DIGIT, out=tmp_path) for a in argv], fails=True)
    assert not list(tmp_path.iterdir())


def transport_errors():
    client = import_module(next(c for c in HfHubHTTPError.__mro__ if 'huggingface_hub' not in c.__module__).__module__
                           .partition('.')[0])  # requests or httpx or what comes next
    for name in ('ConnectError', 'ReadTimeout', 'RemoteProtocolError', 'ConnectionError', 'Timeout'):
        if isinstance(kind := getattr(client, name, None), type) and issubclass(kind, Exception):
            yield kind('cannot\n connect')


@pytest.mark.parametrize('error, code, line', [
    *[(e, 2, 'cannot connect') for e in transport_errors()],
    (UserError('a\nb  c'), 2, 'a b c'),
    (ValueError('\x1b[31m \udcff'), 2, '\\x1b[31m \\udcff'),
    (FileNotFoundError(2, 'No such file', 'x'), 2, 'No such file: x'),
    (RuntimeError('x' * 5000), 2, 'x' * 1000 + ' ...'),
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


def test_no_matplotlib(cli, monkeypatch, tmp_path):
    for name in [m for m in sys.modules if m.split('.')[0] == 'matplotlib'] + ['matplotlib']:
        monkeypatch.setitem(sys.modules, name, None)
    assert '`draw` extra' in cli('features', DIGIT, *TEST_PVT, '--output', tmp_path / 'a.png', fails=True)


def test_a_failed_write_leaves_nothing(cli, monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    def fail(self, f, **kwargs):
        f.write(b'half a picture')
        raise OSError(28, 'No space left on device')
    (tmp_path / 'a.png').write_bytes(b'old')
    monkeypatch.setattr(Figure, 'savefig', fail)
    assert 'No space left' in cli('features', DIGIT, *TEST_PVT, '--output', tmp_path / 'a.png', fails=True)
    assert [p.name for p in tmp_path.iterdir()] == ['a.png'] and (tmp_path / 'a.png').read_bytes() == b'old'


# processes ------------------------------------------------------------------------------------------------------------

SCRIPT = '''
import json, multiprocessing, os, pickle, sys
import neighbour

class Thing:
    pass

def double(x):
    return 2 * x

if __name__ == '__main__':
    import timm
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        doubled = pool.map(double, [1, 2])
    print(json.dumps(dict(
        argv=sys.argv, path=sys.path[0], file=__file__, registered=timm.is_model('pvt_small'), cwd=os.getcwd(),
        pickles=type(pickle.loads(pickle.dumps(Thing()))).__name__, main=sys.modules['__main__'].Thing is Thing,
        doubled=doubled)))
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
    """Exit code and one line on stderr, with nothing else before it."""
    done = python('-m', 'pvt_timm', 'predict', 'nope.png')
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == 'pvt-timm: error: No such file or directory: nope.png\n'


def test_names_that_the_terminal_cannot_show(python, tmp_path):
    name = tmp_path / 'drei \udcff\u4e09.png'
    name.write_bytes(DIGIT.read_bytes())
    (tmp_path / 'labels.txt').write_text('\n'.join('零一二三四五六七八九'), encoding='utf-8')
    done = python('-m', 'pvt_timm', 'predict', name.name, *TEST_PVT, '--topk', 1, '--labels', 'labels.txt',
                  PYTHONIOENCODING='ascii', PYTHONUTF8='0', LC_ALL='C')
    assert (done.returncode, done.stderr) == (0, '') and done.stdout.startswith('drei ') and '\\u4e09' in done.stdout


def test_closed_pipe(client_env, tmp_path):
    done = subprocess.run(
        f'"{sys.executable}" -m pvt_timm list --json | head -1', shell=True, cwd=tmp_path, env=client_env,
        capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, '[\n', '')
