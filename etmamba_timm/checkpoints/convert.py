"""From a checkpoint file of any origin to a folder in the Hub's layout.

report = convert_checkpoint("videomamba_m16_k400_f8_res224.pth", "folder", tag="videomamba_m.k400_f8")
print(report.text())
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from torch import Tensor

from .card import model_card
from .manifest import Checkpoint, find_checkpoint
from .read import CheckpointError, architecture_of, check_complete, nearest_variant, read_checkpoint, read_raw
from .remap import checkpoint_filter_fn, our_name, unwrap
from .save import save_checkpoint

POSITIONS = ("pos_embed", "temporal_pos_embedding")


@dataclass
class KeyReport:
    """What became of every tensor; but for `unused`, which has the file's names, by our names.

    Attributes:
        architecture: the model's registered name.
        loaded: taken as they are.
        converted: renamed, inflated or adapted to other channels.
        resampled: position embeddings made for another size or number of frames.
        fresh: not in the file; they stay as the model is initialised.
        unused: in the file, and of no use.
    """

    architecture: str
    loaded: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Counts, and names where there are few."""
        lines = [f"architecture  {self.architecture}"]
        for kind in ("loaded", "converted", "resampled", "fresh", "unused"):
            keys = getattr(self, kind)
            names = ": " + ", ".join(keys) if 0 < len(keys) <= 8 else ""
            lines.append(f"{kind:14}{len(keys)}{names}")
        return "\n".join(lines)


def convert_checkpoint(
    source: str | Path,
    folder: str | Path,
    *,
    tag: str | None = None,
    num_frames: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    label_names: Sequence[str] | None = None,
    stride: int | None = None,
    licence: str | None = None,
) -> KeyReport:
    """Writes model.safetensors, config.json and README.md; the architecture is read off the file.

    Args:
        source: VideoMamba's .pth, a training checkpoint, or safetensors.
        folder: a path where nothing is yet, or an empty folder.
        tag: the manifest's name of this checkpoint; its class names, licence and figures are then written too.
        num_frames, img_size: what positions are resampled to; None leaves them. For a picture that is no square,
            img_size is also what they are read as.
        dtype: of the weights in the file; see `save_checkpoint`.
        label_names: the classes' names, in order.
        stride: frames from one of a clip to the next; 0 for spread over the whole video.
        licence: e.g. 'Apache-2.0'.

    Raises:
        CheckpointError: a file that is damaged, incomplete, not finite, or not what `tag` says.
        FileNotFoundError, FileExistsError: no file; a folder that isn't empty.
        ValueError: another number of label names than classes.
    """
    entry = _entry(tag)
    state_dict = read_checkpoint(source)
    architecture, arguments = describe(state_dict, source, img_size)
    if num_frames is not None:
        arguments["num_frames"] = num_frames
    if entry and (entry.architecture, entry.num_classes) != (architecture, arguments["num_classes"]):
        raise CheckpointError(
            f"{source} is {architecture} with {arguments['num_classes']} classes; {entry.name} is "
            f"{entry.architecture} with {entry.num_classes}: name another tag, or none"
        )
    model = timm.create_model(architecture, **arguments).eval()
    fitted = checkpoint_filter_fn(state_dict, model)
    check_complete(fitted, model)
    report = report_keys(architecture, read_raw(source), fitted)
    model.load_state_dict(fitted)
    clip = {"stride": stride or None} if stride is not None else {"stride": entry.stride} if entry else {}
    card = {"licence": licence or (entry.licence if entry else None), "source": _origin(source, entry)}
    if entry:
        card |= {"figures": entry.figures, "recipe": _recipe(entry)}
    params = sum(p.numel() for p in model.parameters())
    stored = str(dtype or torch.float32).removeprefix("torch.")
    save_checkpoint(
        model,
        folder,
        dtype=dtype,
        label_names=label_names or (entry.label_names(entry.config()) if entry else None),
        clip=clip,
        card={key: value for key, value in card.items() if value},
        readme=lambda config: model_card(tag or Path(folder).resolve().name, config, params, stored),
    )
    return report


def describe(
    state_dict: Mapping[str, Tensor], source: str | Path, img_size: int | tuple[int, int] | None = None
) -> tuple[str, dict]:
    """The registered name of the model that a state dict is of, and the constructor arguments it needs.

    Raises:
        CheckpointError: it's of none, or of a picture that is no square and `img_size` doesn't tell.
    """
    try:
        found = architecture_of(state_dict)
        positions = state_dict["pos_embed"].shape[1] - 1
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    variant, arguments = nearest_variant(found)
    head, times = state_dict.get("head.weight"), state_dict.get("temporal_pos_embedding")
    side = math.isqrt(positions)
    if img_size is None and side * side != positions:
        raise CheckpointError(
            f"{source} is made for a picture that is no square; tell its size, --img-size HEIGHT WIDTH"
        )
    arguments |= {key: found[key] for key in ("patch_size", "in_chans", "d_state", "expand", "d_conv")}
    if found["block"] != "bimamba" and "blocks.0.mixer.pw.weight" not in state_dict:
        arguments["folded"] = True
    arguments |= {
        "num_classes": 0 if head is None else len(head),
        "num_frames": 1 if times is None else times.shape[1],  # without times: an image model
        "img_size": side * found["patch_size"] if img_size is None else img_size,
    }
    return variant, arguments


def report_keys(architecture: str, raw: Mapping, fitted: Mapping[str, Tensor]) -> KeyReport:
    """Accounts for every key of a file (`raw`) and of the state dict that was made of it."""
    inner = unwrap(raw)
    report = KeyReport(architecture, unused=[key for key in raw if inner is not raw and not _wraps(raw[key], inner)])
    theirs = {our_name(key): key for key in inner}
    for key, value in fitted.items():
        if key not in theirs:
            report.fresh.append(key)
        elif inner[theirs[key]].shape != value.shape:
            (report.resampled if key in POSITIONS else report.converted).append(key)
        else:
            (report.loaded if theirs[key] == key else report.converted).append(key)
    report.unused += [name for key, name in theirs.items() if key not in fitted]
    return report


def _wraps(value: object, inner: Mapping) -> bool:
    """Whether the weights are this, within it, or, where each had a prefix, among them."""
    if isinstance(value, Tensor):
        return any(value is tensor for tensor in inner.values())
    return isinstance(value, Mapping) and (value is inner or any(_wraps(v, inner) for v in value.values()))


def _entry(tag: str | None) -> Checkpoint | None:
    if tag is None:
        return None
    entry = find_checkpoint(tag) if "." in tag else None
    if entry is None or entry.status == "warm start":
        raise ValueError(f"{tag!r} is no checkpoint of the manifest; `etmamba info MODEL` lists a model's tags")
    return entry


def _origin(source: str | Path, entry: Checkpoint | None) -> str:
    return f"{entry.source['repo']}, {entry.source['file']}" if entry and "repo" in entry.source else Path(source).name


def _recipe(entry: Checkpoint) -> dict:
    recipe = {"trained on": entry.trained_on, "started from": entry.started_from}
    return {key: value for key, value in recipe.items() if value}
