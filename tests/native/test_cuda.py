""" On a GPU, outputs are those of the CPU, in every way that a model can be run there. """
import copy

import pytest
import timm
import torch

import pvt_timm
from pvt_timm.detection import pvt_retinanet
from tests.support.forms import KINDS, assert_equal_outputs, gradients, loss_of, make_input, make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
SIZES = ((2, 224, 224), (1, 256, 352), (3, 97, 161))


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


def graphed(model):
    def forward(x):  # a graph is of one size
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(x)
        stream.synchronize()
        graph, static = torch.cuda.CUDAGraph(), x.clone().zero_()
        with torch.cuda.graph(graph):
            out = model(static)
        static.copy_(x)
        graph.replay()
        return out
    return forward


FORMS = dict(
    plain=lambda model: model,
    channels_last=lambda model: model.to(memory_format=torch.channels_last),
    graph=graphed,
    fused=pvt_timm.fuse,
)


@pytest.mark.parametrize('kwargs', KINDS)
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', ['test_pvt', 'pvt_tiny'])
def test_outputs(name, form, kwargs):
    model = make_model(name, **kwargs)
    there = FORMS[form](copy.deepcopy(model).cuda())
    for size in SIZES:
        x = make_input(*size)
        with torch.no_grad():
            found, expected = there(x.cuda()), model(x)
            found = [y.cpu() for y in found] if isinstance(found, list) else found.cpu()
        assert_equal_outputs(found, expected)


@pytest.mark.parametrize('name', ['pvt_tiny', 'pvt_small', 'pvt_medium', 'pvt_large'])
def test_float64(name):
    model = make_model(name).double()
    x = make_input(1, 224, 288).double()
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(model).cuda()(x.cuda()).cpu(), model(x), rtol=1e-10, atol=1e-10)


def test_fused_goes_there_and_back():
    model = pvt_timm.fuse(make_model())
    x = make_input(2, 64, 96)
    with torch.no_grad():
        before = model(x)
        assert 'path=fast' in str(model)
        there = model.cuda()(x.cuda())
        assert 'path=fast' not in str(model)
        assert_equal_outputs(there.cpu(), before)
        assert_equal_outputs(model.cpu()(x), before)
    assert 'path=fast' in str(model)


def test_pretrained_weights_are_loaded_there():
    model = timm.create_model('test_pvt', pretrained=True, device='cuda')
    assert all(p.is_cuda for p in model.parameters())
    expected = timm.create_model('test_pvt', pretrained=True).state_dict()
    torch.testing.assert_close({k: v.cpu() for k, v in model.state_dict().items()}, expected, rtol=0, atol=0)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_gradients(checkpointing):
    model = make_model('pvt_tiny').train()
    other = copy.deepcopy(model).cuda()
    x = make_input(2, 64, 96)
    loss_of(model(x)).backward()
    other.set_grad_checkpointing(checkpointing)
    loss_of(other(x.cuda())).backward()
    found = {k: v.cpu() for k, v in gradients(other).items()}
    torch.testing.assert_close(found, gradients(model), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_mixed_precision_learns(dtype):
    torch.manual_seed(0)
    model = timm.create_model('test_pvt', drop_path_rate=0.1, num_classes=4).cuda()
    x, y = make_input(32, 32, 32).cuda(), torch.arange(32, device='cuda') % 4
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 2e-3), torch.amp.GradScaler('cuda')
    losses = []
    for _ in range(60):
        with torch.autocast('cuda', dtype):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses


def test_detector():
    torch.manual_seed(0)
    model = pvt_retinanet('test_pvt', 3, out_channels=32, min_size=64, score_thresh=0.).eval()
    images = [make_input(1, 70, 90)[0].sigmoid(), make_input(1, 64, 64)[0].sigmoid()]
    with torch.no_grad():
        expected, found = model(images), copy.deepcopy(model).cuda()([x.cuda() for x in images])
    for a, b in zip(found, expected):
        torch.testing.assert_close(a['scores'].cpu(), b['scores'], rtol=1e-4, atol=1e-5)
