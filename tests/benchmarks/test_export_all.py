""" The table of benchmarks/reliability/export_all.py says on which machine each case ran. """
from tests.support.scripts import import_script

export_all = import_script('reliability', 'export_all')


def row(target, **more):
    return dict(
        kind='classifier', variant='tiny', target=target, half=False, differences={'1x224x224': 1e-6, '2x64x64': 3e-6},
        alone=2e-6, alone_on='1x3x224x224', seconds=2.1, bytes=52_900_000, **more)


def test_machines_of_the_cases():
    here = export_all.machine('cpu')
    later = dict(here, load=9., when='another day')  # the same machine
    text = export_all.markdown(dict(a=row('onnx', machine=here), b=row('openvino', machine=later)))
    assert f'\nMachine: {here["cpu"]}; {here["cpus"]} CPUs' in text and f'torch {here["versions"]["torch"]}' in text
    assert '\n| pvt_tiny classifier | onnx |  | 3e-06 | 2e-06 | 2 | 52.9 |\n' in text

    refused = dict(kind='retinanet', variant='tiny', target='torch', half=False, refused='refused by name')
    text = export_all.markdown(dict(a=row('onnx'), b=row('openvino', machine=here), c=refused))
    assert '\n1. Machine: not recorded\n2. Machine: ' in text
    assert '| onnx |  | 3e-06 | 2e-06 | 2 | 52.9 | 1 |\n' in text
    assert '| openvino |  | 3e-06 | 2e-06 | 2 | 52.9 | 2 |\n' in text
    assert len({line.count('|') for line in text.splitlines() if line.startswith('|')}) == 1
