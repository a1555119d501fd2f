""" Broken and hostile checkpoints: each one gives a right output, or one clear error with exit code 2.

`PVT_FUZZ_CASES=10000 python -m pytest tests/convert/test_convert_fuzz.py` runs 10000 cases. Case n is always the same.
`PVT_FUZZ_FIRST` is the number of the first case. The process may map 2 GB more than at the start.
"""
import argparse
import contextlib
import copy
import functools
import io
import json
import logging
import os
import pickle
import random
import shutil
import struct
import time
import warnings
import zipfile
from collections import Counter, OrderedDict
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from pvt_timm.formats import FORMATS
from pvt_timm.formats.mapping import from_timm
from pvt_timm.files import read_checkpoint
from tests.support import convert_files as files

CASES = int(os.environ.get('PVT_FUZZ_CASES', 200))
FIRST = int(os.environ.get('PVT_FUZZ_FIRST', 0))
SECONDS = 60  # for one case, on a busy machine; a usual one takes less than a tenth
ADDRESSES = 2 * 2 ** 30  # that one case may map over what is there at the start


class Trap:
    """Calls a function when it is unpickled."""
    fired = False

    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


def _spring(*_):
    Trap.fired = True


# ---- mutations of the content ---------------------------------------------------------------------------------------

def rename(r, d, key):
    d[r.choice([key + 'x', key.replace('weight', 'gamma'), key[1:], 'module.' + key, key.replace('1', '9'), '',
                key.replace('0', '00'), key.replace('.', '..', 1), key + '\n', '\x1b[2J' + key, key.upper(),
                '../' * 9 + 'etc/passwd', key.replace('1', '99999999999'), '\ud800' + key])] = d.pop(key)


def remove(r, d, key):
    for k in r.sample(sorted(map(str, d)), r.choice([1, 1, 2, 20, len(d)])):
        d.pop(k, None)


def extra(r, d, key):
    d[r.choice(['what', key + '.more', 'head.scale', 'norm.running_mean', 'dwconv.weight', 'block1.9.norm1.weight',
                'block1.9999.norm1.weight', 'stages.0.patch_embed.proj.weight', 'layers.0.0.projection.weight',
                1, None, 2.5, b'bytes', True])] = r.choice([torch.ones(r.choice([0, 1, 5])), d[key]])


def reshape(r, d, key):
    x = d[key]
    d[key] = r.choice([
        lambda: x[None], lambda: x.flatten(), lambda: x[:0], lambda: x[..., :1], lambda: x[:1].expand_as(x),
        lambda: torch.cat([x, x]), lambda: torch.tensor(1.), lambda: x[..., None], lambda: torch.cat([x, x], -1),
        lambda: x.transpose(0, -1),
        lambda: torch.full(x.shape, r.choice([float('nan'), float('inf'), -0., 131008.]))])()


def cast(r, d, key):
    dtype = r.choice([torch.int64, torch.int8, torch.bool, torch.complex64, torch.float64, torch.float16, torch.uint8])
    for k in [key] if r.random() < .7 else [k for k in d if isinstance(d[k], torch.Tensor)]:
        d[k] = torch.zeros(d[k].shape, dtype=dtype) if dtype == torch.complex64 else d[k].nan_to_num(0, 1, 1).to(dtype)


def replace(r, d, key):
    d[key] = r.choice([None, 3, 'weights', [1, 2], {'a': 1}, (), True, 1.5, b'x', OrderedDict(), 10 ** 30])


def duplicate(r, d, key):
    prefix = r.choice(['module.', 'backbone.', 'model.', 'x.'])
    keys = [k for k in d if isinstance(k, str)] if r.random() < .5 else [key]
    d.update({prefix + k: d[k] for k in keys})


def swap(r, d, key):
    other = r.choice(sorted(map(str, d)))
    d[other], d[key] = d[key], r.choice([d.get(other), d[key]])


CONTENT = [rename, remove, extra, reshape, cast, replace, duplicate, swap]


def structure(r, d):
    """Return an unusual structure that holds a state dict `d`, or something in place of `d`."""
    cycle = {}
    cycle['model'] = cycle
    deep = d
    for _ in range(r.choice([3, 8, 300])):
        deep = {'model': deep}
    return r.choice([
        lambda: list(d.values()), lambda: {'model': None}, lambda: cycle, lambda: deep, lambda: {}, lambda: None,
        lambda: torch.ones(3), lambda: {'model': [d]}, lambda: {'model': d, 'state_dict': {}}, lambda: 'weights',
        lambda: {'model': {'state_dict': d}}, lambda: {'state_dict': d, 'state_dict_ema': {}},
        lambda: {'model': d, 'args': argparse.Namespace(items=1, keys=2)}, lambda: {'a': d, 'b': d},
        lambda: {'model': d, 'sparse': torch.eye(3).to_sparse()}, lambda: {**d, 'set': {1, 2}},
        lambda: {'model': d, 'history': Counter('abc')}, lambda: {'model': d, 'n': 1 << 2000},
        lambda: {'model': d, 'rng': torch.get_rng_state(), 'bytes': b'\xff\x00'},
        lambda: {'model': d, 'lambda': io.StringIO}, lambda: {'model': d, 'at': datetime(2020, 1, 1)},
        lambda: {'model': d, 'top1': np.float64(1), 'names': np.array(['a', 'b'])},
        lambda: {'model': {k: v.numpy() for k, v in d.items()}}, lambda: {'model': d, 'x': np.array([None, d])},
        lambda: {'model_state_dict': d, 'epoch': 3}, lambda: {'net': d, 'decoder': {'x': torch.ones(1)}},
        lambda: {'state_dict': {f'net.encoder.{k}': v for k, v in d.items()} | {'net.decoder.a': torch.ones(2)}},
        lambda: {'model': d, 'args': argparse.Namespace(
            img_size=r.choice([32, 'x', -1, None, 10 ** 9]), mean=r.choice([[.5] * 3, [float('nan')], 'x', np.ones(3)]),
            crop_pct=r.choice([.9, 0, '1', 1e300]), num_classes=r.choice([3, 2.5, 10 ** 30]), interpolation=3)},
        lambda: {'state_dict': d, 'hyper_parameters': {'data': {'input_size': r.choice([(3, 32, 32), (1, 2), 'abc'])},
                                                       'class_names': r.choice([['a', 'b', 'c'], [1], 'abc'])}},
    ])()


def foreign(r, d):
    """Return bytes of a pickle that calls a function when it is loaded."""
    trap = Trap(r.choice([
        (os.system, (f'echo fired >> {os.devnull}',)), (eval, ('1 + 1',)), (exec, ('a = 1',)), (getattr, (d, 'clear')),
        (_spring, ()), (bytearray, (10 ** 12,)), (list, (range(10),)), (torch.zeros, (10 ** 11,)),
        (open, (os.devnull,)), (copy.copy, ([],)),
        (torch.Tensor, (10 ** 11,)), (torch.load, ('x',)), (OrderedDict.fromkeys, ('ab',)),
    ]))
    where = r.choice(['value', 'top', 'wrapped'])
    content = trap if where == 'top' else {'model': d, 'x': trap} if where == 'wrapped' else {**d, 'x': trap}
    if r.random() < .3:
        return pickle.dumps(content, protocol=r.randrange(0, 6))
    f = io.BytesIO()
    torch.save(content, f, _use_new_zipfile_serialization=r.random() < .5)
    return f.getvalue()


# ---- mutations of the bytes -----------------------------------------------------------------------------------------

TEXTS = [
    (b'FloatStorage', b'LongStorage\n'), (b'FloatStorage', b'ByteStorage\n'), (b'cpu', b'cud'),
    (b'_rebuild_tensor_v2', b'_rebuild_tensor_v9'), (b'storage', b'mod\0ule'), (b'torch', b'posix'),
    (b'OrderedDict', b'defaultdict'), (b'data.pkl', b'dat0.pkl'), (b'F32', b'F64'), (b'F32', b'I32'),
    (b'little', b'bigbig'), (b'/data/0', b'/../../'), (b'weight', b'bias\0\0'), (b'K\x01', b'K\x02'),
    (b'"shape":[', b'"shape":[-'), (b'offsets":[', b'offsets":[9')]


def damage(r, data):
    if r.random() < .1:
        for old, new in r.sample(TEXTS, 3):
            data = data.replace(old, new, r.choice([1, -1]))
        return data
    flips = r.random() < .3
    for _ in range(r.choice([1, 1, 1, 2, 8, 64]) if flips else 1):
        n, size = len(data), r.choice([1, 2, 8, 100, 4096])
        # most of what can be wrong is at both ends
        at = r.choice([r.randrange(n), r.randrange(min(n, 4000)), n - 1 - r.randrange(min(n, 4000))])
        number = r.choice([0, 1, 2 ** 31, 2 ** 32 - 1, 2 ** 40, 2 ** 63 - 1, 2 ** 64 - 1])
        start, end, new = (at, at + 1, bytes([data[at] ^ 1 << r.randrange(8)])) if flips else r.choice([
            (at, n, b''), (r.randrange(64), n, b''), (at, at + size, bytes(size)), (at, at + size, data[:size]),
            (at, at, r.randbytes(size)), (at, at + size, b''), (at, at + 8, struct.pack('<Q', number)),
            (n, n, r.choice([data[-200:], r.randbytes(100), bytes(10), data]))])
        data = data[:start] + new + data[end:]
    return data


# ---- cases ----------------------------------------------------------------------------------------------------------

@functools.cache
def base(fmt):
    return files.make(fmt, num_classes=3, fill=files.random_values)


def case(n, folder):
    """Write the file of case `n`. Return the kind of the case, the file, and the arguments of the command."""
    r = random.Random(n)
    d = dict(base(r.choice(files.FORMATS)))
    name = r.choice(['x.pth', 'x.bin', 'x.safetensors', 'x', 'model.safetensors'])
    file = folder / name
    kind = r.choice(['content', 'content', 'structure', 'bytes', 'bytes', 'bytes', 'foreign', 'noise'])
    writer = r.choice(['zip', 'legacy', 'safetensors'])
    prefix = r.choice(['', '', 'module.', 'backbone.'])
    wrapper = r.choice([None, 'model', 'state_dict']) if writer != 'safetensors' else None
    content = files.wrap(d, wrapper, prefix)
    if kind == 'foreign':
        file.write_bytes(foreign(r, d))
    elif kind == 'noise':
        file.write_bytes(r.choice([
            b'', b'\x80\x02', b'PK\x03\x04', b'<html>', r.randbytes(r.randrange(1, 3000)),
            b'\x80\x02' + r.randbytes(300), b'PK\x03\x04' + r.randbytes(300), b'PK\x05\x06' + bytes(18),
            struct.pack('<Q', 2) + b'{}', struct.pack('<Q', 8) + b'{' + r.randbytes(10),
            b'\x1f\x8b' + r.randbytes(20)]))
    else:
        if kind == 'content':
            for _ in range(r.choice([1, 1, 2])):
                tensors = sorted(k for k, v in d.items() if isinstance(k, str) and isinstance(v, torch.Tensor))
                if tensors:
                    r.choice(CONTENT)(r, d, r.choice(tensors))
            content = d
            if r.random() < .5:
                content = {r.choice(['model', 'state_dict', 'model_ema']): content}
        elif kind == 'structure':
            content = structure(r, d)
        f = io.BytesIO()
        if writer == 'safetensors' and kind != 'structure':
            try:
                f.write(save({k: v.contiguous().clone() for k, v in content.items()}))
            except Exception:  # what safetensors cannot hold
                torch.save(content, f)
        else:
            torch.save(content, f, _use_new_zipfile_serialization=writer != 'legacy')
        data = f.getvalue()
        file.write_bytes(damage(r, data) if kind == 'bytes' else data)
    if name == 'model.safetensors' and r.random() < .8:
        (folder / 'config.json').write_text(r.choice([
            '', '{', '[]', '{"model_args": 3}', '{"model_args": {"img_size": [1, 2, 3]}, "pretrained_cfg": []}',
            '{"id2label": {"0": ["a"], "1": "b", "2": null}}', '{"label_names": 5, "num_classes": "many"}', '[' * 10000,
            '{"model_type": "pvt", "hidden_act": 3}', '{"pretrained_cfg": {"mean": ["a"], "std": [NaN, 1, 1]}}',
            '{"num_attention_heads": [1, 2]}', '{"label_names": ["a", "b", "\\ud800"]}', '{"image_size": 1e99}',
            '{"model_type": "pvt", "layer_norm_eps": "x", "pretrained_cfg": {"license": "`|\\n---", "crop_pct": 1e9}}',
        ]), encoding='utf-8')
    argv = [str(file)]
    if r.random() < .15:
        argv += r.choice([['--no-ema'], ['--prefix', 'backbone'], ['--model', 'test_pvt'], ['--dtype', 'float16'],
                          ['--num-classes', '0'], ['--img-size', '48']])
    return kind, file, argv


def repacked(file):
    """Return the bytes of a file. A zip archive is written again, from its records.

    zipfile compares the checksums of the records. torch uses the header of a record without a checksum: if this header
    is damaged, torch returns other numbers than those of the record.
    """
    content = io.BytesIO(file.read_bytes())
    if not zipfile.is_zipfile(content):
        content.seek(0)
        return content
    anew = io.BytesIO()
    with zipfile.ZipFile(content) as before, zipfile.ZipFile(anew, 'w') as after:
        for record in before.infolist():
            if not record.filename.endswith('.storage_alignment'):  # which the new archive does not have
                after.writestr(record.filename, before.read(record))
    anew.seek(0)
    return anew


def loaded(file):
    """Return the content of a file, read by libraries without any checks. A trap in the file goes off."""
    if file.read_bytes()[8:9] == b'{':
        return load_file(file)
    try:
        # by content: torch >= 2.14 goes by the name where it gets one
        return torch.load(repacked(file), map_location='cpu', weights_only=False)
    except ValueError:  # a damaged pickle protocol, which torch's own reader overlooks
        return read_checkpoint(file)


def check_output(file, out, report):
    """Check that the output holds the same bits as the input."""
    content = loaded(file)
    for wrapper in report['wrappers']:
        content = content[wrapper]
    prefix = report['prefix']
    for key, value in list(content.items()):  # weights may be in dicts under other names
        content.update({f'{key}.{k}': v for k, v in value.items()} if isinstance(value, dict) else {})
    inner = {k[len(prefix):]: v for k, v in content.items() if isinstance(k, str) and k.startswith(prefix)}
    inner = {k: v for k, v in inner.items() if FORMATS[report['format']].start.match(k)}
    if report['format'] == 'transformers' and any(k.startswith('encoder.') for k in inner):
        inner = {k if k.startswith('classifier.') else f'pvt.{k}': v for k, v in inner.items()}
    found = load_file(out / 'model.safetensors')
    if (out / 'class_row.safetensors').exists():
        row = load_file(out / 'class_row.safetensors')['pos_embed4.class_row']
        found['stages.3.pos_embed'] = torch.cat([row, found['stages.3.pos_embed']], 1)
    back, _ = from_timm(found, report['format'])
    assert files.same(back, inner)
    assert json.loads((out / 'config.json').read_text())['architecture'] == 'test_pvt'


def run_case(n, folder):
    """Run case `n`. Return the kind of the case, and the exit code."""
    folder.mkdir()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            kind, file, argv = case(n, folder)
            before = sorted(p.name for p in folder.iterdir())
            start = time.monotonic()
            warnings.simplefilter('error')  # a warning would be a second line
            code, out, err = files.run(*argv, '--output', folder / 'out', '--json')
        assert time.monotonic() - start < SECONDS
        after = sorted(p.name for p in folder.iterdir())
        if code == 0:
            assert err == '' and after == sorted([*before, 'out'])
            if not {'--dtype', '--num-classes', '--img-size'} & set(argv):
                check_output(file, folder / 'out', json.loads(out))
        else:
            assert (code, out, after) == (2, '', before)
            assert err.startswith('pvt-convert: error: ') and len(err) > 36 and err[:-1].isprintable(), err
        assert not Trap.fired
        return kind, code
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def limited_memory(addresses: int):
    """Limit the addresses that this process may add, on systems that can do so."""
    try:
        import resource
        mapped = int(Path('/proc/self/statm').read_text(encoding='ascii').split()[0]) * resource.getpagesize()
    except (ImportError, FileNotFoundError):  # Windows, and /proc is Linux's
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + addresses, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.timeout(0)
def test_every_case_ends_well(tmp_path):
    for fmt in files.FORMATS:
        base(fmt)
    run_case(FIRST, tmp_path / 'warm-up')
    ends = Counter()
    logging.disable(logging.WARNING)
    try:
        with limited_memory(ADDRESSES):
            for n in range(FIRST, FIRST + CASES):
                ends[run_case(n, tmp_path / 'case')] += 1
    except Exception as e:
        raise AssertionError(f'case {n}: {type(e).__name__}: {e}') from e
    finally:
        logging.disable(logging.NOTSET)
    print(dict(sorted(ends.items())))
    if CASES >= 100:
        assert {kind for kind, code in ends if code == 2} == {'content', 'structure', 'bytes', 'foreign', 'noise'}
        assert {kind for kind, code in ends if code == 0} >= {'content', 'structure', 'bytes'}
