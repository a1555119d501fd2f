""" Training runs with timm's unmodified train.py: one and two processes, a killed worker, shards. """
import importlib
import json
from pathlib import Path

import pytest

from pvt_timm.digits import write_digits

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def scripts(train_py):
    """Return the scripts of benchmarks/training that these tests run."""
    pytest.importorskip('psutil')
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(Path(__file__).parents[2] / 'benchmarks' / 'training')
        yield {name: importlib.import_module(name) for name in ('training_runs', 'scale_out', 'make_shards')}


@pytest.fixture(scope='module')
def small(scripts, tmp_path_factory):
    """Return a data set with 16 training and 4 held-out images of every digit."""
    folder = tmp_path_factory.mktemp('small')
    return scripts['training_runs'].small_copy(write_digits(folder / 'all'), folder / 'data', 16, 4)


def test_two_processes_follow_one(scripts, small, tmp_path):
    """If every step takes all images, two processes have the losses and weights of one, up to rounding."""
    results = scripts['scale_out'].whole(small, tmp_path, epochs=8, images=160)
    one, two = results['processes1'], results['processes2']
    assert len(one) == len(two) == 8 and one[-1] < one[0] - 0.3
    assert results['largest_difference'] <= 1e-4
    assert results['largest_weight_difference'] <= 1e-3


def test_killed_worker_goes_on_from_the_last_epoch(scripts, small, tmp_path):
    """After a kill, training continues at the last epoch, and ends exactly as a run without a kill.

    This needs settings without randomness.
    """
    r = scripts['scale_out'].killed(small, tmp_path, epochs=4, kill_epoch=2, batch_size=4)
    assert r['epochs_trained'] == [4, 4]
    assert r['restarts'] >= 1 and r['resumed_after_epoch'] == 1
    assert r['before_kill']['epoch'] == r['after_restart']['epoch'] == 2
    assert r['before_kill']['step'] > 0 and r['after_restart']['step'] == 0
    assert r['after_restart'] == r['same_step_left_alone']
    assert r['learning_rate'] == r['learning_rate_left_alone']
    assert r['top1'] == r['top1_left_alone']
    assert set(r['largest_difference'].values()) == {0.}


def test_shards(scripts, small, tmp_path):
    """Training with two processes reads WebDataset shards through timm's reader."""
    pytest.importorskip('webdataset')
    info = scripts['make_shards'].write_shards(small, tmp_path / 'shards', images=20)
    assert info['splits']['train']['shard_lengths'] == [20] * 8 and len(info['splits']['validation']['filenames']) == 2
    assert json.loads((tmp_path / 'shards' / '_info.json').read_text()) == info
    runs = scripts['training_runs']
    runs.run(['--config', 'digits', '--dataset', 'wds/digits', '--data-dir', tmp_path / 'shards', '--train-split',
              'train', '--val-split', 'validation', '--output', tmp_path, '--experiment', 'wds', '--batch-size', '8',
              '--epochs', '10', '--warmup-epochs', '1', '--drop-path', '0', '--workers', '1'], processes=2)
    rows = list(runs.read_summary(tmp_path / 'wds').values())
    assert len(rows) == 10 and rows[-1]['train_loss'] < rows[0]['train_loss'] - 0.3
    assert rows[-1]['eval_top1'] >= 50
