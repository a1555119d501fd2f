"""What replaces each way in which copies of the original `pvt.py` are used, with the same weights in the same function.

The other side is the original code where a checkout is given (PVT_CHECKOUT), and the plain reference otherwise.
"""
import os

import pytest
import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn
from timm.utils import AttentionExtract

import pvt_timm
from pvt_timm.checkpoints import from_timm
from pvt_timm.pvt import Block
import reference
from reference import images, max_diff, randomize


@pytest.fixture(scope='module')
def classifier():
    return randomize(timm.create_model('pvt_tiny', num_classes=10)).double().eval()


@pytest.fixture(scope='module')
def weights(classifier):
    """Under the original's names, as the files that people hold have them."""
    return from_timm(classifier.state_dict(), 'original')[0]


@pytest.fixture(scope='module')
def backbone(weights):
    model = timm.create_model('pvt_tiny', features_only=True).double().eval()
    return load(model, weights)


def load(model, weights, prefix=''):
    """As `timm.create_model(..., checkpoint_path=...)` does, from a dict."""
    target = model if isinstance(model, pvt_timm.PyramidVisionTransformer) else None
    if target is None:  # features_only: through a plain model without what it does not have
        plain = timm.create_model('pvt_tiny', class_token=False, num_classes=0).double()
        state_dict = pvt_timm.checkpoint_filter_fn(weights, plain)
        model.load_state_dict(from_timm({k: v for k, v in state_dict.items() if not k.startswith('norm.')},
                                        'timm_features')[0], strict=True)
        return model
    model.load_state_dict(pvt_timm.checkpoint_filter_fn(weights, model), strict=True)
    return model


def original(weights, x, dense):
    """Four maps of the dense code, or all tokens of the classifier after its norm."""
    if not os.environ.get('PVT_CHECKOUT'):
        return reference.features(weights, x) if dense else reference.tokens(weights, x)
    if dense:
        model = reference.load_original('detection').pvt_tiny(pretrained=None)
        model.load_state_dict({k: v for k, v in weights.items() if k.split('.')[0] in model.state_dict() or
                               k in model.state_dict()}, strict=True)
        return model.double().eval()(x)
    model = reference.load_original('classification').pvt_tiny(num_classes=10)
    model.load_state_dict(weights, strict=True)
    model = model.double().eval()
    seen = []
    model.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    model(x)
    return seen[0]


@pytest.fixture(scope='module')
def x():
    return images(2, 3, 224, 192)


@pytest.fixture(scope='module')
def maps(weights, x):
    with torch.no_grad():
        return original(weights, x, dense=True)


@torch.no_grad()
def test_list_of_four_maps(backbone, maps, x):
    """Trans4Trans and the UAV repositories: `outs = model(x)`."""
    for ours, theirs in zip(backbone(x), maps, strict=True):
        assert max_diff(ours, theirs) <= 1e-10


@torch.no_grad()
def test_last_map_only(weights, maps, x):
    """Trans4Trans with `F4=True`."""
    model = load(timm.create_model('pvt_tiny', class_token=False, num_classes=0).double().eval(), weights)
    last = model.forward_intermediates(x, indices=[-1], intermediates_only=True)[0]
    assert max_diff(last, maps[3]) <= 1e-10


@torch.no_grad()
def test_ordered_dict_for_torchvision(backbone, maps, x):
    """D-faster-R-CNN: keys '0' to '3'."""
    from torchvision.models._utils import IntermediateLayerGetter
    named = IntermediateLayerGetter(backbone, {f'stages_{i}': str(i) for i in range(4)})(x)
    assert list(named) == ['0', '1', '2', '3']
    for ours, theirs in zip(named.values(), maps, strict=True):
        assert max_diff(ours, theirs) <= 1e-10


@torch.no_grad()
def test_class_token_as_embedding(classifier, weights):
    """TextReID: `x[:, 0]` after the norm."""
    x = images(2, 3, 224, 224)
    model = load(timm.create_model('pvt_tiny', num_classes=0).double().eval(), weights)
    assert model.num_features == 512
    assert max_diff(model(x), original(weights, x, dense=False)[:, 0]) <= 1e-10
    assert max_diff(classifier.forward_head(classifier.forward_features(x), pre_logits=True), model(x)) == 0


@torch.no_grad()
def test_pooled_vector_and_maps(weights):
    """ED2IF2-Net: the mean of the normed last map beside all four, of which the last is normed."""
    x = images(2, 3, 224, 224)
    model = load(timm.create_model('pvt_tiny', num_classes=0, global_pool='avg').double().eval(), weights)
    final, features = model.forward_intermediates(x, norm=True)
    tokens = original(weights, x, dense=False)[:, 1:]
    for ours, theirs in zip(features[:3], original(weights, x, dense=True)):
        assert max_diff(ours, theirs) <= 1e-10
    assert max_diff(features[3], tokens.transpose(1, 2).reshape(2, 512, 7, 7)) <= 1e-10
    assert max_diff(model.forward_head(final), tokens.mean(dim=1)) <= 1e-10


def test_logits_and_last_attention(weights):
    """SMMix: the attention of the last block, here recomputed by hand from what goes into it."""
    fused = use_fused_attn()
    set_fused_attn(False)
    try:
        model = timm.create_model('pvt_tiny', num_classes=10)
    finally:
        set_fused_attn(fused)
    model = load(model.double().eval(), weights)
    x = images(2, 3, 224, 224)
    attn = model.stages[-1].blocks[-1].attn
    into = []
    attn.register_forward_pre_hook(lambda module, args: into.append(args[0]))
    with torch.no_grad():
        found = AttentionExtract(model, names=['stages.3.blocks.1.attn.attn_drop'], method='hook')(x)
        q = (into[0] @ weights['block4.1.attn.q.weight'].T + weights['block4.1.attn.q.bias'])
        k = (into[0] @ weights['block4.1.attn.kv.weight'][:512].T + weights['block4.1.attn.kv.bias'][:512])
        q, k = (t.reshape(2, 50, 8, 64).transpose(1, 2) for t in (q, k))
        expected = (q @ k.transpose(2, 3) / 8).softmax(dim=-1)
        assert max_diff(model.head(model.norm(model.stages(x))[:, 0]), model(x)) == 0
    (last,) = found.values()
    assert last.shape == (2, 8, 50, 50)
    assert max_diff(last, expected) <= 1e-10


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
    model = timm.create_model('pvt_tiny', class_token=False, num_classes=0, block_fn=ScaledBlock).double().eval()
    plain = timm.create_model('pvt_tiny', class_token=False, num_classes=0).double()
    missing, unexpected = model.load_state_dict(pvt_timm.checkpoint_filter_fn(weights, plain), strict=False)
    assert unexpected == [] and len(missing) == 8 and all(k.endswith('.gamma') for k in missing)
    assert max_diff(model.forward_intermediates(x, intermediates_only=True)[3], maps[3]) <= 1e-10
    model.stages[0].blocks[0].gamma.fill_(0.5)
    assert max_diff(model.forward_intermediates(x, intermediates_only=True)[0], maps[0]) > 0.1


@pytest.mark.parametrize('prefix', ['encoder.', 'model_uav.transformer.', 'backbone.', 'net.encoder.', 'visual_model.'])
def test_weights_of_a_whole_model(prefix, weights, classifier, tmp_path):
    """The backbone is found in a model of any kind by its keys, and nothing of it is lost in silence."""
    from safetensors.torch import save_file
    state_dict = {f'{prefix}{k}': v.contiguous() for k, v in weights.items()}
    save_file({**state_dict, 'decoder.conv.weight': torch.ones(3)}, tmp_path / 'model.safetensors')
    model = timm.create_model(
        'pvt_tiny', pretrained=True, num_classes=10,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'model.safetensors'), num_classes=10)).double()
    for k, v in classifier.state_dict().items():
        assert torch.equal(model.state_dict()[k].float(), v.float()), k
