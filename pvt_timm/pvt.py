""" Pyramid Vision Transformer (v1)

Paper: `Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions`
    - https://arxiv.org/abs/2102.12122

Original code and weights at https://github.com/whai362/PVT (Apache-2.0), whose numbers these are.

By default the last stage has a class token and `forward_features` returns its tokens after the final norm. As a dense
backbone (`class_token=False`, the default under `features_only=True`) every stage returns its feature map, there is no
class token and no final norm, as in the original detection and segmentation code. Both take any height and width from
32 pixels up: position embeddings, stored at the grid of `img_size`, are resized stage by stage.
"""
import logging
import re
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Set, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath, LayerNorm, LayerType, _assert, calculate_drop_path_rates, get_act_layer, get_norm_layer, to_2tuple,
    trunc_normal_, use_fused_attn)
from timm.models._builder import build_model_with_cfg
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function
from timm.models._manipulate import checkpoint
from timm.models._registry import generate_default_cfgs, register_model
try:  # timm >= 1.0.31 keeps construction arguments in step with `set_input_size`, for `save_for_hf`
    from timm.models._input import update_model_input_size
except ImportError:
    update_model_input_size = None  # type: ignore[assignment]

from .formats.architecture import check_keys, stage_grids
from .formats.mapping import fit_to_model
from .sliced_mlp import SlicedMlp

__all__ = ['PyramidVisionTransformer']

_logger = logging.getLogger(__name__)


@torch.fx.wrap
@register_notrace_function
def resample_pos_embed(
        pos_embed: torch.Tensor, size: List[int], grid_size: List[int], num_prefix_tokens: int = 0) -> torch.Tensor:
    """Resize a position embedding (1, num_prefix_tokens + h * w, C) from `grid_size` (h, w) to `size`.

    As in the original: bilinear, align_corners=False, no antialias, the prefix (class token) stays as it is. timm's
    `resample_abs_pos_embed` computes in float32 whatever the dtype.
    """
    # A branch on the size would tie a traced or compiled graph to the example input. Resizing to the stored grid gives
    # the stored values back exactly.
    if torch.jit.is_scripting() or not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
        if size[0] == grid_size[0] and size[1] == grid_size[1]:
            return pos_embed

    prefix, grid = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    grid = grid if grid.dtype == torch.float64 else grid.float()
    grid = grid.reshape(1, grid_size[0], grid_size[1], -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(size[0], size[1]), mode='bilinear', align_corners=False)
    grid = grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    return torch.cat([prefix, grid], dim=1)


class Attention(nn.Module):
    """Spatial-reduction attention (paper section 3.3): keys and values come from a grid reduced `sr_ratio` times."""
    fused_attn: torch.jit.Final[bool]

    def __init__(
            self, dim: int, num_heads: int = 8, sr_ratio: int = 1, qkv_bias: bool = True,
            attn_drop: float = 0., proj_drop: float = 0., norm_eps: float = 1e-5,
            device: Any = None, dtype: Optional[torch.dtype] = None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        assert dim % num_heads == 0, 'dim should be divisible by num_heads'
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim ** -0.5
        self.fused_attn = use_fused_attn()

        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, dim * 2, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

        self.sr_ratio = sr_ratio
        self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio, **dd) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim, eps=norm_eps, **dd) if sr_ratio > 1 else None

    def forward(self, x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
        B, N, C = x.shape
        q = self.q(x).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)

        if self.sr is not None:
            # a channels_last view, no copy; by way of NHWC its strides say so at batch size 1 too
            x = x.reshape(B, size[0], size[1], C).permute(0, 3, 1, 2)
            x = self.sr(x).flatten(2).transpose(1, 2)
            x = self.norm(x)  # type: ignore[misc]
        kv = self.kv(x).reshape(B, x.shape[1], 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)

        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            attn = attn.softmax(dim=-1)
            attn = self.attn_drop(attn)
            x = attn @ v

        x = x.transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


class Block(nn.Module):
    """Pre-norm transformer block on tokens (B, N, C)."""

    def __init__(
            self, dim: int, num_heads: int, sr_ratio: int = 1, mlp_ratio: float = 4., qkv_bias: bool = True,
            proj_drop: float = 0., attn_drop: float = 0., drop_path: float = 0., sr_norm_eps: float = 1e-5,
            act_layer: Callable[..., nn.Module] = nn.GELU,
            norm_layer: Callable[..., nn.Module] = partial(LayerNorm, eps=1e-6),
            mlp_layer: Callable[..., nn.Module] = SlicedMlp,
            device: Any = None, dtype: Optional[torch.dtype] = None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = Attention(
            dim, num_heads, sr_ratio, qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, norm_eps=sr_norm_eps, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), size))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens. A remainder that does not fill a patch is dropped, as in the original."""

    def __init__(
            self, patch_size: int, in_chans: int, embed_dim: int, norm_eps: float = 1e-5,
            device: Any = None, dtype: Optional[torch.dtype] = None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, **dd)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps, **dd)

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, Tuple[int, int]]:
        x = self.proj(x)
        size = (x.shape[2], x.shape[3])
        return self.norm(x.flatten(2).transpose(1, 2)), size


class PyramidVisionTransformerStage(nn.Module):
    """(B, C_in, H, W) to a feature map (B, C, H', W') in channels_last memory format, or, for `output_fmt='NLC'`, to
    tokens (B, num_prefix_tokens + H' * W', C). Other arguments than these go to the blocks."""
    output_nchw: torch.jit.Final[bool]

    def __init__(
            self, in_chans: int, dim: int, depth: int, grid_size: Tuple[int, int], patch_size: int = 2,
            min_input_size: int = 1, class_token: bool = False, output_fmt: str = 'NCHW',
            pos_drop: float = 0., drop_path: Union[List[float], float] = 0., embed_norm_eps: float = 1e-5,
            block_fn: Callable[..., nn.Module] = Block,
            device: Any = None, dtype: Optional[torch.dtype] = None, **block_kwargs: Any):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.dim = dim
        self.grid_size = grid_size
        self.min_input_size = min_input_size
        self.num_prefix_tokens = 1 if class_token else 0
        self.output_nchw = output_fmt == 'NCHW'
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            patch_size=patch_size, in_chans=in_chans, embed_dim=dim, norm_eps=embed_norm_eps, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd)) if class_token else None
        num_tokens = self.num_prefix_tokens + grid_size[0] * grid_size[1]
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, dim, **dd))
        self.pos_drop = nn.Dropout(p=pos_drop)
        self.blocks = nn.ModuleList([block_fn(
            dim, drop_path=drop_path[i] if isinstance(drop_path, list) else drop_path, sr_norm_eps=embed_norm_eps,
            **block_kwargs, **dd,
        ) for i in range(depth)])

    def set_grid_size(self, grid_size: Tuple[int, int]) -> None:
        if grid_size != self.grid_size:  # otherwise it stays the same parameter
            pos = resample_pos_embed(self.pos_embed.detach(), grid_size, self.grid_size, self.num_prefix_tokens)
            self.pos_embed = nn.Parameter(pos, requires_grad=self.pos_embed.requires_grad)
            self.grid_size = grid_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _assert(x.shape[2] >= self.min_input_size, f'Input height should be at least {self.min_input_size}.')
        _assert(x.shape[3] >= self.min_input_size, f'Input width should be at least {self.min_input_size}.')
        B = x.shape[0]
        x, size = self.patch_embed(x)
        pos_embed = resample_pos_embed(self.pos_embed, size, self.grid_size, self.num_prefix_tokens)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)
        x = self.pos_drop(x + pos_embed)

        for blk in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(blk, x, size)
            else:
                x = blk(x, size)

        if self.output_nchw:
            x = x[:, self.num_prefix_tokens:].reshape(B, size[0], size[1], self.dim).permute(0, 3, 1, 2)
        return x


class PyramidVisionTransformer(nn.Module):
    """ Pyramid Vision Transformer (v1), https://arxiv.org/abs/2102.12122 """
    output_nchw: torch.jit.Final[bool]

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            patch_size: int = 4,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: Optional[str] = None,
            class_token: bool = True,
            output_fmt: Optional[str] = None,
            embed_dims: Tuple[int, ...] = (64, 128, 320, 512),
            depths: Tuple[int, ...] = (3, 4, 6, 3),
            num_heads: Tuple[int, ...] = (1, 2, 5, 8),
            sr_ratios: Tuple[int, ...] = (8, 4, 2, 1),
            mlp_ratios: Tuple[float, ...] = (8., 8., 4., 4.),
            qkv_bias: bool = True,
            drop_rate: float = 0.,
            pos_drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            act_layer: Optional[LayerType] = None,
            norm_layer: Optional[LayerType] = None,
            norm_eps: Optional[float] = None,
            embed_norm_eps: float = 1e-5,
            block_fn: Callable[..., nn.Module] = Block,
            mlp_layer: Callable[..., nn.Module] = SlicedMlp,
            weight_init: str = '',
            device: Any = None,
            dtype: Optional[torch.dtype] = None,
    ):
        """
        Args:
            img_size: Image size of the stored position embeddings, other sizes work too.
            patch_size: Patch size of the first stage, that of the others is 2.
            global_pool: 'token' (default with class token), 'avg' (mean of patch tokens, default without) or ''.
            output_fmt: Output of `forward_features`. 'NLC' (default with class token): tokens after the final norm.
                'NCHW' (default without): feature map without a final norm.
            sr_ratios: Spatial reduction of keys and values per stage.
            pos_drop_rate: Dropout rate after the position embeddings (the original's `drop_rate`).
            proj_drop_rate: Dropout rate after the attention projection and in the MLP (the original's `drop_rate`).
            norm_layer: Norm of the blocks and final norm (default LayerNorm with eps 1e-6).
            norm_eps: Epsilon of `norm_layer`, its own if None.
            embed_norm_eps: Epsilon of the norms in patch embeddings and spatial reductions: 1e-5 in the original code,
                1e-6 in mmdetection.
            block_fn: Transformer block, called with tokens (B, N, C) and the size (H, W) of their grid.
            weight_init: '' for the original's initialisation, 'skip' for none.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        num_stages = len(depths)
        assert len(embed_dims) == len(num_heads) == len(sr_ratios) == len(mlp_ratios) == num_stages
        assert not class_token or sr_ratios[-1] == 1, 'the class token has no place in a reduced grid'
        output_fmt = output_fmt or ('NLC' if class_token else 'NCHW')
        assert output_fmt in ('NLC', 'NCHW') and weight_init in ('', 'skip')
        norm_layer = get_norm_layer(norm_layer) or partial(LayerNorm, eps=1e-6)
        if norm_eps is not None:
            norm_layer = partial(norm_layer, eps=norm_eps)
        act_layer = get_act_layer(act_layer) or nn.GELU

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.class_token = class_token
        self.output_fmt = output_fmt
        self.output_nchw = output_fmt == 'NCHW'
        self.num_prefix_tokens = 1 if class_token and not self.output_nchw else 0
        self._set_global_pool(('token' if self.num_prefix_tokens else 'avg') if global_pool is None else global_pool)
        self.depths = tuple(depths)
        self.embed_dims = tuple(embed_dims)
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.reductions = tuple(patch_size * 2 ** i for i in range(num_stages))
        self.min_input_size = max(r * sr for r, sr in zip(self.reductions, sr_ratios))

        grid_sizes = self._grid_sizes(img_size)
        dpr = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stage_kwargs = dict(
            pos_drop=pos_drop_rate, proj_drop=proj_drop_rate, attn_drop=attn_drop_rate, qkv_bias=qkv_bias,
            act_layer=act_layer, norm_layer=norm_layer, embed_norm_eps=embed_norm_eps, block_fn=block_fn,
            mlp_layer=mlp_layer, **dd)
        stages = []
        self.feature_info = []
        for i in range(num_stages):
            last = i == num_stages - 1
            stages.append(PyramidVisionTransformerStage(
                embed_dims[i - 1] if i else in_chans, embed_dims[i], depths[i], grid_sizes[i],
                patch_size=2 if i else patch_size,
                min_input_size=self.min_input_size // self.reductions[i - 1] if i else self.min_input_size,
                class_token=class_token and last, output_fmt=output_fmt if last else 'NCHW',
                drop_path=dpr[i], num_heads=num_heads[i], sr_ratio=sr_ratios[i], mlp_ratio=mlp_ratios[i],
                **stage_kwargs))
            self.feature_info += [dict(num_chs=embed_dims[i], reduction=self.reductions[i], module=f'stages.{i}')]
        self.stages = nn.Sequential(*stages)

        self.norm = nn.Identity() if self.output_nchw else norm_layer(self.num_features, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

        if weight_init != 'skip':
            self.init_weights(needs_reset=False)

    def _set_global_pool(self, global_pool: str) -> None:
        accepted = ('token', 'avg', '') if self.num_prefix_tokens else ('avg', '')
        assert global_pool in accepted, f'global_pool should be one of {accepted}, got {global_pool!r}'
        self.global_pool = global_pool

    def _grid_sizes(self, img_size: Union[int, Tuple[int, int]]) -> List[Tuple[int, int]]:
        h, w = to_2tuple(img_size)
        assert min(h, w) >= self.min_input_size, f'img_size should be at least {self.min_input_size}'
        return [(h // r, w // r) for r in self.reductions]

    @torch.jit.ignore
    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """Initialise as the original does, with `needs_reset` also what constructors do already (after `to_empty`)."""
        assert mode == ''
        for stage in self.stages:
            trunc_normal_(stage.pos_embed, std=.02)
            if stage.cls_token is not None:
                trunc_normal_(stage.cls_token, std=.02)
        self.apply(partial(self._init_weights, needs_reset=needs_reset))

    def _init_weights(self, m: nn.Module, needs_reset: bool = True) -> None:
        if isinstance(m, nn.Linear):
            trunc_normal_(m.weight, std=.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif needs_reset and hasattr(m, 'reset_parameters'):
            m.reset_parameters()  # type: ignore[operator]

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return {f'stages.{len(self.depths) - 1}.cls_token'} if self.class_token else set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(
            stem=r'^stages\.0\.(?:patch_embed|pos_embed)',
            blocks=[
                (r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^stages\.(\d+)\.(?:patch_embed|pos_embed|cls_token)', (0,)),
                (r'^norm', (99999,)),
            ])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        if global_pool is not None:
            self._set_global_pool(global_pool)
        like = next(self.parameters())
        self.num_classes = num_classes
        self.head = nn.Identity() if num_classes <= 0 else nn.Linear(
            self.num_features, num_classes, device=like.device, dtype=like.dtype)
        self.head.train(self.training)

    def set_input_size(
            self, img_size: Optional[Union[int, Tuple[int, int]]] = None, patch_size: Optional[int] = None) -> None:
        """Resize the stored position embeddings, as creating the model with that `img_size` and loading would."""
        assert patch_size is None or to_2tuple(patch_size) == to_2tuple(self.reductions[0]), 'not resized'
        if img_size is not None:
            for stage, grid_size in zip(self.stages, self._grid_sizes(img_size)):
                stage.set_grid_size(grid_size)  # type: ignore[operator]
            if update_model_input_size is not None:
                update_model_input_size(self, to_2tuple(img_size))

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """ Forward features that returns intermediates.

        Args:
            indices: Take last n stages if int, all if None, select matching indices if sequence.
            norm: Apply the final norm to the output of the last stage (the others have no norm of their own).
            stop_early: Stop iterating over stages when last desired intermediate hit.
            output_fmt: Shape of intermediate feature outputs, only 'NCHW'. The class token is left out.
            intermediates_only: Only return intermediate features (B, C, H / reduction, W / reduction).
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last_index = len(self.stages) - 1
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]

        for i, stage in enumerate(stages):
            B, H, W = x.shape[0], x.shape[2], x.shape[3]
            x = feat = stage(x)
            if i == last_index:
                x = self.norm(x)
                feat = x if norm else feat
                if not self.output_nchw:
                    patch_size: Any = stage.patch_embed.patch_size  # type: ignore[union-attr]
                    feat = feat[:, self.num_prefix_tokens:].transpose(1, 2)
                    feat = feat.reshape(B, feat.shape[1], H // patch_size, W // patch_size)
            if i in take_indices:
                intermediates.append(feat)

        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
            self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True) -> List[int]:
        """ Prune layers not required for specified intermediates. """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        if prune_end:  # what is left ends in a feature map without class token
            self.class_token, self.num_prefix_tokens = False, 0
            self.output_fmt, self.output_nchw = 'NCHW', True  # type: ignore[misc]
            self.depths = self.depths[:max_index + 1]
            self.embed_dims = self.embed_dims[:max_index + 1]
            self.reductions = self.reductions[:max_index + 1]
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.stages(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        if self.output_nchw:
            x = x.flatten(2).transpose(1, 2) if self.global_pool == 'avg' else x.permute(0, 2, 3, 1)
        if self.global_pool == 'token':
            x = x[:, 0]
        elif self.global_pool == 'avg':
            x = x[:, self.num_prefix_tokens:].mean(dim=1)
        x = self.head_drop(x)
        x = x if pre_logits else self.head(x)
        if self.output_nchw and self.global_pool == '':
            x = x.permute(0, 3, 1, 2)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def resize_pos_embeds(
        state_dict: Mapping[str, torch.Tensor], old: Tuple[int, int], new: Tuple[int, int],
        class_row: bool) -> Dict[str, torch.Tensor]:
    """Resize all position embeddings, the last one with a `class_row`, from grid `old` (h, w) of stage 1 to `new`."""
    out = dict(state_dict)
    keys = sorted(k for k in out if k.endswith('.pos_embed'))
    for key, old_i, new_i in zip(keys, stage_grids(old, len(keys)), stage_grids(new, len(keys))):
        out[key] = resample_pos_embed(out[key], new_i, old_i, num_prefix_tokens=int(class_row and key == keys[-1]))
    return out


def checkpoint_filter_fn(
        state_dict: Mapping[str, Any], model: Any, num_stages: Optional[int] = None) -> Dict[str, torch.Tensor]:
    """ Map a PVT v1 checkpoint of any known format to `model`.

    Its classes and channels, not those of the tag, go into the `pretrained_cfg` that timm compares with the model, so
    that timm keeps a head that fits, leaves out another one, and adapts the first convolution from what is there.

    Args:
        num_stages: How many stages of the model are used, all if None. A checkpoint may lack the others, which keep
            what they have.
    """
    state_dict, info, fmt = fit_to_model(state_dict, model)
    there = len(info.depths)
    got = info.depths, info.embed_dims
    want = tuple(model.depths), tuple(model.embed_dims)
    if there < (num_stages or len(model.depths)) or got != (want[0][:there], want[1][:there]):
        raise ValueError(f'Expected depths, channels {_with_name(want)}, got {_with_name(got)}.')
    class_row = info.class_row and model.class_token
    state_dict = resize_pos_embeds(state_dict, info.grid_size, model.stages[0].grid_size, class_row)
    for key, value in model.state_dict().items():
        stage = re.match(r'stages\.(\d+)\.', key)
        if stage and int(stage[1]) >= there:
            state_dict[key] = value
    if fmt == 'mmdet' and model.stages[0].patch_embed.norm.eps != 1e-6:
        _logger.info('The weights are of mmdetection, whose norms have eps 1e-6: create the model with '
                     'embed_norm_eps=1e-6 for its exact outputs.')
    cfg = getattr(model, 'pretrained_cfg', {})
    adapted = ['stages.0.patch_embed.proj.weight'] if info.in_chans != model.in_chans else []
    if update_model_input_size is None and info.in_chans != 3 and model.in_chans not in (1, 3):
        raise ValueError(f'timm < 1.0.31 replaces a first convolution of {info.in_chans} channels by random numbers.')
    if info.num_classes != model.num_classes and (info.num_classes or model.num_classes != cfg.get('num_classes')):
        adapted += ['head.weight', 'head.bias']
        if model.num_classes:
            _logger.warning(f'The checkpoint has {info.num_classes} classes, the head for {model.num_classes} is new.')
    check_keys(state_dict, model.state_dict(), ignore=adapted)
    cfg.update(num_classes=info.num_classes, input_size=(info.in_chans, *cfg.get('input_size', (3, 224, 224))[1:]))
    return state_dict


# What tells the variants apart. They share the sr_ratios and mlp_ratios.
VARIANTS: Dict[str, Dict[str, Any]] = {
    'pvt_tiny': dict(depths=(2, 2, 2, 2), embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8)),
    'pvt_small': dict(depths=(3, 4, 6, 3), embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8)),
    'pvt_medium': dict(depths=(3, 4, 18, 3), embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8)),
    'pvt_large': dict(depths=(3, 8, 27, 3), embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8)),
    'pvt_huge_v2': dict(depths=(3, 10, 60, 3), embed_dims=(128, 256, 512, 768), num_heads=(2, 4, 8, 12)),
}
# Top-1 on the ImageNet-1K validation set, as published with the weights
TOP1 = {'pvt_tiny.in1k': 75.1, 'pvt_small.in1k': 79.8, 'pvt_medium.in1k': 81.2, 'pvt_large.in1k': 81.7}


# Arguments that go with the weights of a tag, by default: dense backbones that mmdetection trained
TAG_ARGS: Dict[Optional[str], Dict[str, Any]] = {'retinanet_coco': dict(class_token=False, embed_norm_eps=1e-6)}


def find_variant(depths: Tuple[int, ...], embed_dims: Tuple[int, ...]) -> Optional[str]:
    """Name of the variant with these depths and channels, None if there is none."""
    return next((k for k, v in VARIANTS.items() if (v['depths'], v['embed_dims']) == (depths, embed_dims)), None)


def _with_name(sizes: Tuple[Tuple[int, ...], Tuple[int, ...]]) -> str:
    """Depths and channels with the name of the variant that has them, for messages."""
    name = find_variant(*sizes)
    return f'{sizes} ({name})' if name else str(sizes)


def _tag(pretrained_cfg: Any) -> Optional[str]:
    """The tag of a `pretrained_cfg`, which timm allows to be a tag, an object or a dict."""
    if isinstance(pretrained_cfg, dict):
        return pretrained_cfg.get('tag')
    return pretrained_cfg if isinstance(pretrained_cfg, str) else getattr(pretrained_cfg, 'tag', None)


def _create_pvt(variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
    if kwargs.pop('output_stride', 32) != 32:
        raise ValueError(
            'PVT has output_stride 32 only: use a decoder for feature strides 4, 8, 16, 32, such as FPN or UPerNet.')
    kwargs = {**VARIANTS[variant], **kwargs}
    kwargs = {**TAG_ARGS.get(_tag(kwargs.get('pretrained_cfg')), {}), **kwargs}
    feature_cfg = {'out_indices': tuple(range(len(kwargs['depths']))), **(kwargs.pop('feature_cfg', None) or {})}
    num_stages = len(kwargs['depths'])
    if kwargs.get('features_only', False):
        kwargs = {'class_token': False, 'output_fmt': 'NCHW', **kwargs, 'num_classes': 0}
        out_indices = kwargs.get('out_indices', feature_cfg['out_indices'])
        if not isinstance(out_indices, int):  # a number stands for the last ones
            num_stages = max(i if i >= 0 else num_stages + i for i in out_indices) + 1
    return build_model_with_cfg(
        PyramidVisionTransformer, variant, pretrained,
        pretrained_filter_fn=partial(checkpoint_filter_fn, num_stages=num_stages),
        feature_cfg=dict(feature_cfg, flatten_sequential=True), **kwargs)


def _cfg(url: str = '', **kwargs: Any) -> Dict[str, Any]:
    return {
        'url': url, 'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': None,
        'crop_pct': 0.875, 'interpolation': 'bicubic', 'fixed_input_size': False, 'min_input_size': (3, 32, 32),
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stages.0.patch_embed.proj', 'classifier': 'head',
        'license': 'apache-2.0', 'origin_url': 'https://github.com/whai362/PVT', 'paper_ids': 'arXiv:2102.12122',
        'paper_name': 'Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions',
        **kwargs,
    }


def _in1k_cfg(name: str, revision: str = '') -> Dict[str, Any]:
    return _cfg(
        url=f'https://github.com/whai362/PVT/releases/download/v2/pvt_{name}.pth',
        hf_hub_id=f'Zetatech/pvt-{name}-224{revision}')  # its model.safetensors, in transformers' format


def _retinanet_cfg(name: str, run: str) -> Dict[str, Any]:
    return _cfg(
        url=f'https://download.openmmlab.com/mmdetection/v2.0/pvt/{name}/{name}_{run}.pth',
        origin_url='https://github.com/open-mmlab/mmdetection/tree/main/configs/pvt', num_classes=0,
        pool_size=(7, 7))


default_cfgs = generate_default_cfgs({
    'pvt_tiny.in1k': _in1k_cfg('tiny', '@6a44ba96dda6a6f3e2b6913682acfa0071482e83'),
    'pvt_tiny.retinanet_coco': _retinanet_cfg('retinanet_pvt-t_fpn_1x_coco', '20210831_103110-17b566bd'),
    'pvt_small.in1k': _in1k_cfg('small'),
    'pvt_small.retinanet_coco': _retinanet_cfg('retinanet_pvt-s_fpn_1x_coco', '20210906_142921-b6c94a5b'),
    'pvt_medium.in1k': _in1k_cfg('medium', '@84cba75de906ada79a85f558d3d742c5771064a5'),
    'pvt_medium.retinanet_coco': _retinanet_cfg('retinanet_pvt-m_fpn_1x_coco', '20210831_103243-55effa1b'),
    'pvt_large.in1k': _in1k_cfg('large'),
    'pvt_huge_v2.untrained': _cfg(),
})


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    return _create_pvt('pvt_tiny', pretrained=pretrained, **kwargs)


@register_model
def pvt_small(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    return _create_pvt('pvt_small', pretrained=pretrained, **kwargs)


@register_model
def pvt_medium(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    return _create_pvt('pvt_medium', pretrained=pretrained, **kwargs)


@register_model
def pvt_large(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    return _create_pvt('pvt_large', pretrained=pretrained, **kwargs)


@register_model
def pvt_huge_v2(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    return _create_pvt('pvt_huge_v2', pretrained=pretrained, **kwargs)
