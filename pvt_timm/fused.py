""" Inference path for CPU, behind `model.fuse()` and `timm.utils.reparameterize_model(model)`.

A fused stage holds the parameters of the stage that it was made of and computes the same numbers to rounding:
  * linears, patch embeddings and spatial reductions run on weights packed once for oneDNN, with GELU fused;
  * images go through a stage in groups, and everything after the keys and values of a block runs on slices of tokens,
    which stay in the cache, so that memory grows neither with the hidden size of the MLP nor with the attention matrix;
  * where keys are few the projections of queries and outputs are merged into those of keys and values;
  * the last block computes only the class token where nothing else is asked for.

It takes the plain path of the parent class, with the same results, whenever something else is needed: gradients,
training mode, autocast, tracing, compiling, export, other devices and dtypes, hooks on or replacements of inner
modules, a build of PyTorch without the operators. `print(model)` shows which path a stage is on.
"""
import math
from functools import cache
from threading import Lock
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.layers import DropPath, LayerNorm, Mlp

from .pvt import Attention, Block, PatchEmbed, PyramidVisionTransformerStage, resample_pos_embed
from .sliced_mlp import SlicedMlp

__all__ = ['FusedStage']

Linear = Callable[[torch.Tensor], torch.Tensor]

# What is worked on at a time. The hidden activations of a slice of tokens and a slice of the attention matrix fit the
# caches, and the time that they take is far above the cost of calling the operators.
STAGE_TOKENS = 6272  # tokens (of whole images) that go through all blocks of a stage together
SLICE_TOKENS = 1568  # of them go through the second half of a block together
SLICE_SCORES = 1 << 21  # elements of the attention matrix of a head that exist at a time
MIN_SLICE_TOKENS = 196

# Up to so many heads the projections of queries and outputs are merged into those of keys and values (`_merge`).
MERGED_HEADS = 2

# From so many keys on the products of attention run head by head as oneDNN's linears.
MANY_KEYS = 512

# What the fused forward knows how to compute. Any other module (an adapter, a quantized linear, another norm) is left
# to the plain path.
_KNOWN = frozenset((
    Attention, Block, DropPath, LayerNorm, Mlp, PatchEmbed, SlicedMlp,
    nn.Conv2d, nn.Dropout, nn.GELU, nn.Identity, nn.LayerNorm, nn.Linear, nn.ModuleList,
))
_lock = Lock()  # at most one thread packs


# --- The only place that touches operators without a public interface ---

def _linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """`F.linear` by oneDNN, also in float32."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, 'none', [], '')


def _pack_linear(weight: torch.Tensor, bias: Optional[torch.Tensor], gelu: bool = False) -> Linear:
    """A function that applies a linear layer (and GELU), with the weight in the layout that oneDNN wants."""
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    bias = None if bias is None else bias.detach()
    linear = torch.ops.mkldnn._linear_pointwise.default
    act, algorithm = ('gelu', 'none') if gelu else ('none', '')
    return lambda x: linear(x, weight, bias, act, [], algorithm)


def _intercepted() -> bool:
    """Whether something watches or transforms operators or modules (counters, functional transforms, global hooks)."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or nn.modules.module._has_any_global_hook()
    )


@cache
def _works(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch and this CPU have the fast operators, and they compute what they should."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        _intercepted()
        x = torch.linspace(-1, 1, 64).reshape(2, 2, 16).to(dtype)
        weight = torch.linspace(-1, 1, 128).reshape(8, 16).to(dtype)
        bias = weight[:, 0].clone()
        expected = F.linear(x, weight, bias)
        return all(
            torch.allclose(f(x).float(), y.float(), rtol=0.02, atol=1e-3 if dtype == torch.float32 else 0.05)
            for f, y in (
                (_pack_linear(weight, bias), expected),
                (_pack_linear(weight, bias, gelu=True), F.gelu(expected)),
                (_pack_linear(weight, None), expected - bias),
                (lambda x: _linear(x, weight, bias), expected),
            ))
    except (AttributeError, RuntimeError, TypeError):
        return False


# --- The fused forward ---

class _PackedBlock(NamedTuple):
    q: Linear
    kv: Linear
    sr: Optional[Linear]
    proj: Linear
    fc1: Linear
    fc2: Linear
    merged: Optional[Linear]


class _State(NamedTuple):
    plain: str  # why the stage takes the plain path, '' for the fast one
    requires_grad: bool = False
    key: tuple = ()  # address and version of each parameter


class _Packed(NamedTuple):
    key: tuple  # that of the parameters that were packed
    owners: List[torch.Tensor]  # keeps the storages of the key alive, so that no other one can get their addresses
    embed: Linear
    blocks: List[_PackedBlock]


def _pack_conv(conv: nn.Conv2d) -> Linear:
    """A convolution whose stride is its kernel is a linear layer on the patches that `_patches` makes."""
    return _pack_linear(conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def _merge(attn: Attention) -> Linear:
    """From what keys and values are made of to those that need no projection of queries and outputs.

    The score of token y and key k is (Wq y + bq)^T k = y^T (Wq^T k) + bq^T k, and what a value v adds to the output is
    Wp v, as often as its weight says. So each head gets keys Wq^T k, a bias bq^T k per key, and values Wp v; as the
    weights of a token sum to 1, the bias of the output projection joins the values of the first head. The scale is in
    the keys. That is less work where keys are few and heads too, since keys and values now have all C channels.
    """
    C, H, D = attn.q.in_features, attn.num_heads, attn.head_dim
    k, v = attn.kv.weight.chunk(2)
    bk, bv = (None, None) if attn.kv.bias is None else attn.kv.bias.chunk(2)
    q, k, v = (w.double().view(H, D, C) for w in (attn.q.weight, k, v))
    bq, bk, bv = (q.new_zeros(H, D) if b is None else b.double().view(H, D) for b in (attn.q.bias, bk, bv))
    proj = attn.proj.weight.double().view(C, H, D).transpose(0, 1)
    q, bq = q * attn.scale, bq * attn.scale
    values_bias = (proj @ bv.unsqueeze(2)).squeeze(2)
    if attn.proj.bias is not None:
        values_bias[0] += attn.proj.bias.double()
    weight = torch.cat([(q.mT @ k).flatten(0, 1), (proj @ v).flatten(0, 1), (bq.unsqueeze(1) @ k).squeeze(1)])
    bias = torch.cat([(q.mT @ bk.unsqueeze(2)).flatten(), values_bias.flatten(), (bq * bk).sum(dim=1)])
    return _pack_linear(weight.to(attn.q.weight), bias.to(attn.q.weight))


def _pack_block(blk: Block) -> _PackedBlock:
    attn, mlp = blk.attn, blk.mlp
    return _PackedBlock(
        q=_pack_linear(attn.q.weight, attn.q.bias),
        kv=_pack_linear(attn.kv.weight, attn.kv.bias),
        sr=None if attn.sr is None else _pack_conv(attn.sr),
        proj=_pack_linear(attn.proj.weight, attn.proj.bias),
        fc1=_pack_linear(mlp.fc1.weight, mlp.fc1.bias, gelu=True),
        fc2=_pack_linear(mlp.fc2.weight, mlp.fc2.bias),
        merged=_merge(attn) if attn.num_heads <= MERGED_HEADS else None,
    )


def _patches(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, W, C) to (B, H // size * W // size, size * size * C). A remainder is dropped."""
    B, H, W, C = x.shape
    h, w = H // size, W // size
    x = x[:, :h * size, :w * size].reshape(B, h, size, w, size * C)
    return x.transpose(2, 3).reshape(B, h * w, size * size * C)


def _norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _slices(batch: int, tokens: int, limit: int) -> Iterator[Tuple[slice, slice]]:
    """Cut (batch, tokens) into contiguous parts of at most about `limit` tokens: some images, or a part of one."""
    images = max(1, limit // tokens)
    step = math.ceil(tokens / math.ceil(tokens / limit))
    for b in range(0, batch, images):
        for n in range(0, tokens, step):
            yield slice(b, b + images), slice(n, n + step)


Attend = Callable[[torch.Tensor, slice], torch.Tensor]  # (tokens of some images, which images) to what is added to them


def _merged_attention(attn: Attention, packed: _PackedBlock, kv: torch.Tensor) -> Attend:
    """Attention with the keys and values of `_merge`. Takes tokens of one image at a time."""
    B, M, C = kv.shape
    H = attn.num_heads
    keys, values, bias = packed.merged(kv).split((H * C, H * C, H), dim=2)
    keys = keys.unflatten(2, (H, C)).transpose(1, 2).reshape(B, H * M, C).contiguous()
    values = values.unflatten(2, (H, C)).permute(0, 3, 2, 1).reshape(B, C, H * M).contiguous()
    bias = bias.transpose(1, 2).reshape(B, H * M).contiguous()

    def attend(y: torch.Tensor, images: slice) -> torch.Tensor:
        scores = _linear(y, keys[images.start], bias[images.start]).unflatten(2, (H, M))
        return _linear(scores.softmax(dim=3).flatten(2), values[images.start], None)

    return attend


def _attention(attn: Attention, packed: _PackedBlock, kv: torch.Tensor) -> Attend:
    """Attention as it is written. Takes tokens of some images at a time."""
    H, D = attn.num_heads, attn.head_dim
    k, v = packed.kv(kv).unflatten(2, (2, H, D)).permute(2, 0, 3, 1, 4).unbind(0)
    products = kv.dtype == torch.bfloat16  # for which the kernel of scaled_dot_product_attention was slower
    if products:
        k = (k * attn.scale).mT

    def attend(y: torch.Tensor, images: slice) -> torch.Tensor:
        q = packed.q(y).unflatten(2, (H, D)).transpose(1, 2)
        if products:
            out = (q @ k[images]).softmax(dim=3) @ v[images]
        else:
            out = F.scaled_dot_product_attention(q, k[images], v[images])
        return packed.proj(out.transpose(1, 2).flatten(2))

    return attend


def _attention_of_many_keys(attn: Attention, packed: _PackedBlock, kv: torch.Tensor) -> Attend:
    """Attention head by head with oneDNN's products. Takes tokens of one image at a time."""
    H, D = attn.num_heads, attn.head_dim
    k, v = packed.kv(kv).unflatten(2, (2, H, D)).permute(2, 0, 3, 1, 4).unbind(0)
    k, v = (k * attn.scale).contiguous(), v.mT.contiguous()

    def attend(y: torch.Tensor, images: slice) -> torch.Tensor:
        q = packed.q(y).unflatten(2, (H, D)).transpose(1, 2).contiguous()
        out = [
            _linear(_linear(q[0, h], k[images.start, h], None).softmax(dim=1), v[images.start, h], None)
            for h in range(H)]
        return packed.proj(torch.cat(out, dim=1).unsqueeze(0))

    return attend


def _block(
        blk: Block,
        packed: _PackedBlock,
        x: torch.Tensor,
        size: Tuple[int, int],
        num_tokens: Optional[int] = None,
) -> torch.Tensor:
    """`Block.forward`, written into `x`. With `num_tokens` only for that many leading tokens, seen by all as keys."""
    B, _, C = x.shape
    attn = blk.attn
    y = _norm(blk.norm1, x)
    kv = y
    if packed.sr is not None:
        kv = _norm(attn.norm, packed.sr(_patches(y.view(B, size[0], size[1], C), attn.sr_ratio)))
    if num_tokens is not None:
        x, y = x[:, :num_tokens].contiguous(), y[:, :num_tokens].contiguous()

    N, M, H = x.shape[1], kv.shape[1], attn.num_heads
    limit = min(SLICE_TOKENS, max(MIN_SLICE_TOKENS, SLICE_SCORES // M))
    if packed.merged is not None and N * (C + M - H * M) > (H - 1) * M * C:  # fewer multiplications
        attend, limit = _merged_attention(attn, packed, kv), min(limit, N)
    elif M >= MANY_KEYS:
        attend, limit = _attention_of_many_keys(attn, packed, kv), min(limit, N)
    else:
        attend = _attention(attn, packed, kv)
    for b, n in _slices(B, N, limit):
        part = x[b, n]
        part += attend(y[b, n], b)
        part += packed.fc2(packed.fc1(_norm(blk.norm2, part)))
    return x


class FusedStage(PyramidVisionTransformerStage):
    """A stage that takes the fast path where it can. Made by `fuse()` of a stage, whose parameters it shares.

    The state dict is that of the plain stage. Weights are packed at the first forward and again after they changed; a
    write through `parameter.data`, of which PyTorch keeps no record, is not noticed: call `repack()` after one.
    """
    @classmethod
    def from_stage(cls, stage: PyramidVisionTransformerStage) -> 'FusedStage':
        fused = cls.__new__(cls)
        fused.__dict__.update(stage.__dict__)  # the same parameters, modules and hooks
        fused.__dict__['_packed'] = None
        return fused

    def fuse(self) -> 'FusedStage':
        return self

    def repack(self) -> None:
        """Forget the packed weights, the next forward packs again."""
        self.__dict__['_packed'] = None

    def __getstate__(self) -> Dict:
        return {**self.__dict__, '_packed': None}  # for deepcopy and pickle: packed weights cannot be stored

    def _apply(self, fn, recurse: bool = True):
        self.repack()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        state = self._inspect()
        if state.plain:
            return f'path=plain ({state.plain})'
        if not _works(self.pos_embed.dtype):
            return f'path=plain (no fast operators for {self.pos_embed.dtype})'
        return 'path=fast (without gradients)' if state.requires_grad else 'path=fast'

    def _inspect(self) -> _State:
        """Look at all inner modules and parameters. Runs at every forward, therefore written to be quick."""
        if self.training:
            return _State('training mode')
        if not torch.backends.mkldnn.enabled:
            return _State('oneDNN is disabled')
        dtype = self.pos_embed.dtype
        key, requires_grad = [], False
        parameters = [self.pos_embed] if self.cls_token is None else [self.pos_embed, self.cls_token]
        modules = list(self._modules.values())
        while modules:
            m = modules.pop()
            if m is None:
                continue
            if type(m) not in _KNOWN or 'forward' in m.__dict__:
                return _State(f'{type(m).__name__} has no fast form')
            if m._forward_hooks or m._forward_pre_hooks:
                return _State('hooks on inner modules')
            if type(m) is nn.GELU and m.approximate != 'none':
                return _State('approximate GELU')
            if m._modules:
                modules.extend(m._modules.values())
            if m._parameters:
                parameters.extend(m._parameters.values())
        for p in parameters:
            if p is None:
                continue
            if p.dtype is not dtype or p.device.type != 'cpu' or type(p) not in (nn.Parameter, torch.Tensor):
                return _State('parameters that are not plain CPU tensors of one dtype')
            if p.is_inference():
                return _State('parameters made in inference mode')
            requires_grad = requires_grad or p.requires_grad
            key.append((p.data_ptr(), p._version))
        return _State('', requires_grad, tuple(key))

    def _fast_key(self, x: torch.Tensor) -> Optional[tuple]:
        """What `_get_packed` takes if this call can take the fast path, otherwise None."""
        if (
                type(x) is not torch.Tensor
                or x.device.type != 'cpu'
                or x.dtype != self.pos_embed.dtype
                or x.numel() == 0
                or torch.jit.is_tracing()
                or torch.is_autocast_enabled('cpu')
                or not _works(x.dtype)
                or _intercepted()
        ):
            return None
        state = self._inspect()
        if state.plain or torch.is_grad_enabled() and (x.requires_grad or state.requires_grad):
            return None
        return state.key

    def _get_packed(self, key: tuple) -> _Packed:
        """Packed weights of the parameters that `key` stands for."""
        packed = self._packed
        if packed is None or packed.key != key:
            with _lock:
                packed = self._packed
                if packed is None or packed.key != key:
                    packed = _Packed(
                        key=key,
                        owners=[p.detach() for p in self.parameters()],
                        embed=_pack_conv(self.patch_embed.proj),
                        blocks=[_pack_block(blk) for blk in self.blocks],
                    )
                    self.__dict__['_packed'] = packed
        return packed

    @torch.no_grad()
    def _fused_forward(
            self,
            x: torch.Tensor,
            key: tuple,
            num_tokens: Optional[int] = None,
    ) -> Tuple[torch.Tensor, Tuple[int, int]]:
        """Tokens after the blocks (only `num_tokens` leading ones) and the grid size."""
        packed = self._get_packed(key)
        patch_size, prefix = self.patch_embed.patch_size, self.num_prefix_tokens
        size = (x.shape[2] // patch_size, x.shape[3] // patch_size)
        pos_embed = resample_pos_embed(self.pos_embed, size, self.grid_size, prefix)
        x = x.permute(0, 2, 3, 1)
        tokens = x.new_empty(x.shape[0], pos_embed.shape[1], self.dim)
        out = []
        images = max(1, STAGE_TOKENS // tokens.shape[1])
        for b in range(0, x.shape[0], images):
            part = tokens[b:b + images]
            if self.cls_token is not None:
                part[:, :prefix] = self.cls_token + pos_embed[:, :prefix]
            embed = _norm(self.patch_embed.norm, packed.embed(_patches(x[b:b + images], patch_size)))
            torch.add(embed, pos_embed[:, prefix:], out=part[:, prefix:])
            for i, blk in enumerate(self.blocks):
                part = _block(blk, packed.blocks[i], part, size, num_tokens if i == len(self.blocks) - 1 else None)
            out.append(part)
        return tokens if num_tokens is None else torch.cat(out), size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
            key = self._fast_key(x)
            if key is not None:
                x, size = self._fused_forward(x, key)
                if self.output_nchw:
                    x = x[:, self.num_prefix_tokens:].unflatten(1, size).permute(0, 3, 1, 2)
                return x
        return super().forward(x)

    def forward_class_token(self, x: torch.Tensor) -> torch.Tensor:
        """What `forward` returns, or only the class token of it where that is less work."""
        if not (self._forward_hooks or self._forward_pre_hooks or self.output_nchw or torch.compiler.is_compiling()):
            key = self._fast_key(x)
            if key is not None:
                return self._fused_forward(x, key, num_tokens=1)[0]
        return self(x)
