""" DistributedDataParallel and FSDP2 over two gloo processes on the CPU, against one process. """
import contextlib
import datetime
import os
import socket
import traceback

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import pvt_timm  # noqa: F401  registers the models

try:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch < 2.6
    fully_shard = None

WORLD_SIZE = 2
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason='needs a torch with the gloo backend')


def make(features_only=False, **kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_pvt', features_only=features_only, **kwargs).train()


def loss_of(output):
    outputs = output if isinstance(output, (list, tuple)) else [output]
    return sum(o.square().mean() for o in outputs)


def inputs():
    return torch.randn(2 * WORLD_SIZE, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def assert_gradients_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad is not None and actual[name] is not None, name
        torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f'{n}: {m}')


def ddp_worker(rank, folder, features_only, grad_checkpointing=False):
    model = make(features_only)
    reference = make(features_only)
    if rank:  # DDP must hand out the weights of rank 0
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.)
    if grad_checkpointing:
        model.set_grad_checkpointing()
    ddp = DistributedDataParallel(model, find_unused_parameters=False)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    reference_optimizer = torch.optim.SGD(reference.parameters(), lr=0.05)
    batch = inputs()
    for _ in range(2):  # an unused parameter is an error in the second step
        optimizer.zero_grad()
        reference_optimizer.zero_grad()
        loss_of(ddp(batch.chunk(WORLD_SIZE)[rank])).backward()
        loss_of(reference(batch)).backward()
        assert_gradients_equal(gradients(model), gradients(reference))
        optimizer.step()
        reference_optimizer.step()


def shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh('cpu', (WORLD_SIZE,))
    trunk = getattr(model, 'model', model)
    stages = trunk.stages if hasattr(trunk, 'stages') else [m for n, m in trunk.named_children() if 'stages' in n]
    for stage in stages:
        for block in stage.blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp_worker(rank, folder, features_only):
    model = shard(make(features_only))
    reference = make(features_only)
    assert any(p.to_local().numel() < p.numel() for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    reference_optimizer = torch.optim.SGD(reference.parameters(), lr=0.05)
    batch = inputs()
    for _ in range(2):
        optimizer.zero_grad()
        reference_optimizer.zero_grad()
        loss_of(model(batch.chunk(WORLD_SIZE)[rank])).backward()
        loss_of(reference(batch)).backward()
        assert_gradients_equal({n: g.full_tensor() for n, g in gradients(model).items()}, gradients(reference))
        optimizer.step()
        reference_optimizer.step()

    # save: the full state dict on rank 0 is that of an unsharded model
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state_dict = get_model_state_dict(model, options=options)
    path = os.path.join(folder, 'model.pt')
    if rank == 0:
        assert state_dict.keys() == reference.state_dict().keys()
        torch.save(state_dict, path)
        plain = make(features_only)
        plain.load_state_dict(torch.load(path, weights_only=True), strict=True)
        for (name, p), q in zip(plain.state_dict().items(), reference.state_dict().values()):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f'{n}: {m}')
    dist.barrier()

    # load into another sharded model with other weights
    other = make(features_only)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other = shard(other)
    set_model_state_dict(
        other, torch.load(path, weights_only=True), options=StateDictOptions(full_state_dict=True, strict=True))
    model.eval(), other.eval()
    with torch.no_grad():
        expected, actual = model(batch), other(batch)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


CASES = {
    'ddp': (ddp_worker, dict(features_only=False)),
    'ddp-features': (ddp_worker, dict(features_only=True)),
    'ddp-features-checkpointing': (ddp_worker, dict(features_only=True, grad_checkpointing=True)),
}
if fully_shard is not None:
    CASES.update({
        'fsdp2': (fsdp_worker, dict(features_only=False)),
        'fsdp2-features': (fsdp_worker, dict(features_only=True)),
    })


def _start(rank, port, folder):
    """All cases in one pair of processes, as starting them takes longest. Writes what failed to a file per case."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=WORLD_SIZE, timeout=datetime.timedelta(seconds=120))
    for name, (worker, kwargs) in CASES.items():
        try:
            worker(rank, folder=os.path.join(folder, name), **kwargs)
            dist.barrier()
        except BaseException:
            with open(os.path.join(folder, name, f'error{rank}.txt'), 'w') as f:
                f.write(traceback.format_exc())
            os._exit(1)  # the other process may wait for this one
        with open(os.path.join(folder, name, f'done{rank}.txt'), 'w'):
            pass
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('distributed')
    for name in CASES:
        (folder / name).mkdir()
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    with contextlib.suppress(mp.ProcessExitedException, mp.ProcessRaisedException):
        mp.spawn(_start, (port, str(folder)), nprocs=WORLD_SIZE)
    return folder


def check(results, name):
    errors = sorted((results / name).glob('error*.txt'))
    if errors:
        pytest.fail(errors[0].read_text())
    assert len(list((results / name).glob('done*.txt'))) == WORLD_SIZE, 'not run, as a case before it failed'


@pytest.mark.parametrize('name', ['ddp', 'ddp-features', 'ddp-features-checkpointing'])
def test_ddp_gradients_equal_one_process(name, results):
    check(results, name)


@pytest.mark.skipif(
    fully_shard is None or torch.__version__.startswith('2.6.'),
    reason='fully_shard of torch 2.6 fails between processes on CPUs')
@pytest.mark.parametrize('name', ['fsdp2', 'fsdp2-features'])
def test_fsdp2_gradients_equal_one_process_and_state_dict_round_trip(name, results):
    check(results, name)
