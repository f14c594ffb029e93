"""Class scores over time in a long video, and segments made from them."""

import csv
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..data import EvalTransform, FrameFolder, VideoReader, open_video
from ..files import check_file, whole_file
from ..models import EtMamba
from ..predict import check_model, class_names
from ..views import class_scores
from .plots import check_plot_file, new_figure, save_figure, short

MOST_ROWS = 12  # classes in a plot


@dataclass(frozen=True)
class Timeline:
    """Class scores over a video.

    Attributes:
        times: float64 [moments, 2], start and end of each moment in seconds; each starts where the previous one ends.
        probabilities: float32 [moments, classes].
        classes: class names.
    """

    times: Tensor
    probabilities: Tensor
    classes: list[str]

    def segments(self, smooth: int = 3) -> list["Segment"]:
        """Joins neighbouring moments with the same top class into segments.

        Args:
            smooth: number of moments to average over (fewer at both ends) before taking the top class, so that a class
                that leads for a single moment makes no segment. Odd; 1 for no smoothing.

        Returns: the segments in order of time.

        Raises:
            ValueError: `smooth` isn't a positive odd number.
        """
        if smooth < 1 or smooth % 2 == 0:
            raise ValueError(f"smooth is {smooth}; it must be an odd number of moments, 1 for no smoothing")
        averaged = F.avg_pool1d(self.probabilities.T, smooth, 1, smooth // 2, count_include_pad=False).T
        best = averaged.argmax(1)
        starts = [0, *((best[1:] != best[:-1]).nonzero()[:, 0] + 1).tolist(), len(best)]
        segments = []
        for first, end in pairwise(starts):
            spans = self.times[first:end]
            weights = (spans[:, 1] - spans[:, 0]) / (spans[-1, 1] - spans[0, 0])
            score = (self.probabilities[first:end, best[first]].double() * weights).sum().item()
            segments.append(Segment(spans[0, 0].item(), spans[-1, 1].item(), self.classes[best[first]], score))
        return segments


@dataclass(frozen=True)
class Segment:
    """A part of a video in which one class has the highest score.

    Attributes:
        start, end: in seconds from the first frame.
        label: the class name.
        score: the mean probability of the class.
    """

    start: float
    end: float
    label: str
    score: float


def timeline(
    model: EtMamba,
    path: str | Path,
    *,
    clip_seconds: float | None = None,
    hop: float | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Timeline:
    """Computes class scores over a video of any length, with a sliding clip.

    A clip starts every `hop` seconds, and the last one ends with the video. Its `model.num_frames` frames are evenly
    spaced in time, also if the frame rate varies. A moment lasts from one start to the next; its scores are the mean
    over the clips that cover its middle. The file is decoded once, and only the frames of a batch of clips, and of
    those overlapping it, are in memory. A video shorter than a clip repeats its last frame; if the model's clips are
    spread over whole videos, the clip is shortened instead.

    Args:
        model: as in `predict`; it sees the centre crop.
        path: a video file.
        clip_seconds: duration of a clip; by default that of the model's `clip`, with stride 2 if unknown.
        hop: seconds from the start of one clip to the next; by default half a clip.
        batch_size: clips per forward pass.
        dtype: autocast's dtype; None for no autocast.
        progress: whether to show a progress bar.

    Returns: the scores.

    Raises:
        VideoError: as `predict`; also if the file has no frame rate.
        ValueError: a hop longer than a clip; no `clip_seconds` for a model whose clips are spread over whole videos;
            a model in training mode or without classes; scores that aren't finite.
    """
    check_model(model, need_classes=True)
    clip = model.clip.known()
    if clip_seconds is None and clip.is_spread:
        raise ValueError(
            "the model's clips are spread over whole videos, so they have no fixed duration; set clip_seconds to the "
            "length of the videos it was trained on (Kinetics: 10)"
        )
    reader = open_video(path)
    shown, fps = reader.times(), reader.info.fps
    length = shown[-1] + 1 / fps  # the last frame's duration is unknown: the average is assumed
    span = clip_seconds
    if span is None:
        assert isinstance(clip.stride, int)  # 'spread' was refused above
        span = clip.num_frames * clip.stride / fps
    hop = span / 2 if hop is None else hop
    if not 0 < hop <= span < math.inf:
        raise ValueError(
            f"clip_seconds is {span:g} and hop {hop:g}; both must be above 0, and the hop no longer than a clip, or "
            "parts of the video would be skipped: choose a shorter hop or longer clips"
        )
    if clip.is_spread:
        span = min(span, length)
    starts, times = _grid(length, span, hop)
    step = span / model.num_frames
    # Close to the middle of a step, and at the middle of a frame, where rounding errors don't matter.
    first = (max(0, (step * fps - 1) // 2) + 0.5) / fps
    ticks = [first + i * step for i in range(model.num_frames)]
    clips = [[max(0, bisect_right(shown, start + tick) - 1) for tick in ticks] for start in starts]

    transform = EvalTransform.from_model(model, size=model.img_size)
    weight = next(model.parameters())
    autocast = torch.autocast(weight.device.type, dtype) if dtype else nullcontext()
    outputs, bar = [], tqdm(total=len(clips), unit="clip", leave=False, disable=None if progress else True)
    with torch.inference_mode(), autocast, bar:
        for batch in _batches(reader, clips, transform, batch_size):
            logits = model(batch.to(weight.device, weight.dtype))
            outputs.append(class_scores(model, logits.float()).cpu())
            bar.update(len(batch))
    scores = torch.cat(outputs)
    if not scores.isfinite().all():
        raise ValueError(f"{path}: the result isn't finite; check the checkpoint, or use float32")
    return Timeline(times, _per_moment(scores, starts, span, times), class_names(model, scores.shape[1]))


def check_segments_file(path: str | Path) -> None:
    """Checks that segments can be written to `path`. Call it before the work.

    Raises:
        ValueError: another suffix than .csv or .json, or a path that can't be written.
    """
    check_file(path, (".csv", ".json"), "segments")


def write_segments(segments: list[Segment], path: str | Path) -> None:
    """Writes start, end (seconds), label and score of each segment to a .csv or .json file, completely or not at all.

    Raises:
        ValueError: as `check_segments_file`.
    """
    check_segments_file(path)
    rows = [asdict(segment) for segment in segments]
    for row in rows:
        row |= {"start": round(row["start"], 3), "end": round(row["end"], 3), "score": round(row["score"], 4)}
    with whole_file(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        if draft.suffix.lower() == ".json":
            json.dump(rows, file, indent=1, ensure_ascii=False)
        else:
            writer = csv.DictWriter(file, [field.name for field in fields(Segment)])
            writer.writeheader()
            writer.writerows(rows)


def plot_timeline(timeline: Timeline, path: str | Path, smooth: int = 3) -> None:
    """Plots scores over time as a heat map with a row per class, and outlines the segments.

    The rows are the `MOST_ROWS` classes with the longest segments in total, ordered by their first segment.

    Args:
        timeline: the scores.
        path: the file to write.
        smooth: see `Timeline.segments`.

    Raises:
        ValueError: as `check_plot_file` and `Timeline.segments`.
    """
    check_plot_file(path)
    segments = timeline.segments(smooth)
    seconds: dict[str, float] = {}  # in the order of first segments
    for segment in segments:
        seconds[segment.label] = seconds.get(segment.label, 0.0) + segment.end - segment.start
    longest = sorted(seconds, key=lambda label: seconds[label], reverse=True)[:MOST_ROWS]
    rows = [label for label in seconds if label in longest]
    figure = new_figure(10, 1.9 + 0.35 * len(rows))
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    shown = f" ({len(rows)} of {len(seconds)} classes)" if len(rows) < len(seconds) else ""
    axes = figure.add_subplot(xlabel="time, min:s", title=f"Class scores over time; top class outlined{shown}")
    columns = [timeline.classes.index(label) for label in rows]
    edges = [*timeline.times[:, 0].tolist(), timeline.times[-1, 1].item()]
    borders = [row - 0.5 for row in range(len(rows) + 1)]
    scores = timeline.probabilities[:, columns].T.numpy()
    image = axes.pcolormesh(edges, borders, scores, cmap="Blues", vmin=0, vmax=1, rasterized=True)
    figure.colorbar(image, label="probability", format="{x:.0%}")
    for segment in segments:
        if segment.label in rows:
            corner = segment.start, rows.index(segment.label) - 0.5
            outline = Rectangle(corner, segment.end - segment.start, 1, fill=False, edgecolor="#D55E00", linewidth=1.2)
            axes.add_patch(outline)
    axes.set_yticks(range(len(rows)), [short(label, 40) for label in rows])
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 1.5, 3, 6, 10]))
    axes.xaxis.set_major_formatter(lambda time, _: f"{int(time // 60)}:{time % 60:04.1f}".removesuffix(".0"))
    save_figure(figure, path)


def _grid(length: float, span: float, hop: float) -> tuple[list[float], Tensor]:
    """Starts of clips of `span` seconds in a video of `length` seconds, and the moments [moments, 2].

    Moments last `hop` seconds, the last one less; less than a thousandth of a hop is added to the moment before.
    """
    count = max(1, math.ceil(length / hop - 1e-3))
    edges = [*(i * hop for i in range(count)), length]
    last = max(0.0, length - span)
    starts = [*(i * hop for i in range(math.ceil(last / hop - 1e-3))), last]
    return starts, torch.tensor([edges[:-1], edges[1:]], dtype=torch.float64).T


def _per_moment(scores: Tensor, starts: list[float], span: float, times: Tensor) -> Tensor:
    """The mean of `scores` [clips, classes] over the clips that cover the middle of each moment."""
    means = []
    for middle in times.mean(1).tolist():
        first, end = bisect_left(starts, middle - span), bisect_right(starts, middle)
        means.append(scores[first:end].mean(0))
    return torch.stack(means)


def _batches(
    reader: VideoReader | FrameFolder, clips: list[list[int]], transform: EvalTransform, batch_size: int
) -> Iterator[Tensor]:
    """Batches of clips [B, C, T, h, w], given as lists of frame numbers with ascending starts.

    A transformed frame stays in memory until no later clip needs it.
    """
    numbers = sorted({number for clip in clips for number in clip})
    frames: dict[int, Tensor] = {}
    batch: list[Tensor] = []
    done = 0  # clips
    for number, frame in zip(numbers, reader.stream(numbers), strict=True):
        frames[number] = transform(frame[None])[0]  # [C, 1, h, w]
        while done < len(clips) and clips[done][-1] <= number:
            batch.append(torch.cat([frames[i] for i in clips[done]], 1))
            done += 1
            if len(batch) == batch_size or done == len(clips):
                yield torch.stack(batch)
                batch = []
        for old in [i for i in frames if done == len(clips) or i < clips[done][0]]:
            del frames[old]
