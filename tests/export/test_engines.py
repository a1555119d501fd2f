""" The commands and snippets of recipes/EXPORT.md are run, section by section, on test_pvt and small images. """
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import pvt_timm
from pvt_timm.cli.main import main
from pvt_timm.detection import detector_to_mmdet, pvt_retinanet
from pvt_timm.export import TARGETS
from pvt_timm.segmentation import segmenter_to_mmseg, semantic_fpn

TEXT = (Path(pvt_timm.__file__).parent / 'recipes' / 'EXPORT.md').read_text(encoding='utf-8')
COMMAND = 'pvt-timm export '
# Sections without an extra package run with the default tests
QUICK = ('PyTorch on a CPU', 'ONNX', 'A GPU')


def sections():
    """Yield (title, code blocks) of every section that has code. A block is (language, text)."""
    for part in re.split(r'^###? ', TEXT, flags=re.MULTILINE)[1:]:
        title = part.partition('\n')[0]
        blocks = re.findall(r'^```(bash|python)\n(.*?)^```', part, re.MULTILINE | re.DOTALL)
        if blocks:
            yield pytest.param(title, blocks, id=title, marks=() if title in QUICK else pytest.mark.slow)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with the files that the sections name."""
    torch.manual_seed(0)
    for name in ('cat', 'dog'):
        (tmp_path / 'images' / 'validation' / name).mkdir(parents=True)
        for i in range(2):
            image = Image.effect_noise((64, 64), 90).convert('RGB')
            image.save(tmp_path / 'images' / 'validation' / name / f'{i}.png')
    small = dict(out_channels=16, model_args=dict(img_size=64))
    retinanet = pvt_retinanet('test_pvt', 80, **small)
    for module in retinanet.head.modules():  # scores that differ
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    segmenter = semantic_fpn('test_pvt', 5, channels=16, **small)
    torch.save({'meta': {}, 'state_dict': detector_to_mmdet(retinanet)}, tmp_path / 'retinanet.pth')
    torch.save({'meta': {}, 'state_dict': segmenter_to_mmseg(segmenter)}, tmp_path / 'semantic_fpn.pth')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def argv_of(line):
    """Return a command of the text, with test_pvt in place of pvt_small and with small images."""
    argv = shlex.split(line.removeprefix(COMMAND))
    if '--checkpoint' in argv and '--detector' in argv:
        return ['export', *argv]
    argv = ['test_pvt' if word == 'pvt_small' else word for word in argv]
    return ['export', *argv, '--img-size', '64']


@pytest.mark.parametrize('title, blocks', sections())
def test_runs(title, blocks, folder):
    for language, code in blocks:
        if language == 'python':
            for name in re.findall(r'^(?:import|from) (.+?)(?: import .*)?$', code, re.MULTILINE):
                for package in name.split(', '):
                    pytest.importorskip(package.partition('.')[0])
        for line in code.splitlines() if language == 'bash' else ():
            target = TARGETS[re.search(r'--to (\w+)', line)[1]]
            for package in (*target.packages, *(target.int8_packages if '--int8' in line else ())):
                pytest.importorskip(package.partition('.')[0])
        if "'cuda'" in code and not torch.cuda.is_available():
            pytest.skip('needs a GPU')
    names = dict(image=torch.rand(3, 96, 128), images=torch.randn(2, 3, 64, 64))
    for language, code in blocks:
        if language == 'bash':
            for line in code.splitlines():
                assert line.startswith(COMMAND) and main(argv_of(line)) == 0, line
            continue
        exec(compile(code.replace("'pvt_small'", "'test_pvt'"), 'EXPORT.md', 'exec'), names)
    if 'logits' in names:
        assert tuple(names['logits'].shape) == (len(names['images']) if title != 'ExecuTorch' else 1, 10)
    else:
        assert names['boxes'].shape[1] == 4 and names['classes'].shape == (2, 64, 64)


def test_table_of_targets():
    """The table has a row for each target that agrees with the code."""
    table = TEXT.partition('## What each target can')[2]
    head = [cell.strip() for cell in re.search(r'^\| `--to` .*$', table, re.MULTILINE)[0].split('|')[1:-1]]
    assert head == ['`--to`', 'file', 'batch and size of images', 'detectors', 'segmenters', '`--half`', '`--int8`']
    for target, kind in TARGETS.items():
        row = [cell.strip() for cell in re.search(rf'^\| `{target}` .*$', table, re.MULTILINE)[0].split('|')[1:-1]]
        assert row[1].startswith(kind.suffix)
        assert row[2].startswith(f'any, from {kind.smallest}' if kind.dynamic else 'one image')
        assert ((row[3] == 'yes'), (row[4] == 'yes')) == (kind.detectors, kind.segmenters)
        assert (row[6] != 'no') == (kind.quantize is not None)


def test_each_engine_of_the_choice_has_a_section():
    choice = TEXT.partition('## Which engine')[2].partition('###')[0]
    links = re.findall(r'\]\(#([^)]+)\)', choice)
    titles = [title.values[0] for title in sections()]
    anchors = [re.sub(r'[^a-z0-9 -]', '', title.lower()).replace(' ', '-') for title in titles]
    assert len(links) == 7 and set(links) <= set(anchors)
    for blocks in (title.values[1] for title in sections() if title.values[0] in QUICK):
        for language, code in blocks:
            statements = [line for line in code.splitlines() if line and not line.startswith(('import', 'from'))]
            assert language == 'bash' or len(statements) <= 3, code
