"""segmentation_models_pytorch decoders on PVT: training, export, script and compile as its own tests do."""
import pytest
import torch

import pvt_timm  # noqa: F401

smp = pytest.importorskip('segmentation_models_pytorch', reason='needs segmentation-models-pytorch')

DECODERS = ('FPN', 'Unet', 'UPerNet', 'Segformer', 'DPT')


def build(decoder, encoder='tu-pvt_tiny', **kwargs):
    torch.manual_seed(0)
    if decoder == 'DPT':  # takes a whole model, not a features_only one
        kwargs = dict(class_token=False, num_classes=0, decoder_readout='ignore', **kwargs)
    return getattr(smp, decoder)(encoder, encoder_weights=None, classes=3, **kwargs)


def train_steps(model, size, steps=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, *size, generator=generator)
    y = (x.mean(1) > 0.5).long()
    optimizer = torch.optim.SGD(model.parameters(), 3e-5)  # small enough to follow the gradient
    losses = []
    for _ in range(steps):
        torch.manual_seed(0)  # the same dropout in every step
        out = model(x)
        assert out.shape == (2, 3, *size)
        loss = torch.nn.functional.cross_entropy(out, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize('decoder', DECODERS)
def test_trains_at_64(decoder):
    model = build(decoder, 'tu-test_pvt')
    losses = train_steps(model, (64, 64), 6)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in model.encoder.parameters())


@pytest.mark.parametrize('in_channels', [1, 4])
@pytest.mark.parametrize('depth', [3, 4, 5])
def test_encoder(in_channels, depth):
    encoder = smp.encoders.get_encoder('tu-test_pvt', in_channels=in_channels, depth=depth, weights=None)
    features = encoder(torch.rand(1, in_channels, 64, 96))
    assert encoder.output_stride == 2 ** depth
    assert [f.shape[1] for f in features] == encoder.out_channels == [in_channels, 0, 16, 32, 40, 64][:depth + 1]
    assert [64 // f.shape[2] for f in features] == [1, 2, 4, 8, 16, 32][:depth + 1]


@pytest.mark.parametrize('encoder', ['tu-test_pvt', pytest.param('tu-pvt_tiny', marks=pytest.mark.slow)])
@pytest.mark.parametrize('decoder', DECODERS)
def test_strict_export(decoder, encoder):
    model = build(decoder, encoder).eval()
    x = torch.rand(1, 3, 64, 64)
    exported = torch.export.export(model, args=(x,), strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('encoder', ['tu-test_pvt', pytest.param('tu-pvt_tiny', marks=pytest.mark.slow)])
@pytest.mark.parametrize('decoder', DECODERS)
def test_compile_full_graph_dynamic(decoder, encoder):
    model = build(decoder, encoder).eval()
    if not model._is_torch_compilable:
        pytest.skip(f'segmentation_models_pytorch marks {decoder} as not compilable')
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend='eager')
    with torch.inference_mode():
        for size in ((64, 64), (96, 64)):
            x = torch.rand(1, 3, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('encoder', ['tu-test_pvt', pytest.param('tu-pvt_tiny', marks=pytest.mark.slow)])
@pytest.mark.parametrize('decoder', DECODERS)
def test_script(decoder, encoder):
    model = build(decoder, encoder).eval()
    if not model._is_torch_scriptable:
        pytest.skip(f'segmentation_models_pytorch marks {decoder} as not scriptable')
    x = torch.rand(1, 3, 64, 64)
    scripted = torch.jit.script(model)
    with torch.inference_mode():
        torch.testing.assert_close(scripted(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('build_model, accepted', [
    (lambda: smp.DeepLabV3('tu-pvt_tiny', encoder_weights=None), 'output_stride 32'),
    (lambda: smp.DeepLabV3Plus('tu-pvt_tiny', encoder_weights=None), 'output_stride 32'),
    (lambda: smp.PAN('tu-pvt_tiny', encoder_weights=None), 'output_stride 32'),
    (lambda: smp.encoders.get_encoder('tu-pvt_tiny', weights=None, output_stride=16), 'output_stride 32'),
    (lambda: smp.FPN('tu-pvt_tiny', encoder_weights=None, encoder_depth=6), r'range \[1, 5\]'),
])
def test_dilated_decoders_are_refused(build_model, accepted):
    with pytest.raises(ValueError, match=accepted) as error:
        build_model()
    if 'stride' in accepted:
        assert 'FPN or UPerNet' in str(error.value)
