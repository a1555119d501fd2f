""" Position embeddings on a grid per stage: sizes, resizing, and telling the grid from a checkpoint. """
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from timm.models import register_notrace_function


def stage_grids(grid_size: Tuple[int, int], num_stages: int = 4) -> List[Tuple[int, int]]:
    """Grids (height, width) of all stages, from that of the first one. Every stage halves and floors."""
    return [(grid_size[0] // 2 ** i, grid_size[1] // 2 ** i) for i in range(num_stages)]


def source_grid(
        counts: Sequence[int],
        hint: Optional[Tuple[int, int]] = None,
        class_row: Optional[bool] = None,
) -> Tuple[Tuple[int, int], int]:
    """Tell the grid that stored position embeddings were made for from how many rows they have.

    Args:
        counts: Rows of the position embedding of each stage.
        hint: Grid of the first stage to take if it fits.
        class_row: Whether the last one has a row for the class token, None to find out.

    Returns:
        Grid (height, width) of the first stage and the number of class token rows (0 or 1). Where the rows fit both a
        square and another grid, the square one.

    Raises:
        ValueError: No grid fits, or only non-square ones do and `hint` does not say which.
    """
    class_rows = (0, 1) if class_row is None else (int(class_row),)
    fits = []
    for h in range(1, counts[0] + 1) if counts[0] <= 2 ** 22 else ():
        if counts[0] % h:
            continue
        grids = [h_ * w_ for h_, w_ in stage_grids((h, counts[0] // h), len(counts))]
        rows = counts[-1] - grids[-1]
        if 0 not in grids and grids[:-1] == list(counts[:-1]) and rows in class_rows:
            fits.append(((h, counts[0] // h), rows))
    for grid, rows in fits:
        if hint is not None and grid == tuple(hint):
            return grid, rows
    for grid, rows in fits:
        if grid[0] == grid[1]:
            return grid, rows
    if fits:
        raise ValueError(
            f'Expected to know the image size of position embeddings with {list(counts)} rows: the grids '
            f'{[grid for grid, _ in fits[:4]]} fit. Pass img_size.')
    raise ValueError(f'Expected position embeddings that halve in height and width per stage, got {list(counts)} rows.')


@torch.fx.wrap
@register_notrace_function
def resample_pos_embed(
        pos_embed: torch.Tensor,
        size: List[int],
        grid_size: List[int],
        num_prefix_tokens: int = 0,
) -> torch.Tensor:
    """Resize a position embedding as the original does: bilinear, align_corners=False, no antialias.

    timm's `resample_abs_pos_embed` is not used because it computes in float32 whatever the dtype.

    Args:
        pos_embed: Position embedding (1, num_prefix_tokens + h * w, C).
        size: Height and width of the grid to resize to, in tokens.
        grid_size: Height and width (h, w) of the stored grid.
        num_prefix_tokens: Leading rows (class token) that are kept as they are.

    Returns:
        Position embedding (1, num_prefix_tokens + size[0] * size[1], C).
    """
    if torch.jit.is_scripting():
        graph = False
    else:
        # A Python branch on the size would tie a traced or compiled graph to the example input. Resizing to the stored
        # grid gives back the stored values exactly, so both ways are equal.
        graph = torch.jit.is_tracing() or torch.compiler.is_compiling()
    if not graph and size[0] == grid_size[0] and size[1] == grid_size[1]:
        return pos_embed

    prefix, grid = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    grid = grid if grid.dtype == torch.float64 else grid.float()
    grid = grid.reshape(1, grid_size[0], grid_size[1], -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(size[0], size[1]), mode='bilinear', align_corners=False)
    grid = grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    return torch.cat([prefix, grid], dim=1) if num_prefix_tokens else grid
