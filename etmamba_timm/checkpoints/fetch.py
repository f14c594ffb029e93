"""Where the weights of `pretrained=True` come from: found or fetched, verified, and handed to timm as a file."""

import hashlib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import EntryNotFoundError
from timm.models import PretrainedCfg
from timm.models._input import update_model_args
from torch import Tensor, nn

from ..models.etmamba import EtMamba
from .manifest import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, find_checkpoint, manifest, read_config, saved_cfg
from .read import CheckpointError, check_complete, check_readable, first_line, fit_checkpoint
from .remap import from_videomamba
from .warm_start import warm_start

_logger = logging.getLogger(__name__)

TIMEOUT = 5  # seconds that the Hub has for its first answer
# Constructor arguments that say nothing of the weights.
_RUNTIME = ("device", "dtype", "drop_rate", "drop_path_rate")


class DownloadError(RuntimeError):
    """The Hub can't be reached, is too slow, or doesn't have the file."""


@dataclass(frozen=True)
class Pretrained:
    """What a call of an entry point loads, and how the model has to be built for it.

    Attributes:
        checkpoint: the manifest's entry; None without one.
        cfg, overlay: timm's `pretrained_cfg` and `pretrained_cfg_overlay`.
        model_args: constructor arguments where the caller gives none.
        config: the config.json it comes from, {} without one.
        filter_fn: timm's hook between the file and `load_state_dict`.
    """

    checkpoint: Checkpoint | None
    cfg: object
    overlay: dict
    model_args: dict
    config: dict
    filter_fn: Callable[[Mapping, nn.Module], dict[str, Tensor]]

    def describe(self, model: nn.Module, loaded: bool, given: Mapping) -> None:
        """Tells a built model how it was made, what its clips are, and what its classes are called.

        Sets `clip_cfg`, {"num_frames", "stride"} with stride None for frames spread over the whole video; {} where
        nothing is known. `given` are the constructor arguments of the call.
        """
        known = inspect.signature(EtMamba).parameters
        arguments = self.model_args | dict(given)
        update_model_args(model, **{k: v for k, v in arguments.items() if k in known and k not in _RUNTIME})
        cfg, entry = model.pretrained_cfg, self.checkpoint
        model.clip_cfg = dict(self.config.get("clip") or {})
        if entry is not None:
            model.clip_cfg = model.clip_cfg or {"num_frames": entry.num_frames, "stride": entry.stride}
            if loaded and entry.is_classifier and getattr(model, "num_classes", 0) == entry.num_classes:
                cfg["label_names"] = entry.label_names(self.config)
        if len(cfg.get("label_names") or ()) != getattr(model, "num_classes", 0):
            cfg.pop("label_names", None)


def find_pretrained(
    variant: str, pretrained: bool, base_cfg: dict, cfg=None, overlay: Mapping | None = None, cache_dir=None
) -> Pretrained:
    """What `create_model` of a variant is to load: the manifest's checkpoint, or what a cfg or an overlay names.

    Args:
        variant: the registered name.
        pretrained: whether weights are loaded; nothing is fetched without. Without a tag, and without a file of the
            caller's, those of the architecture's first checkpoint.
        base_cfg: the cfg of a model without weights.
        cfg: timm's `pretrained_cfg`: None, a tag, or the cfg of a config.json.
        overlay: timm's `pretrained_cfg_overlay`.
        cache_dir: of the Hub's files; None for huggingface_hub's own.

    Raises:
        CheckpointError, DownloadError, FileNotFoundError: there is no file to load, or it is damaged.
    """
    overlay = dict(overlay or {})
    entry, config = None, {}
    if isinstance(cfg, str) and cfg:
        entry = find_checkpoint(f"{variant}.{cfg}")
    elif not cfg and pretrained and not _has_source(overlay):
        entry = find_checkpoint(variant)
    elif not cfg:
        cfg = {**base_cfg, "architecture": variant}
    given = asdict(cfg) if is_dataclass(cfg) else cfg if isinstance(cfg, Mapping) else {}
    source = {**base_cfg, **(entry.cfg() if entry else given), **overlay}
    if entry is not None:
        config = entry.config() or (
            _fetched_config(entry, cache_dir) if pretrained and not _has_source(overlay) else {}
        )
        overlay = saved_cfg(config) | overlay
    elif source.get("source") in ("hf-hub", "local-dir"):
        config = _config_of(source, cache_dir)
    if pretrained:
        path = _locate(source, cache_dir)
        if path is not None:
            if entry is not None and not _has_source(overlay):
                verify(path, entry.sha256)
            check_readable(path)
            overlay.update(file=str(path), source=None)
    warm = entry is not None and entry.status == "warm start"
    model_args = entry.model_args(config) if entry else {}
    filter_fn = _warm_filter if warm else partial(_filter, entry=entry)
    return Pretrained(entry, cfg, overlay, model_args, config, filter_fn)


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
    where = {"repo_id": repo_id, "filename": filename, "revision": revision or None}
    cached = try_to_load_from_cache(**where, cache_dir=cache_dir)
    if isinstance(cached, str):
        return Path(cached)
    try:
        get_hf_file_metadata(hf_hub_url(**where), timeout=TIMEOUT)
        return Path(hf_hub_download(**where, cache_dir=cache_dir, etag_timeout=TIMEOUT))
    except Exception as error:  # of requests or httpx, by huggingface_hub's version
        absent = isinstance(error, EntryNotFoundError)
        raise (_NotThereError if absent else DownloadError)(
            f"{repo}/{filename} can't be fetched from {constants.ENDPOINT}, and isn't in the cache "
            f"{cache_dir or constants.HF_HUB_CACHE} ({first_line(error)}). Try again with a network; or give the file, "
            "if you have it, by pretrained_cfg_overlay=dict(file=...) or --checkpoint. HF_HOME or cache_dir= names "
            f"another cache, HF_HUB_OFFLINE=1 (now {'on' if constants.HF_HUB_OFFLINE else 'off'}) uses nothing but it"
        ) from error


class _NotThereError(DownloadError):
    pass


def verify(path: str | Path, sha256: str | None) -> None:
    """Raises CheckpointError if the file's SHA-256 is another than the one expected; None is not known."""
    if sha256 is None:
        return
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise CheckpointError(
            f"{path} has SHA-256 {digest.hexdigest()}, not {sha256} as the manifest says: it is damaged or was "
            "replaced; delete it and try again"
        )


def _locate(source: Mapping, cache_dir: str | Path | None) -> Path | None:
    """The file of weights that a cfg names, fetched if need be; None where it is for timm to find or to miss."""
    kind = source.get("source")
    if kind == "local-dir":
        path = Path(source["file"]) / WEIGHTS_FILE
        return path if path.is_file() else None
    if kind != "hf-hub" and source.get("state_dict"):
        return None
    if kind != "hf-hub" and source.get("file"):
        return Path(source["file"])
    if source.get("hf_hub_id"):
        try:
            return fetch(source["hf_hub_id"], source.get("hf_hub_filename") or WEIGHTS_FILE, cache_dir)
        except _NotThereError:
            if kind == "hf-hub" and not source.get("hf_hub_filename"):
                return fetch(source["hf_hub_id"], "pytorch_model.bin", cache_dir)  # timm's other name
            raise
    return None


def _has_source(overlay: Mapping) -> bool:
    return any(overlay.get(key) for key in ("file", "state_dict", "url", "hf_hub_id", "hf_hub_filename"))


def _config_of(source: Mapping, cache_dir: str | Path | None) -> dict:
    """The config.json that timm made a cfg of."""
    if source["source"] == "local-dir":
        return read_config(Path(source["file"]))
    repo_id, _, revision = source["hf_hub_id"].partition("@")
    path = try_to_load_from_cache(repo_id, CONFIG_FILE, cache_dir=cache_dir, revision=revision or None)
    return read_config(Path(path).parent) if isinstance(path, str) else {}


def _fetched_config(entry: Checkpoint, cache_dir: str | Path | None) -> dict:
    """The config.json on the Hub beside weights that this package saved; {} without."""
    if entry.source.get("file") != WEIGHTS_FILE:
        return {}
    try:
        return read_config(fetch(entry.cfg()["hf_hub_id"], CONFIG_FILE, cache_dir).parent)
    except _NotThereError:
        return {}


def _filter(state_dict: Mapping, model: nn.Module, entry: Checkpoint | None = None) -> dict[str, Tensor]:
    try:
        state_dict = from_videomamba(state_dict)
        if entry is not None and "pos_embed" in state_dict:
            times = state_dict.get("temporal_pos_embedding")
            came = (state_dict["pos_embed"].shape[1] - 1, 1 if times is None else times.shape[1])
            promised = ((entry.img_size // model.patch_size) ** 2, entry.num_frames)
            if came != promised:
                told = "the file has positions of %d patches and %d frames, not %d and %d as %s promises"
                _logger.warning(told, *came, *promised, entry.name)
        return fit_checkpoint(state_dict, model)
    except TypeError as error:  # timm would call again, with one argument
        raise CheckpointError(f"the checkpoint can't be fitted to the model ({first_line(error)})") from error


def _warm_filter(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """For a tag that starts from another architecture's weights; a file with the model's own is loaded as it is."""
    state_dict = from_videomamba(state_dict)
    if not any(key.endswith(".A_b_log") for key in state_dict):
        return _filter(state_dict, model)
    if model.folded:
        raise CheckpointError("VideoMamba's weights start an unfolded model: leave folded=True out, then call fold()")
    try:
        out = warm_start(state_dict, model)
        check_complete(out, model)
        return out
    except TypeError as error:
        raise CheckpointError(f"the model can't be started from the checkpoint ({first_line(error)})") from error


def registered_cfgs(base_cfg: dict, names: tuple[str, ...]) -> dict[str, dict | PretrainedCfg]:
    """timm's cfgs for these names: one a checkpoint of the manifest, and one without weights where there is none."""
    cfgs = {entry.name: {**base_cfg, **entry.cfg()} for entry in manifest().values()}
    tagged = {name.partition(".")[0] for name in cfgs}
    return cfgs | {name: dict(base_cfg) for name in names if name not in tagged}
