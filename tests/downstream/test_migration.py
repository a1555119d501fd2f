""" What replaces each way in which copies of the original `pvt.py` are used, with the same weights.

The other side is the original code where a checkout is given (PVT_CHECKOUT), and the plain reference otherwise.
"""
import os

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import set_fused_attn, use_fused_attn
from timm.utils import AttentionExtract
from torchvision.models._utils import IntermediateLayerGetter

import pvt_timm
import reference
from pvt_timm.checkpoints import from_timm
from pvt_timm.pvt import Block
from reference import images, max_diff, randomize


@pytest.fixture(scope='module')
def weights():
    """Under the original's names, as the files that people hold have them."""
    return from_timm(randomize(timm.create_model('pvt_tiny', num_classes=10)).state_dict(), 'original')[0]


@pytest.fixture(scope='module')
def ours(weights, tmp_path_factory):
    """A model with these weights, which stand in the file of a whole other model."""
    path = tmp_path_factory.mktemp('files') / 'model.safetensors'
    state_dict = {f'model_uav.transformer.{k}': v.contiguous() for k, v in weights.items()}
    save_file({**state_dict, 'decoder.conv.weight': torch.ones(3)}, path)

    def ours(**kwargs):
        overlay = dict(file=str(path), num_classes=10)
        return timm.create_model('pvt_tiny', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).double().eval()
    return ours


def original(weights, x, dense):
    """Four maps of the dense code, or all tokens of the classifier after its norm."""
    weights = {k: v.double() for k, v in weights.items()}
    if not os.environ.get('PVT_CHECKOUT'):
        return reference.features(weights, x) if dense else reference.tokens(weights, x)
    model = reference.load_original('detection' if dense else 'classification').pvt_tiny(num_classes=10).double().eval()
    model.load_state_dict({k: weights[k] for k in model.state_dict()})
    seen = []
    if not dense:
        model.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        maps = model(x)
    return maps if dense else seen[0]


@pytest.fixture(scope='module')
def x():
    return images(2, 3, 224, 224)


@pytest.fixture(scope='module')
def maps(weights, x):
    return original(weights, x, dense=True)


@pytest.fixture(scope='module')
def tokens(weights, x):
    return original(weights, x, dense=False)


def as_torchvision_wants(model, x):
    named = IntermediateLayerGetter(model, {f'stages_{i}': str(i) for i in range(4)})(x)
    assert list(named) == ['0', '1', '2', '3']
    return list(named.values())


DENSE = dict(class_token=False, num_classes=0)


@torch.no_grad()
@pytest.mark.parametrize('kwargs, call, indices', [
    pytest.param(dict(features_only=True), lambda m, x: m(x), [0, 1, 2, 3], id='list of 4 maps'),  # Trans4Trans
    pytest.param(dict(features_only=True, out_indices=[3]), lambda m, x: m(x), [3], id='last map'),  # its F4=True
    pytest.param(
        DENSE, lambda m, x: m.forward_intermediates(x, indices=[-1], intermediates_only=True), [3],
        id='last map of a model'),
    pytest.param(dict(features_only=True), as_torchvision_wants, [0, 1, 2, 3], id='OrderedDict'),  # D-faster-R-CNN
])
def test_maps(ours, maps, x, kwargs, call, indices):
    for found, i in zip(call(ours(**kwargs), x), indices, strict=True):
        assert max_diff(found, maps[i]) <= 1e-10


@torch.no_grad()
def test_class_token_as_embedding(ours, tokens, x):
    """TextReID: `x[:, 0]` after the norm."""
    model = ours(num_classes=0)
    assert model.num_features == 512
    assert max_diff(model(x), tokens[:, 0]) <= 1e-10


@torch.no_grad()
def test_pooled_vector_and_maps(ours, maps, tokens, x):
    """ED2IF2-Net: the mean of the normed last map beside all four, of which the last is normed."""
    model = ours(num_classes=0, global_pool='avg')
    final, features = model.forward_intermediates(x, norm=True)
    for found, expected in zip(features[:3], maps):
        assert max_diff(found, expected) <= 1e-10
    assert max_diff(features[3], tokens[:, 1:].transpose(1, 2).reshape(2, 512, 7, 7)) <= 1e-10
    assert max_diff(model.forward_head(final), tokens[:, 1:].mean(dim=1)) <= 1e-10


@torch.no_grad()
def test_logits_and_last_attention(ours, weights, tokens, x):
    """SMMix: the attention of the last block, here recomputed by hand from what goes into it."""
    fused = use_fused_attn()
    set_fused_attn(False)
    try:
        model = ours(num_classes=10)
    finally:
        set_fused_attn(fused)
    into = []
    model.stages[-1].blocks[-1].attn.register_forward_pre_hook(lambda module, args: into.append(args[0]))
    (last,) = AttentionExtract(model, names=['stages.3.blocks.1.attn.attn_drop'], method='hook')(x).values()
    q, k = (
        (into[0] @ weights[f'block4.1.attn.{name}.weight'][:512].double().T
         + weights[f'block4.1.attn.{name}.bias'][:512]).reshape(2, 50, 8, 64).transpose(1, 2) for name in ('q', 'kv'))
    assert max_diff(last, (q @ k.transpose(2, 3) / 8).softmax(dim=-1)) <= 1e-10
    logits = tokens[:, 0] @ weights['head.weight'].double().T + weights['head.bias']
    assert max_diff(model(x), logits) <= 1e-10


class ScaledBlock(Block):
    """A block of one's own, as SSDepth or CompletionFormer have them."""

    def __init__(self, dim, **kwargs):
        super().__init__(dim, **kwargs)
        self.gamma = torch.nn.Parameter(torch.zeros(dim))

    def forward(self, x, size):
        return super().forward(x, size) + self.gamma * x


@torch.no_grad()
def test_own_block(weights, maps, x):
    """Published weights load around its new parameters, which are named."""
    model = timm.create_model('pvt_tiny', block_fn=ScaledBlock, **DENSE).double().eval()
    state_dict = pvt_timm.checkpoint_filter_fn(weights, timm.create_model('pvt_tiny', **DENSE))
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    assert unexpected == [] and len(missing) == 8 and all(k.endswith('.gamma') for k in missing)
    assert max_diff(model.forward_intermediates(x, intermediates_only=True)[3], maps[3]) <= 1e-10
    model.stages[0].blocks[0].gamma.fill_(0.5)
    assert max_diff(model.forward_intermediates(x, intermediates_only=True)[0], maps[0]) > 0.1
