"""A run's figures: confusions, t-SNE, effective receptive field, and the learning curve.

python -m projects.jhmdb.figures DATA RUN OUT
"""

from __future__ import annotations

import argparse
from pathlib import Path

from etmamba_timm.data import read_dataset

from ..curve import learning_curve
from ..runs import Run, etmamba
from .clips import read_clips

FIELD_CLIPS = 20  # test clips over which the receptive field is averaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the dataset")
    parser.add_argument("run", type=Path, help="a finished run, with test.safetensors")
    parser.add_argument("out", type=Path, help="a folder for the pictures")
    args = parser.parse_args()
    model = ["--model", Run(args.run, Path(), args.data).model]
    videos = [path for path, _ in read_dataset("hmdb51", args.data, "test").samples]
    some = videos[:: len(videos) // FIELD_CLIPS][:FIELD_CLIPS]
    classes = len({clip.label for clip in read_clips()})
    tsne = ["--data", args.data, "--subset", "test", "--classes", classes]
    learning_curve(args.run, args.out / "jhmdb_learning.png", "J-HMDB")
    etmamba("analyze", "confusion", args.run / "test.safetensors", "-o", args.out / "jhmdb_confusion.png")
    etmamba("analyze", "tsne", *model, *tsne, "-o", args.out / "jhmdb_tsne.png")
    etmamba("analyze", "erf", *some, *model, "-o", args.out / "jhmdb_erf.png")


if __name__ == "__main__":
    main()
