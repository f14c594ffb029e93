"""State dicts of other origins and shapes -> ours: pure functions, used when weights load."""

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..layers import fold_weights, resample_spatial, resample_temporal

_logger = logging.getLogger(__name__)

# What is around a state dict, in training checkpoints and by DistributedDataParallel and torch.compile: averages first.
WRAPPERS = (
    *("state_dict_ema", "model_ema", "model", "module", "model_state", "model_state_dict", "state_dict", "_orig_mod"),
)
COUNTER = "n_averaged"  # which torch.optim.swa_utils.AveragedModel keeps beside its module


def from_videomamba(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VideoMamba's names -> ours; a state dict that has ours already comes back as it is.

    `layers.` becomes `blocks.` and `norm_f.` becomes `norm.`; all else is called the same. A dict around the state
    dict, or its name before every key, is taken off (see `WRAPPERS`). A 2-D patch weight [D, C, p, p] becomes
    [D, C, 1, p, p].
    """
    out = {our_name(key): value for key, value in unwrap(state_dict).items()}
    weight = out.get("patch_embed.proj.weight")
    if weight is not None and weight.ndim == 4:
        out["patch_embed.proj.weight"] = weight.unsqueeze(2)
    return out


def our_name(key: str) -> str:
    """What a tensor of VideoMamba is called here; our own names stay."""
    for theirs, ours in (("layers.", "blocks."), ("norm_f.", "norm.")):
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def unwrap(state_dict: Mapping) -> Mapping[str, Tensor]:
    """Takes off what wraps a state dict: a dict with one of `WRAPPERS` as key, or one of them before every key."""
    if COUNTER in state_dict:
        state_dict = {key: value for key, value in state_dict.items() if key != COUNTER}
    for name in WRAPPERS:
        inner = state_dict.get(name)
        if isinstance(inner, Mapping):
            return unwrap(inner)
        if state_dict and all(key.startswith(name + ".") for key in state_dict):
            return unwrap({key.removeprefix(name + "."): value for key, value in state_dict.items()})
    return state_dict


def adapt_in_chans(weight: Tensor, in_chans: int) -> Tensor:
    """Patch weight [D, C, 1, p, p] for another number of channels, by timm's rule.

    The sum over channels for one; else the channels repeated in turn and rescaled by C / in_chans.
    """
    channels = weight.shape[1]
    if in_chans == channels:
        return weight
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(in_chans) % channels] * (channels / in_chans)


def adapt_stem(weight: Tensor, channels: int) -> Tensor:
    """A tensor of STFP for another number of channels: the channels repeated in turn, the sums over them rescaled.

    With channels that repeat in turn a whole number of times, the stem gives what it gave, repeated.

    Args:
        weight: depthwise [C, 1, 3, 3, 3], pointwise [C, C, 1, 1, 1], or a bias or norm [C].
        channels: 2 or more.
    """
    old = weight.shape[0]
    index = torch.arange(channels) % old
    weight = weight[index]
    if weight.ndim > 1 and weight.shape[1] == old > 1:
        weight = weight[:, index] * (old / channels)
    return weight


def checkpoint_filter_fn(state_dict: Mapping, model) -> dict[str, Tensor]:
    """timm's hook between a checkpoint and `load_state_dict`: names, channels and positions made to fit `model`.

    The checkpoint's position grid is what its config.json says (`img_size`), else the model's own where the number
    of positions is the same, else a square. An image checkpoint has no temporal embedding; the model's own stays, as
    VideoMamba does. Patch weights and stem are adapted to other channels; the model's own stem stays, which is logged,
    where the checkpoint has none for its single channel, and there is none in a model of a single channel.

    A folded model folds a checkpoint that isn't.

    Raises:
        ValueError: positions of a grid that is neither known nor square; a folded checkpoint for an unfolded model.
    """
    out = from_videomamba(state_dict)
    own = model.state_dict()
    unfolded = "blocks.0.mixer.pw.weight"
    if model.folded:
        out = fold_weights(out)
    elif unfolded in own and "blocks.0.mixer.in_proj.bias" in out and unfolded not in out:
        raise ValueError("the checkpoint is of a folded model; create the model with folded=True")
    key = "patch_embed.proj.weight"
    if key in out:
        source_chans = out[key].shape[1]
        out[key] = adapt_in_chans(out[key], model.in_chans)
        if source_chans != model.in_chans:
            stem = {k: v for k, v in out.items() if k.startswith("stem.")}
            out = {k: v for k, v in out.items() if k not in stem}
            fresh = {k: v for k, v in own.items() if k.startswith("stem.")}
            if fresh and not stem:
                _logger.warning("the stem is fresh: the checkpoint has none, for its %d channel(s)", source_chans)
            out.update({k: adapt_stem(stem[k], model.in_chans) if k in stem else v for k, v in fresh.items()})
    if "pos_embed" in out:
        grid = _source_grid(out["pos_embed"].shape[1] - 1, model)
        out["pos_embed"] = resample_spatial(out["pos_embed"], grid, model.grid_size)
    if "temporal_pos_embedding" in out:
        out["temporal_pos_embedding"] = resample_temporal(out["temporal_pos_embedding"], model.num_frames)
    else:
        out["temporal_pos_embedding"] = own["temporal_pos_embedding"]
    return out


def _source_grid(positions: int, model) -> tuple[int, int]:
    """The (height, width) in patches that a checkpoint with so many positions was made for."""
    size = getattr(model, "pretrained_model_args", {}).get("img_size")  # timm's, from config.json
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        grid = (height // model.patch_size, width // model.patch_size)
        if grid[0] * grid[1] == positions:
            return grid
    side = math.isqrt(positions)
    own = model.grid_size[0] * model.grid_size[1] == positions
    if own and model.grid_size != (side, side) and side * side == positions:
        _logger.warning("the checkpoint's %d positions are taken as a grid of %d×%d", positions, *model.grid_size)
    if own:
        return model.grid_size
    if side * side != positions:
        raise ValueError(
            f"the checkpoint has {positions} positions, no square, and doesn't tell its picture's size: create the "
            "model with the img_size it was trained at, load, and then call set_input_size"
        )
    return side, side
