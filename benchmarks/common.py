"""What the benchmarks share: timing in turn, the machine's description, rows of results."""

import csv
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

import etmamba_timm


def in_turn(runs: int, settle: bool = False, **functions: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each of `runs` calls of each function, in turn after a warm-up, so that drift affects all alike.

    With `settle`, an untimed call precedes each timed one, so that none pays for the memory that another has freed.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            if settle:
                function()
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def machine() -> dict[str, object]:
    """Processor, threads and versions, for a row of results."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "etmamba-timm": etmamba_timm.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def write(name: str, rows: list[dict], path: Path | None = None) -> None:
    """Writes results/<name>.csv, or a file elsewhere: a row per measurement, each with the machine's description."""
    path = path or Path(__file__).with_name("results") / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = machine()
    rows = [row | about for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {path}")


def spread(seconds: list[float]) -> dict[str, float]:
    """Minimum and median, in milliseconds."""
    return {"least_ms": round(min(seconds) * 1e3, 2), "median_ms": round(statistics.median(seconds) * 1e3, 2)}
