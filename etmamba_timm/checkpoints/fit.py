"""A loaded checkpoint and the model it goes into: which arguments build the model, and weights made to fit it."""

import inspect
import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..layers import fold_weights, resample_spatial, resample_temporal
from ..layers.motion import SCALE
from ..models import VARIANTS, EtMamba
from ..words import number_of
from .errors import CheckpointError
from .read import MOTION, POSITIONS, TIMES, LoadedCheckpoint, architecture_of, nearest_variant, variant_of
from .remap import PATCH

_logger = logging.getLogger(__name__)


def arguments_for(checkpoint: LoadedCheckpoint, variant: str, given: Mapping) -> dict:
    """Constructor arguments of the model of this variant that takes a checkpoint: the checkpoint's, but for `given`.

    Classes, frames, channels and picture size may be given otherwise: the weights are then made to fit (see `fit`). A
    checkpoint of another width or depth than the variant's is taken as it is, unless it is that of another variant.

    Args:
        checkpoint: the weights.
        variant: the registered name that was asked for.
        given: constructor arguments that the caller gives.

    Raises:
        CheckpointError: the checkpoint is of another variant, or disagrees with `given` where it can't be made to fit.
    """
    found = checkpoint.architecture
    stated = checkpoint.config.model_args if checkpoint.config else {}
    row = VARIANTS[variant]
    fixed = row if checkpoint.variant != variant else {key: row[key] for key in ("stem", "block")}
    asked = {key: value for key, value in (stated | dict(given)).items() if key in found}
    _check_same(checkpoint, found | fixed | asked)
    usual = {name: parameter.default for name, parameter in inspect.signature(EtMamba).parameters.items()} | row
    out = stated | {key: value for key, value in found.items() if value != usual[key] or key == "in_chans"}
    out |= {"num_classes": checkpoint.num_classes, "num_frames": checkpoint.clip.num_frames}
    if found["in_chans"] == 1:
        out.pop("stem", None)  # a single channel has none, whatever is asked for
    if "img_size" not in given:
        height, width = _grid(checkpoint, None)
        out["img_size"] = (height * found["patch_size"], width * found["patch_size"])
    if checkpoint.folded:
        out["folded"] = True
    if checkpoint.has_pool:
        out["global_pool"] = "map"
    if checkpoint.has_motion:
        out["motion"] = True
    return {key: value for key, value in out.items() if key not in given}


def fit(checkpoint: LoadedCheckpoint, model: EtMamba) -> dict[str, Tensor]:
    """The state dict for `model.load_state_dict`: the checkpoint's weights, made to fit.

    Positions are resampled to the model's pictures and frames; an image checkpoint has no temporal ones, so the
    model's own stay, as in VideoMamba. Patch weight and stem are adapted to other channels. A folded model folds a
    checkpoint that isn't. A classifier for another number of classes is left out, and so is a stem that one side lacks
    for its single channel, and an attention pooling that one side lacks; the model's own stay, which is logged. So is
    it if weights for colours go into a model that sees motion, or the other way round.

    The picture that positions are resampled from is the one the checkpoint states, else the model's own where the
    number of positions is the same, else a square.

    Raises:
        CheckpointError: weights of another architecture; a folded checkpoint for an unfolded model; positions of a grid
            that is neither known nor square.
    """
    own = model.state_dict()
    wanted = architecture_of(own)
    _check_same(checkpoint, wanted | {"in_chans": model.in_chans})
    out = dict(checkpoint.tensors)
    if model.folded:
        out = fold_weights(out)
    elif checkpoint.folded:
        raise CheckpointError(f"{checkpoint.source} is folded; create the model with folded=True")
    source_chans = checkpoint.architecture["in_chans"]
    out[PATCH] = adapt_in_chans(out[PATCH], model.in_chans)
    if source_chans != model.in_chans:
        stem = {k: out.pop(k) for k in list(out) if k.startswith("stem.")}
        fresh = {k: v for k, v in own.items() if k.startswith("stem.")}
        if fresh and not stem:
            _logger.warning(
                "the stem is fresh: the checkpoint has none, for its %s", number_of(source_chans, "channel")
            )
        out |= {k: adapt_stem(stem[k], model.in_chans) if k in stem else v for k, v in fresh.items()}
    out[POSITIONS] = resample_spatial(out[POSITIONS], _grid(checkpoint, model.grid_size), model.grid_size)
    out[TIMES] = resample_temporal(out[TIMES], model.num_frames) if TIMES in out else own[TIMES]
    if checkpoint.num_classes != model.num_classes:
        out = {k: v for k, v in out.items() if not k.startswith("head.")}
        out |= {k: v for k, v in own.items() if k.startswith("head.")}
        if model.num_classes:
            _logger.warning(
                "the classifier is fresh: the checkpoint has %s, the model %d",
                *(number_of(checkpoint.num_classes, "class"), model.num_classes),
            )
    pool = {k: v for k, v in own.items() if k.startswith("attn_pool.")}
    if pool and not checkpoint.has_pool:
        out |= pool
        _logger.warning("the attention pooling is fresh: the checkpoint has none")
    elif checkpoint.has_pool and not pool:
        _logger.warning("the checkpoint's attention pooling is left out: global_pool is %r", model.global_pool)
    if checkpoint.has_motion != (MOTION in own):
        out |= {MOTION: torch.tensor(SCALE)}
        words = ("motion", "colours") if checkpoint.has_motion else ("colours", "motion")
        _logger.warning("the weights are for %s, the model sees %s: it has to be trained before use", *words)
    return {key: out[key] for key in own}


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


def _check_same(checkpoint: LoadedCheckpoint, wanted: Mapping) -> None:
    """Raises CheckpointError unless the checkpoint is of the architecture `wanted`, but for its channels."""
    found = checkpoint.architecture
    any_stem = 1 in (found["in_chans"], wanted["in_chans"])
    ignored = {"in_chans", "stem"} if any_stem else {"in_chans"}
    differing = [key for key in found if found[key] != wanted[key] and key not in ignored]
    if not differing:
        return
    words = ", ".join(f"{key} is {found[key]}, not {wanted[key]}" for key in differing)
    variant = nearest_variant(found)[0]
    same = variant == nearest_variant(wanted)[0]
    values = ", ".join(f"{key}={found[key]!r}" for key in differing)
    remedy = f"build the model with {values}" if same else f"name the model {variant}"
    if found["block"] == "bimamba" and wanted["block"] == "stcm":
        remedy += ", or name a tag that starts from it (etmamba_m.videomamba_in1k)"
    raise CheckpointError(
        f"{checkpoint.source} looks like {variant_of(found)}, not like {variant_of(wanted)} ({words}): {remedy}"
    )


def _grid(checkpoint: LoadedCheckpoint, own: tuple[int, int] | None) -> tuple[int, int]:
    """The patches (height, width) that a checkpoint's positions stand for; `own` is the model's grid."""
    if checkpoint.grid is not None:
        return checkpoint.grid
    positions = checkpoint.positions
    side = math.isqrt(positions)
    is_square = side * side == positions
    if own is not None and own[0] * own[1] == positions:
        if is_square and own != (side, side):
            _logger.warning("the checkpoint's %s are taken as a grid of %d×%d", number_of(positions, "position"), *own)
        return own
    if not is_square:
        raise CheckpointError(
            f"{checkpoint.source} is made for a picture of {positions} patches, which is no square, and doesn't state "
            "its size: write a folder that does by `etmamba convert FILE FOLDER --img-size HEIGHT WIDTH`, or give "
            "img_size=(height, width)"
        )
    return side, side
