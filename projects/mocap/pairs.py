"""How well motions are distinguished from the same motions backwards, from the scores of `etmamba eval --scores`.

python -m projects.mocap.pairs scores.safetensors
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from etmamba_timm.training.evaluate import Scores

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


def by_sector(scores: Scores, pair: tuple[str, str], seed: int = 0) -> dict[tuple[float, float], float]:
    """How often the right one of a pair scores higher, by the camera's azimuth: degrees off straight ahead.

    `scores` are of all test videos of the dataset that `seed` made.
    """
    of_pair = [scores.classes.index(name) for name in pair]
    each = len(scores.labels) // len(scores.classes)  # in order of class and number
    right = {cell: [] for cell in RANGES["azimuth"].cells("test")}
    for index, label, row in zip(scores.indices.tolist(), scores.labels.tolist(), scores.probabilities, strict=True):
        if label in of_pair:
            azimuth = abs(draw(seed, "test", scores.classes[label], index % each)["azimuth"][0])
            (cell,) = (cell for cell in right if cell[0] <= azimuth <= cell[1])
            right[cell].append(of_pair[row[of_pair].argmax()] == label)
    return {cell: statistics.mean(values) for cell, values in right.items()}


def table(scores: Scores) -> str:
    """`accuracies`, as Markdown."""
    lines = ["| motion | top-1 | backwards | top-1 | the right one of the two |", "|---|---|---|---|---|"]
    for (forwards, backwards), (one, other, both) in accuracies(scores).items():
        lines.append(f"| {forwards} | {one:.1%} | {backwards} | {other:.1%} | {both:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scores", type=Path)
    scores = Scores.load(parser.parse_args().scores)
    print(table(scores))
    for pair in PAIRS:
        seen = (f"{right:.1%} from {low:.0f}–{high:.0f}°" for (low, high), right in by_sector(scores, pair).items())
        print(f"{pair[0]}: {', '.join(seen)} off straight ahead")


if __name__ == "__main__":
    main()
