"""STFP, the Spatiotemporal Feature Preservation stem (paper 3.2)."""

import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..ops import conv_norm_relu
from .plain import plain_conv, plain_weights


class ConvNormReLU(nn.Module):
    """`ReLU(LN(PW(DW3(x))))`: a 3×3×3 depthwise convolution with zero padding 1, a 1×1×1 one, a norm over channels.

    Args:
        channels: C.
        depthwise: whether there is the 3×3×3 convolution.
    """

    def __init__(self, channels: int, depthwise: bool = True, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.depthwise = nn.Conv3d(channels, channels, 3, padding=1, groups=channels, **dd) if depthwise else None
        self.pointwise = nn.Conv3d(channels, channels, 1, **dd)
        self.norm = nn.LayerNorm(channels, **dd)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x, residual: [B, C, T, H, W] -> [B, C, T, H, W], the residual added to it."""
        channels = x.shape[1]
        depthwise = None
        if self.depthwise is not None:
            depthwise = plain_conv(self.depthwise, nn.Conv3d, (channels, 1, 3, 3, 3), padding=1)
        pointwise = plain_conv(self.pointwise, nn.Conv3d, (channels, channels, 1, 1, 1))
        norm = plain_weights(self.norm, nn.LayerNorm)
        if pointwise and norm and (depthwise or self.depthwise is None):
            return conv_norm_relu(x, depthwise, pointwise, norm, self.norm.eps, residual)
        y = self.pointwise(x if self.depthwise is None else self.depthwise(x))
        y = F.relu(self.norm(y.movedim(1, -1)).movedim(-1, 1)).to(x.dtype)  # the norm is over the last dimension
        return y if residual is None else y + residual


@register_notrace_module
class Stfp(nn.Module):
    """Local space-time features, drawn from the clip before it is cut into patches and added to it.

    `S1 = ReLU(LN(DW3(ReLU(LN(DW3(X))))))`, `S2 = ReLU(LN(DW3(S1 + ReLU(LN(PW(X))))))`, output `S2 + X`.

    Args:
        channels: the clip's channels C, the stem's width too. At least 2: a norm over one channel is constant.
    """

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if channels < 2:
            raise ValueError("STFP normalises over channels and needs at least 2; use stem='none' for 1")
        self.conv1 = ConvNormReLU(channels, **dd)
        self.conv2 = ConvNormReLU(channels, **dd)
        self.skip = ConvNormReLU(channels, depthwise=False, **dd)
        self.conv3 = ConvNormReLU(channels, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """x: clip [B, C, T, H, W] -> [B, C, T, H, W]."""
        s1 = self.conv2(self.conv1(x))
        return self.conv3(self.skip(x, residual=s1), residual=x)
