""" Measures the peak memory of a piece of code. """
import contextlib
import os
import tracemalloc
from typing import Callable, Iterator

CLEAR = '/proc/self/clear_refs'


def _kilobytes(name: str) -> int:
    with open('/proc/self/status', encoding='ascii') as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name))


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """A function that returns the most bytes that were taken since the block began, beyond those taken before.

    Linux counts all memory of the process, and forgets its earlier peak on request. Elsewhere Python counts its own
    objects. `ru_maxrss` would not do: it is the largest size ever, so after a test that takes much it bounds nothing.
    """
    if os.path.exists(CLEAR):
        with open(CLEAR, 'w', encoding='ascii') as f:
            f.write('5')
        before = _kilobytes('VmRSS')
        yield lambda: (_kilobytes('VmHWM') - before) * 1024
        return
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
