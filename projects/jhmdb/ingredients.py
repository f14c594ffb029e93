"""What each ingredient of training gives, on the validation clips that are cut from the training clips by source.

python -m projects.jhmdb.ingredients DATA RUNS --seeds 0 1 2 [--only plain still] [--pretrained WEIGHTS]

Each run is quick.yaml with one thing changed. The test clips aren't looked at.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common import write

from ..ablation import spread
from ..runs import Run, train_all

RECIPE = Path(__file__).with_name("quick.yaml")
MOTION = {"model_args": "{global_pool: avg, motion: true}"}
MIXED = {"still": 0.5, "cutmix": 1.0, "mixup": 0.4, "epochs": 60}
INGREDIENTS = {
    "plain": {},
    "from scratch": {"model": "etmamba_ti", "pretrained": False},
    "still frames blended in": {"still": 0.5},
    "cutmix": {"cutmix": 1.0},
    "mixup": {"mixup": 0.4},
    "strong crops": {"scale": "[0.2,1]", "ratio": "[0.75,1.34]"},
    "colour": {"rand_augment": "rand-m6-n2-t3a"},
    "erasing": {"erasing": 0.5},
    "drop path": {"drop_path": 0.2},
    "16 frames": {"num_frames": 16},
    "96 pixels": {"size": 96},
    "motion": MOTION,
    "mixed, for longer": MIXED,
    "motion, mixed, for longer": MOTION | MIXED,
    "motion, mixed, for longer, from scratch": MOTION | MIXED | {"model": "etmamba_ti", "pretrained": False},
}
PRETRAINED = "masked pretraining"


def best(run: Run) -> float:
    """The best epoch's accuracy on the validation clips."""
    return max(row["top1"] for row in run.log("val.csv"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the dataset")
    parser.add_argument("runs", type=Path, help="a folder for the runs; those in it are gone on with")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training, and of the validation clips"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument(
        "--only", nargs="+", choices=[*INGREDIENTS, PRETRAINED], help="these ingredients (default: all)"
    )
    parser.add_argument("--pretrained", type=Path, metavar="WEIGHTS", help=f"of pretrain.py: adds '{PRETRAINED}'")
    args = parser.parse_args()
    found = dict(INGREDIENTS)
    if args.pretrained:
        found[PRETRAINED] = {"model": "etmamba_ti", "checkpoint": args.pretrained.resolve()}
    names = [name for name in found if name in (args.only or found)]
    runs = {
        (name, seed): Run(
            args.runs / f"{name.replace(' ', '_')}-{seed}", RECIPE, args.data, found[name] | {"seed": seed}
        )
        for seed in args.seeds
        for name in names
    }
    train_all(list(runs.values()), args.jobs)
    results = [
        {"ingredient": name, "settings": str(found[name]), "seed": seed, "val_top1": best(run)}
        for (name, seed), run in runs.items()
    ]
    write("ingredients", results, args.runs / "ingredients.csv")
    print("| ingredient | validation top-1 |\n|---|---|")
    for name in names:
        print(f"| {name} | {spread([r['val_top1'] for r in results if r['ingredient'] == name])} |")


if __name__ == "__main__":
    main()
