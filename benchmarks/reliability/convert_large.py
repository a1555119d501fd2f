""" Time and memory of converting PVT-Large, compared with copying its file.

    python benchmarks/reliability/convert_large.py [--repeats 5] [--output results.json]

Each measurement runs in a separate process. 'start-up' imports what the converter imports. 'copy' reads the file,
writes its bytes and syncs them to the disk, as the converter does with its output. The result is checked before a time
is reported.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]

_MAKE = '''
import sys, torch, timm, pvt_timm
from safetensors.torch import save_file
from pvt_timm.formats.mapping import from_timm
torch.manual_seed(0)
model = timm.create_model('pvt_large')
torch.save(from_timm(model.state_dict(), 'original')[0], sys.argv[1] + '/original.pth')
save_file({k: v.contiguous() for k, v in from_timm(model.state_dict(), 'transformers')[0].items()},
          sys.argv[1] + '/transformers.safetensors', metadata={'format': 'pt'})
'''
_MEASURE = '''
import json, resource, shutil, sys, time
job, source, target = sys.argv[1:]
start = time.perf_counter()
if job == 'copy':
    import os
    with open(source, 'rb') as f:
        data = f.read()
    with open(target, 'wb') as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
else:
    import weights_conversion.converter
    loaded = time.perf_counter()
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if job == 'convert':
        weights_conversion.converter.convert(source, target)
    print(json.dumps({'start-up': loaded - start, 'work': time.perf_counter() - loaded, 'base': base * 1024,
                      'peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
    sys.exit()
print(json.dumps({'work': time.perf_counter() - start}))
'''
_CHECK = '''
import sys, torch
from pvt_timm.formats.mapping import from_timm
from pvt_timm.files import read_checkpoint
source, target, fmt = sys.argv[1:]
found, expected = from_timm(read_checkpoint(target), fmt)[0], read_checkpoint(source)
assert found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())
'''


def _python(code, *args):
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, (str(_ROOT), os.environ.get('PYTHONPATH'))))}
    done = subprocess.run([sys.executable, '-c', code, *map(str, args)], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout) if done.stdout.strip() else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--output', help='JSON file for the figures')
    args = parser.parse_args()
    results = {'machine': platform.platform(), 'cpus': os.cpu_count(), 'python': platform.python_version()}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        _python(_MAKE, folder)
        for source, fmt in ((folder / 'original.pth', 'original'),
                            (folder / 'transformers.safetensors', 'transformers')):
            copies, runs = [], []
            for n in range(args.repeats):
                copies.append(_python(_MEASURE, 'copy', source, folder / 'copy')['work'])
                runs.append(_python(_MEASURE, 'convert', source, folder / f'{fmt}{n}'))
            _python(_CHECK, source, folder / f'{fmt}0', fmt)
            size = source.stat().st_size
            copy, work, start = (statistics.median(x) for x in (
                copies, [r['work'] for r in runs], [r['start-up'] for r in runs]))
            added, peak = (statistics.median(x) for x in (
                [r['peak'] - r['base'] for r in runs], [r['peak'] for r in runs]))
            results[fmt] = {
                'bytes': size, 'copy_s': copy, 'start_up_s': start, 'convert_s': work, 'time_ratio': work / copy,
                'total_ratio': (start + work) / (start + copy), 'peak_bytes': peak, 'added_bytes': added,
                'peak_ratio': peak / size, 'added_ratio': added / size}
            print(f'{fmt}: {size / 1e6:.0f} MB, copy {copy:.2f} s, start-up {start:.2f} s, convert {work:.2f} s '
                  f'({work / copy:.2f}x the copy; {(start + work) / (start + copy):.2f}x with start-up), peak memory '
                  f'{peak / 1e6:.0f} MB, over start-up {added / 1e6:.0f} MB ({added / size:.2f}x the file)', flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
