""" A feature pyramid on PVT for torchvision's detectors, and for Semantic FPN. """
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import create_model


def usual_normalisation(in_chans: int) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """Return mean and standard deviation per channel, for images from 0 to 1. `pvt-timm predict` uses the same.

    These are the values of ImageNet. If there are not three channels, every channel gets the average of the three.
    """
    if in_chans == 3:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    mean, std = (round(sum(values) / len(values), 6) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (mean,) * in_chans, (std,) * in_chans


class LastLevelsOnInput(LastLevelP6P7):
    """The levels P6 and P7, made from the last feature map of the backbone, without an activation between them."""

    def forward(
            self, p: List[torch.Tensor], c: List[torch.Tensor], names: List[str],
    ) -> Tuple[List[torch.Tensor], List[str]]:
        p6 = self.p6(c[-1])
        return p + [p6, self.p7(p6)], names + ['p6', 'p7']


# For each `extra_levels`, a function that makes the module from the channels of the last stage and of the pyramid
_EXTRA_LEVELS: Dict[Optional[str], Callable[[int, int], Any]] = {
    'pool': lambda channels, out_channels: LastLevelMaxPool(),
    'p6p7': lambda channels, out_channels: LastLevelP6P7(out_channels, out_channels),
    'p6p7_on_input': LastLevelsOnInput,
    None: lambda channels, out_channels: None,
}


class PvtFpnBackbone(nn.Module):
    """A feature pyramid on PVT for torchvision's detectors.

    It takes images (B, C, H, W) and returns a dict of feature maps (B, out_channels, H / stride, W / stride), finest
    first. Their names are '0', '1' and so on, then 'pool', or 'p6' and 'p7'.

    Attributes:
        body: The timm model, created with `features_only=True`.
        fpn: torchvision's `FeaturePyramidNetwork` on its feature maps.
        in_chans: Channels of the images.
        model_args: Arguments that `body` was created with, beside its name.
        out_channels: Channels of every map that is returned.
    """

    def __init__(
            self,
            model_name: str = 'pvt_small',
            pretrained: bool = False,
            out_channels: int = 256,
            out_indices: Sequence[int] = (0, 1, 2, 3),
            extra_levels: Optional[str] = 'pool',
            model_args: Optional[Dict[str, Any]] = None,
            frozen_stages: int = 0,
    ):
        """
        Args:
            model_name: Name of a timm model, with or without a tag.
            pretrained: Whether to load its published weights.
            out_channels: Channels of the pyramid.
            out_indices: Stages whose feature maps are used, from fine to coarse. Stages 0 to 3 have strides 4 to 32.
            extra_levels: Which coarser levels to add. 'pool' adds one, every second position of the last level (for
                Faster and Mask R-CNN). 'p6p7' adds two, by convolutions on the last level of the pyramid (for
                torchvision's RetinaNet and FCOS). 'p6p7_on_input' adds two, by convolutions on the last stage of the
                backbone (for the published PVT RetinaNet). None adds none.
            model_args: More arguments for `timm.create_model`, such as `dict(drop_path_rate=0.1)`.
            frozen_stages: Number of stages that are not trained, from the first one on. Their parameters need no
                gradient, and they stay in evaluation mode.
        """
        super().__init__()
        if extra_levels not in _EXTRA_LEVELS:
            raise ValueError(f'Expected extra_levels in {tuple(_EXTRA_LEVELS)}, got {extra_levels!r}.')
        most = max(i % 4 for i in out_indices) + 1  # the model has no stages after the last one that is used
        if frozen_stages not in range(most + 1):
            raise ValueError(f'Expected frozen_stages from 0 to {most}, got {frozen_stages!r}.')
        self.model_args = dict(model_args or {})
        self.body = create_model(
            model_name, pretrained=pretrained, features_only=True, out_indices=tuple(out_indices), **self.model_args)
        self.in_chans = next(m.in_channels for m in self.body.modules() if isinstance(m, nn.Conv2d))
        self.frozen_stages = frozen_stages
        for stage in self._frozen():
            stage.requires_grad_(False)
        feature_info: Any = self.body.feature_info
        channels = feature_info.channels()
        extra = _EXTRA_LEVELS[extra_levels](channels[-1], out_channels)
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra)
        self.out_channels = out_channels

    def _frozen(self) -> List[nn.Module]:
        return [self.body.get_submodule(f'stages_{i}') for i in range(self.frozen_stages)]

    def train(self, mode: bool = True) -> 'PvtFpnBackbone':
        """Set the mode of all but the frozen stages. These stay in evaluation mode, without dropout and drop path."""
        super().train(mode)
        for stage in self._frozen():
            stage.eval()
        return self

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        return self.fpn({str(i): feature for i, feature in enumerate(self.body(x))})


pvt_fpn_backbone = PvtFpnBackbone
