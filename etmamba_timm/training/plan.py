"""Before a run: settles what a recipe leaves open, and says what the run will do and what can't work."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import timm
import torch
from accelerate.utils import parse_flag_from_env

from ..checkpoints import find_checkpoint
from ..clip import DEFAULT_STRIDE
from ..data import SOURCES, Annotations
from ..data.annotations import each
from ..models import EtMamba, count_cost
from ..words import number_of
from .optimizer import head_of
from .recipe import AUTO, EPOCH_UPDATES, Recipe, RecipeError

MOST_CLIPS = 16  # of an update, where the batch size is open
IMAGE_FRAMES = 16  # of a clip, where the weights come from images (paper 4.2)
PRECISION_WORDS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
SIDES = re.compile(r"left|right|clockwise", re.IGNORECASE)  # in the name of a class that isn't its own mirror image
LEAST_RATE = 1e-5  # below, an optimiser such as AdamW hardly moves the weights
LEAST_UPDATES = 100  # of a run
LEAST_VAL = 10  # videos for validation
SHOWN_CLASSES = 8
NO_VALIDATION = (
    "there is no video for validation: add a second one to a class, or give some of their own (DATA/val/<class>/, or "
    "val.csv beside train.csv)"
)


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        facts: (what, in words), in order.
        warnings: settings and data with which it can hardly work, each with a remedy.
        updates: of the whole run.
    """

    facts: list[tuple[str, str]]
    warnings: list[str]
    updates: int


def settle(settings: Mapping, train_set: Annotations, processes: int = 1) -> Recipe:
    """A recipe whose open values (`auto`) are decided by the model and the data; the same every time.

    `num_frames`, `stride` and `size` are those of the model's weights (or of its tag, from scratch), `batch_size` is 16
    in all processes together, or fewer for fewer videos, `precision` is bf16 where the hardware has it, `flip` is 0.5
    unless a class's name speaks of a side, `warmup_epochs` is 1, or a tenth of fewer than 10 epochs, and
    `epoch_updates`, the fewest updates of an epoch, decides `repeat`.

    Args:
        settings: what `read_settings` gives.
        train_set: videos for training.
        processes: number of processes.

    Raises:
        RecipeError: an invalid value, or an open one that can't be decided.
    """
    settings, videos = dict(settings), len(train_set.samples)
    if not videos:
        raise RecipeError("there are no videos for training")
    usual = {f.name: f.default for f in fields(Recipe)}
    if AUTO in (settings.get(name) for name in ("num_frames", "stride", "size")):
        name, checkpoint = settings.get("model", usual["model"]), settings.get("checkpoint", "")
        if settings.get("pretrained", True) and not checkpoint:
            name = _tagged(name)
        model = _on_meta(name, settings.get("model_args", {}), checkpoint)
        is_image = model.num_frames == 1
        stride = DEFAULT_STRIDE if is_image or model.stride is None else model.stride
        size = model.img_size[0] if model.img_size[0] == model.img_size[1] else model.img_size
        clip = {"num_frames": IMAGE_FRAMES if is_image else model.num_frames, "stride": stride, "size": size}
        settings |= {name: value for name, value in clip.items() if settings.get(name) == AUTO}
    if settings.get("batch_size") == AUTO:
        settings["batch_size"] = 1 << (max(1, min(MOST_CLIPS, videos) // processes).bit_length() - 1)
    if settings.get("warmup_epochs") == AUTO:
        settings["warmup_epochs"] = min(1.0, int(settings.get("epochs", usual["epochs"])) / 10)
    if settings.get("flip") == AUTO:
        settings["flip"] = 0.0 if any(map(SIDES.search, train_set.classes)) else 0.5
    if settings.get("precision") == AUTO:
        settings["precision"] = "bf16" if _has_bf16() else "no"
    updates = settings.pop(EPOCH_UPDATES, 0)
    if left := [name for name, value in settings.items() if value == AUTO]:
        raise RecipeError(f"{', '.join(left)} can't be {AUTO!r}; give a value")
    recipe = Recipe(**settings)
    if not updates or "repeat" in settings:
        return recipe
    if not isinstance(updates, int) or updates < 0:
        raise RecipeError(f"{EPOCH_UPDATES} is {updates!r}; it must be a whole number, 0 or more")
    return replace(recipe, repeat=math.ceil(updates * recipe.batch_size * processes / videos))


def make_plan(
    recipe: Recipe, train_set: Annotations, val_set: Annotations, processes: int = 1, linear_probe: bool = False
) -> Plan:
    """What a run of `train` or `linear_probe` with these arguments will do. Nothing is decoded, and no model is run.

    Raises:
        RecipeError: there is no video for validation, or the model can't be made.
    """
    if not val_set.samples:
        raise RecipeError(NO_VALIDATION)
    warnings: list[str] = []
    epoch_updates = len(train_set.samples) * recipe.repeat // (recipe.batch_size * processes)
    updates, warmup = recipe.epochs * epoch_updates, round(recipe.warmup_epochs * epoch_updates)
    rate = recipe.scaled(recipe.lr, processes)
    weights, own = _start(recipe)
    model = _on_meta(
        recipe.model,
        recipe.model_args,
        num_classes=len(train_set.classes),
        num_frames=recipe.num_frames,
        img_size=recipe.img_size,
    )
    cost = count_cost(model)
    params = f"{cost.params / 1e6:.2f} M parameters"
    if recipe.freeze_backbone:
        params += f", of which {sum(p.numel() for p in head_of(model).parameters()) / 1e6:.3g} M are trained"
        if not (recipe.pretrained or recipe.checkpoint):
            warnings.append("the frozen backbone is drawn at random; set pretrained=true, or give a checkpoint")
    height, width = recipe.img_size
    clip = f"{number_of(recipe.num_frames, 'frame')} of {height}×{width}, {recipe.clip.spacing}"
    if own is not None and (own.num_frames, own.img_size) != (recipe.num_frames, recipe.img_size):
        factor = cost.total_macs / count_cost(own).total_macs
        theirs = f"{number_of(own.num_frames, 'frame')} of {own.img_size[0]}×{own.img_size[1]}"
        warnings.append(
            f"clips are {number_of(recipe.num_frames, 'frame')} of {height}×{width}, and the weights are for "
            f"{theirs}: {factor:.3g} times the cost, and weights that have to adapt. Set num_frames={own.num_frames} "
            f"size={_size_text(own.img_size)} unless you mean it"
        )
    if rate < LEAST_RATE and not linear_probe:
        scaled = f" ({recipe.lr:g} for 256 clips, scaled to {recipe.batch_size * processes})" if recipe.scale_lr else ""
        remedy = "lr, or set scale_lr=false" if recipe.scale_lr else "lr"
        warnings.append(f"the learning rate is {rate:.2g}{scaled}, at which little is learnt; raise {remedy}")
    if updates < max(2 * warmup, LEAST_UPDATES) and not linear_probe:
        warnings.append(
            f"only {number_of(updates, 'update')}, {warmup} of them warm-up: too few to learn much. Raise "
            "epochs or repeat" + (", or lower warmup_epochs" if warmup > updates / 2 else "")
        )
    run = [
        (
            "updates",
            f"{updates} of {number_of(recipe.batch_size * processes, 'clip')}: {number_of(recipe.epochs, 'epoch')}"
            + (f" of {recipe.repeat} clips of each video" if recipe.repeat > 1 else ""),
        ),
        ("rate", f"{rate:.3g} with {recipe.opt}, after {number_of(warmup, 'update')} of warm-up"),
    ]
    names = ", ".join(train_set.classes[:SHOWN_CLASSES]) + ", ..." * (len(train_set.classes) > SHOWN_CLASSES)
    facts = [
        ("videos", _videos(train_set, val_set, recipe.dataset in SOURCES, warnings)),
        *([("classes", names)] if names else []),
        ("model", f"{recipe.model}, {params}, weights: {weights}"),
        ("clip", f"{clip}: {cost.total_macs / 1e9:.3g} G multiply-adds"),
        ("device", f"{_device()}, {PRECISION_WORDS[recipe.precision]}"),
        *([("probe", "logistic regression on the videos' features, which are computed once")] if linear_probe else []),
        *(run if not linear_probe else []),
        *([("loss", "binary cross entropy of each class; measured by mAP")] if train_set.is_multilabel else []),
        *([("teacher", recipe.teacher)] if recipe.teacher else []),
    ]
    return Plan(facts, warnings, updates)


def _videos(train_set: Annotations, val_set: Annotations, is_cut: bool, warnings: list[str]) -> str:
    """The videos and their classes in words; adds warnings."""
    classes, several = train_set.classes, train_set.is_multilabel
    if not classes:
        return f"{len(train_set.samples)} for training, without labels, and {len(val_set.samples)} for validation"
    train, val = ([0] * len(classes), [0] * len(classes))
    for counts, part in ((train, train_set), (val, val_set)):
        for i in (i for _, label in part.samples for i in each(label)):
            counts[i] += 1
    few = [name for name, count in zip(classes, train, strict=True) if count < 2]
    unseen = [name for name, count in zip(classes, val, strict=True) if not count]
    if few:
        warnings.append(
            f"fewer than two videos for training in {number_of(len(few), 'class')}, first {few[0]}: add some"
        )
    if unseen:
        warnings.append(
            f"no video for validation in {number_of(len(unseen), 'class')}, first {unseen[0]}: it can't be measured"
        )
    videos, val_videos = len(train_set.samples), len(val_set.samples)
    if val_videos < LEAST_VAL:
        meaning = "the mAP is rough" if several else f"each is {100 / max(1, val_videos):.0f} points of accuracy"
        warnings.append(f"only {number_of(val_videos, 'video')} for validation: {meaning}")
    largest, smallest = max(train), min(train)
    most, fewest = classes[train.index(largest)], classes[train.index(smallest)]
    spread = f"{smallest} ({fewest}) to {largest} ({most})" if largest > smallest else str(largest)
    labels = f" with several labels ({sum(train) / videos:.1f} on average)" if several else ""
    text = (
        f"{videos} for training{labels}, {spread} of each of {number_of(len(classes), 'class')}, and {val_videos} "
        "for validation"
    )
    if is_cut:
        text += ", taken from the training part by source"
    missing = len(train_set.missing) + len(val_set.missing)
    return text + (f"; {missing} missing" if missing else "")


def _start(recipe: Recipe) -> tuple[str, EtMamba | None]:
    """The weights that a run starts from in words, and a model of the clips that they are for; None if of no video."""
    if not recipe.checkpoint and not recipe.pretrained:
        return "drawn at random", None
    name = recipe.model if recipe.checkpoint else _tagged(recipe.model)
    if not recipe.checkpoint and ":" not in name and find_checkpoint(name) is None:
        raise RecipeError(
            f"{name} has no weights to start from; give a file (--checkpoint, or the setting checkpoint), or set "
            "pretrained=false to start from scratch"
        )
    words, own = recipe.checkpoint or name, _on_meta(name, recipe.model_args, recipe.checkpoint)
    entry = None if recipe.checkpoint or ":" in name else find_checkpoint(name)
    if entry is not None:
        words += " (in the package)" if entry.folder else f" (from {entry.source['repo']}, unless it is in the cache)"
    is_other = own.num_frames == 1 or (entry is not None and not entry.is_classifier)  # a warm start, or of images
    return words, None if is_other else own


def _tagged(name: str) -> str:
    """A model's name with the tag of the weights that it stands for, if there are any."""
    entry = None if ":" in name else find_checkpoint(name)
    return entry.name if entry else name


def _on_meta(name: str, model_args: Mapping, checkpoint: str = "", **kwargs) -> EtMamba:
    """A model without data, of the clips of its checkpoint or tag unless `kwargs` has others."""
    if checkpoint:
        kwargs |= {"pretrained": True, "pretrained_cfg_overlay": {"file": checkpoint}}
    try:
        model = timm.create_model(name, device="meta", **(dict(model_args) | kwargs))
    except TypeError as error:
        raise RecipeError(f"model {name!r} with model_args {dict(model_args)}: {error}") from error
    if not isinstance(model, EtMamba):
        raise RecipeError(f"model {name!r} isn't a model of this package; `etmamba info` lists them")
    return model


def _device() -> str:
    """What accelerate will run on, in words."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = os.environ.get("ACCELERATE_TORCH_DEVICE", found)
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        name = "cpu"
    return torch.cuda.get_device_name(name) if name.startswith("cuda") else name


def _has_bf16() -> bool:
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.cuda.is_bf16_supported()
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # older versions of PyTorch lack them
    return any(getattr(torch.cpu, name, bool)() for name in names)


def _size_text(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"
