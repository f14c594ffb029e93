"""config.json of a folder in the Hub's layout, read and checked key by key."""

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from ..clip import Clip
from ..models import VARIANTS, EtMamba
from ..models.etmamba import POOLS
from .errors import CheckpointError

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
# Constructor arguments that say nothing about the weights.
RUNTIME_ARGS = ("device", "dtype", "drop_rate", "drop_path_rate")
# Keys that may be null; timm writes some of them so.
_NULLABLE = ("clip", "card", "label_names", "license", "licence", "source", "notes", "recipe", "figures", "views")
_NULLABLE += ("first_conv", "classifier")
_INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
_MODEL_ARGS = inspect.signature(EtMamba).parameters.keys() - {"device", "dtype"}


@dataclass(frozen=True)
class HubConfig:
    """A config.json whose values are known to be of the right kinds.

    Attributes:
        path: the file, for messages.
        architecture: the registered name of the model.
        num_classes: classes of its classifier; 0 for none.
        model_args: constructor arguments other than the variant's.
        data_cfg: input_size, mean, std, interpolation and crop_pct, as far as they are stated.
        clip: the clips it takes; None if the file doesn't say.
        label_names: names of the classes, in order; () if there are none.
        card: what the model card is made from.
        raw: the whole file.
    """

    path: Path
    architecture: str
    num_classes: int
    model_args: dict
    data_cfg: dict
    clip: Clip | None
    label_names: tuple[str, ...]
    card: dict
    raw: dict

    @property
    def licence(self) -> str | None:
        """The licence that it states."""
        return self.card.get("licence") or self.raw["pretrained_cfg"].get("license")


def read_config(folder: str | Path) -> HubConfig | None:
    """The config.json of a folder; None if it has none.

    Raises:
        CheckpointError: it is damaged. The message names the file and the key.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON ({error}); download it again, or convert anew") from error
    return parse_config(raw, path)


def parse_config(raw: Any, path: Path) -> HubConfig:
    """`read_config` for what is already parsed; `path` is for messages."""

    def get(block: Mapping, key: str, where: str, fits: Callable[[Any], bool], wanted: str, default: Any = None) -> Any:
        value = block.get(key)
        if value is None and (key not in block or key in _NULLABLE):
            return default
        if value is None or not fits(value):
            raise CheckpointError(f"{path}: {where}{key} is {value!r:.80}; it must be {wanted}")
        return value

    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}; it must be an object with the key 'architecture'")
    architecture = get(raw, "architecture", "", _is_text, "a model's name")
    if architecture is None:
        raise CheckpointError(f"{path} has no key 'architecture'; it names the model, such as 'etmamba_ti'")
    if architecture not in VARIANTS:
        raise CheckpointError(
            f"{path}: architecture {architecture!r:.80} is unknown; choose one of {', '.join(VARIANTS)}"
        )
    cfg = get(raw, "pretrained_cfg", "", _is_object, "an object")
    if cfg is None:
        raise CheckpointError(f"{path} has no key 'pretrained_cfg'; timm reads the picture's size and mean from it")
    if unknown := sorted(cfg.keys() - {field.name for field in fields(PretrainedCfg)}):
        raise CheckpointError(f"{path}: pretrained_cfg has the unknown key {unknown[0]!r:.80}")
    where = "pretrained_cfg."
    data_cfg = {
        "input_size": get(
            cfg, "input_size", where, lambda v: _is_list(v, _is_positive, 3), "[channels, height, width]"
        ),
        "mean": get(cfg, "mean", where, lambda v: v and _is_list(v, _is_number), "a list of numbers"),
        "std": get(cfg, "std", where, lambda v: v and _is_list(v, _is_above_0), "a list of numbers above 0"),
        "interpolation": get(
            cfg, "interpolation", where, lambda v: _is_text(v) and v in _INTERPOLATIONS, " or ".join(_INTERPOLATIONS)
        ),
        "crop_pct": get(cfg, "crop_pct", where, lambda v: _is_above_0(v) and v <= 1, "above 0 and at most 1"),
    }
    get(cfg, "num_classes", where, _is_count, "a whole number")
    for key in ("license", "first_conv", "classifier"):
        get(cfg, key, where, _is_text, "text")
    get(cfg, "fixed_input_size", where, lambda v: isinstance(v, bool), "true or false")
    model_args = get(raw, "model_args", "", _is_object, "an object", {})
    if unknown := sorted(model_args.keys() - _MODEL_ARGS):
        raise CheckpointError(f"{path}: model_args has the unknown key {unknown[0]!r:.80}")
    for key in model_args:
        if key == "global_pool":
            get(model_args, key, "model_args.", lambda v: _is_text(v) and v in POOLS, " or ".join(map(repr, POOLS)))
        elif key in ("stem", "block"):
            get(model_args, key, "model_args.", _is_text, "text")
        elif key == "folded":
            get(model_args, key, "model_args.", lambda v: isinstance(v, bool), "true or false")
        elif key in RUNTIME_ARGS:
            get(model_args, key, "model_args.", lambda v: _is_number(v) and 0 <= v <= 1, "within 0 and 1")
        elif key == "img_size":
            get(model_args, key, "model_args.", _is_size, "a whole number of pixels, or [height, width]")
        else:
            get(model_args, key, "model_args.", _is_count, "a whole number")
    names = get(raw, "label_names", "", lambda v: _is_list(v, _is_text), "a list of names", [])
    card = get(raw, "card", "", _is_object, "an object", {})
    for key in ("licence", "source", "notes"):
        get(card, key, "card.", _is_text, "text")
    get(card, "recipe", "card.", lambda v: _is_text(v) or _is_object(v), "text or an object")
    for figure in get(card, "figures", "card.", lambda v: _is_list(v, _is_object), "a list of objects", []):
        get(figure, "views", "card.figures.", _is_views, "an object with the numbers frames, crops and clips")
    clip = get(raw, "clip", "", _is_object, "an object")
    try:
        clip = None if clip is None else Clip.from_config(clip)
    except ValueError as error:
        raise CheckpointError(f"{path}: clip: {error}") from None
    return HubConfig(
        path,
        architecture,
        get(raw, "num_classes", "", _is_count, "a whole number", cfg.get("num_classes") or 0),
        model_args,
        {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in data_cfg.items()
            if value is not None
        },
        clip,
        tuple(names),
        card,
        raw,
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_above_0(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_size(value: Any) -> bool:
    return _is_positive(value) or _is_list(value, _is_positive, 2)


def _is_views(value: Any) -> bool:
    return _is_object(value) and all(_is_positive(value.get(key)) for key in ("frames", "crops", "clips"))


def _is_list(value: Any, fits: Callable[[Any], bool], *lengths: int) -> bool:
    return isinstance(value, list) and (not lengths or len(value) in lengths) and all(map(fits, value))
