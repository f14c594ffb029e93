"""Norms between a residual stream in float32 and layers in whatever dtype the model has."""

from timm.models import register_notrace_module
from torch import Tensor, nn

from ..ops import norm


@register_notrace_module
class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` computed in the input's dtype, returned in the weights'.

    The residual stream stays float32 in a model cast to bfloat16; this is where it becomes bfloat16 again.
    """

    def __init__(self, dim: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D], normalised over D."""
        return norm(x, self.weight, self.bias, self.eps, self.weight.dtype)


@register_notrace_module
class RmsNorm(nn.RMSNorm):
    """`nn.RMSNorm` computed in the input's dtype, returned in the weights' (VideoMamba's norm)."""

    def __init__(self, dim: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.eps: float

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D], divided by its root mean square over D."""
        return norm(x, self.weight, None, self.eps, self.weight.dtype)
