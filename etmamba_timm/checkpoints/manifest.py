"""The checkpoints in `weights/manifest.json`. The zoo reads them from there, so adding weights is adding data."""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ..clip import Stride
from .config import CONFIG_FILE, WEIGHTS_FILE, HubConfig, read_config

PACKAGE = Path(__file__).parents[1]
STATUSES = ("published", "local", "warm start")


@dataclass(frozen=True)
class Checkpoint:
    """An entry of the manifest.

    Attributes:
        name: architecture and tag, 'videomamba_m.k400_f8'.
        architecture: the registered name of the model.
        status: 'published' on the Hub, 'local' (a folder in `weights/`), or 'warm start': weights of another
            architecture that a fresh model starts from, and no classifier.
        source: {"repo", "file"} and perhaps "revision" on the Hub, or {"folder"} in `weights/`.
        sha256, size: of the file, in hexadecimal digits and bytes; None if unknown.
        licence: in words.
        num_frames: of the clips it was trained on; 1 for images.
        img_size: their height and width, in pixels.
        num_classes: of its classifier; None if it has none.
        labels: where its class names are: a key of `LABELS`, or 'config.json' beside its weights; None if unknown.
        stride: frames from one of a clip to the next, or 'spread'; see `Clip`.
        trained_on, started_from: the dataset, and the weights that training started from.
        figures: [{"dataset", "metric", "value", "views", "whose"}], views {"frames", "crops", "clips"} or None.
        note: anything else worth knowing.
    """

    name: str
    architecture: str
    status: str
    source: dict
    sha256: str | None
    size: int | None
    licence: str
    num_frames: int
    img_size: int
    num_classes: int | None
    labels: str | None
    stride: Stride
    trained_on: str | None
    started_from: str | None
    figures: list = field(default_factory=list)
    note: str | None = None

    @property
    def folder(self) -> Path | None:
        """The folder of a local checkpoint in `weights/`; None for others."""
        return weights_folder() / self.source["folder"] if "folder" in self.source else None

    @property
    def is_classifier(self) -> bool:
        """Whether it classifies; a warm start doesn't."""
        return self.status != "warm start" and bool(self.num_classes)

    def config(self) -> HubConfig | None:
        """The config.json of a local checkpoint; None if it is missing, or the checkpoint is on the Hub."""
        return read_config(self.folder) if self.folder else None

    def model_args(self, config: HubConfig | None) -> dict:
        """Constructor arguments beyond its architecture's; `config` is its config.json."""
        return {"num_frames": self.num_frames, "img_size": self.img_size} | (config.model_args if config else {})

    def label_names(self, config: HubConfig | None) -> tuple[str, ...] | None:
        """Its class names, in order; `config` is its config.json."""
        if self.labels == CONFIG_FILE:
            return config.label_names if config else None
        return label_names(self.labels)

    def cfg(self) -> dict:
        """The fields of timm's PretrainedCfg. Without a source, timm doesn't list it as pretrained."""
        cfg: dict = {"license": self.licence, "input_size": (3, self.img_size, self.img_size)}
        if self.is_classifier:
            cfg["num_classes"] = self.num_classes
        if self.folder is None:
            revision = self.source.get("revision")
            cfg["hf_hub_id"] = self.source["repo"] + (f"@{revision}" if revision else "")
            cfg["hf_hub_filename"] = self.source["file"]
        else:
            config = self.config()
            cfg |= config.data_cfg if config else {}
            if (self.folder / WEIGHTS_FILE).is_file():
                cfg["file"] = str(self.folder / WEIGHTS_FILE)
        return cfg


def weights_folder() -> Path:
    """The folder `weights/`: inside an installed package, beside it in a clone.

    Raises:
        RuntimeError: it is in neither place.
    """
    for folder in (PACKAGE / "weights", PACKAGE.parent / "weights"):
        if (folder / "manifest.json").is_file():
            return folder
    raise RuntimeError(f"weights/manifest.json is neither in {PACKAGE} nor beside it; install the package again")


def sample_video() -> Path:
    """A video that the shipped checkpoint wasn't trained on, named after its action.

    Raises:
        RuntimeError: it is missing.
    """
    sample = next(weights_folder().glob("sample_*.mp4"), None)
    if sample is None:
        raise RuntimeError(f"no sample in {weights_folder()}; reinstall etmamba-timm, or give a video file")
    return sample


@cache
def manifest() -> dict[str, Checkpoint]:
    """The checkpoints by name; the first one of an architecture is its default."""
    entries = json.loads((weights_folder() / "manifest.json").read_text(encoding="utf-8"))
    return {name: Checkpoint(name, **entry) for name, entry in entries.items()}


def find_checkpoint(name: str) -> Checkpoint | None:
    """The checkpoint of a name with a tag, or the default one of a name without a tag; None if there is none."""
    if "." in name:
        return manifest().get(name)
    return next((entry for entry in manifest().values() if entry.architecture == name), None)


def unknown_tag(variant: str, tag: str) -> str:
    """What to say of a tag that the manifest doesn't have."""
    tags = [name.partition(".")[2] for name, entry in manifest().items() if entry.architecture == variant]
    return f"{variant} has no tag {tag!r}; " + (f"choose one of {', '.join(tags)}" if tags else "it has none: omit it")


def label_names(labels: str | None) -> tuple[str, ...] | None:
    """The class names of a dataset in `LABELS`, which torchvision carries; None for None."""
    return None if labels is None else tuple(LABELS[labels]())


def _kinetics400() -> list[str]:
    from torchvision.models.video import R3D_18_Weights

    return R3D_18_Weights.KINETICS400_V1.meta["categories"]


def _imagenet1k() -> list[str]:
    from torchvision.models import ResNet18_Weights

    return ResNet18_Weights.IMAGENET1K_V1.meta["categories"]


LABELS = {"kinetics400": _kinetics400, "imagenet1k": _imagenet1k}
