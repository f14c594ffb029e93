"""The rows of the paper's ablation (Table 5), all with the same budget, data and recipe: what the projects share."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import in_turn
from etmamba_timm.models.cost import count_cost
from etmamba_timm.training.recipe import Recipe, load_recipe
from etmamba_timm.training.train import build_model

from .runs import Run

SIZE = {"embed_dim": 96, "depth": 8, "global_pool": "avg"}  # so that a run takes some 15 minutes on one core
ROWS = {"a": "videomamba_ti", "b": "videomamba_ti_stfp", "c": "etmamba_ti_ebs", "d": "etmamba_ti"}


@dataclass(frozen=True)
class Ablation:
    """The rows with `recipe` (a file), on the videos of these classes."""

    recipe: Path
    classes: Sequence[str]

    def recipe_of(self, row: str) -> Recipe:
        return load_recipe(self.recipe, model=ROWS[row], model_args=SIZE)

    def create(self, row: str) -> nn.Module:
        """A row's model, without drop path, which makes times vary."""
        return build_model(replace(self.recipe_of(row), drop_path=0.0), list(self.classes))

    def runs(self, data: Path, folder: Path, seeds: Sequence[int]) -> dict[tuple[str, int], Run]:
        """A run for each row and seed; all rows of a seed before the next seed."""
        return {
            (row, seed): Run(
                folder / f"{row}-{seed}", self.recipe, data, {"model": ROWS[row], "model_args": SIZE, "seed": seed}
            )
            for seed in seeds
            for row in ROWS
        }

    def step_times(self, runs: int) -> dict[str, float]:
        """Milliseconds per clip of each row's forward and backward pass, on one thread, in turn; medians."""
        torch.set_num_threads(1)
        recipe = self.recipe_of("a")
        clips = torch.randn(recipe.batch_size, 3, recipe.num_frames, *recipe.img_size)
        labels = torch.arange(recipe.batch_size) % len(self.classes)

        def step(model: nn.Module) -> None:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = F.cross_entropy(model(clips), labels)
            loss.backward()

        steps = {row: partial(step, self.create(row).train()) for row in ROWS}
        seconds = in_turn(runs, settle=True, **steps)
        return {row: round(1e3 * statistics.median(of_row) / recipe.batch_size, 2) for row, of_row in seconds.items()}

    def measure(self, row: str, seed: int, run: Run, step_ms: float) -> dict:
        """What a run cost, and its results on the validation videos after each epoch."""
        recipe, cost, log = self.recipe_of(row), count_cost(self.create(row)), run.log("val.csv")
        return {
            "row": row,
            "model": ROWS[row],
            "model_args": json.dumps(recipe.model_args),
            "seed": seed,
            "parameters": cost.params,
            "multiply_adds": cost.total_macs,
            "clips": int(log[-1]["update"]) * recipe.batch_size,
            "step_ms_a_clip": step_ms,
            "val_top1": json.dumps([r["top1"] for r in log]),
        }


def table(results: list[dict], columns: Mapping[str, str]) -> str:
    """Means over the seeds, with minimum and maximum in brackets, as Markdown.

    Args:
        results: a row for each run.
        columns: headings of its results, by their names in `results`; shares, which are told in percent.
    """
    names = " | ".join(columns.values())
    lines = [
        f"| row | parameters | multiply-adds | fwd + bwd over (a)'s | {names} |",
        "|---|---|---|---|" + "---|" * len(columns),
    ]

    def of(row: str, key: str) -> list[float]:
        return [r[key] for r in results if r["row"] == row]

    for row, name in ROWS.items():
        times = of(row, "step_ms_a_clip")[0] / of("a", "step_ms_a_clip")[0]
        found = " | ".join(spread(of(row, key)) for key in columns)
        lines.append(
            f"| ({row}) `{name}` | {of(row, 'parameters')[0] / 1e6:.2f} M | {of(row, 'multiply_adds')[0] / 1e6:.0f} M "
            f"| {times:.2f} | {found} |"
        )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """'30.0% (25.0%–35.0%)': mean, minimum and maximum of shares; of a single one, itself."""
    mean = f"{statistics.mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%}–{max(values):.1%})"


def arguments(description: str, seeds: list[int]) -> argparse.Namespace:
    """The command line of a project's ablation; `seeds` are the default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("data", type=Path, help="the dataset")
    parser.add_argument("runs", type=Path, help="a folder for the runs; those in it are gone on with")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    text = "forward and backward passes of each row that are timed"
    parser.add_argument("--timings", type=int, default=20, help=text)
    return parser.parse_args()
