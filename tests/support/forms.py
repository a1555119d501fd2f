""" What the tests of fused, compiled and exported forms have in common: models, inputs, comparing. """
import pytest
import timm
import torch

import pvt_timm  # noqa: F401  registers the models
from reference import images, randomize

TOLERANCE = 1e-4
# (batch, height, width). The last one is never used for compiling or exporting.
SIZES = ((1, 224, 224), (2, 256, 320), (3, 160, 288))
KINDS = [pytest.param({}, id='classification'), pytest.param(dict(features_only=True), id='features')]


def make_model(name='test_pvt', **kwargs):
    return randomize(timm.create_model(name, **kwargs)).eval()


def make_input(batch, height, width, in_chans=3, seed=1):
    return images(batch, in_chans, height, width, seed=seed, dtype=torch.float32)


def as_list(output):
    if isinstance(output, dict):
        return list(output.values())
    return list(output) if isinstance(output, (list, tuple)) else [output]


def assert_equal_outputs(actual, expected, tolerance=TOLERANCE):
    actual, expected = as_list(actual), as_list(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        a = torch.as_tensor(a)
        assert a.shape == e.shape
        assert e.abs().max() > 10 * tolerance  # an output of zeros would hide everything
        difference = (a - e).abs().max().item()
        assert difference <= tolerance, f'outputs differ by {difference:.2g}'


def assert_equal_at(form, model, sizes=SIZES, tolerance=TOLERANCE):
    """`form`, a function of an image batch, gives what `model` gives at all sizes."""
    for size in sizes:
        x = make_input(*size)
        with torch.no_grad():
            assert_equal_outputs(form(x), model(x), tolerance)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def loss_of(output):
    return sum(o.float().square().mean() for o in as_list(output))
