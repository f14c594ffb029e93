"""The shipped checkpoint's figures, by the package's own commands, into docs/images.

python -m projects.mocap.figures DATA RUN

Confusions (of the scores that ship.py left), t-SNE, effective receptive field, a timeline over joined test
videos, and the run's learning curve. `front.py` draws the README's picture.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from etmamba_timm.seeing.plots import COLOURS, new_figure, save_figure
from etmamba_timm.training.run_folder import TRAIN_LOG, VAL_LOG

from .join import join, share_right
from .runs import etmamba, read_log
from .ship import IMAGES, NAME, RESULTS, about, test_videos
from .variation import CLASSES, SECONDS

JOINED = 12  # videos of the timeline
CLIP, HOP = sum(SECONDS) / 2, 0.5  # seconds


def learning_curve(run: Path, out: Path) -> None:
    """Training loss, and accuracy on the validation videos, over clips seen."""
    known = about(run)
    clips = known["batch_size"] * known["processes"] / 1000  # thousands, of an update
    train = [(row["update"] * clips, row["loss"]) for row in read_log(run / TRAIN_LOG)]
    val = [(row["update"] * clips, 100 * row["top1"]) for row in read_log(run / VAL_LOG)]
    figure = new_figure(6, 4)
    axes = figure.add_subplot(title=f"{NAME}: learning curve")
    axes.plot(*zip(*train, strict=True), color="gray", linewidth=0.8)
    axes.set(xlabel="thousand clips", ylabel="training loss (grey)", ylim=(0, None))
    other = axes.twinx()
    other.plot(*zip(*val, strict=True), marker="o", color=COLOURS[0])
    other.set(ylabel="validation top-1, %", ylim=(0, 104))
    save_figure(figure, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the rendered dataset")
    parser.add_argument("run", type=Path, help="the folder of the run that was shipped")
    args = parser.parse_args()
    videos = [found[0] for found in test_videos(args.data).values()]
    model = ["--model", NAME]
    learning_curve(args.run, IMAGES / "mocap_learning.png")
    etmamba("analyze", "confusion", RESULTS / "mocap_test.safetensors", "-o", IMAGES / "mocap_confusion.png")
    tsne = ["--data", args.data, "--subset", "test", "--classes", len(CLASSES)]
    etmamba("analyze", "tsne", *model, *tsne, "-o", IMAGES / "mocap_tsne.png")
    etmamba("analyze", "erf", *videos, *model, "-o", IMAGES / "mocap_erf.png")
    with tempfile.TemporaryDirectory() as folder:
        long, segments = Path(folder, "long.mp4"), Path(folder, "segments.csv")
        truth = join(args.data, long, JOINED, seed=0)
        out = ["--segments", segments, "-o", IMAGES / "mocap_timeline.png"]
        etmamba("timeline", long, *model, "--clip-seconds", CLIP, "--hop", HOP, "--smooth", 1, *out)
        print(f"right for {share_right(truth, segments):.1%} of the time")
    for start, name in truth:
        print(f"{start:6.2f} s  {name}")


if __name__ == "__main__":
    main()
