""" Fast path for inference on CPU: `pvt_timm.fuse(model)`, or `timm.utils.reparameterize_model(model)`.

A fused stage shares the parameters of the plain stage and computes the same numbers, apart from rounding:
  * Linear layers, patch embeddings and spatial reductions use weights that are packed once, which means stored in the
    layout that oneDNN (PyTorch's library for CPUs) is fast with. GELU is computed together with the linear layer.
  * Images go through a stage in groups, and tokens through its MLPs in slices. Groups and slices fit the CPU's cache,
    and memory grows neither with the hidden size of the MLP nor with the batch.
  * Unnecessary copies are avoided: sums are written in place, patches are gathered once.

A fused stage takes the plain path, the forward pass of the plain stage, whenever the fast path is not possible. The
results are the same. This is so with gradients (also in forward mode), modules in training mode, autocast, tracing,
compiling, export, other devices and dtypes, hooks on inner modules, inner modules that were replaced or patched, and
builds of PyTorch without the fast operators. `print(model)` shows which path a stage takes.
"""
import copy
import math
from functools import cache, partial
from itertools import product
from threading import Lock
from types import FunctionType
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.layers import DropPath, LayerNorm, Mlp
from torch.autograd import forward_ad

from . import pvt
from .pvt import Attention, Block, PatchEmbed, PyramidVisionTransformer, PyramidVisionTransformerStage
from .sliced_mlp import SLICE_TOKENS, SlicedMlp

__all__ = ['FusedStage', 'fuse']

Linear = Callable[[torch.Tensor], torch.Tensor]
Parts = Dict[str, Tuple[type, ...]]  # types that a module may have, by its name in its parent

# Tokens (of whole images) that go through all blocks of a stage together. So many fit the last level of cache
STAGE_TOKENS = 12544
# With so many keys or more, attention uses matrix products if `_multiplies_faster`. Images of 800x1344 are then 1.25x
# as fast in float32 on a Zen 5, and 1.3x as fast in bfloat16 on a Zen 4. With 49 keys, products would cost 15%. On a
# CPU without AVX-512 they would cost 10% at 800x1344.
MANY_KEYS = 128

# The types of modules that the fast path supports, by their place in the stage. With any other module (an adapter, a
# quantized linear layer, a norm in place of a dropout) the plain path is taken.
NORMS = (nn.LayerNorm, LayerNorm)
NOTHING = (nn.Dropout, DropPath, nn.Identity)  # layers that do nothing in evaluation mode
_NORM, _DROP, _PATH = NORMS, (nn.Dropout, nn.Identity), (DropPath, nn.Identity)
_STAGE: Parts = dict(patch_embed=(PatchEmbed,), pos_drop=_DROP, blocks=(nn.ModuleList,))
_MLP: Parts = dict(fc1=(nn.Linear,), act=(nn.GELU,), drop1=_DROP, norm=(nn.Identity,), fc2=(nn.Linear,), drop2=_DROP)
_PARTS: Dict[type, Parts] = {
    PatchEmbed: dict(proj=(nn.Conv2d,), norm=_NORM),
    nn.ModuleList: {'*': (Block,)},
    Block: dict(norm1=_NORM, attn=(Attention,), drop_path1=_PATH, norm2=_NORM, mlp=(SlicedMlp, Mlp), drop_path2=_PATH),
    Attention: dict(q=(nn.Linear,), kv=(nn.Linear,), attn_drop=_DROP, proj=(nn.Linear,), proj_drop=_DROP,
                    sr=(nn.Conv2d,), norm=_NORM),
    Mlp: _MLP,
    SlicedMlp: _MLP,
}
_RANDOM = frozenset((Attention, DropPath, nn.Dropout))  # types that compute something else in training mode
_WEIGHTED = frozenset((nn.Linear, nn.Conv2d, nn.LayerNorm, LayerNorm))  # types with a weight and a bias (or None)

_KINDS = {kind for parts in (_STAGE, *_PARTS.values()) for kinds in parts.values() for kind in kinds}
# The code that the fast path replaces, as it was imported. If any of it is patched later, the plain path is taken
_ORIGINALS: Tuple[Tuple[Any, str, Any], ...] = (
    (PyramidVisionTransformerStage, 'forward', PyramidVisionTransformerStage.forward),
    *((kind, name, getattr(kind, name)) for kind in (*_KINDS, nn.Module) for name in ('forward', '__call__')),
    (SlicedMlp, 'forward_tokens', SlicedMlp.forward_tokens),
    *((F, name, getattr(F, name)) for name in (
        'linear', 'conv2d', 'layer_norm', 'gelu', 'scaled_dot_product_attention')),
)
_lock = Lock()  # held by the thread that packs weights


# --- The only place that touches operators without a public interface ---

def _linear(
        x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None, gelu: bool = False) -> torch.Tensor:
    """Apply a linear layer (and GELU) with oneDNN. The weight is packed or contiguous."""
    act, algorithm = ('gelu', 'none') if gelu else ('none', '')
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, act, [], algorithm)


def _pack_linear(weight: torch.Tensor, bias: Optional[torch.Tensor], gelu: bool = False) -> Linear:
    """Return a function that applies a linear layer (and GELU) with a packed weight."""
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return partial(_linear, weight=weight, bias=None if bias is None else bias.detach(), gelu=gelu)


def has_amx() -> bool:
    """Return whether the CPU has AMX, with which products in bfloat16 and int8 are fast."""
    return getattr(torch.cpu, '_is_amx_tile_supported', lambda: False)()


@cache
def _multiplies_faster() -> bool:
    """Return whether `_linear` is faster than the matrix products inside `scaled_dot_product_attention`.

    In float32 MKL computes these products, and it does not use AVX-512 on AMD. On a CPU with AMX, PyTorch has a fast
    variant of them.
    """
    return torch.backends.cpu.get_cpu_capability() == 'AVX512' and not has_amx()


def patched() -> str:
    """Return the name of a function or method that was patched since this package was imported, '' if there is none."""
    for owner, name, original in _ORIGINALS:
        if getattr(owner, name) is not original:
            return f'{owner.__name__}.{name}'
    return ''


def is_plain(module: Any, kinds: Tuple[type, ...]) -> bool:
    """Return whether a module's class is one of `kinds`, not a derived one, and its forward is that of the class."""
    hooks = module is not None and (module._forward_hooks or module._forward_pre_hooks)
    return type(module) in kinds and 'forward' not in module.__dict__ and not hooks


def needs_class_token_only(model: Any) -> bool:
    """Return whether the output of a model depends on the class token of its last block, and on no other token."""
    return (
        is_plain(model, (PyramidVisionTransformer,))
        and not {'forward_features', 'forward_head', 'pool'} & model.__dict__.keys()
        and model.global_pool == 'token'
        and is_plain(model.stages, (nn.Sequential,))
        and all(is_plain(stage, (type(stage),)) for stage in model.stages)
        and is_plain(model.norm, NORMS)
        and is_plain(model.head_drop, NOTHING)
    )


def _watched() -> str:
    """Return the reason for the plain path if something watches or changes operators or modules, '' otherwise."""
    if torch.is_autocast_enabled('cpu'):
        return 'autocast'
    if torch.jit.is_tracing():
        return 'tracing'
    if forward_ad._current_level >= 0:
        return 'forward-mode gradients'
    if (
            torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return 'operators are watched'
    if nn.modules.module._has_any_global_hook():
        return 'global hooks'
    name = patched()
    return f'patched: {name}' if name else ''


@cache
def _works(dtype: torch.dtype) -> bool:
    """Return whether this build of PyTorch and this CPU have the fast operators, and their results are correct."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        if dtype == torch.bfloat16:
            # attention uses products in float32
            if not torch.ops.mkldnn._is_mkldnn_bf16_supported() or not _works(torch.float32):
                return False
        x = torch.linspace(-1, 1, 64, device='cpu').reshape(2, 2, 16).to(dtype)
        weight = torch.linspace(-1, 1, 128, device='cpu').reshape(8, 16).to(dtype)
        bias = weight[:, 0].clone()
        expected = F.linear(x, weight, bias)
        return all(
            torch.allclose(f(x).float(), y.float(), rtol=0.02, atol=1e-3 if dtype == torch.float32 else 0.05)
            for f, y in (
                (_pack_linear(weight, bias), expected),
                (_pack_linear(weight, bias, gelu=True), F.gelu(expected)),
                (_pack_linear(weight, None), expected - bias),
                (partial(_linear, weight=weight), expected - bias),
            ))
    except (AttributeError, RuntimeError, TypeError):
        return False


# --- The fused forward ---

class _State(NamedTuple):
    plain: str  # the reason why the stage takes the plain path, '' if it can take the fast path
    requires_grad: bool = False
    key: tuple = ()  # address and version of each parameter


class _Packed(NamedTuple):
    key: tuple  # key of the parameters that were packed
    # The bits of one element of each parameter, as views. The views keep the parameter's memory alive, so that no other
    # parameter can get the same address.
    samples: List[torch.Tensor]
    values: torch.Tensor  # the values of the samples when the parameters were packed
    linears: Dict[nn.Module, Linear]  # the packed function of every linear layer and convolution

    def is_of(self, key: tuple) -> bool:
        """Return whether the parameters with this `key` are the ones that were packed, and have not been changed.

        Fused optimizers, `torch.distributed` and other code outside of PyTorch's operators change parameters without
        changing their version. Such a change is noticed by the samples.
        """
        return self.key == key and torch.equal(torch.cat(self.samples), self.values)


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """Return a view of the bits of an element in the middle. Bits are compared because NaN is not equal to NaN."""
    bits = parameter.detach().view(torch.int16 if parameter.dtype == torch.bfloat16 else torch.int32)
    return bits[tuple(slice(n // 2, n // 2 + 1) for n in bits.shape)].reshape(1)


def _pack(module: Any, gelu: bool) -> Linear:
    """Return a function that applies a linear layer or a convolution with packed weights.

    A convolution whose stride equals its kernel size is a linear layer on the patches that `_patches` returns.
    """
    weight = module.weight
    if isinstance(module, nn.Conv2d):
        weight = weight.permute(0, 2, 3, 1).flatten(1)
    return _pack_linear(weight, module.bias, gelu)


def _patches(x: torch.Tensor, size: Tuple[int, ...]) -> torch.Tensor:
    """Cut (B, H, W, C) into patches of `size` (h, w): (B, (H // h) * (W // w), h * w * C). A remainder is dropped."""
    B, H, W, C = x.shape
    h, w = size
    rows, columns = H // h, W // w
    x = x[:, :rows * h, :columns * w].reshape(B, rows, h, columns, w * C)
    return x.transpose(2, 3).reshape(B, rows * columns, h * w * C)


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the attention of queries (B, heads, N, d) to keys and values (B, heads, K, d).

    The products are computed in float32, as inside `scaled_dot_product_attention`: bfloat16 has too few digits for
    large logits.
    """
    B, H, N, d = q.shape
    if k.shape[2] < MANY_KEYS or not _multiplies_faster():
        return F.scaled_dot_product_attention(q, k, v)
    out = q.new_empty(B, N, H, d).transpose(1, 2)
    k, v = (k.float() * d ** -0.5).contiguous(), v.float().transpose(2, 3).contiguous()
    for i, j in product(range(B), range(H)):
        for rows, part in zip(out[i, j].split(SLICE_TOKENS), q[i, j].split(SLICE_TOKENS)):
            rows.copy_(_linear(_linear(part.float(), k[i, j]).softmax(1), v[i, j]))
    return out


def _block(
        blk: Any, linears: Dict[nn.Module, Linear], x: torch.Tensor, size: Tuple[int, int], class_token_only: bool,
) -> None:
    """Compute `Block.forward` for tokens x (B, N, C). The result is written into `x`.

    With `class_token_only`, only the result for the first token of each image is computed. The others stay as they are.
    """
    attn, mlp = blk.attn, blk.mlp
    wanted = x[:, :1] if class_token_only else x
    B, N, C = wanted.shape
    y = _norm(blk.norm1, x)
    kv = y
    if attn.sr is not None:
        kv = _norm(attn.norm, linears[attn.sr](_patches(y.view(B, size[0], size[1], C), attn.sr.kernel_size)))
    q = linears[attn.q](y[:, :N]).unflatten(2, (attn.num_heads, attn.head_dim)).transpose(1, 2)
    k, v = linears[attn.kv](kv).unflatten(2, (2, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    del y, kv  # frees memory: each of them is as large as x, and so is q
    y = _attend(q, k, v)
    del q
    wanted += linears[attn.proj](y.transpose(1, 2).reshape(B, N, C))
    del y
    # tokens of all images, to be cut into equal parts
    tokens = wanted.transpose(0, 1) if class_token_only else wanted.view(1, B * N, C)
    for part in tokens.chunk(math.ceil(B * N / SLICE_TOKENS), dim=1):
        part += linears[mlp.fc2](linears[mlp.fc1](_norm(blk.norm2, part)))


_plain: Any = PyramidVisionTransformerStage.forward


class FusedStage(PyramidVisionTransformerStage):
    """A stage that takes the fast path if possible. `fuse()` makes it. It shares the parameters of the plain stage.

    Its state dict is that of the plain stage. Weights are packed at the first forward pass, and packed again after they
    change. Packed weights are deleted by `train()`. They are also deleted when the plain path may have recorded
    gradients, because an optimizer may change the weights after that.

    Changes are noticed by PyTorch's version counters. Some writes are not counted: those of fused optimizers and
    `torch.distributed`, those through `parameter.data` and through views of numpy or DLPack, and those of other
    processes that share the memory. To notice these, one element of each parameter is compared. A write that is not
    counted and changes none of these elements is not noticed: call `repack()` after it.

    Attributes:
        class_token_only: Whether the stage returns its class token (B, 1, C) only, see `fuse`.
    """
    class_token_only: bool

    # the forward of the plain stage under another name, because TorchScript does not support `super()`
    _plain_forward = FunctionType(_plain.__code__, _plain.__globals__, '_plain_forward')

    @classmethod
    def from_stage(cls, stage: PyramidVisionTransformerStage) -> PyramidVisionTransformerStage:
        """Return the fused form of a stage. A fused stage, or one of another class or forward, is not changed."""
        if type(stage) is not PyramidVisionTransformerStage or 'forward' in stage.__dict__:
            return stage
        fused = cls.__new__(cls)
        fused.__dict__.update(stage.__dict__)  # the same parameters, modules and hooks
        fused.__dict__.update(_packed=None, class_token_only=False)
        return fused

    def repack(self) -> None:
        """Delete the packed weights. The next forward pass packs them again."""
        self.__dict__['_packed'] = None

    def train(self, mode: bool = True) -> 'FusedStage':
        if mode:
            self.repack()
        return super().train(mode)

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_packed': None}  # for deepcopy and pickle: packed weights cannot be stored

    def _apply(self, fn: Callable, recurse: bool = True) -> 'FusedStage':
        self.repack()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        state = self._inspect()
        plain = state.plain or _watched()
        if not plain and not _works(self.pos_embed.dtype):
            plain = f'no fast operators for {self.pos_embed.dtype}'
        if plain:
            path = f'path=plain ({plain})'
        else:
            path = 'path=fast (without gradients)' if state.requires_grad else 'path=fast'
        return f'{path}, class token only' if self.class_token_only else path

    def _inspect(self) -> _State:
        """Check all inner modules and parameters. This is done in every forward pass, so it is written for speed."""
        if self.training:
            return _State('training mode')
        if not torch.backends.mkldnn.enabled:
            return _State('oneDNN is disabled')
        dtype = self.pos_embed.dtype
        key: List[Any] = []
        requires_grad = False
        parameters: List[Any] = [self.pos_embed] if self.cls_token is None else [self.pos_embed, self.cls_token]
        todo: List[Tuple[Any, Parts]] = [(self._modules, _STAGE)]
        while todo:
            modules, parts = todo.pop()
            for name, m in modules.items():
                if m is None:
                    continue
                kind = type(m)
                if (
                        kind not in (parts.get(name) or parts.get('*', ()))
                        or 'forward' in m.__dict__
                        or kind is SlicedMlp and 'forward_tokens' in m.__dict__
                ):
                    return _State(f'{kind.__module__}.{kind.__qualname__} as {name} has no fast form')
                if m.training and kind in _RANDOM:
                    return _State('dropout in training mode')
                if m._forward_hooks or m._forward_pre_hooks:
                    return _State('hooks on inner modules')
                if kind is Attention and m.scale != m.head_dim ** -0.5:
                    return _State('attention with a scale of its own')
                if kind in _WEIGHTED and not ('weight' in m._parameters and 'bias' in m._parameters):
                    return _State('weights that are not parameters')
                if kind is nn.GELU and m.approximate != 'none':
                    return _State('approximate GELU')
                if kind is nn.Conv2d and (
                        m.kernel_size != m.stride or m.padding != (0, 0) or m.dilation != (1, 1) or m.groups != 1):
                    return _State('patches that overlap or are padded')
                if m._modules:
                    todo.append((m._modules, _PARTS.get(kind, {})))
                if m._parameters:
                    key.append(id(m))  # packed weights are found by module
                    parameters.extend(m._parameters.values())
        for p in parameters:
            if p is None:
                continue
            if p.dtype is not dtype or p.device.type != 'cpu' or type(p) not in (nn.Parameter, torch.Tensor):
                return _State('parameters that are not plain CPU tensors of one dtype')
            if p.layout is not torch.strided:
                return _State('parameters that are not dense')
            if p.is_inference():
                return _State('parameters made in inference mode')
            requires_grad = requires_grad or p.requires_grad
            key.append((p.data_ptr(), p._version))
        return _State('', requires_grad, tuple(key))

    def _fast_key(self, x: torch.Tensor) -> Optional[tuple]:
        """Return the key for `_get_packed` if this call can take the fast path, otherwise None."""
        if (
                type(x) is not torch.Tensor
                or x.device.type != 'cpu'
                or x.layout is not torch.strided
                or x.dtype != self.pos_embed.dtype
                or x.numel() == 0
                or x.ndim != 4
                or x.shape[1] != self.patch_embed.proj.in_channels
                or min(x.shape[2:]) < self.min_input_size
                or _watched()
                or not _works(x.dtype)
        ):
            return None
        state = self._inspect()
        if state.plain or torch.is_grad_enabled() and (x.requires_grad or state.requires_grad):
            return None
        return state.key

    def _get_packed(self, key: tuple) -> _Packed:
        """Return the packed weights of the parameters with this `key`. They are packed now if necessary."""
        packed: Any = self._packed
        if packed is None or not packed.is_of(key):
            with _lock:
                packed = self._packed
                if packed is None or not packed.is_of(key):
                    samples = [_sample(p) for p in self.parameters() if p.numel()]
                    values = torch.cat(samples)  # before packing: a write during it is noticed at the next forward pass
                    linears: Dict[nn.Module, Linear] = {}
                    for name, m in self.named_modules():
                        if isinstance(m, (nn.Conv2d, nn.Linear)):
                            linears[m] = _pack(m, gelu=name.endswith('mlp.fc1'))
                    packed = _Packed(key, samples, values, linears)
                    self.__dict__['_packed'] = packed
        return packed

    @torch.no_grad()
    def _fused_forward(self, x: torch.Tensor, packed: _Packed) -> torch.Tensor:
        patch_size, prefix = self.patch_embed.proj.kernel_size, self.num_prefix_tokens
        size = (x.shape[2] // patch_size[0], x.shape[3] // patch_size[1])
        pos_embed = pvt.resample_pos_embed(self.pos_embed, size, self.grid_size, prefix)
        x = x.permute(0, 2, 3, 1)
        tokens = x.new_empty(x.shape[0], pos_embed.shape[1], self.dim)
        images = max(1, STAGE_TOKENS // tokens.shape[1])
        for part, group in zip(tokens.split(images), x.split(images)):
            if self.cls_token is not None:
                part[:, :prefix] = self.cls_token + pos_embed[:, :prefix]
            embed = _norm(self.patch_embed.norm, packed.linears[self.patch_embed.proj](_patches(group, patch_size)))
            torch.add(embed, pos_embed[:, prefix:], out=part[:, prefix:])
            for i, blk in enumerate(self.blocks):
                last = i == len(self.blocks) - 1
                _block(blk, packed.linears, part, size, last and self.class_token_only)
        if self.class_token_only:
            tokens = tokens[:, :1].contiguous()  # the others are not kept in memory
        if self.output_nchw:
            tokens = tokens[:, prefix:].unflatten(1, size).permute(0, 3, 1, 2)
        return tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
            key = self._fast_key(x)
            if key is not None:
                return self._fused_forward(x, self._get_packed(key))
            if torch.is_grad_enabled():
                self.repack()
            if PyramidVisionTransformerStage.forward is not _plain:
                x = PyramidVisionTransformerStage.forward(self, x)
                return x[:, :1] if self.class_token_only else x
        x = self._plain_forward(x)
        return x[:, :1] if self.class_token_only else x


def fuse(model: nn.Module, inplace: bool = False, class_token_only: bool = False) -> nn.Module:
    """Return the model with PVT stages that have a fast path for inference on CPU.

    Args:
        model: A stage or any module with stages inside.
        inplace: Whether the stages of `model` itself are replaced, instead of those of a copy. If `model` is a stage,
            its fused form is a new object that shares the stage's parameters.
        class_token_only: Whether the last block computes its result for the class token only, which is all that a
            classifier needs. `forward` returns the same. `forward_features` returns the class token (B, 1, C) in place
            of all tokens, and `forward_intermediates` does not work for the last stage. On the plain path, all tokens
            are computed and the others left out. The pooling must not be changed after that.

    Returns:
        The model with fused stages. A stage of a derived class, or with another forward, is not changed.

    Raises:
        ValueError: There is no stage in the model. Scripted models and those made with `feature_cls='fx'` have none.
            Or `class_token_only` is set, and the output of the model needs other tokens too, or may need them.
    """
    if not any(isinstance(module, PyramidVisionTransformerStage) for module in model.modules()):
        raise ValueError(
            f'Expected a model with PVT stages inside, got {type(model).__name__}, which has none: fuse a model before '
            "it is scripted or exported, and one with features by another feature_cls than 'fx'.")
    if class_token_only:
        if not needs_class_token_only(model):
            raise ValueError(
                "Expected an unchanged PVT classifier with global_pool='token' for class_token_only, because others "
                f'use the other tokens too, got {type(model).__name__}')
        last: Any = model.stages[-1]  # type: ignore[index]
        if type(last) not in (PyramidVisionTransformerStage, FusedStage):
            raise ValueError(f'Expected a last stage that can be fused for class_token_only, got {type(last).__name__}')
    if not inplace:
        with torch.inference_mode(False):  # parameters that are copied in inference mode force the plain path
            model = copy.deepcopy(model)
    if isinstance(model, PyramidVisionTransformerStage):
        return FusedStage.from_stage(model)
    fused: Dict[nn.Module, nn.Module] = {}  # a stage that is used in two places stays one object
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, PyramidVisionTransformerStage):
                if child not in fused:
                    fused[child] = FusedStage.from_stage(child)
                setattr(module, name, fused[child])
    if class_token_only:
        model.get_submodule('stages')[-1].class_token_only = True  # type: ignore[index]
    return model
