"""config.json of a folder in the Hub's layout, read and checked key by key."""

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from ..clip import Clip
from ..models import VARIANTS, EtMamba
from ..models.etmamba import POOLS
from .errors import CheckpointError

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
# By these transformers finds the classes of `hf`. It wants a file for the processor, whose settings are in config.json.
MODEL_TYPE, PROCESSOR_FILE = "etmamba_timm", "video_preprocessor_config.json"
PROCESSOR = '{"video_processor_type": "EtMambaVideoProcessor"}\n'
MULTILABEL = "multi_label_classification"  # transformers' name of a problem whose classes don't exclude each other
# Constructor arguments that say nothing about the weights.
RUNTIME_ARGS = ("device", "dtype", "drop_rate", "drop_path_rate")
DATA_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct")
# Keys that may be null; timm writes some of them so.
NULLABLE = {"clip", "card", "label_names", "license", "licence", "source", "notes", "recipe", "figures", "views"}
NULLABLE |= {"first_conv", "classifier", "problem_type"}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _all(fits: Callable[[Any], bool], *lengths: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list) and (not lengths or len(v) in lengths) and all(map(fits, v))


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return lambda v: _text(v) and v in choices, f"one of {', '.join(map(repr, choices))}"


def _figure(value: Any) -> bool:
    """Whether a metric says what it was measured on, and whose it is."""
    return _object(value) and all(value.get(key) not in (None, "") for key in ("dataset", "metric", "value", "whose"))


_TEXT, _OBJECT, _COUNT = (_text, "text"), (_object, "an object"), (_count, "a whole number, 0 or more")
_SIDE: Callable[[Any], bool] = lambda v: _count(v) and v > 0  # noqa: E731
_RATE = (lambda v: _number(v) and 0 <= v <= 1, "within 0 and 1")
_BOOL = (lambda v: isinstance(v, bool), "true or false")
_SIZE = (lambda v: _SIDE(v) or _all(_SIDE, 2)(v), "a whole number of pixels, or [height, width]")
_ROOT = {
    "architecture": _one_of(*VARIANTS),
    "pretrained_cfg": _OBJECT,
    "model_args": _OBJECT,
    "num_classes": _COUNT,
    "label_names": (_all(_text), "a list of names"),
    "problem_type": _one_of("single_label_classification", MULTILABEL, "regression"),
    "clip": _OBJECT,
    "card": _OBJECT,
}
_CFG = {
    "input_size": (_all(_SIDE, 3), "[channels, height, width]"),
    "mean": (lambda v: v and _all(_number)(v), "a list of numbers"),
    "std": (lambda v: v and _all(lambda x: _number(x) and x > 0)(v), "a list of numbers above 0"),
    "interpolation": _one_of("bilinear", "bicubic", "nearest"),
    "crop_pct": (lambda v: _number(v) and 0 < v <= 1, "above 0 and at most 1"),
    "num_classes": _COUNT,
    "label_names": (_all(_text), "a list of names"),
    "fixed_input_size": _BOOL,
    **dict.fromkeys(("license", "first_conv", "classifier"), _TEXT),
}
_ARGS = {
    **dict.fromkeys(inspect.signature(EtMamba).parameters, _COUNT),
    **dict.fromkeys(("drop_rate", "drop_path_rate"), _RATE),
    **dict.fromkeys(("stem", "block"), _TEXT),
    "global_pool": _one_of(*POOLS),
    "img_size": _SIZE,
    **dict.fromkeys(("motion", "folded"), _BOOL),
}
_CARD = {
    **dict.fromkeys(("licence", "source", "notes"), _TEXT),
    "recipe": (lambda v: _text(v) or _object(v), "text or an object"),
    "figures": (_all(_figure), "a list of objects with dataset, metric, value and whose"),
}
_VIEWS = (
    lambda v: _object(v) and all(_SIDE(v.get(k)) for k in ("frames", "crops", "clips")),
    "frames, crops and clips",
)


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
    def is_multilabel(self) -> bool:
        """Whether a video may be of several classes."""
        return self.raw.get("problem_type") == MULTILABEL

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
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}; it must be an object with the key 'architecture'")
    if missing := [key for key in ("architecture", "pretrained_cfg") if key not in raw]:
        raise CheckpointError(
            f"{path} has no key {missing[0]!r}; if it isn't the weights' own, move one of them elsewhere"
        )
    _check(raw, _ROOT, f"{path}: ")
    cfg, model_args, card = raw["pretrained_cfg"], raw.get("model_args", {}), raw.get("card") or {}
    for block, checks, known, where in (
        (cfg, _CFG, {field.name for field in fields(PretrainedCfg)}, "pretrained_cfg"),
        (model_args, _ARGS, _ARGS.keys() - {"device", "dtype"}, "model_args"),
        (card, _CARD, card.keys(), "card"),
    ):
        if unknown := sorted(block.keys() - known):
            raise CheckpointError(f"{path}: {where} has the unknown key {unknown[0]!r:.80}")
        _check(block, checks, f"{path}: {where}.")
    for figure in card.get("figures") or []:
        _check(figure, {"views": _VIEWS}, f"{path}: card.figures.")
    try:
        clip = Clip.from_config(raw["clip"]) if raw.get("clip") is not None else None
    except ValueError as error:
        raise CheckpointError(f"{path}: clip: {error}") from None
    return HubConfig(
        path,
        raw["architecture"],
        raw.get("num_classes", cfg.get("num_classes", 0)),
        model_args,
        {key: tuple(cfg[key]) if isinstance(cfg[key], list) else cfg[key] for key in DATA_KEYS if key in cfg},
        clip,
        tuple(raw.get("label_names") or cfg.get("label_names") or ()),  # at the root by us, in the cfg by timm
        card,
        raw,
    )


def _check(block: dict, checks: dict, where: str) -> None:
    """Raises CheckpointError for a value that doesn't pass its check: (function, what is wanted) by key."""
    for key, (fits, wanted) in checks.items():
        value = block.get(key)
        if key not in block or (value is None and key in NULLABLE):
            continue
        if not fits(value):
            raise CheckpointError(f"{where}{key} is {value!r:.80}; it must be {wanted}")
