""" Run every target of `pvt-timm export` for every variant: differences from PyTorch, time and size of the file.

    python benchmarks/reliability/export_all.py                                 # results/export.json and export.md
    python benchmarks/reliability/export_all.py --variants tiny --targets onnx,openvino --kinds classifier,retinanet

Weights are random. `export` compares each file with PyTorch at three sizes. Then the file's runtime reads it once more,
in a process without this package, on images of another size. Cases that are in the results are not run again, so a run
that was stopped continues where it was. `--again` runs them again. Every case keeps the machine that it ran on.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Tuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks' / 'speed')]

import timm  # noqa: E402
import pvt_timm  # noqa: E402, F401
from pvt_timm.detection import pvt_retinanet  # noqa: E402
from pvt_timm.export import TARGETS, comparing, export  # noqa: E402
from pvt_timm.export.comparing import TOLERANCE  # noqa: E402
from pvt_timm.export.graphs import make_graph, reference_of  # noqa: E402
from pvt_timm.files import save_atomically  # noqa: E402
from run import machine  # noqa: E402
from tests.support.runtimes import read_alone  # noqa: E402

VARIANTS = ('tiny', 'small', 'medium', 'large')
KINDS = ('classifier', 'features', 'retinanet')


def make_model(kind: str, variant: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == 'classifier':
        return timm.create_model(f'pvt_{variant}').eval()
    if kind == 'features':
        return timm.create_model(f'pvt_{variant}', class_token=False, num_classes=0, global_pool='avg').eval()
    model = pvt_retinanet(f'pvt_{variant}')
    for module in model.head.modules():  # scores that differ, as those of a trained detector do
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return model.eval()


def run_case(kind: str, variant: str, target: str, half: bool) -> Dict[str, Any]:
    """Export a model, and read it without this package."""
    model = make_model(kind, variant)
    features = kind == 'features'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f'model{TARGETS[target].suffix}'
        done = export(model, target, path, features=features, half=half)
        graph = make_graph(model, features, half=half)
        if kind == 'retinanet':
            x = graph.example(1, 360, 480)
        else:
            x = torch.randn((2, 3, 192, 256) if TARGETS[target].dynamic else (1, 3, 224, 224))
        with torch.no_grad():
            expected = reference_of(model, graph, features)(x)
        actual = read_alone(target, path, x, Path(folder))
    return dict(
        kind=kind, variant=variant, target=target, half=half,
        differences={'x'.join(map(str, size)): value for size, value in done.differences.items()},
        alone=_difference(actual, expected, kind, x), alone_on='x'.join(map(str, x.shape)),
        seconds=round(done.seconds, 1), bytes=done.bytes, machine=machine('cpu'))


def _difference(actual: Any, expected: Any, kind: str, x: torch.Tensor) -> float:
    """Return the largest difference as a share of the largest value, infinity if an object is in one list only."""
    if kind != 'retinanet':
        return max((a - e).abs().max().item() / max(1., e.abs().max().item()) for a, e in zip(actual, expected))
    lists = [[output.float() for output in outputs] for outputs in (actual, expected)]
    lowest = max(outputs[1].min().item() for outputs in lists) + comparing.AT_THE_END
    found = [comparing.distance(*some, lowest, max(x.shape), TOLERANCE) for some in (lists, lists[::-1])]
    return max(float('inf') if missing else distance for distance, missing in found)


def describe_machine(row: Dict[str, Any]) -> str:
    if 'machine' not in row:
        return 'not recorded'
    m = row['machine']
    limit = ' (limited to it)' if m['emulated'] else ''
    versions = ', '.join(f'{name} {version}' for name, version in m['versions'].items())
    return f'{m["cpu"]}; {m["cpus"]} CPUs, {m["threads"]} threads, {m["capability"]}{limit}; {m["system"]}; {versions}'


def markdown(results: Dict[str, Dict[str, Any]]) -> str:
    """Return the table. If the cases ran on several machines, it has a column with their numbers."""
    ran = [row for row in results.values() if 'refused' not in row]
    machines = list(dict.fromkeys(map(describe_machine, ran)))
    several = len(machines) > 1
    lines = [
        '# Exports', '',
        'Written by `benchmarks/reliability/export_all.py`. Differences from PyTorch are shares of the largest value',
        "(boxes: of an image's longer side), the largest of three sizes. `alone` is the same on images of another",
        'size, read by the runtime in a process without this package. The machine did other work meanwhile.', '',
        *(f'{f"{n}. " * several}Machine: {machine}' for n, machine in enumerate(machines, 1)), '',
        '| model | target | half | largest difference | alone | seconds | MB |' + ' machine |' * several,
        '|---|---|---|---:|---:|---:|---:|' + '---:|' * several]
    for row in results.values():
        name = f'| pvt_{row["variant"]} {row["kind"]} | {row["target"]} | {"yes" if row["half"] else ""} |'
        if 'refused' in row:
            lines.append(f'{name} {row["refused"]} | | | |' + ' |' * several)
            continue
        largest = max(row['differences'].values())
        number = f' {machines.index(describe_machine(row)) + 1} |' if several else ''
        lines.append(
            f'{name} {largest:.0e} | {row["alone"]:.0e} | {row["seconds"]:.0f} | {row["bytes"] / 1e6:.1f} |{number}')
    return '\n'.join(lines) + '\n'


def cases(args: argparse.Namespace) -> Any:
    for variant in args.variants.split(','):
        for kind in args.kinds.split(','):
            for target in args.targets.split(','):
                for half in (False, True) if args.half else (False,):
                    yield kind, variant, target, half


def _key(case: Tuple[str, str, str, bool]) -> str:
    kind, variant, target, half = case
    return f'{variant} {kind} {target}' + (' half' if half else '')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--variants', default=','.join(VARIANTS))
    parser.add_argument('--kinds', default=','.join(KINDS))
    parser.add_argument('--targets', default=','.join(TARGETS))
    parser.add_argument('--half', action='store_true', help='also export in half precision')
    parser.add_argument('--again', action='store_true', help='also run the cases that are in the results')
    parser.add_argument('--output', type=Path, default=ROOT / 'benchmarks' / 'results')
    args = parser.parse_args()
    path = args.output / 'export.json'
    results = json.loads(path.read_text()) if path.is_file() else {}
    for case in cases(args):
        key = _key(case)
        if key in results and not args.again:
            continue
        kind, variant, target, half = case
        if kind == 'retinanet' and not TARGETS[target].detectors:
            results[key] = dict(kind=kind, variant=variant, target=target, half=half, refused='refused by name')
        else:
            results[key] = run_case(*case)
        print(key, results[key], flush=True)
        save_atomically(path, lambda f: f.write(json.dumps(results, indent=1).encode()))
        (args.output / 'export.md').write_text(markdown(results), encoding='utf-8')


if __name__ == '__main__':
    main()
