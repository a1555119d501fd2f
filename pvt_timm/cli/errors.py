""" Turn an exception into the one line that a command prints on stderr, and into its exit code. """
import argparse
import contextlib
import http.client
import io
import logging
import logging.handlers
import os
import pickle
import sys
import traceback
import warnings
from typing import Any, Callable, Iterator, NoReturn, Optional, Tuple, Type

from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

__all__ = ['EXPECTED', 'Parser', 'clean', 'filled', 'one_line', 'run_command']


# Errors that libraries raise because of files, networks and arguments. The error of the hub's client derives from the
# errors of its HTTP client, which is another library in other versions. All these base classes are added, because
# errors of the connection derive from them too.
EXPECTED: Tuple[Type[BaseException], ...] = (
    ValueError, OSError, RuntimeError, AssertionError, MemoryError, ImportError,
    SafetensorError, pickle.UnpicklingError, http.client.HTTPException,
    *(kind for kind in HfHubHTTPError.__mro__ if kind not in (Exception, BaseException, object)),
)


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {clean(message, 1000)} (see {self.prog} --help)\n')


def filled(text: str) -> str:
    """Return the value of an option. An empty value is refused: in a shell it is often a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError('expected a value, got an empty one')
    return text


def clean(text: Any, limit: int = 300) -> str:
    """Return text of unknown origin as one line of at most `limit` characters, without control characters."""
    text = str(text)[:4 * limit]
    text = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
    return text if len(text) <= limit else text[:limit - 3] + '...'


def one_line(error: BaseException, limit: int = 1000) -> str:
    """Return the message of an exception as one line."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f'{error.strerror}: {error.filename}'
    return clean(' '.join(text.split()), limit)


def run_command(prog: str, command: Callable[[], Optional[int]], debug: bool = False) -> int:
    """Run a command of the program `prog`.

    For an error that the user can correct (one of `EXPECTED`), one line is printed on stderr, and nothing before it.
    Warnings are printed at the end, if there is no error. With `debug`, or the environment variable PVT_TIMM_DEBUG,
    warnings and the traceback come before the line. Any other error is a fault of this package and is raised.

    Returns:
        What the command returns, or 0 if that is None. 2 after an error that the user can correct, 130 after Ctrl-C.
    """
    debug = debug or os.environ.get('PVT_TIMM_DEBUG', '0') not in ('', '0')
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # the shell has closed it. The next file to be opened would take its number.
            setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # a file name may have characters that the terminal cannot show
            stream.reconfigure(errors='backslashreplace')
    try:
        with _warnings_at_the_end(prog, debug):
            code = command()
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head`
        _drop_stdout()
        return 0
    except EXPECTED as e:
        if debug:
            for line in traceback.format_exc().splitlines():
                print(clean(line, 1000), file=sys.stderr)
        print(f'{prog}: error: {one_line(e)}', file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # a full disk
            _drop_stdout()
        return 2


def _drop_stdout() -> None:
    """Discard the rest of stdout. Otherwise Python reports the error once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _warnings_at_the_end(prog: str, always: bool) -> Iterator[None]:
    """Hold back messages of Python's warnings and logging, and print them on stderr after the block, a line each.

    After an error they are printed only with `always`. If an application has set up logging, it is not changed.
    """
    root = logging.getLogger()
    held = logging.handlers.BufferingHandler(capacity=sys.maxsize)
    held.setLevel(logging.WARNING)
    if not root.handlers:
        root.addHandler(held)
    failed = True
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
        failed = False
    finally:
        root.removeHandler(held)
        if always or not failed:
            for line in (*(str(w.message) for w in caught), *(record.getMessage() for record in held.buffer)):
                print(f'{prog}: warning: {clean(line, 1000)}', file=sys.stderr)
