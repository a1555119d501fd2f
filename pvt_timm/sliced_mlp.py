""" MLP on slices of tokens, for inference on CPU. """
import torch
import torch.nn as nn

from timm.layers import Mlp

__all__ = ['SlicedMlp']

# Number of tokens in a slice. The hidden activations of so many tokens stay in the CPU's cache. Those of a whole batch
# (100 MB for 16 images of 224x224) are written to new memory and read back.
SLICE_TOKENS = 1568


class SlicedMlp(Mlp):
    """timm's `Mlp`, which computes tokens (B, N, C) in slices if it runs on a CPU and records no gradient.

    An MLP computes each token independently of the others, so slices change only the rounding of matrix products.

    Tokens are not sliced if this module or one of its layers, such as dropout, is in training mode: the masks of
    dropout would be drawn in another order than in a recomputation. They are not sliced either if layers have hooks, or
    are not from torch or timm, because such code may need all tokens together.
    """

    def _takes_slices(self, x: torch.Tensor) -> bool:
        return (
            not torch.compiler.is_compiling()  # first, so that a graph has no guard on the number of tokens
            and not torch.jit.is_tracing()
            and not self.training
            and not torch.is_grad_enabled()
            and type(x) is torch.Tensor
            and x.device.type == 'cpu'
            and x.shape[0] * x.shape[1] > SLICE_TOKENS
            and type(self.fc1) is type(self.fc2) is nn.Linear
            and all(type(m).__module__.startswith(('torch.nn.', 'timm.layers.')) for m in self.children())
            and not any(m.training or m._forward_hooks or m._forward_pre_hooks for m in self.children())
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if self._takes_slices(x):
                slices = x.flatten(0, 1).split(SLICE_TOKENS)
                return torch.cat([self.forward_tokens(tokens) for tokens in slices]).view_as(x)
        return self.forward_tokens(x)

    def forward_tokens(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc1(x)
        x = self.act(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        x = self.drop2(x)
        return x
