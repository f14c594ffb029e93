"""Teachers of distillation: trained models of this package, and video classifiers of transformers."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.config import CONFIG_FILE, MULTILABEL
from ..checkpoints.fetch import fetch
from ..clip import Clip
from ..data import EvalTransform, Views
from ..data.embedded import VideoFile
from ..features import checksum
from ..predict import finite, load_model
from ..views import mean_over_views


class TeacherError(ValueError):
    """The teacher can't be loaded, or doesn't fit the student; the message says what to do."""


class Teacher(nn.Module):
    """A frozen classifier of videos, in evaluation mode.

    Args:
        model: the classifier.
        head: its last layer, which takes its features.
        classes: names of its classes; numbers if they have none.
        clip, transform: the clips it takes.
        argument: the name under which `model` takes clips [B, T, C, H, W]; '' if it takes [B, C, T, H, W] as they are.

    Attributes:
        features: [B, D], of the latest clips.
        width: D.
    """

    features: Tensor

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        classes: Sequence[str],
        clip: Clip,
        transform: EvalTransform,
        argument: str = "",
    ) -> None:
        super().__init__()
        if not isinstance(head, nn.Linear) or len(transform.mean) != 3:
            raise TeacherError("the teacher has no classifier, or doesn't take RGB clips; give another")
        problem = getattr(getattr(model, "config", None), "problem_type", None)  # of transformers
        if getattr(model, "is_multilabel", False) or problem == MULTILABEL:
            raise TeacherError("the teacher gives a video several labels; give one whose classes exclude each other")
        self.model, self.classes, self.clip, self.transform = model.float(), list(classes), clip, transform
        self.argument, self.width = argument, head.in_features
        head.register_forward_pre_hook(lambda _, inputs: setattr(self, "features", inputs[0]))
        self.requires_grad_(False).eval()

    def forward(self, clips: Tensor) -> Tensor:
        """Clips [B, C, T, H, W], normalised by `transform` -> logits [B, classes]."""
        if self.argument:
            return self.model(**{self.argument: clips.transpose(1, 2)}).logits
        return self.model(clips)

    def checksum(self) -> str:
        """A short text that is the same for the same weights."""
        return checksum(self.state_dict().values())


def load_teacher(name: str) -> Teacher:
    """Loads a teacher.

    Args:
        name: a model of this package as `load_model` takes it ('etmamba_ti.mocap', 'local-dir:FOLDER'); or a folder or
            an id on the Hub, of this package or of transformers. The `config.json` says which: transformers' has a
            `model_type`, ours an `architecture`.

    Raises:
        TeacherError: neither of these, transformers isn't installed, or a model without trained weights.
    """
    where = name.removeprefix("local-dir:").removeprefix("hf-hub:")
    if name.startswith("local-dir:") or Path(where).is_dir():
        name, config = f"local-dir:{where}", Path(where, CONFIG_FILE)
        if not config.is_file():
            raise TeacherError(
                f"teacher {where} has no {CONFIG_FILE}; name the folder of a model, such as RUN/model of a run"
            )
    elif name.startswith("hf-hub:") or where.count("/") == 1:
        try:
            name, config = f"hf-hub:{where}", fetch(where, CONFIG_FILE)
        except RuntimeError as error:
            raise TeacherError(f"teacher {where} is no folder here, and not on the Hub either: {error}") from error
    else:
        return _of_this_package(name)
    try:
        stated = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TeacherError(f"teacher {where}: {config} can't be read as JSON ({error})") from error
    if isinstance(stated, dict) and "model_type" in stated and "architecture" not in stated:
        return _of_transformers(where)
    return _of_this_package(name)


def _of_this_package(name: str) -> Teacher:
    try:
        model = load_model(name)
    except (ValueError, RuntimeError, OSError) as error:
        raise TeacherError(
            f"teacher {name!r}: {error}. A teacher is a trained model of this package, or a folder or Hub id of a "
            "video classifier of transformers"
        ) from error
    names = model.pretrained_cfg.get("label_names") or ()
    classes = names if len(names) == model.num_classes else [str(i) for i in range(model.num_classes)]
    transform = EvalTransform.from_model(model, size=model.img_size)
    return Teacher(model, model.get_classifier(), classes, model.clip, transform)


def _of_transformers(where: str) -> Teacher:
    try:
        from transformers import AutoModelForVideoClassification, AutoVideoProcessor
    except ImportError as error:
        raise TeacherError(
            f"teacher {where} is a model of transformers ({error}); pip install 'etmamba-timm[teacher]'"
        ) from error
    try:
        model, report = AutoModelForVideoClassification.from_pretrained(where, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise TeacherError(f"teacher {where} is no video classifier that transformers loads: {error}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise TeacherError(f"teacher {where} isn't trained as a classifier: {missing[0]} isn't in its weights")
    try:
        processor = AutoVideoProcessor.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise TeacherError(
            f"teacher {where} has no processor, which says how pixels are normalised; save one there by its "
            f"save_pretrained ({str(error).splitlines()[0]})"
        ) from error
    config = model.config
    side = getattr(config, "image_size", None) or config.crop_size  # V-JEPA 2 has a crop_size
    frames = getattr(config, "num_frames", None) or config.frames_per_clip
    size = (side, side) if isinstance(side, int) else tuple(side)
    classes = [config.id2label[i] for i in range(config.num_labels)]
    if classes == [f"LABEL_{i}" for i in range(config.num_labels)]:  # transformers' own, for lack of names
        classes = [str(i) for i in range(config.num_labels)]
    mean, std = _normalisation(processor)
    shorter = (processor.size or {}).get("shortest_edge") or min(size)
    transform = EvalTransform(size=size, mean=mean, std=std, crop_pct=min(1.0, min(size) / shorter))
    return Teacher(model, model.classifier, classes, Clip(frames), transform, model.main_input_name)


def _normalisation(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels in [0, 1], as the processor subtracts them and divides by them.

    They are measured on a black and a white picture: processors differ in what they do beside their mean and std.
    """
    pictures = torch.tensor([0.0, 255.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    black, white = processor.rescale_and_normalize(
        pictures,
        processor.do_rescale,
        processor.rescale_factor,
        processor.do_normalize,
        tuple(processor.image_mean),
        tuple(processor.image_std),
    ).flatten(1)
    std = 1 / (white - black)
    return tuple((-black * std).tolist()), tuple(std.tolist())


def scores_of_videos(
    teacher: Teacher, files: Sequence[VideoFile], *, num_clips: int, num_crops: int, **options: Any
) -> Iterator[Tensor | Exception]:
    """A teacher's scores of videos, with its own clips: float32 [classes], softmax averaged over views, or an error.

    Args:
        teacher: the teacher.
        files: the videos.
        num_clips, num_crops: views of a video, as in `predict`.
        options: of `mean_over_views`.
    """
    views = Views(files, teacher.transform, teacher.clip, num_clips, num_crops)
    return finite(mean_over_views(teacher, teacher, views, scores=True, **options), files)
