""" Every recipe through timm's own train.py: its keys are known, and what it sets lands where it is meant to.

train.py comes from a checkout of timm that TIMM_CHECKOUT names.
"""
import functools
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pvt_timm import recipes

CHECKOUT = os.environ.get('TIMM_CHECKOUT')
needs_timm = pytest.mark.skipif(
    not CHECKOUT or not Path(CHECKOUT, 'train.py').is_file(),
    reason='TIMM_CHECKOUT is not set to a checkout of huggingface/pytorch-image-models (for its train.py)')

# only the head learns: timm leaves layers out whose share of the learning rate is under the limit
FREEZE = ('--layer-decay', '0.01', '--layer-decay-no-opt-scale', '0.5', '--drop-path', '0')

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
        '--batch-size', 16, *FREEZE)
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
