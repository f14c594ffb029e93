"""What a training run is made of: a table of settings, read from a YAML file, any of which can be overridden."""

import types
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path

import yaml

from ..clip import Clip

# Arguments of `timm.create_model` that have a setting of their own.
SET_ELSEWHERE = {
    "num_frames": "num_frames",
    "img_size": "size",
    "drop_rate": "drop",
    "drop_path_rate": "drop_path",
    "pretrained": "pretrained",
    "pretrained_cfg_overlay": "checkpoint",
    "checkpoint_path": "checkpoint",
    "num_classes": "nothing: the dataset's classes decide",
}
PRECISIONS = ("no", "bf16", "fp16")


class RecipeError(ValueError):
    """A recipe that can't be: an unknown name or setting, or a value that doesn't fit."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run; the defaults are the paper's for Kinetics-400 (4.2), but for the dataset.

    Attributes:
        dataset: how the data is laid out, a name of `etmamba_timm.data.LAYOUTS`.
        split: of a dataset that has several.
        model: what `timm.create_model` takes.
        model_args: more of its arguments.
        pretrained: whether to start from that model's weights.
        checkpoint: a file of weights to start from instead, ours or VideoMamba's; its classifier is left out if the
            number of classes differs. An ETMamba starts from VideoMamba's as `etmamba_ti.videomamba_in1k`.
        num_frames, stride: of a clip; the stride is the frames from one to the next, or 'spread' over the whole video.
        size: height and width of a clip, in pixels; one number for a square.
        epochs, warmup_epochs: of training, and of these with a rising rate; the latter may be a fraction.
        batch_size: clips of an update in each process.
        accumulate: parts that such a batch is cut into, one after another, to save memory.
        opt, opt_args: an optimiser of timm, and more arguments of timm's `create_optimizer_v2`.
        lr, min_lr, warmup_lr: rates for 256 clips an update; scaled linearly to the actual number.
        weight_decay, betas: of the optimiser.
        layer_decay: factor of the rate from a block to the one before it; 1 for none.
        clip_grad: largest norm of the gradient; 0 for no limit.
        drop_path, drop, label_smoothing: regularisation.
        mixup, cutmix: their alphas; 0 for none.
        scale, ratio, flip, rand_augment, erasing: see `etmamba_timm.data.TrainTransform`.
        ema: decay of averaged weights, which are then evaluated and exported; 0 for none.
        precision: 'no' (float32), 'bf16' or 'fp16'.
        grad_checkpointing: whether activations are computed again to save memory.
        freeze_backbone: whether the classifier alone is trained.
        eval_epochs: epochs from one evaluation to the next.
        num_clips, num_crops: views of a video in the last evaluation; before, it is one.
        seed: of everything drawn.
    """

    dataset: str = "folders"
    split: int = 1
    model: str = "etmamba_m"
    model_args: dict = field(default_factory=dict)
    pretrained: bool = True
    checkpoint: str = ""
    num_frames: int = 16
    stride: int | str = 2
    size: int | tuple[int, int] = 224
    epochs: int = 30
    warmup_epochs: float = 1
    batch_size: int = 64
    accumulate: int = 1
    opt: str = "adamw"
    opt_args: dict = field(default_factory=dict)
    lr: float = 3e-4
    min_lr: float = 1e-6
    warmup_lr: float = 1e-6
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 1.0
    clip_grad: float = 0.0
    drop_path: float = 0.1
    drop: float = 0.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.5
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25
    ema: float = 0.0
    precision: str = "bf16"
    grad_checkpointing: bool = False
    freeze_backbone: bool = False
    eval_epochs: int = 1
    num_clips: int = 4
    num_crops: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _fitting(f.name, f.type, getattr(self, f.name)))
        for name in ("epochs", "batch_size", "accumulate", "num_clips", "eval_epochs", "split"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if clash := [f"{name} (set {own})" for name, own in SET_ELSEWHERE.items() if name in self.model_args]:
            raise RecipeError(f"model_args holds what the recipe sets elsewhere: {', '.join(clash)}")
        if min(self.img_size) < 1:
            raise RecipeError(f"size is {self.size}; it must be 1 or more pixels")
        try:
            _ = self.clip
        except ValueError as error:
            raise RecipeError(str(error)) from None
        rates = ("lr", "min_lr", "warmup_lr", "weight_decay", "clip_grad", "mixup", "cutmix")
        for name in ("warmup_epochs", "seed", *rates):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("drop_path", "drop", "label_smoothing", "flip", "erasing", "ema", "layer_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be within 0 and 1")
        if self.layer_decay == 0:
            raise RecipeError("layer_decay is 0, which would train the classifier alone; it is 1 for none")
        if self.label_smoothing == 1:
            raise RecipeError("label_smoothing is 1, which leaves nothing to learn; it must be below 1")
        if self.warmup_epochs >= self.epochs:
            raise RecipeError(f"warmup_epochs is {self.warmup_epochs:g} of {self.epochs} epochs; leave some after it")
        if self.batch_size % self.accumulate:
            raise RecipeError(f"batch_size {self.batch_size} can't be cut into {self.accumulate} equal parts")
        if (self.mixup or self.cutmix) and self.batch_size // self.accumulate % 2:
            raise RecipeError(f"mixup pairs clips; {self.batch_size // self.accumulate} at a time is odd")
        if self.num_crops not in (1, 3):
            raise RecipeError(f"num_crops is {self.num_crops}; it is 1 or 3")
        if self.precision not in PRECISIONS:
            raise RecipeError(f"precision is {self.precision!r}; choose one of {', '.join(PRECISIONS)}")

    @property
    def img_size(self) -> tuple[int, int]:
        """`size` as (height, width)."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def clip(self) -> Clip:
        """`num_frames` and `stride`."""
        return Clip(self.num_frames, self.stride)  # type: ignore[arg-type]  # checked there

    def scaled(self, rate: float, processes: int) -> float:
        """A rate for 256 clips an update -> for the clips that an update of so many processes takes."""
        return rate * self.batch_size * processes / 256

    def to_yaml(self) -> str:
        """All settings, as `load_recipe` reads them."""
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return yaml.safe_dump(settings, sort_keys=False)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in files(__package__).joinpath("recipes").iterdir())


def load_recipe(name: str | Path = "k400", **overrides) -> Recipe:
    """A recipe of the package by its name, or a YAML file; `overrides` replace its settings.

    Raises:
        RecipeError: an unknown recipe or setting, or a value that doesn't fit.
    """
    if str(name) in recipe_names():
        text = files(__package__).joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise RecipeError(f"no recipe {str(name)!r}: it is no file, and none of {', '.join(recipe_names())}")
    try:
        given = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is no YAML: {error}") from error
    if not isinstance(given, dict):
        raise RecipeError(f"{name} holds a {type(given).__name__}; wanted lines `setting: value`")
    given |= overrides
    known = [f.name for f in fields(Recipe)]
    if unknown := sorted(map(str, given.keys() - set(known))):
        raise RecipeError(f"{name}: unknown settings {', '.join(unknown)}; there are {', '.join(known)}")
    return Recipe(**given)


def parse_overrides(pairs: list[str]) -> dict:
    """`name=value` as given on a command line -> settings; values are read as YAML."""
    out = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"{pair!r} is no setting; write it as name=value, e.g. epochs=10")
        try:
            out[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"{pair!r}: {value!r} is no YAML value ({error})") from error
    return out


def _fitting(name: str, kind: type, value: object) -> object:
    """The value as the type of its setting; YAML reads 3e-4 as text and 1 as an int."""
    try:
        if isinstance(kind, types.UnionType):  # int | tuple[int, int], int | str
            whole = isinstance(value, int) and not isinstance(value, bool)
            pair = isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int for v in value)
            if whole or (name == "stride" and isinstance(value, str)) or (name == "size" and pair):
                return tuple(value) if isinstance(value, list) else value
        elif isinstance(kind, types.GenericAlias):  # tuple[float, float]
            if isinstance(value, list | tuple) and len(value) == len(kind.__args__):
                return tuple(float(v) for v in value)
        elif kind is float and not isinstance(value, bool):
            return float(value)
        elif type(value) is kind:
            return value
        elif kind is str and value is None:  # `rand_augment: ` is none
            return ""
        elif name == "precision" and value is False:  # YAML reads `no` so
            return "no"
    except (TypeError, ValueError):
        pass
    raise RecipeError(f"{name} is {value!r}; it must be {getattr(kind, '__name__', kind)}")
