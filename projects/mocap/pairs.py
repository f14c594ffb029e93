"""Motions against the same motions backwards, and the styles, from the scores of `etmamba eval --scores`.

python -m projects.mocap.pairs scores.safetensors --part test
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from etmamba_timm.training.evaluate import Scores

from .looks import STYLES
from .variation import ACTIONS, RANGES, draw

PAIRS = [
    (forwards, backwards)
    for backwards, b in ACTIONS.items()
    for forwards, f in ACTIONS.items()
    if b.backwards and not f.backwards and f.recording == b.recording
]


def accuracies(scores: Scores) -> dict[tuple[str, str], tuple[float, float, float]]:
    """For each pair: both classes' top-1 among all classes, and how often the right one of the two scores higher."""
    each = dict(zip(scores.classes, scores.per_class(), strict=True))
    out = {}
    for pair in PAIRS:
        of_pair = [scores.classes.index(name) for name in pair]
        videos = (scores.labels[:, None] == scores.labels.new_tensor(of_pair)).any(1)
        likelier = scores.probabilities[videos][:, of_pair].argmax(1)
        right = likelier == (scores.labels[videos] == of_pair[1]).long()
        out[pair] = (each[pair[0]], each[pair[1]], right.double().mean().item())
    return out


def drawn(scores: Scores, part: str, seed: int = 0) -> Iterator[tuple[str, dict, Tensor]]:
    """Each video's class, parameters and probabilities.

    `scores` are of all videos of `part` of the dataset that `seed` made.
    """
    each = len(scores.labels) // len(scores.classes)  # in order of class and number
    for index, label, row in zip(scores.indices.tolist(), scores.labels.tolist(), scores.probabilities, strict=True):
        yield scores.classes[label], draw(seed, part, scores.classes[label], index % each), row


def by_sector(scores: Scores, pair: tuple[str, str]) -> dict[tuple[float, float], float]:
    """How often the right one of a pair scores higher, by the test camera's azimuth: degrees off straight ahead."""
    of_pair = [scores.classes.index(name) for name in pair]
    right = {cell: [] for cell in RANGES["azimuth"].cells("test")}
    for name, video, row in drawn(scores, "test"):
        if name in pair:
            azimuth = abs(video["azimuth"][0])
            (cell,) = (cell for cell in right if cell[0] <= azimuth <= cell[1])
            right[cell].append(pair[row[of_pair].argmax()] == name)
    return {cell: statistics.mean(values) for cell, values in right.items()}


def by_style(scores: Scores, part: str) -> dict[str, float]:
    """Top-1 of the videos of each of the part's styles."""
    right = {style: [] for style in STYLES[part]}
    for name, video, row in drawn(scores, part):
        right[video["look"]["style"]].append(scores.classes[row.argmax()] == name)
    return {style: statistics.mean(values) for style, values in right.items()}


def table(scores: Scores) -> str:
    """`accuracies`, as Markdown."""
    lines = ["| motion | top-1 | backwards | top-1 | the right one of the two |", "|---|---|---|---|---|"]
    for (forwards, backwards), (one, other, both) in accuracies(scores).items():
        lines.append(f"| {forwards} | {one:.1%} | {backwards} | {other:.1%} | {both:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scores", type=Path)
    parser.add_argument("--part", default="test", choices=("test", "looks"), help="what they are of")
    args = parser.parse_args()
    scores = Scores.load(args.scores)
    print(table(scores))
    print(", ".join(f"{right:.1%} of {style}" for style, right in by_style(scores, args.part).items()))
    for pair in PAIRS if args.part == "test" else ():
        seen = (f"{right:.1%} from {low:.0f}–{high:.0f}°" for (low, high), right in by_sector(scores, pair).items())
        print(f"{pair[0]}: {', '.join(seen)} off straight ahead")


if __name__ == "__main__":
    main()
