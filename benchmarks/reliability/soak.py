""" 2,000 requests of random sizes in one process: is memory flat, and are the outputs those of a fresh model?

    python benchmarks/reliability/soak.py [--requests 2000] [--name NAME] [--default-allocator]

Heights and widths are drawn from 32 to 1024 pixels (evenly on a log scale), batch sizes from 1 to 4. Requests take
turns between classification and dense features, and between plain and fused models. The model is `test_pvt` with its
digits weights or, for one request in 25, `pvt_tiny` with random weights. Every 100th output is compared with that of a
new model. Before that, 8 threads share the models. Writes results/NAME.json and results/NAME.png. The exit code is 1 if
a check fails.

Memory can grow with the number of shapes without a leak: glibc keeps freed blocks of other sizes, and oneDNN keeps code
for the last 1,024 shapes of products. So the script starts itself again with MALLOC_MMAP_THRESHOLD_ and
ONEDNN_PRIMITIVE_CACHE_CAPACITY set, as a server should. With --default-allocator it does not.
"""
import argparse
import ctypes
import gc
import json
import math
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import psutil
import timm
import torch

import pvt_timm
from pvt_timm.files import save_atomically

RESULTS = Path(__file__).resolve().parents[1] / 'results'

# MB by which memory may grow per 1,000 requests after warm-up: resident memory, and allocated memory. If each request
# leaked one output, it would be hundreds of MB. The lists of this script grow by 0.3 MB.
ALLOWED_SLOPE = 10.
ALLOWED_SLOPE_IN_USE = 1.
FUSED_TOLERANCE = 1e-4

ALLOCATOR = {'MALLOC_MMAP_THRESHOLD_': '131072', 'ONEDNN_PRIMITIVE_CACHE_CAPACITY': '64'}

Key = Tuple[str, str, str]  # model, mode, plain or fused


def make_models(tiny: bool = True) -> Dict[Key, torch.nn.Module]:
    """Return new models to test, always with the same weights."""
    models = {}
    for name in ('test_pvt', 'pvt_tiny') if tiny else ('test_pvt',):
        torch.manual_seed(0)
        whole = timm.create_model(name, pretrained=name == 'test_pvt').eval()
        dense = timm.create_model(name, features_only=True).eval()
        weights = {k.replace('stages.', 'stages_'): v for k, v in whole.state_dict().items()}
        last = 'stages_3.pos_embed'
        weights[last] = weights[last][:, weights[last].shape[1] - dense.state_dict()[last].shape[1]:]
        dense.load_state_dict({k: weights[k] for k in dense.state_dict()})
        for mode, model in (('classify', whole), ('dense', dense)):
            models[name, mode, 'plain'] = model
            models[name, mode, 'fused'] = pvt_timm.fuse(model)
    return models


def request(rng: random.Random, largest: int, tiny: bool = True) -> Tuple[str, Tuple[int, int, int, int], int]:
    """Return a random request: name of the model, shape of the input, seed of the input."""
    height, width = (int(round(math.exp(rng.uniform(math.log(32), math.log(largest))))) for _ in range(2))
    name = 'pvt_tiny' if tiny and rng.random() < 0.04 else 'test_pvt'
    return name, (rng.randint(1, 4), 3, height, width), rng.randrange(2 ** 31)


def image(shape: Tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def outputs(model: torch.nn.Module, x: torch.Tensor) -> List[torch.Tensor]:
    y = model(x)
    return list(y) if isinstance(y, (list, tuple)) else [y]


def difference(a: List[torch.Tensor], b: List[torch.Tensor]) -> float:
    assert [x.shape for x in a] == [x.shape for x in b]
    return max(float((x - y).abs().max()) for x, y in zip(a, b))


def resident() -> float:
    return psutil.Process().memory_info().rss / 2 ** 20


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        'arena', 'ordblks', 'smblks', 'hblks', 'hblkhd', 'usmblks', 'fsmblks', 'uordblks', 'fordblks', 'keepcost')]


def in_use() -> float:
    """Return the memory that is allocated and not freed, in MB, as glibc counts it (0 with another C library)."""
    try:
        function = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return 0.
    function.restype = _Mallinfo2
    info = function()
    return (info.uordblks + info.hblkhd) / 2 ** 20


def fit(values: List[float], warm: int) -> float:
    """Return the slope of values per 1,000 requests, from request `warm` on."""
    return round(1000 * float(np.polyfit(np.arange(warm, len(values)), values[warm:], 1)[0]), 3)


def soak(requests: int, largest: int, every: int = 100, seed: int = 0) -> Dict[str, Any]:
    """Send the requests one after another, and return memory and differences of outputs."""
    rng = random.Random(seed)
    models = make_models()
    kinds = sorted({(mode, path) for _, mode, path in models})
    memory, allocated, shapes, compared, worst, fused = [], [], [], 0, 0., 0.
    start = time.monotonic()
    for i in range(requests):
        name, shape, input_seed = request(rng, largest)
        mode, path = kinds[i % len(kinds)]
        x = image(shape, input_seed)
        y = outputs(models[name, mode, path], x)
        assert all(torch.isfinite(t).all() for t in y)
        if i % every == 0 or i == requests - 1:
            fresh = make_models(tiny=name == 'pvt_tiny')
            worst = max(worst, difference(y, outputs(fresh[name, mode, path], x)))
            fused = max(fused, difference(y, outputs(fresh[name, mode, 'plain'], x)))
            compared += 1
            del fresh
        del x, y
        gc.collect(0)
        memory.append(round(resident(), 2))
        allocated.append(round(in_use(), 2))
        shapes.append(shape)
        if i % 100 == 99:
            print(f'{i + 1:5d} requests, {time.monotonic() - start:6.0f} s, {memory[-1]:7.1f} MB, '
                  f'in use {allocated[-1]:7.1f} MB', flush=True)
    warm = requests // 2
    pixels = [s[0] * s[2] * s[3] for s in shapes]
    return dict(
        requests=requests, kinds=[' '.join(k) for k in kinds], seconds=round(time.monotonic() - start, 1),
        distinct_shapes=len(set(shapes)), sides=[min(min(s[2:]) for s in shapes), max(max(s[2:]) for s in shapes)],
        largest_megapixels=round(max(pixels) / 1e6, 2), warm_up=warm,
        slope_mb_per_1000=fit(memory, warm), slope_mb_per_1000_by_start={
            start: fit(memory, start) for start in range(requests // 4, requests - 1, max(requests // 8, 1))},
        slope_in_use_mb_per_1000=fit(allocated, warm), memory_mb=memory, in_use_mb=allocated,
        memory_after_warm_up_mb=[min(memory[warm:]), max(memory[warm:])],
        mean_by_quarter_mb=[round(float(np.mean(q)), 1) for q in np.array_split(memory, 4)],
        compared_with_fresh=compared, largest_difference_from_fresh=worst, largest_difference_from_plain=fused)


def share(threads: int = 8, requests: int = 16, largest: int = 256, seed: int = 1) -> Dict[str, Any]:
    """Let threads send the same requests in different orders to the same models, and compare with a single thread."""
    rng = random.Random(seed)
    models = make_models()
    jobs = [(key, *request(rng, largest)[1:]) for key in models for _ in range(max(1, requests // len(models)))]
    reference = make_models()  # other models, so that the first requests to `models` come from the threads
    expected = [outputs(reference[key], image(shape, s)) for key, shape, s in jobs]
    differences, errors, barrier = [], [], threading.Barrier(threads)

    def work(number: int) -> None:
        order = list(range(len(jobs)))
        random.Random(number).shuffle(order)
        try:
            barrier.wait()
            for i in order:
                key, shape, s = jobs[i]
                differences.append(difference(outputs(models[key], image(shape, s)), expected[i]))
        except Exception as e:
            errors.append(repr(e))

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return dict(threads=threads, requests=len(differences), errors=errors, largest_difference=max(differences))


def draw(results: Dict[str, Any], file: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    s = results['soak']
    fig, ax = plt.subplots(figsize=(8, 3.6), constrained_layout=True)
    ax.plot(s['memory_mb'], lw=0.7, color='tab:blue', label='after each request')
    ax.plot(s['in_use_mb'], lw=0.7, color='tab:green', label='of it allocated')
    ax.axvline(s['warm_up'], color='k', ls='--', lw=0.8)
    x = np.arange(s['warm_up'], s['requests'])
    ax.plot(x, np.polyval(np.polyfit(x, s['memory_mb'][s['warm_up']:], 1), x), color='tab:red', lw=1.5,
            label=f'{s["slope_mb_per_1000"]:+.2f} MB per 1,000 requests')
    ax.set_ylim(0, 1.15 * max(s['memory_mb']))
    ax.set_xlabel('request')
    ax.set_ylabel('resident memory (MB)')
    ax.set_title(f'{s["requests"]} requests of {s["distinct_shapes"]} shapes, sides from {s["sides"][0]} to '
                 f'{s["sides"][1]}', fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, loc='lower right')
    save_atomically(file, lambda f: fig.savefig(f, dpi=110, format='png'))
    plt.close(fig)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--requests', type=int, default=2000)
    parser.add_argument('--largest', type=int, default=1024, metavar='PIXELS', help='longest side (default 1024)')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help="torch's threads")
    parser.add_argument('--name', default='soak', help='name of the result files')
    parser.add_argument(
        '--default-allocator', action='store_true', help='keep the allocator settings that the process started with')
    args = parser.parse_args()
    if not args.default_allocator and any(os.environ.get(k) != v for k, v in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    torch.set_num_threads(args.threads)
    results: Dict[str, Any] = dict(
        torch=torch.__version__, timm=timm.__version__, torch_threads=args.threads,
        environment={k: os.environ.get(k) for k in ALLOCATOR}, shared=share())
    print(json.dumps(results['shared']), flush=True)
    results['soak'] = soak(args.requests, args.largest)
    s, t = results['soak'], results['shared']
    results['ok'] = bool(
        abs(s['slope_mb_per_1000']) <= ALLOWED_SLOPE and
        abs(s['slope_in_use_mb_per_1000']) <= ALLOWED_SLOPE_IN_USE and s['largest_difference_from_fresh'] == 0 and
        s['largest_difference_from_plain'] <= FUSED_TOLERANCE and not t['errors'] and t['largest_difference'] == 0)
    RESULTS.mkdir(exist_ok=True)
    save_atomically(RESULTS / f'{args.name}.json', lambda f: f.write((json.dumps(results) + '\n').encode()))
    draw(results, RESULTS / f'{args.name}.png')
    short = {k: v for k, v in s.items() if k not in ('memory_mb', 'in_use_mb')}
    print(json.dumps({**results, 'soak': short}, indent=1))
    return 0 if results['ok'] else 1


if __name__ == '__main__':
    sys.exit(main())
