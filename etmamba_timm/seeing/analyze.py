"""Seeing what a model sees: confusions, features, receptive fields, and what accuracy costs.

Each of the four has a function that works out the numbers and one that draws them to a file (.png, .pdf, .svg). The
extra `analyze` brings what draws and embeds: pip install 'etmamba-timm[analyze]'.
"""

import csv
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

from ..checkpoints import manifest
from ..data import EvalClips
from ..models import EtMamba, count_cost
from ..training.evaluate import Scores, mean_over_views
from .plots import COLOURS, MARKERS, NO_VALUE, check_target, missing, new_figure, save_figure, short

MEASURED = "measured here"  # the source of a figure of ours; every other is drawn as somebody else's

# Confusions


def confusion_matrix(scores: Scores) -> Tensor:
    """Numbers of videos, int64 [classes, classes]: a row is the class shown, a column the likeliest one."""
    count = len(scores.classes)
    pairs = scores.labels * count + scores.probabilities.argmax(1)
    return pairs.bincount(minlength=count * count).view(count, count)


def most_confused(scores: Scores, k: int = 10) -> list[tuple[str, str, float, int]]:
    """The k most frequent confusions as (class shown, class taken, share of its videos, number of them), worst first.

    Those of a class with few videos come late: they are ordered by number, then by share.
    """
    counts = confusion_matrix(scores)
    shares = _row_shares(counts)
    rows, columns = counts.clone().fill_diagonal_(0).nonzero(as_tuple=True)
    pairs = [
        (scores.classes[i], scores.classes[j], shares[i, j].item(), counts[i, j].item())
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    return sorted(pairs, key=lambda pair: (-pair[3], -pair[2], pair[:2]))[:k]


def plot_confusion(scores: Scores, path: str | Path) -> None:
    """The row-normalised confusion matrix (paper fig. 8): of each class's videos, the share taken for each class.

    Up to 20 classes have percentages in the cells, up to 60 their names at the sides, more a number here and there.
    Rows of classes without videos are grey. The colours are those of the square root: rare confusions show too.
    """
    check_target(path)
    shares = _row_shares(confusion_matrix(scores)).numpy()
    count = len(shares)
    named = count <= 60
    figure = new_figure(10, 9.2)
    from matplotlib.colors import PowerNorm

    axes = figure.add_subplot(
        xlabel="predicted class",
        ylabel="true class",
        title=f"Confusions of {len(scores.labels)} videos, top-1 {scores.topk(1):.1%}",
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
    """Each row over its sum; NaN for a class without videos."""
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
    """Pooled features before the classifier, averaged over each video's views; arguments and errors as `evaluate`'s.

    Returns: float32 [videos, D], labels [videos], and indices [videos] into the dataset, ascending.
    """

    def features(clips: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(clips), pre_logits=True)

    values, labels, indices = mean_over_views(
        model, features, videos, batch_size=batch_size, workers=workers, dtype=dtype, progress=progress
    )
    return values.float(), labels, indices


def tsne(features: Tensor, seed: int = 0) -> Tensor:
    """t-SNE of features [videos, D] -> [videos, 2]; the perplexity is 30, or a third of fewer videos.

    Raises:
        ValueError: fewer than 4 videos.
        ImportError: scikit-learn isn't installed.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise missing(error) from error
    if len(features) < 4:
        raise ValueError(f"{len(features)} videos are too few for t-SNE; give 4 or more")
    perplexity = min(30.0, (len(features) - 1) / 3)
    return torch.from_numpy(TSNE(perplexity=perplexity, random_state=seed).fit_transform(features.numpy()))


def plot_tsne(
    features: Tensor, labels: Tensor, classes: Sequence[str], path: str | Path, *, num_classes: int = 10, seed: int = 0
) -> None:
    """t-SNE of features [videos, D] (paper fig. 7), each video a point in its class's colour and shape.

    Of more than `num_classes` classes with videos, so many are drawn at random by the seed, as in the paper; the
    embedding is that of their videos alone.
    """
    check_target(path)
    present = labels.unique().tolist()
    chosen = sorted(random.Random(seed).sample(present, min(num_classes, len(present))))
    keep = torch.isin(labels, torch.tensor(chosen, dtype=labels.dtype))
    points, labels = tsne(features[keep], seed), labels[keep]
    figure = new_figure(10, 7.5)
    of = f"{len(chosen)} of {len(present)} classes" if len(chosen) < len(present) else f"{len(chosen)} classes"
    axes = figure.add_subplot(
        xlabel="t-SNE 1", ylabel="t-SNE 2", title=f"Features of {len(points)} videos of {of} (t-SNE, seed {seed})"
    )
    axes.set_xticks([])  # its units mean nothing
    axes.set_yticks([])
    for i, label in enumerate(chosen):
        x, y = points[labels == label].T.numpy()
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        axes.scatter(x, y, s=44, alpha=0.8, linewidths=0.4, edgecolors="white", label=short(classes[label]), **style)
    figure.legend(loc="outside right upper", fontsize=10 if len(chosen) <= 25 else 7, ncols=1 + len(chosen) // 45)
    save_figure(figure, path)


# Receptive fields


def receptive_field(model: nn.Module | Callable[[Tensor], Tensor], clips: Tensor, output: str = "centre") -> Tensor:
    """The effective receptive field (Luo et al. 2016; paper fig. 1): what an output depends on, and how much.

    It is the absolute gradient of the output's sum over channels with respect to the clip, summed over the clip's
    channels and averaged over clips. 'centre' is the central patch of the last block: the usual choice, by which any
    architectures compare. 'token' is the class token, which our classifier sees. Both are taken before the final
    norm: the sum over the channels of a layer norm is constant, and its gradient nothing but rounding.

    Args:
        model: one of ours, used in evaluation mode and left as it was; or, for 'centre', a function from clips to a
            map [B, D, t, h, w], whose position (t//2, h//2, w//2) is the central one.
        clips: [B, C, T, H, W], normalised; they go through one by one.
        output: 'centre' or 'token'.

    Returns: float32 [T, H, W] on the CPU, of sum 1.

    Raises:
        ValueError: another `output`, no clips, a map of other dimensions, a gradient that is zero or not finite.
    """
    if output not in ("centre", "token") or (output == "token" and not isinstance(model, EtMamba)):
        raise ValueError(f"output is {output!r}; choose 'centre', or for a model of this package 'token'")
    if clips.ndim != 5 or not len(clips):
        raise ValueError(f"clips are {tuple(clips.shape)}; give one or more, [B, C, T, H, W]")
    was_training = isinstance(model, nn.Module) and model.training
    if was_training:
        model.eval()
    total = torch.zeros(clips.shape[2:], dtype=torch.float64)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for clip in clips.split(1):
                clip = clip.detach().clone().requires_grad_()
                (gradient,) = torch.autograd.grad(_output(model, clip, output).sum(), clip)
                total += gradient[0].abs().sum(0).cpu()
    finally:
        if was_training:
            model.train()
    if not (total.isfinite().all() and total.sum() > 0):
        raise ValueError("the gradient is zero or not finite; check the checkpoint, or give other clips")
    return (total / total.sum()).float()


def share_that_holds(field: Tensor, part: float) -> float:
    """The least share of the positions of a field [T, H, W] that holds this part of it: near 0 if it is all in one."""
    held = field.double().flatten().sort(descending=True).values.cumsum(0)
    return (int((held < part * held[-1]).sum()) + 1) / held.numel()


def plot_receptive_field(field: Tensor, path: str | Path, title: str = "Effective receptive field") -> None:
    """A field [T, H, W] as one heat map a frame, and as a curve over the frames.

    Both are logarithmic: colours over four decades below the largest value, what is exactly zero in grey; the curve, of
    each frame's share of the whole, over as many as it takes.
    """
    check_target(path)
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
    """The output [D] of one clip [1, C, T, H, W] whose field is asked for."""
    if isinstance(model, EtMamba):
        ((features, token),) = model.forward_intermediates(
            clip, indices=1, return_prefix_tokens=True, intermediates_only=True
        )
        if output == "token":
            return token[0, 0]
    else:
        features = model(clip)
    if features.ndim != 5:
        raise ValueError(f"the model gives {tuple(features.shape)}; wanted is a map [B, D, t, h, w]")
    t, h, w = (side // 2 for side in features.shape[2:])
    return features[0, :, t, h, w]


# Accuracy and what it costs


@dataclass(frozen=True)
class CostRow:
    """A model's accuracy and its cost.

    Attributes:
        name: of the model.
        params: parameters.
        macs: multiply-adds of all the views that its accuracy takes, the scan's included.
        top1: in percent.
        source: whose figure the accuracy is: `MEASURED`, or as 'reported by the paper'.
    """

    name: str
    params: int
    macs: int
    top1: float
    source: str


def manifest_rows(dataset: str = "Kinetics-400") -> list[CostRow]:
    """The checkpoints of the manifest that have a top-1 on this dataset; their costs are counted by `count_cost`.

    Raises:
        ValueError: there are none.
    """
    rows = []
    for entry in manifest().values():
        for figure in entry.figures:
            if (figure["dataset"], figure["metric"]) == (dataset, "top-1"):
                model = timm.create_model(entry.architecture, device="meta", **entry.model_args(entry.config()))
                views = figure["views"] or {"crops": 1, "clips": 1}
                cost = count_cost(model)
                macs = cost.total_macs * views["crops"] * views["clips"]
                whose = figure["whose"].replace("upstream", entry.source.get("repo", "upstream"))
                rows.append(CostRow(entry.name, cost.params, macs, figure["value"], whose))
    if not rows:
        known = sorted({figure["dataset"] for entry in manifest().values() for figure in entry.figures})
        raise ValueError(f"the manifest has no top-1 on {dataset!r}; it has some on {', '.join(known)}")
    return rows


def read_cost_rows(path: str | Path) -> list[CostRow]:
    """Rows of a CSV file with the columns name, params, macs, top1, source, as `CostRow` says.

    Raises:
        ValueError: a column is missing, or a value isn't what it should be.
    """
    wanted = [field.name for field in fields(CostRow)]
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if set(wanted) - set(reader.fieldnames or ()):
            raise ValueError(f"{path} has the columns {reader.fieldnames}; wanted are {', '.join(wanted)}")
        try:
            return [
                CostRow(row["name"], int(row["params"]), int(row["macs"]), float(row["top1"]), row["source"].strip())
                for row in reader
            ]
        except (ValueError, TypeError, AttributeError) as error:  # a value that is none, or isn't there
            raise ValueError(f"{path}, line {reader.line_num}: {error}; each row has {', '.join(wanted)}") from error


def plot_cost(rows: Sequence[CostRow], path: str | Path, title: str = "Accuracy against cost") -> None:
    """Top-1 against multiply-adds (paper fig. 6); a mark's area grows with the parameters.

    A figure measured here is a filled disc. Others are hollow, of another shape for each source, which the legend
    names.

    Raises:
        ValueError: no rows, or one without a source, or at no cost.
    """
    check_target(path)
    for row in rows:
        if not row.source.strip() or row.macs <= 0 or row.params <= 0:
            raise ValueError(f"{row} must say whose figure it is, and have parameters and multiply-adds above 0")
    if not rows:
        raise ValueError("there are no rows to draw")
    figure = new_figure(10, 7)
    axes = figure.add_subplot(
        xscale="log",
        xlabel="multiply-adds of all views, G (scan included); a mark's area grows with the parameters",
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
        handle.set_sizes([70])
    _write_names(axes, [(row.macs / 1e9, row.top1, row.name) for row in rows])
    save_figure(figure, path)


def _write_names(axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside their points, each at the first place around it where it covers no name or point so far."""
    figure = axes.figure
    figure.draw_without_rendering()  # settles where the axes are
    renderer = figure.canvas.get_renderer()
    places = [axes.transData.transform(point[:2]) for point in points]
    taken = [axes.get_legend().get_window_extent(renderer)]
    offsets = [(9, 0, "left"), (-9, 0, "right"), (0, 11, "center"), (0, -11, "center")]
    offsets += [(x, y, side) for y in (14, -14, 24, -24) for x, side in ((9, "left"), (-9, "right"))]
    for x, y, name in points:
        for dx, dy, side in offsets:
            text = axes.annotate(name, (x, y), (dx, dy), textcoords="offset points", ha=side, va="center", fontsize=7.5)
            box = text.get_window_extent(renderer)
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            if inside and not box.count_overlaps(taken) and not any(box.padded(6).contains(*place) for place in places):
                break
            text.remove()
        else:
            continue  # no room for it
        taken.append(box)
