""" A feature pyramid on PVT for torchvision's detectors, and for Semantic FPN. """
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import create_model


def usual_normalisation(in_chans: int) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """Mean and standard deviation per channel of images from 0 to 1: ImageNet's, or their average in every channel
    where there are not three. `pvt-timm predict` takes the same."""
    if in_chans == 3:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    mean, std = (round(sum(values) / len(values), 6) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (mean,) * in_chans, (std,) * in_chans


class LastLevelsOnInput(LastLevelP6P7):
    """P6 and P7 from the last backbone feature, without an activation between them."""

    def forward(
            self, p: List[torch.Tensor], c: List[torch.Tensor], names: List[str],
    ) -> Tuple[List[torch.Tensor], List[str]]:
        p6 = self.p6(c[-1])
        return p + [p6, self.p7(p6)], names + ['p6', 'p7']


# What makes them from the channels of the last stage and of the pyramid
_EXTRA_LEVELS: Dict[Optional[str], Callable[[int, int], Any]] = {
    'pool': lambda channels, out_channels: LastLevelMaxPool(),
    'p6p7': lambda channels, out_channels: LastLevelP6P7(out_channels, out_channels),
    'p6p7_on_input': LastLevelsOnInput,
    None: lambda channels, out_channels: None,
}


class PvtFpnBackbone(nn.Module):
    """A PVT feature pyramid for torchvision's detectors: images (B, C, H, W) to a dict of maps.

    Attributes:
        body: The `features_only` model.
        fpn: torchvision's `FeaturePyramidNetwork` on it.
        in_chans: Channels of the images.
        model_args: Arguments that `body` was made with, beside its name.
        out_channels: Channels of every map. They are named '0', '1', ... and 'pool' or 'p6' and 'p7'.
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
            pretrained: Load its weights.
            out_channels: Channels of the pyramid.
            out_indices: Stages to take, from fine to coarse, 0 to 3 have strides 4 to 32.
            extra_levels: Coarser levels. 'pool': one, subsampled (Faster and Mask R-CNN). 'p6p7': two convolutions on
                the last level of the pyramid (torchvision's RetinaNet and FCOS). 'p6p7_on_input': two on the last stage
                (the published PVT RetinaNet). None: none.
            model_args: More arguments for `timm.create_model`, such as `dict(drop_path_rate=0.1)`.
            frozen_stages: Number of stages that are not trained, from the first one on. Their parameters need no
                gradient, and they stay in evaluation mode.
        """
        super().__init__()
        if extra_levels not in _EXTRA_LEVELS:
            raise ValueError(f'Expected extra_levels in {tuple(_EXTRA_LEVELS)}, got {extra_levels!r}.')
        most = max(i % 4 for i in out_indices) + 1  # the others are not there
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
        """Leaves frozen stages in evaluation mode: without dropout and drop path."""
        super().train(mode)
        for stage in self._frozen():
            stage.eval()
        return self

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        return self.fpn({str(i): feature for i, feature in enumerate(self.body(x))})


pvt_fpn_backbone = PvtFpnBackbone
