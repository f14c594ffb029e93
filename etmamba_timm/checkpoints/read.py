"""Checkpoint files: read without running anything in them, recognised, and checked against a model."""

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models._helpers import _torch_load
from torch import Tensor, nn

from ..models.variants import VARIANTS
from .remap import checkpoint_filter_fn, from_videomamba

_logger = logging.getLogger(__name__)

# What reading a file of any content may raise.
UNREADABLE = (
    *(OSError, EOFError, LookupError, AttributeError, TypeError, ValueError, RuntimeError),
    *(pickle.UnpicklingError, SafetensorError),
)


class CheckpointError(ValueError):
    """A checkpoint that can't be read, or isn't one of the model that it is loaded into."""


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a .pth, under our names and without what wraps them. No code is run.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a damaged file, one with more in it than weights, or with other things than named tensors.
    """
    raw = read_raw(path)
    try:
        state_dict = from_videomamba(raw)
    except UNREADABLE as error:
        raise _damaged(path, error) from error
    _check_tensors(state_dict, path)
    return state_dict


def read_raw(path: str | Path) -> Mapping:
    """What stands in the file, with all that wraps the weights. Raises as `read_checkpoint`, but for other things."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        return load_file(path) if is_safetensors(path) else _load_pickle(path)
    except UNREADABLE as error:
        raise _damaged(path, error) from error


def check_readable(path: str | Path) -> None:
    """Raises what `read_checkpoint` raises; of a safetensors file it reads no more than the header."""
    if not (Path(path).exists() and is_safetensors(path)):
        read_checkpoint(path)
        return
    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except UNREADABLE as error:
        raise _damaged(path, error) from error


def is_safetensors(path: str | Path) -> bool:
    """Whether a file's name says that it is one of safetensors, which can hold nothing but tensors."""
    return str(path).endswith(".safetensors")


def _load_pickle(path: str | Path) -> Mapping:
    """What `torch.save` wrote, weights only; mapped rather than read where the format allows."""
    try:
        return _torch_load(str(path), mmap=True)
    except RuntimeError:  # an old file, that can't be mapped, or one that can't be read at all
        return _torch_load(str(path))


def architecture_of(state_dict: Mapping[str, Tensor]) -> dict:
    """Constructor arguments of the model that a state dict (under our names) is of.

    Raises:
        CheckpointError: it's the state dict of none.
    """
    blocks = {key.split(".")[1] for key in state_dict if key.startswith("blocks.")}
    try:
        patch = state_dict["patch_embed.proj.weight"]
        A_log = state_dict["blocks.0.mixer.A_log"]
        dim = patch.shape[0]
        both = "blocks.0.mixer.A_b_log" in state_dict
        conv = state_dict.get("blocks.0.mixer.conv1d.weight")
        return {
            "stem": "stfp" if any(key.startswith("stem.") for key in state_dict) else "none",
            "block": "bimamba" if both else "stcm" if "blocks.0.fusion.weight" in state_dict else "ebs",
            "embed_dim": dim,
            "depth": len(blocks),
            "patch_size": patch.shape[-1],
            "in_chans": patch.shape[1],
            "d_state": A_log.shape[1],
            "expand": A_log.shape[0] // dim if both else 2 * A_log.shape[0] // dim,
            "d_conv": 0 if conv is None else conv.shape[-1],
        }
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"no weights of a model of this package: {len(state_dict)} tensors, such as "
            f"{', '.join(sorted(state_dict)[:3]) or 'none'}"
        ) from error


def nearest_variant(arguments: Mapping) -> tuple[str, dict]:
    """The name in `VARIANTS` for these constructor arguments, and those of them in which that variant differs."""

    def matches(name: str) -> tuple[bool, ...]:
        return tuple(_agrees(arguments, key, VARIANTS[name][key]) for key in ("block", "stem", "embed_dim", "depth"))

    name = max(VARIANTS, key=matches)
    return name, {k: arguments[k] for k, v in VARIANTS[name].items() if not _agrees(arguments, k, v)}


def _agrees(arguments: Mapping, key: str, value) -> bool:
    return arguments[key] == value or (key == "stem" and arguments["in_chans"] == 1)  # one channel has no stem


def variant_of(arguments: Mapping) -> str:
    """What a model of these constructor arguments is called, with those that differ from the variant's."""
    name, differing = nearest_variant(arguments)
    return " ".join([name, *(f"{key}={value!r}" for key, value in differing.items())])


def fit_checkpoint(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """`checkpoint_filter_fn`, with a check that all weights are there, finite, and of this model; the timm hook.

    The classifier may be another: timm then leaves the model's own, which is logged.

    Raises:
        CheckpointError: weights of another variant, missing or too many ones, not finite ones, other classes.
    """
    state_dict = from_videomamba(state_dict)
    _check_tensors(state_dict, "the checkpoint")
    came, wanted = architecture_of(state_dict), architecture_of(model.state_dict())
    ignored = {"in_chans"} | ({"stem"} if 1 in (came["in_chans"], wanted["in_chans"]) else set())
    differing = [key for key in wanted if came[key] != wanted[key] and key not in ignored]
    if differing:
        words = ", ".join(f"{key} is {came[key]}, not {wanted[key]}" for key in differing)
        remedy = "create that model"
        if came["block"] == "bimamba" and wanted["block"] == "stcm":
            remedy += ", or name a tag that starts from it (etmamba_m.videomamba_in1k)"
        raise CheckpointError(
            f"the checkpoint looks like {variant_of(came)}, not like {variant_of(wanted)} ({words}): {remedy}"
        )
    out = checkpoint_filter_fn(state_dict, model)
    check_complete(out, model)
    _fit_classes(out, model)
    return out


def check_complete(state_dict: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raises CheckpointError unless the weights, the classifier's aside, are the model's own by name and shape."""
    own = {key: value.shape for key, value in model.state_dict().items() if not key.startswith("head.")}
    came = {key: value.shape for key, value in state_dict.items() if not key.startswith("head.")}
    for problem, keys in (
        ("lacks", sorted(own.keys() - came.keys())),
        ("has more than the model:", sorted(came.keys() - own.keys())),
        ("has other shapes:", sorted(key for key in own.keys() & came.keys() if own[key] != came[key])),
    ):
        if keys:
            more = f" and {len(keys) - 3} others" if len(keys) > 3 else ""
            raise CheckpointError(f"the checkpoint {problem} {', '.join(keys[:3])}{more}")
    broken = [key for key, value in state_dict.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"the checkpoint isn't finite: {len(broken)} weights hold NaN or infinity, the first is {broken[0]}; "
            "its training went wrong, take an earlier one"
        )


def _fit_classes(state_dict: dict[str, Tensor], model: nn.Module) -> None:
    """Sees to it that timm, which goes by the cfg's number of classes, loads the classifier if it fits."""
    head = state_dict.get("head.weight")
    came, wanted = 0 if head is None else len(head), model.num_classes
    cfg = model.pretrained_cfg  # the very dict that timm's loader goes by
    if came == wanted:
        cfg["num_classes"] = came
    elif cfg["num_classes"] == wanted:
        raise CheckpointError(
            f"the checkpoint has {came or 'no'} classes, not {wanted}: say so with "
            f"pretrained_cfg_overlay=dict(num_classes={came}), and num_classes={wanted} for a fresh classifier"
        )
    elif wanted:
        _logger.warning("the classifier is fresh: the checkpoint has %d classes, the model %d", came, wanted)


def _check_tensors(state_dict: Mapping, path: str | Path) -> None:
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state_dict.items()):
        raise CheckpointError(f"{path} is no checkpoint: it holds other things than named tensors")


def _damaged(path: str | Path, error: Exception) -> CheckpointError:
    reason = "it is damaged, no file of weights, or holds more than them"
    return CheckpointError(
        f"{path} can't be read as a checkpoint: {reason} ({first_line(error)}); fetch it again, or save the weights "
        "alone where it was made: torch.save(model.state_dict(), path)"
    )


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
