""" Start, watch and end runs of timm's train.py, and read their results, for the scripts here and the tests. """
import csv
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

import psutil

ROOT = Path(__file__).parents[2]


def train_script() -> Path:
    """Return timm's train.py, from the checkout that TIMM_CHECKOUT names."""
    checkout = os.environ.get('TIMM_CHECKOUT')
    if not checkout or not Path(checkout, 'train.py').is_file():
        raise SystemExit('Expected TIMM_CHECKOUT to be a checkout of huggingface/pytorch-image-models (for train.py).')
    return Path(checkout).absolute() / 'train.py'


def environment() -> Dict[str, str]:
    env = dict(os.environ, OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', PYTHONWARNINGS='ignore')
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), env.get('PYTHONPATH')]))
    return env


def command(args: Sequence[str], processes: int = 1, max_restarts: int = 0) -> List[str]:
    """Return the command line of `pvt_timm train`, in one process or in several under torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ['-m', 'torch.distributed.run', f'--nproc-per-node={processes}', f'--max-restarts={max_restarts}',
                     '--rdzv-backend=c10d', '--rdzv-endpoint=localhost:0']
    return [*launcher, '-m', 'pvt_timm', 'train', str(train_script()), *map(str, args)]


def run(
        args: Sequence[str],
        processes: int = 1,
        max_restarts: int = 0,
        on_line: Optional[Callable[[str, psutil.Process], None]] = None,
        timeout: float = 600,
) -> str:
    """Run train.py to its end and return what it printed.

    Args:
        args: Arguments of train.py.
        processes: Number of processes.
        max_restarts: How often torchrun restarts them.
        on_line: Called with every line and the started process.
        timeout: Seconds after which all processes are ended.
    """
    process = psutil.Popen(
        command(args, processes, max_restarts), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, bufsize=1)
    lines, end = [], time.monotonic() + timeout
    try:
        for line in process.stdout:
            lines.append(line)
            if on_line is not None:
                on_line(line, process)
            if time.monotonic() > end:
                raise TimeoutError(f'Not done after {timeout} seconds:\n{"".join(lines[-20:])}')
        if process.wait() != 0:
            raise RuntimeError(f'Exit code {process.returncode}:\n{"".join(lines[-400:])}')
    finally:
        end_all(process)
    return ''.join(lines)


def end_all(process: psutil.Popen) -> None:
    """End a process and the processes that it started."""
    if process.is_running():
        children = process.children(recursive=True)
        process.kill()
        for child in children:
            if child.is_running():
                child.kill()
    process.wait()


def worker(process: psutil.Process, rank: int) -> psutil.Process:
    """Return the training process of a rank under torchrun."""
    for child in process.children():
        if child.environ().get('RANK') == str(rank):
            return child
    raise RuntimeError(f'No process of rank {rank}')


def read_summary(folder: Path) -> Dict[int, Dict[str, float]]:
    """Return the rows of a summary.csv by epoch.

    A restart writes the header again and may repeat an epoch. The last row of an epoch is returned.
    """
    rows, header = {}, None
    with open(folder / 'summary.csv', encoding='utf-8', newline='') as f:
        for row in csv.reader(f):
            if row[0] == 'epoch':
                header = row
            else:
                rows[int(row[0])] = {name: float(value) for name, value in zip(header, row)}
    return rows


def read_steps(log: str) -> List[Dict[str, float]]:
    """Return epoch, step, loss (its mean in the epoch so far) and learning rate from train.py's lines."""
    pattern = re.compile(r'Train: (\d+) \[ *(\d+)/(\d+).*?Loss: *\S+ \(([\d.e+-]+|nan)\).*?LR: ([\d.e+-]+)')
    return [
        dict(epoch=int(m[1]), step=int(m[2]), steps=int(m[3]), loss=float(m[4]), lr=float(m[5]))
        for m in pattern.finditer(log)]


def small_copy(source: Path, target: Path, train: int, validation: int) -> Path:
    """Copy the first images of every class of an image folder."""
    for split, count in (('train', train), ('validation', validation)):
        for folder in sorted((source / split).iterdir()):
            (target / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.copy(file, target / split / folder.name)
    return target
