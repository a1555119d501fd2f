"""False colours: they do not depend on arbitrary signs, and are right for levels that are very small or constant."""
import html
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from pvt_timm.cli.overlays import draw_detections, draw_segments
from pvt_timm.cli.errors import clean
from pvt_timm.cli.pictures import draw_pyramid, false_colour, pca, with_gaps


def test_pca_is_that_of_the_covariance():
    torch.manual_seed(0)
    features = torch.randn(6, 9, 11) * torch.tensor([5, 3, 2, .5, .1, .1])[:, None, None]
    variances = torch.linalg.eigvalsh(torch.cov(features.flatten(1).double())).flip(0)[:3]
    torch.testing.assert_close(torch.cov(pca(features).flatten(1)), variances.diag(), rtol=1e-9, atol=1e-9)


def test_colours_do_not_depend_on_signs():
    torch.manual_seed(0)
    image = torch.rand(3, 64, 96)
    levels = [torch.randn(8, 16, 24), torch.randn(16, 8, 12), torch.randn(16, 4, 6), torch.randn(16, 2, 3)]
    turned = [-level for level in levels]
    turned[1] = torch.einsum('cd,dhw->chw', torch.linalg.qr(torch.randn(16, 16))[0], levels[1])
    for one, other in zip(false_colour(levels, image), false_colour(turned, image)):
        assert one.min() == 0 and one.max() == 1
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize('shape', [(8, 1, 1), (8, 1, 2), (8, 2, 2), (8, 1, 30)])
@pytest.mark.parametrize('flat', [False, True])
def test_levels_without_colours(shape, flat):
    torch.manual_seed(0)
    colours, = false_colour([torch.full(shape, .1) if flat else torch.randn(shape)], torch.rand(3, 32, 32))
    assert colours.shape == (*shape[1:], 3) and 0 <= colours.min() <= colours.max() <= 1
    assert (colours == .5).all() == (flat or shape[1:] == (1, 1))
    assert shape[1:] != (1, 2) or (colours[..., 1:] == .5).all()  # two positions have one component


def test_outlier_leaves_the_rest_its_colours():
    torch.manual_seed(0)
    features = torch.randn(4, 40, 40)
    features[:, 7, 7] = 1e4
    colours, = false_colour([features], torch.rand(3, 160, 160))
    assert colours.std((0, 1)).min() > .2


@pytest.mark.parametrize('size', [(32, 32), (64, 256), (320, 32), (32, 640)])
def test_picture_fits_a_slide(tmp_path, size):
    torch.manual_seed(0)
    levels = [torch.randn(8, math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in (4, 8, 16, 32)]
    draw_pyramid(Image.new('RGB', size[::-1], 'red'), levels, size, tmp_path / 'a.png', 'a title')
    with Image.open(tmp_path / 'a.png') as drawn:
        assert 900 < drawn.width < 2500 and 500 < drawn.height < 2500
        colours = drawn.convert('RGB').getcolors(1 << 24)
        assert any(colour == (255, 0, 0) and count > 1e4 for count, colour in colours)  # the image is in it


def test_sizes_are_height_by_width(tmp_path):
    """Captions give height by width, as the command line does."""
    levels = [torch.randn(8, 96 // s, 160 // s) for s in (4, 8, 16, 32)]
    draw_pyramid(Image.new('RGB', (80, 48)), levels, (96, 160), tmp_path / 'a.svg', 'a title')
    text = (tmp_path / 'a.svg').read_text(encoding='utf-8')
    for caption in ('96 × 160 pixels', '8 channels, 24 × 40', 'height × width'):
        assert caption in text, caption


def test_the_image_has_its_name_and_the_title_says_features(tmp_path, cli):
    """The title names the features and the model. The caption of the image is its file name."""
    Image.new('RGB', (64, 64), 'red').save(tmp_path / 'red.png')
    cli('features', tmp_path / 'red.png', '--model', 'test_pvt', '--output', tmp_path / 'a.svg')
    assert 'Features of test_pvt.digits' in text_of(tmp_path / 'a.svg')
    assert 'red.png' in text_of(tmp_path / 'a.svg')


@pytest.mark.parametrize('stride', [1, 4, 16, 32])
def test_gaps_between_the_images_of_a_sheet(stride):
    """The gaps are at the same places in the image and in each level, and cover no pixels."""
    sheet = np.random.default_rng(0).random((64 // stride, 96 // stride, 3))
    apart = with_gaps(sheet, (2, 3), (32, 32))
    assert apart.shape == (64 + 4, 96 + 2 * 4, 3)
    assert (apart[32:36] == 1).all() and (apart[:, 32:36] == 1).all() and (apart[:, 68:72] == 1).all()
    large = sheet.repeat(stride, 0).repeat(stride, 1)
    for row in range(2):
        for column in range(3):
            cell = apart[36 * row:36 * row + 32, 36 * column:36 * column + 32]
            assert (cell == large[32 * row:32 * row + 32, 32 * column:32 * column + 32]).all()


ODD_TEXT = ['a $ b', '$x^{', '$\\frac$ and $y$', '_underlined', 'a\nb\x1b[2J', '\\$5', 'x' * 100_000]


def text_of(svg):
    """Return the texts in an SVG picture."""
    return ' '.join(html.unescape(t) for t in re.findall('<!-- (.*?) -->', svg.read_text(encoding='utf-8')))


@pytest.mark.parametrize('text', ODD_TEXT)
def test_text_from_elsewhere(text, tmp_path):
    """Text from a file is drawn as one line, not as a formula, and does not make the picture very wide."""
    levels = [torch.randn(8, 16 // s, 16 // s) for s in (1, 2, 4, 8)]
    draw_pyramid(Image.new('RGB', (64, 64)), levels, (64, 64), tmp_path / 'a.svg', text, text, text)
    draw_pyramid(Image.new('RGB', (64, 64)), levels, (64, 64), tmp_path / 'a.png', text, text, text)
    found = text_of(tmp_path / 'a.svg')
    assert (text if text.isprintable() and len(text) < 60 else clean(text)[:60]) in found
    boxes = [dict(name=text, score=0.9, box=[10, 10, 50, 50])]
    classes = [dict(label=0, name=text, share=1)]
    draw_detections(Image.new('RGB', (64, 64)), boxes, [], tmp_path / 'b.png')
    draw_segments(Image.new('RGB', (64, 64)), torch.zeros(64, 64, dtype=torch.int), classes, [(255, 0, 0)],
                  tmp_path / 'c.png')
    for name in 'abc':
        with Image.open(tmp_path / f'{name}.png') as image:
            assert image.width < 4000 and image.height < 4000
    with Image.open(tmp_path / 'c.png') as image:
        assert image.width > image.height + 50  # the legend has the name
