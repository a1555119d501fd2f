""" For each way in which copies of the original `pvt.py` are used: what replaces it, with the same outputs.

The outputs are compared with the plain reference, which `tests/model/test_equivalence.py` compares with the original.
"""
import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.models._utils import IntermediateLayerGetter

import pvt_timm
from pvt_timm.formats.mapping import from_timm
from pvt_timm.pvt import Block
from tests.support import reference
from tests.support.reference import images, max_diff, randomize

X = images(2, 3, 224, 224)


@pytest.fixture(scope='module')
def weights():
    """Return weights with the names of the original code, as users have them in their files."""
    return from_timm(randomize(timm.create_model('pvt_tiny', num_classes=10)).state_dict(), 'original')[0]


@pytest.fixture(scope='module')
def ours(weights, tmp_path_factory):
    """Return a function that creates a model with these weights. The file holds a larger model with them inside."""
    path = tmp_path_factory.mktemp('files') / 'model.safetensors'
    state_dict = {f'model_uav.transformer.{k}': v.contiguous() for k, v in weights.items()}
    save_file({**state_dict, 'decoder.conv.weight': torch.ones(3)}, path)

    def ours(**kwargs):
        overlay = dict(file=str(path), num_classes=10)
        return timm.create_model('pvt_tiny', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).double().eval()
    return ours


@pytest.fixture(scope='module')
def maps(weights):
    return reference.features({k: v.double() for k, v in weights.items()}, X)


@pytest.fixture(scope='module')
def tokens(weights):
    return reference.tokens({k: v.double() for k, v in weights.items()}, X)


def ordered_dict(model, x):
    named = IntermediateLayerGetter(model, {f'stages_{i}': str(i) for i in range(4)})(x)
    assert list(named) == ['0', '1', '2', '3']
    return named.values()


def pooled_and_maps(model, x):
    final, maps = model.forward_intermediates(x, norm=True)
    return [model.forward_head(final), *maps]


DENSE = dict(class_token=False, num_classes=0)
FEATURES = dict(features_only=True)
WAYS = {
    'list of 4 maps, as in Trans4Trans': (FEATURES, lambda model, x: model(x), lambda maps, tokens: maps),
    'last map by forward_intermediates': (
        DENSE, lambda model, x: model.forward_intermediates(x, indices=[-1], intermediates_only=True),
        lambda maps, tokens: maps[3:]),
    'OrderedDict, as in D-faster-R-CNN': (FEATURES, ordered_dict, lambda maps, tokens: maps),
    'class token, as in TextReID': (
        dict(num_classes=0), lambda model, x: [model(x)], lambda maps, tokens: [tokens[:, 0]]),
    'pooled vector and maps, the last one normed, as in ED2IF2-Net': (
        dict(num_classes=0, global_pool='avg'), pooled_and_maps,
        lambda maps, tokens: [
            tokens[:, 1:].mean(dim=1), *maps[:3], tokens[:, 1:].transpose(1, 2).unflatten(2, (7, 7))]),
}


@torch.no_grad()
@pytest.mark.parametrize('kwargs, call, expected', WAYS.values(), ids=list(WAYS))
def test_outputs(ours, maps, tokens, kwargs, call, expected):
    for found, e in zip(call(ours(**kwargs), X), expected(maps, tokens), strict=True):
        assert max_diff(found, e) <= 1e-10


class ScaledBlock(Block):
    """A block with a parameter of its own, as in SSDepth and CompletionFormer."""

    def __init__(self, dim, **kwargs):
        super().__init__(dim, **kwargs)
        self.gamma = torch.nn.Parameter(torch.zeros(dim))

    def forward(self, x, size):
        return super().forward(x, size) + self.gamma * x


@torch.no_grad()
def test_own_block(weights, maps):
    """Published weights load into a model with changed blocks. Only the new parameters are missing."""
    model = timm.create_model('pvt_tiny', block_fn=ScaledBlock, **DENSE).double().eval()
    state_dict = pvt_timm.checkpoint_filter_fn(weights, timm.create_model('pvt_tiny', **DENSE))
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    assert unexpected == [] and len(missing) == 8 and all(k.endswith('.gamma') for k in missing)
    assert max_diff(model.forward_intermediates(X, intermediates_only=True)[3], maps[3]) <= 1e-10
    model.stages[0].blocks[0].gamma.fill_(0.5)
    assert max_diff(model.forward_intermediates(X, intermediates_only=True)[0], maps[0]) > 0.1
