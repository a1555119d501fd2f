""" Features that not every operating system has. Without them, tests are skipped, and the reason names the feature. """
import os
import signal
import sys
from pathlib import Path

import pytest

try:
    import resource
except ImportError:
    resource = None

needs_posix_shell = pytest.mark.skipif(os.name != 'posix', reason='needs the shell of POSIX')
needs_proc = pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='needs /proc, as Linux has it')
needs_utf8_names = pytest.mark.skipif(
    sys.getfilesystemencoding() != 'utf-8', reason='needs names of files in UTF-8')  # as on Windows
needs_kill = pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='needs the signal SIGKILL')
needs_resource = pytest.mark.skipif(resource is None, reason='needs the module resource')
needs_fcntl = pytest.mark.skipif(sys.platform == 'win32', reason='needs the module fcntl')


def symlink(link: Path, target: Path) -> None:
    """Make a symbolic link. If Windows does not permit it, skip the test."""
    try:
        link.symlink_to(target, target_is_directory=target.is_dir())
    except OSError as e:
        if getattr(e, 'winerror', e.errno) != 1314:
            raise
        pytest.skip('needs symbolic links')


def mkfifo(path: Path) -> None:
    """Make a named pipe. If the system has none, skip the test."""
    if not hasattr(os, 'mkfifo'):
        pytest.skip('needs named pipes')
    os.mkfifo(path)

