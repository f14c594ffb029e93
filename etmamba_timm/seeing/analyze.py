"""Analysis of models: confusions, features, receptive fields, and accuracy against cost.

For each of the four, one function computes the numbers and another plots them to a file (.png, .pdf, .svg). Needs
matplotlib and scikit-learn: pip install 'etmamba-timm[analyze]'.
"""

import csv
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import timm
import torch
from torch import Tensor, nn

from ..checkpoints import manifest
from ..data import EvalClips
from ..models import EtMamba, count_cost
from ..training.evaluate import Scores, over_videos
from ..words import number_of
from .plots import COLOURS, MARKERS, NO_VALUE, check_plot_file, missing, new_figure, save_figure, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

MEASURED = "measured here"  # the source of our own results; others are plotted as reported

# Confusions


def confusion_matrix(scores: Scores) -> Tensor:
    """Counts videos by true class (row) and predicted class (column), int64 [classes, classes].

    Raises:
        ValueError: videos have several labels.
    """
    if scores.is_multilabel:
        raise ValueError("the videos of these scores have several labels, so one class isn't confused with another")
    count = len(scores.classes)
    pairs = scores.labels * count + scores.probabilities.argmax(1)
    return pairs.bincount(minlength=count * count).view(count, count)


def most_confused(scores: Scores, k: int = 10) -> list[tuple[str, str, float, int]]:
    """The k most frequent confusions, as (true class, predicted class, share of the true class's videos, number).

    They are sorted by number and then by share, in descending order.
    """
    counts = confusion_matrix(scores)
    shares = _row_shares(counts)
    rows, columns = counts.clone().fill_diagonal_(0).nonzero(as_tuple=True)
    pairs = [
        (scores.classes[i], scores.classes[j], float(shares[i, j]), int(counts[i, j]))
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    return sorted(pairs, key=lambda pair: (-pair[3], -pair[2], pair[:2]))[:k]


def plot_confusion(scores: Scores, path: str | Path) -> None:
    """Plots the row-normalised confusion matrix (paper fig. 8).

    The cells have percentages for up to 20 classes, and the axes class names for up to 60. Rows of classes without
    videos are grey. Colours follow the square root of the share, so that rare confusions are visible.

    Raises:
        ValueError: as `check_plot_file`.
    """
    check_plot_file(path)
    shares = _row_shares(confusion_matrix(scores)).numpy()
    count = len(shares)
    named = count <= 60
    figure = new_figure(10, 9.2)
    from matplotlib.colors import PowerNorm

    axes = figure.add_subplot(
        xlabel="predicted class",
        ylabel="true class",
        title=f"Confusions of {number_of(len(scores.labels), 'video')}, top-1 {scores.topk(1):.1%}",
    )
    axes.set_facecolor(NO_VALUE)
    image = axes.imshow(np.ma.masked_invalid(shares), cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    figure.colorbar(image, label="share of the true class's videos", shrink=0.8, format="{x:.0%}")
    size = min(11.0, max(6.0, 170 / count))
    if named:
        labels = [short(name) for name in scores.classes]
        axes.set_xticks(range(count), labels, rotation=90, fontsize=size)
        axes.set_yticks(range(count), labels, fontsize=size)
    else:
        ticks = range(0, count, 50 if count > 150 else 10)
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)
    if count <= 20:
        for (i, j), share in np.ndenumerate(shares):
            if share >= 0.005:
                colour = "white" if share > 0.4 else "black"
                axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=size)
    save_figure(figure, path)


def _row_shares(counts: Tensor) -> Tensor:
    """Divides each row by its sum; NaN for a class without videos."""
    return counts.double() / counts.sum(1, keepdim=True)


# Features


def collect_features(
    model: EtMamba,
    videos: EvalClips,
    *,
    batch_size: int = 8,
    workers: int = 0,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled features before the classifier, averaged over each video's views; arguments and errors as in `evaluate`.

    Returns: float32 [videos, D], labels [videos], and indices [videos] into the dataset, ascending.

    Raises:
        ValueError: videos have several labels.
    """
    if videos.annotations.is_multilabel:
        raise ValueError("the videos have several labels, and a plot of features shows one class of each")

    def features(clips: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(clips), pre_logits=True)

    values, labels, indices = over_videos(
        model, features, videos, batch_size=batch_size, workers=workers, dtype=dtype, progress=progress
    )
    return values.float(), labels, indices


def tsne(features: Tensor, seed: int = 0) -> Tensor:
    """t-SNE of features [videos, D] -> [videos, 2]. The perplexity is 30, or (videos - 1) / 3 if that is less.

    Raises:
        ValueError: fewer than 4 videos.
        ImportError: scikit-learn isn't installed.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise missing(error) from error
    if len(features) < 4:
        raise ValueError(f"{number_of(len(features), 'video')}: too few for t-SNE; give 4 or more")
    perplexity = min(30.0, (len(features) - 1) / 3)
    return torch.from_numpy(TSNE(perplexity=perplexity, random_state=seed).fit_transform(features.numpy()))


def plot_tsne(
    features: Tensor, labels: Tensor, classes: Sequence[str], path: str | Path, *, num_classes: int = 10, seed: int = 0
) -> None:
    """Plots a t-SNE of features (paper fig. 7), with a colour and a marker for each class.

    Args:
        features: [videos, D].
        labels: [videos].
        classes: class names.
        path: the file to write.
        num_classes: if more classes have videos, this many are chosen at random, as in the paper, and only their
            videos are embedded.
        seed: of the choice and the embedding.

    Raises:
        ValueError: as `check_plot_file` and `tsne`.
    """
    check_plot_file(path)
    present = labels.unique().tolist()
    chosen = sorted(random.Random(seed).sample(present, min(num_classes, len(present))))
    keep = torch.isin(labels, torch.tensor(chosen, dtype=labels.dtype))
    points, labels = tsne(features[keep], seed), labels[keep]
    figure = new_figure(10, 7.5)
    shown = f"{len(chosen)} of " * (len(chosen) < len(present)) + number_of(len(present), "class")
    axes = figure.add_subplot(
        xlabel="t-SNE 1",
        ylabel="t-SNE 2",
        title=f"Features of {number_of(len(points), 'video')} of {shown} (t-SNE, seed {seed})",
    )
    axes.set_xticks([])  # the units have no meaning
    axes.set_yticks([])
    for i, label in enumerate(chosen):
        x, y = points[labels == label].T.numpy()
        axes.scatter(
            x,
            y,
            s=44,
            alpha=0.8,
            linewidths=0.4,
            edgecolors="white",
            label=short(classes[label]),
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
        )
    figure.legend(loc="outside right upper", fontsize=10 if len(chosen) <= 25 else 7, ncols=1 + len(chosen) // 45)
    save_figure(figure, path)


# Receptive fields


def receptive_field(model: nn.Module | Callable[[Tensor], Tensor], clips: Tensor, output: str = "centre") -> Tensor:
    """The effective receptive field (Luo et al. 2016; paper fig. 1): how much an output depends on each pixel.

    It is the absolute gradient, with respect to the clip, of the output's sum over channels; summed over the clip's
    channels and averaged over clips. 'centre' is the central patch after the last block: the usual choice, which is
    comparable between architectures. 'token' is the class token, the classifier's input. Both are taken before the
    final norm, since the channels of a layer norm have a constant sum.

    Args:
        model: a model of this package, put into evaluation mode for the call; or, for 'centre', a function from clips
            to a map [B, D, t, h, w], of which position (t//2, h//2, w//2) is used.
        clips: [B, C, T, H, W], normalised; processed one at a time.
        output: 'centre' or 'token'.

    Returns: float32 [T, H, W] on the CPU, with sum 1.

    Raises:
        ValueError: an unknown `output`, no clips, a map with another number of dimensions, or a gradient that is zero
            or not finite.
    """
    if output not in ("centre", "token") or (output == "token" and not isinstance(model, EtMamba)):
        raise ValueError(f"output is {output!r}; choose 'centre', or 'token' for a model of this package")
    if clips.ndim != 5 or not len(clips):
        raise ValueError(f"clips have the shape {tuple(clips.shape)}; give one or more, [B, C, T, H, W]")
    trained = model if isinstance(model, nn.Module) and model.training else None
    if trained is not None:
        trained.eval()
    total = torch.zeros(clips.shape[2:], dtype=torch.float64)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for clip in clips.split(1):
                clip = clip.detach().clone().requires_grad_()
                (gradient,) = torch.autograd.grad(_output(model, clip, output).sum(), clip)
                total += gradient[0].abs().sum(0).cpu()
    finally:
        if trained is not None:
            trained.train()
    if not (total.isfinite().all() and total.sum() > 0):
        raise ValueError("the gradient is zero or not finite; check the checkpoint, or give other clips")
    return (total / total.sum()).float()


def smallest_share(field: Tensor, part: float) -> float:
    """The smallest share of the positions of a field [T, H, W] that contains the share `part` of its sum."""
    sums = field.double().flatten().sort(descending=True).values.cumsum(0)
    return (int((sums < part * sums[-1]).sum()) + 1) / sums.numel()


def plot_receptive_field(field: Tensor, path: str | Path, title: str = "Effective receptive field") -> None:
    """Plots a field [T, H, W] as a heat map of each frame, and its sum in each frame as a curve.

    Both scales are logarithmic; colours span four decades below the maximum, and exact zeros are grey.

    Raises:
        ValueError: as `check_plot_file`.
    """
    check_plot_file(path)
    count, height, width = field.shape
    columns = min(count, 8)
    rows = -(-count // columns)
    side = 8.2 / max(columns, 2) if count > 1 else 7  # inches
    maps_height, curve_height = rows * (side * height / width + 0.25) + 0.3, 2.2 * (count > 1)
    figure = new_figure(10, maps_height + curve_height + 0.3)
    from matplotlib.colors import LogNorm

    figure.suptitle(title)
    parts = figure.subfigures(
        2 if count > 1 else 1, 1, squeeze=False, height_ratios=[maps_height, curve_height][:count]
    )
    grid = parts[0, 0].subplots(rows, columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    norm, colours = LogNorm(1e-4, 1, clip=True), "viridis"
    relative = (field / field.max()).numpy()
    for t, axes in enumerate(grid.flat):
        if t >= count:
            axes.set_visible(False)
            continue
        axes.set_facecolor(NO_VALUE)
        axes.set_title(f"frame {t}", fontsize=8, pad=3)
        image = axes.imshow(np.ma.masked_equal(relative[t], 0), cmap=colours, norm=norm, interpolation="nearest")
    parts[0, 0].colorbar(image, ax=grid, label="gradient / max.", extend="min", aspect=20 if rows < 4 else 40)
    if count > 1:
        axes = parts[1, 0].subplots()
        shares = field.double().sum((1, 2)).numpy()
        axes.plot(np.where(shares > 0, shares, np.nan), color=COLOURS[0], marker="o", markersize=3)
        axes.set(xlabel="frame", ylabel="share of the gradient", yscale="log", xlim=(-0.5, count - 0.5))
        axes.set_ylim(min(1e-2, shares[shares > 0].min() / 2), 1.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def _output(model: nn.Module | Callable[[Tensor], Tensor], clip: Tensor, output: str) -> Tensor:
    """The chosen output [D] for one clip [1, C, T, H, W]."""
    if isinstance(model, EtMamba):
        outputs = model.forward_intermediates(clip, indices=1, return_prefix_tokens=True, intermediates_only=True)
        features, token = cast(list[tuple[Tensor, Tensor]], outputs)[0]
        if output == "token":
            return token[0, 0]
    else:
        features = model(clip)
    if features.ndim != 5:
        raise ValueError(f"the model returns shape {tuple(features.shape)}; it must be a map [B, D, t, h, w]")
    t, h, w = (side // 2 for side in features.shape[2:])
    return features[0, :, t, h, w]


# Accuracy against cost


@dataclass(frozen=True)
class CostRow:
    """A model's accuracy and its cost.

    Attributes:
        name: the model's name.
        params: parameters.
        macs: multiply-adds of all views behind the accuracy, including the scan's.
        top1: in percent.
        source: where the accuracy is from: `MEASURED`, or a text such as 'reported by the paper'.
    """

    name: str
    params: int
    macs: int
    top1: float
    source: str


def manifest_rows(dataset: str = "Kinetics-400") -> list[CostRow]:
    """The checkpoints of the manifest with a top-1 on this dataset, and their costs by `count_cost`.

    Raises:
        ValueError: the manifest has none on this dataset.
    """
    rows = []
    for entry in manifest().values():
        for metric in entry.figures:
            if (metric["dataset"], metric["metric"]) == (dataset, "top-1"):
                model = timm.create_model(entry.architecture, device="meta", **entry.model_args(entry.config()))
                assert isinstance(model, EtMamba)
                views = metric["views"] or {"crops": 1, "clips": 1}
                cost = count_cost(model)
                macs = cost.total_macs * views["crops"] * views["clips"]
                source = metric["whose"].replace("upstream", entry.source.get("repo", "upstream"))
                rows.append(CostRow(entry.name, cost.params, macs, metric["value"], source))
    if not rows:
        known = sorted({metric["dataset"] for entry in manifest().values() for metric in entry.figures})
        raise ValueError(f"the manifest has no top-1 on {dataset!r}; choose one of {', '.join(known)}")
    return rows


def read_cost_rows(path: str | Path) -> list[CostRow]:
    """Reads a CSV file with the columns name, params, macs, top1 and source (see `CostRow`).

    Raises:
        ValueError: a column is missing, or a value is invalid.
    """
    wanted = [field.name for field in fields(CostRow)]
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if set(wanted) - set(reader.fieldnames or ()):
            raise ValueError(f"{path} has the columns {reader.fieldnames}; it needs {', '.join(wanted)}")
        try:
            return [
                CostRow(row["name"], int(row["params"]), int(row["macs"]), float(row["top1"]), row["source"].strip())
                for row in reader
            ]
        except (ValueError, TypeError, AttributeError) as error:  # an invalid or missing value
            raise ValueError(f"{path}, line {reader.line_num}: {error}; each row needs {', '.join(wanted)}") from error


def plot_cost(rows: Sequence[CostRow], path: str | Path, title: str = "Accuracy against cost") -> None:
    """Plots top-1 against multiply-adds (paper fig. 6); a marker's area grows with the parameters.

    Our own measurements are filled discs. Others are hollow, with a marker for each source.

    Raises:
        ValueError: no rows, or one without a source or a cost; or as `check_plot_file`.
    """
    check_plot_file(path)
    for row in rows:
        if not row.source.strip() or row.macs <= 0 or row.params <= 0:
            raise ValueError(f"{row} must have a source, and parameters and multiply-adds above 0")
    if not rows:
        raise ValueError("no rows to plot; give at least one")
    figure = new_figure(10, 7)
    from matplotlib.collections import PathCollection

    axes = figure.add_subplot(
        xscale="log",
        xlabel="multiply-adds of all views, G (scan included); a marker's area grows with the parameters",
        ylabel="top-1 accuracy, %",
        title=title,
    )
    axes.xaxis.set_major_formatter("{x:,g}")
    sources = sorted({row.source for row in rows} - {MEASURED})
    largest = max(row.params for row in rows)
    for source in [MEASURED, *sources]:
        own = [row for row in rows if row.source == source]
        if not own:
            continue
        i = 0 if source == MEASURED else 1 + sources.index(source)
        colour = COLOURS[i % len(COLOURS)]
        axes.scatter(
            [row.macs / 1e9 for row in own],
            [row.top1 for row in own],
            s=[30 + 170 * row.params / largest for row in own],
            marker=MARKERS[i % len(MARKERS)],
            facecolors=colour if source == MEASURED else "none",
            edgecolors=colour,
            linewidths=1.5,
            label=source,
        )
    axes.margins(0.12, 0.1)
    axes.grid(alpha=0.3)
    legend = axes.legend(title="top-1", loc="lower right")
    for handle in legend.legend_handles:
        assert isinstance(handle, PathCollection)
        handle.set_sizes([70])
    _write_names(figure, axes, legend, [(row.macs / 1e9, row.top1, row.name) for row in rows])
    save_figure(figure, path)


def _write_names(figure: "Figure", axes: "Axes", legend: "Legend", points: Sequence[tuple[float, float, str]]) -> None:
    """Writes names beside their points, each at the first place around it that covers no other name or point."""
    figure.draw_without_rendering()  # fixes the position of the axes
    places = [axes.transData.transform(point[:2]) for point in points]
    taken = [legend.get_window_extent()]
    offsets = [(9, 0, "left"), (-9, 0, "right"), (0, 11, "center"), (0, -11, "center")]
    offsets += [(x, y, side) for y in (14, -14, 24, -24) for x, side in ((9, "left"), (-9, "right"))]
    for x, y, name in points:
        for dx, dy, side in offsets:
            text = axes.annotate(name, (x, y), (dx, dy), textcoords="offset points", ha=side, va="center", fontsize=7.5)
            box = text.get_window_extent()
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            if inside and not box.count_overlaps(taken) and not any(box.padded(6).contains(*place) for place in places):
                break
            text.remove()
        else:
            continue  # no room for it
        taken.append(box)
