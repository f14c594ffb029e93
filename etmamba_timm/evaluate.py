"""A model's scores on annotated videos: averaged over views, and what they come to."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .data import EvalClips, collate


@dataclass(frozen=True)
class Scores:
    """Class probabilities of the videos that could be decoded.

    Attributes:
        probabilities: [videos, classes], the mean over each video's views.
        labels: [videos].
        indices: [videos], into the dataset, ascending.
        failed: videos that couldn't be decoded; they count in no figure.
        classes: names of the classes.
    """

    probabilities: Tensor
    labels: Tensor
    indices: Tensor
    failed: int
    classes: list[str]

    def topk(self, k: int) -> float:
        """Share of videos whose class is among the k likeliest."""
        k = min(k, self.probabilities.shape[1])
        return (self.probabilities.topk(k).indices == self.labels[:, None]).any(1).double().mean().item()

    def per_class(self) -> list[float | None]:
        """Each class's share of videos that are recognised; None for a class without videos."""
        right = (self.probabilities.argmax(1) == self.labels).double()
        of = [right[self.labels == i] for i in range(len(self.classes))]
        return [values.mean().item() if len(values) else None for values in of]

    def figures(self) -> dict:
        """Top-1, top-5, mean per-class accuracy, and the numbers of videos behind them."""
        known = [value for value in self.per_class() if value is not None]
        return {
            "top1": self.topk(1),
            "top5": self.topk(5),
            "mean_class": sum(known) / len(known),
            "videos": len(self.labels),
            "failed": self.failed,
        }

    def save(self, path: str | Path) -> None:
        """Scores, labels and indices as a safetensors file, classes in its metadata."""
        import json

        from safetensors.torch import save_file

        tensors = {name: getattr(self, name).contiguous() for name in ("probabilities", "labels", "indices")}
        save_file(tensors, str(path), {"classes": json.dumps(self.classes), "failed": str(self.failed)})


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    videos: EvalClips,
    batch_size: int = 8,
    workers: int = 0,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> Scores:
    """Softmax scores of each video, averaged over its views.

    The same for any batch size and any number of processes, but for rounding.

    Args:
        model: clips [B, C, T, H, W] -> logits [B, classes].
        videos: the videos and their views.
        batch_size: videos at a time in each process.
        workers: processes that decode, for each process.
        accelerator: of the processes that share the work; one process by default.
        progress: whether to show a bar.
    """
    accelerator = accelerator or Accelerator()
    loader = DataLoader(Owned(videos, accelerator), batch_size, num_workers=workers, collate_fn=collate)
    was_training = model.training
    model.eval().to(accelerator.device)
    parts = []
    for batch in tqdm(loader, disable=not (progress and accelerator.is_main_process), desc="evaluate", leave=False):
        if batch is None:
            continue
        clips = batch["clip"].to(accelerator.device)
        with accelerator.autocast():
            logits = model(clips.flatten(0, 1))  # [B, views, ...] -> [B·views, ...]
        scores = logits.double().softmax(-1).unflatten(0, clips.shape[:2]).mean(1)
        parts.append((batch["index"], batch["label"], scores.cpu()))
    model.train(was_training)
    gathered = [part for parts in _all(parts, accelerator) for part in parts]
    if not gathered:
        raise ValueError(f"none of the {len(videos)} videos can be decoded")
    indices, labels, scores = (torch.cat(tensors) for tensors in zip(*gathered, strict=True))
    order = indices.argsort()
    failed = len(videos) - len(indices)
    return Scores(scores[order].float(), labels[order], indices[order], failed, videos.annotations.classes)


class Owned(torch.utils.data.Dataset):
    """The videos that one of several processes sees to: every n-th."""

    def __init__(self, videos: EvalClips, accelerator: Accelerator) -> None:
        self.videos = videos
        self.own = range(accelerator.process_index, len(videos), accelerator.num_processes)

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, i: int) -> dict | None:
        return self.videos[self.own[i]]


def _all(parts: list, accelerator: Accelerator) -> list[list]:
    """What each process has, in all of them."""
    if accelerator.num_processes == 1:
        return [parts]
    out = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(out, parts)
    return out
