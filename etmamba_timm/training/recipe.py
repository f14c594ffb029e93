"""Recipes: the settings of a training run, read from a YAML file, with overrides."""

import inspect
import json
import re
import types
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import SupportsFloat

import yaml

from ..clip import Clip
from ..words import did_you_mean

# Arguments of `timm.create_model` that can't be in model_args, and where they come from instead.
SET_ELSEWHERE = {
    "num_frames": "set num_frames",
    "img_size": "set size",
    "drop_rate": "set drop",
    "drop_path_rate": "set drop_path",
    "pretrained": "set pretrained",
    "pretrained_cfg_overlay": "set checkpoint",
    "checkpoint_path": "set checkpoint",
    "num_classes": "the dataset decides it",
}
AUTO = "auto"  # a value that the model or the data decides
EPOCH_UPDATES = "epoch_updates"  # a setting that decides `repeat`
PRECISIONS = ("no", "bf16", "fp16")


class RecipeError(ValueError):
    """An unknown recipe or setting, or an invalid value."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run. Defaults, except `dataset`, are the paper's for Kinetics-400 (4.2).

    Attributes:
        dataset: the layout of the data, a key of `etmamba_timm.data.LAYOUTS`.
        split: the split, for datasets with several.
        model: the model's name for `timm.create_model`.
        model_args: further arguments of `timm.create_model`.
        pretrained: whether to start from the model's pretrained weights.
        checkpoint: a file of weights to start from instead, ours or VideoMamba's; its classifier is dropped if the
            number of classes differs. To start an ETMamba from VideoMamba's, set model to `etmamba_ti.videomamba_in1k`.
        num_frames, stride: of a clip; the stride is the number of frames from one to the next, or 'spread' over the
            whole video.
        size: height and width of a clip, in pixels; one number for a square.
        epochs, warmup_epochs: number of epochs, and how many of them are warm-up (may be a fraction).
        balance: how far rare classes are drawn more often: 0 draws each video once an epoch, 1 each class equally
            often; a class's frequency counts to the power of -balance. Of several labels of a video the rarest counts.
        batch_size: clips per update and process.
        accumulate: number of parts that a batch is split into (gradient accumulation), to save memory.
        opt, opt_args: timm's name of the optimiser, and further arguments of timm's `create_optimizer_v2`.
        repeat: random clips of each video in an epoch.
        scale_lr: whether learning rates are for 256 clips per update, and are scaled linearly to the actual number.
        lr, min_lr, warmup_lr: learning rates.
        weight_decay, betas: of the optimiser.
        layer_decay: factor of the learning rate from each block to the one before it; 1 for none.
        clip_grad: maximum norm of the gradient; 0 for no limit.
        drop_path, drop, label_smoothing: regularisation.
        mixup, cutmix: alphas; 0 for none.
        still: greatest share of a still frame of another clip that is blended into each clip, against learning scenes.
        scale, ratio, flip, rand_augment, erasing: see `etmamba_timm.data.TrainTransform`.
        ema: decay of averaged weights, which are then evaluated and exported; 0 for none.
        precision: 'no' (float32), 'bf16' or 'fp16'.
        grad_checkpointing: whether blocks recompute their activations in the backward pass, to save memory; a number n
            for every n-th block alone.
        compile: whether to run the model through `torch.compile`, which takes minutes at the start and is faster then.
        cuda_graphs: whether to replay the steps of a run on one GPU as CUDA graphs, so that small batches don't wait
            for Python to start each kernel. It keeps a batch's memory during evaluations too.
        freeze_backbone: whether to train only the classifier, and the pooling of model_args={global_pool: map}.
        teacher: a model whose class probabilities and features are learnt (see `load_teacher`), or a file or folder of
            probabilities that `etmamba teach` wrote; '' for none.
        teacher_weight: weight of the teacher's probabilities in the loss; the true labels have the rest.
        temperature: divides the logits of both before they are compared; higher ones give more weight to the order of
            unlikely classes.
        feature_weight: weight of the teacher's features, compared with a learnt linear map of the model's own.
        eval_epochs: epochs between evaluations.
        num_clips, num_crops: views per video in the final evaluation; earlier ones use one view.
        seed: the random seed.

    Raises:
        RecipeError: an invalid value.
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
    repeat: int = 1
    balance: float = 0.0
    batch_size: int = 64
    accumulate: int = 1
    opt: str = "adamw"
    opt_args: dict = field(default_factory=dict)
    scale_lr: bool = True
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
    still: float = 0.0
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.5
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25
    ema: float = 0.0
    precision: str = "bf16"
    grad_checkpointing: int = 0
    compile: bool = False
    cuda_graphs: bool = True
    freeze_backbone: bool = False
    teacher: str = ""
    teacher_weight: float = 0.5
    temperature: float = 2.0
    feature_weight: float = 0.0
    eval_epochs: int = 1
    num_clips: int = 4
    num_crops: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _converted(f.name, f.type, getattr(self, f.name)))
        for name in ("epochs", "repeat", "batch_size", "accumulate", "num_clips", "eval_epochs", "split"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if clash := [f"{name} ({instead})" for name, instead in SET_ELSEWHERE.items() if name in self.model_args]:
            raise RecipeError(f"model_args can't contain {', '.join(clash)}")
        if min(self.img_size) < 1:
            raise RecipeError(f"size is {self.size}; it must be at least 1 pixel")
        try:
            _ = self.clip
        except ValueError as error:
            raise RecipeError(str(error)) from None
        rates = ("lr", "min_lr", "warmup_lr", "weight_decay", "clip_grad", "mixup", "cutmix", "feature_weight")
        for name in ("warmup_epochs", "seed", "grad_checkpointing", *rates):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        shares = ("drop_path", "drop", "label_smoothing", "flip", "erasing", "ema", "layer_decay", "balance", "still")
        for name in (*shares, "teacher_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be between 0 and 1")
        if self.layer_decay == 0:
            raise RecipeError("layer_decay is 0, which would train only the classifier; set it to 1 for no decay")
        if not self.temperature > 0:
            raise RecipeError(f"temperature is {self.temperature}; it must be above 0")
        if self.label_smoothing == 1:
            raise RecipeError("label_smoothing is 1, which makes all classes equal; it must be below 1")
        if self.warmup_epochs >= self.epochs:
            raise RecipeError(
                f"warmup_epochs is {self.warmup_epochs:g} and epochs {self.epochs}; warmup_epochs must be smaller, "
                f"such as {self.epochs / 10:g}"
            )
        if self.batch_size % self.accumulate:
            raise RecipeError(
                f"batch_size is {self.batch_size}; it must be a multiple of accumulate, {self.accumulate}"
            )
        if (self.mixup or self.cutmix) and self.batch_size // self.accumulate % 2:
            raise RecipeError(
                f"mixup needs an even number of clips; batch_size / accumulate is {self.batch_size // self.accumulate}"
            )
        if self.num_crops not in (1, 3):
            raise RecipeError(f"num_crops is {self.num_crops}; it must be 1 or 3")
        if self.precision not in PRECISIONS:
            raise RecipeError(f"precision is {self.precision!r}; choose one of {', '.join(PRECISIONS)}")

    @property
    def img_size(self) -> tuple[int, int]:
        """`size` as (height, width)."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def clip(self) -> Clip:
        """`num_frames` and `stride` as a `Clip`."""
        return Clip(self.num_frames, self.stride)  # type: ignore[arg-type]  # Clip checks it

    def scaled(self, rate: float, processes: int) -> float:
        """A learning rate for the batch of all processes."""
        return rate * self.batch_size * processes / 256 if self.scale_lr else rate

    def to_yaml(self) -> str:
        """All settings as YAML, for `load_recipe`."""
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return yaml.safe_dump(settings, sort_keys=False)


def recipe_names() -> list[str]:
    """Names of the package's recipes."""
    return sorted(p.name.removesuffix(".yaml") for p in files(__package__).joinpath("recipes").iterdir())


def load_recipe(name: str | Path = "k400", **overrides) -> Recipe:
    """Loads a recipe without open values; see `etmamba_timm.training.plan.settle` for one with them.

    Args:
        name: the name of one of the package's recipes, or a YAML file.
        overrides: settings that replace the recipe's.

    Returns: the recipe.

    Raises:
        RecipeError: an unknown recipe or setting, or an invalid value.
    """
    settings = read_settings(name, **overrides)
    if left_open := [key for key, value in settings.items() if value == AUTO or key == EPOCH_UPDATES]:
        raise RecipeError(
            f"{name} leaves {', '.join(left_open)} to the model and the data, as `etmamba train` settles them; call "
            "etmamba_timm.training.plan.settle, or give values"
        )
    return Recipe(**settings)


def read_settings(name: str | Path, **overrides) -> dict:
    """The settings of a recipe as they are written, some perhaps open (`AUTO`). Otherwise as `load_recipe`."""
    if str(name) in recipe_names():
        text = files(__package__).joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise RecipeError(f"unknown recipe {str(name)!r}; give a YAML file, or one of {', '.join(recipe_names())}")
    try:
        given = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} isn't valid YAML: {error}") from error
    if not isinstance(given, dict):
        raise RecipeError(f"{name} contains a {type(given).__name__}; write lines `setting: value`")
    given |= overrides
    known = [f.name for f in fields(Recipe)]
    if unknown := sorted(map(str, given.keys() - {*known, EPOCH_UPDATES})):
        meant = did_you_mean(unknown, known)
        raise RecipeError(f"{name}: unknown settings {', '.join(unknown)}{meant}; known are {', '.join(known)}")
    return given


def describe_settings(recipe: str = "finetune") -> list[tuple[str, str]]:
    """What `--set` takes: settings with a recipe's values, as `name=value, name=value`, and what they are."""
    given = {f.name: f.default for f in fields(Recipe)} | read_settings(recipe)

    def shown(name: str) -> str:
        value = given.get(name)
        value = "" if value is None or value == "" else {} if value is MISSING else value
        return f"{name}={value if isinstance(value, str) else json.dumps(value).replace(chr(34), '')}"

    documented = (inspect.getdoc(Recipe) or "").partition("Raises:")[0]
    rows = re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)\.$", documented, re.MULTILINE)
    rows.append((EPOCH_UPDATES, "least number of updates in an epoch, for which repeat grows"))
    return [
        (", ".join(map(shown, names.split(", "))), re.sub(r"\s+", " ", text))
        for names, text in rows
        if names != "dataset"  # the command's own option, with another default
    ]


def parse_overrides(pairs: list[str]) -> dict:
    """Parses `name=value` pairs from the command line; values are YAML.

    Raises:
        RecipeError: a pair without '=', or a value that isn't YAML.
    """
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"{pair!r} isn't a setting; write name=value, such as epochs=10")
        try:
            settings[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"{pair!r}: {value!r} isn't valid YAML ({error})") from error
    return settings


def _converted(name: str, kind: object, value: object) -> object:
    """Converts a value to the type of its setting; YAML reads 3e-4 as a string and 1 as an int."""
    try:
        if isinstance(kind, types.UnionType):  # int | tuple[int, int], int | str
            is_int = isinstance(value, int) and not isinstance(value, bool)
            is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int for v in value)
            if is_int or (name == "stride" and isinstance(value, str)) or (name == "size" and is_pair):
                return tuple(value) if isinstance(value, list) else value
        elif isinstance(kind, types.GenericAlias):  # tuple[float, float]
            if isinstance(value, list | tuple) and len(value) == len(kind.__args__):
                return tuple(float(v) for v in value)
        elif kind is float and isinstance(value, str | SupportsFloat) and not isinstance(value, bool):
            return float(value)
        elif type(value) is kind:
            return value
        elif kind is str and value is None:  # `rand_augment: ` without a value
            return ""
        elif name == "grad_checkpointing" and isinstance(value, bool):
            return int(value)
        elif name == "precision" and value is False:  # YAML reads `no` as False
            return "no"
    except (TypeError, ValueError):
        pass
    raise RecipeError(f"{name} is {value!r}; it must be {getattr(kind, '__name__', kind)}")
