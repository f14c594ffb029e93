"""A folder in the Hub's layout, checked and uploaded.

folder = check_folder("etmamba_ti.mocap")
print(folder.card("me/etmamba_ti.mocap"))
publish(folder, "me/etmamba_ti.mocap")
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..clip import Clip
from ..models import EtMamba
from .card import model_card
from .config import CONFIG_FILE, MODEL_TYPE, PROCESSOR, PROCESSOR_FILE, WEIGHTS_FILE, HubConfig
from .errors import CheckpointError, first_line
from .fetch import sha256_of
from .read import read_checkpoint


class PublishError(RuntimeError):
    """The Hub refused the upload, or can't be reached."""


@dataclass(frozen=True)
class HubFolder:
    """A folder that passed the check.

    Attributes:
        path: the folder.
        config: the contents of config.json to publish.
        img_size: height and width of the model's pictures, in pixels.
        params: number of the model's parameters.
        dtype: the dtype that most weights are stored in.
        sha256, size: of model.safetensors, in hexadecimal digits and bytes.
        left_out: files in the folder that aren't published.
    """

    path: Path
    config: Mapping
    img_size: tuple[int, int]
    params: int
    dtype: str
    sha256: str
    size: int
    left_out: tuple[str, ...]

    def card(self, repo: str) -> str:
        """The model card, README.md."""
        return model_card(repo.rpartition("/")[2], self.config, self.params, self.dtype, f"hf-hub:{repo}")

    def manifest_entry(self, repo: str) -> dict:
        """Its entry in `weights/manifest.json` once it is published."""
        clip, card = Clip.from_config(self.config["clip"]), self.config["card"]
        return {
            "architecture": self.config["architecture"],
            "status": "published",
            "source": {"repo": repo, "file": WEIGHTS_FILE},
            "sha256": self.sha256,
            "size": self.size,
            "licence": card.get("licence") or self.config["pretrained_cfg"].get("license"),
            "num_frames": clip.num_frames,
            "img_size": self.img_size[0],
            "num_classes": self.config["num_classes"],
            "labels": CONFIG_FILE if self.config.get("label_names") else None,
            "stride": clip.stride,
            "trained_on": None,
            "started_from": None,
            "figures": card.get("figures") or [],
        }


def check_folder(path: str | Path, licence: str | None = None) -> HubFolder:
    """Loads a folder's model as any user would, and checks its config.json.

    Args:
        path: the folder; it isn't changed.
        licence: replaces the one in config.json, e.g. 'Apache-2.0'.

    Raises:
        CheckpointError: as `read_checkpoint`; also a file that is missing, or clips or a licence that aren't stated.
    """
    path = Path(path)
    missing = [name for name in (WEIGHTS_FILE, CONFIG_FILE) if not (path / name).is_file()]
    if missing:
        raise CheckpointError(f"{path} has no {' and no '.join(missing)}; `etmamba convert` makes such a folder")
    checkpoint = read_checkpoint(path)
    assert checkpoint.config is not None  # the file is there
    if problems := _problems(checkpoint.config, licence):
        raise CheckpointError(f"{checkpoint.config.path}: " + "; ".join(problems))
    stated = checkpoint.config.raw
    model = timm.create_model(
        stated["architecture"], pretrained=True, pretrained_cfg_overlay={"state_dict": checkpoint}
    )
    assert isinstance(model, EtMamba)
    card = checkpoint.config.card | ({"licence": licence} if licence else {})
    dtypes: Counter[torch.dtype] = Counter()
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.dtype] += tensor.numel()
    published = {WEIGHTS_FILE, CONFIG_FILE, PROCESSOR_FILE, "README.md"}
    return HubFolder(
        path,
        {**stated, "model_type": MODEL_TYPE, "num_classes": checkpoint.num_classes, "card": card},
        model.img_size,
        sum(dtypes.values()),
        str(dtypes.most_common(1)[0][0]).removeprefix("torch."),
        sha256_of(path / WEIGHTS_FILE),
        (path / WEIGHTS_FILE).stat().st_size,
        tuple(sorted(p.name for p in path.iterdir() if p.name not in published)),
    )


def _problems(config: HubConfig, licence: str | None) -> list[str]:
    """What a folder to be published lacks, beyond what every reader checks."""
    out = []
    if config.clip is None:
        out.append("there is no block 'clip'; it says how many frames the model takes, and how far apart")
    if not (licence or config.licence):
        out.append("no licence is stated; give one (--licence Apache-2.0)")
    return out


def publish(folder: HubFolder, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads model.safetensors, config.json and a new model card, in one commit; creates the repository if needed.

    Args:
        folder: from `check_folder`.
        repo: 'org/name'.
        private: whether a new repository is private.
        revision: an existing branch of an existing repository; None for 'main'.

    Returns: the commit's address.

    Raises:
        ValueError: `repo` can't be a repository's name.
        PublishError: the Hub can't be reached, or refuses.
    """
    check_repo(repo)
    operations = [
        CommitOperationAdd(WEIGHTS_FILE, str(folder.path / WEIGHTS_FILE)),
        CommitOperationAdd(CONFIG_FILE, json.dumps(folder.config, indent=2, ensure_ascii=False).encode()),
        CommitOperationAdd(PROCESSOR_FILE, PROCESSOR.encode()),
        CommitOperationAdd("README.md", folder.card(repo).encode()),
    ]
    api = HfApi(library_name="etmamba_timm")
    message = f"{folder.config['architecture']}, {folder.params:,} parameters"
    try:
        if revision is None:  # an existing branch means an existing repository
            api.create_repo(repo, private=private, exist_ok=True)
        return str(api.create_commit(repo, operations, commit_message=message, revision=revision).commit_url)
    except Exception as error:  # of requests or httpx, by huggingface_hub's version
        raise PublishError(
            f"{repo} can't be published on {constants.ENDPOINT} ({first_line(error)}). If you aren't logged in: "
            "`hf auth login` or HF_TOKEN, with a token that may write there"
        ) from error


def check_repo(repo: str) -> None:
    """Raises ValueError unless `repo` is a possible name 'org/name'."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} can't be a repository's name ({first_line(error)})") from None
    if repo.count("/") != 1:
        raise ValueError(f"{repo!r} can't be a repository's name; give 'org/name'")
