"""`pvt-timm embed`: one vector per image, and every image once, also after crashes and with several processes."""
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from pvt_timm.cli import many
from pvt_timm.cli import results as results_module
from pvt_timm.cli.main import main
from pvt_timm.cli.predict import PREDICTIONS
from pvt_timm.cli.processes import ProcessEnded, Processes
from pvt_timm.cli.results import Results, file_state
from pvt_timm.detection import pvt_retinanet
from tests.support.systems import needs_fcntl, needs_kill, needs_resource, needs_utf8_names

TEST_PVT = ['--model', 'test_pvt']
SUFFIXES = ['.npz', '.safetensors', '.parquet']


def write_images(folder, count, size=64):
    """Write images of noise into two folders that have the same file names, and return their paths."""
    rng = np.random.default_rng(0)
    for i in range(count):
        file = folder / 'ab'[i % 2] / f'{i // 2}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size + i % 3, 3), dtype=np.uint8)).save(file)
    return sorted(folder.rglob('*.png'), key=lambda file: (file.parent.name, int(file.stem)))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    write_images(folder, 24)
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    """Make parts hold only a few images, so that a small test has several parts."""
    monkeypatch.setattr(results_module, '_PART_IMAGES', 5)
    monkeypatch.setattr(results_module, '_CHUNK', 7)


def read(path):
    """Return the names of the files and the vectors in an output of `embed`."""
    if path.suffix == '.npz':
        with np.load(path) as content:
            return content['file'].tolist(), content['embedding']
    if path.suffix == '.safetensors':
        with safe_open(path, 'numpy') as f:
            return json.loads(f.metadata()['file']), f.get_tensor('embedding')
    table = pytest.importorskip('pyarrow.parquet').read_table(path)
    assert table.column_names == ['file', 'embedding']
    return table['file'].to_pylist(), np.array(table['embedding'].to_pylist(), np.float32)


def in_python(files, **kwargs):
    """Return the outputs of timm's model for images, which are computed one by one."""
    model = timm.create_model('test_pvt', pretrained=True, num_classes=0, **kwargs).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        return torch.cat([model(transform(Image.open(file).convert('RGB'))[None]) for file in files]).numpy()


@pytest.fixture(scope='module')
def expected(images):
    files = sorted(images.rglob('*.png'), key=lambda file: (file.parent.name, int(file.stem)))
    return [str(file) for file in files], in_python(files)


def check(path, expected):
    files, vectors = read(path)
    assert files == expected[0]
    assert vectors.dtype == np.float32 and np.abs(vectors - expected[1]).max() < 1e-5
    assert not path.with_name(path.name + '.parts').exists()


@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize('workers', [0, 2])
def test_vectors_are_those_of_timm(cli, images, expected, small_parts, tmp_path, suffix, workers):
    if suffix == '.parquet':
        pytest.importorskip('pyarrow')
    output = tmp_path / f'x{suffix}'
    out = cli('embed', images, *TEST_PVT, '--output', output, '--workers', workers, '--batch-size', 5)
    assert out == f'{output}: 24 vectors, token of test_pvt.digits\n'
    check(output, expected)
    assert [file.name for file in tmp_path.iterdir()] == [output.name]


def test_layers(cli, images, expected, tmp_path):
    model = timm.create_model('test_pvt', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    x = torch.stack([transform(Image.open(file).convert('RGB')) for file in expected[0]])
    with torch.inference_mode():
        tokens, maps = model.forward_features(x), model.forward_intermediates(x, intermediates_only=True)
    layers = {'token': tokens[:, 0], 'patches': tokens[:, 1:].mean(1)}
    layers.update({f'stage{i}': level.mean((2, 3)) for i, level in enumerate(maps)})
    for layer, vectors in layers.items():
        cli('embed', images, *TEST_PVT, '--layer', layer, '--output', tmp_path / f'{layer}.npz')
        check(tmp_path / f'{layer}.npz', (expected[0], vectors.numpy()))


@pytest.mark.parametrize('kwargs, layer', [(dict(class_token=False), 'patches'), (dict(global_pool='avg'), 'patches')])
def test_default_is_what_the_head_takes(cli, images, expected, tmp_path, kwargs, layer):
    """By default, `embed` writes the vector that the head of the model takes as its input.

    This is tested with a dense checkpoint and with a classifier that pools.
    """
    model = timm.create_model('test_pvt', num_classes=3, **kwargs)
    torch.save(dict(state_dict=model.state_dict(), args=dict(model='test_pvt', gp=kwargs.get('global_pool'))),
               tmp_path / 'w.pth')
    out = cli('embed', images, '--checkpoint', tmp_path / 'w.pth', '--output', tmp_path / 'x.npz')
    assert layer in out
    model.reset_classifier(0)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model.eval()))
    x = torch.stack([transform(Image.open(file).convert('RGB')) for file in expected[0]])
    with torch.inference_mode():
        check(tmp_path / 'x.npz', (expected[0], model(x).numpy()))
    token = ['embed', images, '--checkpoint', tmp_path / 'w.pth', '--output', tmp_path / 't.npz', '--layer', 'token']
    if 'global_pool' in kwargs:  # the class token, although the head does not take it
        cli(*token)
        with torch.inference_mode():
            check(tmp_path / 't.npz', (expected[0], model.forward_features(x)[:, 0].numpy()))
    if 'class_token' in kwargs:
        assert 'has none' in cli('embed', images, '--checkpoint', tmp_path / 'w.pth', '--output', tmp_path / 'y.npz',
                                 '--layer', 'token', fails=True)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_dtypes(images, expected, tmp_path, capsys, dtype):
    assert main(['embed', str(images), *TEST_PVT, '--output', str(tmp_path / 'x.npz'), '--dtype', dtype, '--device',
                 'cpu']) == 0
    assert f'24 images on cpu ({dtype}' in capsys.readouterr().err
    files, vectors = read(tmp_path / 'x.npz')
    error = np.abs(vectors - expected[1]).max() / np.abs(expected[1]).max()
    assert 0 < error < 0.05 and files == expected[0]  # computed in half precision, and close


def interrupt_after(monkeypatch, count):
    """Raise KeyboardInterrupt, as Ctrl-C does, after `count` results. Return the list of the files that are done."""
    add = Results.add
    kept = []

    def adding(self, file, row, state):
        if len(kept) == count:
            raise KeyboardInterrupt
        kept.append(file)
        add(self, file, row, state)

    monkeypatch.setattr(Results, 'add', adding)
    return kept


def test_goes_on_and_computes_nothing_twice(cli, images, expected, small_parts, tmp_path, monkeypatch):
    argv = ['embed', images, *TEST_PVT, '--output', tmp_path / 'x.npz', '--batch-size', 4]
    with monkeypatch.context() as patch:
        kept = interrupt_after(patch, 14)
        assert main([str(arg) for arg in argv]) == 130
    assert not (tmp_path / 'x.npz').exists()
    assert len(list((tmp_path / 'x.npz.parts').glob('*.safetensors'))) == 3  # of 5, 5 and 4
    computed = interrupt_after(monkeypatch, -1)
    cli(*argv)
    check(tmp_path / 'x.npz', expected)
    assert sorted(kept + computed) == sorted(expected[0])


@pytest.mark.parametrize('change, says', [
    (['--layer', 'patches'], 'of a run with other settings (layer)'),
    (['--dtype', 'bfloat16'], 'of a run with other settings (dtype)'),
    (['--img-size', '64'], 'of a run with other settings (preprocessing)'),
    (['--checkpoint', '{tmp}/w.pth'], 'of a run with other settings (model, weights)'),
    (None, 'results of 7 images that are not given now'),
])
def test_does_not_go_on_with_something_else(cli, images, small_parts, tmp_path, monkeypatch, change, says):
    argv = [images, '--output', tmp_path / 'x.npz']
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        assert main(['embed', *map(str, argv), *TEST_PVT]) == 130
    before = sorted(file.name for file in (tmp_path / 'x.npz.parts').iterdir())
    torch.save(timm.create_model('test_pvt').state_dict(), tmp_path / 'w.pth')
    if change is None:
        argv[0], change = images / 'b', []
    change = [arg.format(tmp=tmp_path) for arg in change]
    model = [] if '--checkpoint' in change else TEST_PVT
    assert says in cli('embed', *argv, *model, *change, fails=True)
    assert sorted(file.name for file in (tmp_path / 'x.npz.parts').iterdir()) == before


def test_nothing_of_others_is_touched(cli, images, expected, tmp_path):
    """If the output exists, or FILE.parts holds other files, the command refuses and changes nothing."""
    (tmp_path / 'x.npz').write_text('mine')
    argv = ['embed', images, *TEST_PVT, '--output', tmp_path / 'x.npz']
    assert 'add --overwrite, which replaces the file' in cli(*argv, fails=True)
    (tmp_path / 'x.npz.parts').mkdir()
    (tmp_path / 'x.npz.parts' / 'notes').write_text('mine')
    assert 'holds files that are not results' in cli(*argv, '--overwrite', fails=True)
    assert (tmp_path / 'x.npz').read_text() == (tmp_path / 'x.npz.parts' / 'notes').read_text() == 'mine'
    (tmp_path / 'x.npz.parts' / 'notes').unlink()
    cli(*argv, '--overwrite')
    check(tmp_path / 'x.npz', expected)


def test_a_damaged_part_is_named(cli, images, small_parts, tmp_path, monkeypatch):
    argv = ['embed', images, *TEST_PVT, '--output', tmp_path / 'x.npz']
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        main([str(arg) for arg in argv])
    part = next((tmp_path / 'x.npz.parts').glob('*.safetensors'))
    part.write_bytes(part.read_bytes()[:100])
    error = cli(*argv, fails=True)
    assert f'{part} is damaged' in error and part.is_file()


def test_images_that_cannot_be_read(cli, tmp_path, capsys, caplog):
    """An image that cannot be read ends the command. With --skip-errors it is named and counted.

    In both cases no incomplete output is left.
    """
    files = write_images(tmp_path / 'images', 100, size=32)
    files[60].write_bytes(b'no image')
    argv = ['embed', tmp_path / 'images', *TEST_PVT, '--output', tmp_path / 'x.npz', '--workers', 0]
    error = cli(*argv, fails=True)
    assert f'Cannot read the image {files[60]}' in error and '--skip-errors' in error and 'x.npz.parts' in error
    assert not (tmp_path / 'x.npz').exists()
    capsys.readouterr()
    assert main([str(arg) for arg in (*argv, '--skip-errors')]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f'{tmp_path}/x.npz: 99 vectors')
    assert '1 could not be read' in err and err.count('\n') == 1
    assert len(caplog.messages) == 1 and f'Cannot read the image {files[60]}: ' in caplog.messages[0]
    left = [file for file in files if file != files[60]]
    check(tmp_path / 'x.npz', ([str(file) for file in left], in_python(left)))


@pytest.mark.parametrize('options', [[], ['--skip-errors']])
def test_nothing_is_left_where_no_image_can_be_read(options, cli, tmp_path, capsys):
    (tmp_path / 'a.png').write_text('no image')
    code = main(['embed', str(tmp_path / 'a.png'), *TEST_PVT, '--output', str(tmp_path / 'x.npz'), *options])
    assert code == 2 and capsys.readouterr().err.count('\n') == 1
    assert [file.name for file in tmp_path.iterdir()] == ['a.png']


@needs_utf8_names
def test_odd_names(cli, images, tmp_path):
    """Unusual file names are written unchanged. In Parquet, bytes that are not text are escaped."""
    names = ['a b.png', 'a\nb.png', 'drei 三.png', 'x\udcff.png', '=1+1.png', '"quoted", too.png']
    (tmp_path / 'odd').mkdir()
    for name in names:
        (tmp_path / 'odd' / name).write_bytes((images / 'a' / '0.png').read_bytes())
    for suffix in SUFFIXES:
        if suffix == '.parquet':
            pytest.importorskip('pyarrow')
        cli('embed', tmp_path / 'odd', *TEST_PVT, '--output', tmp_path / f'x{suffix}')
        found = sorted(os.path.basename(file) for file in read(tmp_path / f'x{suffix}')[0])
        if suffix == '.parquet':
            names = [name.replace('\udcff', '\\udcff') for name in names]
        assert found == sorted(names)


def test_one_image_given_twice_is_there_once(cli, images, tmp_path):
    file = images / 'a' / '3.png'
    cli('embed', file, images / 'a', file, *TEST_PVT, '--output', tmp_path / 'x.npz')
    files = read(tmp_path / 'x.npz')[0]
    assert len(files) == len(set(files)) == 12 and files[0] == str(file)


@pytest.mark.parametrize('argv, says', [
    (['--output', '{tmp}/x.csv'], 'ends in .parquet, .npz, .safetensors'),
    (['--output', '{tmp}/none/x.npz'], 'No such folder'),
    (['--output', '{tmp}/x.npz', '--device', 'nonsense'], "got --device 'nonsense'"),
    (['--output', '{tmp}/x.npz', '--device', 'meta'], "got --device 'meta'"),
    (['--output', '{tmp}/x.npz', '--batch-size', '0'], "expected a whole number from 1, got '0'"),
    (['--output', '{tmp}/x.npz', '--workers', '-1'], "expected a whole number from 0, got '-1'"),
    ([], 'required: --output'),
])
def test_wrong_options(cli, images, tmp_path, argv, says):
    argv = [arg.format(tmp=tmp_path) for arg in argv]
    assert says in cli('embed', images, *TEST_PVT, *argv, fails=True)
    assert not list(tmp_path.iterdir())


def test_weights_are_not_replaced(cli, images, tmp_path):
    save_file(timm.create_model('test_pvt').state_dict(), tmp_path / 'w.safetensors')
    before = (tmp_path / 'w.safetensors').read_bytes()
    argv = ['embed', images, '--checkpoint', tmp_path / 'w.safetensors', '--output', tmp_path / 'w.safetensors']
    assert 'is read and would be replaced' in cli(*argv, '--overwrite', fails=True)
    assert (tmp_path / 'w.safetensors').read_bytes() == before


def test_parquet_names_its_extra(cli, images, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split('.')[0] == 'pyarrow'] + ['pyarrow']:
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'pvt-timm[embed]'" in cli(
        'embed', images, *TEST_PVT, '--output', tmp_path / 'x.parquet', fails=True)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_memory_does_not_grow_with_the_images(tmp_path, suffix):
    """20,000 vectors of 512 numbers (41 MB) are written with only a part of them in memory."""
    if suffix == '.parquet':
        pytest.importorskip('pyarrow')
    small = Results(tmp_path / f'small{suffix}')  # what libraries import when they first write is not counted
    small.prepare(['a.png'], {})
    small.add('a.png', np.zeros(512, np.float32), [])
    small.flush()
    small.finish(['a.png'], {})
    results = Results(tmp_path / f'x{suffix}')
    files = [f'{i}.png' for i in range(20000)]
    results.prepare(files, {})
    tracemalloc.start()
    row = np.zeros(512, np.float32)
    for i, file in enumerate(files):
        results.add(file, row + i, [10 ** 7, 10 ** 18 + i])
    results.flush()
    assert results.finish(files, {}) == 20000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 35e6, peak  # 16 parts of a MB, and the index of the names
    found, vectors = read(tmp_path / f'x{suffix}')
    assert found == files and np.array_equal(vectors[:, 7], np.arange(20000))


KILLED = '''if True:
    import os, pathlib, signal, socket, sys
    from pvt_timm.cli import embed, results  # once for all processes, which are forked
    from pvt_timm.cli.main import main

    results._PART_IMAGES = 4
    flush, parts = results.Results.flush, []

    def flush_and_die(self):
        flush(self)
        parts.append(None)
        if len(parts) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def command(rank, processes, port):
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes),
            MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        if rank == processes - 1 and processes > 1:
            results.Results.flush = flush_and_die
        return main(sys.argv[2:])

    def launch(processes):
        with socket.create_server(('127.0.0.1', 0)) as server:
            port = server.getsockname()[1]
        pids = set()
        for rank in range(processes):
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    code = command(rank, processes, port)
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            pids.add(pid)
        failed = False
        while pids:
            pid, status = os.wait()
            pids.remove(pid)
            if status and not failed:  # as torchrun does
                failed = True
                for other in pids:
                    os.kill(other, signal.SIGTERM)
        return failed

    for processes in map(int, sys.argv[1].split(',')):
        failed = launch(processes)
        done = results.Results(pathlib.Path('x.npz'))._index().rows
        print('launched', processes, 'failed' if failed else 'ended', len(done), pathlib.Path('x.npz').exists())
        sys.stdout.flush()
'''


@needs_kill
def test_killed_and_gone_on_by_other_numbers_of_processes(python, tmp_path):
    """Runs with two, three and one processes share one output. In the first two, a process is killed.

    The result holds every image once, in order.
    """
    files = write_images(tmp_path / 'images', 72, size=32)
    argv = ['embed', 'images', *TEST_PVT, '--output', 'x.npz', '--batch-size', '4', '--workers', '0']

    done = python('-c', KILLED, '2,3,1', *argv)
    launched = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith('launched')]
    two, three = int(launched[0][2]), int(launched[1][2])
    assert launched == [
        ['2', 'failed', str(two), 'False'], ['3', 'failed', str(three), 'False'], ['1', 'ended', '0', 'True']], done
    assert 8 <= two and two + 8 <= three < 72  # the one that was killed had written two parts of 4 each time
    assert 'x.npz: 72 vectors' in done.stdout
    left = 72 - three  # the others were there
    assert f'pvt-timm: {left} image{"s" * (left > 1)} on cpu' in done.stderr
    check(tmp_path / 'x.npz', ([str(file.relative_to(tmp_path)) for file in files], in_python(files)))


def test_two_processes(client_env, images, expected, tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '-m', 'pvt_timm', 'embed',
         images, *TEST_PVT, '--output', 'x.npz', '--batch-size', '4', '--workers', '0'],
        cwd=tmp_path, env=dict(client_env, OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == 'x.npz: 24 vectors, token of test_pvt.digits\n', done.stderr
    assert 'pvt-timm: 24 images on cpu' in done.stderr and '2 processes' in done.stderr
    check(tmp_path / 'x.npz', expected)


FULL = '''if True:
    import resource, sys
    from pvt_timm.cli.main import main
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    sys.exit(main(sys.argv[1:]))
'''


@needs_resource
def test_full_disk(python, images, tmp_path):
    """If the disk is full, the command prints one line and leaves no file."""
    done = python('-c', FULL, 'embed', images, *TEST_PVT, '--output', 'x.npz', '--workers', 0)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1), done.stderr
    assert 'File too large' in done.stderr and not list(tmp_path.iterdir())


# results --------------------------------------------------------------------------------------------------------------

def start_results(output, files, count, settings=None, table=None):
    """Write the results of the first `count` images as a part, and return the `Results`."""
    results = Results(output, table)
    results.prepare(files, settings or {})
    for file in files[:count]:
        results.add(file, np.ones(3, np.float32) if table is None else {}, file_state(file))
    results.flush()
    return results


def test_missing_results_are_no_unreadable_images(tmp_path):
    files = ['a', 'b', 'c']
    results = start_results(tmp_path / 'x.npz', files, 2)
    with pytest.raises(ValueError, match='lacks the results of 1 images, and only 0 .* run the same command again'):
        results.finish(files, {})
    assert not (tmp_path / 'x.npz').exists() and len(results._part_files()) == 1
    assert results.finish(files, {}, unreadable=1) == 2
    assert read(tmp_path / 'x.npz')[0] == ['a', 'b'] and not results.folder.exists()


def test_a_part_that_was_deleted_meanwhile(cli, images, expected, small_parts, tmp_path, monkeypatch):
    """If a part is deleted during a run, the command reports it. The next run computes these images again."""
    finish = Results.finish

    def finish_without_a_part(self, *args):
        self._part_files()[0].unlink()
        return finish(self, *args)

    argv = ['embed', images, *TEST_PVT, '--output', tmp_path / 'x.npz']
    with monkeypatch.context() as patch:
        patch.setattr(Results, 'finish', finish_without_a_part)
        assert 'lacks the results of' in cli(*argv, fails=True)
    assert not (tmp_path / 'x.npz').exists()
    cli(*argv)
    check(tmp_path / 'x.npz', expected)


def test_several_processes_leave_the_folder(tmp_path):
    """With several processes, `close_early` keeps FILE.parts, as another process may still write into it.

    A later run continues from this folder.
    """
    results = start_results(tmp_path / 'x.npz', ['a'], 0)
    results.close_early(alone=False)
    results.close()
    assert (results.folder / 'settings.json').is_file()
    again = Results(tmp_path / 'x.npz')
    assert again.prepare(['a'], {}) == ['a']
    again.close_early(alone=True)
    assert not list(tmp_path.iterdir())


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path):
    results = start_results(tmp_path / 'x.npz', ['a'], 1)
    (tmp_path / 'x.npz').write_text('mine')
    with pytest.raises(ValueError, match='add --overwrite, which replaces the file'):
        results.finish(['a'], {})
    assert (tmp_path / 'x.npz').read_text() == 'mine' and len(results._part_files()) == 1


@needs_fcntl
def test_only_one_run_at_a_time(client_env, tmp_path, monkeypatch):
    """A second run with the same output is refused until the first run ends, even if the first one is killed."""
    script = ('from pathlib import Path; from pvt_timm.cli.results import Results; results = Results(Path("x.npz")); '
              'results.prepare(["a"], {}); print("ready", flush=True); input()')
    with subprocess.Popen(
            [sys.executable, '-c', script], cwd=tmp_path, env=client_env, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'ready\n'
        with pytest.raises(ValueError, match='is in use by another run'):
            Results(tmp_path / 'x.npz').prepare(['a'], {})
        other.kill()
    monkeypatch.chdir(tmp_path)
    results = Results(tmp_path / 'x.npz')
    assert results.prepare(['a'], {}) == ['a']
    results.close()


def test_the_same_relative_paths_elsewhere_are_other_images(tmp_path, monkeypatch):
    start_results(tmp_path / 'x.npz', ['a'], 1).close()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r'of a run with other settings \(working_directory\)'):
        Results(tmp_path / 'x.npz').prepare(['a'], {})


@pytest.mark.parametrize('output', ['x.npz', 'x.jsonl'])
@pytest.mark.parametrize('change', ['later', 'earlier', 'size', 'gone'])
def test_an_image_that_was_changed_is_refused(tmp_path, output, change):
    """An image that was replaced is refused, also by an older file as with `cp -p`, or by one with the same time."""
    files = [str(tmp_path / 'a.png'), str(tmp_path / 'b.png')]
    for file in files:
        Path(file).write_text('before')
    table = None if output == 'x.npz' else PREDICTIONS
    start_results(tmp_path / output, files, 2, table=table).close()
    again = Results(tmp_path / output, table)
    assert again.prepare(files, {}) == []
    again.close()
    changed = os.stat(files[1]).st_mtime_ns + {'later': 5 * 10 ** 9, 'earlier': -10 ** 12}.get(change, 0)
    if change == 'size':
        Path(files[1]).write_text('longer than before')
    os.utime(files[1], ns=(changed, changed))
    if change == 'gone':
        os.unlink(files[1])
    with pytest.raises(ValueError, match='b.png was changed after its result was computed'):
        Results(tmp_path / output, table).prepare(files, {})


def test_an_image_that_is_changed_while_it_is_computed_is_refused(cli, images, tmp_path, monkeypatch):
    """An image counts as it was before it was read. So a change between then and the end of its part is noticed."""
    file = tmp_path / 'a.png'
    file.write_bytes(next(images.rglob('*.png')).read_bytes())
    opened = many.open_image

    def open_and_change(path, *args):
        image = opened(path, *args)
        os.utime(path, (1, 1))
        return image

    def interrupted(*args):
        raise KeyboardInterrupt

    argv = ['embed', file, *TEST_PVT, '--output', tmp_path / 'x.npz']
    with monkeypatch.context() as patch:
        patch.setattr(many, 'open_image', open_and_change)
        patch.setattr(Results, 'finish', interrupted)
        assert main(list(map(str, argv))) == 130
    assert 'a.png was changed after its result was computed' in cli(*argv, fails=True)


def test_files_of_others_are_no_parts(tmp_path):
    results = start_results(tmp_path / 'x.npz', ['a'], 1)
    save_file({'mine': torch.zeros(1)}, results.folder / 'mine.safetensors')
    assert results.finish(['a'], {}) == 1
    assert [file.name for file in results.folder.iterdir()] == ['mine.safetensors']


def test_a_run_that_was_killed_while_it_began_is_gone_on_from(tmp_path):
    folder = tmp_path / 'x.npz.parts'
    folder.mkdir()
    (folder / 'lock').touch()
    (folder / ('.settings.json-' + '0' * 32)).touch()
    results = start_results(tmp_path / 'x.npz', ['a'], 1)
    assert results.finish(['a'], {}) == 1 and not folder.exists()


def test_header_of_safetensors(tmp_path, monkeypatch):
    """The limit of the header counts its length as written. A name that is not valid text can be written."""
    files = ['"' * 50]
    monkeypatch.setattr(results_module, '_LARGEST_HEADER', 150)  # the names are 104 bytes as JSON, 208 as JSON in JSON
    with pytest.raises(ValueError, match='too many for the header'):
        Results(tmp_path / 'x.safetensors').prepare(files, {})
    monkeypatch.undo()
    results = start_results(tmp_path / 'x.safetensors', files, 1)
    results.finish(files, {'model': 'x\udcff'})
    with safe_open(tmp_path / 'x.safetensors', 'numpy') as f:
        assert f.metadata() == {'model': 'x\\udcff', 'file': json.dumps(files)}


@pytest.mark.parametrize('change', [
    dict(embed_norm_eps=1e-3), dict(num_heads=(2, 2, 2, 2)), dict(global_pool='avg')])
def test_settings_of_a_model_beside_its_weights(change):
    usual = timm.create_model('test_pvt')
    changed = timm.create_model('test_pvt', **change)
    assert results_module.settings_of(usual) == results_module.settings_of(timm.create_model('test_pvt').eval())
    assert results_module.settings_of(usual) != results_module.settings_of(changed)


def test_settings_of_a_detector_beside_its_weights():
    def settings(**kwargs):
        return results_module.settings_of(pvt_retinanet('test_pvt', 3, pretrained_backbone=False, **kwargs))

    assert settings(min_size=64, max_size=96) == settings(min_size=64, max_size=96)
    different = [dict(min_size=32), dict(max_size=128), dict(image_mean=[0.] * 3), dict(score_thresh=0.5)]
    assert len({settings(**change) for change in (*different, {})}) == 5


def test_parts_of_another_format_are_refused(tmp_path):
    """Parts in the format 1 do not say which size and time of change an image had."""
    results = start_results(tmp_path / 'x.npz', ['a'], 1)
    results.close()
    marker = results.folder / 'settings.json'
    marker.write_text(json.dumps(dict(json.loads(marker.read_text()), format=1)))
    with pytest.raises(ValueError, match=r'of a run with other settings \(format\): remove it to start anew'):
        Results(tmp_path / 'x.npz').prepare(['a'], {})


def test_another_version_does_not_go_on(tmp_path, monkeypatch):
    start_results(tmp_path / 'x.npz', ['a'], 1).close()
    monkeypatch.setattr(results_module, '__version__', '99')
    with pytest.raises(ValueError, match=r'of a run with other settings \(version\)'):
        Results(tmp_path / 'x.npz').prepare(['a'], {})


def test_the_end_of_another_process_is_named(monkeypatch):
    def closed(*args):
        raise RuntimeError('[../gloo/transport/tcp/pair.cc:534] Connection closed by peer')

    monkeypatch.setattr(torch.distributed, 'all_gather_object', closed)
    monkeypatch.setattr(torch.distributed, 'broadcast_object_list', closed)
    processes = Processes()
    processes.count = 2
    for wait in (lambda: processes.gather(1), lambda: processes.from_first(lambda: 1)):
        with pytest.raises(ProcessEnded, match='^Another process ended with an error$'):
            wait()
    with pytest.raises(ZeroDivisionError):  # its own error says more
        processes.from_first(lambda: 1 / 0)


def test_help_and_empty_output(cli, images):
    text = ' '.join(cli('embed', '--help').split())
    assert 'torchrun' in text and 'where the model has one' in text
    assert 'expected a value, got an empty one' in cli('embed', images, *TEST_PVT, '--output', '', fails=True)
