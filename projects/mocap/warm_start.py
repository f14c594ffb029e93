"""ETMamba-Ti on half of the classes: from a VideoMamba-Ti of the other half by the warm-start map, and from scratch.

python -m projects.mocap.warm_start DATA RUNS --seeds 0 1 --jobs 2
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import write
from etmamba_timm.seeing.plots import new_figure, save_figure
from etmamba_timm.training.evaluate import Scores
from etmamba_timm.training.recipe import load_recipe

from ..runs import Run, train_all
from .variation import ACTIONS, CLASSES, PARTS

RECIPE = Path(__file__).with_name("short.yaml")
WARM = "etmamba_ti.videomamba_in1k"  # an ETMamba that starts from whatever VideoMamba it is given
FIRST = CLASSES[::2]  # VideoMamba learns these, ETMamba the others
SEEN = {ACTIONS[name].recording for name in FIRST}  # some are motions of ETMamba's half, the other way round
FIRST_EPOCHS = 4  # VideoMamba's; ETMamba's are the recipe's
STARTS = ("from scratch", "from VideoMamba by the warm-start map")
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "mocap_warm_start.png"


def part_of(data: Path, out: Path, classes: list[str]) -> Path:
    """A dataset of only some classes, made of links."""
    for part in PARTS:
        (out / part).mkdir(parents=True, exist_ok=True)
        for name in classes:
            if not (out / part / name).exists():
                (out / part / name).symlink_to((data / part / name).resolve(), target_is_directory=True)
    return out


def without_classifier(weights: Path, out: Path) -> Path:
    """The weights but for the classifier, which is for other actions."""
    save_file({name: tensor for name, tensor in load_file(weights).items() if not name.startswith("head.")}, out)
    return out


def unseen(scores: Scores) -> float:
    """Mean accuracy of the classes whose recordings VideoMamba hasn't seen."""
    classes = zip(scores.classes, scores.per_class(), strict=True)
    return statistics.mean(right for name, right in classes if ACTIONS[name].recording not in SEEN)


def summary(rows: list[dict]) -> str:
    """The final results on the test videos: means over the seeds, minimum and maximum; then on the unseen motions."""
    fresh, warm = (
        [row for row in rows if row["start"] == start and row.get("test_top1", "") != ""] for start in STARTS
    )

    def mean(of: list[dict], key: str) -> str:
        return f"{statistics.mean(float(row[key]) for row in of):.1%}"

    def spread(of: list[dict]) -> str:
        values = [float(row["test_top1"]) for row in of]
        return f"{mean(of, 'test_top1')} ({min(values):.1%}–{max(values):.1%})"

    unseen = " against ".join(mean(of, "test_unseen") for of in (warm, fresh))
    return f"{spread(warm)} against {spread(fresh)}; on motions unseen before {unseen}"


def draw(curves: dict[str, list[list[dict]]], batch_size: int) -> None:
    """Plots validation accuracy over clips: each start's mean over the seeds, minimum and maximum."""
    figure = new_figure(6, 4)
    axes = figure.add_subplot()
    for name, logs in curves.items():
        clips = [row["update"] * batch_size / 1000 for row in logs[0]]
        values = [[100 * log[i]["top1"] for log in logs] for i in range(len(clips))]
        axes.plot(clips, [statistics.mean(v) for v in values], marker="o", label=name)
        axes.fill_between(clips, [min(v) for v in values], [max(v) for v in values], alpha=0.2)
    axes.set(xlabel="thousand clips", ylabel="validation top-1, %", ylim=(0, None))
    axes.legend()
    save_figure(figure, PICTURE)
    print(f"written: {PICTURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the rendered dataset")
    parser.add_argument("runs", type=Path, help="a folder for the runs; those in it are gone on with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as the runs; the results say it
    first = part_of(args.data, args.runs / "first-half", list(FIRST))
    second = part_of(args.data, args.runs / "second-half", [name for name in CLASSES if name not in FIRST])
    sources = [
        Run(
            args.runs / f"source-{seed}",
            RECIPE,
            first,
            {"model": "videomamba_ti", "seed": seed, "epochs": FIRST_EPOCHS},
        )
        for seed in args.seeds
    ]
    train_all(sources, args.jobs)
    runs: dict[str, list[Run]] = {start: [] for start in STARTS}
    for seed, source in zip(args.seeds, sources, strict=True):
        start = without_classifier(source.weights, args.runs / f"source-{seed}.safetensors")
        fresh, warm = runs.values()
        fresh.append(Run(args.runs / f"fresh-{seed}", RECIPE, second, {"seed": seed}))
        warm.append(Run(args.runs / f"warm-{seed}", RECIPE, second, {"seed": seed, "model": WARM, "checkpoint": start}))
    train_all([run for pair in zip(*runs.values(), strict=True) for run in pair], args.jobs)
    batch_size = load_recipe(RECIPE).batch_size
    curves = {name: [run.log("val.csv") for run in of_name] for name, of_name in runs.items()}
    rows = [
        {"start": name, "seed": seed, "clips": int(row["update"]) * batch_size, "val_top1": row["top1"]}
        for name, logs in curves.items()
        for seed, log in zip(args.seeds, logs, strict=True)
        for row in log
    ]
    for name, of_name in runs.items():
        for seed, run in zip(args.seeds, of_name, strict=True):
            last = [row for row in rows if (row["start"], row["seed"]) == (name, seed)][-1]
            scores = run.test()
            last["test_top1"] = scores.topk(1)
            last["test_unseen"] = unseen(scores)
    write("mocap_warm_start", rows)
    print(summary(rows))
    draw(curves, batch_size)


if __name__ == "__main__":
    main()
