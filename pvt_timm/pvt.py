""" Pyramid Vision Transformer (v1)

Paper: `Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions`
    - https://arxiv.org/abs/2102.12122

Original code and weights: https://github.com/whai362/PVT (Apache-2.0). The outputs are those of the original code.

By default the last stage has a class token, and `forward_features` returns tokens (B, N, C) after a final norm. As a
dense backbone (`class_token=False`, the default of `features_only=True`) there is no class token and no final norm, and
`forward_features` returns the feature map (B, C, H, W) of the last stage, as in the original detection and segmentation
code. Any height and width from 32 pixels up is supported: position embeddings are stored at the grid of `img_size` and
resized in every stage.
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
    DropPath,
    LayerNorm,
    LayerType,
    Mlp,
    _assert,
    calculate_drop_path_rates,
    get_act_layer,
    get_norm_layer,
    to_2tuple,
    trunc_normal_,
    use_fused_attn,
)
from timm.models._builder import build_model_with_cfg, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function
from timm.models._manipulate import checkpoint
from timm.models._registry import generate_default_cfgs, register_model
from ._input import update_model_input_size
from .formats.architecture import check_keys, stage_grids
from .formats.mapping import fit_to_model

__all__ = ['PyramidVisionTransformer']

_logger = logging.getLogger(__name__)


@torch.fx.wrap
@register_notrace_function
def resample_pos_embed(
        pos_embed: torch.Tensor,
        size: List[int],
        grid_size: List[int],
        num_prefix_tokens: int = 0,
) -> torch.Tensor:
    """Resize a position embedding (1, num_prefix_tokens + h * w, C) from `grid_size` (h, w) to `size`.

    As in the original: bilinear, align_corners=False, no antialias, and the rows of prefix tokens (the class token) are
    kept as they are. timm's `resample_abs_pos_embed` computes in float32 whatever the dtype.
    """
    # A branch on the size would specialise a traced or compiled graph to the example size. Resizing to the stored grid
    # gives the stored values back exactly.
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
    """ Spatial-reduction attention (paper section 3.3)

    Keys and values come from a grid that is `sr_ratio` times smaller in height and width.
    """
    fused_attn: torch.jit.Final[bool]

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            sr_ratio: int = 1,
            qkv_bias: bool = True,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            norm_eps: float = 1e-5,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        assert dim % num_heads == 0, f'dim {dim} should be divisible by num_heads {num_heads}.'
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

        if self.sr is not None and self.norm is not None:
            # No copy: NHWC tokens viewed as NCHW are channels_last already, at batch size 1 too.
            x = x.reshape(B, size[0], size[1], C).permute(0, 3, 1, 2)
            x = self.sr(x).flatten(2).transpose(1, 2)
            x = self.norm(x)
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
        x = self.proj(x)
        x = self.proj_drop(x)
        return x


class Block(nn.Module):
    """ Pre-norm transformer block on tokens (B, N, C) """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            sr_ratio: int = 1,
            mlp_ratio: float = 4.,
            qkv_bias: bool = True,
            proj_drop: float = 0.,
            attn_drop: float = 0.,
            drop_path: float = 0.,
            sr_norm_eps: float = 1e-5,
            act_layer: Callable[..., nn.Module] = nn.GELU,
            norm_layer: Callable[..., nn.Module] = partial(LayerNorm, eps=1e-6),
            mlp_layer: Callable[..., nn.Module] = Mlp,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = Attention(
            dim,
            num_heads=num_heads,
            sr_ratio=sr_ratio,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_eps=sr_norm_eps,
            **dd,
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), size))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class PatchEmbed(nn.Module):
    """ Non-overlapping patches to tokens

    Pixels at the right and bottom that do not fill a patch are dropped, as in the original.
    """

    def __init__(
            self,
            patch_size: int,
            in_chans: int,
            embed_dim: int,
            norm_eps: float = 1e-5,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, **dd)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps, **dd)

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, Tuple[int, int]]:
        x = self.proj(x)
        size = (x.shape[2], x.shape[3])
        x = self.norm(x.flatten(2).transpose(1, 2))
        return x, size


class PyramidVisionTransformerStage(nn.Module):
    """ Patch embedding, position embedding and blocks

    Takes a feature map (B, in_chans, H, W). Returns a feature map (B, dim, H // patch_size, W // patch_size) in
    channels_last memory format, or tokens (B, N, dim) with the class token first where `output_fmt` is 'NLC'.
    """

    def __init__(
            self,
            in_chans: int,
            dim: int,
            depth: int,
            grid_size: Tuple[int, int],
            patch_size: int = 2,
            min_input_size: int = 1,
            class_token: bool = False,
            output_fmt: str = 'NCHW',
            num_heads: int = 8,
            sr_ratio: int = 1,
            mlp_ratio: float = 4.,
            qkv_bias: bool = True,
            pos_drop: float = 0.,
            proj_drop: float = 0.,
            attn_drop: float = 0.,
            drop_path: Union[List[float], float] = 0.,
            embed_norm_eps: float = 1e-5,
            act_layer: Callable[..., nn.Module] = nn.GELU,
            norm_layer: Callable[..., nn.Module] = partial(LayerNorm, eps=1e-6),
            mlp_layer: Callable[..., nn.Module] = Mlp,
            block_fn: Callable[..., nn.Module] = Block,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.dim = dim
        self.grid_size = grid_size
        self.min_input_size = min_input_size
        self.num_prefix_tokens = 1 if class_token else 0
        self.output_nchw = output_fmt == 'NCHW'
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=dim,
            norm_eps=embed_norm_eps,
            **dd,
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd)) if class_token else None
        num_tokens = self.num_prefix_tokens + grid_size[0] * grid_size[1]
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, dim, **dd))
        self.pos_drop = nn.Dropout(p=pos_drop)
        self.blocks = nn.ModuleList([block_fn(
            dim,
            num_heads=num_heads,
            sr_ratio=sr_ratio,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            proj_drop=proj_drop,
            attn_drop=attn_drop,
            drop_path=drop_path[i] if isinstance(drop_path, list) else drop_path,
            sr_norm_eps=embed_norm_eps,
            act_layer=act_layer,
            norm_layer=norm_layer,
            mlp_layer=mlp_layer,
            **dd,
        ) for i in range(depth)])

    def set_grid_size(self, grid_size: Tuple[int, int]) -> None:
        if grid_size != self.grid_size:  # same size: keep the Parameter, optimizers hold it
            pos_embed = resample_pos_embed(
                self.pos_embed.detach(), grid_size, self.grid_size, self.num_prefix_tokens)
            self.pos_embed = nn.Parameter(pos_embed, requires_grad=self.pos_embed.requires_grad)
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
    """ Pyramid Vision Transformer (v1)

    A PyTorch impl of `Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions` -
        https://arxiv.org/abs/2102.12122

    It takes images (B, C, H, W) of any height and width from 32 pixels up. `forward` returns logits (B, num_classes),
    or embeddings (B, channels) with `num_classes=0`. `forward_features` returns tokens (B, 1 + H/32 * W/32, channels),
    the class token first, or with `class_token=False` a feature map (B, channels, H/32, W/32). `forward_intermediates`
    returns the feature maps of all stages.
    """

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            patch_size: int = 4,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: Optional[str] = None,
            class_token: bool = True,
            final_norm: Optional[bool] = None,
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
            mlp_layer: Callable[..., nn.Module] = Mlp,
            weight_init: str = '',
            device=None,
            dtype=None,
    ):
        """
        Args:
            img_size: Image size of the stored position embeddings. Images of other sizes are supported too.
            patch_size: Patch size of the first stage. Every other stage halves height and width.
            in_chans: Number of image channels.
            num_classes: Number of classes of the head, 0 for no head.
            global_pool: 'token' (class token), 'avg' (mean of the patch tokens) or '' (no pooling). Default: 'token' if
                the class token is in the output, else 'avg'.
            class_token: Add a class token in the last stage.
            final_norm: Apply a norm to the output of the last stage. Default: as `class_token`.
            output_fmt: Format of the output of `forward_features`, tokens 'NLC' or a feature map 'NCHW'. A feature map
                has no place for the class token. Default: 'NLC' with class token, else 'NCHW'.
            embed_dims: Number of channels of each stage.
            depths: Number of blocks of each stage.
            num_heads: Number of attention heads of each stage.
            sr_ratios: How many times smaller the grid of keys and values is, for each stage.
            mlp_ratios: Ratio of hidden to embedding channels in the MLP of each stage.
            qkv_bias: Add a bias to queries, keys and values.
            drop_rate: Dropout rate before the head.
            pos_drop_rate: Dropout rate after the position embeddings.
            proj_drop_rate: Dropout rate after the attention projection and in the MLP (the original has one `drop_rate`
                for this and `pos_drop_rate`).
            attn_drop_rate: Dropout rate of the attention weights.
            drop_path_rate: Stochastic depth rate of the last block. It rises linearly, from 0 at the first block.
            act_layer: Activation of the MLP, GELU by default.
            norm_layer: Norm in the blocks and final norm, LayerNorm with eps 1e-6 by default.
            norm_eps: Epsilon of `norm_layer`. By default it is not passed on.
            embed_norm_eps: Epsilon of the norms in patch embeddings and spatial reductions. The original has 1e-5,
                mmdetection 1e-6.
            block_fn: Transformer block. It is called with tokens (B, N, C) and the size (H, W) of their grid.
            mlp_layer: MLP in the blocks.
            weight_init: '' to initialise as the original does, 'skip' to leave parameters uninitialised.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        num_stages = len(depths)
        assert len(embed_dims) == len(num_heads) == len(sr_ratios) == len(mlp_ratios) == num_stages, \
            'depths, embed_dims, num_heads, sr_ratios and mlp_ratios should have one value per stage.'
        assert not class_token or sr_ratios[-1] == 1, 'A class token needs sr_ratio 1 in the last stage.'
        assert output_fmt in (None, 'NLC', 'NCHW'), f"output_fmt should be 'NLC' or 'NCHW', got {output_fmt!r}."
        assert weight_init in ('', 'skip'), f"weight_init should be '' or 'skip', got {weight_init!r}."
        if final_norm is None:
            final_norm = class_token
        if output_fmt is None:
            output_fmt = 'NLC' if class_token else 'NCHW'
        norm_layer = get_norm_layer(norm_layer) or partial(LayerNorm, eps=1e-6)
        if norm_eps is not None:
            norm_layer = partial(norm_layer, eps=norm_eps)
        act_layer = get_act_layer(act_layer) or nn.GELU

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.patch_size = patch_size
        self.class_token = class_token
        self.output_fmt = output_fmt
        self.output_nchw = output_fmt == 'NCHW'
        # tokens before the patches in the output
        self.num_prefix_tokens = 1 if class_token and not self.output_nchw else 0
        if global_pool is None:
            global_pool = 'token' if self.num_prefix_tokens else 'avg'
        self._set_global_pool(global_pool)
        self.depths = tuple(depths)
        self.embed_dims = tuple(embed_dims)
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.reductions = tuple(patch_size * 2 ** i for i in range(num_stages))
        self.min_input_size = max(r * sr for r, sr in zip(self.reductions, sr_ratios))
        self.feature_info = []

        grid_sizes = self._grid_sizes(img_size)
        # `stagewise` makes a list for each stage. Rates rise from block to block with it too
        dpr = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i in range(num_stages):
            last = i == num_stages - 1
            prev_reduction = self.reductions[i - 1] if i > 0 else 1
            stages += [PyramidVisionTransformerStage(
                in_chans=embed_dims[i - 1] if i > 0 else in_chans,
                dim=embed_dims[i],
                depth=depths[i],
                grid_size=grid_sizes[i],
                patch_size=2 if i > 0 else patch_size,
                min_input_size=self.min_input_size // prev_reduction,
                class_token=class_token and last,
                output_fmt=output_fmt if last else 'NCHW',
                num_heads=num_heads[i],
                sr_ratio=sr_ratios[i],
                mlp_ratio=mlp_ratios[i],
                qkv_bias=qkv_bias,
                pos_drop=pos_drop_rate,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=dpr[i],
                embed_norm_eps=embed_norm_eps,
                act_layer=act_layer,
                norm_layer=norm_layer,
                mlp_layer=mlp_layer,
                block_fn=block_fn,
                **dd,
            )]
            self.feature_info += [dict(num_chs=embed_dims[i], reduction=self.reductions[i], module=f'stages.{i}')]
        self.stages = nn.Sequential(*stages)

        self.norm = norm_layer(self.num_features, **dd) if final_norm else nn.Identity()
        self.norm_nchw = final_norm and self.output_nchw
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

        if weight_init != 'skip':
            self.init_weights(needs_reset=False)

    def _set_global_pool(self, global_pool: str) -> None:
        supported = ('token', 'avg', '') if self.num_prefix_tokens else ('avg', '')
        assert global_pool in supported, f'global_pool should be one of {supported}, got {global_pool!r}.'
        self.global_pool = global_pool

    def _grid_sizes(self, img_size: Union[int, Tuple[int, int]]) -> List[Tuple[int, int]]:
        h, w = to_2tuple(img_size)
        assert min(h, w) >= self.min_input_size, f'img_size should be at least {self.min_input_size}.'
        return [(h // r, w // r) for r in self.reductions]

    @torch.jit.ignore
    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """Initialise the weights as the original code does.

        Args:
            mode: Only '' is supported.
            needs_reset: Also initialise what the constructors of the layers initialise, which `to_empty` undoes.
        """
        assert mode == '', f"mode should be '', got {mode!r}."
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
        elif needs_reset:
            reset_parameters = getattr(m, 'reset_parameters', None)
            if reset_parameters is not None:
                reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        # the position embeddings get weight decay, as in the original
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
        for module in self.modules():
            if isinstance(module, PyramidVisionTransformerStage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        if global_pool is not None:
            self._set_global_pool(global_pool)
        p = next(self.parameters())
        dd: Dict[str, Any] = {'device': p.device, 'dtype': p.dtype}
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def set_input_size(
            self,
            img_size: Optional[Union[int, Tuple[int, int]]] = None,
            patch_size: Optional[int] = None,
    ) -> None:
        """Resize the stored position embeddings to those of another image size.

        The result equals a model that is created with that `img_size` and loads the same weights.

        Args:
            img_size: New image size, None to change nothing.
            patch_size: The patch size of the model, or None. Other values are not supported.
        """
        assert patch_size is None or to_2tuple(patch_size) == to_2tuple(self.patch_size), \
            f'patch_size should stay {self.patch_size}, got {patch_size}.'
        if img_size is None:
            return
        grid_sizes = self._grid_sizes(img_size)
        for i, module in enumerate(self.stages):
            assert isinstance(module, PyramidVisionTransformerStage), f'Expected a stage, got {type(module)}.'
            module.set_grid_size(grid_sizes[i])
        update_model_input_size(self, to_2tuple(img_size))

    def _apply_norm(self, x: torch.Tensor) -> torch.Tensor:
        if self.norm_nchw:
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.norm(x)

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
            x: Images (B, in_chans, H, W).
            indices: Take last n stages if int, all if None, select matching indices if sequence.
            norm: Apply the final norm to the output of the last stage. The other stages have no norm.
            stop_early: Stop iterating over stages when last desired intermediate hit.
            output_fmt: Shape of intermediate feature outputs, only 'NCHW'. The class token is left out.
            intermediates_only: Only return intermediate features.
        Returns:
            Feature maps (B, C, H / reduction, W / reduction), after the output of `forward_features` in a tuple unless
            `intermediates_only`.
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
                x = self._apply_norm(x)
                feat = x if norm else feat
                if not self.output_nchw:
                    patch_size = 2 if i > 0 else self.patch_size
                    feat = feat[:, self.num_prefix_tokens:].transpose(1, 2)
                    feat = feat.reshape(B, feat.shape[1], H // patch_size, W // patch_size)
            if i in take_indices:
                intermediates.append(feat)

        if intermediates_only:
            return intermediates

        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """ Prune layers not required for specified intermediates.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        if prune_end:
            # only the last stage of the whole model has a class token, so the kept ones give a feature map
            self.class_token = False
            self.num_prefix_tokens = 0
            self.output_fmt = 'NCHW'
            self.output_nchw = True
            self.depths = self.depths[:max_index + 1]
            self.embed_dims = self.embed_dims[:max_index + 1]
            self.reductions = self.reductions[:max_index + 1]
            self.num_features = self.head_hidden_size = self.embed_dims[-1]
        if prune_norm or prune_end:
            self.norm = nn.Identity()
            self.norm_nchw = False
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stages(x)
        x = self._apply_norm(x)
        return x

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
        """Return logits (B, num_classes) for images (B, C, H, W), or embeddings (B, channels) without a head."""
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def resize_pos_embeds(
        state_dict: Mapping[str, torch.Tensor],
        old: Tuple[int, int],
        new: Tuple[int, int],
        class_row: bool,
) -> Dict[str, torch.Tensor]:
    """Resize the position embeddings of all stages.

    Args:
        state_dict: Weights of a model.
        old: Grid (h, w) of the first stage that they have.
        new: Grid (h, w) of the first stage to resize to.
        class_row: The last position embedding starts with a row for the class token.
    """
    out = dict(state_dict)
    keys = sorted(k for k in out if k.endswith('.pos_embed'))
    for key, old_i, new_i in zip(keys, stage_grids(old, len(keys)), stage_grids(new, len(keys))):
        num_prefix_tokens = 1 if class_row and key == keys[-1] else 0
        out[key] = resample_pos_embed(out[key], new_i, old_i, num_prefix_tokens)
    return out


def checkpoint_filter_fn(
        state_dict: Mapping[str, Any],
        model: Any,
        num_stages: Optional[int] = None,
) -> Dict[str, torch.Tensor]:
    """ Map a PVT v1 checkpoint of any known format to `model`.

    Neither is changed. The head and the first convolution may keep other shapes than in the model: timm then drops or
    adapts them, as `model.pretrained_cfg` says.

    Args:
        state_dict: The checkpoint.
        model: The model that will load it.
        num_stages: How many stages of the model are used, all if None. If the checkpoint does not have the other
            stages, the model's values are returned for them.

    Raises:
        ValueError: The checkpoint does not fit the model. The message says where.
    """
    state_dict, info, fmt = fit_to_model(state_dict, model)
    found = len(info.depths)
    depths, embed_dims = tuple(model.depths), tuple(model.embed_dims)
    fits = info.depths == depths[:found] and info.embed_dims == embed_dims[:found]
    if not fits or found < (num_stages or len(depths)):
        raise ValueError(
            f'Expected a checkpoint with depths {depths} and embed_dims {embed_dims}, '
            f'got one with depths {info.depths} and embed_dims {info.embed_dims}.')

    class_row = info.class_row and model.class_token
    state_dict = resize_pos_embeds(state_dict, info.grid_size, model.stages[0].grid_size, class_row)
    reference = model.state_dict()
    for key, value in reference.items():
        stage = re.match(r'stages\.(\d+)\.', key)
        if stage and int(stage[1]) >= found:
            state_dict[key] = value

    if fmt == 'mmdet' and model.stages[0].patch_embed.norm.eps != 1e-6:
        _logger.info(
            'The weights are from mmdetection, where all norms have eps 1e-6. '
            'Create the model with embed_norm_eps=1e-6 for the same outputs.')

    adapted = []
    if info.in_chans != model.in_chans:
        adapted += ['stages.0.patch_embed.proj.weight']
    # a missing head is an error unless the caller changed num_classes
    new_head = model.num_classes != getattr(model, 'pretrained_cfg', {}).get('num_classes')
    if info.num_classes != model.num_classes and (info.num_classes or new_head):
        adapted += ['head.weight', 'head.bias']
        if model.num_classes:
            _logger.warning(f'The checkpoint has {info.num_classes} classes, the head for {model.num_classes} is new.')
    check_keys(state_dict, reference, ignore=adapted)
    return state_dict


# Default model arguments of tags with other weights than those of the original classifiers
TAG_ARGS: Dict[Optional[str], Dict[str, Any]] = {
    # backbones of RetinaNet, trained with mmdetection
    'retinanet_coco': dict(class_token=False, embed_norm_eps=1e-6),
}


def _create_pvt(variant: str, pretrained: bool = False, **kwargs) -> PyramidVisionTransformer:
    tag = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg')).tag
    kwargs = {**TAG_ARGS.get(tag, {}), **kwargs}
    num_stages = len(kwargs['depths'])
    feature_cfg = {'out_indices': tuple(range(num_stages)), **(kwargs.pop('feature_cfg', None) or {})}
    if kwargs.get('features_only', False):
        kwargs = {'class_token': False, 'final_norm': False, 'output_fmt': 'NCHW', **kwargs, 'num_classes': 0}
        out_indices = kwargs.get('out_indices', feature_cfg['out_indices'])
        if not isinstance(out_indices, int):  # an int takes the last stages
            num_stages = max(i if i >= 0 else num_stages + i for i in out_indices) + 1
    model = build_model_with_cfg(
        PyramidVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=partial(checkpoint_filter_fn, num_stages=num_stages),
        feature_cfg=dict(feature_cfg, flatten_sequential=True),
        **kwargs,
    )
    return model


def _cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    return {
        'url': url, 'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': None,
        'crop_pct': 0.875, 'interpolation': 'bicubic', 'fixed_input_size': False, 'min_input_size': (3, 32, 32),
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stages.0.patch_embed.proj', 'classifier': 'head',
        'license': 'apache-2.0', 'origin_url': 'https://github.com/whai362/PVT', 'paper_ids': 'arXiv:2102.12122',
        'paper_name': 'Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions',
        **kwargs
    }


def _cfg_mmdet(url: str) -> Dict[str, Any]:
    return _cfg(
        url=f'https://download.openmmlab.com/mmdetection/v2.0/pvt/{url}',
        origin_url='https://github.com/open-mmlab/mmdetection/tree/main/configs/pvt',
        num_classes=0,
        pool_size=(7, 7),
    )


default_cfgs = generate_default_cfgs({
    # the original weights: the files of the original release, and in transformers' format on the hub
    'pvt_tiny.in1k': _cfg(
        url='https://github.com/whai362/PVT/releases/download/v2/pvt_tiny.pth',
        hf_hub_id='Zetatech/pvt-tiny-224'),
    'pvt_small.in1k': _cfg(
        url='https://github.com/whai362/PVT/releases/download/v2/pvt_small.pth',
        hf_hub_id='Zetatech/pvt-small-224'),
    'pvt_medium.in1k': _cfg(
        url='https://github.com/whai362/PVT/releases/download/v2/pvt_medium.pth',
        hf_hub_id='Zetatech/pvt-medium-224'),
    'pvt_large.in1k': _cfg(
        url='https://github.com/whai362/PVT/releases/download/v2/pvt_large.pth',
        hf_hub_id='Zetatech/pvt-large-224'),

    # backbones of detectors, no classifier
    'pvt_tiny.retinanet_coco': _cfg_mmdet(
        'retinanet_pvt-t_fpn_1x_coco/retinanet_pvt-t_fpn_1x_coco_20210831_103110-17b566bd.pth'),
    'pvt_small.retinanet_coco': _cfg_mmdet(
        'retinanet_pvt-s_fpn_1x_coco/retinanet_pvt-s_fpn_1x_coco_20210906_142921-b6c94a5b.pth'),
    'pvt_medium.retinanet_coco': _cfg_mmdet(
        'retinanet_pvt-m_fpn_1x_coco/retinanet_pvt-m_fpn_1x_coco_20210831_103243-55effa1b.pth'),

    'pvt_huge_v2.untrained': _cfg(),
})


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs) -> PyramidVisionTransformer:
    model_args = dict(depths=(2, 2, 2, 2), embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8))
    return _create_pvt('pvt_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def pvt_small(pretrained: bool = False, **kwargs) -> PyramidVisionTransformer:
    model_args = dict(depths=(3, 4, 6, 3), embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8))
    return _create_pvt('pvt_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def pvt_medium(pretrained: bool = False, **kwargs) -> PyramidVisionTransformer:
    model_args = dict(depths=(3, 4, 18, 3), embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8))
    return _create_pvt('pvt_medium', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def pvt_large(pretrained: bool = False, **kwargs) -> PyramidVisionTransformer:
    model_args = dict(depths=(3, 8, 27, 3), embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8))
    return _create_pvt('pvt_large', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def pvt_huge_v2(pretrained: bool = False, **kwargs) -> PyramidVisionTransformer:
    # In the original code, without weights. It is here for checkpoints that were trained with that code.
    model_args = dict(depths=(3, 10, 60, 3), embed_dims=(128, 256, 512, 768), num_heads=(2, 4, 8, 12))
    return _create_pvt('pvt_huge_v2', pretrained=pretrained, **dict(model_args, **kwargs))
