""" Every recipe with timm's own train.py: its keys are known, and its settings have their effect. """
import copy
import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data.transforms import str_to_interp_mode

from pvt_timm.recipes import RECIPES

# The original code: drop path and gradient clipping of every variant
PAPER = {'pvt_tiny': (0.1, None), 'pvt_small': (0.1, None), 'pvt_medium': (0.3, 1.0), 'pvt_large': (0.3, 1.0)}


class Stop(Exception):
    """Raised to end train.py after its setup."""


@pytest.fixture(scope='module')
def train(train_py):
    spec = importlib.util.spec_from_file_location('timm_train', train_py)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Return an image folder with two classes and 16 images per split."""
    root = tmp_path_factory.mktemp('images')
    for split in ('train', 'validation'):
        for label in ('a', 'b'):
            (root / split / label).mkdir(parents=True)
            for i in range(8):
                Image.effect_noise((40, 40), 90).convert('RGB').save(root / split / label / f'{i}.png')
    return root


@pytest.fixture
def set_up(train, folder, tmp_path, monkeypatch):
    """Return a function that runs train.py until the first epoch, and returns the local variables of its `main`."""
    def stop(*args, **kwargs):
        raise Stop
    monkeypatch.setattr(train, 'train_one_epoch', stop)
    monkeypatch.setattr(train.utils, 'setup_default_logging', lambda: None)
    monkeypatch.setattr(train, 'parser', copy.deepcopy(train.parser))  # it keeps the defaults of a config

    def run(recipe, *args):
        monkeypatch.setattr(sys, 'argv', [
            'train.py', '--device-modules', 'pvt_timm', '--data-dir', str(folder), '--device', 'cpu', '--workers', '0',
            '--output', str(tmp_path), '--experiment', 'x', '--batch-size', '16',
            '--config', str(RECIPES[recipe]), *map(str, args)])
        with pytest.raises(Stop) as e:
            train.main()
        return SimpleNamespace(**e.traceback[1].locals)
    return run


def drop_paths(model):
    return [getattr(b.drop_path1, 'drop_prob', 0.) for s in model.stages for b in s.blocks]


def transforms(loader):
    return {type(t).__name__: t for t in loader.dataset.transform.transforms}


@pytest.mark.parametrize('name', RECIPES)
def test_every_key_is_known_and_of_the_right_type(train, name):
    actions = {a.dest: a for a in train.parser._actions}
    for key, value in yaml.safe_load(RECIPES[name].read_text()).items():
        action = actions[key]
        assert isinstance(value, list) == (action.nargs in ('+', '*')), key
        kinds = (float, int) if action.type is float else (bool if action.nargs == 0 else action.type or str,)
        assert all(type(v) in kinds for v in (value if isinstance(value, list) else [value])), f'{key}: {value!r}'


@pytest.mark.parametrize('name', PAPER)
def test_paper_recipe_lands(set_up, name):
    drop_path, clip_grad = PAPER[name]
    assert yaml.safe_load(RECIPES[name].read_text())['aug_repeats'] == 3  # which needs several processes
    # what the plan for 8 processes is, one process does in 64 passes: 1024 images per step
    made = set_up(name, '--grad-accum-steps', 64, '--aug-repeats', 0)
    args, model, optimizer = made.args, made.model, made.optimizer
    assert type(model).__name__ == 'PyramidVisionTransformer' and args.model == name and model.num_classes == 1000
    dpr = drop_paths(model)
    assert dpr == pytest.approx(torch.linspace(0, drop_path, len(dpr)).tolist())
    assert model.head_drop.p == 0
    assert args.clip_grad == clip_grad and args.clip_mode == 'norm'
    assert not args.model_ema and args.amp and args.sync_bn is False

    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults['eps'] == 1e-8 and optimizer.defaults['betas'] == (0.9, 0.999)
    assert args.lr == pytest.approx(1e-3)
    names = {p: n for n, p in model.named_parameters()}
    groups = {g['weight_decay']: {names[p] for p in g['params']} for g in optimizer.param_groups}
    not_decayed = {n for n, p in model.named_parameters() if p.ndim <= 1} | {'stages.3.cls_token'}
    assert groups == {0.: not_decayed, 0.05: set(names.values()) - not_decayed}

    scheduler = made.lr_scheduler
    assert type(scheduler).__name__ == 'CosineLRScheduler' and made.num_epochs == 300 and scheduler.t_in_epochs
    for epoch in range(300):
        cosine = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * epoch / 300))
        expected = cosine if epoch >= 5 else 1e-6 + epoch / 5 * (1e-3 - 1e-6)
        assert max(scheduler._get_lr(epoch)) == pytest.approx(expected)

    found, erasing, mixup = transforms(made.loader_train), made.loader_train.random_erasing, made.collate_fn
    crop = found['RandomResizedCropAndInterpolation']
    assert (str_to_interp_mode('bicubic'), (0.08, 1.0)) == (crop.interpolation, tuple(crop.scale))
    assert found['RandomHorizontalFlip'].p == 0.5 and 'ColorJitter' not in found  # jitter is inert, as in the original
    assert {(op.magnitude, op.magnitude_std) for op in found['RandAugment'].ops} == {(9, 0.5)}
    assert (erasing.probability, erasing.mode, erasing.max_count) == (0.25, 'pixel', 1)
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (mixup.mode, mixup.label_smoothing, mixup.num_classes) == ('batch', 0.1, 1000)
    data = made.data_config
    assert (data['crop_pct'], data['interpolation'], data['input_size']) == (0.875, 'bicubic', (3, 224, 224))
    assert transforms(made.loader_eval)['Resize'].size == 256


def test_finetune_lands(set_up, tmp_path):
    source = timm.create_model('pvt_tiny').state_dict()
    torch.save(source, tmp_path / 'start.pth')
    made = set_up('finetune', '--model', 'pvt_tiny', '--pretrained-path', tmp_path / 'start.pth', '--num-classes', 2,
                  '--img-size', 64)
    model, groups = made.model, made.optimizer.param_groups
    assert made.args.lr == pytest.approx(5e-4 * 16 / 256) and made.args.clip_grad == 1.0
    for name, value in model.state_dict().items():
        assert name.startswith('head.') or torch.equal(value, source[name]), name
    assert model.head.out_features == 2
    assert drop_paths(model) == pytest.approx(torch.linspace(0, 0.05, 8).tolist())
    assert made.data_config['input_size'] == (3, 64, 64) and made.collate_fn is None

    # a layer is a block, the embedding of the first stage, and the head; every one nearer the head learns faster
    names = {p: n for n, p in model.named_parameters()}
    scale = {names[p]: g['lr_scale'] for g in groups for p in g['params']}
    decay = {names[p]: g['weight_decay'] for g in groups for p in g['params']}
    assert scale.keys() == set(names.values()) and scale['head.weight'] == 1
    blocks = [scale[f'stages.{i}.blocks.{j}.mlp.fc1.weight'] for i in range(4) for j in range(2)]
    assert [b / a for a, b in zip(blocks, blocks[1:])] == pytest.approx([1 / 0.8] * 7)
    assert scale['stages.0.patch_embed.proj.weight'] < blocks[0] and scale['stages.0.pos_embed'] < blocks[0]
    assert scale['norm.weight'] == blocks[-1]
    assert decay['stages.3.cls_token'] == 0 and decay['stages.3.pos_embed'] == 0.05


def test_freeze_trains_the_head_only(set_up):
    """With this layer decay, only the head is trained.

    The optimizer leaves out layers whose share of the learning rate is below timm's limit.
    """
    made = set_up(
        'digits', '--num-classes', 2, '--layer-decay', 0.01, '--layer-decay-no-opt-scale', 0.5, '--drop-path', 0)
    assert {n for n, p in made.model.named_parameters() if p.requires_grad} == {'head.weight', 'head.bias'}
    assert sum(len(g['params']) for g in made.optimizer.param_groups) == 2
    assert drop_paths(made.model) == [0] * 6
