"""The shipped checkpoint's figures, by the package's own commands, into benchmarks/results.

python -m benchmarks.mocap.figures DATA RUN

Confusions (of the scores that ship.py left in RUN), t-SNE, effective receptive field, a timeline over joined test
videos, and the run's learning curve.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml

from etmamba_timm.run_folder import RECIPE_FILE

from .join import join, share_right
from .ship import NAME, ROOT, processes
from .variation import CLASSES

RESULTS = ROOT / "benchmarks" / "results"
JOINED = 16  # videos of the timeline; so many that their names can be read
CLIP, HOP = 2.1, 0.5  # seconds; a test video is 1.8 to 2.4 long


def etmamba(*arguments: object) -> None:
    """Runs a command of the package."""
    subprocess.run([sys.executable, "-m", "etmamba_timm", *map(str, arguments)], check=True)


def learning_curve(run: Path, out: Path) -> None:
    """Training loss, and accuracy on the validation videos, over clips seen."""
    clips = yaml.safe_load((run / RECIPE_FILE).read_text())["batch_size"] * processes(run) / 1000
    with (run / "train.csv").open() as file:
        train = [(int(row["update"]) * clips, float(row["loss"])) for row in csv.DictReader(file)]
    with (run / "val.csv").open() as file:
        val = [(int(row["update"]) * clips, 100 * float(row["top1"])) for row in csv.DictReader(file)]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(*zip(*train, strict=True), color="tab:gray", linewidth=0.8)
    axes.set(xlabel="thousand clips", ylabel="training loss (grey)", ylim=(0, None))
    other = axes.twinx()
    other.plot(*zip(*val, strict=True), marker="o")
    other.set(ylabel="validation top-1, %", ylim=(0, 100))
    axes.set_title(f"{NAME}: learning curve")
    figure.savefig(out, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the rendered dataset")
    parser.add_argument("run", type=Path, help="the folder of the run that was shipped")
    args = parser.parse_args()
    videos = [sorted((args.data / "test" / name).glob("*.mp4"))[0] for name in CLASSES]
    model = ["--model", NAME]
    learning_curve(args.run, RESULTS / "mocap_learning.png")
    etmamba("analyze", "confusion", args.run / "test.safetensors", "-o", RESULTS / "mocap_confusion.png")
    tsne = ["--data", args.data, "--subset", "test", "--classes", len(CLASSES)]
    etmamba("analyze", "tsne", *model, *tsne, "-o", RESULTS / "mocap_tsne.png")
    etmamba("analyze", "erf", *videos, *model, "-o", RESULTS / "mocap_erf.png")
    with tempfile.TemporaryDirectory() as folder:
        long, segments = Path(folder, "long.mp4"), Path(folder, "segments.csv")
        truth = join(args.data, long, JOINED, seed=0)
        out = ["--segments", segments, "-o", RESULTS / "mocap_timeline.png"]
        etmamba("timeline", long, *model, "--clip-seconds", CLIP, "--hop", HOP, "--smooth", 1, *out)
        print(f"right for {share_right(truth, segments):.1%} of the time")
    for start, name in truth:
        print(f"{start:6.2f} s  {name}")


if __name__ == "__main__":
    main()
