""" Random configs beside the weights, and random options of the converter. The written model gives the same outputs as
the source's own model, or the conversion is refused.

`PVT_FUZZ_CASES` is the number of cases, `PVT_FUZZ_FIRST` the number of the first one, as in test_convert_fuzz.py.
"""
import json
import logging
import os
import random
import shutil
import warnings
from collections import Counter

import pytest
import timm
import torch

from pvt_timm.formats.mapping import from_timm
from tests.support import convert_files as files
from tests.support.reference import images, randomize

CASES = int(os.environ.get('PVT_FUZZ_CASES', 200)) // 2
FIRST = int(os.environ.get('PVT_FUZZ_FIRST', 0))

# Arguments that a model may be built with
MODELS = [
    {}, dict(act_layer='relu'), dict(act_layer='silu'), dict(norm_eps=1e-2), dict(embed_norm_eps=1e-2),
    dict(num_heads=(2, 4, 4, 4)), dict(qkv_bias=False), dict(in_chans=1), dict(img_size=64), dict(global_pool='avg'),
    dict(drop_path_rate=0.2, proj_drop_rate=0.1), dict(norm_eps=1e-2, embed_norm_eps=1e-2), dict(num_classes=1)]

# What may become of a value in a config
VALUES = [
    None, True, False, 0, 1, 2, -1, 3.5, 1e-2, 1e-12, 1e99, '', 'relu', 'gelu', 'silu', 'token', 'avg', 'x', [], {},
    [1], [1, 2, 5, 8], [2, 4, 4, 4], [4, 2, 1, 1], [1, 2, 2, 1], [.5, .5, .5], {'a': 1}, [[1]], 'test_pvt',
    'pvt_tiny', 'pvt']
TIMM_NAMES = ['architecture', 'num_classes', 'global_pool', 'num_features', 'model_args', 'pretrained_cfg', 'what']
TIMM_ARGS = [
    'act_layer', 'norm_layer', 'norm_eps', 'embed_norm_eps', 'num_heads', 'sr_ratios', 'mlp_ratios', 'depths',
    'img_size', 'in_chans', 'qkv_bias', 'class_token', 'global_pool', 'patch_size', 'drop_rate', 'weight_init', 'what']
TRANSFORMERS_NAMES = [
    'hidden_act', 'layer_norm_eps', 'qkv_bias', 'num_attention_heads', 'image_size', 'num_channels', 'depths',
    'hidden_sizes', 'sequence_reduction_ratios', 'mlp_ratios', 'patch_sizes', 'strides', 'hidden_dropout_prob',
    'drop_path_rate', 'problem_type', 'id2label', 'model_type', 'num_labels', 'what']

OPTIONS = [[], [], ['--to', 'transformers'], ['--to', 'original'], ['--num-classes', '0'],
           ['--to', 'transformers', '--num-classes', '0'], ['--drop', 'class_token'], ['--drop', 'norm', 'head'],
           ['--to', 'mmdet', '--drop', 'class_token', 'norm', 'head'], ['--dtype', 'float32']]


def case(n, folder):
    """Write a folder of timm or transformers with a config that may be changed. Return its kind and options."""
    r = random.Random(n)
    args = dict(r.choice(MODELS))
    args.setdefault('num_classes', r.choice([3, 3, 0]))
    model = randomize(timm.create_model('test_pvt', **args), seed=n % 7)
    kind = r.choice(['timm', 'transformers'])
    if kind == 'timm':
        timm.models.save_for_hf(model, folder, model_args=args)
        names, inner = TIMM_NAMES, TIMM_ARGS
    else:
        folder.mkdir()
        files.save(from_timm(model.state_dict(), 'transformers')[0], folder / 'model.safetensors')
        (folder / 'config.json').write_text(json.dumps(transformers_config(args)))
        names, inner = TRANSFORMERS_NAMES, []
    config = json.loads((folder / 'config.json').read_text())
    for _ in range(r.choice([0, 1, 1, 2])):
        place, name = config, r.choice(names)
        if inner and r.random() < .7 and isinstance(config.get('model_args'), dict):
            place, name = config['model_args'], r.choice(inner)
        if r.random() < .2:
            place.pop(name, None)
        else:
            place[name] = r.choice(VALUES)
    (folder / 'config.json').write_text(json.dumps(config))
    return kind, r.choice(OPTIONS)


def transformers_config(args):
    """Return the config.json for the model of transformers that computes (nearly) as test_pvt does with `args`."""
    img_size = args.get('img_size', 32)
    return dict(
        model_type='pvt', depths=[1, 2, 2, 1], hidden_sizes=[16, 32, 40, 64], image_size=img_size,
        num_attention_heads=args.get('num_heads', [1, 2, 5, 8]), sequence_reduction_ratios=[4, 2, 1, 1],
        mlp_ratios=[4, 4, 4, 4], num_channels=args.get('in_chans', 3), hidden_act=args.get('act_layer', 'gelu'),
        layer_norm_eps=args.get('norm_eps', 1e-6), qkv_bias=args.get('qkv_bias', True),
        num_labels=args['num_classes'], id2label={i: f'class {i}' for i in range(args['num_classes'])})


def load(folder):
    """Return the model of a folder, loaded by timm or transformers as a user would load it."""
    from transformers import PvtForImageClassification

    config = json.loads((folder / 'config.json').read_text())
    if 'architecture' in config:
        return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    model, info = PvtForImageClassification.from_pretrained(folder, output_loading_info=True)
    if any(info.values()):
        raise ValueError(f'does not load: {info}')
    if model.config.layer_norm_eps == 1e-6:  # then it stands for the original, which has another eps in some norms
        for name, module in model.pvt.encoder.named_modules():
            if name.endswith('.layer_norm'):
                module.eps = 1e-5
    return model.eval()


@torch.inference_mode()
def predictions(model, x):
    """Return the logits or None, and the vector before the head or None."""
    if hasattr(model, 'forward_head'):
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        logits = model.forward_head(features) if model.num_classes else None
        return logits, (pooled if model.global_pool == 'token' else None)
    tokens = model.pvt(x).last_hidden_state
    return (model(x).logits if model.config.num_labels else None), tokens[:, 0]


def run_case(n, folder):
    """Run case `n`. Return the kind of the source, and how the case ended."""
    try:
        kind, options = case(n, folder)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            code, _, err = files.run(folder, '--output', folder / 'out', *options)
            assert code in (0, 2), err
            assert code == 0 or err.count('\n') == 1 and err.startswith('pvt-convert: error: '), err
            if code == 2:
                assert not (folder / 'out').exists()
                return kind, 'refused'
            to = options[options.index('--to') + 1] if '--to' in options else 'timm'
            if to not in ('timm', 'transformers') or 'norm' in options or 'class_token' in options:
                return kind, 'written'
            try:
                theirs = load(folder)
            except Exception:  # a config that its own library does not take
                return kind, 'only here'
            ours = load(folder / 'out')
        config = json.loads((folder / 'out' / 'config.json').read_text())
        size, channels = (32, 3)
        if to == 'transformers':
            size, channels = config['image_size'], config['num_channels']
        else:
            size, channels = config['model_args'].get('img_size', 32), config['model_args'].get('in_chans', 3)
        x = images(2, channels, size, size, dtype=torch.float32)
        for a, b in zip(predictions(theirs, x), predictions(ours, x)):
            if a is not None and b is not None:
                torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-4)
        return kind, 'same'
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(0)
def test_what_is_written_predicts_the_same(tmp_path):
    pytest.importorskip('transformers')
    ends = Counter()
    logging.disable(logging.WARNING)
    try:
        for n in range(FIRST, FIRST + CASES):
            ends[run_case(n, tmp_path / 'case')] += 1
    except Exception as e:
        raise AssertionError(f'case {n}: {type(e).__name__}: {e}') from e
    finally:
        logging.disable(logging.NOTSET)
    print(dict(sorted(ends.items())))
    if CASES >= 100:
        for kind in ('timm', 'transformers'):
            assert ends[kind, 'same'] > 10 and ends[kind, 'refused'] > 10
