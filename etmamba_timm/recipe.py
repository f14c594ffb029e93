"""What a training run is made of: a table of settings, read from a YAML file, any of which can be overridden."""

from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from pathlib import Path

import yaml


class RecipeError(ValueError):
    """A recipe that can't be: an unknown name or setting, or a value that doesn't fit."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run; the defaults are the paper's for Kinetics-400 (4.2).

    Attributes:
        model: what `timm.create_model` takes.
        pretrained: whether to start from that model's weights.
        num_frames, stride: of a clip; stride 0 samples uniformly over the whole video.
        size: height and width of a clip, in pixels.
        epochs, warmup_epochs: of training, and of these with a rising rate.
        batch_size: clips of an update in each process.
        accumulate: parts that such a batch is cut into, one after another, to save memory.
        lr, min_lr, warmup_lr: rates for 256 clips an update; scaled linearly to the actual number.
        weight_decay, betas, layer_decay, clip_grad: of AdamW; layer_decay 1 and clip_grad 0 leave them out.
        drop_path, drop, label_smoothing: regularisation.
        mixup, cutmix: their alphas; 0 leaves them out.
        scale, ratio, flip, rand_augment, erasing: see `TrainTransform`.
        ema: decay of the averaged weights that are evaluated and exported too; 0 for none.
        precision: 'no' (float32), 'bf16' or 'fp16'.
        grad_checkpointing: whether activations are computed again to save memory.
        freeze_backbone: whether the classifier alone is trained.
        num_clips, num_crops: views of a video in evaluation.
        seed: of everything drawn.
    """

    model: str = "etmamba_m"
    pretrained: bool = True
    num_frames: int = 16
    stride: int = 2
    size: int = 224
    epochs: int = 30
    warmup_epochs: int = 1
    batch_size: int = 64
    accumulate: int = 1
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
    num_clips: int = 4
    num_crops: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("betas", "scale", "ratio"):
                object.__setattr__(self, field.name, tuple(map(float, value)))
            elif isinstance(field.default, float) and isinstance(value, int | str):
                object.__setattr__(self, field.name, float(value))  # YAML reads 3e-4 as text
            elif type(value) is not type(field.default):
                raise RecipeError(f"{field.name} is {value!r}; it must be {type(field.default).__name__}")
        for name in ("num_frames", "size", "epochs", "batch_size", "accumulate", "num_clips"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.batch_size % self.accumulate:
            raise RecipeError(f"batch_size {self.batch_size} can't be cut into {self.accumulate} equal parts")
        if self.precision not in ("no", "bf16", "fp16"):
            raise RecipeError(f"precision is {self.precision!r}; choose 'no', 'bf16' or 'fp16'")

    def scaled(self, rate: float, processes: int) -> float:
        """A rate for 256 clips an update -> for the clips of an update in all processes."""
        return rate * self.batch_size * processes / 256

    def to_yaml(self) -> str:
        """All settings, as `load_recipe` reads them."""
        return yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}, sort_keys=False)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in files(__package__).joinpath("recipes").iterdir())


def load_recipe(name: str | Path = "k400", **overrides) -> Recipe:
    """A recipe of the package by its name, or a YAML file; `overrides` replace its settings.

    Raises:
        RecipeError: an unknown recipe or setting, or a value that doesn't fit.
    """
    if str(name) in recipe_names():
        text = files(__package__).joinpath("recipes", f"{name}.yaml").read_text()
    elif Path(name).is_file():
        text = Path(name).read_text()
    else:
        raise RecipeError(f"no recipe {str(name)!r}: it is no file, and none of {', '.join(recipe_names())}")
    try:
        given = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is no YAML: {error}") from error
    given |= overrides
    if unknown := given.keys() - {field.name for field in fields(Recipe)}:
        known = ", ".join(field.name for field in fields(Recipe))
        raise RecipeError(f"unknown settings {', '.join(sorted(unknown))}; there are {known}")
    return replace(Recipe(), **given)
