""" What a state dict under timm's names says about its model. """
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import torch

from .names import StateDict, some_names

__all__ = ['Architecture', 'Grid', 'check_keys', 'describe', 'drop_parts', 'stage_grids']

Grid = Tuple[int, int]  # height, width


@dataclass(frozen=True)
class Architecture:
    """What a state dict under timm's names says about its model."""
    depths: Tuple[int, ...]
    embed_dims: Tuple[int, ...]
    sr_ratios: Tuple[int, ...]  # spatial reduction per stage
    mlp_ratios: Tuple[float, ...]
    patch_size: int  # of the first stage
    in_chans: int
    num_classes: int  # 0 without head
    class_token: bool
    class_row: bool  # the last position embedding starts with a row for a class token, even if there is no such token
    norm: bool  # there is a final norm
    qkv_bias: bool
    grid_size: Grid  # of the first stage's position embedding
    dtype: torch.dtype  # of the first weight

    @property
    def img_size(self) -> Grid:
        """Smallest height and width in pixels that give `grid_size`."""
        return self.grid_size[0] * self.patch_size, self.grid_size[1] * self.patch_size


def stage_grids(grid_size: Grid, num_stages: int) -> List[Grid]:
    """Return the grids (height, width) of all stages from that of the first one. Each stage halves and rounds down."""
    return [(grid_size[0] // 2 ** i, grid_size[1] // 2 ** i) for i in range(num_stages)]


def describe(
        state_dict: Mapping[str, torch.Tensor],
        img_size: Optional[Grid] = None,
        other_sizes: Sequence[Optional[Grid]] = (),
        prefer_square: bool = False,
) -> Architecture:
    """Return the architecture that a state dict under timm's names has.

    Height and width cannot be read from the number of rows of a position embedding. Without `img_size`, a square image
    and `other_sizes` are tried.

    Args:
        img_size: Height and width of the images that the position embeddings are for, if they are known.
        other_sizes: More sizes to try. None is ignored.
        prefer_square: Whether a square size that fits is used without trying other sizes.

    Raises:
        ValueError: A parameter is missing, or no size fits, or several do.
    """
    depths = _depths(state_dict)
    stages = range(len(depths))
    projs = [_need(state_dict, f'stages.{i}.patch_embed.proj.weight', 4) for i in stages]
    fc1s = [_need(state_dict, f'stages.{i}.blocks.0.mlp.fc1.weight', 2) for i in stages]
    reductions = [f'stages.{i}.blocks.0.attn.sr.weight' for i in stages]
    rows = [_need(state_dict, f'stages.{i}.pos_embed', 3).shape[1] for i in stages]
    class_token = f'stages.{stages[-1]}.cls_token' in state_dict
    patch_size = projs[0].shape[-1]

    side = math.isqrt(rows[0]) * patch_size
    sizes = [img_size] if img_size else [(side, side), *(size for size in other_sizes if size)]
    fitting: Dict[Grid, bool] = {}  # grid -> whether the last stage has a row for the class token
    for height, width in sizes:
        grid_size = height // patch_size, width // patch_size
        class_row = _class_row(rows, grid_size, class_token)
        if class_row is not None:
            fitting[grid_size] = class_row
        if prefer_square and fitting:
            break
    if not fitting and img_size:
        raise ValueError(
            f'Expected position embeddings of {img_size[0]}x{img_size[1]} images, they have {rows} rows.')
    if not fitting:
        raise ValueError(
            f'Expected position embeddings whose grid halves in height and width per stage, of square images or of the '
            f'size that is given, got {rows} rows. Pass img_size if they are of others.')
    if len(fitting) > 1:
        both = ' and of '.join(f'{h * patch_size}x{w * patch_size}' for h, w in fitting)
        raise ValueError(
            f'The position embeddings have as many rows as those of {both} images. Say which one is right: '
            f'--source-size of pvt-convert, or source_size= of pvt_timm.create_from_checkpoint.')
    (grid_size, class_row), = fitting.items()

    has_head = any(key.startswith('head.') for key in state_dict)
    return Architecture(
        depths=depths,
        embed_dims=tuple(proj.shape[0] for proj in projs),
        sr_ratios=tuple(_need(state_dict, key, 4).shape[-1] if key in state_dict else 1 for key in reductions),
        mlp_ratios=tuple(fc1.shape[0] / proj.shape[0] for fc1, proj in zip(fc1s, projs)),
        patch_size=patch_size,
        in_chans=projs[0].shape[1],
        num_classes=_need(state_dict, 'head.weight', 2).shape[0] if has_head else 0,
        class_token=class_token,
        class_row=class_row,
        norm='norm.weight' in state_dict,
        qkv_bias=any(key.endswith(('.attn.q.bias', '.attn.kv.bias')) for key in state_dict),
        grid_size=grid_size,
        dtype=projs[0].dtype,
    )


def _depths(state_dict: Mapping[str, torch.Tensor]) -> Tuple[int, ...]:
    """Return the number of blocks per stage. A gap in the numbers of blocks is an error."""
    blocks = set()
    for key in state_dict:
        match = re.match(r'stages\.(\d+)\.blocks\.(\d+)\.', key)
        if match:
            blocks.add((int(match[1]), int(match[2])))
    depths = Counter(stage for stage, _ in blocks)
    num_stages = max(depths, default=3) + 1
    for stage in range(num_stages):
        for block in range(depths[stage] or 1):
            if (stage, block) not in blocks:
                raise ValueError(f'Missing in the checkpoint: stages.{stage}.blocks.{block}.')
    return tuple(depths[stage] for stage in range(num_stages))


def _class_row(rows: Sequence[int], grid_size: Grid, class_token: bool) -> Optional[bool]:
    """Return whether the last position embedding has a row for a class token, None if they do not fit `grid_size`.

    Args:
        rows: Number of rows of the position embedding of each stage.
        grid_size: Grid of the first stage.
        class_token: Whether the last stage has a class token.
    """
    *others, last = (height * width for height, width in stage_grids(grid_size, len(rows)))
    if last == 0 or list(rows[:-1]) != others:
        return None
    extra = rows[-1] - last
    if extra == 1 or extra == 0 and not class_token:
        return extra == 1
    return None


def _need(state_dict: Mapping[str, torch.Tensor], key: str, ndim: int) -> torch.Tensor:
    x = state_dict.get(key)
    if x is None:
        raise ValueError(f'Missing in the checkpoint: {key}.')
    if x.ndim != ndim or 0 in x.shape:
        raise ValueError(f'Expected {ndim} dimensions, none of them 0, for {key}, got shape {list(x.shape)}.')
    return x


def drop_parts(state_dict: Mapping[str, torch.Tensor], parts: Sequence[str], class_row: bool = True) -> StateDict:
    """Leave out parts of a state dict under timm's names.

    Args:
        parts: Any of 'class_token' (with its row of the position embedding), 'norm', 'head'.
        class_row: Whether the last position embedding has a row for the class token (see `describe`).
    """
    out = {key: value for key, value in state_dict.items() if key.partition('.')[0] not in parts}
    if 'class_token' in parts:
        out = {key: value for key, value in out.items() if not key.endswith('.cls_token')}
        if class_row:
            last = max(key for key in out if key.endswith('.pos_embed'))
            out[last] = out[last][:, 1:]
    return out


def check_keys(
        state_dict: Mapping[str, Any], reference: Mapping[str, torch.Tensor], ignore: Iterable[str] = (),
) -> None:
    """Refuse a state dict whose names or shapes differ from those of `reference`, except the names in `ignore`."""
    ignored = set(ignore)
    got = {key: list(getattr(value, 'shape', ())) for key, value in state_dict.items() if key not in ignored}
    want = {key: list(value.shape) for key, value in reference.items() if key not in ignored}
    missing = [key for key in want if key not in got]
    if missing:
        raise ValueError(f'Missing in the checkpoint: {some_names(missing)}.')
    unknown = [key for key in got if key not in want]
    if unknown:
        raise ValueError(f'Not part of the model, in the checkpoint: {some_names(unknown)}.')
    wrong = [f'{key} {got[key]} instead of {want[key]}' for key in want if got[key] != want[key]]
    if wrong:
        raise ValueError(f'Wrong shape in the checkpoint: {some_names(wrong)}.')
