""" The commands of a user from their own annotations to a file for OpenMMLab, with a training that is killed. """
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip('pytorch_lightning')
pytest.importorskip('pycocotools')

from pvt_timm.detection import detector_from_mmdet  # noqa: E402
from pvt_timm.segmentation import semantic_fpn_from_mmseg  # noqa: E402
from tests.support.systems import needs_kill  # noqa: E402
from tests.support.training_options import DETECTOR, MASKS, SEGMENTER  # noqa: E402

NAMES = {30: 'disc', 7: 'box', 18: 'triangle'}  # category ids with gaps


@pytest.fixture
def typed(client_env, tmp_path):
    """Return a function that starts a command in a separate session, in a folder of its own."""
    folder = tmp_path / 'here'
    folder.mkdir()

    def start(program, *argv):
        return subprocess.Popen(
            [sys.executable, '-m', program, *map(str, argv)], cwd=folder, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            env={**client_env, 'OMP_NUM_THREADS': '1'})
    start.folder = folder
    return start


def finish(process):
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return out, err


def kill_after_a_checkpoint(process, folder):
    """Kill a process with SIGKILL after its first checkpoint."""
    deadline = time.time() + 300
    while not (folder / 'last.ckpt').exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@needs_kill
@pytest.mark.slow
@pytest.mark.parametrize('kind', ['retinanet', 'mask_rcnn', 'semantic_fpn'])
def test_from_annotations_to_a_file_for_openmmlab(typed, write_shapes, kind):
    folder = typed.folder
    write_shapes(folder / 'data', train=24, val=8)
    task, use = ('segmenter', 'segment') if kind == 'semantic_fpn' else ('detector', 'detect')
    options = SEGMENTER if task == 'segmenter' else DETECTOR
    more = MASKS if kind == 'mask_rcnn' else ()
    fit = (task, 'fit', *options, '--data', 'data', '--output', 'mine', '--images-per-step', '8', '--epochs', '12',
           *more)
    kill_after_a_checkpoint(typed('pvt_timm', *fit), folder / 'mine')
    left = torch.load(folder / 'mine' / 'last.ckpt', weights_only=True)['epoch'] + 1
    assert left < 12
    _, err = finish(typed('pvt_timm', *fit))
    assert f'going on after epoch {left} of 12' in err
    history = json.loads((folder / 'mine' / 'history.json').read_text())
    assert len(history['losses']) == 36  # as without an interruption
    assert sum(history['losses'][-9:]) < sum(history['losses'][:9])

    out, _ = finish(typed('pvt_timm', task, 'validate', '--weights', 'mine/last.ckpt', '--json'))
    last = torch.load(folder / 'mine' / 'last.ckpt', weights_only=True)['pvt_timm']
    assert json.loads(out)['figures'] == last['figures']

    image = sorted((folder / 'data' / 'val').iterdir())[0].relative_to(folder)
    threshold = () if task == 'segmenter' else ('--threshold', '0.02')
    out, _ = finish(typed('pvt_timm', use, image, '--checkpoint', 'mine/best.ckpt', '--json', '--output', 'found',
                          *threshold))
    found = json.loads(out)['images'][0]
    names = {row['name'] for row in found.get('objects', found.get('classes'))}
    expected = ['background', 'disc', 'box', 'triangle'] if task == 'segmenter' else [NAMES[i] for i in sorted(NAMES)]
    assert names and names <= set(expected) and last['categories'] == expected
    assert [p.suffix for p in (folder / 'found').iterdir()] == ['.png']

    finish(typed('weights_conversion', 'mine/best.ckpt', '--to', 'mmdet', '--whole', '--output', 'mm'))
    load = semantic_fpn_from_mmseg if task == 'segmenter' else detector_from_mmdet
    ours, theirs = load(folder / 'mine' / 'best.ckpt'), load(folder / 'mm' / f'test_pvt_{kind}.pth')
    one, other = ours.state_dict(), theirs.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert theirs.categories == ours.categories == expected
    sizes, again = (getattr(model, 'transform', model) for model in (ours, theirs))
    assert (sizes.min_size, sizes.max_size) == (again.min_size, again.max_size)
    assert sorted(p.name for p in folder.iterdir()) == ['data', 'found', 'mine', 'mm']
