"""What `import etmamba_timm` adds to the time of `import timm`, in fresh processes.

python benchmarks/import_time.py [runs]
"""

import statistics
import subprocess
import sys

CODE = """
import time
start = time.perf_counter()
import timm
between = time.perf_counter()
import etmamba_timm
print((time.perf_counter() - between) / (between - start), between - start)
"""

runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
rows = []
for _ in range(runs + 1):  # the first warms the disk's cache
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    rows.append([float(x) for x in done.stdout.split()])
ratios, seconds = zip(*rows[1:], strict=True)
print(f"import timm: {statistics.median(seconds):.2f} s")
print(f"import etmamba_timm on top: {statistics.median(ratios):.1%} of it (median of {runs}; most {max(ratios):.1%})")
