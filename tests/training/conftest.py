""" Fixtures: small data sets of generated shapes, and functions that run the commands on them. """
import json

import numpy as np
import pytest
from PIL import Image

from pvt_timm.cli.main import main
from tests.support.scripts import import_script

shapes = import_script('demos', 'shapes')

# The category ids of the shapes: not from 1, with gaps, not in the order of the classes
CATEGORY_IDS = {1: 30, 2: 7, 3: 18}


def make_folder(root, train, val):
    """Write images for training and evaluation, with annotations in COCO's format and label maps."""
    for split, count, seed in (('train', train, 1), ('val', val, 2)):
        samples = shapes.make_samples(count, seed, low=60, high=80)
        content = shapes.coco_annotations(samples)
        for folder in (split, f'{split}_labels'):
            (root / folder).mkdir(parents=True)
        for entry, sample in zip(content['images'], samples):
            Image.fromarray(sample.image).save(root / split / entry['file_name'])
            Image.fromarray(sample.semantic.astype(np.uint8)).save(root / f'{split}_labels' / entry['file_name'])
        for category in content['categories']:
            category['id'] = CATEGORY_IDS[category['id']]
        for annotation in content['annotations']:
            annotation['category_id'] = CATEGORY_IDS[annotation['category_id']]
        (root / f'{split}.json').write_text(json.dumps(content))
    return root


@pytest.fixture(scope='session')
def write_shapes():
    """Return `make_folder`. Without pycocotools, skip the test."""
    pytest.importorskip('pycocotools')
    return make_folder


@pytest.fixture(scope='session')
def shapes_folder(write_shapes, tmp_path_factory):
    """Return a folder with 12 images to train on and 5 images to evaluate on."""
    return write_shapes(tmp_path_factory.mktemp('shapes'), train=12, val=5)


@pytest.fixture
def cli(capsys):
    """Return a function that runs a command in this process and returns its stdout.

    With `code=2` the command has to fail, and the function returns the one line on stderr.
    """
    def run(*argv, code=0):
        capsys.readouterr()
        try:
            got = main([str(arg) for arg in argv])
        except SystemExit as e:
            got = e.code
        out, err = capsys.readouterr()
        assert got == code, err
        if code != 2:
            return out
        assert err.count('\n') == 1 and err.startswith('pvt-timm'), err
        return err
    return run
