"""What `import etmamba_timm` adds to `import timm`, and how long commands take; in fresh processes, in turn.

Commands are compared with `python -c "import torch"`. `python -m etmamba_timm` imports the package first, and with it
PyTorch and timm; the `etmamba` command imports what it needs.

python benchmarks/import_time.py [runs]
"""

import statistics
import subprocess
import sys
import time

IMPORT = """
import time
start = time.perf_counter()
import timm
between = time.perf_counter()
import etmamba_timm
print((time.perf_counter() - between) / (between - start), between - start)
"""
TORCH = [sys.executable, "-c", "import torch"]
MODULE = [sys.executable, "-m", "etmamba_timm"]
COMMAND = [sys.executable, "-c", "import sys; from etmamba_command import main; sys.exit(main())"]
ARGUMENTS = (["--help"], ["info"], ["info", "etmamba_ti"], ["info", "--backends"], ["predict"])


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - start


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    imports = []
    times: dict[str, list[float]] = {}
    for _ in range(runs + 1):  # the first warms the disk's cache
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        imports.append([float(x) for x in done.stdout.split()])
        torch = seconds(TORCH)
        times.setdefault("torch", []).append(torch)
        for arguments in ARGUMENTS:
            for start in (MODULE, COMMAND):
                times.setdefault(f"{arguments} {start is MODULE}", []).append(seconds([*start, *arguments]) / torch)
    ratios, alone = zip(*imports[1:], strict=True)
    print(f"import timm: {statistics.median(alone):.2f} s")
    print(
        f"import etmamba_timm on top: {statistics.median(ratios):.1%} of it (median of {runs}; most {max(ratios):.1%})"
    )
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    print(f"\nimport torch: {median['torch']:.2f} s; in this unit:\n{'':24}python -m etmamba_timm   etmamba")
    for arguments in ARGUMENTS:
        name = "etmamba " + " ".join(arguments)
        print(f"{name:24}{median[f'{arguments} True']:22.2f}{median[f'{arguments} False']:10.2f}")


if __name__ == "__main__":
    main()
