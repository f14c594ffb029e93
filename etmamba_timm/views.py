"""A model over the views of many videos: one way for scores, features and evaluation.

Views of several videos share a batch. Worker processes decode ahead of the model and hand over uint8, which is
normalised on the model's device. On CUDA a batch is copied and launched while the one before it still runs.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .data import Views, read_ahead


def check_is_model(model: object) -> None:
    """Raises TypeError for another first argument than a model, such as a video."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the first argument is {model!r:.80}; give the model first, and then what it is run on")


def class_scores(model: nn.Module, logits: Tensor) -> Tensor:
    """A model's class scores [..., classes]: softmax, or the sigmoid of each if a video may be of several classes."""
    return logits.sigmoid() if getattr(model, "is_multilabel", False) else logits.softmax(-1)


def mean_over_views(
    model: nn.Module,
    function: Callable[[Tensor], Tensor],
    views: Views,
    indices: Sequence[int] | None = None,
    *,
    scores: bool = False,
    batch_size: int = 8,
    workers: int = 0,
    dtype: torch.dtype | None = None,
) -> Generator[Tensor | Exception, None, None]:
    """Averages `function` over each video's views.

    At most three batches and the views that are decoded ahead are in memory, however many videos and views there are.
    Apart from rounding, the results depend neither on the batch size nor on the workers.

    Args:
        model: clips are moved to its device and dtype.
        function: clips [B, C, T, H, W] -> [B, X].
        views: the files and their views.
        indices: which of the files, in this order; by default all.
        scores: whether to average `class_scores` of the outputs instead of the outputs.
        batch_size: views per forward pass; the last batch is smaller.
        workers: decoding processes; see `read_ahead`.
        dtype: autocast's dtype; None for no autocast.

    Yields: for each file in order, float64 [X] on the CPU, or the error because of which it has no result: the file's
        own, or the model's on a batch with views of the file.

    Raises:
        ValueError: a batch size below 1.
        RuntimeError: the workers don't start.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
    weight = next(model.parameters())
    device, on_cuda = weight.device, _is_cuda(weight.device)
    autocast = torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
    videos: deque[_Video] = deque()  # read, and not yielded yet
    batches: deque[_Batch] = deque([_Batch(views, batch_size, on_cuda)])  # running ones, and the one being filled

    def run() -> None:
        batch = batches[-1]
        try:
            with torch.inference_mode(), autocast:
                pixels = batch.pixels[: len(batch.videos)].to(device, non_blocking=True)
                batch.copy(function(views.transform.normalize(pixels).to(weight.dtype)))
        except (RuntimeError, MemoryError) as error:
            batch.fail(error)
        batches.append(_Batch(views, batch_size, on_cuda))

    def finished(running: int) -> Iterator[Tensor | Exception]:
        """The results that are there, with so many batches still running."""
        while len(batches) - 1 > running:
            batches.popleft().share(partial(class_scores, model) if scores else None)
        while videos and (result := videos[0].result()) is not None:
            videos.popleft()
            yield result

    latest, video = None, _Video(0)
    for index, clip in read_ahead(views, range(len(views.files)) if indices is None else indices, workers, batch_size):
        if index != latest:
            latest, video = index, _Video(views.num_clips * views.num_crops)
            videos.append(video)
        if isinstance(clip, Exception):
            video.error = clip
        else:
            for view in clip:
                batches[-1].add(view, video)
                if len(batches[-1].videos) == batch_size:
                    run()
        yield from finished(running=1 if on_cuda else 0)
    if batches[-1].videos:
        run()
    yield from finished(running=0)


class _Video:
    """A video some of whose views may still be on their way."""

    def __init__(self, num_views: int) -> None:
        self.num_views = self.missing = num_views
        self.total: Tensor | None = None  # of the outputs so far, float64 [X]
        self.error: Exception | None = None

    def add(self, output: Tensor) -> None:
        self.total = output if self.total is None else self.total + output
        self.missing -= 1

    def result(self) -> Tensor | Exception | None:
        """The mean, or an error; None if views are missing."""
        if self.error is not None:
            return self.error
        return None if self.missing or self.total is None else self.total / self.num_views


class _Batch:
    """Views of several videos, and then the model's outputs for them."""

    def __init__(self, views: Views, size: int, on_cuda: bool) -> None:
        self.pixels = torch.empty((size, *views.shape), dtype=torch.uint8, pin_memory=on_cuda)
        self.videos: list[_Video] = []  # one for each view
        self.event = torch.cuda.Event(blocking=True) if on_cuda else None  # waits without keeping a core busy

    def add(self, view: Tensor, video: _Video) -> None:
        self.pixels[len(self.videos)] = view
        self.videos.append(video)

    def copy(self, outputs: Tensor) -> None:
        """Starts to copy the outputs [B, X] from the device."""
        self.outputs = outputs.to("cpu", non_blocking=self.event is not None)
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(outputs.device))

    def share(self, scores: Callable[[Tensor], Tensor] | None) -> None:
        """Waits for the outputs and gives each video its own, or its scores."""
        try:
            if self.event is not None and self.videos:
                self.event.synchronize()
        except RuntimeError as error:
            self.fail(error)
        if self.videos:
            outputs = self.outputs.double()
            for video, output in zip(self.videos, scores(outputs) if scores else outputs, strict=True):
                video.add(output)

    def fail(self, error: Exception) -> None:
        for video in self.videos:
            video.error = error
        self.videos = []


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"
