"""The one reader of checkpoints: a file, a folder or a state dict becomes a `LoadedCheckpoint`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models._helpers import _torch_load
from torch import Tensor

from ..clip import Clip
from ..models import VARIANTS, EtMamba
from ..words import number_of
from .config import WEIGHTS_FILE, HubConfig, read_config
from .errors import CheckpointError, first_line
from .remap import PATCH, find_weights

BINARY_FILE = "pytorch_model.bin"  # timm's other name for the weights of a Hub folder
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
POSITIONS, TIMES, HEAD, POOL = "pos_embed", "temporal_pos_embedding", "head.weight", "attn_pool.latent"
MOTION = "motion.scale"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that was read and found whole, finite and one of this package's models.

    Attributes:
        source: where it came from, for messages.
        tensors: the state dict, by the names of this package.
        converted: names of those that had another name or form in the file.
        unused: names in the file that aren't the model's weights.
        variant: the registered name that fits best.
        architecture: the constructor arguments stem, block, embed_dim, depth, patch_size, in_chans, d_state, expand and
            d_conv.
        num_classes: of its classifier; 0 for none.
        clip: its frames (1 for an image model), and how far apart they are.
        grid: patches of its pictures (height, width); None where that isn't known.
        folded: whether its blocks are in their inference form.
        label_names: names of the classes; () if unknown.
        config: the config.json beside it; None without one.
    """

    source: str
    tensors: dict[str, Tensor]
    converted: frozenset[str]
    unused: tuple[str, ...]
    variant: str
    architecture: dict
    num_classes: int
    clip: Clip
    grid: tuple[int, int] | None
    folded: bool
    label_names: tuple[str, ...]
    config: HubConfig | None

    @property
    def positions(self) -> int:
        """Patches of a frame."""
        return self.tensors[POSITIONS].shape[1] - 1

    @property
    def has_pool(self) -> bool:
        """Whether there is an attention pooling, global_pool='map'."""
        return POOL in self.tensors

    @property
    def has_motion(self) -> bool:
        """Whether the weights are for motion instead of colours, motion=True."""
        return MOTION in self.tensors

    @property
    def name(self) -> str:
        """The variant, and the arguments in which the checkpoint differs from it."""
        return variant_of(self.architecture)


def read_checkpoint(source: "str | Path | Mapping | LoadedCheckpoint") -> LoadedCheckpoint:
    """Reads a checkpoint. No code in the file is run.

    Args:
        source: a safetensors file or one of `torch.save`, from this package or VideoMamba, with whatever wraps the
            weights; a folder in the Hub's layout; or a state dict. The config.json beside model.safetensors is heeded.

    Raises:
        FileNotFoundError: no such file, or a folder without weights.
        CheckpointError: it is damaged, holds code, no model of this package or more than one, lacks weights or has some
            that aren't finite, or its config.json is damaged or says something else than its weights.
    """
    if isinstance(source, LoadedCheckpoint):
        return source
    if isinstance(source, Mapping):
        return _describe(source, "the state dict", None)
    path = _weights_file(Path(source))
    beside = path.name in (WEIGHTS_FILE, BINARY_FILE)
    config = read_config(path.parent) if beside else None
    return _describe(_load(path), str(path), config)


def architecture_of(state_dict: Mapping[str, Tensor]) -> dict:
    """The constructor arguments that a state dict of this package's names tells: see `LoadedCheckpoint.architecture`.

    Raises:
        CheckpointError: it isn't the state dict of such a model.
    """
    blocks = {key.split(".")[1] for key in state_dict if key.startswith("blocks.")}
    try:
        patch, A_log = state_dict[PATCH], state_dict["blocks.0.mixer.A_log"]
        dim, inner = patch.shape[0], A_log.shape[0]
        two_ssms = "blocks.0.mixer.A_b_log" in state_dict
        conv = state_dict.get("blocks.0.mixer.conv1d.weight")
        return {
            "stem": "stfp" if any(key.startswith("stem.") for key in state_dict) else "none",
            "block": "bimamba" if two_ssms else "stcm" if "blocks.0.fusion.weight" in state_dict else "ebs",
            "embed_dim": dim,
            "depth": len(blocks),
            "patch_size": patch.shape[-1],
            "in_chans": patch.shape[1],
            "d_state": A_log.shape[1],
            "expand": inner // dim if two_ssms else 2 * inner // dim,
            "d_conv": 0 if conv is None else conv.shape[-1],
        }
    except (KeyError, IndexError, ZeroDivisionError) as error:
        names = ", ".join(sorted(state_dict)[:3]) or "none"
        raise CheckpointError(
            f"these are no weights of a model of this package, which has {PATCH} and blocks.0.mixer.A_log: "
            f"{number_of(len(state_dict), 'tensor')}, such as {names}"
        ) from error


def nearest_variant(architecture: Mapping) -> tuple[str, dict]:
    """The name in `VARIANTS` for an architecture, and the arguments of it in which that variant differs."""

    def matches(name: str) -> tuple[bool, ...]:
        return tuple(agrees(architecture, key, VARIANTS[name][key]) for key in ("block", "stem", "embed_dim", "depth"))

    name = max(VARIANTS, key=matches)
    return name, {k: architecture[k] for k, v in VARIANTS[name].items() if not agrees(architecture, k, v)}


def variant_of(architecture: Mapping) -> str:
    """'etmamba_ti embed_dim=96': the nearest variant, and what differs from it."""
    name, differing = nearest_variant(architecture)
    return " ".join([name, *(f"{key}={value!r}" for key, value in differing.items())])


def agrees(architecture: Mapping, key: str, value: object) -> bool:
    """Whether an architecture has this value; any stem agrees with a single channel, which has none."""
    return architecture[key] == value or (key == "stem" and architecture["in_chans"] == 1)


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such checkpoint")
        return path
    found = next((path / name for name in (WEIGHTS_FILE, BINARY_FILE) if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path} holds no {WEIGHTS_FILE}; name a file, or a folder that `etmamba convert` made")
    return found


def _load(path: Path) -> object:
    """The raw contents of a file, wrappers included."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            return _torch_load(str(path), mmap=True)
        except RuntimeError:  # an old file that can't be mapped, or one that can't be read at all
            return _torch_load(str(path))
    except Exception as error:  # a damaged file may raise anything
        raise CheckpointError(
            f"{path} can't be read as a checkpoint: it is damaged, no file of weights, or holds more than them "
            f"({first_line(error)}); fetch it again, or save the weights alone where it was made: "
            "torch.save(model.state_dict(), path)"
        ) from error


def _describe(raw: object, source: str, config: HubConfig | None) -> LoadedCheckpoint:
    found = find_weights(raw, source)
    weights = found.tensors
    try:
        architecture = architecture_of(weights)
        head, times = weights.get(HEAD), weights.get(TIMES)
        num_classes, num_frames = 0 if head is None else len(head), 1 if times is None else times.shape[1]
        folded = architecture["block"] != "bimamba" and "blocks.0.mixer.pw.weight" not in weights
        _check_complete(weights, architecture, num_classes, num_frames, folded)
    except (LookupError, TypeError, ValueError) as error:  # of shapes that no model has
        raise CheckpointError(f"{source}: {error}") from error
    if odd := [key for key, v in weights.items() if v.layout != torch.strided or v.is_meta or v.dtype not in DTYPES]:
        kind = "meta" if weights[odd[0]].is_meta else f"{weights[odd[0]].layout}, {weights[odd[0]].dtype}"
        raise CheckpointError(
            f"{source}: {number_of(len(odd), 'weight')} can't be used, the first is {odd[0]} ({kind}); save "
            "them as dense float32, bfloat16 or float16"
        )
    if broken := [key for key, value in weights.items() if not value.isfinite().all()]:
        raise CheckpointError(
            f"{source} isn't finite: NaN or infinity in {number_of(len(broken), 'weight')}, the first is "
            f"{broken[0]}; its training went wrong, take an earlier one"
        )
    clip, grid = Clip(num_frames), None
    variant = nearest_variant(architecture)[0]
    if config is not None:
        facts = architecture | {"folded": folded, "num_frames": num_frames, "num_classes": num_classes}
        facts["motion"] = MOTION in weights
        if POOL in weights or config.model_args.get("global_pool") == "map":
            facts["global_pool"] = "map" if POOL in weights else "token"
        _check_config(config, facts)
        variant = config.architecture
        clip = config.clip or clip
        grid = _stated_grid(config, weights[POSITIONS].shape[1] - 1, architecture["patch_size"])
    return LoadedCheckpoint(
        source,
        weights,
        found.converted,
        found.unused,
        variant,
        architecture,
        num_classes,
        clip,
        grid,
        folded,
        config.label_names if config else (),
        config,
    )


def _check_complete(
    weights: Mapping[str, Tensor], architecture: dict, num_classes: int, num_frames: int, folded: bool
) -> None:
    """Raises CheckpointError unless the weights are, by name and shape, those of a model of these arguments."""
    patch, positions = architecture["patch_size"], weights[POSITIONS].shape[1] - 1
    if positions < 1 or weights[PATCH].ndim != 5:
        raise CheckpointError(f"{POSITIONS} {tuple(weights[POSITIONS].shape)}, {PATCH} {tuple(weights[PATCH].shape)}")
    size = (patch, positions * patch)  # any grid of so many patches has the same shapes
    one_block = architecture | {"depth": 1}  # the others have the same shapes
    one_block |= {"global_pool": "map" if POOL in weights else "token", "motion": MOTION in weights}
    model = EtMamba(size, num_frames, num_classes=num_classes, folded=folded, device="meta", **one_block)
    wanted = {
        key.replace("blocks.0.", f"blocks.{i}."): tuple(value.shape)
        for key, value in model.state_dict().items()
        for i in range(architecture["depth"] if key.startswith("blocks.0.") else 1)
    }
    came = {key: tuple(value.shape) for key, value in weights.items()}
    if TIMES not in came:
        del wanted[TIMES]  # an image model
    for problem, keys in (
        ("lacks", sorted(wanted.keys() - came.keys())),
        (f"has more than {variant_of(architecture)}:", sorted(came.keys() - wanted.keys())),
        (
            "has other shapes:",
            sorted(f"{k} {came[k]}, not {wanted[k]}" for k in wanted.keys() & came.keys() if wanted[k] != came[k]),
        ),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            adapters = any("lora_" in key for key in came)
            remedy = "; merge the LoRA adapters first, model.merge_and_unload(), and save that" if adapters else ""
            raise CheckpointError(f"the checkpoint {problem} {', '.join(keys[:3])}{more}{remedy}")


def _stated_grid(config: HubConfig, positions: int, patch: int) -> tuple[int, int] | None:
    """The patches (height, width) of the picture that config.json states; None if it states none of so many."""
    size = config.model_args.get("img_size") or config.data_cfg.get("input_size", (0, 0, 0))[1:]
    height, width = (size, size) if isinstance(size, int) else size
    if (height // patch) * (width // patch) == positions:
        return height // patch, width // patch
    if "img_size" in config.model_args:
        raise CheckpointError(
            f"{config.path}: model_args.img_size is {size!r}, {height // patch}×{width // patch} patches, but the "
            f"weights have positions for {positions}"
        )
    return None


def _check_config(config: HubConfig, facts: dict[str, Any]) -> None:
    """Raises CheckpointError if config.json says something else than the weights."""
    for key, value in (VARIANTS[config.architecture] | config.model_args).items():
        if key not in facts or (key in VARIANTS[config.architecture] and agrees(facts, key, value)):
            continue
        if facts[key] != value:
            said = f"model_args.{key}" if key in config.model_args else f"architecture {config.architecture!r}, {key}"
            raise CheckpointError(f"{config.path}: {said} is {value!r}, but the weights have {facts[key]!r}")
    classes, frames = facts["num_classes"], facts["num_frames"]
    for stated, what, there in (
        (config.num_classes, "class", classes),
        (len(config.label_names) or classes, "label name", classes),
        (config.clip.num_frames if config.clip else frames, "frame", frames),
    ):
        if stated != there:
            raise CheckpointError(f"{config.path} says {number_of(stated, what)}, but the weights have {there}")
