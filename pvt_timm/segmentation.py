""" Semantic FPN on PVT as published. It can load checkpoints of mmsegmentation and of the original code.

The paper trains it on ADE20K for 40,000 steps of 32 crops of 512x512 pixels. This does the same:

    model = semantic_fpn('pvt_small', pretrained_backbone=True, model_args=dict(drop_path_rate=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=40_000, power=0.9)
    loss = torch.nn.functional.cross_entropy(model(images), labels, ignore_index=255)
"""
import inspect
import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms.functional import normalize

from .detection.checks import check_image
from .detection.fpn import PvtFpnBackbone, pvt_fpn_backbone, usual_normalisation
from .detection.openmmlab import FPN, from_openmmlab, to_openmmlab
from .detection.parts import resized
from .detection.trained import Checkpoint, is_color, is_own, load_own, open_checkpoint
from .formats.names import Row

__all__ = ['SemanticFpn', 'ade20k_classes', 'semantic_fpn', 'semantic_fpn_from_mmseg', 'segmenter_to_mmseg']

Color = Tuple[int, ...]

_TABLE = (
    #   ours                                              mmsegmentation and the original code
    *FPN,
    Row('head.branches.{i}.{j}.0.weight',                 'decode_head.scale_heads.{i}.{j}.conv.weight'),
    Row('head.branches.{i}.{j}.1.{n}',                    'decode_head.scale_heads.{i}.{j}.bn.{n}'),
    Row('head.classifier.{p}',                            'decode_head.conv_seg.{p}'),
)


def ade20k_classes() -> Tuple[List[str], List[Color]]:
    """Return names and colours (red, green, blue) of ADE20K's 150 classes, in the order of class indices."""
    lines = (Path(__file__).parent / 'data' / 'ade20k.txt').read_text(encoding='utf-8').splitlines()
    colors, names = zip(*(line.split(' ', 1) for line in lines))
    return list(names), [tuple(bytes.fromhex(color[1:])) for color in colors]


class SemanticFpnHead(nn.Module):
    """Enlarges all levels of a pyramid to the size of the finest one, adds them and classifies every position."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, drop_rate: float):
        super().__init__()
        self.branches = nn.ModuleList()
        for i in range(4):
            layers: List[nn.Module] = []
            for j in range(max(i, 1)):
                layers.append(Conv2dNormActivation(channels if j else in_channels, channels, 3))
                if i:
                    layers.append(nn.Upsample(scale_factor=2, mode='bilinear', align_corners=False))
            self.branches.append(nn.Sequential(*layers))
        self.dropout = nn.Dropout2d(drop_rate)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, maps: List[torch.Tensor]) -> torch.Tensor:
        x = self.branches[0](maps[0])
        for branch, feature in zip(self.branches[1:], maps[1:]):
            # if a side of the finer map is odd, twice the side of the coarser map is one less
            x = x + F.interpolate(branch(feature), size=x.shape[2:], mode='bilinear', align_corners=False)
        return self.classifier(self.dropout(x))


class SemanticFpn(nn.Module):
    """Semantic FPN (https://arxiv.org/abs/1901.02446) as the PVT paper uses it.

    It takes a batch of images (B, C, H, W) of at least 32x32 pixels, normalised with `mean` and `std`, and returns
    logits (B, num_classes, H, W). Classes count from 0. `segment` takes a single image of any size, with values from 0
    to 1, and returns its classes.

    Attributes:
        kind: 'semantic_fpn', also of subclasses.
        num_classes: Number of classes.
        categories: Names of the classes, empty if not known.
        palette: Their colours (red, green, blue), empty if not known.
        in_chans: Channels of the images.
        mean: Mean per channel, for images from 0 to 1: that of ImageNet, see `usual_normalisation`.
        std: Standard deviation per channel.
    """
    kind = 'semantic_fpn'

    def __init__(
            self,
            backbone: PvtFpnBackbone,
            num_classes: int = 150,
            channels: int = 128,
            drop_rate: float = 0.1,
            min_size: int = 512,
            max_size: int = 2048,
    ):
        """
        Args:
            backbone: Feature pyramid with strides 4 to 32.
            num_classes: Number of classes.
            channels: Channels of the head.
            drop_rate: Dropout of channels before the classifier.
            min_size: Shorter side that `segment` resizes images to.
            max_size: Limit of the longer side. If it is reached, the shorter side becomes smaller than `min_size`.
        """
        super().__init__()
        self.backbone = backbone
        self.head = SemanticFpnHead(backbone.out_channels, channels, num_classes, drop_rate)
        self.num_classes = num_classes
        self.categories: List[str] = []
        self.palette: List[Color] = []
        self.min_size, self.max_size = min_size, max_size
        self.in_chans = getattr(backbone, 'in_chans', 3)
        self.mean, self.std = usual_normalisation(self.in_chans)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.head(list(self.backbone(x).values()))
        return F.interpolate(logits, size=x.shape[2:], mode='bilinear', align_corners=False)

    @torch.no_grad()
    def segment(self, image: torch.Tensor) -> torch.Tensor:
        """Return the classes (H, W) of an image (C, H, W) with values from 0 to 1. Evaluation mode is used meanwhile.

        Several images of one size (B, C, H, W) go through the model together. Their classes are (B, H, W).

        The image is resized twice, as by the original's AlignResize and mmsegmentation's ResizeToMultiple. First the
        shorter side becomes `min_size`, or less if the longer side would be above `max_size`. Then both sides are
        enlarged to multiples of 32. Unlike in these two, values are not rounded to bytes in between.

        Raises:
            ValueError: An image has another number of channels, no floating point numbers, or values up to 255. Or
                there is no image in the batch.
        """
        images = image if image.ndim == 4 else image[None]
        if not len(images):
            raise ValueError('Expected one image or more, got an empty batch')
        for one in images:
            check_image(one, self.in_chans)
        h, w = image.shape[-2:]
        width, height = resized(w, h, self.min_size, self.max_size)
        x = normalize(images, self.mean, self.std)
        for size in ((height, width), (math.ceil(height / 32) * 32, math.ceil(width / 32) * 32)):
            x = F.interpolate(x, size=size, mode='bilinear', align_corners=False)
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            logits = self(x)
        finally:
            for module, mode in modes:
                module.training = mode
        classes = [  # one by one: the logits of a large image take gigabytes
            F.interpolate(one[None], size=(h, w), mode='bilinear', align_corners=False)[0].argmax(dim=0)
            for one in logits]
        return torch.stack(classes) if image.ndim == 4 else classes[0]


def semantic_fpn(
        model_name: str = 'pvt_small', num_classes: int = 150, pretrained_backbone: bool = False,
        out_channels: int = 256, model_args: Optional[Dict[str, Any]] = None, frozen_stages: int = 0,
        **kwargs: Any) -> SemanticFpn:
    """Build Semantic FPN on PVT with the published settings. Its neck and head are new and have to be trained.

    The arguments are those of `pvt_timm.detection.pvt_retinanet`, but `kwargs` are for `SemanticFpn`.
    """
    inspect.signature(SemanticFpn).bind(None, num_classes, **kwargs)  # before anything is downloaded
    backbone = pvt_fpn_backbone(
        model_name, pretrained_backbone, out_channels, extra_levels=None, model_args=model_args,
        frozen_stages=frozen_stages)
    return SemanticFpn(backbone, num_classes, **kwargs)


def segmenter_to_mmseg(model: SemanticFpn, fmt: str = 'mmdet') -> Dict[str, torch.Tensor]:
    """Return the weights of a segmenter under mmsegmentation's names, its backbone in format 'mmdet' or 'original'."""
    return to_openmmlab(model, _TABLE, fmt)


def semantic_fpn_from_mmseg(checkpoint: Checkpoint, prefix: Optional[str] = None, **kwargs: Any) -> SemanticFpn:
    """Load a Semantic FPN of mmsegmentation, of the original PVT code or of this package.

    Arguments and errors are those of `pvt_timm.detection.retinanet_from_mmdet`. The checkpoint has `backbone.*`,
    `neck.*` and `decode_head.*`. `min_size` is 512 if no config in the file gives it. From this package, a checkpoint
    of `pvt-timm segmenter fit` or the state dict of a segmenter is accepted.

    Returns:
        The model in evaluation mode. Variant, number of classes and widths are read from the weights. Names and colours
        of classes are those in the file. If a file of mmsegmentation or of the original code has none and there are 150
        classes, they are ADE20K's.
    """
    checkpoint = open_checkpoint(checkpoint)
    if is_own(checkpoint):
        model = load_own(checkpoint, {'semantic_fpn': semantic_fpn}, prefix, **kwargs)
        _check_several_classes(model)
        return model
    model, said = from_openmmlab(checkpoint, {'Semantic FPN': (semantic_fpn, _TABLE)}, prefix, **kwargs)
    _check_several_classes(model)
    names, palette = ade20k_classes() if model.num_classes == 150 else ([], [])
    model.categories = said.get('label_names', names)
    colors = said.get('palette', palette)
    if not all(map(is_color, colors)):
        raise ValueError('Expected red, green and blue from 0 to 255 per class as palette in the checkpoint.')
    model.palette = [tuple(color) for color in colors]
    return model


def _check_several_classes(model: SemanticFpn) -> None:
    if model.num_classes == 1:  # the class would be that of every pixel
        raise ValueError('Expected a segmenter with a score per class, got one output and a threshold (binary '
                         'segmentation), which is not supported.')
