""" A smaller graph for inference: `pvt_timm.simplify(model)` computes the same numbers with fewer operations.

Inference engines do not find these simplifications by themselves, because they follow from how attention works:
  * If the output is the class token, the last block computes its query and its MLP for this token only.
  * The bias of the keys is left out: it adds the same number to the scores of all keys, and softmax ignores that.
  * The bias of the values is moved to the bias of the output: the weights of a softmax sum to 1, so it is a constant.
  * The scale of the scores is moved to the weights of the queries.
  * A score is x (Wq' Wk) z' for tokens x and z. With few keys it is cheaper to multiply z by the product of both
    matrices than x and z by one matrix each. In the same way, the matrix of the output is multiplied to that of the
    values (`folding_is_cheaper`). This is called folding.
"""
import copy
from typing import Any, Iterator, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Mlp, to_2tuple

from .fused import MANY_KEYS, NORMS, NOTHING, is_plain, needs_class_token_only, patched
from .pvt import Attention, Block, PyramidVisionTransformer, PyramidVisionTransformerStage
from .sliced_mlp import SlicedMlp

__all__ = ['simplify']


def simplify(model: nn.Module, img_size: Optional[Union[int, Tuple[int, int]]] = None) -> nn.Module:
    """Return a copy of a model for inference that computes the same with fewer operations. The model is not changed.

    The outputs are equal to 1e-5 in float32 and to 1e-10 in float64, relative to the largest value, at any image and
    batch size. The copy can be scripted, traced, exported and compiled. It has no dropout, and its weights have no
    gradients.

    Args:
        model: A PVT or any module with PVT stages inside.
        img_size: Height and width of images at which the operations are counted, to choose the cheaper form of a layer
            (default that of the position embeddings).

    Returns:
        For a classifier that pools the class token: a module with `forward` only, because it does not compute the other
        tokens in the last block. Otherwise: a copy of the model with other attention layers. Layers of other classes or
        with hooks are not changed.

    Raises:
        ValueError: There is no PVT stage in the model, or the code of its layers is patched.
    """
    if patched():
        raise ValueError(f'Expected the code of the layers as it was imported, but {patched()} is patched')
    small: Any = copy.deepcopy(model).eval().requires_grad_(False)
    token_stage = small.stages[-1] if needs_class_token_only(small) else None
    found = False
    for stage, grid in _stages_and_grids(small, img_size):
        found = True
        for i, block in enumerate(stage.blocks):
            if type(block) is not Block or not _is_plain_attention(block.attn):
                continue
            attn = block.attn
            if stage is token_stage and i == len(stage.blocks) - 1 and _is_plain_block(block):
                stage.blocks[i] = ClassTokenBlock(block, attn)
                continue
            queries = stage.num_prefix_tokens + grid[0] * grid[1]
            keys = queries
            if attn.sr is not None:
                keys = (grid[0] // attn.sr.kernel_size[0]) * (grid[1] // attn.sr.kernel_size[1])
            fold = folding_is_cheaper(queries, keys, attn.dim, attn.num_heads)
            setattr(block, 'attn', FoldedAttention(attn) if fold else ProjectedAttention(attn))  # noqa: B010
    if not found:
        raise ValueError(f'Expected a model with PVT stages inside, got {type(model).__name__}, which has none')
    return small if token_stage is None else ClassTokenClassifier(small)


def folding_is_cheaper(queries: int, keys: int, dim: int, heads: int) -> bool:
    """Return whether `FoldedAttention` needs fewer multiplications than `ProjectedAttention`.

    Attention has two halves, queries with keys and values with output. Both cost the same, so one is counted. With many
    keys the result is always False: kernels for the usual form do not store the matrix of scores, and storing it takes
    more time than folding saves.
    """
    if keys >= MANY_KEYS:
        return False
    projected = queries * dim * dim + keys * dim * dim + queries * keys * dim
    folded = heads * (keys * dim * dim + queries * keys * dim)
    return folded < projected


def _is_plain_attention(attn: Any) -> bool:
    return (
        is_plain(attn, (Attention,))
        and all(is_plain(linear, (nn.Linear,)) for linear in (attn.q, attn.kv, attn.proj))
        and is_plain(attn.attn_drop, NOTHING)
        and is_plain(attn.proj_drop, NOTHING)
        and all(type(p) is nn.Parameter and p.is_floating_point() for p in attn.parameters())
    )


def _is_plain_block(block: Block) -> bool:
    """Return whether all layers of a block except its attention process each token on its own."""
    mlp: Any = block.mlp
    return (
        is_plain(block, (Block,))
        and is_plain(block.norm1, NORMS)
        and is_plain(block.norm2, NORMS)
        and is_plain(block.drop_path1, NOTHING)
        and is_plain(block.drop_path2, NOTHING)
        and is_plain(mlp, (Mlp, SlicedMlp))
        and is_plain(mlp.norm, (nn.Identity,))
        and is_plain(mlp.fc1, (nn.Linear,))
        and is_plain(mlp.fc2, (nn.Linear,))
        and type(mlp.act).__module__.startswith(('torch.nn.modules.activation', 'timm.layers.activations'))
    )


def _stages_and_grids(
        model: nn.Module, img_size: Optional[Union[int, Tuple[int, int]]],
) -> Iterator[Tuple[PyramidVisionTransformerStage, Tuple[int, int]]]:
    """Yield the stages of a model, each with its grid of tokens: rows and columns.

    Stages inside of the same module are taken to run one after the other.
    """
    if isinstance(model, PyramidVisionTransformerStage):
        yield model, model.grid_size
        return
    for parent in model.modules():
        grid: Any = None if img_size is None else to_2tuple(img_size)
        for stage in parent.children():
            if isinstance(stage, PyramidVisionTransformerStage):
                if grid is not None:
                    patch: Any = stage.patch_embed.proj.kernel_size
                    grid = (grid[0] // patch[0], grid[1] // patch[1])
                yield stage, grid or stage.grid_size


class _Weights:
    """The simplified matrices of an attention layer in float64 on the CPU, one for each head.

    Attributes:
        q, k, v: (heads, head_dim, C). The scale of the scores is in q.
        q_bias: (heads, head_dim). The scale is in it too. There is no bias of the keys.
        out: (heads, C, head_dim).
        out_bias: (C,). It includes the bias of the values.
    """

    def __init__(self, attn: Attention):
        def exact(x: torch.Tensor) -> torch.Tensor:
            return x.detach().to('cpu', torch.float64)

        def bias(linear: nn.Linear) -> torch.Tensor:
            return exact(linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias)

        by_head = (attn.num_heads, attn.head_dim)
        # with `fused_attn`, the layer always uses this scale
        scale = attn.head_dim ** -0.5 if attn.fused_attn else attn.scale
        proj, v_bias = exact(attn.proj.weight), bias(attn.kv).chunk(2)[1]
        self.q = exact(attn.q.weight).unflatten(0, by_head) * scale
        self.q_bias = bias(attn.q).unflatten(0, by_head) * scale
        self.k, self.v = exact(attn.kv.weight).unflatten(0, (2, *by_head)).unbind(0)
        self.out = proj.unflatten(1, by_head).transpose(0, 1)
        self.out_bias = bias(attn.proj) + proj @ v_bias


def _parameter(value: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    """Return a parameter without gradients, with the type and on the device of `like`."""
    return nn.Parameter(value.to(like.device, like.dtype).contiguous(), requires_grad=False)


def _linear(weight: torch.Tensor, bias: Optional[torch.Tensor], like: torch.Tensor) -> nn.Linear:
    """Return a linear layer without gradients, with the type and on the device of `like`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device='meta').eval()
    linear.weight = _parameter(weight, like)
    if bias is not None:
        linear.bias = _parameter(bias, like)
    return linear


class _Reduction(nn.Module):
    """Returns the tokens (B, K, C) for keys and values: all tokens or, with a convolution, those of a reduced grid."""

    def __init__(self, attn: Attention):
        super().__init__()
        self.sr, self.norm = attn.sr, attn.norm

    def forward(self, x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
        if self.sr is not None and self.norm is not None:
            x = x.reshape(x.shape[0], size[0], size[1], x.shape[2]).permute(0, 3, 1, 2)
            x = self.sr(x).flatten(2).transpose(1, 2)
            x = self.norm(x)
        return x


class ProjectedAttention(nn.Module):
    """The usual form of attention, without biases of keys and values.

    Without a reduction, one matrix product computes queries, keys and values.
    """
    fused_attn: torch.jit.Final[bool]

    def __init__(self, attn: Attention):
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = attn.num_heads, attn.head_dim, attn.fused_attn
        like, w = attn.q.weight, _Weights(attn)
        q, kv, q_bias = w.q.flatten(0, 1), torch.cat([w.k, w.v]).flatten(0, 1), w.q_bias.flatten()
        self.reduction = _Reduction(attn)
        merged = attn.sr is None
        self.qkv = _linear(torch.cat([q, kv]), torch.cat([q_bias, torch.zeros(len(kv))]), like) if merged else None
        self.q = None if merged else _linear(q, q_bias, like)
        self.kv = None if merged else _linear(kv, None, like)
        self.proj = _linear(w.out.transpose(0, 1).flatten(1), w.out_bias, like)

    def forward(self, x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
        B, N, C = x.shape
        if self.qkv is not None:
            qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
        else:
            z = self.reduction(x, size)
            q = self.q(x).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)  # type: ignore[misc]
            kv = self.kv(z).reshape(B, z.shape[1], 2, self.num_heads, self.head_dim)  # type: ignore[misc]
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)

        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, scale=1.)
        else:
            x = (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class FoldedAttention(nn.Module):
    """Attention for few keys: the matrices of queries and output are folded into those of keys and values.

    The products of the matrices are computed in advance, so there is one product per head instead of two. With two
    products, one after the other, folding would save multiplications for more heads too, but OpenVINO takes more time.
    """

    def __init__(self, attn: Attention):
        super().__init__()
        self.num_heads = attn.num_heads
        like, w = attn.q.weight, _Weights(attn)
        self.reduction = _Reduction(attn)
        self.out_bias = _parameter(w.out_bias, like)
        k, v = w.q.transpose(1, 2) @ w.k, w.out @ w.v  # (heads, C, C)
        self.k, self.v = _linear(k.flatten(0, 1), None, like), _linear(v.flatten(0, 1), None, like)
        # what the bias of the queries adds to the score of each key
        self.offset = _linear((w.q_bias[:, None] @ w.k)[:, 0], None, like)

    def forward(self, x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
        B, N, C = x.shape
        z = self.reduction(x, size)
        K = z.shape[1]
        k = self.k(z).reshape(B, K, self.num_heads, C).transpose(1, 2).reshape(B, self.num_heads * K, C)
        v = self.v(z).reshape(B, K, self.num_heads, C).transpose(1, 2).reshape(B, self.num_heads * K, C)
        offset = self.offset(z).transpose(1, 2).reshape(B, 1, self.num_heads * K)
        if self.num_heads == 1:
            # The head has a dimension of its own, without which OpenVINO 2026.4 crashes on models of a fixed size
            scores = x[:, None] @ k[:, None].transpose(2, 3) + offset[:, None]
            return (scores.softmax(dim=-1) @ v[:, None])[:, 0] + self.out_bias
        scores = x @ k.transpose(1, 2) + offset
        weights = scores.reshape(B, N, self.num_heads, K).softmax(dim=-1)
        return weights.reshape(B, N, self.num_heads * K) @ v + self.out_bias


class ClassTokenAttention(nn.Module):
    """Attention of one query (B, 1, C) to tokens (B, K, C).

    The matrices are multiplied to the single query and to the single mean of the tokens, not to all tokens.
    """

    def __init__(self, attn: Attention):
        super().__init__()
        self.num_heads = attn.num_heads
        like, w = attn.q.weight, _Weights(attn)
        self.q = _linear(w.q.flatten(0, 1), w.q_bias.flatten(), like)
        self.k = _parameter(w.k, like)  # (heads, head_dim, C)
        self.v = _parameter(w.v.transpose(1, 2), like)  # (heads, C, head_dim)
        self.proj = _linear(w.out.transpose(0, 1).flatten(1), w.out_bias, like)

    def forward(self, query: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        B, _, C = query.shape
        q = self.q(query).reshape(B, self.num_heads, -1).transpose(0, 1)  # (heads, B, head_dim)
        scores = (q @ self.k).transpose(0, 1) @ tokens.transpose(1, 2)  # (B, heads, K)
        mean = scores.softmax(dim=-1) @ tokens  # (B, heads, C)
        x = (mean.transpose(0, 1) @ self.v).transpose(0, 1)  # (B, heads, head_dim)
        return self.proj(x.reshape(B, 1, C))


class ClassTokenBlock(nn.Module):
    """A last block that computes only the class token (B, 1, C) from the tokens (B, N, C)."""

    def __init__(self, block: Block, attn: Attention):
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attn = ClassTokenAttention(attn)

    def forward(self, x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
        tokens = self.norm1(x)
        x = x[:, :1] + self.attn(tokens[:, :1], tokens)
        return x + self.mlp(self.norm2(x))


class ClassTokenClassifier(nn.Module):
    """A classifier whose last block computes only the class token. Takes images and returns logits."""

    def __init__(self, model: PyramidVisionTransformer):
        super().__init__()
        self.stages, self.norm, self.head = model.stages, model.norm, model.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.stages(x)[:, 0]))
