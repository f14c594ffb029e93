"""The one model class; its `stem` and `block` make it ETMamba, VideoMamba or what lies between."""

import logging
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from timm.layers import get_device_dtype, trunc_normal_
from timm.models import checkpoint, named_apply, register_notrace_function
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args, update_model_input_size
from torch import Tensor, nn

from ..clip import Clip, Stride
from ..layers import BLOCKS, STEMS, PatchEmbed, resample_spatial, resample_temporal, to_tokens

_logger = logging.getLogger(__name__)

POOLS = ("token", "avg", "")


class EtMamba(nn.Module):
    """ETMamba (paper 3), and by `stem` and `block` every row of its ablation down to VideoMamba.

    clip [B, C, T, H, W] → stem → patch embedding → class token, positions → blocks → norm → class token → head.
    An image [B, C, H, W] is a clip of one frame. A built model takes any number of frames, and any height and width
    that are multiples of the patch: position embeddings are resampled.

    Args:
        img_size: height and width that the position embeddings are made for, in pixels; an int or (H, W).
        num_frames: frames that the temporal position embedding is made for.
        in_chans: channels of a clip, C.
        num_classes: classes; 0 for none.
        global_pool: 'token' (the class token), 'avg' (the mean of the patch tokens) or '' (all tokens).
        patch_size: side of a patch, in pixels.
        embed_dim: token width D.
        depth: number of blocks.
        d_state: state size of the SSM.
        expand: inner width in D. In 'stcm' and 'ebs' that of both directions together [reading], in 'bimamba' of each.
        d_conv: width of the short causal convolution before the SSM [reading]; 0 leaves it out.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        stem: 'stfp' or 'none'.
        block: 'stcm', 'ebs' or 'bimamba'.
        folded: whether the model is in its inference form; see `fold`.

    Raises:
        ValueError: an argument that makes no model, or at the call a clip that doesn't fit it.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        num_frames: int = 16,
        in_chans: int = 3,
        num_classes: int = 400,
        global_pool: str = "token",
        patch_size: int = 16,
        embed_dim: int = 576,
        depth: int = 32,
        d_state: int = 16,
        expand: int = 2,
        d_conv: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        stem: str = "stfp",
        block: str = "stcm",
        folded: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        for name, value, least in (
            ("num_frames", num_frames, 1),
            ("in_chans", in_chans, 1),
            ("num_classes", num_classes, 0),
            ("patch_size", patch_size, 1),
            ("embed_dim", embed_dim, 1),
            ("depth", depth, 1),
            ("d_state", d_state, 1),
            ("expand", expand, 1),
            ("d_conv", d_conv, 0),
        ):
            _at_least(name, value, least)
        if not 0 <= drop_path_rate <= 1:
            raise ValueError(f"drop_path_rate is {drop_path_rate}; it must be within 0 and 1")
        _lookup("global_pool", global_pool, POOLS)
        stem_layer, block_layer = _lookup("stem", stem, STEMS), _lookup("block", block, BLOCKS)

        self._made_with: dict = {}
        self.stride: Stride = None
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False
        self.patch_size = patch_size
        self.img_size = _pair(img_size)
        self.grid_size = _grid_size(self.img_size, patch_size)

        if stem_layer is not None and in_chans == 1:
            _logger.warning("the %r stem is left out: with in_chans=1 its norm over channels is constant", stem)
            stem_layer = None
        self.stem = stem_layer(in_chans, **dd) if stem_layer else nn.Identity()
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, **dd)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid_size[0] * self.grid_size[1], embed_dim, **dd))
        self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, num_frames, embed_dim, **dd))
        self.blocks = nn.ModuleList(
            block_layer(
                embed_dim,
                depth,
                d_state,
                expand,
                d_conv,
                drop_path=drop_path_rate * i / max(1, depth - 1),
                **dd,
            )
            for i in range(depth)
        )
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        self.norm = block_layer.norm_layer(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights()
        if folded:
            if not hasattr(block_layer, "reparameterize"):
                raise ValueError(f"folded=True with block {block!r}, in which there is nothing to fold; leave it out")
            self.fold()

    @property
    def folded(self) -> bool:
        """Whether the blocks are in their inference form; see `fold`."""
        return any(getattr(block, "folded", False) for block in self.blocks)

    @property
    def _model_args(self) -> dict:  # what timm saves as the arguments to build this model again
        return self._made_with | ({"folded": True} if self.folded else {})

    @_model_args.setter
    def _model_args(self, args: dict) -> None:
        self._made_with = args

    @property
    def num_frames(self) -> int:
        """Frames that the temporal position embedding is made for."""
        return self.temporal_pos_embedding.shape[1]

    @property
    def clip(self) -> Clip:
        """The clips it takes: `num_frames`, and the attribute `stride`, which the weights it was made from tell."""
        return Clip(self.num_frames, self.stride)

    def init_weights(self) -> None:
        """Linear layers and positions: truncated normal 0.02, zero bias; Mamba's Δ. The rest is drawn on construction.

        Unlike VideoMamba's code, which zeroes it, the Δ bias keeps Mamba's initialisation, in every variant.
        """
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        named_apply(_init_linear, self)
        for module in self.modules():
            if module is not self and hasattr(module, "init_weights"):
                module.init_weights()

    # Forward

    def forward(self, x: Tensor) -> Tensor:
        """x: clip [B, C, T, H, W] or image [B, C, H, W], normalised -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """x: clip [B, C, T, H, W] or image [B, C, H, W] -> normalised tokens [B, 1 + t·h·w, D], class token first."""
        x, grid = self._embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """x: tokens [B, N, D] -> logits [B, num_classes], or the pooled, dropped-out features [B, D]."""
        x = x.to(self.cls_token.dtype)  # without the norm it would still be the residual stream's
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The outputs of chosen blocks.

        Args:
            x: clip [B, C, T, H, W] or image [B, C, H, W].
            indices: the last n blocks for an int, all for None, else those listed (negative from the end).
            return_prefix_tokens: whether each intermediate is a pair with the class token [B, 1, D].
            norm: whether the final norm is applied to intermediates too.
            stop_early: whether blocks after the last one asked for are skipped.
            output_fmt: 'NCHW' for maps, [B, D, t, h, w] for a clip and [B, D, h, w] for an image; 'NLC' for
                tokens [B, t·h·w, D].
            intermediates_only: whether to leave out the final features.

        Returns: the intermediates, or (final features [B, N, D], intermediates).
        """
        _lookup("output_fmt", output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(len(self.blocks), indices)
        is_image = x.ndim == 4
        x, grid = self._embed(x)
        taken = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)
            if i in take:
                taken.append(self.norm(x) if norm else x.to(self.cls_token.dtype))

        maps = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            shape = grid[1:] if is_image else grid
            maps = [y.transpose(1, 2).unflatten(2, shape).contiguous() for y in maps]  # [B, N, D] -> [B, D, t, h, w]
        if return_prefix_tokens:
            maps = [(m, y[:, : self.num_prefix_tokens]) for m, y in zip(maps, taken, strict=True)]
        return maps if intermediates_only else (self.norm(x), maps)

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Clip or image -> tokens [B, 1 + t·h·w, D] in float32 at least (the residual stream), grid (t, h, w)."""
        x = self.stem(as_clip(x, self.in_chans, self.patch_size))
        return clip_tokens(
            self.patch_embed(x), self.cls_token, self.pos_embed, self.temporal_pos_embedding, self.grid_size
        )

    # What timm and its users ask of a model

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks after the last of `indices`, and norm and head on request; returns absolute indices."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """The head: `nn.Linear`, or `nn.Identity` without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` (0 for none), and another pooling if one is given."""
        _at_least("num_classes", num_classes, 0)
        if global_pool is not None:
            self.global_pool = _lookup("global_pool", global_pool, POOLS)
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.embed_dim, num_classes, **get_device_dtype(self))
            _init_linear(self.head)
        self.head.train(self.training)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, num_frames: int | None = None) -> None:
        """Resamples the position embeddings, for good, to another picture size (pixels) or number of frames."""
        if num_frames is not None:
            _at_least("num_frames", num_frames, 1)
        if img_size is not None:
            img_size = _pair(img_size)
            grid_size = _grid_size(img_size, self.patch_size)
            resampled = resample_spatial(self.pos_embed.detach(), self.grid_size, grid_size)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
            self.img_size, self.grid_size = img_size, grid_size
            update_model_input_size(self, img_size)
        if num_frames is not None:
            old = self.temporal_pos_embedding
            resampled = resample_temporal(old.detach(), num_frames)
            self.temporal_pos_embedding = nn.Parameter(resampled, requires_grad=old.requires_grad)
            update_model_args(self, num_frames=num_frames)

    def fold(self) -> "EtMamba":
        """Turns the model into its inference form, in place: the same output for fewer multiply-adds.

        `PW_s` of each block goes into its x projections, `Lin_out` into its fusion (in 'ebs' blocks the first alone):
        323 G multiply-adds become 223 G for ETMamba-M. timm's `reparameterize_model` does the same to a copy. A folded
        model saves, loads and trains like any other, with fewer parameters; it can't be unfolded.

        Returns: the model itself.
        """
        foldable = [block for block in self.blocks if hasattr(block, "reparameterize")]
        if not foldable:
            _logger.warning("there is nothing to fold in this model: no linear maps meet in its blocks")
        for block in foldable:
            block.reparameterize()
        return self

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that get no weight decay, beside biases and norms."""
        leaves = {"cls_token", "pos_embed", "temporal_pos_embedding", "A_log", "A_b_log", "D", "D_b"}
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in leaves}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for timm's layer-wise learning rate decay."""
        return {
            "stem": r"^stem|cls_token|pos_embed|temporal_pos_embedding|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether a block's activations are recomputed in the backward pass, to save memory."""
        self.grad_checkpointing = enable


@register_notrace_function
def as_clip(x: Tensor, in_chans: int, patch_size: int) -> Tensor:
    """Checks a clip [B, C, T, H, W] or an image [B, C, H, W]; an image becomes a clip of one frame."""
    shape = tuple(x.shape)
    if x.ndim not in (4, 5):
        raise ValueError(f"input is {shape}; it must be a clip [B, C, T, H, W] or an image [B, C, H, W]")
    if not x.is_floating_point():
        raise ValueError(
            f"clip is {x.dtype}; the model takes normalised floats: scale to [0, 1], subtract the mean and divide by "
            "the std of model.pretrained_cfg, as etmamba_timm.data.EvalTransform does"
        )
    if x.shape[1] != in_chans:
        hint = "; it looks like [B, T, C, H, W], so permute it" if x.ndim == 5 and x.shape[2] == in_chans else ""
        raise ValueError(f"clip {shape} has {x.shape[1]} channels; this model takes {in_chans}, in dimension 1{hint}")
    height, width = x.shape[-2:]
    if 0 in shape:
        raise ValueError(f"clip {shape} is empty; it needs at least one sample, one frame and one patch")
    if height % patch_size or width % patch_size:
        raise ValueError(f"clip is {height}×{width}; height and width must be multiples of {patch_size}")
    return x.unsqueeze(2) if x.ndim == 4 else x


@register_notrace_function
def clip_tokens(
    patches: Tensor, cls_token: Tensor, pos_embed: Tensor, temporal: Tensor, grid_size: tuple[int, int]
) -> tuple[Tensor, tuple[int, int, int]]:
    """`to_tokens` into a residual stream of float32 at least, and the patch grid (t, h, w)."""
    x = to_tokens(patches, cls_token, pos_embed, temporal, grid_size)
    return x.to(torch.promote_types(x.dtype, torch.float32)), tuple(patches.shape[2:])


def _init_linear(module: nn.Module, name: str = "") -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, SupportsIndex):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def _lookup(argument: str, name: str, table):
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"unknown {argument} {name!r}; choose one of {', '.join(map(repr, table))}")
    return table[name] if isinstance(table, dict) else name


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, SupportsIndex) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, SupportsIndex) for side in pair):
        raise ValueError(f"img_size is {size!r}; it must be a whole number of pixels, or two: (height, width)")
    return int(pair[0]), int(pair[1])


def _grid_size(img_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    height, width = img_size
    if height < patch_size or width < patch_size or height % patch_size or width % patch_size:
        raise ValueError(f"img_size is {height}×{width}; height and width must be multiples of patch_size {patch_size}")
    return height // patch_size, width // patch_size
