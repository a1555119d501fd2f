""" Batches for training and for evaluation, which do not depend on the number of processes. """
from typing import Any, Iterator, List, Optional, Tuple

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

__all__ = ['Augmented', 'Batches', 'EpochSampler', 'Share']


class EpochSampler(Sampler):
    """Yields the images of one epoch for one process: the index of each image and the seed of its transforms.

    All epochs together are one stream: all images in a random order, then all images in another random order, and so
    on. An epoch is the next `steps * images_per_step` images of the stream, so every step is full. The processes take
    the images of an epoch in turn. The images of an epoch do not depend on the number of processes, or on interruptions
    of the training.
    """

    def __init__(self, size: int, steps: int, images_per_step: int, seed: int, process: int = 0, processes: int = 1):
        """
        Args:
            size: Number of images.
            steps: Steps of an epoch.
            images_per_step: Images per step in all processes together.
            seed: Seed of the random orders and of the transforms.
            process: Number of this process, from 0.
            processes: Number of processes.
        """
        self.size, self.seed = size, seed
        self.images = steps * images_per_step
        self.process, self.processes = process, processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.images // self.processes

    def __iter__(self) -> Iterator[Tuple[int, int]]:
        order: List[int] = []
        order_of = -1
        start = self.epoch * self.images
        for place in range(start + self.process, start + self.images, self.processes):
            round_, index = divmod(place, self.size)
            if round_ != order_of:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + round_)
                order, order_of = torch.randperm(self.size, generator=generator).tolist(), round_
            yield order[index], self.seed * 1_000_003 + place


class Augmented(Dataset):
    """Transformed items of a data set. An item is read by its index and a seed for the random part of its transform."""

    def __init__(self, dataset: Any, transform: Any):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index_and_seed: Tuple[int, int]) -> Any:
        index, seed = index_and_seed
        item = self.dataset[index]
        with torch.random.fork_rng(devices=[]):  # the model uses the same generator, whose state must not change
            torch.manual_seed(seed)
            return self.transform(*item)


class Share(Dataset):
    """The items of a data set for one of n processes: every n-th item, and whether it is counted.

    All processes get the same number of items, because they wait for each other. If the number of items is not a
    multiple of n, some of the first items are repeated. Repeated items are not counted.
    """

    def __init__(self, dataset: Any, process: int = 0, processes: int = 1):
        self.dataset, self.process, self.processes = dataset, process, processes

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.processes)

    def __getitem__(self, index: int) -> Tuple[Any, Any, bool]:
        place = index * self.processes + self.process
        image, target = self.dataset[place % len(self.dataset)]
        return image, target, place < len(self.dataset)


def _listed(items: List[Tuple[Any, ...]]) -> Tuple[List[Any], ...]:
    """Return a list for each column of the items. Images of different sizes cannot be stacked."""
    return tuple(list(column) for column in zip(*items))


def _stacked(items: List[Tuple[torch.Tensor, torch.Tensor]]) -> Tuple[torch.Tensor, torch.Tensor]:
    images, classes = zip(*items)
    return torch.stack(images), torch.stack(classes)


class Batches(pl.LightningDataModule):
    """The batches of a run, for Lightning.

    In training, a batch is a list of images and a list of targets or, with `stack`, a tensor of images and a tensor of
    targets. In evaluation, a batch is one image. Several images would be padded to the size of the largest one, which
    changes the results.
    """

    def __init__(
            self, held_out: Any, train: Optional[Augmented] = None, steps_per_epoch: int = 1, images_per_step: int = 1,
            images_per_pass: int = 1, seed: int = 0, workers: int = 0, stack: bool = False):
        """
        Args:
            held_out: Data set to evaluate on.
            train: Data set to train on.
            steps_per_epoch: Steps of an epoch.
            images_per_step: Images per step in all processes together.
            images_per_pass: Number of images in a training batch.
            seed: Seed of the random orders and of the transforms.
            workers: Number of processes that read images.
            stack: Whether training batches are tensors instead of lists.
        """
        super().__init__()
        self.held_out, self.train, self.stack = held_out, train, stack
        self.steps_per_epoch, self.images_per_step, self.images_per_pass = (
            steps_per_epoch, images_per_step, images_per_pass)
        self.seed = seed
        self.settings: Any = dict(
            num_workers=workers, pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0)

    def train_dataloader(self) -> DataLoader:
        trainer: Any = self.trainer
        dataset: Any = self.train
        sampler = EpochSampler(
            len(dataset), self.steps_per_epoch, self.images_per_step, self.seed, trainer.global_rank,
            trainer.world_size)
        return DataLoader(
            dataset, self.images_per_pass, sampler=sampler, collate_fn=_stacked if self.stack else _listed,
            **self.settings)

    def val_dataloader(self) -> DataLoader:
        trainer: Any = self.trainer
        share = Share(self.held_out, trainer.global_rank, trainer.world_size)
        return DataLoader(share, 1, collate_fn=_listed, **self.settings)
