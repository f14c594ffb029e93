"""The model class: ETMamba, VideoMamba and the ablation between them, chosen by `stem` and `block`."""

import logging
import warnings
from collections.abc import Collection
from typing import Any, SupportsIndex

import torch
from timm.layers import AttentionPoolLatent, get_device_dtype, trunc_normal_
from timm.models import checkpoint, named_apply, register_notrace_function
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args, update_model_input_size
from torch import Tensor, nn

from ..clip import Clip, Stride
from ..layers import BLOCKS, STEMS, Motion, PatchEmbed, Recomputing, resample_spatial, resample_temporal, to_tokens
from ..words import number_of

_logger = logging.getLogger(__name__)
_EXPORT = "use torch.export, or etmamba_timm.export for a file"

POOLS = ("token", "avg", "map", "")

# One per block: tokens or maps, or pairs of them and the class token.
Intermediates = list[Tensor] | list[tuple[Tensor, Tensor]]


class EtMamba(nn.Module):
    """ETMamba (paper 3); `stem` and `block` choose among the rows of its ablation, down to VideoMamba.

    clip [B, C, T, H, W] → stem → patch embedding → class token, positions → blocks → norm → class token → head.
    An image [B, C, H, W] is a clip of one frame. The model takes any number of frames, and any height and width that
    are multiples of the patch size: position embeddings are resampled.

    Args:
        img_size: height and width of the position embeddings' grid, in pixels; an int or (H, W).
        num_frames: length of the temporal position embedding, in frames.
        in_chans: channels of a clip, C.
        num_classes: number of classes; 0 for no classifier.
        global_pool: 'token' (the class token), 'avg' (the mean of the patch tokens), 'map' (timm's attention pooling
            over all tokens, with weights of its own) or '' (all tokens).
        patch_size: side of a patch, in pixels.
        embed_dim: token width D.
        depth: number of blocks.
        d_state: state size of the SSM.
        expand: inner width as a multiple of D: of both directions together in 'stcm' and 'ebs' [reading], of each
            direction in 'bimamba'.
        d_conv: width of the short causal convolution before the SSM [reading]; 0 for none.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        stem: 'stfp' or 'none'.
        block: 'stcm', 'ebs' or 'bimamba'.
        motion: whether the stem sees luminance and its changes in time instead of colours, see `Motion`. Not the
            paper's; it helps where a model learns from few clips.
        folded: whether to build the inference form; see `fold`.
        device, dtype: of the parameters.

    Attributes:
        is_multilabel: whether a video may be of several classes, so that scores are sigmoids. A new classifier isn't.

    Raises:
        ValueError: an invalid argument; in `forward`, an input that doesn't fit the model.
    """

    num_prefix_tokens = 1
    pretrained_cfg: dict  # set by timm.create_model

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
        motion: bool = False,
        folded: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
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
            raise ValueError(f"drop_path_rate is {drop_path_rate}; it must be between 0 and 1")
        _check_choice("stem", stem, STEMS)
        _check_choice("block", block, BLOCKS)
        stem_layer, block_layer = STEMS[stem], BLOCKS[block]
        if not isinstance(motion, bool):
            raise ValueError(f"motion is {motion!r}; it must be True or False")
        if motion and in_chans != 3:
            raise ValueError(f"in_chans is {in_chans}; with motion=True it must be 3, for RGB")

        self._made_with: dict = {}
        self.stride: Stride = None
        self.is_multilabel = False
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing, self.checkpoint_every = False, 1
        self.patch_size = patch_size
        self.img_size = _pair(img_size)
        self.grid_size = _grid_size(self.img_size, patch_size)

        if stem_layer is not None and in_chans == 1:
            _logger.warning("no %r stem with in_chans=1: its norm over a single channel would be constant", stem)
            stem_layer = None
        self.motion = Motion(**dd) if motion else nn.Identity()
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
        self.norm: nn.Module = block_layer.norm_layer(embed_dim, **dd)
        self.attn_pool: AttentionPoolLatent | None = None
        self._set_pool(global_pool, dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights()
        if folded:
            if not hasattr(block_layer, "reparameterize"):
                raise ValueError(f"block {block!r} can't be folded; leave folded=True out")
            self.fold()

    @property
    def folded(self) -> bool:
        """Whether the blocks are in their inference form; see `fold`."""
        return any(getattr(block, "folded", False) for block in self.blocks)

    @property
    def _model_args(self) -> dict:  # timm saves these as the arguments to rebuild the model
        now = {name: getattr(self, name) for name in ("img_size", "num_frames", "in_chans", "embed_dim", "global_pool")}
        made_with = self._made_with | {name: value for name, value in now.items() if name in self._made_with}
        return made_with | ({"folded": True} if self.folded else {})

    @_model_args.setter
    def _model_args(self, args: dict) -> None:
        self._made_with = args

    @property
    def num_frames(self) -> int:
        """Length of the temporal position embedding, in frames."""
        return self.temporal_pos_embedding.shape[1]

    @property
    def clip(self) -> Clip:
        """The clips that the model expects: `num_frames`, and `stride`, which comes with the loaded weights."""
        return Clip(self.num_frames, self.stride)

    def init_weights(self) -> None:
        """Initialises linear layers and position embeddings (truncated normal 0.02, zero bias), and Mamba's Δ.

        Other parameters are initialised on construction. The Δ bias keeps Mamba's initialisation in every variant;
        VideoMamba's code zeroes it. On 'meta' there is nothing to initialise, and PyTorch would take a second for it.
        """
        if self.cls_token.is_meta:
            return
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        named_apply(_init_linear, self)
        for module in self.modules():
            init_weights = getattr(module, "init_weights", None)
            if module is not self and init_weights is not None:
                init_weights()

    # Forward

    def forward(self, x: Tensor) -> Tensor:
        """x: clip [B, C, T, H, W] or image [B, C, H, W], normalised -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """x: clip [B, C, T, H, W] or image [B, C, H, W] -> normalised tokens [B, 1 + t·h·w, D], class token first."""
        x, grid = self._embed(x)
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, grid) if self._recomputes(i) else block(x, grid)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """x: tokens [B, N, D] -> logits [B, num_classes], or the pooled features [B, D] before the head."""
        x = x.to(self.cls_token.dtype)  # the residual stream's dtype, if the norm was pruned
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(1)
        elif self.attn_pool is not None:
            x = self.attn_pool(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Intermediates | tuple[Tensor, Intermediates]:
        """Returns the outputs of selected blocks.

        Args:
            x: clip [B, C, T, H, W] or image [B, C, H, W].
            indices: the last n blocks (int), the listed blocks (negative from the end), or all (None).
            return_prefix_tokens: whether to return pairs (intermediate, class token [B, 1, D]).
            norm: whether to apply the final norm to the intermediates.
            stop_early: whether to skip the blocks after the last selected one.
            output_fmt: 'NCHW' for maps, [B, D, t, h, w] for a clip and [B, D, h, w] for an image; 'NLC' for
                tokens [B, t·h·w, D].
            intermediates_only: whether to omit the final features.

        Returns: the intermediates, or (final features [B, N, D], intermediates).

        Raises:
            ValueError: an unknown `output_fmt`, or an input that doesn't fit the model.
        """
        _check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(len(self.blocks), indices)
        is_image = x.ndim == 4
        x, grid = self._embed(x)
        taken = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x, grid) if self._recomputes(i) else block(x, grid)
            if i in take:
                taken.append(self.norm(x) if norm else x.to(self.cls_token.dtype))

        maps = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            shape = grid[1:] if is_image else grid
            maps = [y.transpose(1, 2).unflatten(2, shape).contiguous() for y in maps]  # [B, N, D] -> [B, D, t, h, w]
        intermediates: Intermediates = maps
        if return_prefix_tokens:
            intermediates = [(m, y[:, : self.num_prefix_tokens]) for m, y in zip(maps, taken, strict=True)]
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Intermediates:
        """DINO's form of `forward_intermediates`: of the last `n` or the listed blocks, tokens or (`reshape`) maps."""
        output_fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(x, n, return_prefix_tokens, norm, False, output_fmt, True)  # type: ignore[return-value]

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Clip or image -> tokens [B, 1 + t·h·w, D] in at least float32 (the residual stream), grid (t, h, w)."""
        x = self.stem(self.motion(as_clip(x, self.in_chans, self.patch_size)))
        return clip_tokens(
            self.patch_embed(x), self.cls_token, self.pos_embed, self.temporal_pos_embedding, self.grid_size
        )

    # timm's model interface

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks after the last of `indices`, and optionally the norm and the head.

        Returns: `indices` as absolute block numbers.
        """
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
        """Replaces the head by a new one for `num_classes` (0 for none), and the pooling if another one is given."""
        _at_least("num_classes", num_classes, 0)
        dd = get_device_dtype(self)
        if global_pool is not None:
            self._set_pool(global_pool, dd)
            update_model_args(self, global_pool=global_pool)
        self.num_classes, self.is_multilabel = num_classes, False
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.embed_dim, num_classes, **dd)
            _init_linear(self.head)
        self.head.train(self.training)

    def _set_pool(self, global_pool: str, dd: dict[str, Any]) -> None:
        """Changes the pooling; heads of 'map' are 64 wide, or one if the width is no multiple of that."""
        _check_choice("global_pool", global_pool, POOLS)
        self.global_pool = global_pool
        if global_pool != "map":
            self.attn_pool = None
        elif self.attn_pool is None:
            heads = 1 if self.embed_dim % 64 else self.embed_dim // 64
            self.attn_pool = AttentionPoolLatent(self.embed_dim, num_heads=heads, norm_layer=nn.LayerNorm, **dd)
            named_apply(_init_linear, self.attn_pool.train(self.training))

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, num_frames: int | None = None) -> None:
        """Resamples the position embeddings in place to another image size (pixels) or number of frames."""
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
        """Converts the model to its inference form, in place: the same output with fewer multiply-adds.

        Each block's `PW_s` is folded into its x projections, and in 'stcm' blocks `Lin_out` into the fusion: ETMamba-M
        goes from 323 G to 223 G multiply-adds. timm's `reparameterize_model` does the same to a copy. A folded model
        saves, loads and trains as usual, with fewer parameters; folding can't be undone.

        Returns: the model itself.
        """
        folds = [getattr(block, "reparameterize", None) for block in self.blocks]
        if not any(folds):
            _logger.warning("nothing to fold: the model's blocks have no consecutive linear maps")
        for fold in filter(None, folds):
            fold()
        return self

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, in addition to biases and norms."""
        leaves = {"cls_token", "pos_embed", "temporal_pos_embedding", "latent", "A_log", "A_b_log", "D", "D_b"}
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in leaves}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for timm's layer-wise learning rate decay."""
        return {
            "stem": r"^stem|cls_token|pos_embed|temporal_pos_embedding|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, every: int = 1) -> None:
        """Sets whether blocks recompute their activations in the backward pass, to save memory.

        On GPUs, parts of a block are always recomputed, where that is quick (see `Recomputing`).

        Args:
            enable: whether any do.
            every: how many blocks there are for each that does; 1 for all of them, 2 for half of them.
        """
        _at_least("every", every, 1)
        self.grad_checkpointing, self.checkpoint_every = enable, every
        for i, block in enumerate(self.blocks):
            for module in block.modules():
                if isinstance(module, Recomputing):
                    module.recomputes = not self._recomputes(i)

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(f"torch.jit.script can't compile this model; {_EXPORT}")

    def _recomputes(self, block: int) -> bool:
        return self.grad_checkpointing and block % self.checkpoint_every == 0


@register_notrace_function
def as_clip(x: Tensor, in_chans: int, patch_size: int) -> Tensor:
    """Checks a clip [B, C, T, H, W] or an image [B, C, H, W], and returns a clip: of one frame for an image."""
    shape = tuple(x.shape)
    if x.ndim not in (4, 5):
        raise ValueError(f"input is {shape}; it must be a clip [B, C, T, H, W] or an image [B, C, H, W]")
    if not x.is_floating_point():
        raise ValueError(
            f"clip is {x.dtype}; the model takes normalised floats: scale to [0, 1], subtract the mean and divide by "
            "the std of model.pretrained_cfg, as etmamba_timm.data.EvalTransform does"
        )
    if x.shape[1] != in_chans:
        hint = ""
        if x.ndim == 5 and in_chans in (x.shape[2], x.shape[4]):
            order = "[B, T, C, H, W]" if x.shape[2] == in_chans else "[B, T, H, W, C]"
            hint = f"; it looks like {order}, so permute it"
        elif x.ndim == 4 and in_chans in (x.shape[0], x.shape[3]):
            hint = "; four dimensions are a batch of images, so give a clip a batch dimension, clip[None]"
        raise ValueError(
            f"clip {shape} has {number_of(x.shape[1], 'channel')}; this model takes {in_chans}, in dimension 1{hint}"
        )
    height, width = x.shape[-2:]
    if 0 in shape:
        raise ValueError(f"clip {shape} is empty; it needs at least one sample, one frame and one patch")
    if height % patch_size or width % patch_size:
        raise ValueError(f"clip is {height}×{width}; height and width must be multiples of {patch_size}")
    if torch.jit.is_tracing():
        message = f"a model traced by torch.jit.trace is wrong for clips of another shape; {_EXPORT}"
        warnings.warn(message, torch.jit.TracerWarning, stacklevel=2)
    return x.unsqueeze(2) if x.ndim == 4 else x


@register_notrace_function
def clip_tokens(
    patches: Tensor, cls_token: Tensor, pos_embed: Tensor, temporal: Tensor, grid_size: tuple[int, int]
) -> tuple[Tensor, tuple[int, int, int]]:
    """`to_tokens` in at least float32 (the residual stream), and the patch grid (t, h, w)."""
    x = to_tokens(patches, cls_token, pos_embed, temporal, grid_size)
    t, h, w = patches.shape[2:]
    return x.to(torch.promote_types(x.dtype, torch.float32)), (t, h, w)


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


def _check_choice(argument: str, name: str, choices: Collection[str]) -> None:
    if not isinstance(name, str) or name not in choices:
        raise ValueError(f"unknown {argument} {name!r}; choose one of {', '.join(map(repr, choices))}")


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
