"""Norms between a residual stream in float32 and layers in whatever dtype the model has."""

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..ops import norm


@register_notrace_module
class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` computed in the input's dtype, returned in the weights'.

    The residual stream stays float32 in a model cast to bfloat16; this is where it becomes bfloat16 again.

    Args:
        dim: D.
        eps: added to the variance.
        before_linear: whether only linear layers take the output. Under autocast they would cast it, each for itself;
            so it comes in autocast's dtype.
    """

    def __init__(self, dim: int, eps: float = 1e-5, before_linear: bool = False, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.before_linear = before_linear

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D], normalised over D."""
        return norm(x, self.weight, self.bias, self.eps, _dtype(x, self.weight, self.before_linear))


@register_notrace_module
class RmsNorm(nn.RMSNorm):
    """`nn.RMSNorm` computed in the input's dtype, returned in the weights' (VideoMamba's). Arguments: `LayerNorm`'s."""

    def __init__(self, dim: int, eps: float = 1e-5, before_linear: bool = False, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.eps: float
        self.before_linear = before_linear

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D], divided by its root mean square over D."""
        return norm(x, self.weight, None, self.eps, _dtype(x, self.weight, self.before_linear))


def _dtype(x: Tensor, weight: Tensor, before_linear: bool) -> torch.dtype:
    kind = x.device.type
    if before_linear and not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype
