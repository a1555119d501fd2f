""" Write a table and plots of run.py's JSON: `python benchmarks/speed/report.py results/cpu_avx2.json`. """
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List

LABELS = dict(
    original='original code', transformers='transformers', eager='ours', fused='ours, fused',
    fused_token='ours, fused, class token only',
    unfused_attention='ours, attention not fused', checkpointed='ours, checkpointing', compiled='ours, compiled',
    pvt_v2='timm pvt_v2 (like size)', resnet50='torchvision ResNet-50', onnxruntime='onnxruntime',
    onnxruntime_export='onnxruntime, our export', onnxruntime_int8='onnxruntime, our int8', openvino='OpenVINO',
    openvino_original='OpenVINO, original code',
    openvino_export='OpenVINO, our export', openvino_any_size='OpenVINO, our export, any size',
    openvino_int8='OpenVINO, our int8',
    channels_last='ours, channels_last', cuda_graph='ours, CUDA graph', sdpa_flash='ours, flash attention',
    sdpa_efficient='ours, efficient attention', sdpa_math='ours, plain attention')
COLOURS = dict(
    original='#999999', transformers='#e69f00', eager='#56b4e9', fused='#d62728', compiled='#0072b2',
    checkpointed='#0072b2', pvt_v2='#cc79a7', resnet50='#b8860b', onnxruntime='#009e73', openvino='#111111',
    onnxruntime_int8='#66c2a5', openvino_original='#777777', openvino_export='#333333', openvino_int8='#9467bd',
    openvino_any_size='#555555', onnxruntime_export='#009e73',
    fused_token='#ff9896', channels_last='#7f7fff', cuda_graph='#d62728', unfused_attention='#009e73',
    sdpa_flash='#2ca02c', sdpa_efficient='#98df8a', sdpa_math='#bcbd22')


def _names(rows):
    seen = {name for row in rows for name in row['contenders']}
    return [name for name in LABELS if name in seen]


def _size(shape):
    return f'{shape[0]}x{shape[2]}' if shape[2] == shape[3] else f'{shape[0]}x{shape[2]}x{shape[3]}'


def _cell(values, key, scale, digits):
    if key not in values:
        return '–'
    text = f'{values[key] * scale:.{digits}f}'
    return text + (f' ±{values["spread"] * 50:.0f}%' if 'spread' in values else '')


def _table(rows, key, scale, digits):
    names = _names(rows)
    lines = ['| | ' + ' | '.join(f'{r["variant"]} {_size(r["shape"])} {r["precision"]}' for r in rows) + ' |']
    lines += ['|---' * (len(rows) + 1) + '|']
    for name in names:
        cells = [_cell(r['contenders'].get(name, {}), key, scale, digits) for r in rows]
        lines += [f'| {LABELS[name]} | ' + ' | '.join(cells) + ' |']
    return lines


INFERENCE = (
    ('fused', 'eager'), ('fused', 'openvino'), ('fused', 'original'), ('eager', 'original'), ('eager', 'transformers'),
    ('eager', 'pvt_v2'), ('eager', 'resnet50'), ('channels_last', 'eager'), ('compiled', 'eager'),
    ('cuda_graph', 'eager'))
TRAINING = (
    ('eager', 'original'), ('eager', 'transformers'), ('unfused_attention', 'original'),
    ('unfused_attention', 'transformers'), ('checkpointed', 'eager'), ('eager', 'pvt_v2'), ('eager', 'resnet50'))
ENGINES = (
    ('openvino_export', 'openvino_original'), ('openvino_export', 'openvino_any_size'),
    ('openvino_int8', 'openvino_export'), ('onnxruntime_int8', 'onnxruntime_export'), ('fused', 'eager'),
    ('fused_token', 'fused'), ('eager', 'original'), ('unfused_attention', 'original'),
    ('fused', 'openvino_original'), ('fused_token', 'openvino_original'), ('fused', 'openvino_export'))
MEMORY = (('fused', 'eager'), ('fused', 'original'), ('eager', 'original'), ('eager', 'pvt_v2'))
PAIRS = dict(
    throughput=INFERENCE, latency=INFERENCE, engines=ENGINES, training=TRAINING, training_memory=TRAINING,
    memory=MEMORY)


def ratios(results) -> list:
    """Return table rows with speed or memory of one model compared with another, by medians of the same run."""
    found = []
    for section, pairs in PAIRS.items():
        key = 'bytes' if 'memory' in section else 'median'
        for row in results.get(section, []):
            values = {name: c[key] for name, c in row['contenders'].items() if key in c}
            where = f'{section.replace("_", " ")} {row["variant"]} {_size(row["shape"])} {row["precision"]}'
            for a, b in pairs:
                if a in values and b in values:
                    ratio = values[b] / values[a]
                    what = f'{ratio:.2f}x the speed' if key == 'median' else f'{1 / ratio:.2f}x the memory'
                    found.append(f'| {where} | {LABELS[a]} against {LABELS[b]} | {what} |')
    return found


def peak_shares(results) -> list:
    """Return (label, shares by model): operations of PVT per second as a share of those of a large matrix product."""
    peaks = {p['precision']: p['gflops'] for p in results['peak']}
    shares = []
    for row in results['throughput']:
        gflop = 2 * results['gmacs'][row['variant']] * row['shape'][0]
        shares.append((f'{row["variant"]} {_size(row["shape"])} {row["precision"]}', {
            name: gflop / (values['median'] / 1e3) / peaks[row['precision']]
            for name, values in row['contenders'].items()
            if 'median' in values and name not in ('pvt_v2', 'resnet50')}))
    return shares


def markdown(results, device) -> str:
    m = results['machine']
    lines = [f'# Results: {device.replace("_", ", ")}', '', 'Written by `run.py`.', '']
    kind = m['capability'] + (', as a CPU with AVX-512 emulates it (`--avx2`)' if m['emulated'] else '')
    load = 'unknown' if m['load'] is None else f'{m["load"]:.1f}'
    lines += [f'{m["gpu"] or m["cpu"]}; {m["cpus"]} CPUs, {m["threads"]} threads, {kind}; load average at '
              f'the start {load}; {m["when"]}.', '']
    if results.get('clock') == 'cpu':
        lines += ['Times are processor time of one thread (`--clock cpu`), other programs ran meanwhile.', '']
    lines += [', '.join(f'{k} {v}' for k, v in m['versions'].items()) + f', Python {m["python"]}.', '']
    lines += ['Measured peak of matrix products: ' + ', '.join(
        f'{p["precision"]} {p["gflops"]:.0f} GFLOP/s' for p in results['peak']) + '.', '']
    ms = 1 if m['gpu'] else 0  # decimals
    table = ratios(results)
    if table:
        lines += ['## Ratios', '', '| where | who | |', '|---|---|---|', *table, '']
    for section, title, key, scale, digits in (
            ('throughput', 'Milliseconds per batch', 'median', 1, ms),
            ('latency', 'Latency by resolution, ms', 'median', 1, ms),
            ('engines', 'Engines, ms', 'median', 1, ms),
            ('training', 'Forward and backward pass, ms', 'median', 1, ms),
            ('memory', 'Peak memory over the loaded model, MB', 'bytes', 1e-6, 0),
            ('training_memory', 'Peak memory of forward and backward pass, MB', 'bytes', 1e-6, 0)):
        if results.get(section):
            lines += [f'## {title}', '']
            lines += ['Medians, ± half of the spread of the middle half of the runs.', ''] if key == 'median' else []
            for precision in dict.fromkeys(r['precision'] for r in results[section]):
                lines += _table([r for r in results[section] if r['precision'] == precision], key, scale, digits) + ['']
    shares = peak_shares(results)
    if shares:
        names = [n for n in LABELS if any(n in s for _, s in shares)]
        lines += ['## Share of the measured peak', '', '| | ' + ' | '.join(label for label, _ in shares) + ' |',
                  '|---' * (len(shares) + 1) + '|']
        lines += [f'| {LABELS[n]} | ' + ' | '.join(f'{s[n]:.0%}' if n in s else '–' for _, s in shares) + ' |'
                  for n in names] + ['']
    return '\n'.join(lines)


@dataclass
class Panel:
    """One chart: a bar for each contender that was measured."""
    title: str
    values: Dict[str, float]
    unit: str
    digits: int = 0


def draw_panels(rows: List[List[Panel]], output: Path) -> None:
    """Draw rows of panels. Every panel has only the models that were measured, so there are no gaps."""
    from matplotlib.figure import Figure

    columns = max(map(len, rows))
    heights = [0.6 + 0.24 * max(len(panel.values) for panel in row) for row in rows]
    figure = Figure(figsize=(4.6 * columns, sum(heights) + 0.2), layout='constrained')
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axes, row in zip(grid, rows):
        for axis, panel in zip(axes, row):
            draw_panel(axis, panel, places=max(len(other.values) for other in row))
        for axis in axes[len(row):]:
            axis.set_axis_off()
    figure.savefig(output, dpi=110)


def draw_panel(axis: Any, panel: Panel, places: int) -> None:
    """Draw horizontal bars in the order of `LABELS`, each with its name and value. There is room for `places` bars."""
    names = [name for name in LABELS if name in panel.values]
    values = [panel.values[name] for name in names]
    bars = axis.barh(range(len(names)), values, color=[COLOURS[name] for name in names], height=0.8)
    axis.bar_label(bars, [f'{value:,.{panel.digits}f}' for value in values], padding=3, fontsize=8)
    axis.set_yticks(range(len(names)), [LABELS[name] for name in names], fontsize=8)
    axis.set_ylim(places - 0.5, -0.5)
    axis.set_xlim(0, 1.18 * max(values, default=1))
    axis.set_xticks([])
    axis.set_title(f'{panel.title}, {panel.unit}', fontsize=9, loc='left')
    axis.spines[['top', 'right', 'bottom']].set_visible(False)
    axis.tick_params('y', length=0)


def panels_of(results: Dict[str, Any]) -> Dict[str, List[List[Panel]]]:
    """Return the charts by name. A chart is rows of panels, one row for each precision."""
    order = list(results['gmacs'])
    digits = 1 if results['machine']['gpu'] else 0  # milliseconds are few there

    def rows(
            section: str, unit: str, value: Callable[[Any, float], float], key: str = 'median', digits: int = 0,
    ) -> List[List[Panel]]:
        found = sorted(
            results.get(section, []),
            key=lambda row: (order.index(row['variant']), row['shape'][2] * row['shape'][3], row['shape'][0]))
        by_precision = []
        for precision in dict.fromkeys(row['precision'] for row in found):
            by_precision.append([
                Panel(
                    f'{row["variant"]} {_size(row["shape"])} {precision}',
                    {name: value(row, c[key]) for name, c in row['contenders'].items() if key in c}, unit, digits)
                for row in found if row['precision'] == precision])
        return by_precision

    charts = dict(
        throughput=rows('throughput', 'images/s', lambda row, ms: row['shape'][0] / ms * 1e3),
        latency=[
            [panel for panel in row if panel.title.startswith('small') or len(panel.values) > 2]
            for row in rows('latency', 'ms', lambda row, ms: ms, digits=digits)],
        engines=rows('engines', 'ms', lambda row, ms: ms, digits=digits),
        training=rows('training', 'ms, forward and backward', lambda row, ms: ms, digits=digits),
        memory=rows('memory', 'MB over the loaded model', lambda row, n: n / 1e6, 'bytes'))
    shares = peak_shares(results)
    charts['peak'] = [
        [Panel(label, {name: 100 * share for name, share in some.items()}, '% of the matrix-product peak')
         for label, some in shares if label.endswith(precision)]
        for precision in dict.fromkeys(label.rpartition(' ')[2] for label, _ in shares)]
    return {name: [row for row in chart if row] for name, chart in charts.items() if any(chart)}


def plots(results: Dict[str, Any], output: Path, device: str) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print('matplotlib is not installed, no plots')
        return
    for name, rows in panels_of(results).items():
        draw_panels(rows, output / f'{device}_{name}.png')


def report(results, output, device) -> None:
    (output / f'{device}.md').write_text(markdown(results, device), encoding='utf-8')
    plots(results, output, device)


if __name__ == '__main__':
    path = Path(sys.argv[1])
    report(json.loads(path.read_text(encoding='utf-8')), path.parent, path.stem)
