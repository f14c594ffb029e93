"""Time and peak memory against the number of frames, each model in its own process. See README.md.

python benchmarks/frames.py [--frames 8 16 32 64 128] [--threads 2] [--runs 2] [--only NAME ...]
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import write
from models import MODELS


def measure(name: str, frames: int, threads: int, runs: int) -> dict[str, float]:
    """Time and memory of one model. Run in a fresh process, because a process's peak memory never falls."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = MODELS[name](frames).eval()
    clip = torch.randn(1, 3, frames, 224, 224)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    with torch.inference_mode():
        model(clip[:, :, :1] if name.startswith("etmamba") else clip)  # compiles the kernels, and warms up
        for _ in range(runs):
            start = time.perf_counter()
            model(clip)
            seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"least_s": round(min(seconds), 2), "peak_mb": peak // 1024, "above_model_mb": (peak - before) // 1024}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument(
        "--only", nargs="+", default=["etmamba_m, folded", "VideoMAE-B (transformers)"], choices=list(MODELS)
    )
    args = parser.parse_args()
    rows = []
    for frames in args.frames:
        for name in args.only:
            arguments = f"{name!r}, {frames}, {args.threads}, {args.runs}"
            call = f"import frames, json; print(json.dumps(frames.measure({arguments})))"
            folder = Path(__file__).parent
            done = subprocess.run(
                [sys.executable, "-c", call], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
            )
            rows.append({"model": name, "frames": frames} | json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    write("frames", rows)


if __name__ == "__main__":
    main()
