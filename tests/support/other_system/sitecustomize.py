""" Hides from the code of this repository what Windows does not have. Python runs this file when it starts.

`__main__.py` puts this folder on PYTHONPATH, so it is also used in processes that tests start. Nothing is hidden from
libraries: Python's own `subprocess`, for example, needs `signal.SIGKILL` on Linux. So each look-up checks which code
made it.
"""
import builtins
import os
import posixpath
import sys
import sysconfig
import types

MODULES = {'resource', 'fcntl', 'grp', 'pty', 'pwd', 'syslog', 'termios', 'tty'}
ATTRIBUTES = {
    'os': {
        'chown', 'fork', 'forkpty', 'getegid', 'geteuid', 'getgid', 'getloadavg', 'getpgid', 'getuid', 'killpg',
        'mkfifo', 'mknod', 'nice', 'openpty', 'pathconf', 'pipe2', 'posix_spawn', 'register_at_fork',
        'sched_getaffinity', 'setpgid', 'setsid', 'setuid', 'statvfs', 'sync', 'sysconf', 'uname', 'wait', 'waitid',
    },
    'signal': {
        'SIGALRM', 'SIGBUS', 'SIGCHLD', 'SIGCONT', 'SIGHUP', 'SIGKILL', 'SIGPIPE', 'SIGQUIT', 'SIGSTOP', 'SIGUSR1',
        'SIGUSR2', 'SIGXCPU', 'SIGXFSZ', 'alarm', 'pause', 'pthread_kill', 'setitimer', 'sigwait',
    },
    'time': {'tzset'},
}
VALUES = {'os': {'name': 'nt'}, 'sys': {'platform': 'win32'}}  # what tests and the package may ask for
FOLDERS = ('/proc/', '/dev/')
_MSVCRT = types.ModuleType('msvcrt')  # what the package takes of a module that Windows alone has
_MSVCRT.LK_NBLCK, _MSVCRT.locking = 2, lambda file, mode, count: None

_LIBRARIES = tuple({sys.prefix, sys.base_prefix, sys.exec_prefix, *(
    sysconfig.get_paths()[name] for name in ('stdlib', 'platstdlib', 'purelib', 'platlib'))})
_PASSED_ON = {
    'genericpath', 'io', 'os', 'pathlib', 'pathlib._abc', 'pathlib._local', 'pathlib._os', 'posixpath', __name__}


def _is_ours(namespace):
    """Return whether code with these globals is from the repository, or is a program that a test gives to `-c`."""
    if namespace is None:
        return False
    file = namespace.get('__file__')
    if file is None:
        return namespace.get('__name__') == '__main__'
    return not os.path.abspath(file).startswith(_LIBRARIES)


def _asked_by_us():
    """Return whether our code asks for a file. Functions that only pass a path on are skipped."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get('__name__') in _PASSED_ON:
        frame = frame.f_back
    return frame is not None and _is_ours(frame.f_globals)


class _Without(types.ModuleType):
    """A module without some names, or with other values of them. Patches by tests go to the real module."""

    def __init__(self, module):
        super().__init__(module.__name__)
        _own(self)['module'] = module

    def __getattribute__(self, name):
        module = _own(self)['module']
        if name in ATTRIBUTES.get(module.__name__, ()):
            raise AttributeError(f'module {module.__name__!r} has no attribute {name!r} on this system', name=name)
        values = VALUES.get(module.__name__, {})
        return values[name] if name in values else getattr(module, name)

    def __setattr__(self, name, value):
        setattr(_own(self)['module'], name, value)

    def __delattr__(self, name):
        delattr(_own(self)['module'], name)

    def __dir__(self):
        module = _own(self)['module']
        return [name for name in dir(module) if name not in ATTRIBUTES.get(module.__name__, ())]


def _own(without):
    """Return the attributes of the `_Without` itself, without the look-up in its module."""
    return types.ModuleType.__getattribute__(without, '__dict__')


def _hide_modules():
    plain = builtins.__import__
    changed = {name: _Without(__import__(name)) for name in {*ATTRIBUTES, *VALUES}}

    def import_(name, globals=None, locals=None, fromlist=(), level=0):
        if level or not _is_ours(globals):
            return plain(name, globals, locals, fromlist, level)
        first = name.partition('.')[0]
        if first == 'msvcrt':
            return _MSVCRT
        if first in MODULES:
            raise ModuleNotFoundError(f'No module named {first!r} on this system', name=first)
        module = plain(name, globals, locals, fromlist, level)
        return changed.get(getattr(module, '__name__', None), module)

    builtins.__import__ = import_


def _hide_files():
    def hidden(path):
        try:
            return os.fsdecode(path).startswith(FOLDERS)
        except TypeError:  # the number of an open file
            return False

    def refuse(path):
        if hidden(path) and _asked_by_us():
            raise FileNotFoundError(2, 'No such file or directory on this system', os.fsdecode(path))

    def opened(event, args):
        if event == 'open' and args[0] is not None:
            refuse(args[0])

    def stat(path, *args, **kwargs):
        refuse(path)
        return plain_stat(path, *args, **kwargs)

    def exists(path):
        return not (hidden(path) and _asked_by_us()) and plain_exists(path)

    plain_stat, plain_exists = os.stat, posixpath.exists
    sys.addaudithook(opened)
    os.stat, posixpath.exists = stat, exists


def _hide_links():
    def symlink(src, dst, target_is_directory=False, *, dir_fd=None):
        raise OSError(1314, 'A required privilege is not held by the client', os.fsdecode(src), None, os.fsdecode(dst))

    os.symlink = symlink


_hide_files()
_hide_links()
_hide_modules()
