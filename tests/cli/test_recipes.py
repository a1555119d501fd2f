""" Every recipe through timm's own train.py: its keys are known, and what it sets lands where it is meant to.

train.py comes from a checkout of timm that TIMM_CHECKOUT names.
"""
import functools
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pvt_timm import recipes
from pvt_timm.cli.main import main

CHECKOUT = os.environ.get('TIMM_CHECKOUT')
needs_timm = pytest.mark.skipif(
    not CHECKOUT or not Path(CHECKOUT, 'train.py').is_file(),
    reason='TIMM_CHECKOUT is not set to a checkout of huggingface/pytorch-image-models (for its train.py)')

# The original code: drop path and gradient clipping of every variant
PAPER = {'pvt_tiny': (0.1, None), 'pvt_small': (0.1, None), 'pvt_medium': (0.3, 1.0), 'pvt_large': (0.3, 1.0)}


class Stop(Exception):
    """Ends train.py where everything has been set up."""


@functools.cache
def train_module():
    spec = importlib.util.spec_from_file_location('timm_train', Path(CHECKOUT, 'train.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """An image folder of two classes with 16 images."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.RandomState(0)
    for split in ('train', 'validation'):
        for label in ('a', 'b'):
            (root / split / label).mkdir(parents=True)
            for i in range(8):
                image = Image.fromarray(rng.randint(0, 255, (40, 40, 3), dtype=np.uint8))
                image.save(root / split / label / f'{i}.png')
    return root


def set_up(monkeypatch, folder, tmp_path, *args):
    """Run the unmodified train.py until the first epoch would start, and return all that it made."""
    import argparse
    train = train_module()
    made = {}

    def record(name):
        original = getattr(train, name)

        def wrapper(*a, **kw):
            result = original(*a, **kw)
            made.setdefault(name, []).append((a, kw, result))
            return result
        monkeypatch.setattr(train, name, wrapper)

    for name in ('create_model', 'create_optimizer_v2', 'create_scheduler_v2', 'create_loader', 'create_dataset',
                 'resolve_data_config', '_parse_args'):
        record(name)

    def stop(*a, **kw):
        made['epoch'] = kw
        raise Stop

    monkeypatch.setattr(train, 'train_one_epoch', stop)
    monkeypatch.setattr(train.utils, 'setup_default_logging', lambda: None)
    # the parser keeps the defaults of a config, so every run gets its own copy
    import copy
    monkeypatch.setattr(train, 'parser', copy.deepcopy(train.parser))
    argv = ['train.py', '--device-modules', 'pvt_timm', '--data-dir', str(folder), '--device', 'cpu', '--workers', '0',
            '--output', str(tmp_path), '--experiment', 'x', *map(str, args)]
    monkeypatch.setattr(sys, 'argv', argv)
    with pytest.raises(Stop):
        train.main()
    made['args'] = made['_parse_args'][0][2][0]
    made['model'] = made['create_model'][0][2]
    made['optimizer'] = made['create_optimizer_v2'][0][2]
    made['scheduler'], made['epochs'] = made['create_scheduler_v2'][0][2]
    assert isinstance(made['args'], argparse.Namespace)
    return made


def lr_at(scheduler, epoch):
    return max(scheduler._get_lr(epoch))


def drop_paths(model):
    return [getattr(b.drop_path1, 'drop_prob', 0.) for s in model.stages for b in s.blocks]


@needs_timm
@pytest.mark.parametrize('name', recipes.recipe_names())
def test_every_key_is_known_and_of_the_right_type(name):
    actions = {a.dest: a for a in train_module().parser._actions}
    recipe = recipes.load_recipe(name)
    assert recipe.keys() <= actions.keys()
    for key, value in recipe.items():
        action = actions[key]
        values = value if isinstance(value, list) else [value]
        assert isinstance(value, list) == (action.nargs in ('+', '*')), key
        if action.nargs == 0:
            assert isinstance(value, bool), key
        else:
            kinds = (float, int) if action.type is float else (action.type or str,)
            assert all(type(v) in kinds for v in values), f'{key}: {value!r}'


@needs_timm
@pytest.mark.parametrize('name', PAPER)
def test_paper_recipe_lands(name, monkeypatch, folder, tmp_path):
    drop_path, clip_grad = PAPER[name]
    # what the plan for 8 processes is, one process does in 8 passes: 1024 images per step. The mixing of images wants
    # an even number of them, the folder has 16.
    made = set_up(monkeypatch, folder, tmp_path, '--config', recipes.recipe_path(name), '--batch-size', 16,
                  '--grad-accum-steps', 64, '--aug-repeats', 0)
    args, model = made['args'], made['model']
    assert type(model).__name__ == 'PyramidVisionTransformer' and args.model == name and model.num_classes == 1000

    dpr = drop_paths(model)
    assert dpr == pytest.approx(torch.linspace(0, drop_path, len(dpr)).tolist())
    assert model.head_drop.p == 0
    assert args.clip_grad == clip_grad and args.clip_mode == 'norm'
    assert not args.model_ema and args.amp and args.sync_bn is False

    optimizer = made['optimizer']
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults['eps'] == 1e-8 and optimizer.defaults['betas'] == (0.9, 0.999)
    assert args.lr == pytest.approx(1e-3)
    names = {p: n for n, p in model.named_parameters()}
    groups = {g['weight_decay']: {names[p] for p in g['params']} for g in optimizer.param_groups}
    assert groups.keys() == {0., 0.05}
    not_decayed = {n for n, p in model.named_parameters() if p.ndim <= 1} | {'stages.3.cls_token'}
    assert groups[0.] == not_decayed and groups[0.05] == set(names.values()) - not_decayed
    assert {f'stages.{i}.pos_embed' for i in range(4)} <= groups[0.05]

    scheduler = made['scheduler']
    assert type(scheduler).__name__ == 'CosineLRScheduler' and made['epochs'] == 300 and scheduler.t_in_epochs
    assert lr_at(scheduler, 0) == pytest.approx(1e-6)
    assert lr_at(scheduler, 4) == pytest.approx(1e-6 + 4 / 5 * (1e-3 - 1e-6))
    for epoch in (5, 100, 299):
        cosine = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * epoch / 300))
        assert lr_at(scheduler, epoch) == pytest.approx(cosine)

    (_, train, loader), (_, evaluate, eval_loader) = made['create_loader']
    assert recipes.load_recipe(name)['aug_repeats'] == 3  # see below
    assert train['interpolation'] == 'bicubic' and tuple(train['scale']) == (0.08, 1.0) and train['hflip'] == 0.5
    assert (train['re_prob'], train['re_mode'], train['re_count']) == (0.25, 'pixel', 1)
    assert loader.random_erasing.probability == 0.25 and loader.random_erasing.mode == 'pixel'
    kinds = [type(t).__name__ for t in loader.dataset.transform.transforms]
    assert 'RandAugment' in kinds and 'ColorJitter' not in kinds  # jitter is inert, as in the original
    randaugment = loader.dataset.transform.transforms[kinds.index('RandAugment')]
    assert {op.magnitude for op in randaugment.ops} == {9} and {op.magnitude_std for op in randaugment.ops} == {0.5}
    mixup = train['collate_fn']
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (mixup.mode, mixup.label_smoothing, mixup.num_classes) == ('batch', 0.1, 1000)
    assert evaluate['crop_pct'] == 0.875 and evaluate['interpolation'] == 'bicubic'
    assert evaluate['input_size'] == (3, 224, 224)
    kinds = {type(t).__name__: t for t in eval_loader.dataset.transform.transforms}
    assert kinds['Resize'].size == 256


@needs_timm
def test_repeated_augmentation_in_several_processes(folder, monkeypatch):
    """In one process train.py has none, in several it gets timm's sampler of three repetitions."""
    from timm.data import create_dataset, create_loader
    from timm.data.distributed_sampler import RepeatAugSampler
    repeats = recipes.load_recipe('pvt_small')['aug_repeats']
    dataset = create_dataset('', root=str(folder), split='train')
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda *a: 2)
    monkeypatch.setattr(torch.distributed, 'get_rank', lambda *a: 0)
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    loader = create_loader(
        dataset, (3, 32, 32), 4, is_training=True, num_aug_repeats=repeats, num_workers=0, use_prefetcher=False,
        distributed=True)
    assert isinstance(loader.sampler, RepeatAugSampler) and loader.sampler.num_repeats == 3


@needs_timm
def test_finetune_lands(monkeypatch, folder, tmp_path):
    import timm
    source = timm.create_model('pvt_tiny')
    torch.save(source.state_dict(), tmp_path / 'start.pth')
    made = set_up(
        monkeypatch, folder, tmp_path, '--config', recipes.recipe_path('finetune'), '--model', 'pvt_tiny',
        '--pretrained-path', tmp_path / 'start.pth', '--num-classes', 2, '--batch-size', 16, '--img-size', 64)
    args, model = made['args'], made['model']
    assert args.lr == pytest.approx(5e-4 * 16 / 256) and args.clip_grad == 1.0
    for name, value in model.state_dict().items():
        if not name.startswith('head.'):
            assert torch.equal(value, source.state_dict()[name]), name
    assert model.head.out_features == 2
    assert drop_paths(model) == pytest.approx(torch.linspace(0, 0.05, 8).tolist())
    assert made['create_loader'][0][1]['input_size'] == (3, 64, 64)
    assert made['create_loader'][0][1]['collate_fn'] is None

    # a layer is a block, the embedding of the first stage, and the head; every one nearer the head learns faster
    names = {p: n for n, p in model.named_parameters()}
    scale = {names[p]: g['lr_scale'] for g in made['optimizer'].param_groups for p in g['params']}
    decay = {names[p]: g['weight_decay'] for g in made['optimizer'].param_groups for p in g['params']}
    assert scale.keys() == set(names.values())
    assert scale['head.weight'] == 1
    blocks = [scale[f'stages.{i}.blocks.{j}.mlp.fc1.weight'] for i in range(4) for j in range(2)]
    assert blocks == sorted(blocks) and len(set(blocks)) == 8
    assert all(b / a == pytest.approx(0.8, rel=1e-6) or b / a == pytest.approx(1 / 0.8, rel=1e-6) or b / a > 1
               for a, b in zip(blocks, blocks[1:]))
    assert scale['stages.0.patch_embed.proj.weight'] < blocks[0] and scale['stages.0.pos_embed'] < blocks[0]
    assert scale['norm.weight'] == blocks[-1]
    assert decay['stages.3.cls_token'] == 0 and decay['stages.3.pos_embed'] == 0.05


@needs_timm
def test_freeze_trains_the_head_only(monkeypatch, folder, tmp_path):
    made = set_up(
        monkeypatch, folder, tmp_path, '--config', recipes.recipe_path('digits'), '--num-classes', 2,
        '--batch-size', 16, *recipes.FREEZE)
    trained = {n for n, p in made['model'].named_parameters() if p.requires_grad}
    in_optimizer = sum(len(g['params']) for g in made['optimizer'].param_groups)
    assert trained == {'head.weight', 'head.bias'} and in_optimizer == 2
    assert drop_paths(made['model']) == [0] * 6


@needs_timm
def test_digits_lands(monkeypatch, folder, tmp_path):
    made = set_up(monkeypatch, folder, tmp_path, '--config', recipes.recipe_path('digits'), '--batch-size', 16)
    args = made['args']
    assert (args.model, args.lr, made['epochs'], args.seed) == ('test_pvt', 2e-3, 120, 0)
    assert made['model'].num_classes == 10
    train = made['create_loader'][0][1]
    assert train['input_size'] == (3, 32, 32) and train['hflip'] == 0 and tuple(train['scale']) == (0.7, 1.0)
    kinds = {type(t).__name__: t for t in made['create_loader'][0][2].dataset.transform.transforms}
    assert not {'RandomHorizontalFlip', 'RandAugment'} & kinds.keys()
    jitter = kinds['ColorJitter']
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (None,) * 4


# the command ----------------------------------------------------------------------------------------------------------

def printed(capsys, *args):
    """The comments and the arguments of the printed command."""
    assert main(['recipe', *map(str, args)]) == 0
    lines = capsys.readouterr().out.splitlines()
    comments = [line for line in lines if line.startswith('# ')]
    return '\n'.join(comments), shlex.split('\n'.join(lines[len(comments):]).replace('\\\n', ' '))


def refused(capsys, *args):
    """The one line that a wrong command ends with."""
    with pytest.raises(SystemExit) as e:
        sys.exit(main(list(map(str, args))))
    assert e.value.code == 2
    error = capsys.readouterr().err.strip()
    assert '\n' not in error and 'Traceback' not in error
    return error


@pytest.mark.parametrize('gpus, nodes, batch_size, accum', [
    (0, 1, 128, 8), (1, 1, 128, 8), (2, 1, 128, 4), (4, 1, 128, 2), (8, 1, 128, 1), (8, 4, 32, 1), (3, 1, 128, 2)])
def test_command_keeps_the_images_per_step(capsys, gpus, nodes, batch_size, accum):
    comments, command = printed(
        capsys, 'pvt_small', *(['--gpus', gpus] if gpus else []), *(['--nodes', nodes] if nodes > 1 else []))
    plan = recipes.plan('pvt_small', max(gpus, 1) * nodes)
    assert (plan.batch_size, plan.grad_accum_steps) == (batch_size, accum)
    images = batch_size * accum * max(gpus, 1) * nodes
    assert f'{images} images per step' in comments
    assert ('meant for 1024' in comments) == (images != 1024)
    assert plan.lr == pytest.approx(5e-4 * images / 512)
    assert (command[0] == 'torchrun') == (gpus > 0)
    assert (f'--nproc-per-node={gpus}' in command) == (gpus > 0)
    assert (f'--nnodes={nodes}' in command) == (nodes > 1)
    i = command.index('-m')
    assert command[i:i + 6] == ['-m', 'pvt_timm', 'train', 'train.py', '--config', 'pvt_small']
    assert ('--batch-size' in command) == (batch_size != 128)
    assert ('--grad-accum-steps' in command) == (accum != 1)
    # timm refuses repeated augmentation in one process
    assert ('--aug-repeats' in command) == (gpus * nodes <= 1)


def test_list_of_recipes(capsys):
    assert main(['recipe']) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == recipes.recipe_names()
    assert set(recipes.recipe_names()) == {*PAPER, 'finetune', 'digits'}


def test_finetune_takes_the_classes_from_the_data(capsys, folder):
    _, command = printed(capsys, 'finetune', '--data-dir', folder, '--freeze')
    assert command[command.index('--num-classes') + 1] == '2'
    assert command[-len(recipes.FREEZE):] == list(recipes.FREEZE)


def test_wrong_input_is_refused(capsys, folder, tmp_path, monkeypatch):
    import timm
    from safetensors.torch import save_file
    assert 'pvt_small' in refused(capsys, 'recipe', 'pvt_smal')
    assert 'No such data folder' in refused(capsys, 'recipe', 'pvt_small', '--data-dir', tmp_path / 'none')
    assert 'from 1 up' in refused(capsys, 'recipe', 'pvt_small', '--gpus', '0')
    assert 'at most 1024' in refused(capsys, 'recipe', 'pvt_small', '--gpus', '8', '--nodes', '200')

    # one class
    one = tmp_path / 'one'
    for split in ('train', 'validation'):
        (one / split / 'cat').mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(one / split / 'cat' / '0.png')
    assert "at least two classes" in refused(capsys, 'recipe', 'pvt_small', '--data-dir', one)
    # no split, and splits that do not agree
    assert "'train'" in refused(capsys, 'recipe', 'pvt_small', '--data-dir', folder / 'train')
    for label in ('dog', 'cow'):
        (one / 'train' / label).mkdir()
        Image.new('RGB', (8, 8)).save(one / 'train' / label / '0.png')
    (one / 'validation' / 'dog').mkdir()
    Image.new('RGB', (8, 8)).save(one / 'validation' / 'dog' / '0.png')
    assert 'cow' in refused(capsys, 'recipe', 'pvt_small', '--data-dir', one)
    # labels beyond the outputs
    (one / 'validation' / 'cow').mkdir()
    Image.new('RGB', (8, 8)).save(one / 'validation' / 'cow' / '0.png')
    assert '--num-classes 3' in refused(capsys, 'recipe', 'finetune', '--data-dir', one, '--num-classes', '2')
    # output
    (tmp_path / 'file').write_text('')
    assert 'output folder' in refused(capsys, 'recipe', 'digits', '--output', tmp_path / 'file' / 'below')
    # checkpoint of another variant
    save_file(timm.create_model('test_pvt').state_dict(), tmp_path / 'test.safetensors')
    error = refused(capsys, 'recipe', 'pvt_small', '--checkpoint', tmp_path / 'test.safetensors')
    assert 'Expected a checkpoint of pvt_small' in error and 'holds test_pvt' in error
    assert 'No such checkpoint' in refused(capsys, 'recipe', 'pvt_small', '--checkpoint', tmp_path / 'no.pth')
    (tmp_path / 'junk.pth').write_bytes(b'junk' * 100)
    assert 'junk.pth' in refused(capsys, 'recipe', 'pvt_small', '--checkpoint', tmp_path / 'junk.pth')


def test_train_refuses_wrong_input(capsys, folder, tmp_path):
    import timm
    from safetensors.torch import save_file
    script = tmp_path / 'train.py'
    script.write_text('raise SystemExit("started")')
    ok = ['--config', 'digits', '--data-dir', folder, '--output', tmp_path / 'out', '--experiment', 'x']

    def train(*args):
        return refused(capsys, 'train', *args)

    assert 'No such script' in train(tmp_path / 'none.py', *ok)
    assert '--experiment' in train(script, '--config', 'digits')
    assert 'No such config' in train(script, *ok[2:], '--config', 'nothing')
    (tmp_path / 'list.yaml').write_text('- 1')
    assert 'names and values' in train(script, *ok[2:], '--config', tmp_path / 'list.yaml')
    (tmp_path / 'bad.yaml').write_text('a: [')
    assert 'bad.yaml' in train(script, *ok[2:], '--config', tmp_path / 'bad.yaml')
    assert 'Unknown model' in train(script, *ok, '--model', 'pvt_tinny')
    assert '--data-dir' in train(script, *ok[:2], *ok[4:])
    assert 'Set --num-classes 2' in train(script, *ok, '--num-classes', 1)
    (tmp_path / 'file').write_text('')
    assert 'can be written' in train(script, *ok[:4], '--output', tmp_path / 'file', '--experiment', 'x')
    weights = tmp_path / 'test.safetensors'
    save_file(timm.create_model('test_pvt').state_dict(), weights)
    error = train(script, *ok, '--model', 'pvt_tiny', '--pretrained', '--pretrained-path', weights)
    assert 'Expected a checkpoint of pvt_tiny' in error
    error = train(script, *ok, '--pretrained-path', weights)
    assert 'Expected --pretrained' in error
    # an experiment of another model
    torch.save({'epoch': 1, 'arch': 'pvt_small', 'state_dict': {}, 'optimizer': {}}, tmp_path / 'out/x/last.pth.tar')
    assert 'holds pvt_small' in train(script, *ok)


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='the superuser can write everywhere')
def test_output_without_permission(capsys, tmp_path):
    tmp_path.chmod(0o500)
    assert 'can be written' in refused(capsys, 'recipe', 'digits', '--output', tmp_path / 'out')


def test_damaged_images_are_named(capsys, folder, tmp_path):
    import shutil
    from pvt_timm.cli.predict import UserError
    from pvt_timm.cli.train import check_images
    shutil.copytree(folder, tmp_path / 'data')
    assert check_images(tmp_path / 'data') == 32
    whole = (tmp_path / 'data/train/a/3.png').read_bytes()
    (tmp_path / 'data/train/a/3.png').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'data/validation/b/1.png').write_text('not an image')
    with pytest.raises(UserError, match=re.escape('2 of 32 images')) as e:
        check_images(tmp_path / 'data')
    assert 'train/a/3.png' in str(e.value) and 'validation/b/1.png' in str(e.value)
    script = tmp_path / 'train.py'
    script.write_text('raise SystemExit("started")')
    error = refused(capsys, 'train', '--check-images', script, '--config', 'digits', '--data-dir', tmp_path / 'data',
                    '--output', tmp_path / 'out', '--experiment', 'x')
    assert '3.png' in error


@pytest.fixture
def started(monkeypatch):
    """What `train` would run, instead of running it."""
    calls = []
    monkeypatch.setattr('pvt_timm.cli.run_script', lambda script, args: calls.append([script, *args]))
    monkeypatch.setattr('pvt_timm.launch._allow_cpu_processes', lambda: None)
    return calls


def test_train_runs_the_script(folder, tmp_path):
    """As `__main__`, with its own arguments, and with the models registered."""
    script = tmp_path / 'train.py'
    script.write_text('import json, sys, timm\nprint(json.dumps([sys.argv, timm.is_model("pvt_tiny"), __name__]))')
    args = ['--config', 'digits', '--data-dir', str(folder), '--output', str(tmp_path / 'out'), '--experiment', 'x']
    done = subprocess.run(
        [sys.executable, '-m', 'pvt_timm', 'train', str(script), *args], capture_output=True, text=True, timeout=300,
        check=True, env=dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2])))
    argv, registered, name = json.loads(done.stdout)
    assert registered and name == '__main__'
    assert argv == [str(script), *args, '--config', str(recipes.recipe_path('digits'))]


def test_train_goes_on_from_the_newest_complete_checkpoint(folder, tmp_path, capsys, started):
    script, out = tmp_path / 'train.py', tmp_path / 'out' / 'x'
    script.write_text('')
    args = ['train', str(script), '--config', 'digits', '--data-dir', str(folder), '--output', str(tmp_path / 'out'),
            '--experiment', 'x']
    assert main(args) == 0
    assert '--resume' not in started.pop()

    for epoch in (0, 1, 2):
        torch.save({'epoch': epoch, 'arch': 'test_pvt', 'state_dict': {}, 'optimizer': {}, 'metric': 1.0},
                   out / f'checkpoint-{epoch}.pth.tar')
    os.link(out / 'checkpoint-2.pth.tar', out / 'last.pth.tar')
    os.link(out / 'checkpoint-1.pth.tar', out / 'model_best.pth.tar')
    # from the middle of an epoch, not to be taken
    torch.save({'epoch': 3, 'arch': 'test_pvt', 'state_dict': {}, 'optimizer': {}}, out / 'recovery-3-7.pth.tar')
    assert main(args) == 0
    assert started.pop()[-2:] == ['--resume', str(out / 'last.pth.tar')]
    assert 'after epoch 2' in capsys.readouterr().err
    assert (out / 'model_best_until_epoch_2.pth.tar').samefile(out / 'checkpoint-1.pth.tar')

    # timm removes the file before it puts the new one in its place
    (out / 'last.pth.tar').unlink()
    assert main(args) == 0
    assert started.pop()[-2:] == ['--resume', str(out / 'checkpoint-2.pth.tar')]

    # a power cut while writing
    damaged = (out / 'checkpoint-2.pth.tar').read_bytes()[:300]
    for name in ('last', 'checkpoint-2'):
        (out / f'{name}.pth.tar').write_bytes(damaged)
    capsys.readouterr()
    assert main(args) == 0
    assert started.pop()[-2:] == ['--resume', str(out / 'checkpoint-1.pth.tar')]
    assert capsys.readouterr().err.count('passing over') == 2

    # the user's own choice counts
    from safetensors.torch import save_file
    import timm
    save_file(timm.create_model('test_pvt').state_dict(), tmp_path / 'own.safetensors')
    assert main([*args, '--resume', str(tmp_path / 'own.safetensors')]) == 0
    assert started.pop().count('--resume') == 1
