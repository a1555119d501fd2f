""" A data set of images and label maps (images that hold a class per pixel) in two folders, as in ADE20K. """
from pathlib import Path
from typing import Dict, Tuple

import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from .images import DataError, find_images, read_image, read_label_map

__all__ = ['IGNORED', 'LabelMapDataset']

IGNORED = 255  # the value of pixels without a class


class LabelMapDataset(Dataset):
    """Images with the class of every pixel. An item is an image, uint8 (C, H, W), and its classes, int64 (H, W).

    An image and its label map have the same name, except for the extension. They may be in subfolders, which have the
    same names in both folders.
    """

    def __init__(
            self, images: Path, label_maps: Path, num_classes: int, reduce_zero_label: bool = False,
            channels: int = 3):
        """
        Args:
            images: Folder with the images.
            label_maps: Folder with the label maps.
            num_classes: Number of classes. The values in label maps are 0 to `num_classes - 1`, and 255 for pixels
                without a class. So there are at most 255 classes, or 254 with `reduce_zero_label`.
            reduce_zero_label: Whether value 0 means no class and the classes count from 1, as in ADE20K.
            channels: Channels that images are read with: 3, or 1 for grey levels.

        Raises:
            DataError: An image has no label map, or a label map has no image.
            ValueError: There are too many classes.
        """
        most = IGNORED - 1 if reduce_zero_label else IGNORED
        if num_classes > most:
            counted = ' that count from 1' if reduce_zero_label else ''
            raise ValueError(
                f'Expected at most {most} classes{counted}, as the value {IGNORED} in label maps means no class, got '
                f'{num_classes}')
        self.num_classes, self.reduce_zero_label, self.channels = num_classes, reduce_zero_label, channels
        image_of, label_map_of = _by_name(images), _by_name(label_maps)
        for what, file_of, others, folder in (
                ('label map', image_of, label_map_of, label_maps), ('image', label_map_of, image_of, images)):
            lonely = [name for name in file_of if name not in others]
            if lonely:
                raise DataError(
                    f'Expected a{"n" if what == "image" else ""} {what} in {folder} for {file_of[lonely[0]]}, there is '
                    f'none for {len(lonely)} of {len(file_of)} files')
        self.files = [(image_of[name], label_map_of[name]) for name in image_of]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, torch.Tensor]:
        image_file, file = self.files[index]
        image = read_image(image_file, self.channels)
        labels = read_label_map(file, (image.shape[1], image.shape[2]))
        first = 1 if self.reduce_zero_label else 0
        classes = labels - first
        classes[(labels == IGNORED) | (labels < first)] = IGNORED
        if not ((classes == IGNORED) | ((classes >= 0) & (classes < self.num_classes))).all():
            wrong = labels[(classes != IGNORED) & (classes >= self.num_classes)]
            raise DataError(
                f'Expected the values {first} to {self.num_classes - 1 + first} for the {self.num_classes} classes '
                f'and {"0 or " if first else ""}{IGNORED} for no class, got {int(wrong[0])}: {file}')
        return tv_tensors.Image(image), tv_tensors.Mask(classes)


def _by_name(folder: Path) -> Dict[str, Path]:
    """Return all images in a folder, by their relative path without extension."""
    files: Dict[str, Path] = {}
    for file in find_images(folder):
        name = file.relative_to(folder).with_suffix('').as_posix()
        if name in files:
            raise DataError(f'Expected images of different names, got {files[name]} and {file}')
        files[name] = file
    return files
