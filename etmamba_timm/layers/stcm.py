"""STCM, the Spatiotemporal Collaborative Modulation block (paper 3.4): EBS beside multi-scale dilated convolutions."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..ops import local_conv
from .block import EbsBlock
from .norm import LayerNorm
from .plain import in_autocast, plain_conv, plain_weights
from .recompute import Recomputing

SCALES = ((3, 1, 1), (5, 4, 2), (7, 9, 3))  # kernel, padding and dilation of each scale


class LocalBranch(Recomputing):
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
        self.conv3, self.conv5, self.conv7 = (
            nn.Conv2d(width, width, kernel, padding=padding, dilation=dilation, groups=width, **dd)
            for kernel, padding, dilation in SCALES
        )
        self.norm = LayerNorm(dim, before_linear=True, **dd)

    def forward(self, x_norm: Tensor, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """x_norm, x: tokens [B, 1 + t·h·w, D], normalised and not, class token first -> [B, 1 + t·h·w, D]."""
        convs = (self.conv3, self.conv5, self.conv7)

        def run(x_norm: Tensor, x: Tensor) -> Tensor:
            return self.norm(self._convolved(self.proj(x_norm), x, convs, grid))

        return self.recomputed(run, [self.proj, *convs, self.norm], x_norm, x)

    def _convolved(self, tokens: Tensor, x: Tensor, convs: tuple[nn.Conv2d, ...], grid: tuple[int, int, int]) -> Tensor:
        """SiLU(Xc) + X: [B, 1 + t·h·w, D/4] and [B, 1 + t·h·w, D] -> [B, 1 + t·h·w, D]."""
        channels = tokens.shape[-1]
        weights = [
            plain_conv(conv, nn.Conv2d, (channels, 1, kernel, kernel), padding, dilation)
            for conv, (kernel, padding, dilation) in zip(convs, SCALES, strict=True)
        ]
        plain = [pair for pair in weights if pair is not None]
        if len(plain) == len(convs):
            return local_conv(tokens, x, [weight for weight, _ in plain], [bias for _, bias in plain], grid)
        return _called_convs(tokens, x, convs, grid)


def _called_convs(tokens: Tensor, residual: Tensor, convs: tuple[nn.Module, ...], grid: tuple[int, int, int]) -> Tensor:
    """`local_conv` by calls of the modules, each of which takes and returns [B·t, C, h, w]."""
    t, h, w = grid
    residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
    frames = tokens[:, 1:].unflatten(1, (t, h * w)).flatten(0, 1).mT.unflatten(2, (h, w))  # [B·t, C, h, w]
    local = F.silu(torch.cat([*(conv(frames) for conv in convs), frames], dim=1))
    local = local.flatten(2).mT.unflatten(0, (-1, t)).flatten(1, 2)  # [B·t, 4C, h, w] -> [B, t·h·w, 4C]
    return torch.cat([residual[:, :1], residual[:, 1:] + local], dim=1)


@register_notrace_module
class StcmBlock(EbsBlock):
    """`X ← X + DropPath(Fuse(concat[EBS(X̂), local(X̂, X)]))` with X̂ = LN(X): row (d). Arguments as in `MixerBlock`."""

    def __init__(self, dim: int, depth: int = 1, *args: Any, device=None, dtype=None, **kwargs: Any) -> None:
        dd = {"device": device, "dtype": dtype}
        kwargs |= dd
        super().__init__(dim, depth, *args, **kwargs)
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
            weights = self._folded_weights("mixer.in_proj", "mixer.pw", "mixer.out_proj", "fusion")
            self.mixer.pw = self.mixer.out_proj = None
            out_features, in_features = weights["fusion.weight"].shape
            weight = self.fusion.weight
            self.fusion = nn.Linear(in_features, out_features, device=weight.device, dtype=weight.dtype)
            self.load_state_dict(weights)

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """x: tokens [B, 1 + t·h·w, D], class token first; grid (t, h, w) -> [B, 1 + t·h·w, D]."""
        x_norm = self.norm(x)
        return x + self.drop_path(self._fused(self.mixer(x_norm), self.local(x_norm, x, grid)))

    def _fused(self, mixed: Tensor, local: Tensor) -> Tensor:
        """`Fuse(concat[mixed, local])`, both [B, N, ·]; each is multiplied with its columns, so that none is copied."""
        weights = plain_weights(self.fusion, nn.Linear)
        if weights is None:
            return self.fusion(torch.cat([mixed, local], dim=-1))
        weight, bias = in_autocast(mixed, weights[0]), weights[1]
        of_mixed, of_local = weight.split([mixed.shape[-1], local.shape[-1]], dim=1)
        y = F.linear(mixed, of_mixed, bias)
        y.flatten(0, 1).addmm_(local.flatten(0, 1).to(y.dtype), of_local.t().to(y.dtype))
        return y
