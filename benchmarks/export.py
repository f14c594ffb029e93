"""Exported models: how far their results are from ours, and their time and memory beside ours.

    python benchmarks/export.py etmamba_ti videomamba_ti --suffixes .onnx .xml

Weights are random. Each file is written, and run once, in processes of its own, whose peak memory is measured; then it
takes turns with our model on one random clip. A row of `results/export.csv` for each file.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from common import in_turn, spread, write

import etmamba_timm  # registers the models  # noqa: F401
from etmamba_timm.export import export_model
from etmamba_timm.models import EtMamba
from etmamba_timm.runtime import load_exported


def make(name: str) -> EtMamba:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=400).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)  # otherwise the logits are hardly more than rounding
    return model


def clip(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(1, model.in_chans, model.num_frames, *model.img_size)


def export(name: str, file: Path, dtype: str) -> dict[str, object]:
    model, start = make(name), time.process_time()
    differences = export_model(model, file, dtype=dtype)
    return {
        "export_s": round(time.process_time() - start),
        "export_peak_mb": peak_mb(),
        "file_mb": round(sum(path.stat().st_size for path in file.parent.iterdir()) / 1e6, 1),
        **{f"difference_{name}": f"{difference:.1e}" for name, difference in differences.items()},
    }


@torch.no_grad()
def peak_of(load: Callable[..., torch.nn.Module], what: object) -> int:
    model = load(what)
    model(clip(model))
    return peak_mb()


def peak_mb() -> int:
    """The most memory that this process has held so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024)


def measure(name: str, suffix: str, dtype: str, runs: int, folder: Path) -> dict[str, object]:
    file = folder / f"model{suffix}"
    processes = multiprocessing.get_context("spawn")
    with processes.Pool(1, maxtasksperchild=1) as pool:
        row = {"model": name, "suffix": suffix, "dtype": dtype} | pool.apply(export, (name, file, dtype))
        row["peak_mb"] = pool.apply(peak_of, (load_exported, file))
        row["our_peak_mb"] = pool.apply(peak_of, (make, name))
    ours, theirs = make(name), load_exported(file)
    ours.fold()
    x = clip(ours)
    with torch.no_grad():
        seconds = in_turn(runs, ours=lambda: ours(x), theirs=lambda: theirs(x))
    ratio = min(seconds["theirs"]) / min(seconds["ours"])
    return row | spread(seconds["theirs"]) | {"times_ours": round(ratio, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--suffixes", nargs="+", default=[".onnx"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="another file than results/export.csv")
    args = parser.parse_args()
    rows = []
    for name in args.models:
        for suffix in args.suffixes:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(name, suffix, args.dtype, args.runs, Path(folder)))
            print(rows[-1], flush=True)
    write("export", rows, args.out)


if __name__ == "__main__":
    main()
