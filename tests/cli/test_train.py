""" `pvt-timm train`: settings for the machine, recovery, names of classes. A stand-in replaces timm's script. """
import argparse
import csv
import json
import multiprocessing
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
import yaml
from PIL import Image

from pvt_timm.cli.main import main
from pvt_timm.cli.predict import open_image
from pvt_timm.digits import write_digits
from pvt_timm.labels import LABELS_FILE, labels_beside
from pvt_timm.recipes import RECIPES


@pytest.fixture
def script(tmp_path):
    file = tmp_path / 'train.py'
    file.write_text('import json, sys, timm\nprint(json.dumps([sys.argv, timm.is_model("pvt_tiny"), __name__]))')
    return file


@pytest.fixture
def start(script, tmp_path, monkeypatch, capsys):
    """Return a function that runs `train`. It returns the exit code, the script's command line, and stderr.

    The command line is None if the script is not started.
    """
    for name in ('create_dataset', 'create_loader'):  # put back what `train` changes
        monkeypatch.setattr(timm.data, name, getattr(timm.data, name))
    monkeypatch.setattr(torch.nn.parallel.DistributedDataParallel, '__init__',
                        torch.nn.parallel.DistributedDataParallel.__init__)
    started = []
    monkeypatch.setattr('pvt_timm.cli.main.run_script', started.append)

    def run(*args, config='digits'):
        started.clear()
        code = main(['train', str(script), *(('--config', config) if config else ()), '--output', str(tmp_path / 'out'),
                     '--experiment', 'x', *map(str, args)])
        return code, started[0] if started else None, capsys.readouterr().err
    return run


@pytest.fixture
def folder(tmp_path):
    """Return the folder of the experiment."""
    (tmp_path / 'out' / 'x').mkdir(parents=True)
    return tmp_path / 'out' / 'x'


def save(file, epoch):
    torch.save({'epoch': epoch, 'state_dict': {}, 'optimizer': {}, 'args': argparse.Namespace(epochs=120)}, file)


def test_starts_the_script(python, script, tmp_path):
    """The script runs as `__main__` with its arguments and the recipe's settings, and the models are registered."""
    args = ['--config', 'digits', '--output', 'out', '--experiment', 'x']
    done = python('-m', 'pvt_timm', 'train', script, *args)
    argv, registered, name = json.loads(done.stdout)
    settings = Path('out', 'x', 'settings.yaml')
    assert registered and name == '__main__' and done.stderr == ''
    assert argv == [str(script), *args, '--config', str(settings)]
    assert yaml.safe_load((tmp_path / settings).read_text())['model'] == 'test_pvt'


@pytest.mark.parametrize('gpu, bfloat16, config, args, changed', [
    (None, True, 'finetune', [], dict(device='cpu', amp_dtype='bfloat16')),
    (None, False, 'finetune', [], dict(device='cpu', amp=False)),
    (None, False, 'pvt_tiny', ['--device', 'cpu'], dict(amp=False)),
    (None, True, 'pvt_tiny', [], dict(device='cpu', amp_dtype='bfloat16')),
    (None, False, 'finetune', ['--amp'], dict(device='cpu')),  # whoever types it gets it
    (None, False, 'digits', [], {}),
    ('cuda', True, 'finetune', [], {}),
    ('cuda', False, 'finetune', [], dict(amp_dtype='float16')),
    ('cuda', True, 'pvt_tiny', [], {}),
    ('mps', False, 'digits', [], {}),
    ('mps', False, None, [], dict(device='mps')),
])
def test_takes_what_the_machine_has(start, folder, monkeypatch, gpu, bfloat16, config, args, changed):
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: gpu is not None)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device(gpu))
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: bfloat16)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: bfloat16)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: False)
    fused = []
    monkeypatch.setattr(timm.layers, 'set_fused_attn', fused.append)
    code, argv, err = start(*args, config=config)
    settings = yaml.safe_load(RECIPES[config].read_text()) if config else {}
    assert code == 0
    assert err.count('\n') == bool(changed) and all(f'{k}: {v}' in err for k, v in changed.items())
    settings.update(changed)
    assert yaml.safe_load(Path(argv[-1]).read_text(encoding='utf-8')) == settings
    assert fused == ([False] if gpu is None and settings.get('amp') and settings['amp_dtype'] == 'bfloat16' else [])


def test_goes_on_from_the_newest_complete_checkpoint(start, folder):
    assert '--resume' not in start()[1]
    for epoch in (8, 9, 10):
        save(folder / f'checkpoint-{epoch}.pth.tar', epoch)
    os.link(folder / 'checkpoint-10.pth.tar', folder / 'last.pth.tar')
    save(folder / 'recovery-11-7.pth.tar', 11)  # from the middle of an epoch, not to be taken
    code, argv, err = start('--lr', '0.1')
    assert argv[argv.index('--resume') + 1] == str(folder / 'last.pth.tar') and err.count('\n') == 1
    assert 'after epoch 10' in err and 'learning rate and weight decay are taken from this file' in err

    (folder / 'last.pth.tar').unlink()  # timm removes it before it puts the new one in its place
    assert str(folder / 'checkpoint-10.pth.tar') in start()[1]

    damaged = (folder / 'checkpoint-10.pth.tar').read_bytes()[:300]  # a power cut while writing
    for name in ('last', 'checkpoint-10'):
        (folder / f'{name}.pth.tar').write_bytes(damaged)
    code, argv, err = start()
    assert str(folder / 'checkpoint-9.pth.tar') in argv and err.count('this checkpoint is not used: ') == 2

    assert start('--resume', 'own.pth')[1].count('--resume') == 1  # the user's own choice counts


@pytest.mark.parametrize('content', [b'', b'half a file', None])
def test_never_starts_silently_from_epoch_0(start, folder, content):
    """A checkpoint that cannot be continued is an error. (None: weights without epoch and optimizer.)"""
    if content is None:
        torch.save({'state_dict': {}}, folder / 'last.pth.tar')
    else:
        (folder / 'last.pth.tar').write_bytes(content)
    code, argv, err = start()
    assert (code, argv) == (2, None)
    assert err.count('\n') == 1 and 'Cannot go on from' in err and str(folder / 'last.pth.tar') in err


@pytest.mark.parametrize('dataset', ['', 'torch/image_folder'])
def test_keeps_the_class_names(start, folder, tmp_path, dataset):
    for name in ('cat 2', 'cat 10', 'äffchen'):
        (tmp_path / 'data' / 'train' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'data' / 'train' / name / '0.png')
    start()
    data = timm.data.create_dataset(dataset, root=str(tmp_path / 'data'), split='train', is_training=True)
    class_to_idx = getattr(data, 'reader', data).class_to_idx
    names = labels_beside(folder / 'last.pth.tar')
    assert {name: i for i, name in enumerate(names)} == class_to_idx and len(names) == 3
    # timm reads it too, with --class-map
    assert timm.data.readers.class_map.load_class_map(str(folder / LABELS_FILE)) == class_to_idx


@pytest.mark.parametrize('dataset', ['', 'torch/image_folder'])
def test_keeps_odd_class_names(start, folder, tmp_path, dataset):
    """Names of classes are kept even if a line of a text file cannot hold them."""
    names = [' cat', 'cat ', 'a\nb', 'a\x0bb']
    for name in names:
        (tmp_path / 'data' / 'train' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'data' / 'train' / name / '0.png')
    start()
    data = timm.data.create_dataset(dataset, root=str(tmp_path / 'data'), split='train', is_training=True)
    class_to_idx = getattr(data, 'reader', data).class_to_idx
    assert {name: i for i, name in enumerate(labels_beside(folder / 'last.pth.tar'))} == class_to_idx
    assert sorted(class_to_idx) == sorted(names)


RAMP = np.linspace(0, 1, 32 * 48).reshape(48, 32)
DEEP = {  # grey images of more than 8 bits, by the ending of their file
    'png': (RAMP * 65535).astype(np.uint16), 'pgm': (RAMP * 65535).astype(np.int32), 'tif': RAMP.astype(np.float32)}


@pytest.fixture(params=['train', 'run'])
def started(request, start, script):
    """Start a script, by both commands: it then has what they change in timm."""
    assert (start() if request.param == 'train' else (main(['run', str(script)]), 0, 0))[0] == 0


@pytest.mark.parametrize('suffix, context', [
    *((suffix, None) for suffix in DEEP),
    *(pytest.param('png', method, marks=[pytest.mark.slow] * (method != 'fork'))  # others import everything again
      for method in multiprocessing.get_all_start_methods())])
@pytest.mark.parametrize('dataset', ['', 'torch/image_folder'])
def test_images_of_16_bits_are_read_as_by_predict(started, tmp_path, dataset, suffix, context):
    """Also in worker processes. Pillow's conversion would make them white, or black if they have values from 0 to 1."""
    cat = tmp_path / 'data' / 'train' / 'cat'
    cat.mkdir(parents=True)
    Image.fromarray(DEEP[suffix]).save(cat / f'0.{suffix}')
    Image.fromarray((RAMP * 255).astype(np.uint8)).convert('RGB').save(cat / '1.png')
    before = timm.data.get_img_extensions()
    timm.data.add_img_extensions(f'.{suffix}')
    data = timm.data.create_dataset(
        dataset, root=str(tmp_path / 'data'), split='train', is_training=True, class_map=None)
    timm.data.set_img_extensions(before)
    data.transform = np.asarray
    loader = torch.utils.data.DataLoader(
        data, num_workers=1 if context else 0, multiprocessing_context=context, collate_fn=list)
    (deep, target), (plain, _) = (batch[0] for batch in loader)
    assert target == 0 and np.array_equal(deep, np.array(open_image(cat / f'0.{suffix}')))
    assert np.abs(deep[..., 0] - RAMP * 255).max() <= 1
    assert np.array_equal(plain, np.array(Image.open(cat / '1.png')))


def test_readers_of_such_images(started, tmp_path, caplog):
    """Grey levels are given to a model with one channel. Names, classes and damaged images are timm's matter."""
    for i, name in enumerate(('cat', 'dog')):
        (tmp_path / 'data' / name).mkdir(parents=True)
        Image.fromarray(DEEP['png']).save(tmp_path / 'data' / name / f'{i}.png')
    data = timm.data.create_dataset('', root=str(tmp_path / 'data'), split='x', input_img_mode='L')
    assert np.array_equal(np.array(data[0][0]), np.array(open_image(tmp_path / 'data' / 'cat' / '0.png', 1)))
    assert data.filenames(basename=True) == ['0.png', '1.png'] and data.filename(1) == os.path.join('dog', '1.png')
    assert data.reader.class_to_idx == dict(cat=0, dog=1) and len(data) == 2
    (tmp_path / 'data' / 'cat' / '0.png').write_bytes(b'damaged')
    assert data[0][1] == 1 and 'Skipped sample (index 0)' in caplog.text
    Image.fromarray(np.full((9, 9), -1, np.int32)).save(tmp_path / 'data' / 'cat' / '0.png', 'tiff')
    with pytest.raises(ValueError, match='Cannot read the image .*0.png: its values are from -1 to -1'):
        data[0]


@pytest.mark.parametrize('gpu, script, args, command', [
    (None, 'validate.py', ['--model', 'test_pvt'], ['--device', 'cpu', '--model', 'test_pvt']),
    ('mps', 'validate.py', ['data'], ['--device', 'mps', 'data']),
    ('cuda', 'validate.py', ['data'], ['data']),
    (None, 'validate.py', ['--device', 'cuda:1'], ['--device', 'cpu', '--device', 'cuda:1']),  # the last one counts
    (None, 'benchmark.py', ['--model', 'test_pvt'], ['--model', 'test_pvt']),
    (None, 'mine/validate.py', ['data'], ['data']),  # a script of the user, without such an option
])
def test_device_of_validate(start, tmp_path, monkeypatch, gpu, script, args, command):
    started = []
    monkeypatch.setattr('pvt_timm.cli.main.run_script', started.append)
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: gpu is not None)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device(gpu))
    (tmp_path / script).parent.mkdir(exist_ok=True)
    (tmp_path / script).write_text('' if 'mine' in script else "parser.add_argument('--device', default='cuda')")
    assert main(['run', str(tmp_path / script), *args]) == 0
    assert started == [[str(tmp_path / script), *command]]


@pytest.mark.slow
def test_trains_on_images_of_16_bits(python, train_py, tmp_path):
    """train.py and validate.py themselves: a trained model recognises digits of 16 bits, and goes on training."""
    pytest.importorskip('sklearn')
    digits = write_digits(tmp_path / 'digits')
    for file in digits.rglob('*.png'):
        if int(re.findall('[0-9]+', file.stem)[-1]) % 4:  # some are enough
            file.unlink()
        else:
            Image.fromarray(np.array(Image.open(file).convert('L')).astype(np.uint16) * 257).save(file)
            assert Image.open(file).mode.startswith('I')
    for name in ('train.py', 'validate.py'):
        shutil.copy(train_py.with_name(name), tmp_path)  # there it uses the installed timm
    options = ['--model', 'test_pvt', '--pretrained', '--data-dir', digits, '--workers', '1', '--batch-size', '16']
    done = python('-m', 'pvt_timm', 'train', 'train.py', *options, '--num-classes', '10', '--epochs', '1', '--lr',
                  '1e-6', '--output', 'out', '--experiment', 'x', '--no-aug')
    assert done.returncode == 0, done.stderr
    row, = csv.DictReader((tmp_path / 'out' / 'x' / 'summary.csv').open(encoding='utf-8'))
    assert float(row['eval_top1']) >= 90 and float(row['train_loss']) < 1
    done = python('-m', 'pvt_timm', 'run', 'validate.py', *options)
    assert done.returncode == 0, done.stderr
    assert float(re.search('"top1": ([0-9.]+)', done.stdout)[1]) >= 90


def test_refuses_fewer_images_than_a_batch(start, tmp_path, capsys):
    """timm would train nothing and say nothing, as it leaves out the images that do not fill a batch."""
    (tmp_path / 'data' / 'train' / 'cat').mkdir(parents=True)
    for i in range(3):
        Image.new('RGB', (8, 8)).save(tmp_path / 'data' / 'train' / 'cat' / f'{i}.png')
    start()
    data = timm.data.create_dataset('', root=str(tmp_path / 'data'), split='train', is_training=True)
    kwargs = dict(input_size=(3, 32, 32), is_training=True, num_workers=0, use_prefetcher=False)
    assert len(timm.data.create_loader(data, batch_size=3, **kwargs)) == 1
    with pytest.raises(SystemExit) as refused:
        timm.data.create_loader(data, batch_size=4, **kwargs)
    error = capsys.readouterr().err
    assert refused.value.code == 2 and error.count('\n') == 1
    assert 'error: Expected at least 4 images to train on' in error and 'got 3: give a smaller --batch-size' in error


def save_finished(folder, epoch, **args):
    args = dict(dict(epochs=10, sched='cosine', cooldown_epochs=0, warmup_epochs=0, lr_cycle_limit=1), **args)
    torch.save({'epoch': epoch, 'state_dict': {}, 'optimizer': {}, 'args': argparse.Namespace(**args)},
               folder / 'last.pth.tar')


@pytest.mark.parametrize('epoch, kept, now, epochs', [
    (9, {}, [], 10),
    (12, dict(cooldown_epochs=3), [], 13),
    (11, dict(warmup_epochs=2, warmup_prefix=True), [], 12),
    (9, dict(sched='step'), [], 10),
    (9, dict(sched='cosine', sched_on_updates=True), [], 10),
    (9, {}, ['--epochs', '8'], 8),
    (11, {}, ['--cooldown-epochs', '2'], 12),
])
def test_a_finished_run_is_said_to_be(start, folder, epoch, kept, now, epochs):
    """For a finished run, `train` prints a message. train.py would only print `--result []`."""
    save_finished(folder, epoch, **kept)
    code, argv, err = start(*now, config=None)
    assert (code, argv) == (0, None)
    assert f'the run is finished, all {epochs} epochs are done: {folder}/last.pth.tar' in err
    assert not (folder / 'settings.yaml').exists()
    (folder / 'model_best.pth.tar').touch()
    assert f'{folder}/model_best.pth.tar (best epoch)' in start(*now, config=None)[2]


@pytest.mark.parametrize('epoch, kept, now', [
    (8, {}, []),
    (9, {}, ['--epochs', '11']),
    (9, dict(cooldown_epochs=1), []),
    (9, {}, ['--lr-cycle-limit', '2']),
    (9, {}, ['--warmup-epochs', '1', '--warmup-prefix']),
    (9, dict(sched='nonsense'), []),  # train.py says so
    (9, dict(epochs='ten'), []),
])
def test_a_run_that_is_not_finished_goes_on(start, folder, epoch, kept, now):
    save_finished(folder, epoch, **kept)
    code, argv, err = start(*now, config=None)
    assert code == 0 and '--resume' in argv and 'finished' not in err


DISTRIBUTED = '''if True:
    import torch, warnings
    warnings.simplefilter('error', FutureWarning)
    torch.distributed.init_process_group('gloo')
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Linear(2, 2), device_ids=[torch.device('cpu')], broadcast_buffers=True)
    model(torch.ones(1, 2)).sum().backward()
    assert model.forward_sync_buffers if hasattr(model, 'forward_sync_buffers') else model.broadcast_buffers
    torch.distributed.destroy_process_group()
    print('trained')
'''


@pytest.mark.slow
def test_processes_on_cpu_warn_of_nothing(python, tmp_path):
    """Training on a CPU prints no FutureWarning about `broadcast_buffers`, which train.py passes."""
    (tmp_path / 'ddp.py').write_text(DISTRIBUTED)
    done = python('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=1', '-m', 'pvt_timm', 'train',
                  'ddp.py', '--experiment', 'x', '--device', 'cpu')
    assert done.returncode == 0 and done.stdout == 'trained\n', done.stderr
    assert 'FutureWarning' not in done.stderr


def test_what_a_checkpoint_says_is_no_code_for_the_terminal(start, folder):
    torch.save({'epoch': '\x1b[2J' + 'x' * 1000, 'state_dict': {}, 'optimizer': {}}, folder / 'last.pth.tar')
    code, argv, err = start()
    assert code == 0 and '\\x1b[2J' in err and '\x1b' not in err and len(err) < 600


@pytest.mark.parametrize('kept, now, option', [
    (dict(model='test_pvt', num_classes=3), ['--num-classes', 5], '--num-classes 3, now it is 5'),
    (dict(num_classes=3), [], '--num-classes 3, now it is 10'),  # of the recipe
    (dict(model='pvt_tiny', num_classes=10), [], '--model pvt_tiny, now it is test_pvt'),
    (dict(model='pvt_tiny', num_classes=3), ['--model', 'pvt_tiny'], '--num-classes 3, now it is 1000'),  # by default
    (dict(img_size=32), ['--img-size=64'], '--img-size 32, now it is 64'),
    (dict(in_chans=1), ['--in-chans', 3], '--in-chans 1, now it is 3'),
    (dict(model='\x1b[2J'), [], '\\x1b[2J'),
])
def test_does_not_go_on_with_another_model(start, folder, kept, now, option):
    """A checkpoint of another model is refused, and settings.yaml is kept.

    Otherwise settings.yaml would be replaced, and train.py would end with a traceback.
    """
    (folder / 'settings.yaml').write_text('of the run')
    torch.save({'epoch': 1, 'state_dict': {}, 'optimizer': {}, 'args': argparse.Namespace(**kept)},
               folder / 'last.pth.tar')
    code, argv, err = start(*now, config=None if '1000' in option else 'digits')
    assert (code, argv, err.count('\n')) == (2, None, 1) and option in err and 'last.pth.tar' in err
    assert (folder / 'settings.yaml').read_text() == 'of the run'


@pytest.mark.parametrize('kept, now', [
    (dict(model='test_pvt', num_classes=10), []), (dict(model='test_pvt', num_classes=10), ['--num-classes', 10]),
    (dict(model='test_pvt.digits', num_classes=10, img_size=None, in_chans=None), ['--img-size', 32, '--in-chans', 3]),
    (dict(model='pvt_tiny', num_classes=1000), ['--model', 'pvt_tiny.in1k', '--num-classes', 1000]),
    (dict(num_classes='many', model=5), []), ({}, []),
])
def test_goes_on_with_the_same_model(start, folder, kept, now):
    torch.save({'epoch': 1, 'state_dict': {}, 'optimizer': {}, 'args': argparse.Namespace(**kept)},
               folder / 'last.pth.tar')
    assert '--resume' in start(*now)[1]


@pytest.mark.parametrize('text, says', [
    ('experiment: 2024', "Expected text as experiment in x.yaml, got 2024: put it in quotes"),
    ('experiment: 2024-01-01', 'datetime.date(2024, 1, 1): put it in quotes'),
    ('output: [a]', "Expected text as output in x.yaml, got ['a']"),
    ('device: 0', 'Expected text as device in x.yaml, got 0'),
    ('device: "0"', "Expected a device such as cpu, cuda or cuda:1, got '0'"),
    ('device: fridge', "got 'fridge'"),
    ('amp_dtype: 16', 'Expected text as amp_dtype'),
    ('model: 5', 'Expected text as model'),
    ('resume: true', 'Expected text as resume'),
    ('1: 2', 'got 1 as a name'), ('no: 2', 'got False as a name'),
])
def test_values_that_are_no_text(cli, script, tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    Path('x.yaml').write_text(text, encoding='utf-8')
    more = [] if text.startswith('experiment') else ['--experiment', 'x']
    assert says in cli('train', 'train.py', '--config', 'x.yaml', *more, fails=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['train.py', 'x.yaml']


def test_text_in_quotes_and_none(start, tmp_path):
    (tmp_path / 'x.yaml').write_text('experiment: "2024"\nresume:\ndevice:\nimg_size: [224, 192]\n')
    assert main(['train', str(tmp_path / 'train.py'), '--config', str(tmp_path / 'x.yaml'), '--output',
                 str(tmp_path / 'out')]) == 0
    settings = yaml.safe_load((tmp_path / 'out' / '2024' / 'settings.yaml').read_text())
    assert settings['experiment'] == '2024' and settings['img_size'] == [224, 192]


def test_nothing_is_said_before_an_error(start, folder, monkeypatch):
    """An error is the only line: lines about the machine and about unreadable checkpoints are not printed."""
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)
    (folder / 'last.pth.tar').write_bytes(b'half a file')
    save(folder / 'checkpoint-3.pth.tar', 3)
    assert start(config='finetune')[2].count('\n') == 3
    (folder / 'checkpoint-3.pth.tar').unlink()
    code, argv, err = start(config='finetune')
    assert (code, err.count('\n')) == (2, 1) and 'Cannot go on' in err


@pytest.mark.parametrize('args, says', [
    (['none.py'], 'No such script'),
    (['train.py', '--config', 'digits'], '--experiment'),
    (['train.py', '--config', 'nothing'], ', '.join(RECIPES)),
    (['train.py', '--config', 'list.yaml'], 'names and values'),
    (['train.py', '--config', 'bad.yaml'], 'bad.yaml'),
    (['train.py', '--config'], 'expected one argument'),
    (['train.py', '--config', 'digits', '--experiment', 'x', '--output', 'train.py'], 'Not a directory'),
])
def test_wrong_input(cli, script, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    Path('list.yaml').write_text('- 1', encoding='utf-8')
    Path('bad.yaml').write_text('a: [', encoding='utf-8')
    assert says in cli('train', *args, fails=True)
