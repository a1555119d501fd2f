""" Transforms of images in training, as classes of torchvision's v2 transforms. They take and return uint8. """
from typing import Any, Dict, List, Sequence

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .label_maps import IGNORED

__all__ = [
    'JitteredSize', 'PadTo', 'PhotometricDistortion', 'VariedCrop', 'detection_transform', 'segmentation_transform']


def detection_transform(flip: float = 0.5) -> v2.Transform:
    """Return the published transform for detectors: a horizontal flip. The detector resizes and normalises images."""
    return v2.RandomHorizontalFlip(flip)


def segmentation_transform(
        scale: Sequence[int] = (2048, 512), ratios: Sequence[float] = (0.5, 2.0), crop: int = 512,
        max_share: float = 0.75, flip: float = 0.5, distort: bool = True) -> v2.Transform:
    """Return the published transforms for Semantic FPN on ADE20K.

    Args:
        scale: Limits of the longer and the shorter side of resized images, before they are multiplied by a random
            ratio.
        ratios: Smallest and largest ratio.
        crop: Side of the square that is cut out. Smaller images are padded.
        max_share: Largest share of a crop that one class may have.
        flip: Probability of a horizontal flip.
        distort: Whether to change brightness, contrast, saturation and hue.
    """
    steps: List[Any] = [JitteredSize(scale, ratios), VariedCrop(crop, max_share), v2.RandomHorizontalFlip(flip)]
    if distort:
        steps.append(PhotometricDistortion())
    return v2.Compose([*steps, PadTo(crop)])


class JitteredSize(v2.Transform):
    """Resizes an image and its classes to a random size that keeps the ratio of its sides."""

    def __init__(self, scale: Sequence[int], ratios: Sequence[float]):
        super().__init__()
        self.longest, self.shorter = scale
        self.low, self.high = ratios

    def make_params(self, flat_inputs: List[Any]) -> Dict[str, Any]:
        h, w = F.get_size(flat_inputs[0])
        ratio = self.low + (self.high - self.low) * torch.rand(()).item()
        # sides are rounded down before the factor is computed, as published
        factor = min(int(self.longest * ratio) / max(h, w), int(self.shorter * ratio) / min(h, w))
        return dict(size=[max(int(h * factor + 0.5), 1), max(int(w * factor + 0.5), 1)])

    def transform(self, inpt: Any, params: Dict[str, Any]) -> Any:
        return F.resize(inpt, params['size'], antialias=False)  # for classes, torchvision takes the nearest pixel


class VariedCrop(v2.Transform):
    """Cuts a random square out of an image and its classes. No class may fill more than `max_share` of the square.

    If ten squares do not meet this, the last one is used.
    """
    attempts = 10

    def __init__(self, side: int, max_share: float):
        super().__init__()
        self.side, self.max_share = side, max_share

    def make_params(self, flat_inputs: List[Any]) -> Dict[str, Any]:
        classes = next(x for x in flat_inputs if isinstance(x, tv_tensors.Mask))
        h, w = classes.shape[-2:]
        for _ in range(self.attempts):
            top = int(torch.randint(max(h - self.side, 0) + 1, ()))
            left = int(torch.randint(max(w - self.side, 0) + 1, ()))
            inside = classes[..., top:top + self.side, left:left + self.side]
            _, counts = inside[inside != IGNORED].unique(return_counts=True)
            if len(counts) > 1 and counts.max() < self.max_share * counts.sum():
                break
        return dict(top=top, left=left, height=min(h, self.side), width=min(w, self.side))

    def transform(self, inpt: Any, params: Dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class PadTo(v2.Transform):
    """Pads an image and its classes to a square, on the right and below.

    The image is padded with ImageNet's mean colour, which normalisation turns into 0 (apart from rounding). The classes
    are padded with 255.
    """
    fill = (124, 116, 104)  # 123.675, 116.28, 103.53

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def transform(self, inpt: Any, params: Dict[str, Any]) -> Any:
        h, w = F.get_size(inpt)
        missing = [0, 0, max(self.side - w, 0), max(self.side - h, 0)]  # left, top, right, bottom
        if not any(missing):
            return inpt
        if isinstance(inpt, tv_tensors.Mask):
            return F.pad(inpt, missing, fill=IGNORED)
        return F.pad(inpt, missing, fill=list(self.fill) if len(inpt) == 3 else [sum(self.fill) // 3])


class PhotometricDistortion(v2.Transform):
    """Changes brightness, contrast, saturation and hue of an image, each with probability 1/2, as mmsegmentation does.

    torchvision's transform of this name computes something else: it scales the brightness, and for the contrast it
    mixes the image with its mean.
    """
    _transformed_types = (tv_tensors.Image,)

    def make_params(self, flat_inputs: List[Any]) -> Dict[str, Any]:
        def between(low: float, high: float, default: float) -> float:
            drawn, taken = torch.rand(2).tolist()
            return low + (high - low) * drawn if taken < 0.5 else default

        return dict(
            brightness=between(-32 / 255, 32 / 255, 0), contrast=between(0.5, 1.5, 1),
            saturation=between(0.5, 1.5, 1), hue=between(-0.1, 0.1, 0), contrast_first=torch.rand(()).item() < 0.5)

    def transform(self, inpt: Any, params: Dict[str, Any]) -> Any:
        x = inpt.as_subclass(torch.Tensor).float() / 255
        x = (x + params['brightness']).clamp(0, 1)
        if params['contrast_first']:
            x = (x * params['contrast']).clamp(0, 1)
        if len(x) == 3:
            x = self._saturate(x, params['saturation'])
            if params['hue']:
                x = F.adjust_hue(x, params['hue'])
        if not params['contrast_first']:
            x = (x * params['contrast']).clamp(0, 1)
        return tv_tensors.wrap((x * 255).round().to(torch.uint8), like=inpt)

    @staticmethod
    def _saturate(x: torch.Tensor, factor: float) -> torch.Tensor:
        """Multiply the saturation of the colour model HSV by `factor`, limited to a saturation of 1.

        This multiplies the distance of every channel from the largest channel.
        """
        highest, lowest = x.max(dim=0).values, x.min(dim=0).values
        most = highest / (highest - lowest).clamp(min=1e-6)  # 1 / saturation
        return highest - (highest - x) * most.clamp(max=factor)
