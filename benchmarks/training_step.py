"""Where a training step of ETMamba-Ti spends its time: 8 clips of 8×112². See README.md.

python benchmarks/training_step.py [--threads 2] [--runs 5] [--dtype float32 bfloat16]
"""

import argparse
import statistics
import time

import timm
import torch
import torch.nn.functional as F
from common import spread, write
from torch import nn

import etmamba_timm  # noqa: F401 (registers the models)
from etmamba_timm.layers import LocalBranch, Stfp

CLIPS = (8, 3, 8, 112, 112)


class Clock:
    """Seconds spent in the forward and backward passes of modules of one kind."""

    def __init__(self) -> None:
        self.seconds, self.started = 0.0, 0.0

    def start(self, *_) -> None:
        self.started = time.perf_counter()

    def stop(self, *_) -> None:
        self.seconds += time.perf_counter() - self.started

    def watch(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.start)
        module.register_forward_hook(self.stop)
        module.register_full_backward_pre_hook(self.start)
        module.register_full_backward_hook(self.stop)


def step(model: nn.Module, clips: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> None:
    model.zero_grad()
    with torch.autocast(clips.device.type, dtype, enabled=dtype != torch.float32):
        loss = F.cross_entropy(model(clips), labels)
    loss.backward()


def operator_share(model, clips, labels, dtype, name: str) -> float:
    """Seconds spent in the operators of that name in one step, by PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(model, clips, labels, dtype)
    return sum(e.self_cpu_time_total for e in profile.key_averages() if name in e.key) / 1e6


def measure(dtype: torch.dtype, runs: int) -> list[dict]:
    """The parts' shares of a step, and the step's time."""
    torch.manual_seed(0)
    model = timm.create_model("etmamba_ti", img_size=112, num_frames=8, num_classes=10).train()
    clips, labels = torch.randn(CLIPS).requires_grad_(), torch.randint(10, CLIPS[:1])
    step(model, clips, labels, dtype)
    shares: dict[str, list[float]] = {"scan": [], "STFP": [], "local branch": []}
    totals = []
    for _ in range(runs):
        start = time.perf_counter()
        step(model, clips, labels, dtype)
        totals.append(time.perf_counter() - start)
        shares["scan"].append(operator_share(model, clips, labels, dtype, "etmamba_timm::scan") / totals[-1])
    clocks = {"STFP": Clock(), "local branch": Clock()}
    for module in model.modules():
        for name, kind in (("STFP", Stfp), ("local branch", LocalBranch)):
            if isinstance(module, kind):
                clocks[name].watch(module)
    for _ in range(runs):
        for clock in clocks.values():
            clock.seconds = 0.0
        start = time.perf_counter()
        step(model, clips, labels, dtype)
        total = time.perf_counter() - start
        for name, clock in clocks.items():
            shares[name].append(clock.seconds / total)
    named = {"dtype": str(dtype).removeprefix("torch.")}
    rows = [{"part": k} | named | {"share_of_step": round(statistics.median(v), 3)} for k, v in shares.items()]
    return [*rows, {"part": "whole step"} | named | spread(totals)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for dtype in args.dtype for row in measure(getattr(torch, dtype), args.runs)]
    for row in rows:
        print(row)
    write("training_step", rows)


if __name__ == "__main__":
    main()
