"""Distillation: a model learns a teacher's class probabilities and features, beside the true labels or without any."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from ..data import Annotations, EvalTransform
from ..data.embedded import VideoFile
from ..data.sampling import sample_segments
from ..features import SUFFIX, checksum, read_features, read_settings
from ..models import EtMamba
from ..words import number_of
from .recipe import Recipe
from .teacher import Teacher, TeacherError, load_teacher

_logger = logging.getLogger(__name__)

PROJECTION = "teacher_projection"  # a submodule of the student while it is trained


class Distillation:
    """The loss of a student that has a teacher.

    A live teacher sees the student's own clip, augmented and mixed, in its own number of frames, size and
    normalisation. Stored probabilities are of whole videos, so they don't depend on the clip.

    Args:
        recipe: the settings.
        train_set: the training videos; without classes, the student gets the teacher's.
        accelerator: its device and precision are the teacher's too.

    Attributes:
        classes: of the student.

    Raises:
        TeacherError: the teacher can't be loaded, lacks classes, or doesn't fit the recipe.
    """

    def __init__(self, recipe: Recipe, train_set: Annotations, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        self.teacher: Teacher | None = None
        self.stored: Tensor | None = None  # log probabilities of each training video; NaN for those without
        self.own_features: Tensor | None = None
        self.weight = recipe.teacher_weight if train_set.classes else 1.0
        if self.weight and train_set.is_multilabel:
            raise TeacherError(
                "videos have several labels, and a teacher's classes exclude each other; leave teacher out, or learn "
                "its features alone: teacher_weight=0 and feature_weight=1"
            )
        if is_stored(recipe.teacher):
            if recipe.feature_weight or recipe.mixup or recipe.cutmix:
                raise TeacherError(
                    f"{recipe.teacher} holds class probabilities of whole videos, which fit neither feature_weight nor "
                    "mixup nor cutmix: set these to 0, or name the teacher itself"
                )
            scores, names = _stored_scores(recipe.teacher, [file for file, _ in train_set.samples])
            self.stored = scores.to(accelerator.device).log()
            self._checksum = checksum([scores])
        else:
            self.teacher = load_teacher(recipe.teacher).to(accelerator.device)
            self._checksum, names = self.teacher.checksum(), self.teacher.classes
        self.classes, self._chosen = list(train_set.classes) or names, None
        if self.weight and self.classes != names:
            chosen = match_classes(self.classes, names, recipe.teacher)
            self._chosen = torch.tensor(chosen, device=accelerator.device)

    def attach(self, model: EtMamba, transform: EvalTransform) -> None:
        """Prepares for a student; call it before its optimiser is made.

        Args:
            model: the student; with `feature_weight` it gets a submodule, `PROJECTION`.
            transform: has the mean and std of its clips.
        """
        if self.teacher is None:
            return
        device, own, wanted = self.accelerator.device, transform, self.teacher.transform
        mean, std, wanted_mean, wanted_std = (
            torch.tensor(values, device=device).view(-1, 1, 1, 1)
            for values in (own.mean, own.std, wanted.mean, wanted.std)
        )
        self._scale, self._shift = std / wanted_std, (mean - wanted_mean) / wanted_std
        frames = sample_segments(self.recipe.num_frames, self.teacher.clip.num_frames)[0]
        self._frames = torch.tensor(frames, device=device)
        if self.recipe.feature_weight:
            projection = nn.Linear(model.embed_dim, self.teacher.width)
            setattr(model, PROJECTION, projection)

            def keep(head: nn.Module, inputs: tuple[Tensor]) -> None:
                self.own_features = projection(inputs[0])

            model.get_classifier().register_forward_pre_hook(keep)

    def loss(
        self,
        criterion: Callable[[Tensor, Tensor], Tensor],
        logits: Tensor,
        target: Tensor,
        clips: Tensor,
        indices: Tensor,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            criterion: the loss of the true labels.
            logits: of the student, [B, classes].
            target: labels or mixed labels, as `criterion` takes them.
            clips: the student's, [B, C, T, H, W].
            indices: of the clips' videos in the training set, [B].
        """
        parts = []
        if self.teacher is None:
            assert self.stored is not None
            taught = self.stored[indices.to(self.stored.device)]
        else:
            with torch.no_grad(), self.accelerator.autocast():
                taught = self.teacher(self.view(clips)).float()
            if self.recipe.feature_weight:
                assert self.own_features is not None
                features = self.teacher.features.float()
                likeness = functional.cosine_similarity(self.own_features.float(), features, dim=1)
                parts.append(self.recipe.feature_weight * (1 - likeness).mean())
        if self.weight:
            if self._chosen is not None:
                taught = taught[:, self._chosen]
            parts.append(self.weight * soft_loss(logits.float(), taught, self.recipe.temperature))
        if self.weight < 1:
            parts.append((1 - self.weight) * criterion(logits, target))
        return torch.stack(parts).sum()

    def view(self, clips: Tensor) -> Tensor:
        """The student's clips [B, C, T, H, W] as the live teacher takes them."""
        assert self.teacher is not None
        clips = clips.float()
        if clips.shape[2] != len(self._frames):
            clips = clips.index_select(2, self._frames)
        if (size := self.teacher.transform.size) != tuple(clips.shape[-2:]):
            pictures = clips.transpose(1, 2).flatten(0, 1)  # [B·T, C, H, W]
            pictures = functional.interpolate(pictures, size, mode="bilinear", antialias=True)
            clips = pictures.unflatten(0, (len(clips), -1)).transpose(1, 2)
        return clips * self._scale + self._shift

    def state_dict(self) -> dict:
        """For accelerate: what must be the same to resume. The teacher itself isn't saved."""
        return {"teacher": self._checksum}

    def load_state_dict(self, state: dict) -> None:
        """For accelerate. Raises TeacherError if the teacher is another than before."""
        if state["teacher"] != self._checksum:
            raise TeacherError(
                f"teacher {self.recipe.teacher} has changed since the run began ({state['teacher']} then, "
                f"{self._checksum} now); restore it, or start a new run"
            )


def soft_loss(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """The divergence of the student's probabilities from the teacher's, times temperature², averaged over the batch.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015.

    Args:
        logits: of the student, [B, classes].
        taught: logits of the teacher, [B, classes]; a video whose row has NaN doesn't count.
        temperature: divides both.
    """
    is_taught = taught.isnan().any(1).logical_not()
    taught = torch.where(is_taught[:, None], taught, 0.0)
    own, wanted = (functional.log_softmax(values / temperature, dim=1) for values in (logits, taught))
    divergences = functional.kl_div(own, wanted, reduction="none", log_target=True).nan_to_num().sum(1)
    return temperature**2 * (divergences * is_taught).mean()


def match_classes(classes: Sequence[str], names: Sequence[str], teacher: str) -> list[int]:
    """The index in `names`, the teacher's classes, of each of `classes`.

    Names are compared as they are or, if that doesn't do, without regard to case, spaces and punctuation, as long as
    that leaves all of them different. A teacher may have more classes; its probabilities are then of those in common.

    Raises:
        TeacherError: the teacher lacks some of the classes.
    """
    for key in (str, _simplified):
        number = {key(name): i for i, name in enumerate(names)}
        if len(number) == len(names) and len(set(map(key, classes))) == len(classes):
            found = [number[key(name)] for name in classes if key(name) in number]
            if len(found) == len(classes):
                if len(names) > len(classes):
                    _logger.info("%d of the %d classes of %s are used", len(found), len(names), teacher)
                return found
    known = set(map(_simplified, names))
    missing = [name for name in classes if _simplified(name) not in known] or list(classes)
    raise TeacherError(
        f"teacher {teacher} lacks {len(missing)} of {number_of(len(classes), 'class')}, "
        f"first {', '.join(missing[:3])}; it has {len(names)}: {', '.join(names[:3])}, ... Give "
        "a teacher with these classes, or learn its features alone: teacher_weight=0 and feature_weight=1"
    )


def named_as(annotations: Annotations, classes: list[str], teacher: str) -> Annotations:
    """Validation videos with all of the teacher's classes, matched by name.

    Raises:
        TeacherError: a class that the teacher lacks, or videos without labels.
    """
    if not annotations.classes:
        raise TeacherError("the validation videos have no labels; put some into folders val/<class>/")
    numbers = match_classes(annotations.classes, classes, teacher)
    return annotations.renumbered(numbers, classes)


def is_stored(teacher: str) -> bool:
    """Whether a teacher is a file or a folder of shards that `etmamba teach` wrote."""
    return Path(teacher).suffix == SUFFIX or any(Path(teacher).glob(f"features-*{SUFFIX}"))


def video_name(file: VideoFile, root: Path) -> str:
    """The name under which a video's probabilities are stored: its path in the dataset's folder."""
    with contextlib.suppress(ValueError, TypeError):
        return Path(file).relative_to(root).as_posix()  # type: ignore[arg-type]  # a video in a row raises TypeError
    return str(file)


def _stored_scores(path: str, files: Sequence[VideoFile]) -> tuple[Tensor, list[str]]:
    """Probabilities [videos, classes] of the files, with NaN for those without any; and the names of the classes."""
    try:
        scores, names = read_features(path)
        classes = json.loads(read_settings(path)["classes"])
    except KeyError:
        raise TeacherError(f"{path} holds features and no class probabilities; `etmamba teach` writes them") from None
    except (OSError, ValueError) as error:
        raise TeacherError(f"{error}. A teacher's stored probabilities are written by `etmamba teach`") from error
    rows = {tuple(name.split("/")): row for row, name in enumerate(names)}
    lengths = sorted(set(map(len, rows)), reverse=True)
    found = []
    for file in files:
        parts = tuple(str(file).replace(os.sep, "/").split("/"))
        found.append(next((rows[parts[-n:]] for n in lengths if parts[-n:] in rows), len(names)))
    missing = [str(file) for file, row in zip(files, found, strict=True) if row == len(names)]
    if min(found) == len(names):
        raise TeacherError(f"{path} has none of the training videos, such as {files[0]}; but {names[0]} and others")
    if missing:
        _logger.warning(
            "%s lacks %d of %s, which have no teacher: first %s",
            path,
            len(set(missing)),
            number_of(len(set(map(str, files))), "training video"),
            missing[0],
        )
    return torch.cat([scores, torch.full_like(scores[:1], torch.nan)])[found], classes


def _simplified(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())
