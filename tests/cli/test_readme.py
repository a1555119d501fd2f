"""Every command and snippet of the READMEs is run unchanged, section by section.

The READMEs of recipes/ and weights_conversion/ are tested in other files (test_from_folder.py, export/test_engines.py,
convert/test_convert.py).
"""
import glob
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from pvt_timm.formats.mapping import from_timm
from pvt_timm.cli import network
from pvt_timm.cli.classifiers import DEFAULT_MODEL
from pvt_timm.cli.main import main as pvt_timm_main
from pvt_timm.detection import detector_to_mmdet, pvt_mask_rcnn, pvt_retinanet
from pvt_timm.variants import VARIANTS
from pvt_timm.segmentation import segmenter_to_mmseg, semantic_fpn
from weights_conversion.cli import main as convert_main

ROOT = Path(__file__).resolve().parents[2]
DOCS = (
    'README.md', 'CONTRIBUTING.md', 'benchmarks/README.md', 'benchmarks/training/README.md',
    'pvt_timm/recipes/DETECTION.md')
LINKED = (*DOCS, 'weights_conversion/README.md', 'pvt_timm/recipes/README.md', 'pvt_timm/recipes/EXPORT.md')
TEXTS = {doc: (ROOT / doc).read_text(encoding='utf-8') for doc in LINKED}
PUBLISHED = ('pvt_small', 'pvt_large')  # those that they fetch
SMALL = '--epochs 1 --warmup-epochs 0 --batch-size 2 --workers 0 --img-size 32'.split()  # what makes training quick
# What files of detectors and segmenters say, so that images are not resized to 800 pixels
SMALL_IMAGES = "test_pipeline = [dict(type='Resize', img_scale=(256, 160), keep_ratio=True)]"
# Commands that are not run, and why
NOT_RUN = {
    'git': 'a network',
    'pip': 'a network',
    'python3 -m venv': 'a network; .ci/run runs them',
    'bash .ci/': 'half an hour',
    'python -m pytest': 'the tests in the tests; that the paths exist is checked',
    'python -m tests.support': 'the tests in the tests',
    'ruff': 'the whole checkout; .ci/run runs it',
    'mypy': 'the whole checkout; .ci/run runs it',
    'python -m build': 'a network; .ci/run runs it',
    'python benchmarks/': 'minutes or data; that script and options exist is checked',
    'python train.py': 'hours',
    'python clean_checkpoint.py': 'hours before it',
}


def blocks(text):
    """Return (language, code) of every fenced block."""
    return re.findall(r'^```(bash|python)\n(.*?)^```', text, re.MULTILINE | re.DOTALL)


def commands(code):
    """Yield the words of every command, with the program's name in place of `python -m`."""
    for line in code.replace('\\\n', ' ').splitlines():
        line = line.replace('python -m pvt_timm ', 'pvt-timm ').replace('python -m weights_conversion ', 'pvt-convert ')
        if argv := [word for words in shlex.split(line, comments=True) for word in (glob.glob(words) or [words])]:
            yield argv


def script_of(argv):
    """Return the index of `train` or `run` in a command, None if the command runs no script."""
    return next((i for i in range(1, len(argv)) if argv[i] in ('train', 'run') and argv[i - 1] in (
        'pvt-timm', 'pvt_timm')), None)


def sections():
    for doc in DOCS:
        for body in re.split(r'^## ', TEXTS[doc], flags=re.MULTILINE):
            if blocks(body):
                trains = any(script_of(argv) for language, code in blocks(body) if language == 'bash'
                             for argv in commands(code))
                yield pytest.param(
                    doc, body, id=f'{doc}: {body.partition(chr(10))[0]}', marks=pytest.mark.slow if trains else ())


@pytest.fixture(scope='module')
def assets(tmp_path_factory):
    """Return a folder with the files that the READMEs name."""
    folder = tmp_path_factory.mktemp('assets')
    for name in PUBLISHED:
        state = timm.create_model(name).state_dict()
        torch.save(from_timm(state, 'original')[0], folder / f'{name}.pth')
        state = {k: v.contiguous() for k, v in from_timm(state, 'transformers')[0].items()}
        save_file(state, folder / f'{name}.safetensors', metadata={'format': 'pt'})
    mine = timm.create_model('pvt_small', num_classes=3).state_dict()
    torch.save(mine, folder / 'mine.pth')
    torch.save({'epoch': 1, 'arch': 'pvt_small', 'state_dict': mine, 'state_dict_ema': mine}, folder / 'checkpoint.pth')
    for name, state in (
            ('retinanet', detector_to_mmdet(pvt_retinanet('pvt_small'))),
            ('mask_rcnn', detector_to_mmdet(pvt_mask_rcnn('pvt_small'))),
            ('semantic_fpn', segmenter_to_mmseg(semantic_fpn('pvt_small')))):
        torch.save({'meta': {'config': SMALL_IMAGES}, 'state_dict': state}, folder / f'{name}.pth')
    Image.effect_noise((80, 64), 90).convert('RGB').save(folder / 'photo.jpg')
    for data, count in (('photos', 1), ('imagenet/train', 4), ('imagenet/validation', 4)):
        for name in ('cat', 'dog', 'owl'):
            (folder / data / name).mkdir(parents=True)
            for i in range(count):
                shutil.copy(folder / 'photo.jpg', folder / data / name / f'{i}.jpg')
    return folder


@pytest.fixture
def served(hub, assets, monkeypatch, body):
    """Let downloads return random weights: from the loopback hub, or from files of `assets` for other urls."""
    for name in PUBLISHED:
        if name not in body and name != DEFAULT_MODEL:
            continue  # hundreds of MB
        repo, _, commit = timm.get_pretrained_cfg(f'{name}.in1k').hf_hub_id.partition('@')
        labels = {i: f'class {i}' for i in range(1000)}
        config = json.dumps({'model_type': 'pvt', 'depths': VARIANTS[name]['depths'], 'id2label': labels})
        files = {'model.safetensors': assets / f'{name}.safetensors', 'config.json': config}
        hub.add_repo(repo, files, commit=commit or None)

    def download(url, dst, *args, **kwargs):
        name = url.rpartition('/')[2]
        shutil.copy(assets / ('retinanet.pth' if name.startswith('retinanet') else name), dst)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    monkeypatch.setattr(network, '_reach', lambda url: None)  # the hosts of urls are not there


def run(argv, request):
    if script_of(argv):
        run_training(argv, request.getfixturevalue('train_py').parent, request.getfixturevalue('client_env'))
    elif argv[0] == 'pvt-timm':
        assert pvt_timm_main(argv[1:]) == 0, argv
    elif argv[0] == 'pvt-convert':
        assert convert_main(argv[1:]) in (0, None), argv
    else:
        line = ' '.join(argv)
        assert any(line.startswith(start) for start in NOT_RUN), line
        for path in (arg for arg in argv if re.match('(benchmarks/(?!results)|tests/)', arg)):
            assert (ROOT / path.partition('::')[0]).exists(), line
        if argv[1:] and argv[1].startswith('benchmarks/'):
            source = ''.join(file.read_text(encoding='utf-8') for file in (ROOT / argv[1]).parent.glob('*.py'))
            for option in (arg.partition('=')[0] for arg in argv if arg.startswith('--')):
                assert f"'{option}'" in source, line


def run_training(argv, scripts, env):
    """Run `pvt-timm train` or `run` with a script of timm and settings for a short run.

    With torchrun, two processes are started.
    """
    i = script_of(argv)
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2'] if argv[0] == 'torchrun' else []
    small = SMALL if argv[i] == 'train' else ['--batch-size', '4', '--workers', '0']
    done = subprocess.run(
        [sys.executable, *launcher, '-m', 'pvt_timm', argv[i], scripts / Path(argv[i + 1]).name, *argv[i + 2:], *small],
        env=dict(env, OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize('doc, body', sections())
def test_runs(doc, body, assets, served, request, tmp_path, monkeypatch):
    shutil.copytree(assets, tmp_path, dirs_exist_ok=True, copy_function=os.link)
    monkeypatch.chdir(tmp_path)
    names = dict(image=torch.rand(3, 96, 128), images=torch.rand(2, 3, 64, 96))
    left_out = set()
    for language, code in blocks(body):
        if language == 'bash':
            for argv in commands(code):
                run(argv, request)
            continue
        imports = re.findall(r'^(?:import|from) (\w+)', code, re.MULTILINE)
        missing = [name for name in imports if not importlib.util.find_spec(name)]
        if missing or '_base_' in code:
            left_out.update(missing or ['mmengine'])
            continue
        exec(compile(code, doc, 'exec'), names)
    if left_out:
        pytest.skip(f'all but the snippets that need {", ".join(sorted(left_out))}')


def test_table_holds_the_figures_of_list(cli):
    for row in cli('list').partition('\n\n')[0].splitlines()[1:]:
        name, params, _, gmacs, _, top1, _ = row.split(maxsplit=6)
        name, _, tag = name.partition('.')
        line = next(line for line in TEXTS['README.md'].splitlines() if line.startswith(f'| `{name}` |'))
        assert tag == 'retinanet_coco' or f'| {params} M | {gmacs} ' in line  # those of the classifier
        assert not tag or f'`{tag}`' in line
        assert top1 == '-' or top1 in line


@pytest.mark.parametrize('doc', LINKED)
def test_links_to_files_exist(doc):
    links = re.findall(r'\]\((?!https?:|#)([^)]+)\)', TEXTS[doc]) + re.findall(r'src="(?!https?:)([^"]+)"', TEXTS[doc])
    for link in links:
        assert (ROOT / doc).parent.joinpath(link.partition('#')[0]).exists(), link
