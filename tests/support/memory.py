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
    """Yield a function that returns the peak memory since the block began, minus what was in use before.

    Linux counts all memory of the process, and can reset the peak. On other systems, Python counts its own objects.
    `ru_maxrss` is not used: it cannot be reset, so after a test with a high peak it would show nothing.
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
