""" Decoders of segmentation_models_pytorch on PVT: training, export, script and compile, as in its own tests. """
import pytest
import torch

import pvt_timm  # noqa: F401

smp = pytest.importorskip('segmentation_models_pytorch', reason='needs segmentation-models-pytorch')

DECODERS = ('FPN', 'Unet', 'UPerNet', 'Segformer', 'DPT')


def build(decoder):
    torch.manual_seed(0)
    kwargs = {}
    if decoder == 'DPT':  # takes a whole model, not a features_only one
        kwargs = dict(class_token=False, num_classes=0, decoder_readout='ignore')
    return getattr(smp, decoder)('tu-test_pvt', encoder_weights=None, classes=3, **kwargs)


@pytest.mark.parametrize('decoder', DECODERS)
def test_trains_at_64(decoder):
    model = build(decoder)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    y = (x.mean(1) > 0.5).long()
    optimizer = torch.optim.SGD(model.parameters(), 3e-5)  # small enough to follow the gradient
    losses = []
    for _ in range(6):
        torch.manual_seed(0)  # the same dropout in every step
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in model.encoder.parameters())


@pytest.mark.parametrize('in_channels, depth', [(3, 3), (1, 4), (4, 5)])
def test_encoder(in_channels, depth):
    encoder = smp.encoders.get_encoder('tu-test_pvt', in_channels=in_channels, depth=depth, weights=None)
    features = encoder(torch.rand(1, in_channels, 64, 96))
    assert encoder.output_stride == 2 ** depth
    assert [f.shape[1] for f in features] == encoder.out_channels == [in_channels, 0, 16, 32, 40, 64][:depth + 1]
    assert [64 // f.shape[2] for f in features] == [1, 2, 4, 8, 16, 32][:depth + 1]


QUICK = [('script', decoder) for decoder in DECODERS] + [('export', 'FPN')]


@pytest.mark.parametrize('form, decoder', [
    pytest.param(form, decoder, marks=[] if (form, decoder) in QUICK else pytest.mark.slow)
    for form in ('export', 'compile', 'script') for decoder in DECODERS])
def test_forms(form, decoder):
    model, x = build(decoder).eval(), torch.rand(1, 3, 64, 64)
    if not dict(compile=model._is_torch_compilable, script=model._is_torch_scriptable).get(form, True):
        pytest.skip(f'segmentation_models_pytorch marks {decoder} as not fit to {form}')
    torch.compiler.reset()
    other = dict(
        export=lambda: torch.export.export(model, args=(x,), strict=True).module(),
        compile=lambda: torch.compile(model, fullgraph=True, dynamic=True, backend='eager'),
        script=lambda: torch.jit.script(model),
    )[form]()
    inputs = [x, torch.rand(1, 3, 96, 64)] if form == 'compile' else [x]
    with torch.inference_mode():
        for x in inputs:
            torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('decoder', ['DeepLabV3', 'DeepLabV3Plus', 'PAN'])
def test_dilated_decoders_are_refused(decoder):
    with pytest.raises(ValueError, match='output_stride 32.*FPN or UPerNet'):
        getattr(smp, decoder)('tu-test_pvt', encoder_weights=None)
