"""STFP, the Spatiotemporal Feature Preservation stem (paper 3.2)."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn


class SeparableConv3d(nn.Sequential):
    """A 3×3×3 depthwise convolution with zero padding 1, then a 1×1×1 one across channels."""

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.depthwise = nn.Conv3d(channels, channels, 3, padding=1, groups=channels, **dd)
        self.pointwise = nn.Conv3d(channels, channels, 1, **dd)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, T, H, W], at each position; in float32 at least."""

    def forward(self, x: Tensor) -> Tensor:
        # Few channels: whole-tensor operations beat a layer_norm over rows of 3.
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        centred = x - x.mean(1, keepdim=True)
        scale = (centred.square().mean(1, keepdim=True) + self.eps).rsqrt()
        shape = (-1, 1, 1, 1)
        return (centred * scale * self.weight.view(shape) + self.bias.view(shape)).to(dtype)


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
        self.conv1 = SeparableConv3d(channels, **dd)
        self.norm1 = ChannelNorm(channels, **dd)
        self.conv2 = SeparableConv3d(channels, **dd)
        self.norm2 = ChannelNorm(channels, **dd)
        self.skip = nn.Conv3d(channels, channels, 1, **dd)
        self.norm_skip = ChannelNorm(channels, **dd)
        self.conv3 = SeparableConv3d(channels, **dd)
        self.norm3 = ChannelNorm(channels, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """x: clip [B, C, T, H, W] -> [B, C, T, H, W]."""
        s1 = F.relu(self.norm1(self.conv1(x)))
        s1 = F.relu(self.norm2(self.conv2(s1)))
        s2 = s1 + F.relu(self.norm_skip(self.skip(x)))
        return F.relu(self.norm3(self.conv3(s2))) + x
