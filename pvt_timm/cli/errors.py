""" The one place that turns an exception into a command's line on stderr and its exit code. """
import argparse
import http.client
import io
import os
import pickle
import sys
from typing import Any, Callable, NoReturn, Optional, Tuple, Type

from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

__all__ = ['EXPECTED', 'Parser', 'clean', 'one_line', 'run_command']


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
        self.exit(2, f'{self.prog}: error: {message} (see {self.prog} --help)\n')


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


def run_command(prog: str, command: Callable[[], Optional[int]]) -> int:
    """Run a command of the program `prog`. An error of the package itself passes through, with its traceback.

    Returns:
        What the command returns or 0, 2 after an error that the user can put right, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may hold what the terminal cannot show
            stream.reconfigure(errors='backslashreplace')
    try:
        code = command()
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except EXPECTED as e:
        print(f'{prog}: error: {one_line(e)}', file=sys.stderr)
        return 2
