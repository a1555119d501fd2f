""" The converter: to timm and back without a changed bit, and folders that load wherever they should. """
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

import convert_files as files
import pvt_timm
from pvt_timm.checkpoints import from_timm, map_to_timm
from pvt_timm.files import read_checkpoint
from weights_conversion import VerificationError, convert, inspect, push
from weights_conversion.cli import main

def run(*argv):
    """The command line in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()


def refused(*argv):
    """Run, check that it is refused with one line and exit code 2, return the line."""
    code, out, err = run(*argv)
    assert code == 2, err
    assert out == ''
    assert len(err.strip().splitlines()) == 1 and err.startswith('pvt-convert: error: '), err
    return err


def there_and_back(source: Path, expected, fmt: str, folder: Path, **kwargs):
    """Convert to timm and back to `fmt`, compare with `expected`."""
    report = convert(source, folder / 'timm', **kwargs)
    convert(folder / 'timm', folder / 'back', to=fmt)
    found = read_checkpoint(folder / 'back')
    assert files.same(found, expected)
    return report


# ---- there and back -------------------------------------------------------------------------------------------------

KEYS = {  # the original's and transformers' counts are published facts
    'original': (161, 301, 517, 751),
    'transformers': (177, 333, 573, 833),
}


@pytest.mark.parametrize('variant', [
    'pvt_tiny', 'pvt_small', pytest.param('pvt_medium', marks=pytest.mark.slow),
    pytest.param('pvt_large', marks=pytest.mark.slow)])
@pytest.mark.parametrize('fmt', files.FORMATS)
def test_all_variants_there_and_back(fmt, variant, tmp_path):
    source = files.make(fmt, variant, num_classes=1000, dtype=torch.bfloat16)
    if fmt in KEYS:
        assert len(source) == KEYS[fmt][('pvt_tiny', 'pvt_small', 'pvt_medium', 'pvt_large').index(variant)]
    expected = {f'pvt.{k}': v for k, v in source.items()} if fmt == 'transformers-base' else source
    report = there_and_back(
        files.save(source, tmp_path / 'x.pth'), expected, fmt.partition('-')[0], tmp_path, model=variant)
    assert report.variant == variant
    assert report.num_classes == (0 if fmt in files.DENSE or fmt == 'transformers-base' else 1000)
    has_row = (tmp_path / 'timm' / 'class_row.safetensors').exists()
    assert has_row == (fmt == 'original-dense')


@settings(
    max_examples=30, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck))
@given(
    fmt=st.sampled_from(files.FORMATS),
    num_classes=st.integers(1, 30),
    in_chans=st.integers(1, 6),
    size=st.one_of(st.integers(32, 140), st.tuples(st.integers(32, 140), st.integers(32, 140))),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    wrapper=st.sampled_from([None, 'model', 'state_dict', 'state_dict_ema', 'model_ema']),
    prefix=st.sampled_from(['', 'module.', 'backbone.', 'module.backbone.', '_orig_mod.', 'model.']),
    kind=st.sampled_from(['zip', 'legacy', 'safetensors']),
    seed=st.integers(0, 1000),
)
def test_any_form_there_and_back(
        tmp_path_factory, fmt, num_classes, in_chans, size, dtype, wrapper, prefix, kind, seed):
    if fmt.startswith('transformers') and isinstance(size, tuple):
        size = size[0]
    source = files.make(fmt, 'test_pvt', num_classes, in_chans, size, dtype, seed)
    tmp_path = tmp_path_factory.mktemp('any')
    if kind == 'safetensors':
        file = files.save(files.wrap(source, None, prefix), tmp_path / 'x.safetensors')
    else:
        file = files.save(files.wrap(source, wrapper, prefix), tmp_path / 'x.pth', legacy=kind == 'legacy')
    # what the stored grid stands for: 4 pixels a patch
    pixels = tuple(n // 4 * 4 for n in ((size, size) if isinstance(size, int) else size))
    expected = {f'pvt.{k}': v for k, v in source.items()} if fmt == 'transformers-base' else source
    report = there_and_back(file, expected, fmt.partition('-')[0], tmp_path, source_size=pixels)
    assert (report.in_chans, report.img_size, report.prefix) == (in_chans, pixels, prefix)
    assert report.wrappers == ((wrapper,) if wrapper and kind != 'safetensors' else ())
    assert report.format == fmt.partition('-')[0]
    kept = sum(len(row['from'].split(' + ')) * row['count'] for row in report.mapped)
    assert kept == len(source) and len(report.dropped) == (
        (4 if report.wrappers else 0) + (2 if prefix.endswith('backbone.') else 0))
    assert report.preprocessing['input_size'] == (in_chans, *pixels)


def test_every_pair_of_formats_agrees(tmp_path):
    """original -> X -> Y gives the same as original -> Y, for all X and Y that hold everything."""
    file = files.save(files.make('original'), tmp_path / 'x.pth')
    direct = {}
    for to in ('timm', 'original', 'transformers'):
        convert(file, tmp_path / to, to=to)
        direct[to] = read_checkpoint(tmp_path / to)
    for via in direct:
        for to in direct:
            convert(tmp_path / via, tmp_path / f'{via}-{to}', to=to)
            assert files.same(read_checkpoint(tmp_path / f'{via}-{to}'), direct[to]), (via, to)


# ---- nothing vanishes, nothing is made up ---------------------------------------------------------------------------

@pytest.mark.parametrize('options', [
    '--drop norm', '--drop class_token', '--drop class_token norm', '--drop legs', '--model pvt_small',
    '--model resnet50', '--sha256 01234567', '--sha256 abc', '--num-classes 3', '--img-size 16', '--img-size 5000',
    '--img-size 64 64 64', '--source-size 64', '--max-bytes 1000'])
def test_what_cannot_be_is_refused(options, tmp_path):
    file = files.save(files.make('original'), tmp_path / 'x.pth')
    refused(file, '-o', tmp_path / 'out', '--to', 'original', *options.split())
    assert not (tmp_path / 'out').exists()


def test_mmdet_needs_the_drop_said_out_loud(tmp_path):
    file = files.save(files.make('original'), tmp_path / 'x.pth')
    message = refused(file, '-o', tmp_path / 'out', '--to', 'mmdet')
    assert '--drop class_token norm head' in message
    assert 'norm' in refused(file, '-o', tmp_path / 'out', '--to', 'mmdet', '--drop', 'head', 'class_token')
    assert not (tmp_path / 'out').exists()
    report = convert(file, tmp_path / 'out', to='mmdet', drop=['head', 'norm', 'class_token'])
    assert sorted(report.dropped) == ['cls_token', 'head.bias', 'head.weight', 'norm.bias', 'norm.weight']
    found = read_checkpoint(tmp_path / 'out')
    assert found['layers.3.1.0.pos_embed'].shape[1] == 1


def test_a_dense_checkpoint_without_the_class_row(tmp_path):
    """transformers lacks parts that nobody can make up. The original's dense form has a row that nobody reads."""
    source = files.make('mmdet')
    file = files.save(files.wrap(source, 'state_dict', 'backbone.'), tmp_path / 'x.pth')
    assert 'nothing is made up' in refused(file, '-o', tmp_path / 'out', '--to', 'transformers')
    assert not (tmp_path / 'out').exists()
    convert(file, tmp_path / 'timm')
    dense = {}
    for name, start in dict(direct=file, over_timm=tmp_path / 'timm').items():
        report = convert(start, tmp_path / name, to='original')
        assert any('row of zeros' in w for w in report.warnings)
        assert 'row of zeros' in (tmp_path / name / 'README.md').read_text()
        dense[name] = read_checkpoint(tmp_path / name)
    assert files.same(dense['direct'], dense['over_timm'])
    assert not dense['direct']['pos_embed4'][:, 0].any()
    convert(tmp_path / 'direct', tmp_path / 'back', to='mmdet', drop=['class_token'])
    assert files.same(read_checkpoint(tmp_path / 'back'), source)
    # a classifier keeps its row
    source = files.make('original')
    convert(files.save(source, tmp_path / 'y.pth'), tmp_path / 'kept', to='original',
            drop=['class_token', 'norm', 'head'])
    expected = {k: v for k, v in source.items() if not k.startswith(('cls_token', 'norm.', 'head.'))}
    assert files.same(read_checkpoint(tmp_path / 'kept'), expected)


def test_averaged_weights_are_preferred_as_in_timm(tmp_path):
    plain, ema = files.make('original', seed=1), files.make('original', seed=2)
    file = files.save({'model': plain, 'model_ema': ema, 'epoch': 1}, tmp_path / 'x.pth')
    for options, expected, said in (([], ema, ('averaged', 'model')), (['--no-ema'], plain, ('plain', 'model_ema'))):
        code, out, err = run(file, '-o', tmp_path / said[0], '--to', 'original', '--json', *options)
        assert code == 0, err
        assert (json.loads(out)['weights'], json.loads(out)['other_weights']) == said
        assert files.same(read_checkpoint(tmp_path / said[0]), expected)


def test_prefix_chooses_between_two_backbones(tmp_path):
    one, two = files.make('original', seed=1), files.make('original', seed=2)
    both = {**files.wrap(one, prefix='student.'), **files.wrap(two, prefix='teacher.')}
    file = files.save(both, tmp_path / 'x.pth')
    assert 'student.' in refused(file, '-o', tmp_path / 'out')
    code, _, err = run(file, '-o', tmp_path / 'out', '--to', 'original', '--prefix', 'teacher.')
    assert code == 0, err
    assert files.same(read_checkpoint(tmp_path / 'out'), two)


def test_non_square_sizes_have_to_be_told(tmp_path):
    file = files.save(files.make('original', img_size=(64, 96)), tmp_path / 'x.pth')
    assert 'img_size' in refused(file, '-o', tmp_path / 'out')
    assert 'grid' in refused(file, '-o', tmp_path / 'out', '--source-size', 64, 64)
    code, _, err = run(file, '-o', tmp_path / 'out', '--source-size', 64, 96)
    assert code == 0, err
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert model.stages[0].grid_size == (16, 24)


# ---- options --------------------------------------------------------------------------------------------------------

def test_dtype(tmp_path):
    source = files.make('original', fill=files.random_values)
    file = files.save(source, tmp_path / 'x.pth')
    for dtype in ('float16', 'bfloat16', 'float32'):
        report = convert(file, tmp_path / dtype, to='original', dtype=dtype)
        found = read_checkpoint(tmp_path / dtype)
        assert files.same(found, {k: v.to(getattr(torch, dtype)) for k, v in source.items()})
        assert report.dtype == dtype
    source['norm.weight'][3] = 1e6
    file = files.save(source, tmp_path / 'y.pth')
    assert 'norm.weight' in refused(file, '-o', tmp_path / 'out', '--dtype', 'float16')
    convert(file, tmp_path / 'out', dtype='bfloat16')


def test_img_size_equals_timm_resizing(tmp_path):
    file = files.save(files.make('original', fill=files.random_values), tmp_path / 'x.pth')
    convert(file, tmp_path / 'plain')
    convert(file, tmp_path / 'baked', img_size=(96, 64))
    baked = timm.create_model(f'local-dir:{tmp_path / "baked"}', pretrained=True)
    resized = timm.create_model(f'local-dir:{tmp_path / "plain"}', pretrained=True, img_size=(96, 64))
    assert baked.stages[0].grid_size == (24, 16)
    assert files.same(baked.state_dict(), resized.state_dict())
    x = torch.randn(1, 3, 96, 64)
    with torch.inference_mode():
        assert torch.equal(baked.eval()(x), resized.eval()(x))


def test_num_classes(tmp_path):
    file = files.save(files.make('original', fill=files.random_values), tmp_path / 'x.pth')
    convert(file, tmp_path / 'out', num_classes=0)
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert model.num_classes == 0 and model(torch.randn(1, 3, 32, 32)).shape == (1, 64)
    convert(tmp_path / 'out', tmp_path / 'hf', to='transformers')
    from transformers import PvtForImageClassification
    _, info = PvtForImageClassification.from_pretrained(tmp_path / 'hf', output_loading_info=True)
    assert not any(info.values()), info


def test_known_files_are_named(tmp_path, monkeypatch):
    from weights_conversion import sources
    assert sources.known_file('b6c94a5b' + '0' * 56) == 'pvt_small.retinanet_coco'
    assert sources.known_file('0' * 64) is None
    file = files.save(files.make('original'), tmp_path / 'x-0123abcd.pth')
    assert any('0123abcd' in w for w in inspect(file).warnings)
    monkeypatch.setitem(sources.SHA256, 'pvt_tiny.in1k', hashlib.sha256(file.read_bytes()).hexdigest())
    assert '(pvt_tiny.in1k)' in run('inspect', file)[1]


def test_existing_output_is_kept_unless_forced(tmp_path):
    file = files.save(files.make('original'), tmp_path / 'x.pth')
    out = tmp_path / 'deep' / 'er' / 'out'
    convert(file, out, to='original')
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert '--force' in refused(file, '-o', out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    convert(file, out, force=True)
    assert sorted(p.name for p in out.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    (out / 'thesis.tex').write_text('years of work')
    assert 'other files' in refused(file, '-o', out, '--force')
    assert (out / 'thesis.tex').read_text() == 'years of work'
    assert 'is a file' in refused(file, '-o', file)
    assert sorted(p.name for p in out.parent.iterdir()) == ['out']


def test_inspect_writes_nothing_and_says_it_all(tmp_path):
    file = files.save(files.wrap(files.make('mmdet'), 'state_dict', 'backbone.'), tmp_path / 'x.pth')
    before = sorted(tmp_path.iterdir())
    code, out, err = run('inspect', file)
    assert code == 0 and err == '' and sorted(tmp_path.iterdir()) == before
    for text in ('mmdet', 'test_pvt', "'backbone.'", 'state_dict.bbox_head.*', 'state_dict.neck.*', 'split',
                 'optimizer', '32x32'):
        assert text in out
    code, out, _ = run('inspect', file, '--json')
    report = json.loads(out)
    assert report['format'] == 'mmdet' and report['dropped']['state_dict.bbox_head.*'] == '1 beside the PVT'
    assert sum(row['count'] for row in report['mapped'] if row['kind'] == 'split') == 12


@pytest.mark.parametrize('to, library', [
    ('timm', 'timm'), ('transformers', 'transformers'), ('mmdet', 'mmdetection'), ('original', None)])
def test_json_report_and_model_card(to, library, tmp_path):
    from huggingface_hub import ModelCard

    file = files.save(files.wrap(files.make('original', num_classes=4), 'model'), tmp_path / 'x.pth')
    drop = ['--drop', 'class_token', 'norm', 'head'] if to == 'mmdet' else []
    code, out, _ = run(file, '-o', tmp_path / 'out', '--to', to, '--json', *drop)
    report = json.loads(out)
    assert code == 0 and report['to'] == to and set(report['files']) == {p.name for p in (tmp_path / 'out').iterdir()}
    card = (tmp_path / 'out' / 'README.md').read_text()
    for text in (report['sha256'], f'pvt-timm {pvt_timm.__version__}', 'optimizer', 'x.pth', 'original'):
        assert text in card
    assert 'license' not in card  # not ours to say
    data = ModelCard(card).data
    assert data.library_name == library
    assert data.pipeline_tag == ('image-feature-extraction' if drop else 'image-classification')


def test_dropped_parts_are_listed_by_name(tmp_path):
    file = files.save(files.make('transformers'), tmp_path / 'x.safetensors')
    out = run(file, '-o', tmp_path / 'out', '--drop', 'class_token', 'norm', 'head')[1]
    for name in ('pvt.encoder.patch_embeddings.3.cls_token', 'pvt.encoder.layer_norm.bias', 'classifier.weight'):
        assert name in out


def test_non_finite_values_are_kept_and_named(tmp_path):
    source = files.make('original', fill=files.random_values)
    source['block2.1.mlp.fc1.weight'][0, 0] = float('nan')
    report = convert(files.save(source, tmp_path / 'x.pth'), tmp_path / 'out', to='original')
    assert any('stages.1.blocks.1.mlp.fc1.weight' in w for w in report.warnings)
    assert files.same(read_checkpoint(tmp_path / 'out'), source)


# ---- labels and preprocessing ---------------------------------------------------------------------------------------

def _transformers_folder(folder: Path, num_classes=4, **config):
    folder.mkdir()
    source = files.make('transformers', num_classes=num_classes, fill=files.random_values)
    files.save(source, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps({'model_type': 'pvt', 'image_size': 32, **config}))
    return folder


def test_labels_keep_their_order(tmp_path):
    names = [f'class {i}' for i in range(12)]
    scrambled = {str(i): names[i] for i in (3, 11, 0, 2, 10, 1, 4, 9, 5, 8, 7, 6)}
    source = _transformers_folder(tmp_path / 'hf', 12, id2label=scrambled)
    (source / 'preprocessor_config.json').write_text(json.dumps(
        {'image_mean': [.1, .2, .3], 'image_std': [.4, .5, .6]}))
    report = convert(source, tmp_path / 'out')
    assert report.labels == 12
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert list(model.pretrained_cfg['label_names']) == names
    data = timm.data.resolve_model_data_config(model)
    assert [*data['mean'], *data['std'], *data['input_size']] == [.1, .2, .3, .4, .5, .6, 3, 32, 32]
    convert(tmp_path / 'out', tmp_path / 'back', to='transformers')
    config = json.loads((tmp_path / 'back' / 'config.json').read_text())
    assert [config['id2label'][str(i)] for i in range(12)] == names
    from transformers import AutoImageProcessor
    processor = AutoImageProcessor.from_pretrained(tmp_path / 'back')
    assert list(processor.image_mean) == [.1, .2, .3] and processor.size['height'] == 32


@pytest.mark.parametrize('id2label', [
    {'0': 'a', '1': 'b'}, {'0': 'a', '1': 'b', '2': 'c', '7': 'd'}, {'a': 'b', 'c': 'd', 'e': 'f', 'g': 'h'}])
def test_labels_that_do_not_fit_are_left_out_with_a_word(id2label, tmp_path):
    report = convert(_transformers_folder(tmp_path / 'hf', id2label=id2label), tmp_path / 'out')
    assert report.labels == 0 and any('label' in w for w in report.warnings)


SAID = dict(input_size=(3, 64, 64), mean=(.1, .2, .3), std=(.4, .5, .6), crop_pct=1., interpolation='bilinear')


@pytest.mark.parametrize('to', ['timm', 'original', 'transformers'])
@pytest.mark.parametrize('how', ['timm', 'lightning'])
def test_what_training_says_about_itself_is_carried_along(how, to, tmp_path):
    """A model with position embeddings for 32x32 that was trained at 64x64, on classes with names."""
    names = ['cat', 'dog', 'eel', 'fox']
    source = files.make('timm', num_classes=4, fill=files.random_values)
    args = dict(img_size=64, mean=[.1, .2, .3], std=[.4, .5, .6], crop_pct=1., interpolation='bilinear')
    if how == 'timm':
        checkpoint = {'arch': 'test_pvt', 'state_dict': source, 'args': argparse.Namespace(**args)}
    else:
        checkpoint = {'state_dict': files.wrap(source, prefix='model.'), 'hyper_parameters': args}
    file = files.save(checkpoint, tmp_path / 'run.pth.tar')
    (tmp_path / 'class_names.txt').write_text('\n'.join(names))
    code, out, _ = run('inspect', file)
    assert code == 0 and 'images   64x64, crop_pct 1, bilinear' in out and '4 label names' in out
    convert(file, tmp_path / 'out', to=to)
    model = timm.create_model('test_pvt', num_classes=4).eval()
    model.load_state_dict(source)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        if to == 'transformers':
            from transformers import AutoImageProcessor, PvtForImageClassification
            found = PvtForImageClassification.from_pretrained(tmp_path / 'out').eval()
            processor = AutoImageProcessor.from_pretrained(tmp_path / 'out')
            assert processor.size['height'] == 64 and list(processor.image_std) == [.4, .5, .6]
            assert [found.config.id2label[i] for i in range(4)] == names
            assert (found(x).logits - expected).abs().max() < 1e-4  # its eps deviates
        elif to == 'timm':
            found = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
            assert torch.equal(found(x), expected) and list(found.pretrained_cfg['label_names']) == names
            data = timm.data.resolve_model_data_config(found)
            assert {k: tuple(data[k]) if k in ('input_size', 'mean', 'std') else data[k] for k in SAID} == SAID
        else:
            assert files.same(map_to_timm(read_checkpoint(tmp_path / 'out')).state_dict, source)


def test_labels_from_a_file(tmp_path):
    source = _transformers_folder(tmp_path / 'hf', id2label={str(i): f'old {i}' for i in range(4)})
    names = tmp_path / 'names.txt'
    names.write_text('a\nb\nc\nd\n')
    code, _, err = run(source, '-o', tmp_path / 'out', '--labels', names)
    assert code == 0, err
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['label_names'] == ['a', 'b', 'c', 'd']
    names.write_text('a\nb\n')
    assert 'names of 4 classes' in refused(source, '-o', tmp_path / 'no', '--labels', names)


def test_a_timm_fine_tune_keeps_its_configuration(tmp_path):
    model = timm.create_model('test_pvt', num_classes=3, in_chans=2, global_pool='avg', img_size=64)
    timm.models.save_for_hf(model, tmp_path / 'tuned', model_args=dict(in_chans=2, img_size=64, global_pool='avg'))
    convert(tmp_path / 'tuned', tmp_path / 'out')
    again = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert again.global_pool == 'avg'
    x = torch.randn(2, 2, 64, 64)
    with torch.inference_mode():
        assert torch.equal(again.eval()(x), model.eval()(x))


# ---- the folder loads everywhere ------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """A converted classifier, an image batch and the logits that it has to give."""
    folder = tmp_path_factory.mktemp('classifier')
    torch.manual_seed(0)
    model = timm.create_model('test_pvt', num_classes=5, in_chans=3).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=.1)
    source, _ = from_timm(model.state_dict(), 'original')
    (folder / 'hf').mkdir()
    files.save(source, folder / 'x.pth')
    convert(folder / 'x.pth', folder / 'hf2', to='transformers')
    config = json.loads((folder / 'hf2' / 'config.json').read_text())
    config['id2label'] = {str(i): f'kind {i}' for i in range(5)}
    (folder / 'hf2' / 'config.json').write_text(json.dumps(config))
    convert(folder / 'hf2', folder / 'out')
    x = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        return folder / 'out', x, model(x), model


def logits_of(model, x):
    with torch.inference_mode():
        return model.eval()(x)


def test_hf_hub(classifier, hub, token):
    folder, x, expected, _ = classifier
    result = push(folder, 'someone/test-pvt')
    assert set(hub.repo_files('someone/test-pvt')) >= {'model.safetensors', 'config.json', 'README.md'}
    assert result['url'].endswith('/someone/test-pvt')
    assert torch.equal(logits_of(timm.create_model('hf-hub:someone/test-pvt', pretrained=True), x), expected)
    assert torch.equal(logits_of(timm.create_model(f'local-dir:{folder}', pretrained=True), x), expected)
    features = timm.create_model('hf-hub:someone/test-pvt', pretrained=True, features_only=True)
    assert [f.shape[1] for f in features(x)] == [16, 32, 40, 64]


def test_transformers_wrapper(classifier):
    from transformers import AutoModelForImageClassification

    folder, x, expected, _ = classifier
    model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == 'TimmWrapperForImageClassification'
    assert not any(info.values()), info
    with torch.inference_mode():
        assert torch.equal(model.eval()(x).logits, expected)
    assert model.config.id2label == {i: f'kind {i}' for i in range(5)}


# ---- verification ---------------------------------------------------------------------------------------------------

def _hf_source(folder):
    file = files.save(files.make('transformers', num_classes=6, fill=files.random_values), folder / 'x.safetensors')
    return file


CHECKOUT = pytest.param('original', 'whai362/PVT', marks=pytest.mark.skipif(
    not os.environ.get('PVT_CHECKOUT'), reason='PVT_CHECKOUT does not name a checkout of https://github.com/whai362/PVT'))


@pytest.mark.parametrize('to', ['timm', 'original', 'transformers'])
@pytest.mark.parametrize('fmt, reference', [
    ('transformers', 'transformers'), ('original', 'transformers'), CHECKOUT])
def test_verify(fmt, reference, to, tmp_path, monkeypatch):
    if reference == 'transformers':
        monkeypatch.delenv('PVT_CHECKOUT', raising=False)
    source = files.make(fmt, 'pvt_tiny', 6, img_size=64, fill=files.random_values)
    result = convert(files.save(source, tmp_path / 'x.pth'), tmp_path / 'out', to=to, verify=True).verification
    assert result['passed'] and result['reference'].startswith(reference)
    assert ('in place of' in result['reference']) == (reference != 'whai362/PVT' and fmt == 'original')
    exact = [run for run in result['runs'] if run['decisive']]
    others = {'timm', fmt} if os.environ.get('PVT_CHECKOUT') else {'timm', fmt, 'original'}
    assert len(exact) == (1 if to in others else 2)  # the target's own code runs the written file
    for run in exact:
        assert [d['name'] for d in run['differences']] == ['stage 1', 'stage 2', 'stage 3', 'stage 4', 'logits']
        assert max(d['absolute'] for d in run['differences']) <= 1e-10
    if reference == 'transformers':
        assert max(d['absolute'] for d in result['runs'][0]['differences']) > 1e-8  # its eps deviates
    if to == 'timm':  # what was dropped, resized and cast is not compared
        assert convert(tmp_path / 'x.pth', tmp_path / 'cut', verify=True, img_size=96, num_classes=0,
                       dtype='float16').verification['passed']


def test_verify_fails_over_the_tolerance(tmp_path, monkeypatch):
    from weights_conversion import verification
    monkeypatch.setattr(verification, 'ORIGINAL_EPS', 1e-6)
    with pytest.raises(VerificationError):
        convert(_hf_source(tmp_path), tmp_path / 'out', verify=True)
    code, out, err = run(tmp_path / 'x.safetensors', '-o', tmp_path / 'out', '--verify')
    assert code == 2 and 'FAILED' in out and len(err.splitlines()) == 1
    assert not (tmp_path / 'out').exists()


def test_verify_notices_a_wrong_mapping(tmp_path, monkeypatch):
    from weights_conversion import converter

    def swapped(*args):
        done = map_to_timm(*args)
        kv = done.state_dict['stages.2.blocks.0.attn.kv.weight']
        done.state_dict['stages.2.blocks.0.attn.kv.weight'] = torch.cat(kv.chunk(2)[::-1])
        return done

    monkeypatch.setattr(converter, 'map_to_timm', swapped)
    with pytest.raises(VerificationError):
        convert(_hf_source(tmp_path), tmp_path / 'out', verify=True)


@pytest.mark.parametrize('to', ['timm', 'transformers'])
def test_verify_with_several_types_in_a_file(to, tmp_path):
    source = files.make('transformers', num_classes=6, fill=files.random_values)
    source = {k: v.double() if 'classifier' in k else v.half() if 'norm' in k else v for k, v in source.items()}
    report = convert(files.save(source, tmp_path / 'x.safetensors'), tmp_path / 'out', to=to, verify=True)
    assert report.verification['passed'] and 'float16' in report.dtype and 'float64' in report.dtype
    expected = source if to == 'transformers' else map_to_timm(source).state_dict
    assert files.same(read_checkpoint(tmp_path / 'out'), expected)


def test_verify_without_a_reference(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    file = files.save(files.make('original', fill=files.random_values), tmp_path / 'x.pth')
    monkeypatch.delenv('PVT_CHECKOUT', raising=False)
    assert 'pip install transformers' in refused(file, '-o', tmp_path / 'out', '--verify')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('fmt', ['mmdet', 'original-dense'])
def test_verify_against_mmdetection(fmt, tmp_path):
    for name in ('mmdet', 'mmcv'):
        pytest.importorskip(name, reason='mmdetection (mmdet, mmengine, mmcv-lite) is not installed')
    from mmdet_reference import do_without_compiled_parts
    do_without_compiled_parts()
    source = files.wrap(files.make(fmt, 'pvt_tiny', img_size=64, fill=files.random_values), 'state_dict', 'backbone.')
    report = convert(files.save(source, tmp_path / 'x.pth'), tmp_path / 'out', verify=True)
    assert report.verification['passed'] and report.verification['reference'].startswith('mmdetection')
    assert max(d['absolute'] for d in report.verification['runs'][1]['differences']) <= 1e-10
    report = convert(tmp_path / 'out', tmp_path / 'mm', to='mmdet', verify=True,
                     drop=['class_token'] if fmt == 'original-dense' else [])
    assert report.verification['passed']


# ---- sources over the network ---------------------------------------------------------------------------------------

def test_url(hub, tmp_path):
    source = files.make('original')
    url = hub.add_file('v2/pvt.pth', files.save(source, tmp_path / 'x.pth'))
    secret = url + '?token=secret'
    report = convert(secret, tmp_path / 'out', to='original')
    assert files.same(read_checkpoint(tmp_path / 'out'), source)
    assert report.source == url and 'secret' not in (tmp_path / 'out' / 'README.md').read_text()


@pytest.mark.parametrize('kind', [404, 500, 'drop', 'truncate', 'short', 'html', 'garbage'])
def test_broken_downloads(kind, hub, tmp_path):
    url = hub.add_file('v2/pvt.pth', files.save(files.make('original'), tmp_path / 'x.pth'))
    hub.fail(kind, times=1)
    refused(url, '-o', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    convert(url, tmp_path / 'out')


def test_hub_source(hub, tmp_path):
    source = _transformers_folder(tmp_path / 'hf', id2label={str(i): f'kind {i}' for i in range(4)})
    sha = hub.add_repo('some/pvt', {p.name: p for p in source.iterdir()})
    old = files.make('original', seed=9)
    hub.add_repo('some/pvt', {'pytorch_model.bin': files.save(old, tmp_path / 'y.pth'),
                              'sub/other.pth': tmp_path / 'y.pth'}, ref='old')
    report = convert('hf-hub:some/pvt', tmp_path / 'a')
    assert report.labels == 4 and report.source == 'hf-hub:some/pvt'
    convert(f'hf-hub:some/pvt@{sha}:model.safetensors', tmp_path / 'b')
    assert files.same(read_checkpoint(tmp_path / 'a'), read_checkpoint(tmp_path / 'b'))
    for spec in ('hf-hub:some/pvt@old', 'hf-hub:some/pvt@old:sub/other.pth'):
        out = tmp_path / spec.replace('/', '_').replace(':', '_')
        convert(spec, out, to='original')
        assert files.same(read_checkpoint(out), old)


@pytest.mark.parametrize('spec', [
    'hf-hub:none/there', 'hf-hub:some/pvt@gone', 'hf-hub:some/pvt:gone.pth', 'hf-hub:pvt',
    'hf-hub:some/pvt:../../x.pth', 'hf-hub:../pvt',
    'hf-hub:some/..', 'hf-hub:some/pvt@../x', 'hf-hub:some/pvt:/etc/passwd', 'hf-hub:', 'hf-hub:a/b/c',
    'hf-hub:some/pvt:a\\..\\b', 'hf-hub:gated/pvt', 'hf-hub:some/empty', 'ftp://localhost/x.pth', 'http://',
    'http://[::1', 'http://localhost:1/x.pth', 'http://a b/x.pth', '{hub}/elsewhere.pth', '', 'nowhere.pth'])
def test_names_that_are_refused(spec, hub, tmp_path):
    hub.add_repo('some/pvt', {'model.safetensors': b'x'})
    hub.add_repo('some/empty', {'README.md': b'x'})
    hub.add_repo('gated/pvt', {'model.safetensors': b'x'}, gated=True)
    hub.add_redirect('elsewhere.pth', f'file://{files.save(files.make("original"), tmp_path / "x.pth")}')
    refused(spec.replace('{hub}', hub.url), '-o', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('what', ['drop', 500, 404])
def test_hub_out_of_reach(what, hub, no_waits, tmp_path):
    hub.fail(what)
    refused('hf-hub:foo/bar', '-o', tmp_path / 'out')


def test_push(classifier, hub, token, tmp_path):
    file = files.save(files.make('original'), tmp_path / 'x.pth')
    code, out, _ = run(file, '-o', tmp_path / 'dry', '--push', 'me/pvt', '--dry-run')
    assert code == 0 and 'would upload' in out and not hub.has_repo('me/pvt') and hub.requests == []
    code, out, _ = run(file, '-o', tmp_path / 'out', '--push', 'me/pvt', '--private', '--json')
    assert code == 0 and json.loads(out)['push']['url'].endswith('me/pvt')
    uploaded = hub.repo_files('me/pvt')
    for p in (tmp_path / 'out').iterdir():
        assert uploaded[p.name] == p.read_bytes()
    hub.fail(500)
    message = refused(file, '-o', tmp_path / 'out2', '--push', 'me/other', '-q')
    assert '500' in message and (tmp_path / 'out2' / 'model.safetensors').exists()
    assert 'OWNER/REPO' in refused(file, '-o', tmp_path / 'out3', '--push', '../x')


def test_commands_of_the_readme(hub, token, tmp_path, monkeypatch):
    """In order, on small models under the names that it uses. Those of `publish` are in test_publish.py."""
    monkeypatch.chdir(tmp_path)
    sha256 = hashlib.sha256(files.save(files.make('original'), Path('pvt_small.pth')).read_bytes()).hexdigest()
    hub.add_file('whai362/PVT/releases/download/v2/pvt_small.pth', Path('pvt_small.pth'))
    hub.add_repo('Zetatech/pvt-small-224', {'model.safetensors': files.save(
        files.make('transformers', fill=files.random_values), Path('x.safetensors'))})
    files.save(files.wrap(files.make('original-dense'), 'state_dict', 'backbone.'), Path('retinanet_pvt.pth'))
    files.save(files.wrap(files.make('timm', num_classes=2, fill=files.random_values), 'state_dict_ema'),
               Path('checkpoint.pth.tar'))
    Path('class_names.txt').write_text('cat\ndog\n')
    text = (Path(__file__).parents[2] / 'weights_conversion' / 'README.md').read_text()
    commands = [line for line in text.splitlines() if re.match('pvt-convert (?!publish)', line)]
    assert len(commands) == 12
    for command in commands:
        command = command.replace('https://github.com', hub.url).replace('SHA256', sha256).replace('OWNER/REPO', 'me/x')
        code, _, err = run(*shlex.split(command)[1:])
        assert code == 0, (command, err)
    assert hub.has_repo('me/x')


# ---- the command ----------------------------------------------------------------------------------------------------

def test_as_a_program(tmp_path):
    file = files.save(files.make('original'), tmp_path / 'x.pth')
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, '-m', 'weights_conversion', str(file), '--output', str(tmp_path / 'out')],
                          capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0 and 'model.safetensors' in done.stdout and done.stderr == ''
    done = subprocess.run([sys.executable, '-m', 'weights_conversion', 'inspect', 'nowhere.pth'],
                          capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.strip() == 'pvt-convert: error: No such file or folder: nowhere.pth'
    long = subprocess.run(f'{sys.executable} -m weights_conversion inspect {file} --json | head -n 1', shell=True,
                          capture_output=True, text=True, env=env, cwd=tmp_path)
    assert long.stdout == '{\n' and long.stderr == ''
    done = subprocess.run([sys.executable, '-X', 'importtime', '-m', 'weights_conversion', '--help'],
                          capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0 and ' torch\n' not in done.stderr  # help comes at once
