"""What happens when in a long video: class scores over time, and the segments they make."""

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

from ..data import EvalTransform, VideoReader
from ..files import check_file, whole_file
from ..models import EtMamba
from ..predict import class_names
from .plots import check_target, new_figure, save_figure, short

MOST_ROWS = 12  # classes that a figure shows


@dataclass(frozen=True)
class Timeline:
    """Class scores over a video.

    Attributes:
        times: float64 [moments, 2], start and end of each in seconds; one begins where the one before ends.
        probabilities: float32 [moments, classes].
        classes: names of the classes.
    """

    times: Tensor
    probabilities: Tensor
    classes: list[str]

    def segments(self, smooth: int = 3) -> list["Segment"]:
        """Neighbouring moments of the same likeliest class, joined.

        Args:
            smooth: moments, an odd number, that are averaged before the likeliest class is taken (fewer at both ends):
                so a class that leads for a single moment makes no segment, and a border stays where it is. 1 for none.
        """
        if smooth < 1 or smooth % 2 == 0:
            raise ValueError(f"smooth is {smooth}; it must be an odd number of moments, 1 for none")
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
    """A stretch of a video in which one class leads.

    Attributes:
        start, end: seconds from the first frame on.
        label: the class.
        score: its probability, averaged over the time.
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
    """Class scores over a video of any length, from clips that slide over it.

    A clip starts every `hop` seconds, and the last one ends with the video. Its frames are those that are shown at
    `model.num_frames` times, evenly spread, whatever the frame rate and its changes. A moment lasts from one start to
    the next; its scores are the mean over the clips that cover its middle. The file is decoded once, and no more frames
    are held than a batch of clips and those that overlap it take. A video shorter than a clip repeats its last frame,
    or is a shorter clip where the model's are spread over whole videos.

    Args:
        model: as in `predict`; its centre crop is taken.
        path: a video file.
        clip_seconds: time that a clip spans; by default that of the model's `clip`, whose unknown stride is 2.
        hop: seconds from one clip's start to the next; by default half a clip.
        batch_size: clips that the model takes at a time.
        dtype: of autocast; None for none.
        progress: whether to show a bar.

    Raises:
        VideoError: as `predict`; also a file that doesn't tell its frame rate.
        ValueError: a hop that skips a part of the video; a model whose clips are spread over whole videos, and no
            `clip_seconds`; one in training mode or without classes.
    """
    if model.training or not model.global_pool or model.num_classes < 1:
        raise ValueError(
            "the model must be in evaluation mode, pool its tokens and have classes: model.eval(), "
            "global_pool='token', a checkpoint with a classifier"
        )
    clip = model.clip.known()
    if clip_seconds is None and clip.is_spread:
        raise ValueError(
            "the model's clips are spread over whole videos, so it isn't known how long one is here; give clip_seconds "
            "the length of the videos it was trained on (Kinetics: 10)"
        )
    reader = VideoReader(path)
    shown, fps = reader.times(), reader.info.fps
    length = shown[-1] + 1 / fps  # the last frame is taken to stay as long as others do
    span = clip.num_frames * clip.stride / fps if clip_seconds is None else clip_seconds
    hop = span / 2 if hop is None else hop
    if not 0 < hop <= span < math.inf:
        raise ValueError(
            f"clips of {span:g} s every {hop:g} s; both must be above 0, and the hop no longer than a clip, or parts "
            "of the video would be skipped: choose a shorter hop or longer clips"
        )
    if clip.is_spread:
        span = min(span, length)
    starts, times = _grid(length, span, hop)
    step = span / model.num_frames
    # In the middle of a step, and of a frame: rounding does no harm.
    first = (max(0, (step * fps - 1) // 2) + 0.5) / fps
    ticks = [first + i * step for i in range(model.num_frames)]
    clips = [[max(0, bisect_right(shown, start + tick) - 1) for tick in ticks] for start in starts]

    transform = EvalTransform.from_model(model, size=model.img_size)
    weight = next(model.parameters())
    autocast = torch.autocast(weight.device.type, dtype) if dtype else nullcontext()
    scores, bar = [], tqdm(total=len(clips), unit="clip", leave=False, disable=None if progress else True)
    with torch.inference_mode(), autocast, bar:
        for batch in _batches(reader, clips, transform, batch_size):
            logits = model(batch.to(weight.device, weight.dtype))
            scores.append(logits.float().softmax(-1).cpu())
            bar.update(len(batch))
    scores = torch.cat(scores)
    if not scores.isfinite().all():
        raise ValueError(f"{path}: the result isn't finite; check the checkpoint, or use float32")
    return Timeline(times, _per_moment(scores, starts, span, times), class_names(model, scores.shape[1]))


def check_segments_file(path: str | Path) -> None:
    """Raises ValueError if no segments can be written to `path`: to be called before the work."""
    check_file(path, (".csv", ".json"), "segments")


def write_segments(segments: list[Segment], path: str | Path) -> None:
    """Writes start, end (seconds), label and score of each segment, as .csv or .json; whole or not at all.

    Raises:
        ValueError: another suffix, or no such folder.
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
    """Scores over time as a heat map, a row a class, and around them the segments that `smooth` makes.

    Shown are the classes that lead, by the time they do, up to `MOST_ROWS`; in the order in which they first lead.
    """
    check_target(path)
    segments = timeline.segments(smooth)
    led = {}  # seconds of each class, in order of first leading
    for segment in segments:
        led[segment.label] = led.get(segment.label, 0) + segment.end - segment.start
    most = sorted(led, key=led.get, reverse=True)[:MOST_ROWS]
    rows = [label for label in led if label in most]
    figure = new_figure(10, 1.9 + 0.35 * len(rows))
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    of = f" ({len(rows)} of {len(led)} classes that lead)" if len(rows) < len(led) else ""
    axes = figure.add_subplot(xlabel="time, min:s", title=f"Class scores over time; outlined where a class leads{of}")
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
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{int(seconds // 60)}:{seconds % 60:04.1f}".removesuffix(".0"))
    save_figure(figure, path)


def _grid(length: float, span: float, hop: float) -> tuple[list[float], Tensor]:
    """The starts of clips of `span` seconds in a video of `length`, and the moments [moments, 2] between them.

    Moments are `hop` long, the last one shorter; a rest below a thousandth of a hop belongs to the one before.
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
    reader: VideoReader, clips: list[list[int]], transform: EvalTransform, batch_size: int
) -> Iterator[Tensor]:
    """Batches of clips [B, C, T, h, w], given by the numbers of their frames, that start in ascending order.

    A frame is kept, transformed, until the last clip that shows it is made.
    """
    wanted = sorted({number for clip in clips for number in clip})
    frames, batch, todo = {}, [], 0
    for number, frame in zip(wanted, reader.stream(wanted), strict=True):
        frames[number] = transform(frame[None])[0]  # [C, 1, h, w]
        while todo < len(clips) and clips[todo][-1] <= number:
            batch.append(torch.cat([frames[i] for i in clips[todo]], 1))
            todo += 1
            if len(batch) == batch_size or todo == len(clips):
                yield torch.stack(batch)
                batch = []
        for old in [i for i in frames if todo == len(clips) or i < clips[todo][0]]:
            del frames[old]
