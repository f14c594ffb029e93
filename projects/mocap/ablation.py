"""The rows of the paper's ablation (Table 5) on rendered motion, all with the same budget, data and recipe.

python -m projects.mocap.ablation DATA RUNS --seeds 0 1 --jobs 2
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import in_turn, write
from etmamba_timm.models.cost import count_cost
from etmamba_timm.training.recipe import Recipe, load_recipe
from etmamba_timm.training.train import build_model

from .pairs import accuracies
from .runs import Run, train_all
from .variation import CLASSES

RECIPE = Path(__file__).with_name("short.yaml")
SIZE = {"embed_dim": 96, "depth": 8, "global_pool": "avg"}  # so that a run takes some 15 minutes on one core
ROWS = {"a": "videomamba_ti", "b": "videomamba_ti_stfp", "c": "etmamba_ti_ebs", "d": "etmamba_ti"}


def recipe_of(row: str) -> Recipe:
    return load_recipe(RECIPE, model=ROWS[row], model_args=SIZE)


def create(row: str) -> nn.Module:
    """A row's model, without drop path, which makes times vary."""
    return build_model(replace(recipe_of(row), drop_path=0.0), list(CLASSES))


def step_times(runs: int) -> dict[str, float]:
    """Milliseconds per clip of each row's forward and backward pass, on one thread, in turn; medians."""
    torch.set_num_threads(1)
    recipe = recipe_of("a")
    clips = torch.randn(recipe.batch_size, 3, recipe.num_frames, *recipe.img_size)
    labels = torch.arange(recipe.batch_size) % len(CLASSES)

    def step(model: nn.Module) -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            loss = F.cross_entropy(model(clips), labels)
        loss.backward()

    steps = {row: partial(step, create(row).train()) for row in ROWS}
    seconds = in_turn(runs, settle=True, **steps)
    return {row: round(1e3 * statistics.median(of_row) / recipe.batch_size, 2) for row, of_row in seconds.items()}


def measure(row: str, seed: int, run: Run, step_ms: float) -> dict:
    """A run's results on the test videos."""
    recipe = recipe_of(row)
    cost, scores = count_cost(create(row)), run.test()
    pairs = [right for _, _, right in accuracies(scores).values()]
    return {
        "row": row,
        "model": ROWS[row],
        "model_args": json.dumps(recipe.model_args),
        "seed": seed,
        "parameters": cost.params,
        "multiply_adds": cost.total_macs,
        "clips": int(run.log("val.csv")[-1]["update"]) * recipe.batch_size,
        "step_ms_a_clip": step_ms,
        "val_top1": json.dumps([r["top1"] for r in run.log("val.csv")]),  # after each epoch
        "test_top1": scores.topk(1),
        "test_pairs": statistics.mean(pairs),
    }


def table(results: list[dict]) -> str:
    """Means over the seeds, with minimum and maximum in brackets, as Markdown."""
    lines = [
        "| row | parameters | multiply-adds | fwd + bwd over (a)'s | test top-1 | right one of reversed pairs |",
        "|---|---|---|---|---|---|",
    ]

    def of(row: str, key: str) -> list[float]:
        return [r[key] for r in results if r["row"] == row]

    def spread(values: list[float]) -> str:
        return f"{statistics.mean(values):.1%} ({min(values):.1%}–{max(values):.1%})"

    for row, name in ROWS.items():
        times = of(row, "step_ms_a_clip")[0] / of("a", "step_ms_a_clip")[0]
        lines.append(
            f"| ({row}) `{name}` | {of(row, 'parameters')[0] / 1e6:.2f} M | {of(row, 'multiply_adds')[0] / 1e6:.0f} M "
            f"| {times:.2f} | {spread(of(row, 'test_top1'))} | {spread(of(row, 'test_pairs'))} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the rendered dataset")
    parser.add_argument("runs", type=Path, help="a folder for the runs; those in it are gone on with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument(
        "--timings", type=int, default=20, help="forward and backward passes of each row that are timed"
    )
    args = parser.parse_args()
    runs = {
        (row, seed): Run(
            args.runs / f"{row}-{seed}", RECIPE, args.data, {"model": ROWS[row], "model_args": SIZE, "seed": seed}
        )
        for seed in args.seeds
        for row in ROWS
    }
    train_all(list(runs.values()), args.jobs)
    times = step_times(args.timings)
    results = [measure(row, seed, run, times[row]) for (row, seed), run in runs.items()]
    write("mocap_ablation", results)
    print(table(results))


if __name__ == "__main__":
    main()
