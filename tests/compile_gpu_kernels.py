"""Compiles every GPU kernel for every supported architecture, and fails on a register spill. Needs NVRTC, not a device.

python tests/compile_gpu_kernels.py [ARCHITECTURE...]
"""

import itertools
import re
import sys
from concurrent.futures import ThreadPoolExecutor

from etmamba_timm.ops.kernels import build_gpu
from etmamba_timm.ops.scan import gpu

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# The macros of each file besides DTYPE, as the models use them.
MACROS: dict[str, list[dict[str, int]]] = {
    "conv_norm_relu.cu": [
        {"ALIGNED": aligned, "CHANNELS": 3, "DEPTHWISE": depthwise} for aligned in (0, 1) for depthwise in (0, 1)
    ],
    "local_conv.cu": [{"DENSE": dense, "WIDTH": width} for dense, width in ((144, 14), (0, 14), (144, 20))],
    "norm.cu": [
        {"X_FLOAT": 1, "ALIGNED": aligned, "PER_LANE": lanes} for aligned, lanes in ((1, 2), (1, 5), (1, 10), (0, 18))
    ],
    "scan_backward.cu": [{"ALIGNED": aligned, "KEEP": gpu.KEEP} for aligned in (0, 1)],
    "scan_forward.cu": [{"ALIGNED": aligned, "KEEP": gpu.KEEP} for aligned in (0, 1)],
    "short_conv.cu": [{"ALIGNED": aligned, "TAPS": 4} for aligned in (0, 1)],
}


def variants() -> list[tuple[str, dict[str, int]]]:
    return [
        (source, {"DTYPE": dtype, **macros})
        for source, sets in MACROS.items()
        for macros, dtype in itertools.product(sets, range(3))
    ]


def resources(source: str, defines: dict[str, int], architecture: int) -> dict[str, tuple[int, int]]:
    """Registers, and bytes spilled or on the stack, of each kernel of a file."""
    texts = {path.name: path.read_bytes() for path in (build_gpu.SOURCES / source, *build_gpu.SOURCES.glob("*.h"))}
    macros = (f"--define-macro={name}={value}" for name, value in defines.items())
    flags = (*build_gpu.FLAGS, *macros, f"--gpu-architecture=sm_{architecture}", "--ptxas-options=-v")
    _, log = build_gpu.translate(texts, flags)
    if "warning" in log:
        raise SystemExit(f"{source} {defines} sm_{architecture}:\n{log}")
    found = {}
    for entry in log.split("Compiling entry function")[1:]:
        stack, *spills = map(int, re.search(r"(\d+) bytes stack.*?(\d+) bytes.*?(\d+) bytes", entry).groups())
        found[re.search(r"'(\w+)'", entry)[1]] = int(re.search(r"Used (\d+) registers", entry)[1]), stack + sum(spills)
    return found


def main(architectures: list[int]) -> int:
    missing = {path.name for path in build_gpu.SOURCES.glob("*.cu")} ^ set(MACROS)
    if missing:
        raise SystemExit(f"not listed, or not there: {', '.join(sorted(missing))}")
    # float16 differs from bfloat16 by the conversions alone, so it is compiled for one architecture.
    jobs = [
        (source, defines, architecture)
        for source, defines in variants()
        for architecture in (architectures if defines["DTYPE"] < 2 else architectures[:1])
    ]
    spilling = 0
    with ThreadPoolExecutor(2) as pool:
        for job, kernels in zip(jobs, pool.map(lambda job: resources(*job), jobs), strict=True):
            source, defines, architecture = job
            told = ", ".join(
                f"{name} {registers}" + f" SPILLS {spilled}" * (spilled > 0)
                for name, (registers, spilled) in kernels.items()
            )
            print(f"sm_{architecture} {source} {defines}: registers {told}", flush=True)
            spilling += any(spilled for _, spilled in kernels.values())
    print(f"{len(jobs) - spilling} passed, {spilling} failed")
    return spilling > 0


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:]] or list(ARCHITECTURES)))
