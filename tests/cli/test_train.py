""" `train`: what the machine has, recovery, names of classes, with a stand-in for the script. """
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm.data
import torch
import yaml

from pvt_timm.cli import train
from pvt_timm.cli.main import main
from pvt_timm.labels import LABELS_FILE, labels_beside
from pvt_timm.recipes import load_recipe, recipe_names


@pytest.fixture
def script(tmp_path):
    file = tmp_path / 'train.py'
    file.write_text('import json, sys, timm\nprint(json.dumps([sys.argv, timm.is_model("pvt_tiny"), __name__]))')
    return file


@pytest.fixture
def start(script, tmp_path, monkeypatch, capsys):
    """Run `train`: exit code, command line of the script (None if it is not started), stderr."""
    monkeypatch.setattr(timm.data, 'create_dataset', timm.data.create_dataset)  # put back what `train` changes
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
    """The folder of the experiment."""
    (tmp_path / 'out' / 'x').mkdir(parents=True)
    return tmp_path / 'out' / 'x'


def save(file, epoch, **args):
    args = argparse.Namespace(**{'model': 'test_pvt', 'lr': 2e-3, 'weight_decay': 0.05, 'epochs': 120, **args})
    torch.save({'epoch': epoch, 'arch': 'test_pvt', 'state_dict': {}, 'optimizer': {}, 'args': args}, file)


def test_starts_the_script(script, tmp_path):
    """As `__main__`, with its own arguments, the recipe's settings, and the models registered."""
    args = ['--config', 'digits', '--output', str(tmp_path / 'out'), '--experiment', 'x']
    done = subprocess.run(
        [sys.executable, '-m', 'pvt_timm', 'train', str(script), *args], capture_output=True, text=True, timeout=300,
        check=True, env=dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2])))
    argv, registered, name = json.loads(done.stdout)
    settings = tmp_path / 'out' / 'x' / 'settings.yaml'
    assert registered and name == '__main__' and done.stderr == ''
    assert argv == [str(script), *args, '--config', str(settings)]
    assert yaml.safe_load(settings.read_text())['model'] == 'test_pvt'


@pytest.mark.parametrize('gpu, bfloat16, config, args, changed', [
    (None, True, 'finetune', [], dict(device='cpu')),
    (None, False, 'finetune', [], dict(device='cpu', amp=False)),
    (None, False, 'pvt_tiny', ['--device', 'cpu'], dict(amp=False)),
    (None, True, 'pvt_tiny', [], dict(device='cpu', amp_dtype='bfloat16')),
    (None, False, 'finetune', ['--amp'], dict(device='cpu')),  # whoever types it gets it
    (None, False, 'digits', [], {}),
    ('cuda', True, 'finetune', [], {}),
    ('cuda', False, 'finetune', [], dict(amp_dtype='float16')),
    ('cuda', False, 'pvt_tiny', [], {}),
    ('mps', False, 'digits', [], {}),
    ('mps', False, None, [], dict(device='mps')),
])
def test_takes_what_the_machine_has(start, folder, monkeypatch, gpu, bfloat16, config, args, changed):
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: gpu is not None)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device(gpu))
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: bfloat16)
    monkeypatch.setattr(train, '_cpu_has_bfloat16', lambda: bfloat16)
    code, argv, err = start(*args, config=config)
    assert code == 0
    assert err.count('\n') == bool(changed) and all(f'{k}: {v}' in err for k, v in changed.items())
    expected = {**(load_recipe(config) if config else {}), **changed}
    assert (yaml.safe_load(Path(argv[-1]).read_text()) if argv[-2] == '--config' else {}) == expected


def test_goes_on_from_the_newest_complete_checkpoint(start, folder):
    assert '--resume' not in start()[1]
    for epoch in (0, 1, 2):
        save(folder / f'checkpoint-{epoch}.pth.tar', epoch)
    os.link(folder / 'checkpoint-2.pth.tar', folder / 'last.pth.tar')
    save(folder / 'recovery-3-7.pth.tar', 3)  # from the middle of an epoch, not to be taken
    code, argv, err = start()
    assert argv[argv.index('--resume') + 1] == str(folder / 'last.pth.tar') and 'after epoch 2' in err

    (folder / 'last.pth.tar').unlink()  # timm removes it before it puts the new one in its place
    assert str(folder / 'checkpoint-2.pth.tar') in start()[1]

    damaged = (folder / 'checkpoint-2.pth.tar').read_bytes()[:300]  # a power cut while writing
    for name in ('last', 'checkpoint-2'):
        (folder / f'{name}.pth.tar').write_bytes(damaged)
    code, argv, err = start()
    assert str(folder / 'checkpoint-1.pth.tar') in argv and err.count('passing over') == 2

    assert start('--resume', 'own.pth')[1].count('--resume') == 1  # the user's own choice counts


@pytest.mark.parametrize('content', [b'', b'half a file', None])
def test_never_starts_silently_from_epoch_0(start, folder, content):
    """None: weights without epoch and optimizer."""
    if content is None:
        torch.save({'state_dict': {}}, folder / 'last.pth.tar')
    else:
        (folder / 'last.pth.tar').write_bytes(content)
    code, argv, err = start()
    assert (code, argv) == (2, None)
    assert err.count('\n') == 1 and 'Cannot go on from' in err and str(folder / 'last.pth.tar') in err


def test_says_what_is_taken_from_the_checkpoint(start, folder):
    save(folder / 'last.pth.tar', 3)
    code, argv, err = start('--lr', '2e-3', '--batch-size', '8')
    assert 'learning rate' in err and 'without effect' not in err
    code, argv, err = start('--lr', '0.1', '--weight-decay=0.05', '--opt-betas', '0.9', '0.99')
    assert code == 0 and '--resume' in argv
    assert err.count('\n') == 1 and 'without effect is --lr 0.1 (was 0.002)' in err and 'weight-decay' not in err


def test_says_that_nothing_is_left_to_do(start, folder):
    save(folder / 'last.pth.tar', 7)
    code, argv, err = start('--epochs', '8')
    assert (code, argv) == (0, None)
    assert err.count('\n') == 1 and 'nothing left to do' in err and '8 epochs' in err
    assert start('--epochs', '8', '--cooldown-epochs', '1')[1] is not None
    assert start('--epochs', '9')[1] is not None
    save(folder / 'last.pth.tar', 119)  # the epochs of the run before, if none are given
    assert start(config=None)[1] is None


def test_keeps_the_class_names(start, folder, tmp_path):
    from PIL import Image
    for name in ('cat 2', 'cat 10', 'äffchen'):
        (tmp_path / 'data' / 'train' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'data' / 'train' / name / '0.png')
    start()
    dataset = timm.data.create_dataset('', root=str(tmp_path / 'data'), split='train', is_training=True)
    names = labels_beside(folder / 'last.pth.tar')
    assert names == ['cat 2', 'cat 10', 'äffchen'] == sorted(names, key=dataset.reader.class_to_idx.get)
    # timm reads it too, with --class-map
    assert timm.data.readers.class_map.load_class_map(str(folder / LABELS_FILE)) == dataset.reader.class_to_idx


def test_wrong_input_is_one_line(start, script, tmp_path, capsys):
    (tmp_path / 'list.yaml').write_text('- 1')
    (tmp_path / 'bad.yaml').write_text('a: [')
    for args, says in (
            ([tmp_path / 'none.py'], 'No such script'), ([script, '--config', 'digits'], '--experiment'),
            ([script, '--config', 'nothing'], ', '.join(recipe_names())),
            ([script, '--config', tmp_path / 'list.yaml'], 'names and values'),
            ([script, '--config', tmp_path / 'bad.yaml'], 'bad.yaml'),
            ([script, '--config', 'digits', '--experiment', 'x', '--output', script], 'Not a directory')):
        assert main(['train', *map(str, args)]) == 2
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and says in err
