"""Where the weights of `pretrained=True` come from: found or fetched, verified, and read."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import EntryNotFoundError
from timm.models import PretrainedCfg
from timm.models._hub import download_cached_file
from torch import Tensor

from ..clip import Stride
from ..models import VARIANTS, EtMamba
from ..words import number_of
from .config import CONFIG_FILE, WEIGHTS_FILE, HubConfig, read_config
from .errors import CheckpointError, DownloadError, first_line
from .fit import arguments_for, fit
from .manifest import Checkpoint, find_checkpoint, manifest, unknown_tag
from .read import BINARY_FILE, LoadedCheckpoint, read_checkpoint
from .warm_start import size_for, warm_start

_logger = logging.getLogger(__name__)

SOURCE_KEYS = ("file", "state_dict", "url", "hf_hub_id", "hf_hub_filename", "source")  # of timm's cfg
TIMEOUT = 5  # seconds that the Hub has for its first answer


@dataclass(frozen=True)
class Pretrained:
    """What a call of an entry point loads, and how the model has to be built for it.

    Attributes:
        checkpoint: the weights; None where none are loaded.
        is_warm_start: whether they are VideoMamba's, from which another architecture starts.
        cfg, overlay: timm's `pretrained_cfg` and `pretrained_cfg_overlay`.
        model_args: constructor arguments where the caller gives none.
        stride: of the model's clips.
        is_multilabel: whether a video may be of several of its classes.
    """

    checkpoint: LoadedCheckpoint | None
    is_warm_start: bool
    cfg: Any
    overlay: dict
    model_args: dict
    stride: Stride
    is_multilabel: bool

    def load_into(self, model: EtMamba) -> None:
        """Loads the weights, if there are any, into a model built with `model_args`; not into one on 'meta'."""
        if self.checkpoint is not None and not model.cls_token.is_meta:
            model.load_state_dict(self._weights(self.checkpoint, model))

    def _weights(self, checkpoint: LoadedCheckpoint, model: EtMamba) -> dict[str, Tensor]:
        if not self.is_warm_start:
            return fit(checkpoint, model)
        if model.folded:
            raise CheckpointError(
                "VideoMamba's weights start an unfolded model: leave folded=True out, then call fold()"
            )
        return warm_start(checkpoint, model)


def find_pretrained(
    variant: str,
    pretrained: bool,
    base_cfg: dict,
    given: Mapping,
    saved: Mapping,
    cfg: Any = None,
    overlay: Mapping | None = None,
    cache_dir: str | Path | None = None,
) -> Pretrained:
    """What `create_model` of a variant loads: the manifest's checkpoint, or what a cfg or an overlay names.

    Args:
        variant: the registered name.
        pretrained: whether weights are loaded; nothing is fetched without. Without a tag, and without a file of the
            caller's, those of the architecture's first checkpoint.
        base_cfg: the cfg of a model without weights.
        given: constructor arguments that the caller gives.
        saved: those of the config.json that `cfg` was made from.
        cfg: timm's `pretrained_cfg`: None, a tag, or the cfg of a config.json.
        overlay: timm's `pretrained_cfg_overlay`.
        cache_dir: of the Hub's files; None for huggingface_hub's own.

    Raises:
        CheckpointError, FileNotFoundError: as `read_checkpoint` and `arguments_for`.
        DownloadError: the Hub can't be reached, or doesn't have the file.
        RuntimeError: there are no weights of that name.
    """
    overlay = dict(overlay or {})
    has_own_source = any(overlay.get(key) is not None for key in SOURCE_KEYS)
    entry = None
    if isinstance(cfg, str) and cfg:
        entry = find_checkpoint(f"{variant}.{cfg}")
        if entry is None:
            raise RuntimeError(unknown_tag(variant, cfg))
    elif not cfg and pretrained and not has_own_source:
        entry = find_checkpoint(variant)
    elif not cfg:
        cfg = {**base_cfg, "architecture": variant}
    stated = asdict(cfg) if isinstance(cfg, PretrainedCfg) else cfg if isinstance(cfg, Mapping) else {}
    source = {**base_cfg, **(entry.cfg() if entry else stated)}
    checkpoint, config = None, entry.config() if entry else _config_of(source, cache_dir)
    if has_own_source:  # it takes the place of all others
        source = {key: value for key, value in source.items() if key not in SOURCE_KEYS}
    source |= overlay
    if pretrained:
        checkpoint = _load(variant, source, None if has_own_source else entry, cache_dir)
        config = checkpoint.config or config
    is_warm_start = (
        entry is not None
        and entry.status == "warm start"
        and checkpoint is not None
        and checkpoint.architecture["block"] == "bimamba" != VARIANTS[variant]["block"]
    )
    model_args = dict(entry.model_args(config)) if entry else {} if has_own_source else dict(saved)
    if is_warm_start and checkpoint is not None:
        model_args |= size_for(checkpoint, variant)
    elif checkpoint is not None:
        model_args |= (config.model_args if config else {}) | arguments_for(checkpoint, variant, given)
        _check_promise(checkpoint, entry)
    overlay = (config.data_cfg if config else {}) | overlay
    overlay.pop("state_dict", None)  # it is read, and would stay in the model's cfg
    names = source.get("label_names")
    if checkpoint is not None and not is_warm_start:
        names = overlay.get("label_names") or _label_names(checkpoint, entry, config)
        if not names and checkpoint.num_classes == len(stated.get("label_names") or ()):
            names = stated.get("label_names")  # weights of their own, and the names of the model's folder
        overlay["num_classes"] = checkpoint.num_classes
    classes = given.get("num_classes", overlay.get("num_classes", source["num_classes"]))
    overlay["label_names"] = tuple(names) if names and len(names) == classes else None  # a fresh classifier has none
    stride = config.clip.stride if config and config.clip else None
    if stride is None and entry is not None:
        stride = entry.stride
    is_multilabel = config is not None and config.is_multilabel and config.num_classes == classes  # not a fresh one
    return Pretrained(checkpoint, is_warm_start, cfg, overlay, model_args, stride, is_multilabel)


def fetch(repo: str, filename: str, cache_dir: str | Path | None = None) -> Path:
    """A file of the Hub, from the cache if it is there, else downloaded into it.

    Unlike huggingface_hub alone, which tries again for a minute or more, this gives up within seconds when the Hub
    doesn't answer.

    Args:
        repo: 'org/name', or 'org/name@revision'.
        filename: in that repository.
        cache_dir: None for huggingface_hub's own (HF_HOME).

    Raises:
        DownloadError: the Hub can't be reached, is too slow, or doesn't have the file.
    """
    repo_id, _, revision = repo.partition("@")
    at = revision or None
    cached = try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=at)
    if isinstance(cached, str):
        return Path(cached)
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, filename, revision=at), timeout=TIMEOUT)
        return Path(hf_hub_download(repo_id, filename, revision=at, cache_dir=cache_dir, etag_timeout=TIMEOUT))
    except Exception as error:  # of requests or httpx, by huggingface_hub's version
        absent = isinstance(error, EntryNotFoundError)
        raise (_NotThereError if absent else DownloadError)(
            f"{repo}/{filename} can't be fetched from {constants.ENDPOINT}, and isn't in the cache "
            f"{cache_dir or constants.HF_HUB_CACHE} ({first_line(error)}). Try again with a network; or give the file, "
            "if you have it: pretrained_cfg_overlay=dict(file=...). HF_HOME names another cache, "
            f"HF_HUB_OFFLINE=1 (now {'on' if constants.HF_HUB_OFFLINE else 'off'}) uses nothing but it"
        ) from error


class _NotThereError(DownloadError):
    pass


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def verify(path: str | Path, sha256: str | None) -> None:
    """Raises CheckpointError if the file's SHA-256 is another than the one expected; None is not known."""
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise CheckpointError(
            f"{path} has SHA-256 {found}, not {sha256} as the manifest says: it is damaged or was "
            "replaced; delete it and try again"
        )


def _load(variant: str, source: Mapping, entry: Checkpoint | None, cache_dir: str | Path | None) -> LoadedCheckpoint:
    """The checkpoint that a cfg names, fetched if need be; the file of a manifest's entry is verified."""
    if source.get("state_dict") is not None:
        return read_checkpoint(source["state_dict"])
    if source.get("file") is not None:
        path = Path(source["file"])
    elif source.get("hf_hub_id") is not None:
        path = _from_hub(source, cache_dir)
    elif source.get("url") is not None:
        try:
            path = Path(download_cached_file(source["url"], cache_dir=cache_dir))
        except OSError as error:
            raise DownloadError(
                f"{source['url']} can't be fetched ({first_line(error)}); try again with a network, or give the file: "
                "pretrained_cfg_overlay=dict(file=...)"
            ) from error
    else:
        raise RuntimeError(
            f"No pretrained weights exist for {variant}. Use pretrained=False for a random start, a tag that "
            f"`etmamba info {variant}` lists, or a file: pretrained_cfg_overlay=dict(file=...)"
        )
    if entry is not None:
        verify(path, entry.sha256)
    return read_checkpoint(path)


def _from_hub(source: Mapping, cache_dir: str | Path | None) -> Path:
    repo, filename = source["hf_hub_id"], source.get("hf_hub_filename")
    if filename in (None, WEIGHTS_FILE):  # this package or timm saved it, and a config.json beside it
        try:
            fetch(repo, CONFIG_FILE, cache_dir)
        except _NotThereError:
            _logger.info("%s has no %s: nothing is known but what the weights tell", repo, CONFIG_FILE)
    try:
        return fetch(repo, filename or WEIGHTS_FILE, cache_dir)
    except _NotThereError:
        if filename is None:
            return fetch(repo, BINARY_FILE, cache_dir)
        raise


def _config_of(source: Mapping, cache_dir: str | Path | None) -> HubConfig | None:
    """The config.json that timm made a cfg of."""
    if source.get("source") == "local-dir":
        return read_config(Path(source["file"]))
    if source.get("source") != "hf-hub":
        return None
    repo_id, _, revision = source["hf_hub_id"].partition("@")
    path = try_to_load_from_cache(repo_id, CONFIG_FILE, cache_dir=cache_dir, revision=revision or None)
    return read_config(Path(path).parent) if isinstance(path, str) else None


def _label_names(
    checkpoint: LoadedCheckpoint, entry: Checkpoint | None, config: HubConfig | None
) -> tuple[str, ...] | None:
    """Names of the checkpoint's classes: its own, else those that the manifest knows for so many."""
    if checkpoint.label_names or entry is None or not entry.is_classifier:
        return checkpoint.label_names
    return entry.label_names(config) if entry.num_classes == checkpoint.num_classes else ()


def _check_promise(checkpoint: LoadedCheckpoint, entry: Checkpoint | None) -> None:
    """Warns of a file that was made for other clips than the manifest says."""
    if entry is None:
        return
    patches = (entry.img_size // checkpoint.architecture["patch_size"]) ** 2
    for of, what, there, promised in (
        ("positions of ", "patch", checkpoint.positions, patches),
        ("positions of ", "frame", checkpoint.clip.num_frames, entry.num_frames),
        ("", "class", checkpoint.num_classes, entry.num_classes if entry.is_classifier else checkpoint.num_classes),
    ):
        if there != promised:
            has = of + number_of(there, what)
            _logger.warning("%s has %s, not %s as %s promises", checkpoint.source, has, promised, entry.name)


def registered_cfgs(base_cfg: dict, names: tuple[str, ...]) -> dict[str, dict]:
    """timm's cfgs for these names: one for each checkpoint in the manifest, and one without weights where none is."""
    cfgs = {entry.name: {**base_cfg, **entry.cfg()} for entry in manifest().values()}
    tagged = {name.partition(".")[0] for name in cfgs}
    return cfgs | {name: dict(base_cfg) for name in names if name not in tagged}
