""" Settings of a model in a checkpoint, its training settings or its config are used, kept, or refused by name. """
import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from pvt_timm import create_from_checkpoint
from pvt_timm.cli.main import main as pvt_timm_main
from pvt_timm.cli.predict import load_model, predict
from pvt_timm.files import read_checkpoint
from pvt_timm.formats import FORMATS
from pvt_timm.formats.format import Format, NoReferenceError, Said
from pvt_timm.formats.mapping import from_timm
from pvt_timm.formats.names import Row, to_ours, to_theirs
from pvt_timm.weights import read_weights
from weights_conversion import convert, inspect
from tests.support import convert_files as files
from tests.support.convert_files import run
from tests.support.reference import images, randomize
from tests.support.systems import symlink


def build(**kwargs):
    return randomize(timm.create_model('test_pvt', **kwargs)).eval()


def outputs(model, x):
    with torch.inference_mode():
        y = model.eval()(x)
    return y[-1] if isinstance(y, list) else getattr(y, 'logits', y)


def saved(model, folder, **model_args):
    """Write a folder as timm's upload does, and return the folder."""
    timm.models.save_for_hf(model, folder, model_args=model_args)
    return folder


def in_transformers(model, folder, processor=None, **config):
    """Write a folder of transformers with the weights of a timm model, and return the folder."""
    folder.mkdir()
    state_dict = from_timm(model.state_dict(), 'transformers')[0]
    files.save(state_dict, folder / 'model.safetensors')
    sizes = dict(
        depths=[1, 2, 2, 1], hidden_sizes=[16, 32, 40, 64], num_attention_heads=[1, 2, 5, 8], image_size=32,
        sequence_reduction_ratios=[4, 2, 1, 1], mlp_ratios=[4, 4, 4, 4])
    (folder / 'config.json').write_text(json.dumps({'model_type': 'pvt', **sizes, **config}))
    if processor is not None:
        (folder / 'preprocessor_config.json').write_text(json.dumps(processor))
    return folder


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    return str(error.value)


# ---- arguments of the model ------------------------------------------------------------------------------------------

CHANGES = [dict(act_layer='relu'), dict(norm_eps=0.1), dict(embed_norm_eps=0.1), dict(num_heads=(2, 4, 4, 4)),
           dict(qkv_bias=False)]


@pytest.mark.parametrize('args', CHANGES, ids=lambda args: next(iter(args)))
def test_what_changes_outputs_is_passed_on(args, tmp_path):
    model, x = build(num_classes=3, **args), images(2, 3, 32, 32, dtype=torch.float32)
    expected = outputs(model, x)
    assert (expected - outputs(build(num_classes=3), x)).abs().max() > 1e-3  # it matters
    source = saved(model, tmp_path / 'tuned', **args)
    assert torch.equal(outputs(load_model(checkpoint=source).model, x), expected)
    assert torch.equal(outputs(create_from_checkpoint(source), x), expected)
    convert(source, tmp_path / 'out')
    assert torch.equal(outputs(timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True), x), expected)
    # a bare state dict has no place for it
    assert next(iter(args)) in refusal(convert, source, tmp_path / 'no', to='original')


@pytest.mark.parametrize('args', CHANGES[:2] + CHANGES[3:], ids=lambda args: next(iter(args)))
def test_and_by_transformers(args, tmp_path):
    from transformers import PvtForImageClassification

    if 'norm_eps' in args:
        args = dict(args, embed_norm_eps=args['norm_eps'])  # one number there
    model, x = build(num_classes=3, **args), images(2, 3, 32, 32, dtype=torch.float32)
    convert(saved(model, tmp_path / 'tuned', **args), tmp_path / 'hf', to='transformers')
    theirs = PvtForImageClassification.from_pretrained(tmp_path / 'hf')
    torch.testing.assert_close(outputs(theirs, x), outputs(model, x), rtol=0, atol=1e-4)
    convert(tmp_path / 'hf', tmp_path / 'back')
    assert torch.equal(outputs(create_from_checkpoint(tmp_path / 'back'), x), outputs(model, x))


def test_mmdet_has_no_place_for_an_activation(tmp_path):
    args = dict(act_layer='relu', class_token=False, num_classes=0)
    source = saved(build(**args), tmp_path / 'tuned', **args)
    assert 'act_layer' in refusal(convert, source, tmp_path / 'out', to='mmdet')


@pytest.mark.parametrize('args, named', [
    (dict(block_fn='mine'), 'block_fn'), (dict(depths=[1, 2, 2, 2]), 'depths'), (dict(in_chans=1), 'in_chans'),
    (dict(class_token=False), 'class_token'), (dict(act_layer=3), 'act_layer'),
    (dict(num_heads=[3, 2, 5, 8]), 'num_heads'), (dict(act_layer='mine'), 'does not fit together'),
    (dict(img_size=64), '64x64'), (dict(pretrained=True), 'pretrained'), (dict(num_classes=5), 'num_classes'),
    (dict(checkpoint_path='/etc/passwd'), 'checkpoint_path')])
def test_arguments_that_contradict_the_weights_or_are_not_known(args, named, tmp_path):
    source = saved(build(num_classes=3), tmp_path / 'tuned')
    config = json.loads((source / 'config.json').read_text())
    config['model_args'] = args
    (source / 'config.json').write_text(json.dumps(config))
    text = refusal(inspect, source)
    assert named in text and '\n' not in text
    if named in ('depths', 'in_chans', 'class_token', 'num_classes'):
        assert 'config.json' in text and 'the weights' in text


@pytest.mark.parametrize('config, named', [
    (dict(hidden_act='mine'), 'hidden_act'), (dict(layer_norm_eps='x'), 'layer_norm_eps'),
    (dict(qkv_bias=False), 'qkv_bias'), (dict(qkv_bias='true'), 'true or false for qkv_bias'),
    (dict(qkv_bias=1), 'true or false for qkv_bias'), (dict(hidden_sizes=[1, 2, 3, 4]), 'embed_dims'),
    (dict(patch_sizes=[4, 3, 2, 2]), 'patch_sizes'), (dict(strides=[2, 2, 2, 2], patch_sizes=[4, 2, 2, 2]), 'strides'),
    (dict(image_size=64), '64x64'), (dict(sequence_reduction_ratios=[8, 4, 2, 1]), 'sr_ratios'),
    (dict(model_type='segformer'), 'model_type'), (dict(drop_path_rate='x'), 'drop_path_rate')])
def test_configs_of_transformers(config, named, tmp_path):
    assert named in refusal(inspect, in_transformers(build(), tmp_path / 'hf', **config))


def test_dropout_of_transformers_goes_along(tmp_path):
    rates = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2, drop_path_rate=0.3)
    report = convert(in_transformers(build(), tmp_path / 'hf', **rates), tmp_path / 'out')
    assert report.model_args == dict(pos_drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.3)
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert model.stages[0].pos_drop.p == 0.1 and model.stages[1].blocks[0].attn.attn_drop.p == 0.2
    convert(tmp_path / 'out', tmp_path / 'back', to='transformers')
    config = json.loads((tmp_path / 'back' / 'config.json').read_text())
    assert {name: config[name] for name in rates} == rates


def test_the_training_of_timm_built_the_model_otherwise(tmp_path):
    """`--model-kwargs` of train.py are read from the checkpoint, the only place that has them."""
    model, x = build(num_classes=3, act_layer='relu'), images(1, 3, 32, 32, dtype=torch.float32)
    checkpoint = dict(state_dict=model.state_dict(), args=argparse.Namespace(model_kwargs=dict(act_layer='relu')))
    file = files.save(checkpoint, tmp_path / 'last.pth.tar')
    assert torch.equal(outputs(load_model(checkpoint=file).model, x), outputs(model, x))


def test_two_places_that_contradict_each_other(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    checkpoint = dict(state_dict=build().state_dict(), args=argparse.Namespace(mean=[.1, .2, .3], gp='avg'))
    files.save(checkpoint, folder / 'pytorch_model.bin')
    config = dict(architecture='test_pvt', pretrained_cfg=dict(mean=[.1, .2, .4]))
    (folder / 'config.json').write_text(json.dumps(config))
    text = refusal(inspect, folder)
    assert all(x in text for x in ('mean', "'args'", '0.3', 'config.json', '0.4'))
    config = dict(architecture='test_pvt', global_pool='token', pretrained_cfg=dict(mean=[.1, .2, .3]))
    (folder / 'config.json').write_text(json.dumps(config))
    assert 'global_pool' in refusal(inspect, folder)
    config['global_pool'] = 'avg'
    (folder / 'config.json').write_text(json.dumps(config))
    assert inspect(folder).preprocessing['mean'] == (.1, .2, .3)


def test_what_helps_to_read_is_no_argument_of_the_saved_model(tmp_path):
    model = build(num_classes=3)
    state = {f'{name}.{k}': v + n for n, name in enumerate(('encoder', 'other')) for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / 'x.pth')
    loaded = create_from_checkpoint(tmp_path / 'x.pth', prefix='encoder.')
    timm.models.save_for_hf(loaded, tmp_path / 'saved')
    config = json.loads((tmp_path / 'saved' / 'config.json').read_text())
    assert not {'prefix', 'weight_init', 'state_dict'} & {*config.get('model_args', {}), *config['pretrained_cfg']}
    assert not {'url', 'hf_hub_id', 'file', 'tag'} & set(config['pretrained_cfg'])  # not those of the published weights
    again = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True)
    assert files.same(again, model) and files.same(create_from_checkpoint(tmp_path / 'saved'), model)
    with pytest.raises(TypeError, match='prefix'):
        timm.create_model('test_pvt', prefix='encoder.')


@pytest.mark.parametrize('class_token', [True, False])
@pytest.mark.parametrize('final_norm', [True, False])
@pytest.mark.parametrize('output_fmt', ['NLC', 'NCHW'])
def test_norm_and_format_of_the_output_are_kept(tmp_path, class_token, final_norm, output_fmt):
    """The final norm is known from names of weights, the output format from the config.

    A conversion writes only those of these arguments that differ from the defaults.
    """
    args = dict(class_token=class_token, final_norm=final_norm, output_fmt=output_fmt)
    model = build(**args)
    folder = saved(model, tmp_path / 'saved', **args)
    convert(folder, tmp_path / 'converted')
    x = images(1, 3, 64, 96, dtype=torch.float32)
    for place in (folder, tmp_path / 'converted'):
        loaded = create_from_checkpoint(place).eval()
        assert files.same(loaded, model)
        with torch.no_grad():
            assert torch.equal(loaded.forward_features(x), model.forward_features(x))
            assert torch.equal(loaded(x), model(x))
    usual = None if class_token != final_norm else 'NLC' if class_token else 'NCHW'
    defaults = dict(class_token=True, final_norm=class_token, output_fmt=usual)
    config = json.loads((tmp_path / 'converted' / 'config.json').read_text())
    said = {name: value for name, value in config['model_args'].items() if name in args}
    assert said == {name: value for name, value in args.items() if value != defaults[name]}


# ---- position embeddings ---------------------------------------------------------------------------------------------

def test_two_sizes_that_both_fit_are_named(tmp_path):
    """If two image sizes fit the weights, such as 64x64 and 32x128, the error names both."""
    square, wide = build(img_size=64), build(img_size=(32, 128))
    file = files.save(square.state_dict(), tmp_path / 'x.pth')
    overlay = dict(file=str(file))
    text = refusal(timm.create_model, 'test_pvt', True, pretrained_cfg_overlay=overlay, img_size=(32, 128))
    assert '64x64' in text and '32x128' in text and 'source_size' in text
    assert files.same(timm.create_model('test_pvt', True, pretrained_cfg_overlay=overlay, img_size=64), square)
    text = refusal(load_model, checkpoint=file, img_size=(32, 128))
    assert '64x64' in text and '32x128' in text
    resized = create_from_checkpoint(file, source_size=64, img_size=(32, 128))
    square.set_input_size((32, 128))
    assert files.same(resized, square)
    file = files.save(wide.state_dict(), tmp_path / 'y.pth')
    assert files.same(create_from_checkpoint(file, source_size=(32, 128)), wide)
    # formats that hold square images only leave no doubt
    file = files.save(from_timm(build(img_size=64).state_dict(), 'original')[0], tmp_path / 'z.pth')
    overlay = dict(file=str(file))
    model = timm.create_model('test_pvt', True, pretrained_cfg_overlay=overlay, img_size=(32, 128))
    assert model.stages[0].grid_size == (8, 32)


@pytest.mark.parametrize('fmt', ['timm', 'timm_features', 'original'])
def test_weights_of_the_first_stages(fmt, tmp_path, capsys):
    """Weights of only the first three stages can be loaded with features only, and otherwise are refused."""
    used = timm.create_model('test_pvt', pretrained=True, features_only=True, out_indices=(0, 1, 2))
    state = {k.replace('stages_', 'stages.'): v for k, v in used.state_dict().items()}
    file = str(files.save(from_timm(state, fmt)[0], tmp_path / 'x.pth'))
    kwargs = dict(features_only=True, pretrained_cfg_overlay=dict(file=file))
    for out_indices in ((0, 1, 2), (1,), (-2,) if fmt == 'original' else (0, 2)):
        again = timm.create_model('test_pvt', pretrained=True, out_indices=out_indices, **kwargs)
        assert all(torch.equal(v, used.state_dict()[k]) for k, v in again.state_dict().items())
    for call in (lambda: timm.create_model('test_pvt', pretrained=True, **kwargs),  # needs the fourth
                 lambda: timm.create_model('test_pvt', pretrained=True, pretrained_cfg_overlay=dict(file=file)),
                 lambda: create_from_checkpoint(file)):
        text = refusal(call)
        assert '(1, 2, 2)' in text and 'None' not in text


# ---- images ----------------------------------------------------------------------------------------------------------

PROCESSORS = [
    # crop_pct, crop_mode, interpolation
    (0.9, 'center', 'bilinear'), (0.875, 'center', 'bicubic'), (1.0, 'squash', 'bilinear'), (0.8, 'squash', 'nearest'),
    (1.0, 'center', 'lanczos')]


@pytest.mark.parametrize('crop_pct, crop_mode, interpolation', PROCESSORS)
def test_transformers_sees_the_same_picture(crop_pct, crop_mode, interpolation, tmp_path):
    from transformers import AutoImageProcessor

    model = build(img_size=64)
    args = argparse.Namespace(crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation, img_size=64)
    source = files.save(dict(state_dict=model.state_dict(), args=args), tmp_path / 'x.pth.tar')
    convert(source, tmp_path / 'hf', to='transformers')
    report = convert(tmp_path / 'hf', tmp_path / 'back')
    expected = dict(crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation)
    assert {name: report.preprocessing[name] for name in expected} == expected
    y, x = np.mgrid[:150, :200]
    picture = Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))
    data = dict(input_size=(3, 64, 64), mean=report.preprocessing['mean'], std=report.preprocessing['std'], **expected)
    ours = create_transform(**data)(picture)
    theirs = AutoImageProcessor.from_pretrained(tmp_path / 'hf')(picture, return_tensors='pt')['pixel_values'][0]
    assert theirs.shape == ours.shape and (theirs - ours).abs().max() < 0.05  # rounding of pixels to 8 bits


def test_pooling_goes_with_the_parts_that_it_needs(tmp_path):
    source = saved(build(), tmp_path / 'source', global_pool='token')
    convert(source, tmp_path / 'out', drop=['class_token', 'norm', 'head'])
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert 'global_pool' not in config['model_args']
    assert timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).global_pool == 'avg'


def test_processors_are_read(tmp_path):
    def preprocessing(n, **processor):
        return inspect(in_transformers(build(), tmp_path / f'hf{n}', processor)).preprocessing

    got = preprocessing(0, size=dict(height=32, width=32), resample=2, image_mean=[.1] * 3, image_std=[.2] * 3)
    assert (got['crop_pct'], got['crop_mode'], got['interpolation']) == (1, 'squash', 'bilinear')
    assert got['mean'] == (.1,) * 3
    got = preprocessing(1, size=40, resample=3, do_center_crop=True, crop_size=32, do_normalize=False)
    assert (got['crop_pct'], got['crop_mode'], got['mean'], got['std']) == (.8, 'squash', (0,) * 3, (1,) * 3)
    preprocessing(2, rescale_factor=0.00392157)  # 1/255 with the digits that people write
    wrong_ones = (dict(do_resize=False), dict(do_rescale=False), dict(rescale_factor=1.), dict(rescale_factor=1 / 256))
    for n, wrong in enumerate(wrong_ones, 3):
        assert 'preprocessor_config.json' in refusal(preprocessing, n, **wrong)
    odd = dict(resample=9, size={'longest_edge': 3}, image_mean='x')
    report = inspect(in_transformers(build(), tmp_path / 'odd', odd))
    assert len(report.notes) == 3 and all('preprocessor_config.json' in note for note in report.notes)


def test_public_files_keep_what_is_published_with_them(tmp_path, monkeypatch):
    from pvt_timm import sources

    folder = in_transformers(build(), tmp_path / 'hf', dict(size=dict(height=32, width=32), resample=2))
    monkeypatch.setitem(sources.SHA256, 'test_pvt.digits', inspect(folder).sha256)
    monkeypatch.setitem(sources.SHA256, 'pvt_tiny.in1k', 'x')
    got = inspect(folder).preprocessing
    assert (got['interpolation'], got['crop_mode'], got['mean']) == ('bicubic', 'center', (.5,) * 3)


@pytest.mark.parametrize('settings', [
    dict(interpolation='random'), dict(crop_pct=1e-8), dict(crop_pct=0.002), dict(mean=[float('inf')] * 3)])
def test_settings_that_make_no_sense_are_named(settings, tmp_path, capsys):
    file = files.save(dict(state_dict=build().state_dict(), args=argparse.Namespace(**settings)), tmp_path / 'x.pth')
    Image.new('RGB', (32, 32)).save(tmp_path / 'x.png')
    assert any(next(iter(settings)) in note for note in inspect(file).notes)
    assert pvt_timm_main(['predict', str(tmp_path / 'x.png'), '--checkpoint', str(file)]) == 0


def test_openmmlab_says_how_images_are_normalised(tmp_path):
    source = files.make('mmdet', fill=files.random_values)
    text = ("model = dict(\n    type='RetinaNet',\n    data_preprocessor=dict(\n        type='DetDataPreprocessor',\n"
            "        mean=[\n            127.5,\n            51,\n            0,\n        ],\n"
            "        std=[51.0, 102, 255],\n        bgr_to_rgb=True))\nx = __import__('os').system('touch executed')\n")

    def checkpoint(text, key='cfg'):
        return files.save(dict(state_dict=files.wrap(source, prefix='backbone.'), meta={key: text}), tmp_path / 'x.pth')

    got = inspect(checkpoint(text)).preprocessing
    assert got['mean'] == (.5, .2, 0) and got['std'] == (.2, .4, 1)
    old = ("img_norm_cfg = dict(mean=[127.5, 51, 0], std=[51., 102, 255], to_rgb=True)\n"
           "test_pipeline = [dict(type='Normalize', mean=[127.5, 51, 0], std=[51., 102, 255], to_rgb=True)]\n")
    assert inspect(checkpoint(old, 'config')).preprocessing == got
    assert 'BGR' in refusal(inspect, checkpoint(text.replace('True', 'False')))
    two = old.replace("Normalize', mean=[127.5", "Normalize', mean=[1")
    assert 'one normalisation' in refusal(inspect, checkpoint(two))
    for broken in ('model = dict(', '(' * 10 ** 5, 'a' * 2 ** 21, '\0'):
        assert 'config' in refusal(inspect, checkpoint(broken))
    convert(checkpoint(text), tmp_path / 'out')
    cfg = json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg']
    assert cfg['mean'] == [.5, .2, 0]


# ---- classes ---------------------------------------------------------------------------------------------------------

def test_several_labels_for_an_image(tmp_path, capsys):
    model = build(num_classes=3)
    folder = in_transformers(model, tmp_path / 'hf', problem_type='multi_label_classification')
    convert(folder, tmp_path / 'out')
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['problem_type'] == 'multi_label_classification'
    picture = Image.new('RGB', (32, 32), 'red')
    for source in (folder, tmp_path / 'out'):
        classifier = load_model(checkpoint=source)
        x = create_transform(**classifier.data)(picture)[None]
        expected = outputs(classifier.model, x)[0].sigmoid()
        got = dict(predict(classifier, picture, 3))
        assert got == pytest.approx(dict(enumerate(expected.tolist())))
    convert(tmp_path / 'out', tmp_path / 'back', to='transformers')
    assert json.loads((tmp_path / 'back' / 'config.json').read_text())['problem_type'] == 'multi_label_classification'
    plain = in_transformers(model, tmp_path / 'plain', problem_type='single_label_classification')
    assert sum(p for _, p in predict(load_model(checkpoint=plain), picture, 3)) == pytest.approx(1)


def test_one_class_is_yes_or_no(tmp_path):
    model = build(num_classes=1)
    classifier = load_model(checkpoint=files.save(model.state_dict(), tmp_path / 'x.pth'))
    (_, probability), = predict(classifier, Image.new('RGB', (32, 32)))
    assert 0 < probability < 1 and probability != 1  # a softmax would say 100% of every image


def test_a_report_describes_what_was_written(tmp_path):
    folder = in_transformers(build(num_classes=3), tmp_path / 'hf', id2label={0: 'a', 1: 'b', 2: 'c'})
    report = convert(folder, tmp_path / 'out', num_classes=0)
    assert (report.num_classes, report.labels, report.parts) == (0, 0, ['class_token', 'norm'])
    assert '0 classes, 0 label names' in report.to_text()
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert card.endswith('\n') and not card.endswith('\n\n') and '0 classes' in card
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['num_classes'] == config['pretrained_cfg']['num_classes'] == 0 and 'label_names' not in config
    code, out, err = run('inspect', folder, '--quiet')
    assert (code, out, err) == (0, '', '')


def test_pooled_size_is_of_maps_only(tmp_path):
    """Only models without class token have a `pool_size`, from which fastai builds a head for feature maps."""
    for name in ('pvt_tiny.in1k', 'test_pvt.digits'):
        assert timm.get_pretrained_cfg(name).pool_size is None
    assert timm.get_pretrained_cfg('pvt_tiny.retinanet_coco').pool_size == (7, 7)
    for fmt, size in (('original', None), ('mmdet', [1, 1])):
        convert(files.save(files.make(fmt), tmp_path / f'{fmt}.pth'), tmp_path / fmt)
        assert json.loads((tmp_path / fmt / 'config.json').read_text())['pretrained_cfg']['pool_size'] == size


# ---- weights ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_weights_are_floating_point_numbers(dtype, tmp_path):
    state = {k: torch.zeros(v.shape, dtype=dtype) if k == 'norm.bias' else v for k, v in build().state_dict().items()}
    file = files.save(state, tmp_path / 'x.pth')
    text = refusal(timm.create_model, 'test_pvt', True, pretrained_cfg_overlay=dict(file=str(file)))
    assert 'norm.bias' in text and str(dtype) in text
    assert 'norm.bias' in refusal(inspect, file)


def test_the_tag_of_a_detector_has_the_eps_of_its_code(tmp_path):
    for how in ('pvt_tiny.retinanet_coco', 'object', 'dict'):
        cfg = timm.get_pretrained_cfg('pvt_tiny.retinanet_coco')
        kwargs = {'pvt_tiny.retinanet_coco': {}, 'object': dict(pretrained_cfg=cfg),
                  'dict': dict(pretrained_cfg=cfg.to_dict())}[how]
        model = timm.create_model('pvt_tiny' if kwargs else how, device='meta', **kwargs)
        norms = [m for k, m in model.named_modules() if k.endswith(('patch_embed.norm', 'attn.norm'))]
        assert {norm.eps for norm in norms} == {1e-6} and not model.class_token and len(norms) == 4 + 6
    assert timm.create_model('pvt_tiny', device='meta').stages[0].patch_embed.norm.eps == 1e-5


def test_eps_of_mmdetection_goes_into_the_saved_model(tmp_path):
    source = files.make('mmdet', fill=files.random_values)
    report = convert(files.save(source, tmp_path / 'x.pth'), tmp_path / 'out')
    assert report.model_args == dict(class_token=False, embed_norm_eps=1e-6)
    for model in (timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True),
                  create_from_checkpoint(tmp_path / 'x.pth'), create_from_checkpoint(tmp_path / 'out')):
        assert model.stages[2].patch_embed.norm.eps == 1e-6 and model.norm is not None
    report = convert(tmp_path / 'out', tmp_path / 'original', to='original')
    assert any('eps 1e-06' in note for note in report.notes)
    report = convert(tmp_path / 'out', tmp_path / 'back', to='mmdet')
    assert files.same(read_checkpoint(tmp_path / 'back'), source) and not any('eps' in note for note in report.notes)


def test_create_from_checkpoint_takes_arguments_of_timm(tmp_path):
    model = build(num_classes=3)
    file = files.save(dict(model=model.state_dict(), top1=np.float64(75.1)), tmp_path / 'x.pth')  # not for `file=`
    assert files.same(create_from_checkpoint(file), model)
    five = create_from_checkpoint(file, num_classes=5, in_chans=1, drop_path_rate=0.1)
    assert five.head.weight.shape == (5, 64) and five.stages[0].patch_embed.proj.weight.shape[1] == 1
    assert create_from_checkpoint(file, class_token=False).num_classes == 0
    dense = create_from_checkpoint(file, features_only=True, out_indices=(1, 3))
    assert [x.shape[1] for x in dense(torch.zeros(1, 3, 64, 64))] == [32, 64]
    assert 'holds test_pvt' in refusal(create_from_checkpoint, file, model='pvt_tiny')


def test_a_head_that_gives_no_prediction_is_refused(tmp_path, capsys):
    model = build(num_classes=3, global_pool='')
    source = saved(model, tmp_path / 'tuned', global_pool='')
    Image.new('RGB', (32, 32)).save(tmp_path / 'x.png')
    assert pvt_timm_main(['predict', str(tmp_path / 'x.png'), '--checkpoint', str(source)]) == 2
    error = capsys.readouterr().err
    assert "global_pool=''" in error and error.count('\n') == 1


def test_no_large_model_is_built_without_weights(capsys, monkeypatch, tmp_path):
    Image.new('RGB', (32, 32)).save(tmp_path / 'x.png')
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: pytest.fail('built'))
    assert pvt_timm_main(['predict', str(tmp_path / 'x.png'), '--model', 'pvt_huge_v2']) == 2
    assert 'no published weights' in capsys.readouterr().err


def test_what_is_read_is_one_description(tmp_path):
    """The result of `read_weights` is enough to describe the model, build it and write it."""
    file = files.save(files.make('original-dense', fill=files.random_values), tmp_path / 'x.pth')
    with read_weights(file) as weights:
        assert weights.parts == [] and weights.has_bare_row and weights.model_args == dict(class_token=False)
        assert weights.embed_norm_eps == 1e-5 and weights.num_heads == (1, 2, 5, 8) and not weights.multi_label
        assert files.same(weights.create_model(), weights.for_model())


# ---- formats ---------------------------------------------------------------------------------------------------------

def test_changes_work_on_their_tensors():
    """`to_ours` is called before pieces are joined, `to_theirs` after pieces are cut. Errors name the tensor."""
    table = (Row('kv.{p}', ('k.{p}', 'v.{p}'), our_pieces=(2,), to_ours=lambda x: x.T, to_theirs=lambda x: x.T),
             Row('a{s}.b{s}', 'x{s}.y{s}', to_ours=lambda x: x.permute(0, 1, 2)))
    theirs = {'k.weight': torch.arange(6.).view(2, 3), 'v.weight': torch.arange(6., 12.).view(2, 3)}
    ours, _, unknown = to_ours({**theirs, 'x1.y2': torch.ones(1)}, table)
    assert ours['kv.weight'].shape == (6, 2) and torch.equal(ours['kv.weight'][3:], theirs['v.weight'].T)
    assert unknown == ['x1.y2']  # a placeholder stands for the same everywhere
    back, _, _ = to_theirs(ours, table)
    assert files.same(back, theirs)
    assert 'x2.y2 of shape [4]' in refusal(to_ours, {'x2.y2': torch.ones(4)}, table)
    assert "got 'q'" in refusal(to_ours, {'a': torch.ones(1)}, (Row('a', 'b{q}'),))


def test_what_a_format_needs_is_said():
    class Forgotten(Format):
        name, table, start = 'forgotten', (), re.compile('x')

    for attribute, value in (('first_weight', None), ('first_weight', 'x.weight'), ('is_target', True)):
        kind = type('Kind', (Forgotten,), {attribute: value} if value else {})
        if attribute == 'is_target':
            kind.first_weight = ('x.weight',)
        with pytest.raises(TypeError, match='first_weight' if attribute != 'is_target' else 'needs `write`'):
            kind()


def test_the_format_of_the_weights_reads_the_config_first(tmp_path, monkeypatch):
    """If a config has keys of several formats, the format of the weights reads it.

    The model to compare with is also that format's own, if there is one.
    """
    timm_format = FORMATS['timm']
    calls = []

    def read_config(config):
        calls.append('config')
        return Said('config.json', model_args=dict(act_layer='relu')) if 'activation' in config else None

    def reference(weights):
        calls.append('reference')
        raise NoReferenceError('none')

    monkeypatch.setattr(timm_format, 'read_config', read_config)
    monkeypatch.setattr(timm_format, 'reference', reference)
    folder = tmp_path / 'x'
    folder.mkdir()
    files.save(build(num_classes=3).state_dict(), folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(dict(activation='relu', image_size=32, depths=[1, 2, 2, 1])))
    report = convert(folder, tmp_path / 'out', verify=True)
    assert report.model_args == dict(act_layer='relu') and calls == ['config', 'reference']
    assert report.verification['reference'].startswith('transformers')


def test_a_config_that_was_not_read_is_named(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(dict(architecture='test_pvt', model_args=dict(act_layer='relu'))))
    file = files.save(build().state_dict(), tmp_path / 'mine.pth')
    assert any('config.json beside the file was not read' in note for note in inspect(file).notes)
    assert inspect(tmp_path).model_args == dict(act_layer='relu')


def test_no_weight_is_there_twice(tmp_path):
    state = from_timm(build().state_dict(), 'transformers')[0]
    base = {k.removeprefix('pvt.'): v + 1 for k, v in state.items() if k.startswith('pvt.encoder.')}
    assert "with and without 'pvt.'" in refusal(inspect, files.save({**base, **{
        k: v for k, v in state.items() if 'patch_embeddings.0' not in k}}, tmp_path / 'x.pth'))
    twice = {'net.a': torch.ones(1), 'net': {'a': torch.ones(1), **build().state_dict()}}
    assert 'net.a' in refusal(inspect, files.save(twice, tmp_path / 'y.pth'))


def test_what_transformers_cannot_hold(tmp_path):
    for n, (args, named) in enumerate((
            (dict(patch_size=8, img_size=64), 'patch_size'), (dict(act_layer='hard_swish'), 'act_layer'),
            (dict(mlp_ratios=(2.5, 4, 4, 4)), 'mlp_ratios'))):
        source = saved(build(num_classes=3, **args), tmp_path / f'tuned{n}', **args)
        assert named in refusal(convert, source, tmp_path / 'out', to='transformers')
        assert 'no such model' in refusal(convert, source, tmp_path / 'out', verify=True)
        assert convert(source, tmp_path / f'out{n}', verify=None).verification is None


def test_the_backbone_in_a_config_of_openmmlab(tmp_path):
    source = files.make('mmdet', fill=files.random_values)

    def checkpoint(**backbone):
        config = dict(backbone=dict(type='PyramidVisionTransformer', **backbone))
        meta = dict(cfg=f'model = {config!r}')
        return files.save(dict(state_dict=files.wrap(source, prefix='backbone.'), meta=meta), tmp_path / 'x.pth')

    assert inspect(checkpoint(num_heads=[2, 4, 4, 4])).model_args['num_heads'] == (2, 4, 4, 4)
    for wrong, named in ((dict(act_cfg=dict(type='ReLU')), 'act_cfg'), (dict(sr_ratios=[8, 4, 2, 1]), 'sr_ratios'),
                         (dict(norm_cfg=dict(type='LN', eps=1e-3)), 'norm_cfg'),
                         (dict(patch_norm=False), 'patch_norm')):
        assert named in refusal(inspect, checkpoint(**wrong))
    flag = "img_norm_cfg = dict(mean=[1, 2, 3], std=[1, 1, 1], to_rgb=flag)"
    file = files.save(dict(state_dict=files.wrap(source, prefix='backbone.'), meta=dict(cfg=flag)), tmp_path / 'y.pth')
    assert 'True or False for to_rgb' in refusal(inspect, file)
    convert(checkpoint(), tmp_path / 'out', to='mmdet')
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert 'embed_dims=16' in card and 'pretrain_img_size=32' in card and 'sr_ratios=[4, 2, 1, 1]' in card


def test_folders_of_this_machine_stay_out_of_cards(tmp_path):
    folder = tmp_path / 'a\tb' / ('long' * 40) / ('path' * 40)
    folder.mkdir(parents=True)
    convert(files.save(files.make('original'), folder / 'x.pth'), tmp_path / 'out')
    assert 'longlong' not in (tmp_path / 'out' / 'README.md').read_text()


def test_names_of_classes_go_with_their_head(tmp_path):
    file = files.save(dict(state_dict=build(num_classes=3).state_dict(), hyper_parameters=dict(
        class_names=['a', 'b', 'c'])), tmp_path / 'x.pth')
    assert create_from_checkpoint(file).pretrained_cfg['label_names'] == ('a', 'b', 'c')
    assert 'label_names' not in create_from_checkpoint(file, num_classes=5).pretrained_cfg


# ---- what a second reader found --------------------------------------------------------------------------------------

@pytest.mark.parametrize('hyper', [
    dict(act_layer='relu'), dict(model_kwargs=dict(act_layer='relu')), dict(model=dict(act_layer='relu', lr=.1))])
def test_lightning_says_arguments_too(hyper, tmp_path):
    model, x = build(num_classes=3, act_layer='relu'), images(1, 3, 32, 32, dtype=torch.float32)
    file = files.save(dict(state_dict=model.state_dict(), hyper_parameters=hyper), tmp_path / 'x.ckpt')
    assert torch.equal(outputs(create_from_checkpoint(file), x), outputs(model, x))


def test_formats_of_weights_alone_say_what_they_lose(tmp_path):
    args = argparse.Namespace(mean=[.1, .2, .3], crop_pct=.9)
    file = files.save(dict(state_dict=build(num_classes=3).state_dict(), args=args), tmp_path / 'x.pth.tar')
    for to, drop in (('original', ()), ('mmdet', ('class_token', 'norm', 'head'))):
        report = convert(file, tmp_path / to, to=to, drop=drop)
        assert any('mean [0.1, 0.2, 0.3], crop_pct 0.9' in note for note in report.notes), report.notes
        assert 'crop_pct 0.9' in (tmp_path / to / 'README.md').read_text()
    folder = in_transformers(build(num_classes=3), tmp_path / 'hf', problem_type='multi_label_classification')
    assert any('multi_label' in note for note in convert(folder, tmp_path / 'o', to='original').notes)
    plain = files.save(files.make('timm', fill=files.random_values), tmp_path / 'y.pth')
    assert convert(plain, tmp_path / 'p', to='original').notes == []


def test_eps_of_a_tag_that_timm_saved(tmp_path):
    """timm saves only the tag of a model. The eps of the norms is found from this tag."""
    cfg = dict(timm.get_pretrained_cfg('pvt_tiny.retinanet_coco').to_dict(), architecture='test_pvt')
    model = randomize(timm.create_model('test_pvt', pretrained_cfg=cfg))
    assert model.stages[0].patch_embed.norm.eps == 1e-6
    timm.models.save_for_hf(model, tmp_path / 'saved')
    assert create_from_checkpoint(tmp_path / 'saved').stages[0].patch_embed.norm.eps == 1e-6
    args = argparse.Namespace(model='test_pvt.retinanet_coco')
    file = files.save(dict(state_dict=model.state_dict(), args=args), tmp_path / 'x.pth.tar')
    assert inspect(file).model_args['embed_norm_eps'] == 1e-6


def test_kinds_of_problems(tmp_path, capsys):
    picture = Image.new('RGB', (32, 32))
    folder = in_transformers(build(num_classes=3), tmp_path / 'numbers', problem_type='regression')
    assert 'predicts numbers' in refusal(load_model, checkpoint=folder)
    for n, odd in enumerate(('x', 5)):
        folder = in_transformers(build(num_classes=3), tmp_path / f'odd{n}', problem_type=odd)
        assert any('problem_type' in note for note in inspect(folder).notes)
        assert sum(p for _, p in predict(load_model(checkpoint=folder), picture, 3)) == pytest.approx(1)


def test_names_of_classes_that_are_none_are_named(tmp_path):
    for n, names in enumerate((['x' * 1001, 'b', 'c'], [['a'], 'b', 'c'])):
        hyper = dict(class_names=names)
        checkpoint = dict(state_dict=build(num_classes=3).state_dict(), hyper_parameters=hyper)
        file = files.save(checkpoint, tmp_path / f'{n}.pth')
        assert any('class_names' in note for note in inspect(file).notes)
        assert load_model(checkpoint=file).labels == ['class 0', 'class 1', 'class 2']


def test_what_is_read_is_not_replaced(tmp_path, capsys, monkeypatch):
    pytest.importorskip('matplotlib')
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (32, 32)).save('in.png')
    files.save(build().state_dict(), tmp_path / 'mine.safetensors')
    before = {name: (tmp_path / name).read_bytes() for name in ('in.png', 'mine.safetensors')}
    symlink(tmp_path / 'link.png', Path('in.png'))
    for argv in (['--output', 'in.png'], ['--output', 'link.png'], ['--output', 'p.png', '--save', 'mine.safetensors']):
        assert pvt_timm_main(['features', 'in.png', '--checkpoint', 'mine.safetensors', *argv]) == 2
        assert 'would be replaced' in capsys.readouterr().err
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    convert('mine.safetensors', 'out', num_classes=0)
    (tmp_path / 'out' / 'config.json').write_text(json.dumps([str(i) for i in range(10)]))
    assert 'would be replaced' in refusal(convert, 'mine.safetensors', 'out', labels='out/config.json', force=True)


def test_flags_before_the_command(tmp_path):
    file = files.save(build().state_dict(), tmp_path / 'x.pth')
    for argv in (['--quiet', 'inspect', file], ['inspect', '-q', file], ['-q', file, '-o', tmp_path / 'out']):
        assert run(*argv) == (0, '', '')
    code, out, _ = run('--json', '--debug', 'inspect', file)
    assert code == 0 and json.loads(out)['variant'] == 'test_pvt'
    assert run('--json', '--json')[0] == 2
