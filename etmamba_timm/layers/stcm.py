"""STCM, the Spatiotemporal Collaborative Modulation block (paper 3.4): EBS beside multi-scale dilated convolutions."""

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..ops import local_conv
from .block import EbsBlock
from .fold import fold_weights
from .norm import LayerNorm


class LocalBranch(nn.Module):
    """Local spatial features at four scales, within each frame.

    `X' = PW(X̂)`, `Xc = concat(DC3(X'), DC5(X'), DC7(X'), X')`, `LN(SiLU(Xc) + X)`; the convolutions are depthwise
    of kernel 3, 5, 7 with dilation 1, 2, 3. The class token has no neighbours: its SiLU(Xc) is 0.
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % 4:
            raise ValueError(f"embed_dim is {dim}; the 'stcm' block needs a multiple of 4")
        width = dim // 4
        self.proj = nn.Linear(dim, width, **dd)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, dilation=1, groups=width, **dd)
        self.conv5 = nn.Conv2d(width, width, 5, padding=4, dilation=2, groups=width, **dd)
        self.conv7 = nn.Conv2d(width, width, 7, padding=9, dilation=3, groups=width, **dd)
        self.norm = LayerNorm(dim, **dd)

    def forward(self, x_norm: Tensor, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """x_norm, x: tokens [B, 1 + t·h·w, D], normalised and not, class token first -> [B, 1 + t·h·w, D]."""
        convs = (self.conv3, self.conv5, self.conv7)
        tokens = self.proj(x_norm)
        return self.norm(local_conv(tokens, x, [c.weight for c in convs], [c.bias for c in convs], grid))


@register_notrace_module
class StcmBlock(EbsBlock):
    """`X ← X + DropPath(Fuse(concat[EBS(X̂), local(X̂, X)]))` with X̂ = LN(X): row (d). Arguments as in `MixerBlock`."""

    def __init__(self, dim: int, depth: int = 1, *args, device=None, dtype=None, **kwargs) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, depth, *args, **kwargs, **dd)
        self.depth = depth
        self.local = LocalBranch(dim, **dd)
        self.fusion = nn.Linear(2 * dim, dim, **dd)  # the formulas' Fuse; timm would call a method of that name

    def init_weights(self) -> None:
        """The fusion divided by √depth. After the linear layers' own initialisation."""
        with torch.no_grad():
            self.fusion.weight.div_(self.depth**0.5)

    def reparameterize(self) -> None:
        """Folds the block (see `fold_weights`), in place. timm's `reparameterize_model` calls this."""
        if not self.folded:
            weights = fold_weights(self.state_dict())
            self.mixer.pw = self.mixer.out_proj = None
            self.fusion = nn.Linear(*reversed(weights["fusion.weight"].shape)).to(self.fusion.weight)
            self.load_state_dict(weights)

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """x: tokens [B, 1 + t·h·w, D], class token first; grid (t, h, w) -> [B, 1 + t·h·w, D]."""
        x_norm = self.norm(x)
        both = torch.cat([self.mixer(x_norm), self.local(x_norm, x, grid)], dim=-1)  # [B, 1 + t·h·w, 2D]
        return x + self.drop_path(self.fusion(both))
