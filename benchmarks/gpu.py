"""The operators and models on a GPU, beside their floors, mamba-ssm and other video models. See README.md.

python benchmarks/gpu.py [--out FILE.csv] [--minutes 4] [--only PART ...] [--check]

Without a GPU, `--device cpu --tiny` rehearses it: all runs, on small shapes, and no figure means anything.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch
from gpu_bench import OPTIONAL, REHEARSAL, Bench, Task
from gpu_models import compiled_tasks, model_tasks, profile_tasks, replayed_tasks, training_tasks
from gpu_operators import check, convolution_tasks, scan_tasks, segment_tasks

PARTS = {
    "scan": scan_tasks,
    "convolutions": convolution_tasks,
    "models": model_tasks,
    "training": training_tasks,
    "replayed": replayed_tasks,
    "profile": profile_tasks,
    "segments": segment_tasks,
    "compiled": compiled_tasks,
}


def main() -> int:
    """Returns the exit status: 1 if something was wrong or failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, help="the CSV file; benchmarks/results/gpu.csv, and none in a rehearsal")
    parser.add_argument("--minutes", type=float, default=4, help="the time budget; what it doesn't allow is left out")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--check", action="store_true", help="first compare operators and models with float64")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that all runs")
    args = parser.parse_args()
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu is only for a rehearsal; add --tiny")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch finds no CUDA device. Run this where there is one; --device cpu --tiny only rehearses it.")
    logging.basicConfig(format="%(message)s")  # why a kernel isn't taken
    torch.manual_seed(0)
    device = torch.device(args.device, *([torch.cuda.current_device()] if args.device == "cuda" else []))
    bench = Bench(device, args.tiny, args.minutes)
    print(", ".join(f"{key}: {value}" for key, value in bench.card.items()), f"torch: {torch.__version__}")
    for module, version in bench.versions.items():
        if not version:
            print(f"not installed: {module}; what needs it is left out (pip install {OPTIONAL[module]})")
    right = check(bench) if args.check else True
    tasks = [("copies", Task(0, "copies on the device", bench.measure_copies))]
    tasks += [(part, task) for part in args.only for task in PARTS[part](bench)]
    bench.run(tasks)
    bench.print_tables()
    print("\nleft out:", *(bench.left_out or ["nothing"]), sep="\n  ")
    for failure in bench.failed:
        print(f"FAILED: {failure}")
    if not right:
        print("WRONG: see above")
    if not bench.on_gpu:
        print(f"\nThis was a {REHEARSAL}.")
    if args.out or not args.tiny:
        bench.write(args.out)
    return 0 if right and not bench.failed else 1


if __name__ == "__main__":
    sys.exit(main())
