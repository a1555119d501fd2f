""" Ways to run the command line, and timm's train.py. """
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pvt_timm.cli.main import main


# what commands with images say on stderr when all went well
DONE = re.compile(r'pvt-timm: [\d,]+ images? on \w+(:\d+)? \(float32[^\n]*\)[^\n]*\n')


@pytest.fixture
def cli(capsys):
    """Return a function that runs a command in this process and returns its stdout.

    With `fails=True` the command has to fail, and the function returns the one line on stderr.
    """
    def run(*argv, fails=False):
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        if not fails:
            assert (code, DONE.sub('', err, count=1)) == (0, '')
            return out
        assert (code, out, err.count('\n')) == (2, '', 1) and err.startswith('pvt-timm'), err
        return err
    return run


@pytest.fixture
def python(client_env, tmp_path):
    """Return a function that runs Python in a separate process, in the folder of the test."""
    def run(*args, **env):
        return subprocess.run(
            [sys.executable, *map(str, args)], cwd=tmp_path, env={**client_env, 'OMP_NUM_THREADS': '1', **env},
            capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    return run


@pytest.fixture(scope='session')
def train_py():
    """Return the path of timm's train.py, which is not in timm's package. Without a checkout, skip the test."""
    file = Path(os.environ.get('TIMM_CHECKOUT', 'none'), 'train.py')
    if not file.is_file():
        pytest.skip('TIMM_CHECKOUT is not set to a checkout of huggingface/pytorch-image-models (for its train.py)')
    return file
