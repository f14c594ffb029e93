"""The shipped checkpoint's figures, by the package's own commands, into docs/images.

python -m projects.mocap.figures DATA RUN

Confusions in both tests (of the scores that ship.py left), t-SNE, effective receptive field, a timeline over joined
test videos, and the run's learning curve. `front.py` draws the README's picture.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from ..curve import learning_curve
from ..runs import etmamba
from .join import join, share_right
from .ship import IMAGES, NAME, RESULTS, TESTS, test_videos
from .variation import CLASSES, SECONDS

JOINED = 12  # videos of the timeline
CLIP, HOP = sum(SECONDS) / 2, 0.5  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the rendered dataset")
    parser.add_argument("run", type=Path, help="the folder of the run that was shipped")
    args = parser.parse_args()
    videos = [found[0] for found in test_videos(args.data).values()]
    model = ["--model", NAME]
    learning_curve(args.run, IMAGES / "mocap_learning.png", NAME)
    for test in TESTS:
        out = IMAGES / f"mocap_confusion_{test}.png"
        etmamba("analyze", "confusion", RESULTS / f"mocap_{test}.safetensors", "-o", out)
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
