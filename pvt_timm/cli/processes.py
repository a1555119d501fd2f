""" The processes that torchrun starts, as one command: each takes its share, the first one says and writes. """
import contextlib
import datetime
import os
from typing import Any, Callable, Iterator, List, Sequence, TypeVar

import torch.distributed as dist

__all__ = ['ProcessEnded', 'Processes']

T = TypeVar('T')
_TIMEOUT = datetime.timedelta(days=30)  # a process that is done waits for the slowest one


class ProcessEnded(RuntimeError):
    """Another process has ended, with an error of its own that it has printed."""


@contextlib.contextmanager
def _naming_the_end_of_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:  # about sockets, which tells nobody what happened
        raise ProcessEnded('Another process ended with an error') from e


class Processes:
    """This process among those of torchrun, or the only one.

    Attributes:
        rank: Number of this process.
        count: How many there are.
        local_rank: Number of this process among those of the machine.
        local_count: How many of them the machine has.
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
        """The part of `items` that belongs to this process."""
        return list(items[self.rank::self.count])

    def gather(self, value: T) -> List[T]:
        """The values of all processes. They wait for each other.

        Raises:
            ProcessEnded: One of them ended before.
        """
        if self.count == 1:
            return [value]
        values: List[Any] = [None] * self.count
        with _naming_the_end_of_others():
            dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, in all of them. What it raises ends them all.

        Raises:
            SystemExit: In the others, where the first one raises.
            ProcessEnded: One of the others ended before.
        """
        if self.count == 1:
            return make()
        box: List[Any] = [None, True]
        error = None
        if self.is_first:
            try:
                box = [make(), False]
            except BaseException as e:  # the others would wait for ever
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
            raise SystemExit(2)  # the first one says why
        return box[0]

    def __enter__(self) -> 'Processes':
        return self

    def __exit__(self, *error: Any) -> None:
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()
