"""Evaluation: a model's scores on annotated videos, averaged over views, and its accuracy."""

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm import tqdm

from ..data import EvalClips, VideoError
from ..data.dataset import target
from ..files import whole_file
from ..views import check_is_model, mean_over_views
from ..words import number_of
from .progress import Timer

_logger = logging.getLogger(__name__)

# What is measured, by its key in `Scores.metrics`; the first chooses the best epoch.
METRICS = {"top1": "top-1", "top5": "top-5", "mean_class": "mean of classes"}
MULTILABEL_METRICS = {"map": "mAP"}


@dataclass(frozen=True)
class Scores:
    """Class probabilities of the videos that could be decoded.

    Attributes:
        probabilities: float32 [videos, classes], the mean over each video's views.
        labels: [videos]; if videos have several labels, float32 [videos, classes] of zeros and ones.
        indices: [videos], into the dataset, ascending.
        failed: number of videos that couldn't be decoded. They don't count in the metrics.
        missing: number of listed videos that don't exist. They don't count either.
        classes: class names.
    """

    probabilities: Tensor
    labels: Tensor
    indices: Tensor
    failed: int
    missing: int
    classes: list[str]

    @property
    def is_multilabel(self) -> bool:
        """Whether a video may have several labels."""
        return self.labels.ndim == 2

    def topk(self, k: int) -> float:
        """Top-k accuracy, in [0, 1]; among equal probabilities, the first class ranks higher."""
        true = self.probabilities.gather(1, self.labels[:, None])
        is_earlier = torch.arange(self.probabilities.shape[1]) < self.labels[:, None]
        ranks_higher = (self.probabilities > true) | (self.probabilities == true) & is_earlier
        return (ranks_higher.sum(1) < k).double().mean().item()

    def per_class(self) -> list[float | None]:
        """Top-1 accuracy of each class, or average precision for several labels; None for a class without videos."""
        if self.is_multilabel:
            pairs = zip(self.probabilities.T.numpy(), self.labels.T.numpy(), strict=True)
            return [average_precision(scores, labels) if labels.any() else None for scores, labels in pairs]
        correct = (self.probabilities.argmax(1) == self.labels).double()
        by_class = [correct[self.labels == i] for i in range(len(self.classes))]
        return [values.mean().item() if len(values) else None for values in by_class]

    def metrics(self) -> dict[str, float]:
        """Top-1, top-5 and mean class accuracy, and the numbers of videos: evaluated, failed and missing.

        For several labels instead of these accuracies "map", the mean average precision of the classes with videos.
        """
        known = [value for value in self.per_class() if value is not None]
        mean = sum(known) / max(1, len(known))
        if self.is_multilabel:
            measured = {"map": mean}
        else:
            measured = {"top1": self.topk(1), "top5": self.topk(5), "mean_class": mean}
        return measured | {"videos": len(self.labels), "failed": self.failed, "missing": self.missing}

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, completely or not at all: the tensors, and the rest as metadata."""
        tensors = {name: getattr(self, name).contiguous() for name in ("probabilities", "labels", "indices")}
        rest = {"classes": self.classes, "failed": self.failed, "missing": self.missing}
        with whole_file(path) as draft:
            draft.write_bytes(
                save(tensors, {"scores": json.dumps(rest)})
            )  # save_file makes it unreadable for other users

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of another kind.
        """
        try:
            with safe_open(path, "pt") as file:
                rest = json.loads(file.metadata()["scores"])
                return cls(**{name: file.get_tensor(name) for name in file.keys()}, **rest)  # noqa: SIM118
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} holds no scores; `etmamba eval --scores` writes them") from error


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean precision over the positives of a class, at the threshold of each; equal scores share theirs.

    Args:
        scores: of all videos, [videos].
        labels: 1 for the class's videos, of which there are some, else 0; [videos].
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last of equal scores
    hits = np.cumsum(labels[order], dtype=np.float64)[ends]
    return float((np.diff(hits, prepend=0) * hits / (ends + 1)).sum() / hits[-1])


def evaluate(
    model: nn.Module,
    videos: EvalClips,
    *,
    batch_size: int = 8,
    workers: int = 0,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Scores:
    """Computes the class scores of each video (see `class_scores`), averaged over its views.

    In a process group (torch.distributed) the processes share the videos, and each returns all scores. Apart from
    rounding, they don't depend on the batch size and the number of processes.

    Args:
        model: clips [B, C, T, H, W] -> logits [B, classes]; put into evaluation mode for the call.
        videos: the videos and their views.
        batch_size: clips per forward pass.
        workers: decoding processes, per process.
        dtype: autocast's dtype; None for no autocast.
        progress: whether to show a progress bar; without, lines are logged.

    Returns: the scores.

    Raises:
        ValueError: no video can be decoded, or the scores aren't finite.
    """
    scores, labels, indices = over_videos(
        model,
        model,
        videos,
        scores=True,
        batch_size=batch_size,
        workers=workers,
        dtype=dtype,
        progress=progress,
    )
    return Scores(
        scores.float(),
        labels,
        indices,
        failed=len(videos) - len(indices),
        missing=len(videos.annotations.missing),
        classes=list(videos.annotations.classes),
    )


def over_videos(
    model: nn.Module,
    function: Callable[[Tensor], Tensor],
    videos: EvalClips,
    *,
    scores: bool = False,
    batch_size: int,
    workers: int,
    dtype: torch.dtype | None,
    progress: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Averages `function` over each video's views. Other arguments, processes and errors are as in `evaluate`.

    Args:
        model: the module to put into evaluation mode; clips are moved to its device and dtype.
        function, scores: see `mean_over_views`.

    Returns: float64 [videos, X], labels as in `Scores`, and indices [videos] into the dataset, ascending.
    """
    check_is_model(model)
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = range(rank, len(videos), processes)
    rows: list[tuple[int, Tensor]] = []
    was_training, timer = model.training, Timer()
    model.eval()
    try:
        results = mean_over_views(
            model, function, videos.views(), own, scores=scores, batch_size=batch_size, workers=workers, dtype=dtype
        )
        bar = tqdm(results, "videos", len(own), leave=False, disable=None if progress and rank == 0 else True)
        with contextlib.closing(results):  # ends the workers
            for number, (index, result) in enumerate(zip(own, bar, strict=True)):
                if not progress and rank == 0 and timer.is_due():
                    _logger.info("evaluation: %d of %d videos", number * processes, len(videos))
                if isinstance(result, VideoError):
                    videos.leave_out(index, result)
                elif isinstance(result, Exception):
                    raise result
                else:
                    rows.append((index, result))
    finally:
        model.train(was_training)
    by_process = [rows] * processes
    if processes > 1:
        dist.all_gather_object(by_process, rows)
    found = dict(sorted((row for rows in by_process for row in rows), key=lambda row: row[0]))
    if not found:
        raise ValueError(f"none of {number_of(len(videos), 'video')} can be decoded; check the dataset")
    values = torch.stack(list(found.values()))
    if not values.isfinite().all():
        raise ValueError("the scores aren't finite; check the checkpoint, or use float32")
    samples, classes = videos.annotations.samples, len(videos.annotations.classes)
    labels = default_collate([target(samples[index][1], classes) for index in found])
    return values, labels, torch.tensor(list(found))
