"""A run's learning curve."""

from __future__ import annotations

from pathlib import Path

from etmamba_timm.seeing.plots import COLOURS, new_figure, save_figure
from etmamba_timm.training.run_folder import TRAIN_LOG, VAL_LOG

from .runs import about, read_log


def learning_curve(run: Path, out: Path, name: str) -> None:
    """Plots training loss, and accuracy on the validation videos, over clips seen."""
    known = about(run)
    clips = known["batch_size"] * known["processes"] / 1000  # thousands, of an update
    train = [(row["update"] * clips, row["loss"]) for row in read_log(run / TRAIN_LOG)]
    val = [(row["update"] * clips, 100 * row["top1"]) for row in read_log(run / VAL_LOG)]
    figure = new_figure(6, 4)
    axes = figure.add_subplot(title=f"{name}: learning curve")
    axes.plot(*zip(*train, strict=True), color="gray", linewidth=0.8)
    axes.set(xlabel="thousand clips", ylabel="training loss (grey)", ylim=(0, None))
    other = axes.twinx()
    other.plot(*zip(*val, strict=True), marker="o", color=COLOURS[0])
    other.set(ylabel="validation top-1, %", ylim=(0, 104))
    save_figure(figure, out)
