"""How well motions are told from the same motions backwards, from the scores that `etmamba eval --scores` wrote.

python -m benchmarks.mocap.pairs scores.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from etmamba_timm.evaluate import Scores

from .variation import ACTIONS

PAIRS = [
    (forwards, backwards)
    for backwards, b in ACTIONS.items()
    for forwards, f in ACTIONS.items()
    if b.backwards and not f.backwards and f.recording == b.recording
]


def accuracies(scores: Scores) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Of each pair: both classes' top-1 among all classes, and how often the right one of the two is likelier."""
    each = dict(zip(scores.classes, scores.per_class(), strict=True))
    out = {}
    for pair in PAIRS:
        of_pair = [scores.classes.index(name) for name in pair]
        videos = (scores.labels[:, None] == scores.labels.new_tensor(of_pair)).any(1)
        likelier = scores.probabilities[videos][:, of_pair].argmax(1)
        right = likelier == (scores.labels[videos] == of_pair[1]).long()
        out[pair] = (each[pair[0]], each[pair[1]], right.double().mean().item())
    return out


def table(scores: Scores) -> str:
    """`accuracies`, as Markdown."""
    lines = ["| motion | top-1 | backwards | top-1 | the right one of the two |", "|---|---|---|---|---|"]
    for (forwards, backwards), (one, other, both) in accuracies(scores).items():
        lines.append(f"| {forwards} | {one:.1%} | {backwards} | {other:.1%} | {both:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scores", type=Path)
    print(table(Scores.load(parser.parse_args().scores)))


if __name__ == "__main__":
    main()
