""" Speed and memory of PVT against its alternatives, in one run: JSON, a Markdown table and plots.

    python benchmarks/speed/run.py                      # everything, on CPU about 10 minutes
    python benchmarks/speed/run.py --avx2               # as a CPU without AVX-512 would run it
    python benchmarks/speed/run.py --quick              # PVT-Tiny and few repetitions, under 2 minutes
    python benchmarks/speed/run.py --device cuda        # on a GPU about 6 minutes

See benchmarks/README.md for what is measured and how.
"""
import argparse
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Makes a CPU with AVX-512 work like one without it. These variables are read when PyTorch is imported.
AVX2 = {'ONEDNN_MAX_CPU_ISA': 'AVX2', 'ATEN_CPU_CAPABILITY': 'avx2', 'MKL_ENABLE_INSTRUCTIONS': 'AVX2'}
if '--avx2' in sys.argv:
    os.environ.update(AVX2)

import torch  # noqa: E402

import contenders  # noqa: E402
from pvt_timm.files import save_atomically  # noqa: E402
from pvt_timm.fused import has_amx  # noqa: E402
from contenders import CPU, CUDA, ENGINES, NOT_PVT, RUNTIMES, TRAIN, TRAIN_CUDA, Skipped  # noqa: E402

GMACS = {'tiny': 1.93, 'small': 3.82, 'medium': 6.66, 'large': 9.81}  # at 224x224, attention included
PAUSE = 0.05  # seconds before a contender runs, as threads of other libraries stay busy for a while after their work
HERE = Path(__file__).resolve().parents[1]
SECTIONS = ('throughput', 'latency', 'engines', 'training', 'memory', 'training_memory')
PACKAGES = ('torch', 'timm', 'torchvision', 'transformers', 'onnxruntime', 'openvino', 'nncf', 'pvt-timm')


def machine(device: str) -> dict:
    """Return a description of the machine and the versions of packages."""
    cpu = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            text = f.read()
        cpu = ', '.join(
            f'{key} {match[1]}' for key in ('model name', 'cpu family', 'model')
            if (match := re.search(rf'^{key}\s*: (.*)$', text, re.M)))
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            pass
    emulated = all(os.environ.get(k) == v for k, v in AVX2.items())
    return dict(
        cpu=cpu, cpus=os.cpu_count(), threads=torch.get_num_threads(),
        load=os.getloadavg()[0] if hasattr(os, 'getloadavg') else None,
        capability=torch.backends.cpu.get_cpu_capability(),
        emulated=emulated, bf16=contenders.has_bf16(), amx=has_amx() and not emulated,
        python=platform.python_version(), system=platform.platform(terse=True), versions=versions,
        gpu=torch.cuda.get_device_name() if device == 'cuda' else None,
        when=time.strftime('%Y-%m-%d %H:%M'))


def synchronize(device):
    if device == 'cuda':
        torch.cuda.synchronize()


CLOCKS = dict(wall=time.perf_counter, cpu=time.process_time)


def interleave(functions: dict, rounds: int, device: str, clock: str = 'wall') -> dict:
    """Time functions in turns, so that other work of the machine slows all of them down alike."""
    now = CLOCKS[clock]
    times = {name: [] for name in functions}
    pause, calls = (0, 5) if device == 'cuda' else (PAUSE, 1)  # no pauses on a GPU: it would be slow after them
    for _ in range(rounds):
        for name, function in functions.items():
            synchronize(device)
            time.sleep(pause)
            start = now()
            for _ in range(calls):
                function()
            synchronize(device)
            times[name].append((now() - start) * 1e3 / calls)
    return {name: summary(values) for name, values in times.items()}


def summary(ms: list) -> dict:
    ms = sorted(ms)
    quarter = len(ms) // 4
    return dict(
        median=statistics.median(ms), min=ms[0], spread=(ms[-1 - quarter] - ms[quarter]) / statistics.median(ms),
        rounds=len(ms))


def check(name, precision, shape, out, expected) -> float:
    """Return the largest difference from the expected logits, divided by the largest one. Exits if it is too large."""
    error = ((out.detach().float().cpu() - expected).abs().max() / expected.abs().max()).item()
    if not error <= contenders.tolerance(name, precision):  # also true for NaN
        raise SystemExit(f'{name} {precision} {shape}: relative error {error:.1e}, nothing to time.')
    return error


def inference(variant, shape, precision, names, args) -> dict:
    """Time contenders on one input, after their outputs have been compared."""
    device = args.device
    contenders.set_precision(precision, device)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    functions, result = {}, {}
    with torch.no_grad():
        expected = contenders.reference(variant)(images) if set(names) - set(NOT_PVT) else None
        for name in names:
            try:
                model = contenders.build(name, variant, shape, precision, device)
                x = images.to(device=device, dtype=contenders.input_dtype(name, precision))
                out = model(x)
            except Skipped as e:
                result[name] = dict(skipped=str(e))
                continue
            except (AssertionError, RuntimeError) as e:
                if name not in ('original', 'sdpa_flash', 'sdpa_efficient'):
                    raise
                result[name] = dict(skipped=f'raises {type(e).__name__}')
                continue
            result[name] = {}
            if name not in NOT_PVT:
                result[name] = dict(error=check(name, precision, shape, out, expected))
            functions[name] = lambda model=model, x=x: model(x)
            functions[name]()
        for name, values in interleave(functions, args.rounds, device, args.clock).items():
            result[name].update(values)
    del functions
    gc.collect()
    return dict(variant=variant, shape=list(shape), precision=precision, contenders=result)


def forward_backward(model, x, precision, device):
    with contenders.autocast(precision, device):
        out = model(x)
    out.float().square().mean().backward()
    return out


def training(variant, shape, precision, names, args) -> dict:
    """Time a forward and backward pass (no optimizer), after the outputs have been compared."""
    contenders.set_precision(precision, args.device)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = images.to(device=args.device, dtype=contenders.training_dtype(precision, args.device))
    with torch.no_grad():
        expected = contenders.reference(variant)(images)
    functions, result = {}, {}
    for name in names:
        try:
            model = contenders.module(name, variant)
        except Skipped as e:
            result[name] = dict(skipped=str(e))
            continue
        model = model.train().to(device=args.device, dtype=x.dtype)

        def step(model=model):
            out = forward_backward(model, x, precision, args.device)
            model.zero_grad(set_to_none=True)
            return out
        functions[name] = step
        result[name] = {}
        out = step()
        if name not in NOT_PVT:
            result[name] = dict(error=check(name, precision, shape, out, expected))
    for name, values in interleave(functions, args.rounds, args.device, args.clock).items():
        result[name].update(values)
    del functions
    gc.collect()
    return dict(variant=variant, shape=list(shape), precision=precision, contenders=result)


def peak(precision: str, device: str, clock: str) -> dict:
    """Return the rate of a large matrix product in GFLOP/s, with the fastest of the libraries that PyTorch uses."""
    contenders.set_precision(precision, device)
    dtype = contenders.DTYPES[precision]
    n = 8192 if device == 'cuda' else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    functions = dict(matmul=lambda: a @ b)
    if device == 'cpu':
        from pvt_timm import fused as fast
        if fast._works(dtype):
            linear = fast._pack_linear(b, None)
            functions['oneDNN'] = lambda: linear(a)
    with torch.no_grad():
        for function in functions.values():
            function()
        times = interleave(functions, 10, device, clock)
    rates = {name: 2e-6 * n ** 3 / values['min'] for name, values in times.items()}
    return dict(precision=precision, size=n, gflops=max(rates.values()), by=rates)


# --- Memory. On a CPU, each figure is measured in a separate process ---

def memory(field: str) -> int:
    with open('/proc/self/status', encoding='utf-8') as f:
        return int(re.search(rf'{field}:\s+(\d+)', f.read())[1]) * 1024


def memory_of(name, variant, shape, precision, device, train=False) -> int:
    """Return the peak bytes of one forward (and backward) pass, beyond those of the loaded (and packed) model."""
    contenders.set_precision(precision, device)
    dtype = contenders.training_dtype(precision, device) if train else contenders.input_dtype(name, precision)
    x = torch.randn(shape).to(device=device, dtype=dtype)
    if train:
        model = contenders.module(name, variant).train().to(device=device, dtype=dtype)
    else:
        model = contenders.build(name, variant, shape, precision, device)

    def step():
        forward_backward(model, x, precision, device) if train else model(x)

    with torch.set_grad_enabled(train):
        if name not in ('transformers', 'original', *RUNTIMES):
            model(torch.zeros(1, 3, 64, 64, dtype=x.dtype, device=device))
        gc.collect()
        if device == 'cuda':
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            return torch.cuda.max_memory_allocated() - before
        with open('/proc/self/clear_refs', 'w', encoding='utf-8') as f:
            f.write('5')  # resets the peak
        before = memory('VmRSS')
        step()
        return memory('VmHWM') - before


def peak_memory(variant, shape, precision, names, args, train=False) -> dict:
    result = {}
    for name in names:
        what = [name, variant, list(shape), precision, args.device, train]
        if args.device == 'cuda':  # its allocator counts exactly, so no separate process is needed
            try:
                result[name] = dict(bytes=memory_of(*what))
            except (AssertionError, RuntimeError, Skipped) as e:
                result[name] = dict(skipped=type(e).__name__)
            continue
        command = [sys.executable, __file__, '--device', args.device, '--memory-of', json.dumps(what)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode == 0:
            result[name] = dict(bytes=int(run.stdout.split()[-1]))
        else:
            result[name] = dict(skipped=(run.stderr.strip().splitlines() or ['failed'])[-1][:120])
    return dict(variant=variant, shape=list(shape), precision=precision, contenders=result)


# --- The suite ---

def suite(args):
    """Yield the section, a function that measures and its arguments."""
    quick, cuda = args.quick, args.device == 'cuda'
    names = CUDA if cuda else CPU
    precisions = ('bf16', 'fp16', 'tf32', 'fp32') if cuda else ('fp32', 'bf16') if contenders.has_bf16() else ('fp32',)
    precisions = precisions[:1] if quick else precisions
    batches = (4,) if quick else (64, 256) if cuda else (16,)
    main = 'tiny' if quick else 'small'
    sizes = ((224, 224), (448, 448)) if quick else ((224, 224), (448, 448), (800, 1344))
    train = (2 if quick else 64 if cuda else 8, 3, 224, 224)
    others = () if quick else (args.variants or 'tiny,medium,large').split(',')
    for precision in precisions:
        yield 'peak', peak, precision, args.device, args.clock
        some = [n for n in names if n != 'compiled' or precision in ('bf16', 'fp32')]  # compiling takes half a minute
        few = [n for n in names if n in ('transformers', 'eager', 'fused', 'openvino', 'cuda_graph')]
        for batch in batches:
            yield 'throughput', inference, main, (batch, 3, 224, 224), precision, (
                some if batch < 256 else [n for n in some if n != 'compiled']), args
        for variant in others:
            yield 'throughput', inference, variant, (batches[0], 3, 224, 224), precision, few, args
        for size in sizes:
            yield 'latency', inference, main, (1, 3, *size), precision, some, args
            for variant in () if cuda else others:  # shows for all variants that fused is not slower than plain
                yield 'latency', inference, variant, (1, 3, *size), precision, ['eager', 'fused'], args
        if not cuda:
            for variant in (main,) if quick else (main, 'tiny'):
                yield 'engines', inference, variant, (1, 3, 224, 224), precision, ENGINES, args
                yield 'engines', inference, variant, (batches[0], 3, 224, 224), precision, ENGINES, args
            if not quick:
                yield 'engines', inference, main, (1, 3, 800, 1344), precision, ENGINES, args
        yield 'training', training, main, train, precision, TRAIN_CUDA if cuda else TRAIN, args
    if not cuda and not os.access('/proc/self/clear_refs', os.W_OK):
        return
    keep = [n for n in ('original', 'eager', 'fused', 'openvino', *NOT_PVT) if n in names]
    for precision in precisions:
        for shape in ((1, 3, 448, 448),) if quick else ((batches[0], 3, 224, 224), (1, 3, 800, 1344)):
            yield 'memory', peak_memory, main, shape, precision, keep, args
        yield 'training_memory', peak_memory, main, train, precision, TRAIN_CUDA if cuda else TRAIN, args, True


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='PVT-Tiny, few repetitions')
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--avx2', action='store_true', help='emulate a CPU without AVX-512 and bfloat16')
    parser.add_argument('--threads', type=int, help='threads of each contender (default: all cores)')
    parser.add_argument('--clock', default='wall', choices=list(CLOCKS), help=(
        'cpu: processor time of all threads, which other programs disturb less; only with --threads 1'))
    parser.add_argument('--rounds', type=int, help='times that each contender is timed (default 5, 3 with --quick)')
    parser.add_argument('--pvt-checkout', help='checkout of whai362/PVT (default: $PVT_CHECKOUT)')
    parser.add_argument('--variants', help='comma-separated, in addition to small (default: tiny,medium,large)')
    parser.add_argument('--only', help='sections to run, comma-separated: ' + ','.join(SECTIONS))
    parser.add_argument('--output', type=Path, help='folder (default: results/ here, or a temporary one with --quick)')
    parser.add_argument('--memory-of', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('Expected a GPU for --device cuda, PyTorch sees none.')
    if args.pvt_checkout:
        os.environ['PVT_CHECKOUT'] = args.pvt_checkout
    if args.clock == 'cpu' and (args.threads != 1 or args.device != 'cpu'):
        parser.error('Expected --threads 1 and the CPU with --clock cpu: threads that wait for others count as busy.')
    if args.memory_of:
        print(memory_of(*json.loads(args.memory_of)))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ['OMP_NUM_THREADS'] = str(args.threads)
    args.rounds = args.rounds or (3 if args.quick else 5)
    output = args.output or (Path(tempfile.mkdtemp(prefix='pvt-benchmark-')) if args.quick else HERE / 'results')
    output.mkdir(parents=True, exist_ok=True)

    only = args.only.split(',') if args.only else SECTIONS
    if set(only) - set(SECTIONS):
        parser.error(f'Expected --only to name some of {", ".join(SECTIONS)}, got {args.only!r}.')
    results = dict(machine=machine(args.device), clock=args.clock, gmacs=GMACS, peak=[])
    results.update((section, []) for section in SECTIONS)
    # engines have a separate file, as they may be measured on another machine than the rest
    kind = 'engines' if list(only) == ['engines'] else args.device
    amx = '_amx' if results['machine']['amx'] else ''
    name = kind if kind == 'cuda' else f'{kind}_{results["machine"]["capability"].lower()}{amx}'
    path = output / f'{name}.json'
    if args.only and path.is_file():
        before = json.loads(path.read_text())
        results.update((section, before.get(section, [])) for section in SECTIONS if section not in only)
        if 'throughput' not in only:
            results.update(peak=before['peak'], machine=before['machine'])
    measured_peak = bool(results['peak'])  # then the peak is not measured again: shares of it are those of one run
    for section, measure, *what in suite(args):
        if measured_peak if section == 'peak' else section not in only:
            continue
        result = measure(*what)
        results[section].append(result)
        line = {n: round(c.get('median', c.get('bytes', 0) / 1e6), 1) if 'skipped' not in c else '-'
                for n, c in result['contenders'].items()} if 'contenders' in result else round(result['gflops'])
        print(section, result.get('variant', ''), result.get('shape', ''), result['precision'], line, flush=True)
        save_atomically(path, lambda f: f.write(json.dumps(results, indent=1).encode()))
    import report
    report.report(results, output, name)
    print(f'Written to {output}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
