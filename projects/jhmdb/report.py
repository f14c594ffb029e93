"""Accuracy on the test clips from the scores of `etmamba eval`, as a table in Markdown.

python -m projects.jhmdb.report fine-tuned=RUN/test.safetensors scratch=A/test.safetensors,B/test.safetensors

Top-1 over videos and over classes: on all test clips, on those whose source is in no training clip (strict), and on
those whose source is in training under another class. A row of one file has the binomial standard error; a row of
several files, such as those of several seeds, their mean, minimum and maximum. `--keep FILE` also writes the scores of
each row (of its first file) to a file, in half precision.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from etmamba_timm.training.evaluate import Scores

from ..ablation import spread
from .clips import kinds_of_test

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
COLUMNS = {
    ("test", "videos"): "test ({}), over videos",
    ("test", "classes"): "over classes",
    ("strict", "videos"): "strict test ({}), over videos",
    ("strict", "classes"): "over classes",
    ("seen source", "videos"): "source in training under another class ({})",
}


def share_right(scores: Scores, kind: Sequence[bool]) -> dict[str, tuple[float, float]]:
    """Top-1 over videos and over classes with their binomial standard errors, on the test clips that `kind` marks.

    A class without videos doesn't count.

    Raises:
        ValueError: scores of another set of videos.
    """
    if scores.missing or int(scores.indices.max()) >= len(kind):
        raise ValueError(f"scores of {len(scores.labels)} videos, {scores.missing} missing; evaluate all {len(kind)}")
    chosen = torch.tensor(kind)[scores.indices]
    labels = scores.labels[chosen]
    right = (scores.probabilities[chosen].argmax(1) == labels).double()
    by_class = [right[labels == i] for i in labels.unique()]

    def variance(values: Tensor) -> float:
        mean = values.mean().item()
        return mean * (1 - mean) / len(values)

    return {
        "videos": (right.mean().item(), math.sqrt(variance(right))),
        "classes": (
            sum(values.mean().item() for values in by_class) / len(by_class),
            math.sqrt(sum(map(variance, by_class))) / len(by_class),
        ),
    }


def table(rows: Mapping[str, Sequence[Scores]], kinds: Mapping[str, Sequence[bool]] | None = None) -> str:
    """A row of the table for each name; `kinds` are those of `kinds_of_test`."""
    kinds = kinds_of_test() if kinds is None else kinds
    heads = [head.format(sum(kinds[kind])) for (kind, _), head in COLUMNS.items()]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name, several in rows.items():
        found = [{kind: share_right(scores, marks) for kind, marks in kinds.items()} for scores in several]
        cells = []
        for kind, over in COLUMNS:
            values = [one[kind][over] for one in found]
            mean, error = values[0]
            cells.append(f"{mean:.1%} ± {100 * error:.1f}" if len(values) == 1 else spread([v for v, _ in values]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def keep(scores: Mapping[str, Scores], file: Path) -> None:
    """Writes the scores of several evaluations of the same clips, in half precision."""
    first = next(iter(scores.values()))
    tensors = {name: found.probabilities.half() for name, found in scores.items()}
    tensors |= {"labels": first.labels, "indices": first.indices}
    file.write_bytes(save(tensors, {"classes": json.dumps(first.classes)}))


def kept(file: Path) -> dict[str, Scores]:
    """Reads what `keep` wrote."""
    with safe_open(file, "pt") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        labels, indices, classes = found.pop("labels"), found.pop("indices"), json.loads(opened.metadata()["classes"])
    return {name: Scores(values.float(), labels, indices, 0, 0, classes) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", metavar="NAME=FILE[,FILE...]", help="scores of `etmamba eval --subset test`")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="write the scores to a file")
    args = parser.parse_args()
    rows = dict(row.partition("=")[::2] for row in args.rows)
    scores = {name: [Scores.load(Path(file)) for file in files.split(",")] for name, files in rows.items()}
    print(table(scores))
    if args.keep:
        keep({name: several[0] for name, several in scores.items()}, args.keep)


if __name__ == "__main__":
    main()
