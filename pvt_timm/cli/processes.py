""" Let the processes of torchrun work as one command: each computes a share, the first one prints messages. """
import contextlib
import datetime
import os
from typing import Any, Callable, Iterator, List, Sequence, TypeVar

import torch.distributed as dist

__all__ = ['ProcessEnded', 'Processes']

T = TypeVar('T')
_TIMEOUT = datetime.timedelta(days=30)  # a process that is done waits for the slowest one


class ProcessEnded(RuntimeError):
    """Raised if another process has ended with an error. That process has printed the error."""


@contextlib.contextmanager
def _naming_the_end_of_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:  # torch's message is about sockets and does not say what happened
        raise ProcessEnded('Another process ended with an error') from e


class Processes:
    """This process and the others that torchrun started. Without torchrun, this process is the only one.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
        local_rank: Number of this process among those on the same machine, from 0.
        local_count: Number of processes on this machine.
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get('WORLD_SIZE', 1))
        self.rank = int(os.environ.get('RANK', 0))
        self.local_rank = int(os.environ.get('LOCAL_RANK', 0))
        self.local_count = int(os.environ.get('LOCAL_WORLD_SIZE', self.count))
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group('gloo', timeout=_TIMEOUT)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> List[T]:
        """Return the part of `items` that this process has to compute."""
        return list(items[self.rank::self.count])

    def gather(self, value: T) -> List[T]:
        """Return the values of all processes. The processes wait for each other.

        Raises:
            ProcessEnded: Another process ended before it gave its value.
        """
        if self.count == 1:
            return [value]
        values: List[Any] = [None] * self.count
        with _naming_the_end_of_others():
            dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` in the first process only, and return its result in all processes.

        An error of `make` ends all processes: it is raised in the first one, and SystemExit in the others.

        Raises:
            SystemExit: In the other processes, if `make` raises an error in the first one.
            ProcessEnded: Another process ended before.
        """
        if self.count == 1:
            return make()
        box: List[Any] = [None, True]
        error = None
        if self.is_first:
            try:
                box = [make(), False]
            except BaseException as e:  # raised below: the other processes must know of it first, or they wait forever
                error = e
        try:
            with _naming_the_end_of_others():
                dist.broadcast_object_list(box)
        except ProcessEnded:
            if error is None:
                raise
        if error is not None:
            raise error
        if box[1]:
            raise SystemExit(2)  # the first process prints the error
        return box[0]

    def __enter__(self) -> 'Processes':
        return self

    def __exit__(self, *error: Any) -> None:
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()
