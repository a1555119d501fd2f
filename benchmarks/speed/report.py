""" Table and plots from the JSON that run.py writes: `python benchmarks/speed/report.py results/cpu_avx2.json`. """
import json
import sys
from pathlib import Path

LABELS = dict(
    original='original code', transformers='transformers', eager='ours', fused='ours, fused',
    unfused_attention='ours, attention not fused', checkpointed='ours, checkpointing', compiled='ours, compiled',
    pvt_v2='timm pvt_v2 (like size)', resnet50='torchvision ResNet-50', onnxruntime='onnxruntime', openvino='OpenVINO',
    channels_last='ours, channels_last', cuda_graph='ours, CUDA graph', sdpa_flash='ours, flash attention',
    sdpa_efficient='ours, efficient attention', sdpa_math='ours, plain attention')
COLOURS = dict(
    original='#999999', transformers='#e69f00', eager='#56b4e9', fused='#d62728', compiled='#0072b2',
    checkpointed='#0072b2', pvt_v2='#cc79a7', resnet50='#b8860b', onnxruntime='#009e73', openvino='#111111',
    channels_last='#7f7fff', cuda_graph='#d62728', unfused_attention='#009e73',
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
MEMORY = (('fused', 'eager'), ('fused', 'original'), ('eager', 'original'), ('eager', 'pvt_v2'))
PAIRS = dict(throughput=INFERENCE, latency=INFERENCE, training=TRAINING, training_memory=TRAINING, memory=MEMORY)


def ratios(results) -> list:
    """How many times faster (or smaller) the first is than the second, by medians of the same run."""
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
    """(label, {contender: share}) of the measured matrix-product peak, nominal operations of PVT over time."""
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
    lines += [f'{m["gpu"] or m["cpu"]}; {m["cpus"]} CPUs, {m["threads"]} threads, {kind}; load average at '
              f'the start {m["load"]:.1f}; {m["when"]}.', '']
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


def _bars(axis, groups, unit):
    """`groups`: list of (label, {contender: value})."""
    names = [n for n in LABELS if any(n in g for _, g in groups)]
    width = 0.85 / max(1, len(names))
    for i, name in enumerate(names):
        at = [(x + (i - (len(names) - 1) / 2) * width, g[name]) for x, (_, g) in enumerate(groups) if name in g]
        axis.bar([x for x, _ in at], [y for _, y in at], width * 0.92, color=COLOURS[name], label=LABELS[name])
    axis.set_xticks(range(len(groups)), [label for label, _ in groups])
    axis.set_ylabel(unit)
    axis.spines[['top', 'right']].set_visible(False)
    axis.grid(axis='y', alpha=.3)
    axis.set_axisbelow(True)


def plots(results, output, device) -> None:
    try:
        import matplotlib
    except ImportError:
        print('matplotlib is not installed, no plots')
        return
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator

    def save(name, figure, axes):
        handles = {}
        for axis in axes:
            handles.update(zip(*reversed(axis.get_legend_handles_labels())))
        figure.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=4, frameon=False, fontsize=9)
        figure.savefig(output / f'{device}_{name}.png', dpi=130)
        plt.close(figure)

    def panels(section, draw, name, height=4.2):
        precisions = list(dict.fromkeys(r['precision'] for r in results[section]))
        if not precisions:
            return
        figure, axes = plt.subplots(
            1, len(precisions), figsize=(6 * len(precisions), height), squeeze=False, layout='constrained')
        for axis, precision in zip(axes[0], precisions):
            draw(axis, [r for r in results[section] if r['precision'] == precision])
            axis.set_title(precision)
        save(name, figure, axes[0])

    order = list(results['gmacs'])

    def bars(unit, key='median', value=lambda row, x: x):
        def draw(axis, rows):
            _bars(axis, [(f'{r["variant"]} {_size(r["shape"])}', {
                n: value(r, c[key]) for n, c in r['contenders'].items() if key in c})
                for r in sorted(rows, key=lambda r: order.index(r['variant']))], unit)
            axis.tick_params('x', labelsize=8)
        return draw

    panels('throughput', bars('images/s', value=lambda row, ms: row['shape'][0] / ms * 1e3), 'throughput')

    def latency(axis, rows):
        rows = sorted((r for r in rows if r['variant'] == 'small'), key=lambda r: r['shape'][2] * r['shape'][3])
        for name in _names(rows):
            points = [(r['shape'][2] * r['shape'][3], c['median'])
                      for r in rows if 'median' in (c := r['contenders'].get(name, {}))]
            if points:
                axis.plot(*zip(*points), 'o-', color=COLOURS[name], label=LABELS[name], ms=4,
                          lw=2.4 if name == 'fused' else 1.4)
        axis.set(xscale='log', yscale='log', xlabel='image size', ylabel='ms per image')
        axis.spines[['top', 'right']].set_visible(False)
        axis.grid(alpha=.3)
        axis.xaxis.set_major_locator(FixedLocator([r['shape'][2] * r['shape'][3] for r in rows]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticklabels([_size(r['shape'])[2:] for r in rows], fontsize=8)
    panels('latency', latency, 'latency')
    panels('training', bars('ms, forward and backward'), 'training')
    panels('memory', bars('MB over the loaded model', 'bytes', lambda row, n: n / 1e6), 'memory')

    shares = peak_shares(results)
    if shares:
        figure, axis = plt.subplots(figsize=(1.6 * len(shares) + 4, 4), layout='constrained')
        axis.tick_params('x', labelsize=8)
        groups = [(label, {n: v * 100 for n, v in share.items()}) for label, share in shares]
        _bars(axis, groups, '% of the measured matrix-product peak')
        save('peak', figure, [axis])


def report(results, output, device) -> None:
    (output / f'{device}.md').write_text(markdown(results, device))
    plots(results, output, device)


if __name__ == '__main__':
    path = Path(sys.argv[1])
    report(json.loads(path.read_text()), path.parent, path.stem)
