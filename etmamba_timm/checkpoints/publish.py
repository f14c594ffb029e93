"""A folder in the Hub's layout, checked and uploaded.

folder = check_folder("etmamba_ti.mocap")
print(folder.card("me/etmamba_ti.mocap"))
publish(folder, "me/etmamba_ti.mocap")
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open

from ..models import VARIANTS, EtMamba
from .card import model_card
from .manifest import CONFIG_FILE, WEIGHTS_FILE, read_config
from .read import UNREADABLE, first_line

FIGURE_KEYS = ("dataset", "metric", "value", "whose")


class FolderError(ValueError):
    """A folder that isn't fit to be published."""


class PublishError(RuntimeError):
    """The Hub didn't take it."""


@dataclass(frozen=True)
class HubFolder:
    """A folder that was checked.

    Attributes:
        path: where it is.
        config: what config.json is to say.
        params: the model's parameters, counted.
        dtype: that most of its weights are stored in.
        sha256, size: of model.safetensors, in hexadecimal digits and bytes.
        left_out: files in it that aren't published.
    """

    path: Path
    config: Mapping
    params: int
    dtype: str
    sha256: str
    size: int
    left_out: tuple[str, ...]

    def card(self, repo: str) -> str:
        """The model card, README.md."""
        return model_card(repo.rpartition("/")[2], self.config, self.params, self.dtype, f"hf-hub:{repo}")

    def manifest_entry(self, repo: str) -> dict:
        """What `weights/manifest.json` is to say of it once it's published."""
        clip, card = self.config.get("clip", {}), self.config.get("card", {})
        return {
            "architecture": self.config["architecture"],
            "status": "published",
            "source": {"repo": repo, "file": WEIGHTS_FILE},
            "sha256": self.sha256,
            "size": self.size,
            "licence": licence_of(self.config),
            "num_frames": clip["num_frames"],
            "img_size": self.config["pretrained_cfg"]["input_size"][1],
            "num_classes": self.config["num_classes"],
            "labels": CONFIG_FILE if self.config.get("label_names") else None,
            "stride": clip.get("stride"),
            "trained_on": None,
            "started_from": None,
            "figures": card.get("figures", []),
        }


def check_folder(path: str | Path, licence: str | None = None) -> HubFolder:
    """Loads the model of a folder as anyone would, and checks what its config.json says of it.

    Args:
        path: of the folder, which is left as it is.
        licence: instead of the one that config.json states, e.g. 'Apache-2.0'.

    Raises:
        FolderError: a file is missing or damaged, the architecture is unknown, weights don't fit or aren't finite,
            label names or frames disagree with the model, a figure doesn't say whose it is, or there is no licence.
    """
    path = Path(path)
    missing = [name for name in (WEIGHTS_FILE, CONFIG_FILE) if not (path / name).is_file()]
    if missing:
        raise FolderError(f"{path} has no {' and no '.join(missing)}; `etmamba convert` makes such a folder")
    try:
        config = read_config(path)
        if licence:
            config["card"] = config.get("card", {}) | {"licence": licence}
        architecture = config["architecture"]
        if architecture not in VARIANTS:
            raise FolderError(f"its architecture {architecture!r} is unknown; choose one of {', '.join(VARIANTS)}")
        model = timm.create_model(f"local-dir:{path}", pretrained=True)
    except FolderError as error:
        raise FolderError(f"{path}: {error}") from None
    except UNREADABLE as error:
        raise FolderError(f"{path} can't be loaded: {first_line(error)}") from error
    dtypes, classes = Counter(), 0
    with safe_open(path / WEIGHTS_FILE, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            stored = file.get_slice(key)
            dtypes[stored.get_dtype()] += math.prod(stored.get_shape())
            classes = stored.get_shape()[0] if key == "head.weight" else classes
    problems = _problems(config, model, classes)
    if problems:
        raise FolderError(f"{path}: " + "; ".join(problems))
    weights = (path / WEIGHTS_FILE).read_bytes()
    published = {WEIGHTS_FILE, CONFIG_FILE, "README.md"}
    return HubFolder(
        path,
        config,
        sum(p.numel() for p in model.parameters()),
        {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(*dtypes.most_common(1)[0][:1], "another dtype"),
        hashlib.sha256(weights).hexdigest(),
        len(weights),
        tuple(sorted(p.name for p in path.iterdir() if p.name not in published)),
    )


def _problems(config: Mapping, model: EtMamba, classes: int) -> list[str]:
    """What config.json says that doesn't hold, for weights of so many classes."""
    out = []
    said = {config.get("num_classes"), model.num_classes} - {classes}
    if said:
        out.append(f"config.json says {said.pop()} classes, the weights have {classes}")
    names, clip, card = config.get("label_names"), config.get("clip", {}), config.get("card", {})
    if names and len(names) != model.num_classes:
        out.append(f"there are {len(names)} label names for {model.num_classes} classes")
    if clip.get("num_frames") != model.num_frames:
        out.append(f"the block 'clip' says {clip.get('num_frames')} frames, the model is made for {model.num_frames}")
    if not licence_of(config):
        out.append("no licence is stated; give one (--licence Apache-2.0)")
    for figure in card.get("figures", []):
        lacking = [key for key in FIGURE_KEYS if figure.get(key) in (None, "")]
        if lacking:
            out.append(f"a figure doesn't tell its {' and '.join(lacking)}: {figure}")
    return out


def licence_of(config: Mapping) -> str | None:
    """The licence that a config.json states."""
    return config.get("card", {}).get("licence") or config["pretrained_cfg"].get("license")


def publish(folder: HubFolder, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads model.safetensors, config.json and a new model card, in one commit; makes the repository if need be.

    Args:
        folder: from `check_folder`.
        repo: 'org/name'.
        private: whether a new repository is private.
        revision: a branch that is there, of a repository that is there; None for 'main'.

    Returns: the commit's address.

    Raises:
        ValueError: no such name of a repository is possible.
        PublishError: the Hub can't be reached, or refuses.
    """
    check_repo(repo)
    operations = [
        CommitOperationAdd(WEIGHTS_FILE, str(folder.path / WEIGHTS_FILE)),
        CommitOperationAdd(CONFIG_FILE, json.dumps(folder.config, indent=2, ensure_ascii=False).encode()),
        CommitOperationAdd("README.md", folder.card(repo).encode()),
    ]
    api = HfApi(library_name="etmamba_timm")
    message = f"{folder.config['architecture']}, {folder.params:,} parameters"
    try:
        if revision is None:  # a branch that is there is in a repository that is there
            api.create_repo(repo, private=private, exist_ok=True)
        return str(api.create_commit(repo, operations, commit_message=message, revision=revision).commit_url)
    except Exception as error:  # of requests or httpx, by huggingface_hub's version
        raise PublishError(
            f"{repo} can't be published on {constants.ENDPOINT} ({first_line(error)}). If it is for want of a login: "
            "`hf auth login` or HF_TOKEN, with a token that may write there"
        ) from error


def check_repo(repo: str) -> None:
    """Raises ValueError unless `repo` is a name 'org/name' that a repository can have."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is no name of a repository ({first_line(error)})") from None
    if repo.count("/") != 1:
        raise ValueError(f"{repo!r} is no name of a repository; give 'org/name'")
