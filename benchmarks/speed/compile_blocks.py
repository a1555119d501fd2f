"""Measure how much faster torch.compile makes a model, and how long it takes, for the whole model and for its blocks.

    python benchmarks/speed/compile_blocks.py                   # PVT-Large, 4 images of 224x224: results/compile.json
    python benchmarks/speed/compile_blocks.py --model pvt_tiny --output /tmp
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from run import HERE, interleave, machine
from pvt_timm.files import save_atomically

import timm


def measure(how: str, name: str, batch_size: int, rounds: int) -> dict:
    """Return the seconds of the compiled model's first forward pass, and milliseconds of later ones of both models."""
    model, x = timm.create_model(name).eval(), torch.randn(batch_size, 3, 224, 224)
    with torch.no_grad():
        expected = model(x)
        if how == 'blocks':
            compiled = timm.create_model(name).eval()
            compiled.load_state_dict(model.state_dict())
            for stage in compiled.stages:
                for block in stage.blocks:
                    block.compile(dynamic=False)
        else:
            compiled = torch.compile(model, dynamic=False)
        start = time.perf_counter()
        out = compiled(x)
        seconds = time.perf_counter() - start
        error = ((out - expected).abs().max() / expected.abs().max()).item()
        if error > 1e-4:
            raise SystemExit(f'{how}: relative error {error:.1e}, nothing to time.')
        times = interleave({'plain': lambda: model(x), 'compiled': lambda: compiled(x)}, rounds, 'cpu')
    return dict(first_forward_s=round(seconds, 1), error=error, **times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='pvt_large')
    parser.add_argument('--batch-size', type=int, default=4)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--output', type=Path, default=HERE / 'results')
    parser.add_argument('--how', choices=('blocks', 'whole'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.how:
        print(json.dumps(measure(args.how, args.model, args.batch_size, args.rounds)))
        return
    results = dict(machine=machine('cpu'), model=args.model, batch_size=args.batch_size)
    for how in ('blocks', 'whole'):
        with tempfile.TemporaryDirectory() as cache:  # empty cache, new process: nothing is reused
            out = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], '--how', how], check=True, stdout=subprocess.PIPE,
                env={**os.environ, 'TORCHINDUCTOR_CACHE_DIR': cache})
        found = results[how] = json.loads(out.stdout.splitlines()[-1])
        print(f'{how}: first forward {found["first_forward_s"]} s, then {found["compiled"]["median"]:.0f} ms '
              f'(plain {found["plain"]["median"]:.0f} ms)', flush=True)
    save_atomically(args.output / 'compile.json', lambda f: f.write(json.dumps(results, indent=1).encode()))


if __name__ == '__main__':
    main()
