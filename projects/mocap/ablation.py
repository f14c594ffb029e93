"""The rows of the paper's ablation (Table 5) on rendered motion, all with the same budget, data and recipe.

python -m projects.mocap.ablation DATA RUNS --seeds 0 1 --jobs 2
"""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.common import write

from .. import ablation
from ..runs import train_all
from .pairs import accuracies
from .variation import CLASSES

ABLATION = ablation.Ablation(Path(__file__).with_name("short.yaml"), CLASSES)
COLUMNS = {"test_top1": "test top-1", "test_pairs": "right one of reversed pairs"}


def main() -> None:
    args = ablation.arguments(__doc__.splitlines()[0], seeds=[0, 1])
    runs = ABLATION.runs(args.data, args.runs, args.seeds)
    train_all(list(runs.values()), args.jobs)
    times, results = ABLATION.step_times(args.timings), []
    for (row, seed), run in runs.items():
        scores = run.test()
        pairs = [right for _, _, right in accuracies(scores).values()]
        found = {"test_top1": scores.topk(1), "test_pairs": statistics.mean(pairs)}
        results.append(ABLATION.measure(row, seed, run, times[row]) | found)
    write("mocap_ablation", results)
    print(ablation.table(results, COLUMNS))


if __name__ == "__main__":
    main()
