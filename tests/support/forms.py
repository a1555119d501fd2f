""" Models, inputs and comparisons for the tests of fused, compiled and exported forms. """
import pytest
import timm
import torch
from torch.utils._pytree import tree_leaves

import pvt_timm  # noqa: F401  registers the models
from tests.support.reference import images, randomize

# (batch, height, width). The last one is never used for compiling or exporting.
SIZES = ((1, 224, 224), (2, 256, 320), (3, 160, 288))
KINDS = [pytest.param({}, id='classification'), pytest.param(dict(features_only=True), id='features')]
FEATURES_SLOW = [KINDS[0], pytest.param(dict(features_only=True), id='features', marks=pytest.mark.slow)]


def make_model(name='test_pvt', **kwargs):
    return randomize(timm.create_model(name, **kwargs)).eval()


def make_input(batch, height, width, in_chans=3, seed=1):
    return images(batch, in_chans, height, width, seed=seed, dtype=torch.float32)


def assert_equal_outputs(actual, expected, tolerance=1e-4):
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert e.abs().max() > 10 * tolerance  # an output of zeros would hide everything
        torch.testing.assert_close(torch.as_tensor(a), e, rtol=0, atol=tolerance)


def assert_equal_at(form, model, sizes=SIZES):
    """Check that `form`, a function of an image batch, gives the outputs of `model` at all sizes."""
    for size in sizes:
        x = make_input(*size)
        with torch.no_grad():
            assert_equal_outputs(form(x), model(x))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def loss_of(output):
    return sum(o.float().square().mean() for o in tree_leaves(output))
