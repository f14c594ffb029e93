"""Converts a checkpoint of any origin to a folder in the Hub's layout.

report = convert_checkpoint("videomamba_m16_k400_f8_res224.pth", "folder", tag="videomamba_m.k400_f8")
print(report.text())
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from torch import Tensor

from ..clip import Stride
from ..models import EtMamba
from ..words import number_of
from .card import model_card
from .errors import CheckpointError
from .manifest import Checkpoint, find_checkpoint
from .read import POSITIONS, TIMES, LoadedCheckpoint, read_checkpoint
from .save import check_new_folder, save_checkpoint


@dataclass
class KeyReport:
    """What became of each tensor, by this package's names; `unused` has the file's.

    Attributes:
        architecture: the model's registered name.
        loaded: taken as they are.
        converted: renamed, inflated or adapted to other channels.
        resampled: position embeddings made for another size or number of frames.
        fresh: not in the file; they stay as the model is initialised.
        unused: everything else in the file.
    """

    architecture: str
    loaded: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Counts, with names where there are few."""
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
    stride: Stride = None,
    licence: str | None = None,
) -> KeyReport:
    """Writes model.safetensors, config.json and README.md; the architecture is read off the file.

    Args:
        source: what `read_checkpoint` takes: VideoMamba's .pth, a training checkpoint, safetensors, a folder.
        folder: a path that doesn't exist yet, or an empty folder.
        tag: this checkpoint's name in the manifest; its class names, licence and figures are then written too.
        num_frames, img_size: resample the positions to these; None keeps them. If the file was made for a picture that
            isn't square, img_size also says which.
        dtype: of the weights in the file; see `save_checkpoint`.
        label_names: the classes' names, in order.
        stride: frames from one of a clip to the next, or 'spread' over the whole video.
        licence: e.g. 'Apache-2.0'.

    Raises:
        CheckpointError: as `read_checkpoint`; or a checkpoint that isn't what `tag` says.
        FileNotFoundError, FileExistsError: no file; a folder that isn't empty.
        ValueError: another number of label names than classes.
    """
    check_new_folder(folder)
    entry = _entry(tag)
    checkpoint = read_checkpoint(source)
    if entry and (entry.architecture, entry.num_classes) != (checkpoint.variant, checkpoint.num_classes):
        raise CheckpointError(
            f"{source} is {checkpoint.variant} with {number_of(checkpoint.num_classes, 'class')}; {entry.name} is "
            f"{entry.architecture} with {entry.num_classes}: name another tag, or none"
        )
    model = timm.create_model(
        checkpoint.variant,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": checkpoint},
        num_frames=num_frames,
        img_size=img_size,
    )
    assert isinstance(model, EtMamba)
    report = report_keys(checkpoint, model.state_dict())
    names = entry.label_names(entry.config()) if entry else None
    config = checkpoint.config
    card = dict(config.card if config else {}) | {"source": _origin(source, entry)}
    card["licence"] = licence or (entry.licence if entry else config.licence if config else None)
    if entry:
        card |= {"figures": entry.figures, "recipe": _recipe(entry)}
    params = sum(p.numel() for p in model.parameters())
    stored = str(dtype or torch.float32).removeprefix("torch.")
    save_checkpoint(
        model,
        folder,
        dtype=dtype,
        label_names=label_names or names,
        stride=stride or checkpoint.clip.stride or (entry.stride if entry else None),
        card={key: value for key, value in card.items() if value},
        readme=lambda config: model_card(tag or Path(folder).resolve().name, config, params, stored),
    )
    return report


def report_keys(checkpoint: LoadedCheckpoint, loaded: Mapping[str, Tensor]) -> KeyReport:
    """Accounts for everything in a checkpoint, and everything in the state dict of the model it went into."""
    report = KeyReport(checkpoint.variant, unused=list(checkpoint.unused))
    for key, value in loaded.items():
        if key not in checkpoint.tensors:
            report.fresh.append(key)
        elif checkpoint.tensors[key].shape != value.shape:
            (report.resampled if key in (POSITIONS, TIMES) else report.converted).append(key)
        else:
            (report.converted if key in checkpoint.converted else report.loaded).append(key)
    report.unused += [key for key in checkpoint.tensors if key not in loaded]
    return report


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
