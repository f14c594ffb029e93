"""Norms between a residual stream in float32 and layers in whatever dtype the model has."""

import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` computed in the input's dtype, returned in the weights'.

    The residual stream stays float32 in a model cast to bfloat16; this is where it becomes bfloat16 again.
    """

    def __init__(self, dim: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D], normalised over D."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


class RmsNorm(nn.RMSNorm):
    """`nn.RMSNorm` computed in the input's dtype, returned in the weights' (VideoMamba's norm)."""

    def __init__(self, dim: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D], divided by its root mean square over D."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)
