""" What an image size, a batch and a depth cost: a fit of time over measured points.

    python benchmarks/speed/cost.py                                  # measure, fit, write results/cost.json
    python benchmarks/speed/cost.py --predict 1x1024x2048 --variant large

Time is fitted as the arithmetic of linear layers (grows with pixels) and of attention (grows with pixels squared), each
at a rate of its own, plus a time per block. Memory of one forward over that of the loaded model is fitted as a constant
plus so much per pixel and image; depth costs none.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

import contenders
from pvt_timm.files import save_atomically
from run import interleave, machine, peak_memory

DEPTHS = dict(tiny=(2, 2, 2, 2), small=(3, 4, 6, 3), medium=(3, 4, 18, 3), large=(3, 8, 27, 3))
DIMS, SR, RATIO = (64, 128, 320, 512), (8, 4, 2, 1), (8, 8, 4, 4)
RESULTS = Path(__file__).resolve().parents[1] / 'results'


def arithmetic(variant, batch, height, width):
    """Gigaflops of linear layers and of attention in a forward pass."""
    linear = attention = 0
    for i, (depth, dim, sr, ratio) in enumerate(zip(DEPTHS[variant], DIMS, SR, RATIO)):
        h, w = height // (4 * 2 ** i), width // (4 * 2 ** i)
        n, m = h * w, (h // sr) * (w // sr)
        reduction = m * (sr * dim) ** 2 if sr > 1 else 0
        linear += depth * (n * dim * dim * (2 + 2 * ratio) + 2 * m * dim * dim + reduction)
        linear += n * dim * (48 if i == 0 else 4 * DIMS[i - 1])
        attention += depth * 2 * n * m * dim
    return batch * linear * 2e-9, batch * attention * 2e-9


def features(variant, batch, height, width):
    return (*arithmetic(variant, batch, height, width), sum(DEPTHS[variant]))


def predict(fit, variant, batch, height, width):
    ms = float(np.dot(fit['ms_per'], features(variant, batch, height, width)))
    mb = float(np.dot(fit['mb_per'], (1, batch * height * width / 1e6)))
    return dict(ms=ms, mb=mb, gflop=sum(arithmetic(variant, batch, height, width)))


def measure(rounds):
    points = []
    grid = [('small', 1, s, s) for s in (224, 320, 448, 640, 896)] + [('small', 1, 800, 1344)]
    grid += [('small', b, 224, 224) for b in (4, 16)] + [(v, 1, 448, 448) for v in ('tiny', 'medium', 'large')]
    device = argparse.Namespace(device='cpu')
    with torch.no_grad():
        for name in ('eager', 'fused'):
            for variant, batch, height, width in grid:
                model = contenders.build(name, variant, (batch, 3, height, width), 'fp32')
                x = torch.randn(batch, 3, height, width)
                model(x)
                times = interleave({name: lambda model=model, x=x: model(x)}, rounds, 'cpu')
                memory = peak_memory(variant, (batch, 3, height, width), 'fp32', [name], device)['contenders'][name]
                points.append(dict(
                    path=name, variant=variant, batch=batch, height=height, width=width,
                    ms=times[name]['median'], mb=memory['bytes'] / 1e6))
                print(points[-1], flush=True)
    return points


def fit(points):
    """Least squares in relative error, coefficients not negative."""
    from scipy.optimize import nnls
    a = np.array([features(p['variant'], p['batch'], p['height'], p['width']) for p in points])
    ms = np.array([p['ms'] for p in points])
    coefficients, _ = nnls(a / ms[:, None], np.ones(len(ms)))
    error = np.abs(a @ coefficients / ms - 1)
    b = np.array([(1, p['batch'] * p['height'] * p['width'] / 1e6) for p in points])
    mb = np.array([p['mb'] for p in points])
    memory, _ = nnls(b / mb[:, None], np.ones(len(mb)))
    memory_error = np.abs(b @ memory / mb - 1)
    return dict(ms_per=coefficients.tolist(), of=['GFLOP linear', 'GFLOP attention', 'block'],
                mean_error=float(error.mean()), max_error=float(error.max()),
                mb_per=memory.tolist(), memory_of=['model', 'megapixel'],
                mean_memory_error=float(memory_error.mean()), max_memory_error=float(memory_error.max()))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--predict', metavar='BxHxW', help='use the stored fit, measure nothing')
    parser.add_argument('--variant', default='small', choices=list(DEPTHS))
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args(argv)
    path = RESULTS / 'cost.json'
    if args.predict:
        if not path.is_file():
            parser.error(f'Expected {path}, run without --predict first.')
        try:
            batch, height, width = map(int, args.predict.split('x'))
        except ValueError:
            parser.error(f'Expected --predict as BATCHxHEIGHTxWIDTH, got {args.predict!r}.')
        for name, values in json.loads(path.read_text())['fits'].items():
            out = predict(values, args.variant, batch, height, width)
            print(f'{name}: about {out["ms"]:.0f} ms, {out["mb"]:.0f} MB over the model, {out["gflop"]:.1f} GFLOP')
        return 0
    points = measure(args.rounds)
    fits = {name: fit([p for p in points if p['path'] == name]) for name in ('eager', 'fused')}
    examples = {f'{v} 1x{h}x{w}': {n: predict(f, v, 1, h, w) for n, f in fits.items()}
                for v in DEPTHS for h, w in ((800, 1344), (1024, 2048))}
    text = json.dumps(dict(machine=machine('cpu'), points=points, fits=fits, examples=examples), indent=1)
    save_atomically(path, lambda f: f.write(text.encode()))
    print(json.dumps(dict(fits=fits, examples=examples), indent=1))
    return 0


if __name__ == '__main__':
    sys.exit(main())
