""" The one place that turns an exception into a command's line on stderr and its exit code. """
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


# What files, networks and arguments make the libraries raise. The hub's error derives from that of the HTTP client
# in use, which changes with its version and is the base of the transport errors too.
EXPECTED: Tuple[Type[BaseException], ...] = (
    ValueError, OSError, RuntimeError, AssertionError, MemoryError, ImportError,
    SafetensorError, pickle.UnpicklingError, http.client.HTTPException,
    *(kind for kind in HfHubHTTPError.__mro__ if kind not in (Exception, BaseException, object)),
)


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {clean(message, 1000)} (see {self.prog} --help)\n')


def filled(text: str) -> str:
    """The value of an option, which is refused when it is empty, as that of a variable that is not set in a shell."""
    if not text:
        raise argparse.ArgumentTypeError('expected a value, got an empty one')
    return text


def clean(text: Any, limit: int = 300) -> str:
    """Text from elsewhere as one line that cannot change a terminal."""
    text = str(text)[:4 * limit]
    text = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
    return text if len(text) <= limit else text[:limit - 3] + '...'


def one_line(error: BaseException, limit: int = 1000) -> str:
    """What an exception says, in one line."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f'{error.strerror}: {error.filename}'
    return clean(' '.join(text.split()), limit)


def run_command(prog: str, command: Callable[[], Optional[int]], debug: bool = False) -> int:
    """Run a command of the program `prog`.

    An error that the user can put right is one line on stderr, with nothing before it: warnings are shown when the
    command has ended without one. With `debug`, or the environment variable PVT_TIMM_DEBUG, warnings and the traceback
    come before the line. Another error is a mistake of the package, which passes through.

    Returns:
        What the command returns or 0, 2 after an error that the user can put right, 130 after Ctrl-C.
    """
    debug = debug or os.environ.get('PVT_TIMM_DEBUG', '0') not in ('', '0')
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # closed by the shell, and the next file to be opened would take its place
            setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # a file name may hold what the terminal cannot show
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
    """Let the rest of stdout go nowhere, so that Python does not report it again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _warnings_at_the_end(prog: str, always: bool) -> Iterator[None]:
    """Hold back what Python's warnings and logging would write to stderr, and show it after the block, a line each.

    After an error it is shown only with `always`. Logging that an application has set up is left alone.
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
