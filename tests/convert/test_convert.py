""" The converter: weights go to timm's format and back without a changed bit, and other libraries load its folders. """
import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
import safetensors.torch

import pvt_timm
from pvt_timm.formats.mapping import map_to_timm
from pvt_timm.detection import detector_to_mmdet, pvt_retinanet
from pvt_timm.files import read_checkpoint
from pvt_timm import sources, weights as weights_module
from pvt_timm.weights import Weights
from weights_conversion import convert, inspect
from tests.support import convert_files as files
from tests.support.convert_files import run
from tests.support.systems import needs_posix_shell


@pytest.fixture
def refused(tmp_path):
    """Return a function that runs a conversion and returns its error.

    The function checks that the error is one line, that the exit code is 2, and that there is no output.
    """
    def check(source, *argv):
        code, out, err = run(source, '--output', tmp_path / 'refused', *argv)
        assert (code, out) == (2, '') and not (tmp_path / 'refused').exists(), err
        assert len(err.strip().splitlines()) == 1 and re.match('pvt-convert(?: convert)?: error: ', err), err
        return err
    return check


@pytest.fixture
def original(tmp_path):
    return files.save(files.make('original', fill=files.random_values), tmp_path / 'x.pth')


def load(folder, **kwargs):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


def there_and_back(source: Path, expected, fmt: str, folder: Path, **kwargs):
    """Convert to timm and back to `fmt`, compare with `expected`, and return the report of the first conversion."""
    report = convert(source, folder / 'timm', **kwargs)
    convert(folder / 'timm', folder / 'back', to=fmt)
    assert files.same(read_checkpoint(folder / 'back'), expected)
    return report


# ---- there and back -------------------------------------------------------------------------------------------------

KEYS = {  # the original's and transformers' counts are published facts
    'original': dict(pvt_tiny=161, pvt_small=301, pvt_medium=517, pvt_large=751),
    'transformers': dict(pvt_tiny=177, pvt_small=333, pvt_medium=573, pvt_large=833),
}


@pytest.mark.parametrize('variant', [
    'pvt_tiny', 'pvt_small', pytest.param('pvt_medium', marks=pytest.mark.slow),
    pytest.param('pvt_large', marks=pytest.mark.slow)])
@pytest.mark.parametrize('fmt', KEYS)
def test_published_forms_there_and_back(fmt, variant, tmp_path):
    source = files.make(fmt, variant, num_classes=1000, dtype=torch.bfloat16)
    assert len(source) == KEYS[fmt][variant]
    report = there_and_back(files.save(source, tmp_path / 'x.pth'), source, fmt, tmp_path, model=variant)
    assert (report.variant, report.num_classes) == (variant, 1000)


@settings(
    max_examples=30, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck))
@given(
    fmt=st.sampled_from(files.FORMATS),
    num_classes=st.integers(1, 30),
    in_chans=st.integers(1, 6),
    size=st.tuples(st.integers(32, 140), st.integers(32, 140)),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    wrapper=st.sampled_from([None, 'model', 'state_dict', 'state_dict_ema', 'model_ema']),
    prefix=st.sampled_from(['', 'module.', 'backbone.', 'module.backbone.', '_orig_mod.', 'model.']),
    kind=st.sampled_from(['zip', 'legacy', 'safetensors']),
    seed=st.integers(0, 1000),
)
def test_any_form_there_and_back(
        tmp_path_factory, fmt, num_classes, in_chans, size, dtype, wrapper, prefix, kind, seed):
    if fmt.startswith('transformers'):
        size = size[:1] * 2
    wrapper = None if kind == 'safetensors' else wrapper
    source = files.make(fmt, 'test_pvt', num_classes, in_chans, size, dtype, seed)
    tmp_path = tmp_path_factory.mktemp('any')
    file = tmp_path / ('x.safetensors' if kind == 'safetensors' else 'x.pth')
    files.save(files.wrap(source, wrapper, prefix), file, legacy=kind == 'legacy')
    pixels = tuple(n // 4 * 4 for n in size)  # what the stored grid stands for: 4 pixels a patch
    expected = {f'pvt.{k}': v for k, v in source.items()} if fmt == 'transformers-base' else source
    report = there_and_back(file, expected, fmt.partition('-')[0], tmp_path, source_size=pixels)
    assert (report.in_chans, report.img_size, report.prefix) == (in_chans, pixels, prefix)
    assert (report.format, report.wrappers) == (fmt.partition('-')[0], (wrapper,) if wrapper else ())
    kept = sum(len(row['from'].split(' + ')) * row['count'] for row in report.mapped)
    assert kept == len(source) and len(report.dropped) == 4 * bool(wrapper) + 2 * prefix.endswith('backbone.')
    assert report.preprocessing['input_size'] == (in_chans, *pixels)


# ---- nothing vanishes, nothing is made up ---------------------------------------------------------------------------

@pytest.mark.parametrize('options, match', [
    ('--to original --drop norm head', 'together'), ('--to original --drop class_token norm', 'leave out both'),
    ('--drop norm', 'both'), ('--drop class_token', 'leave out both'), ('--drop legs', 'legs'),
    ('--model pvt_small', 'test_pvt'), ('--model resnet50', 'resnet50'), ('--sha256 01234567', 'damaged'),
    ('--sha256 0', '8 digits'), ('--num-classes 3', 'or 7'), ('--img-size 16', 'from 32'),
    ('--img-size 5000', 'to 2048'), ('--img-size 64 64 64', 'one or two'), ('--source-size 64', 'of 64x64 images'),
    ('--max-bytes 1000', 'max_bytes'), ('--dry-run', '--push'), ('--push ../x', '../x'),
    ('--to numpy', 'mmdet'), ('--dtype int8', 'bfloat16'), ('--img-size x', 'int value'), ('--tidy', '--tidy'),
    ('--to transformers --img-size 64 96', 'square'), ('--to mmdet', '--drop class_token norm head'),
    ('--to mmdet --drop head class_token', 'place for norm:')])
def test_what_cannot_be_is_refused(options, match, original, refused):
    assert match in refused(original, *options.split())


@pytest.mark.parametrize('argument, value, match', [
    ('to', 'timm_features', 'timm_features'), ('dtype', 'int8', 'int8'), ('drop', ['legs'], 'legs')])
def test_choices_in_python(argument, value, match, original, tmp_path):
    """`convert` checks arguments that the command's parser would check, such as dtypes and names of parts."""
    with pytest.raises(ValueError, match=match):
        convert(original, tmp_path / 'out', **{argument: value})
    assert not (tmp_path / 'out').exists()


def test_a_dense_checkpoint_without_the_class_row(original, refused, tmp_path):
    """transformers refuses a checkpoint without class token. The original format gets a row of zeros.

    The original's dense models have this row, but do not use it.
    """
    source = files.make('mmdet')
    file = files.save(files.wrap(source, 'state_dict', 'backbone.'), tmp_path / 'y.pth')
    assert 'nothing is made up' in refused(file, '--to', 'transformers')
    convert(file, tmp_path / 'timm')
    dense = {}
    for name, start in dict(direct=file, over_timm=tmp_path / 'timm').items():
        report = convert(start, tmp_path / name, to='original')
        assert any('row of zeros' in note for note in report.notes)
        assert 'row of zeros' in (tmp_path / name / 'README.md').read_text()
        dense[name] = read_checkpoint(tmp_path / name)
    assert files.same(dense['direct'], dense['over_timm']) and not dense['direct']['pos_embed4'][:, 0].any()
    convert(tmp_path / 'direct', tmp_path / 'back', to='mmdet', drop=['class_token'])
    assert files.same(read_checkpoint(tmp_path / 'back'), source)
    # a classifier keeps its row
    convert(original, tmp_path / 'kept', to='original', drop=['class_token', 'norm', 'head'])
    expected = {k: v for k, v in read_checkpoint(original).items() if not k.startswith(('cls_token', 'norm.', 'head.'))}
    assert files.same(read_checkpoint(tmp_path / 'kept'), expected)


def test_averaged_weights_are_preferred_as_in_timm(tmp_path):
    weights = {'model': files.make('original', seed=1), 'model_ema': files.make('original', seed=2)}
    file = files.save(weights, tmp_path / 'x.pth')
    for options, taken in (([], 'model_ema'), (['--no-ema'], 'model')):
        code, _, err = run(file, '-o', tmp_path / taken, '--to', 'original', *options)
        assert code == 0, err
        assert files.same(read_checkpoint(tmp_path / taken), weights[taken])


def test_non_square_sizes_have_to_be_told(refused, tmp_path):
    file = files.save(files.make('original', img_size=(64, 96)), tmp_path / 'x.pth')
    assert 'img_size' in refused(file)
    assert 'of 64x64 images' in refused(file, '--source-size', 64, 64)
    code, _, err = run(file, '-o', tmp_path / 'out', '--source-size', 64, 96)
    assert code == 0, err
    assert load(tmp_path / 'out').stages[0].grid_size == (16, 24)
    convert(tmp_path / 'out', tmp_path / 'square', to='transformers', img_size=64)


# ---- options --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
def test_dtype(dtype, original, refused, tmp_path):
    report = convert(original, tmp_path / 'out', to='original', dtype=dtype)
    source = read_checkpoint(original)
    assert files.same(read_checkpoint(tmp_path / 'out'), {k: v.to(getattr(torch, dtype)) for k, v in source.items()})
    assert report.dtype == dtype and any('cast' in note for note in report.notes) == (dtype != 'float32')
    if dtype == 'float16':
        source['norm.weight'][3] = 1e6
        assert 'norm.weight' in refused(files.save(source, tmp_path / 'y.pth'), '--dtype', 'float16')


def test_img_size_equals_timm_resizing(original, tmp_path):
    convert(original, tmp_path / 'plain')
    convert(original, tmp_path / 'baked', img_size=(96, 64))
    baked, resized = load(tmp_path / 'baked'), load(tmp_path / 'plain', img_size=(96, 64))
    assert baked.stages[0].grid_size == (24, 16) and files.same(baked.state_dict(), resized.state_dict())
    x = torch.randn(1, 3, 96, 64)
    with torch.inference_mode():
        assert torch.equal(baked(x), resized(x))


def test_num_classes(original, tmp_path):
    convert(original, tmp_path / 'out', num_classes=0)
    assert load(tmp_path / 'out')(torch.randn(1, 3, 32, 32)).shape == (1, 64)
    convert(tmp_path / 'out', tmp_path / 'hf', to='transformers')
    from transformers import PvtForImageClassification
    _, info = PvtForImageClassification.from_pretrained(tmp_path / 'hf', output_loading_info=True)
    assert not any(info.values()), info


def test_known_files_are_named(original, monkeypatch):
    assert inspect(original).known is None
    monkeypatch.setitem(sources.SHA256, 'pvt_tiny.in1k', hashlib.sha256(original.read_bytes()).hexdigest()[:8])
    assert '(pvt_tiny.in1k)' in run('inspect', original)[1]


def test_existing_output_is_kept_unless_forced(original, tmp_path):
    out = tmp_path / 'deep' / 'er' / 'out'
    convert(original, out, to='original')
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ValueError, match='--force'):
        convert(original, out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (out / 'thesis.tex').write_text('years of work')
    convert(original, out, force=True)
    after = {p.name: p.read_bytes() for p in out.iterdir()}
    assert sorted(after) == ['README.md', 'config.json', 'model.safetensors', 'test_pvt.pth', 'thesis.tex']
    assert after['thesis.tex'] == b'years of work' and after['test_pvt.pth'] == before['test_pvt.pth']
    assert after['README.md'] != before['README.md'] and [p.name for p in out.parent.iterdir()] == ['out']
    with pytest.raises(ValueError, match='is a file'):
        convert(original, original)


def test_inspect_writes_nothing_and_says_it_all(tmp_path):
    source = files.wrap(files.make('mmdet', fill=files.random_values), 'state_dict', 'backbone.')
    source['state_dict']['backbone.layers.1.1.1.norm1.weight'][0] = float('nan')
    source['state_dict']['bbox_head.retina_cls.weight'] = torch.ones(27, 4)
    file = files.save(source, tmp_path / 'x.pth')
    code, out, err = run('inspect', file)
    assert (code, err, list(tmp_path.iterdir())) == (0, '', [file])
    for text in ('mmdet', 'test_pvt', "'backbone.'", 'state_dict.bbox_head.*', 'state_dict.neck.*', 'attn.q.* + ',
                 'optimizer', '32x32', 'not finite, kept as they are: stages.1.blocks.0.norm1.weight',
                 'the rest of a RetinaNet for 3 classes'):
        assert text in out
    report = json.loads(run('inspect', file, '--json')[1])
    assert report['format'] == 'mmdet' and report['dropped']['state_dict.bbox_head.*'] == '2 beside the PVT'
    assert sum(row['count'] for row in report['mapped'] if ' + ' in row['to']) == 12


@pytest.mark.parametrize('to, library', [
    ('timm', 'timm'), ('transformers', 'transformers'), ('mmdet', 'mmdetection'), ('original', None)])
def test_json_report_and_model_card(to, library, tmp_path):
    from huggingface_hub import ModelCard

    file = files.save(files.wrap(files.make('transformers', num_classes=4), 'model'), tmp_path / 'x.pth')
    drop = ['--drop', 'class_token', 'norm', 'head'] if to == 'mmdet' else []
    code, out, _ = run(file, '-o', tmp_path / 'out', '--to', to, '--json', *drop)
    report = json.loads(out)
    assert code == 0 and report['to'] == to and set(report['files']) == {p.name for p in (tmp_path / 'out').iterdir()}
    card = (tmp_path / 'out' / 'README.md').read_text()
    for text in (report['sha256'], f'pvt-timm {pvt_timm.__version__}', 'optimizer', 'x.pth', 'transformers'):
        assert text in card
    for name in ('pvt.encoder.patch_embeddings.3.cls_token', 'pvt.encoder.layer_norm.bias', 'classifier.weight'):
        assert (name in card) == (name in report['dropped']) == bool(drop)
    assert 'license' not in card and str(tmp_path) not in card  # not ours to say
    assert len({p.stat().st_mode for p in (tmp_path / 'out').iterdir()}) == 1
    data = ModelCard(card).data
    assert data.library_name == library
    assert data.pipeline_tag == ('image-feature-extraction' if drop else 'image-classification')


# ---- labels and preprocessing ---------------------------------------------------------------------------------------

def _transformers_folder(folder: Path, num_classes=4, **config):
    folder.mkdir()
    source = files.make('transformers', num_classes=num_classes, fill=files.random_values)
    files.save(source, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps({'model_type': 'pvt', 'image_size': 32, **config}))
    return folder


def test_labels_and_statistics_there_and_back(tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    names = [f'class {i}' for i in range(12)]
    scrambled = {str(i): names[i] for i in (3, 11, 0, 2, 10, 1, 4, 9, 5, 8, 7, 6)}
    source = _transformers_folder(tmp_path / 'hf', 12, id2label=scrambled)
    (source / 'preprocessor_config.json').write_text(json.dumps(
        {'image_mean': [.1, .2, .3], 'image_std': [.4, .5, .6]}))
    assert convert(source, tmp_path / 'out').labels == 12
    model = load(tmp_path / 'out')
    assert list(model.pretrained_cfg['label_names']) == names
    data = timm.data.resolve_model_data_config(model)
    assert [*data['mean'], *data['std'], *data['input_size']] == [.1, .2, .3, .4, .5, .6, 3, 32, 32]
    convert(tmp_path / 'out', tmp_path / 'back', to='transformers')
    x = torch.randn(1, 3, 32, 32)
    for folder in ('out', 'back'):  # the first through its wrapper of timm
        theirs, info = AutoModelForImageClassification.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values()) and theirs.config.id2label == dict(enumerate(names))
        with torch.inference_mode():
            torch.testing.assert_close(theirs.eval()(x).logits, model(x), rtol=0, atol=0 if folder == 'out' else 1e-4)
    processor = AutoImageProcessor.from_pretrained(tmp_path / 'back')
    assert list(processor.image_mean) == [.1, .2, .3] and processor.crop_size['height'] == 32


@pytest.mark.parametrize('id2label', [
    {'0': 'a', '1': 'b'}, {'0': 'a', '1': 'b', '2': 'c', '7': 'd'}, {'a': 'b', 'c': 'd', 'e': 'f', 'g': 'h'}])
def test_labels_that_do_not_fit_are_left_out_with_a_word(id2label, tmp_path):
    report = convert(_transformers_folder(tmp_path / 'hf', id2label=id2label), tmp_path / 'out')
    assert report.labels == 0 and any('label' in note for note in report.notes)


def test_config_that_does_not_fit(refused, tmp_path):
    config = _transformers_folder(tmp_path / 'hf') / 'config.json'
    for name in ('', 'foo'):
        assert 'Expected a model in' in refused(config.parent, '--model', name)
    for wrong in ({'num_attention_heads': [1, 2, 3, 8]}, {'hidden_act': 'gelu_of_mine'}, {'architecture': 'pvt_tiny'},
                  {'depths': [2, 2, 2, 2]}, {'model_type': 'vit'}, [], 'x' * 2 ** 24):
        config.write_text(json.dumps(wrong))
        text = refused(config.parent)
        assert 'config.json' in text or 'holds test_pvt' in text or 'num_heads' in text, text
    config.write_text('{')
    assert 'no valid JSON' in refused(config.parent)
    config.write_text(json.dumps({'architecture': 'test_pvt', 'pretrained_cfg': {
        'mean': [.1, .3], 'std': ['a'], 'crop_pct': 7, 'interpolation': 'cubic'}}))
    report = convert(config.parent, tmp_path / 'out')
    assert [' '.join(note.split()[:4]) for note in report.notes] == [
        'left out the std', 'left out the crop_pct', 'left out the interpolation', 'mean and std of']
    assert report.preprocessing == dict(
        input_size=(3, 32, 32), mean=(.2,) * 3, std=(.5,) * 3, crop_pct=1, crop_mode='center', interpolation='bicubic')
    config.write_text(json.dumps({'name': 'mine'}))
    assert any('of no known format' in note and 'name' in note for note in inspect(config.parent).notes)


SAID = dict(input_size=(3, 64, 64), mean=(.1, .2, .3), std=(.4, .5, .6), crop_pct=.9, interpolation='bilinear')


@pytest.mark.parametrize('how, to', [('timm', 'timm'), ('lightning', 'transformers')])
def test_what_training_says_about_itself_is_carried_along(how, to, tmp_path):
    """A conversion keeps the image size, preprocessing, pooling and labels of a training.

    The position embeddings are for 32x32, but the model was trained at 64x64.
    """
    from pvt_timm.cli.predict import load_model

    names = ['cat', 'dog', 'eel', 'fox']
    source = files.make('timm', num_classes=4, fill=files.random_values)
    pool = 'token' if to == 'transformers' else 'avg'
    args = dict(img_size=64, mean=[.1, .2, .3], std=[.4, .5, .6], crop_pct=.9, interpolation='bilinear', gp=pool)
    if how == 'timm':
        checkpoint = {'arch': 'test_pvt', 'state_dict': source, 'args': argparse.Namespace(**args)}
    else:
        checkpoint = {'state_dict': files.wrap(source, prefix='model.'), 'hyper_parameters': args}
    file = files.save(checkpoint, tmp_path / 'run.pth.tar')
    (tmp_path / 'class_names.txt').write_text('\n'.join(names))
    code, out, _ = run('inspect', file)
    assert code == 0 and 'images   64x64, crop_pct 0.9, bilinear' in out and '4 label names' in out
    convert(file, tmp_path / 'out', to=to)
    model = timm.create_model('test_pvt', num_classes=4, global_pool=pool).eval()
    model.load_state_dict(source)
    x = torch.randn(2, 3, 64, 64)
    direct, folder = load_model(checkpoint=file), load_model(checkpoint=tmp_path / 'out')
    assert direct.labels == folder.labels == names and {k: direct.data[k] for k in SAID} == SAID
    with torch.inference_mode():
        expected = model(x)
        assert torch.equal(direct.model(x), expected)
        if to == 'timm':
            assert folder.data == direct.data and torch.equal(folder.model(x), expected)
        else:
            from transformers import PvtForImageClassification
            found = PvtForImageClassification.from_pretrained(tmp_path / 'out').eval()
            assert (found(x).logits - expected).abs().max() < 1e-4  # its eps deviates


def test_a_head_trained_on_the_mean_of_tokens(tmp_path):
    """Models with mean pooling are verified with that pooling. Formats without mean pooling refuse them."""
    checkpoint = {'state_dict': files.make('timm', num_classes=4, fill=files.random_values),
                  'args': argparse.Namespace(gp='avg')}
    file = files.save(checkpoint, tmp_path / 'run.pth.tar')
    report = convert(file, tmp_path / 'out', verify=True)
    assert report.verification['passed']
    assert timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).global_pool == 'avg'
    with pytest.raises(ValueError, match='global_pool'):
        convert(file, tmp_path / 'theirs', to='transformers')
    with pytest.raises(ValueError, match='global_pool'):
        convert(file, tmp_path / 'original', to='original')


def test_labels_from_a_file(tmp_path, caplog):
    from pvt_timm.cli.predict import load_model

    source = _transformers_folder(tmp_path / 'hf', id2label={str(i): f'old {i}' for i in range(3)})  # one too few
    (tmp_path / 'names.txt').write_text('a\nb\nc\nd\n')
    assert load_model(checkpoint=source, labels=tmp_path / 'names.txt').labels == ['a', 'b', 'c', 'd']
    assert not caplog.records  # what is replaced is not worth a word
    convert(source, tmp_path / 'out', labels=tmp_path / 'names.txt')
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['label_names'] == ['a', 'b', 'c', 'd']


def test_a_timm_fine_tune_keeps_its_configuration(tmp_path):
    args = dict(in_chans=2, img_size=64, global_pool='avg')
    model = timm.create_model('test_pvt', num_classes=3, **args)
    timm.models.save_for_hf(model, tmp_path / 'tuned', model_args=args)
    convert(tmp_path / 'tuned', tmp_path / 'out')
    again = load(tmp_path / 'out')
    x = torch.randn(2, 2, 64, 64)
    with torch.inference_mode():
        assert again.global_pool == 'avg' and torch.equal(again(x), model.eval()(x))


# ---- verification ---------------------------------------------------------------------------------------------------

CHECKOUT = pytest.param('original', 'whai362/PVT', marks=pytest.mark.skipif(
    not os.environ.get('PVT_CHECKOUT'), reason='PVT_CHECKOUT does not name a checkout of https://github.com/whai362/PVT'))


@pytest.fixture
def theirs(tmp_path):
    source = files.make('transformers', num_classes=6, fill=files.random_values)
    return files.save(source, tmp_path / 'x.safetensors')


@pytest.mark.parametrize('to', ['timm', 'original', 'transformers'])
@pytest.mark.parametrize('fmt, reference', [
    ('transformers', 'transformers'), ('original', 'transformers'), CHECKOUT])
def test_verify(fmt, reference, to, tmp_path, monkeypatch):
    if reference == 'transformers':
        monkeypatch.delenv('PVT_CHECKOUT', raising=False)
    source = files.make(fmt, 'pvt_tiny', 6, img_size=64, fill=files.random_values)
    file = files.save({'epoch': 3, 'net': source}, tmp_path / 'x.pth')
    result = convert(file, tmp_path / 'out', to=to, verify=True).verification
    assert result['passed'] and result['reference'].startswith(reference)
    assert ('in place of' in result['reference']) == (reference != 'whai362/PVT' and fmt == 'original')
    outputs = ['stage 1', 'stage 2', 'stage 3', 'stage 4', 'logits']
    own = {'timm', fmt} if os.environ.get('PVT_CHECKOUT') else {'timm', fmt, 'original'}
    written = [] if to in own else [f'{x}, written' for x in outputs]  # the target's own code runs the written file
    assert list(result['differences']) == outputs + written
    assert max(exact for _, exact in result['differences'].values()) <= 1e-10
    if reference == 'transformers':
        assert max(shipped for shipped, _ in result['differences'].values()) > 1e-8  # its eps deviates
    if to == 'timm':  # what was dropped, resized and cast is not compared
        assert convert(file, tmp_path / 'cut', verify=True, img_size=96, num_classes=0,
                       dtype='float16').verification['passed']


def test_verify_notices_what_is_wrong(theirs, refused, monkeypatch):
    def swapped(*args):
        done, key = map_to_timm(*args), 'stages.2.blocks.0.attn.kv.weight'
        done.state_dict[key] = torch.cat(done.state_dict[key].chunk(2)[::-1])
        return done

    real_save = safetensors.torch.save

    def changed(tensors, *args, **kwargs):
        tensors = {k: v.nextafter(v + 1) if k == 'norm.bias' else v for k, v in tensors.items()}
        return real_save(tensors, *args, **kwargs)

    for module, name, value, says in (
            (Weights, 'embed_norm_eps', 1e-6, r'failed.*: stage 1 by \d\.\de-0[3-7],'),
            (weights_module, 'map_to_timm', swapped, r'failed.*stage 2 by \d\.\de-1\d, stage 3 by \d\.\de-0[1-4],'),
            (safetensors.torch, 'save', changed, 'not written correctly: norm.bias changed')):
        with monkeypatch.context() as m:
            m.setattr(module, name, value)
            assert re.search(says, refused(theirs, '--verify'))


@pytest.mark.parametrize('to', ['timm', 'transformers'])
def test_verify_with_several_types_in_a_file(to, theirs, tmp_path):
    source = {k: v.double() if 'classifier' in k else v.half() if 'norm' in k else v
              for k, v in read_checkpoint(theirs).items()}
    report = convert(files.save(source, tmp_path / 'y.safetensors'), tmp_path / 'out', to=to, verify=True)
    assert report.verification['passed'] and 'float16' in report.dtype and 'float64' in report.dtype
    expected = source if to == 'transformers' else map_to_timm(source).state_dict
    assert files.same(read_checkpoint(tmp_path / 'out'), expected)


def test_verify_without_a_reference(original, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    monkeypatch.delenv('PVT_CHECKOUT', raising=False)
    assert 'pip install transformers' in refused(original, '--verify')
    assert convert(original, tmp_path / 'out', verify=None).verification is None


@pytest.mark.parametrize('fmt', ['mmdet', 'original-dense'])
def test_verify_against_mmdetection(fmt, tmp_path):
    for name in ('mmdet', 'mmcv'):
        pytest.importorskip(name, reason='mmdetection (mmdet, mmengine, mmcv-lite) is not installed')
    from tests.support.mmdet_reference import do_without_compiled_parts
    do_without_compiled_parts()
    source = files.wrap(files.make(fmt, 'pvt_tiny', img_size=64, fill=files.random_values), 'state_dict', 'backbone.')
    report = convert(files.save(source, tmp_path / 'x.pth'), tmp_path / 'out', verify=True)
    assert report.verification['passed'] and report.verification['reference'].startswith('mmdetection')
    assert max(exact for _, exact in report.verification['differences'].values()) <= 1e-10
    report = convert(tmp_path / 'out', tmp_path / 'mm', to='mmdet', verify=True,
                     drop=['class_token'] if fmt == 'original-dense' else [])
    assert report.verification['passed']


# ---- sources over the network ---------------------------------------------------------------------------------------

def test_url(hub, original, tmp_path):
    url = hub.add_file('v2/pvt.pth', original)
    report = convert(url + '?token=secret', tmp_path / 'out', to='original')
    assert files.same(read_checkpoint(tmp_path / 'out'), read_checkpoint(original))
    assert report.source == url and 'secret' not in (tmp_path / 'out' / 'README.md').read_text()


@pytest.mark.parametrize('hidden', [False, True])
def test_bar_of_a_download(hidden, hub, original, monkeypatch):
    """A download shows a progress bar on a terminal, unless progress bars of the hub's client are disabled."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sources, 'are_progress_bars_disabled', lambda: hidden)
    with contextlib.redirect_stderr(terminal):
        inspect(hub.add_file('v2/pvt.pth', original))
    assert ('100%' in terminal.getvalue()) != hidden


@pytest.mark.parametrize('kind', [500, 'drop', 'truncate', 'short', 'garbage'])
def test_broken_downloads(kind, hub, no_waits, original, refused, tmp_path):
    url = hub.add_file('v2/pvt.pth', original)
    hub.fail(kind, 'v2/', times=1)
    refused(url)
    convert(url, tmp_path / 'out')
    hub.fail(kind)
    refused('hf-hub:foo/bar')


def test_hub_source(hub, no_waits, tmp_path, monkeypatch):
    source = _transformers_folder(tmp_path / 'hf', id2label={str(i): f'kind {i}' for i in range(4)})
    sha = hub.add_repo('some/pvt', {p.name: p for p in source.iterdir()})
    old = files.make('original', seed=9)
    hub.add_repo('some/pvt', {'pytorch_model.bin': files.save(old, tmp_path / 'y.pth'),
                              'sub/other.pth': tmp_path / 'y.pth'}, ref='old')
    report = convert('hf-hub:some/pvt', tmp_path / 'a')
    assert report.labels == 4 and report.source == 'hf-hub:some/pvt'
    convert(f'hf-hub:some/pvt@{sha}:model.safetensors', tmp_path / 'b')
    assert files.same(read_checkpoint(tmp_path / 'a'), read_checkpoint(tmp_path / 'b'))
    for n, spec in enumerate(('hf-hub:some/pvt@old', 'hf-hub:some/pvt@old:sub/other.pth')):
        convert(spec, tmp_path / f'old{n}', to='original')
        assert files.same(read_checkpoint(tmp_path / f'old{n}'), old)
    hub.fail(500)  # what was seen before needs no network
    convert('hf-hub:some/pvt', tmp_path / 'c')
    assert files.same(read_checkpoint(tmp_path / 'a'), read_checkpoint(tmp_path / 'c'))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert inspect('hf-hub:some/pvt').labels == 4
    with pytest.raises(ValueError, match='offline'):
        inspect('hf-hub:some/other')


def test_only_what_is_known_to_be_missing_is_left_out(hub, no_waits, refused, tmp_path, monkeypatch):
    """A failed download of config.json is an error, as labels would be lost without a message."""
    folder = _transformers_folder(tmp_path / 'hf', id2label={str(i): f'kind {i}' for i in range(4)})
    hub.add_repo('some/pvt', {p.name: p for p in folder.iterdir()})
    hub.fail(500, 'config.json')
    refused('hf-hub:some/pvt')
    hub.fail(500)
    refused('hf-hub:some/pvt')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert inspect('hf-hub:some/pvt').labels == 0


@pytest.mark.parametrize('spec', [
    'hf-hub:none/there', 'hf-hub:some/pvt@gone', 'hf-hub:some/pvt:gone.pth', 'hf-hub:pvt',
    'hf-hub:some/pvt:../../x.pth', 'hf-hub:../pvt',
    'hf-hub:some/..', 'hf-hub:some/pvt@../x', 'hf-hub:some/pvt:/etc/passwd', 'hf-hub:', 'hf-hub:a/b/c',
    'hf-hub:some/pvt:a\\..\\b', 'hf-hub:some/empty', 'ftp://localhost/x.pth', 'http://',
    'http://[::1', 'http://localhost:1/x.pth', 'http://a b/x.pth', '', 'nowhere.pth'])
def test_names_that_are_refused(spec, hub, refused):
    hub.add_repo('some/pvt', {'model.safetensors': b'x'})
    hub.add_repo('some/empty', {'README.md': b'x'})
    refused(spec)


def test_push(original, hub, token, tmp_path):
    code, out, _ = run(original, '-o', tmp_path / 'out', '--push', 'me/pvt', '--private', '--json')
    assert code == 0 and json.loads(out)['push']['url'].endswith('me/pvt')
    uploaded = hub.repo_files('me/pvt')
    assert all(uploaded[p.name] == p.read_bytes() for p in (tmp_path / 'out').iterdir())
    hub.fail(500)
    code, out, err = run(original, '-o', tmp_path / 'out2', '--push', 'me/other', '-q')
    assert code == 2 and '500' in err and (tmp_path / 'out2' / 'model.safetensors').exists()


def test_commands_of_the_readme(hub, token, tmp_path, monkeypatch):
    """The README's commands work in their order, on small models with the same file names.

    The commands of `publish` are tested in test_publish.py.
    """
    monkeypatch.chdir(tmp_path)
    sha256 = hashlib.sha256(files.save(files.make('original'), Path('pvt_small.pth')).read_bytes()).hexdigest()
    hub.add_file('whai362/PVT/releases/download/v2/pvt_small.pth', Path('pvt_small.pth'))
    hub.add_repo('Zetatech/pvt-small-224', {'model.safetensors': files.save(
        files.make('transformers', fill=files.random_values), Path('x.safetensors'))})
    detector = detector_to_mmdet(pvt_retinanet('test_pvt', 3, out_channels=16))
    files.save({'state_dict': detector}, Path('retinanet_pvt.pth'))
    files.save(files.wrap(files.make('timm', num_classes=2, fill=files.random_values), 'state_dict_ema'),
               Path('checkpoint.pth.tar'))
    Path('class_names.txt').write_text('cat\ndog\n', encoding='utf-8')
    text = (Path(__file__).parents[2] / 'weights_conversion' / 'README.md').read_text()
    commands = [line for line in text.splitlines() if re.match('pvt-convert (?!publish)', line)]
    assert len(commands) == 13
    for command in commands:
        command = command.replace('https://github.com', hub.url).replace('SHA256', sha256).replace('OWNER/REPO', 'me/x')
        code, out, err = run(*shlex.split(command)[1:])
        assert code == 0, (command, err)
        assert hub.has_repo('me/x') == command.endswith('--push me/x')
        assert ('would upload' in out) == ('--dry-run' in command)


# ---- the command ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('command', ['', 'convert', 'inspect', 'publish'])
def test_too_few_arguments(command):
    """If arguments are missing, one line names the command and its --help."""
    code, out, err = run(*filter(None, [command]))
    named = command or 'convert'
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert err.startswith(f'pvt-convert {named}: error: ') and f'{named} --help' in err


def test_as_a_program(original, tmp_path, client_env):
    done = subprocess.run(
        [sys.executable, '-m', 'weights_conversion', 'x.pth', '--output', 'out'], env=client_env, cwd=tmp_path,
        capture_output=True, text=True)
    assert done.returncode == 0 and 'model.safetensors' in done.stdout and done.stderr == ''
    assert run('inspect', 'nowhere.pth') == (2, '', 'pvt-convert: error: No such file or folder: nowhere.pth\n')
    assert run(original, '--output', tmp_path / 'out2', '--quiet') == (0, '', '')
    assert (tmp_path / 'out2' / 'model.safetensors').read_bytes() == (
        tmp_path / 'out' / 'model.safetensors').read_bytes()


@needs_posix_shell
def test_a_reader_that_stops(original, tmp_path, client_env):
    """If a reader such as `head` closes the pipe early, there is no error."""
    done = subprocess.run(
        f'"{sys.executable}" -m weights_conversion inspect x.pth --json | head -n 1', shell=True, env=client_env,
        cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ('{\n', '')
