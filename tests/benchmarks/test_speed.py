""" The parts of the benchmark suite that measure nothing: arithmetic, summaries, table and plots. """
import json

import pytest
from PIL import Image

from tests.support.scripts import import_script

report = import_script('speed', 'report')
run = import_script('speed', 'run')


def test_summary():
    assert run.summary([4., 1., 2., 3.]) == dict(median=2.5, min=1., spread=0.4, rounds=4)


def test_emulation_is_not_called_amx(monkeypatch):
    monkeypatch.setattr(run, 'has_amx', lambda: True)
    assert run.machine('cpu')['amx']
    for name, value in run.AVX2.items():
        monkeypatch.setenv(name, value)
    assert not run.machine('cpu')['amx']


def test_report(tmp_path):
    pytest.importorskip('matplotlib')

    def row(shape, **values):
        return dict(variant='small', shape=shape, precision='fp32', contenders={
            name: dict(median=ms, min=ms, spread=0.1, rounds=3) if ms else dict(skipped='not there')
            for name, ms in values.items()})

    results = dict(
        machine=run.machine('cpu'), gmacs=run.GMACS,
        peak=[dict(precision='fp32', size=2048, gflops=200., by={})],
        throughput=[row([16, 3, 224, 224], original=1200., fused=600., resnet50=900., openvino=0)],
        latency=[row([1, 3, 224, 224], original=60., fused=40.), row([1, 3, 800, 1344], original=6000., fused=1500.)],
        training=[row([8, 3, 224, 224], original=1800., eager=1200.)],
        memory=[dict(variant='small', shape=[b, 3, s, s], precision='fp32', contenders=dict(
            original=dict(bytes=b * s * 1e4), fused=dict(bytes=b * s * 2e3)))
            for b, s in ((1, 224), (1, 448), (16, 224))])
    report.report(json.loads(json.dumps(results)), tmp_path, 'cpu_avx2')
    text = (tmp_path / 'cpu_avx2.md').read_text(encoding='utf-8')
    assert '| throughput small 16x224 fp32 | ours, fused against original code | 2.00x the speed |' in text
    assert '| latency small 1x800x1344 fp32 | ours, fused against original code | 4.00x the speed |' in text
    assert '| OpenVINO | – |' in text
    assert '| ours, fused | 102% |' in text  # 16 * 7.64 GFLOP in 0.6 s of 200 GFLOP/s
    pictures = sorted(tmp_path.glob('*.png'))
    assert [p.name for p in pictures] == [
        f'cpu_avx2_{name}.png' for name in ('latency', 'memory', 'peak', 'throughput', 'training')]
    for picture in pictures:
        with Image.open(picture) as image:
            assert min(image.size) > 100, picture.name
            colours = image.convert('RGB').getcolors(1 << 24)
        bars = [(n, colour) for n, colour in colours if len(set(colour)) > 1]  # text and axes are grey
        assert len(bars) > 1 and sum(n for n, _ in bars) > 1000, picture.name


def test_charts_have_no_gaps_and_show_values():
    """A chart has a bar with name and value for each contender that was measured, and no bars for the others."""
    figure = pytest.importorskip('matplotlib.figure')
    row = dict(variant='small', shape=[1, 3, 224, 224], precision='fp32', contenders=dict(
        transformers=dict(median=70.2), eager=dict(median=70.1), openvino=dict(skipped='not there')))
    results = dict(
        machine=dict(gpu=None), gmacs=run.GMACS, peak=[], throughput=[], training=[], memory=[], latency=[row])
    panels = report.panels_of(results)
    assert list(panels) == ['latency']
    (panel,), = panels['latency']
    assert panel.values == dict(transformers=70.2, eager=70.1)
    axis = figure.Figure().subplots()
    report.draw_panel(axis, panel, places=2)
    assert [text.get_text() for text in axis.get_yticklabels()] == ['transformers', 'ours']
    assert [text.get_text() for text in axis.texts] == ['70', '70']
    assert [bar.get_y() + bar.get_height() / 2 for bar in axis.patches] == [0, 1]  # neither hides the other


def test_int8_may_differ_by_more_and_nan_never_passes():
    expected = run.torch.ones(1, 4)
    assert run.check('openvino_int8', 'fp32', [], expected * 1.2, expected) == pytest.approx(0.2)
    for name, out in (('openvino_export', expected * 1.001), ('openvino_int8', expected * float('nan'))):
        with pytest.raises(SystemExit, match=name):
            run.check(name, 'fp32', [], out, expected)
