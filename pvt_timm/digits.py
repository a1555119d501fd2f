""" `test_pvt`, a PVT of 0.15 M parameters whose weights are in the package, and the data that it was trained on.

The data are scikit-learn's handwritten digits as an image folder, which `pvt-timm digits FOLDER` writes.
"""
import errno
import os
import tempfile
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
import torch.nn.functional as F

from timm.models import generate_default_cfgs, register_model

from . import pvt
from .variants import VARIANTS

SEED = 0
HELD_OUT_PER_LABEL = 36  # a fifth of the images of a label, which has 174 to 183

default_cfgs = generate_default_cfgs({
    'test_pvt.digits': pvt._cfg(
        file=str(Path(__file__).parent / 'weights' / 'test_pvt_digits.safetensors'),
        num_classes=10, input_size=(3, 32, 32), crop_pct=1.0,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        label_names=tuple(str(i) for i in range(10)),
        origin_url='https://archive.ics.uci.edu/dataset/80', paper_ids=None, paper_name=None,
    ),
})


@register_model
def test_pvt(pretrained: bool = False, **kwargs: Any) -> pvt.PyramidVisionTransformer:
    return pvt._create_pvt('test_pvt', pretrained=pretrained, **dict(VARIANTS['test_pvt'], **kwargs))


test_pvt.__test__ = False  # type: ignore[attr-defined]  # otherwise pytest takes it for a test, because of its name


def write_digits(output: Union[str, Path]) -> Path:
    """Write the image folder `output` and return it. Needs scikit-learn and Pillow.

    `output/train/<label>/*.png` are 1437 images, `output/validation/<label>/*.png` the 360 held-out ones, 36 of every
    label. They have 32x32 grey levels. Every call writes the same images.

    Raises:
        FileExistsError: The folder already holds one of the splits. Nothing in it is changed.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    output, splits = Path(output), ('train', 'validation')
    there = [str(output / split) for split in splits if (output / split).exists()]
    if there:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), there[0])
    digits = load_digits()
    # from 8x8 grey levels 0 to 16, bilinear in float64, so that all versions of the libraries write the same
    large = F.interpolate(torch.from_numpy(digits.images)[:, None].double(), scale_factor=4, mode='bilinear')[:, 0]
    images = (large * 255 / 16 + 0.5).byte().numpy()
    rng = np.random.RandomState(SEED)  # its stream never changes between numpy versions
    output.mkdir(parents=True, exist_ok=True)
    # written to a temporary folder first, so that a split appears completely or not at all
    with tempfile.TemporaryDirectory(prefix='.digits-', dir=output) as aside:
        for label in range(10):
            for split in splits:
                Path(aside, split, str(label)).mkdir(parents=True)
            for n, i in enumerate(rng.permutation(np.flatnonzero(digits.target == label))):
                split = splits[n < HELD_OUT_PER_LABEL]
                Image.fromarray(images[i]).save(Path(aside, split, str(label), f'{i:04d}.png'))
        for split in splits:
            os.replace(Path(aside, split), output / split)
    return output
