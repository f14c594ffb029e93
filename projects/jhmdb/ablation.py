"""The rows of the paper's ablation (Table 5) on real video, and whether each uses time.

python -m projects.jhmdb.ablation DATA RUNS --seeds 0 1 2 --jobs 2

The same command resumes. The test clips are evaluated once, when all runs are finished: as they are, with the middle
frame alone, and with shuffled frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.common import write
from etmamba_timm.training.evaluate import Scores

from .. import ablation
from ..order import CHANGES, scores_with
from ..runs import Run, train_all
from .clips import kinds_of_test, read_clips
from .report import RESULTS, keep, kept, share_right

KEPT = RESULTS / "jhmdb_ablation.safetensors"
ABLATION = ablation.Ablation(Path(__file__).with_name("short.yaml"), sorted({clip.label for clip in read_clips()}))
COLUMNS = {
    "test": "test top-1",
    "test_classes": "mean of classes",
    "strict": "strict test",
    "one_frame": "test, one frame",
    "shuffled": "test, shuffled",
}


def scores_of(run: Run) -> dict[str, Scores]:
    """On the test clips as they are ('real'), and by change of their frames; what is in the run's folder is kept."""
    files = {change: run.folder / f"test_{change}.safetensors" for change in CHANGES}
    changed = {change: scores_with(change, run.model, run.data, file) for change, file in files.items()}
    return {"real": run.test()} | changed


def accuracies(scores: Mapping[str, Scores], run: str) -> dict[str, float]:
    """The columns of the table, from the kept scores of a run such as 'a-0'."""
    kinds, real = kinds_of_test(), scores[f"{run}-real"]
    test, strict = (share_right(real, kinds[kind]) for kind in ("test", "strict"))
    found = {"test": test["videos"][0], "test_classes": test["classes"][0], "strict": strict["videos"][0]}
    return found | {change: share_right(scores[f"{run}-{change}"], kinds["test"])["videos"][0] for change in CHANGES}


def main() -> None:
    args = ablation.arguments(__doc__.splitlines()[0], seeds=[0, 1, 2])
    runs = ABLATION.runs(args.data, args.runs, args.seeds)
    train_all(list(runs.values()), args.jobs)
    torch.set_num_threads(1)
    found = {run.folder.name: scores_of(run) for run in runs.values()}
    keep({f"{name}-{change}": scores for name, of_run in found.items() for change, scores in of_run.items()}, KEPT)
    times, scores = ABLATION.step_times(args.timings), kept(KEPT)
    results = [
        ABLATION.measure(row, seed, run, times[row]) | accuracies(scores, run.folder.name)
        for (row, seed), run in runs.items()
    ]
    write("jhmdb_ablation", results)
    print(ablation.table(results, COLUMNS))


if __name__ == "__main__":
    main()
