"""The scan's GPU kernels with one barrier, or one wait for a copy, taken out: do the emulation and a small case notice?

`python tests/ops/scan/scan_mutants.py` tries all of them, a few seconds each, and fails if one goes unnoticed.
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import emulated

from etmamba_timm.ops.kernels import build_gpu, load_gpu
from etmamba_timm.ops.scan import fused, gpu, reference
from etmamba_timm.ops.scan.backend import ScanInputs


class Mutant(NamedTuple):
    """A statement of a file to take out."""

    file: str
    start: int
    end: int

    def __str__(self) -> str:
        text = (build_gpu.SOURCES / self.file).read_text()
        return f"{self.file}:{text[: self.start].count(chr(10)) + 1}:{text[self.start : self.end]}"


def _mutants() -> list[Mutant]:
    return [
        Mutant(file, match.start(), match.end())
        for file in ("scan_forward.cu", "scan_backward.cu", "scan.h")
        for match in re.finditer(r"__syncthreads\(\);|wait_for_copies<\d>\(\);", (build_gpu.SOURCES / file).read_text())
    ]


MUTANTS = _mutants()


def spoils(mutant: Mutant | None, monkeypatch: pytest.MonkeyPatch, folder: Path) -> bool:
    """Whether outputs or gradients become wrong under some order of threads."""
    for path in build_gpu.SOURCES.iterdir():
        shutil.copy(path, folder)
    if mutant:
        text = (folder / mutant.file).read_text()
        (folder / mutant.file).write_text(text[: mutant.start] + text[mutant.end :])
    monkeypatch.setattr(build_gpu, "SOURCES", folder)
    emulated.emulate(monkeypatch)
    compiled: dict[str, emulated.EmulatedModule] = {}

    def module(source, like, **defines):
        return compiled.setdefault(source, emulated.EmulatedModule(source, defines))

    monkeypatch.setattr(load_gpu, "module", module)
    torch.manual_seed(0)
    sequences = [torch.randn(2, 120, n).mT for n in (32, 32, 16, 16, 32)]
    u, delta, B, C, z = (x.requires_grad_() for x in sequences)
    A, D, bias = (x.requires_grad_() for x in (-torch.rand(32, 16) - 0.1, torch.randn(32), torch.randn(32) - 2))
    inputs = ScanInputs(u, delta, A, B, C, D, z, bias, True)

    def results(scan) -> list[torch.Tensor]:
        out, _ = scan(inputs, 1)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), list(inputs[:8]))]

    wanted = results(reference.scan)
    for order in ("0", "1", "2", "2", "2"):
        monkeypatch.setenv("EMULATION_ORDER", order)
        for segments in (1, 3):
            monkeypatch.setattr(gpu, "segments", lambda *sizes, backward=False, n=segments: n)
            for got, want in zip(results(fused.scan), wanted, strict=True):
                if not (got - want).abs().max() <= 1e-4 * want.abs().max():
                    return True
    return False


def main() -> int:
    """Each in a process of its own: one that hangs or dies is noticed too."""
    unnoticed = 0
    for mutant in (None, *MUTANTS):
        pid = os.fork()
        if pid == 0:
            with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
                found = spoils(mutant, monkeypatch, Path(folder))
            os._exit(found)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        told = {0: "right", 1: "wrong"}.get(code, f"died ({code})")
        print(f"{mutant or 'as it is'}: {told}", flush=True)
        unnoticed += (code == 0) != (mutant is None)
    print(f"{len(MUTANTS)} mutants, {unnoticed} not as they should be")
    return unnoticed > 0


if __name__ == "__main__":
    sys.exit(main())
