"""ETMamba-Ti on small clips of few videos: taught by `etmamba_ti.mocap`, and alone.

python -m projects.mocap.distill DATA RUNS --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.common import write

from ..runs import Run, etmamba
from .variation import CLASSES, PARTS

RECIPE = Path(__file__).with_name("short.yaml")
TEACHER = "etmamba_ti.mocap"
LEARNT = CLASSES[1::2]  # the teacher knows the others too
SMALL = {"num_frames": 8, "size": 32, "epochs": 24, "warmup_epochs": 2, "eval_epochs": 4}
TAUGHT = {"teacher_weight": 0.7, "temperature": 3}


def few(data: Path, out: Path, videos: int) -> Path:
    """A dataset of the first training videos of half of the classes, and all of the other parts', made of links."""
    for part in PARTS:
        for name in LEARNT:
            (out / part / name).mkdir(parents=True, exist_ok=True)
            files = sorted((data / part / name).glob("*.mp4"))
            for file in files[:videos] if part == "train" else files:
                if not (out / part / name / file.name).exists():
                    (out / part / name / file.name).symlink_to(file.resolve())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the rendered dataset")
    parser.add_argument("runs", type=Path, help="a folder for the runs; those in it are gone on with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--videos", type=int, default=25, help="training videos a class")
    args = parser.parse_args()
    data = few(args.data, args.runs / "data", args.videos)
    scores = args.runs / "teacher.safetensors"
    if not scores.exists():
        etmamba("teach", "--model", TEACHER, "--data", data, "-o", scores, threads=1)
    rows = []
    for seed in args.seeds:
        for name, settings in (("alone", {}), ("taught", {"teacher": scores, **TAUGHT})):
            run = Run(args.runs / f"{name}-{seed}", RECIPE, data, {**SMALL, **settings, "seed": seed})
            run.train()
            tested = run.test()
            rows.append({"start": name, "seed": seed, "videos": args.videos, "test_top1": tested.topk(1)})
            print(f"{name}, seed {seed}: {tested.topk(1):.1%} of {len(tested.labels)} test videos", flush=True)
    write("mocap_distill", rows)
    alone, taught = ([row["test_top1"] for row in rows if row["start"] == name] for name in ("alone", "taught"))
    print(f"taught {statistics.mean(taught):.1%}, alone {statistics.mean(alone):.1%}")


if __name__ == "__main__":
    main()
