""" Let timm's scripts read grey images of more than 8 bits as `predict` reads them.

timm and torchvision convert such images with Pillow, which cuts off values above 255: the images become white.
"""
import io
from typing import Any, Callable, Tuple

import timm.data
from PIL import Image
from timm.data import ImageDataset
from torchvision.datasets.folder import ImageFolder, default_loader

from ..images import as_seen, has_more_than_8_bits

__all__ = ['AsSeen', 'load_as_seen', 'read_as_seen']


def read_as_seen() -> None:
    """Make timm's `create_dataset` return datasets that read such images as `predict` does.

    The datasets themselves are changed, so processes that read images for them do the same, however they are started.
    Datasets that are streamed (such as webdataset) are not changed.
    """
    create_dataset = timm.data.create_dataset

    def create(*args: Any, **kwargs: Any) -> Any:
        dataset = create_dataset(*args, **kwargs)
        if isinstance(dataset, ImageDataset) and not isinstance(dataset.reader, AsSeen):
            dataset.reader = AsSeen(dataset.reader)
        elif isinstance(dataset, ImageFolder) and dataset.loader is default_loader:
            dataset.loader = load_as_seen
        return dataset

    timm.data.create_dataset = create


class AsSeen:
    """A reader for timm's `ImageDataset`, which gives images of more than 8 bits as files of 8 bits.

    Other images, and all attributes, are those of the given reader.
    """

    def __init__(self, reader: Any):
        self.reader = reader

    def __getitem__(self, index: int) -> Tuple[Any, ...]:
        file, *more = self.reader[index]
        image = Image.open(file)  # reads only the start of the file
        if has_more_than_8_bits(image):
            eight_bits = io.BytesIO()
            seen = _seen(image, lambda: self.reader.filename(index, absolute=True), 1)
            seen.save(eight_bits, 'png', compress_level=0)
            file = eight_bits
        file.seek(0)
        return (file, *more)

    def __len__(self) -> int:
        return len(self.reader)

    def __getattr__(self, name: str) -> Any:
        if name == 'reader' or name.startswith('__'):  # pickle asks for them before there is a reader
            raise AttributeError(name)
        return getattr(self.reader, name)


def load_as_seen(path: str) -> Image.Image:
    """Return an image as RGB, as torchvision's `default_loader` does, but with more than 8 bits as `predict` does."""
    with Image.open(path) as image:
        return _seen(image, lambda: path, 3) if has_more_than_8_bits(image) else image.convert('RGB')


def _seen(image: Image.Image, name: Callable[[], str], channels: int) -> Image.Image:
    try:
        return as_seen(image, channels)
    except ValueError as e:
        raise ValueError(f'Cannot read the image {name()}: {e}') from e
