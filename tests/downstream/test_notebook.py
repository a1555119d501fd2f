"""The notebook of benchmarks/demos runs without a network, and a script draws the README's picture."""
import base64
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.support.scripts import BENCHMARKS, import_script

pytest.importorskip('matplotlib')

DEMOS = BENCHMARKS / 'demos'
photo_pyramid = import_script('demos', 'photo_pyramid')
run_notebook = import_script('demos', 'run_notebook')
NOTEBOOK, code_cells = run_notebook.NOTEBOOK, run_notebook.code_cells


@pytest.fixture
def notebook():
    return json.loads(NOTEBOOK.read_text(encoding='utf-8'))


def pictures_of(notebook):
    """Return the pictures of every code cell that has pictures."""
    found = [[output['data']['image/png'] for output in cell['outputs']] for cell in code_cells(notebook)]
    return [pictures for pictures in found if pictures]


def test_notebook_holds_code_and_pictures_alone(notebook):
    """The notebook has no printed text, counts or paths, which would differ on each machine."""
    assert notebook['nbformat'] == 4
    assert len({cell['id'] for cell in notebook['cells']}) == len(notebook['cells'])
    for cell in code_cells(notebook):
        compile(''.join(cell['source']), cell['id'], 'exec')
        assert cell['execution_count'] is None
        for output in cell['outputs']:
            assert output['output_type'] == 'display_data' and list(output['data']) == ['image/png']
    pictures = [picture for pictures in pictures_of(notebook) for picture in pictures]
    assert len(pictures) == 4
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert image.width > 800 and len(image.convert('RGB').getcolors(1 << 24)) > 50  # not blank
    assert NOTEBOOK.stat().st_size < 700_000


@pytest.mark.slow
def test_notebook_runs(notebook, tmp_path, monkeypatch):
    """The notebook runs without downloads: the folder has only the photograph, and the served hub is empty."""
    shutil.copy(DEMOS / 'photo.jpg', tmp_path)
    monkeypatch.chdir(tmp_path)
    kept = pictures_of(notebook)
    names = run_notebook.run_cells(notebook)

    assert [len(pictures) for pictures in pictures_of(notebook)] == [len(pictures) for pictures in kept]
    assert tuple(names['embedding'].shape) == (1, 64)
    assert [tuple(feature.shape) for feature in names['features']] == [
        (1, 16, 208, 312), (1, 32, 104, 156), (1, 40, 52, 78), (1, 64, 26, 39)]
    assert len(names['maps']) == 6  # a map for each block
    assert names['from_class_token'].numel() == 8 * 12  # positions of stage 4
    assert names['from_rim'].numel() == 16 * 24  # positions of stage 3
    assert names['accuracies'][0] < 0.5 < 0.8 < names['accuracies'][-1]  # a new head knows nothing at first
    assert names['found_boxes'] >= 0.8 * names['all_boxes'] > 0


def test_picture_of_the_photograph(tmp_path):
    """The script draws the README's picture again. Fonts and rounding may differ between machines."""
    output = tmp_path / 'pyramid_photo.png'
    photo_pyramid.draw(output)
    with Image.open(output) as drawn, Image.open(DEMOS.parents[1] / '.github' / 'pyramid_photo.png') as kept:
        assert drawn.width == kept.width == photo_pyramid.WIDTH
        assert abs(drawn.height - kept.height) < 20
        ours, theirs = (np.array(picture.convert('RGB').resize((64, 32)), dtype=float) for picture in (drawn, kept))
    assert abs(ours - theirs).mean() < 8  # of 255
