"""From a clip to tokens: patches, class token, and position embeddings that stretch to any clip."""

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import resample_abs_pos_embed
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..ops import on_gpu
from .plain import plain_weights


@register_notrace_module
class PatchEmbed(nn.Module):
    """Cuts every frame into patches and projects them: a 3-D convolution of kernel and stride 1×p×p (paper 3.1)."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.patch_size = patch_size
        kernel = (1, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel, stride=kernel, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: clip [B, C, T, H, W] -> patch embeddings [B, D, t, h, w]."""
        p = self.patch_size
        weights = plain_weights(self.proj, nn.Conv3d) if on_gpu(x) else None
        if weights is None or weights[0].shape[1:] != (x.shape[1], 1, p, p) or self.proj.stride != (1, p, p):
            return self.proj(x)
        weight, bias = weights  # as a product, which should be several times as fast there
        patches = rearrange(x, "b c t (h p) (w q) -> b t h w (c p q)", p=p, q=p)
        return rearrange(F.linear(patches, weight.flatten(1), bias), "b t h w d -> b d t h w")


def resample_spatial(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embedding [1, 1 + h·w, D], class token's first, from grid `old` to grid `new`: bicubic."""
    if tuple(old) == tuple(new):
        return pos_embed
    return resample_abs_pos_embed(pos_embed, new_size=list(new), old_size=list(old), num_prefix_tokens=1)


def resample_temporal(embedding: Tensor, length: int) -> Tensor:
    """Temporal position embedding [1, t, D] -> [1, length, D]: linear."""
    if not torch.compiler.is_compiling() and embedding.shape[1] == length:  # a graph is for any length
        return embedding
    x = embedding.to(torch.promote_types(embedding.dtype, torch.float32)).transpose(1, 2)  # [1, D, t]
    return F.interpolate(x, size=length, mode="linear").transpose(1, 2).to(embedding.dtype).contiguous()


def to_tokens(
    patches: Tensor, cls_token: Tensor, pos_embed: Tensor, temporal: Tensor, grid_size: tuple[int, int]
) -> Tensor:
    """Adds positions and the class token, and lays the patches out frame by frame, row by row.

    Args:
        patches: [B, D, t, h, w].
        cls_token: [1, 1, D].
        pos_embed: [1, 1 + h₀·w₀, D], class token's first; resampled to (h, w).
        temporal: [1, t₀, D]; resampled to t.
        grid_size: (h₀, w₀).

    Returns: tokens [B, 1 + t·h·w, D], class token first.
    """
    batch, _, t, h, w = patches.shape
    pos_embed = resample_spatial(pos_embed, grid_size, (h, w))
    position = pos_embed[:, None, 1:] + resample_temporal(temporal, t)[:, :, None]  # [1, t, h·w, D]
    x = rearrange(patches, "b d t h w -> b (t h w) d") + position.flatten(1, 2)
    cls = (cls_token + pos_embed[:, :1]).expand(batch, -1, -1)
    return torch.cat([cls.to(x.dtype), x], dim=1)
