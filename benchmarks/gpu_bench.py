"""What the parts of gpu.py share: the clock, the time budget, the card, and the rows of results."""

import gc
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from common import write

REHEARSAL = "rehearsal, not measured on a GPU"
COLUMNS = (
    "what",
    "case",
    "dtype",
    "ms",
    "floor_ms",
    "floor_of",
    "times_floor",
    "ratio",
    "ratio_to",
    "peak_mib",
    "note",
)
OPTIONAL = {  # module: package
    "cuda.bindings": "cuda-bindings",
    "mamba_ssm": "mamba-ssm",
    "transformers": "transformers",
    "torchvision": "torchvision",
}
Key = tuple[str, str, str]  # of a row: what, case, dtype


class OutOfTime(BaseException):
    """Not an Exception: PyTorch's compiler would take it for a failure of its own."""


@dataclass(frozen=True)
class Task:
    """One thing to measure. Tasks run in the order of their ranks, so that the most important come first."""

    rank: int
    name: str
    run: Callable[[], None]


def installed() -> dict[str, str]:
    """The version of each optional package, '' for one that isn't there."""
    versions = {}
    for module, package in OPTIONAL.items():
        try:
            versions[module] = version(package)
        except PackageNotFoundError:
            versions[module] = ""
    return versions


class Bench:
    """Times functions on one device within a budget, and collects rows.

    Args:
        device: a CUDA device, or the CPU for a rehearsal.
        tiny: whether shapes are small, to see that all runs.
        minutes: the budget. A part of it is kept for the imports before and the tables after.
    """

    def __init__(self, device: torch.device, tiny: bool, minutes: float) -> None:
        self.device, self.tiny, self.on_gpu = device, tiny, device.type == "cuda"
        self.deadline = time.monotonic() + 0.92 * 60 * minutes
        self.rows: list[dict] = []
        self.left_out: list[str] = []
        self.failed: list[str] = []
        self.part = ""
        self.versions = installed()
        self.card, self.exponentials = _card(device)
        self.bytes = 0.0  # a second; see `measure_copies`
        self._running = False
        self._sleep = 0.001  # seconds for which launches are held back

    # The budget.

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out.append(f"{name}: {reason}")
        self._say(f"left out: {name}: {reason}")

    def run(self, tasks: list[tuple[str, Task]]) -> None:
        """Runs the tasks of all parts, by rank, until the time is up; what fails doesn't stop the others."""
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, self._alarm)
            signal.setitimer(signal.ITIMER_REAL, max(self.left(), 0.01), 5)
        for part, task in sorted(tasks, key=lambda pair: pair[1].rank):
            if self.left() <= 0:
                self.leave_out(task.name, "no time was left")
                continue
            self.part, self._running = part, True
            try:
                task.run()
            except OutOfTime:
                self.leave_out(task.name, "the time was up, or would have been")
            except torch.cuda.OutOfMemoryError:
                self.leave_out(task.name, "out of the device's memory")
            except Exception as error:
                self.failed.append(f"{task.name}: {type(error).__name__}: {error}")
                self._say(f"FAILED: {self.failed[-1]}")
            finally:
                self._running = False
            self.release()
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _alarm(self, *_) -> None:
        if self._running:
            raise OutOfTime

    def release(self) -> None:
        """Gives back the memory of what went before."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    # The clock.

    def time(self, function: Callable[[], object], queued: bool = False) -> dict[str, object]:
        """The median time of a call, its peak memory, and what is odd about them.

        With `queued`, the launches of a few calls wait behind a short kernel that only sleeps. So the device's own time
        is measured, however slow the host is. Caches are warm.

        Raises: OutOfTime, if it would take more than what is left.
        """
        function()  # compiles, and fills PyTorch's cache of memory
        self.synchronize()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        function()
        host = time.perf_counter() - start
        self.synchronize()
        whole = time.perf_counter() - start
        peak = {"peak_mib": round(torch.cuda.max_memory_allocated(self.device) / 2**20)} if self.on_gpu else {}
        runs = 3 if whole > 0.1 or self.tiny else 7
        if runs * whole > self.left():
            raise OutOfTime
        if not self.on_gpu:
            return {"ms": statistics.median(self._on_cpu(function) for _ in range(runs))} | peak
        if not queued:
            return {"ms": statistics.median(self._once(function, 1)[0] for _ in range(runs))} | peak
        self._sleep = max(0.001, 3 * host)
        timed = [self._queued(function, 2) for _ in range(runs)]
        odd = {} if all(waited for _, waited in timed) else {"note": "the host was slower than the device"}
        return {"ms": statistics.median(ms for ms, _ in timed)} | peak | odd

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _on_cpu(self, function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3

    def _queued(self, function: Callable[[], object], repeats: int) -> tuple[float, bool]:
        """Sleeps longer until all launches are in the queue before the first of them starts, but not for ever."""
        while True:
            torch.cuda._sleep(int(2e9 * self._sleep))  # cycles, at 2 GHz
            ms, waited = self._once(function, repeats)
            if waited or self._sleep > 0.2:
                return ms, waited
            self._sleep *= 3

    def _once(self, function: Callable[[], object], repeats: int) -> tuple[float, bool]:
        """Milliseconds of a call, and whether the device hadn't started when the last one was queued."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        waited = not start.query()
        self.synchronize()
        return start.elapsed_time(end) / repeats, waited

    def measure_copies(self) -> None:
        """The card's copy rate: a large copy on the device, read and written."""
        source = torch.zeros((1 << 20) if self.tiny else (1 << 30), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        timed = self.time(lambda: target.copy_(source), queued=True)
        self.bytes = 2 * source.numel() / timed["ms"] * 1e3
        rate = f"{self.bytes / 1e12:.2f} TB/s, read and written"
        self.record("copy on the device", f"{source.numel() >> 20} MiB", "uint8", **(timed | {"note": rate}))

    # The rows.

    def record(self, what: str, case: str, dtype: str, ratio_to: Key | None = None, **values) -> None:
        """Adds a row: values are ms, floor_ms, floor_of, peak_mib, note. The row of `ratio_to` may come later."""
        notes = [values.pop("note", ""), "" if self.on_gpu else REHEARSAL, "tiny shapes" if self.tiny else ""]
        row = {"part": self.part, "what": what, "case": case, "dtype": dtype, "_ratio_to": ratio_to} | values
        if values.get("floor_ms"):
            row["times_floor"] = values["ms"] / values["floor_ms"]
        row["note"] = "; ".join(filter(None, notes))
        self.rows.append(row)
        said = (self.part, what, case, dtype, f"{row['ms']:.4g} ms" if "ms" in row else "", row["note"])
        self._say(" | ".join(filter(None, said)))

    def results(self) -> Iterator[dict]:
        """The rows with their ratios, rounded to 4 digits."""
        found = {(row["what"], row["case"], row["dtype"]): row["ms"] for row in self.rows if "ms" in row}
        for row in self.rows:
            key = row["_ratio_to"]
            if key in found:
                own = (row["what"], row["case"], row["dtype"])
                other = ", ".join(theirs for theirs, mine in zip(key, own, strict=True) if theirs != mine)
                row = row | {"ratio": row["ms"] / found[key], "ratio_to": other}
            row = {key: row.get(key, "") for key in ("part", *COLUMNS)}
            yield {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}

    def print_tables(self) -> None:
        rows = list(self.results())
        for part in dict.fromkeys(row["part"] for row in rows):
            own = [row for row in rows if row["part"] == part]
            columns = [name for name in COLUMNS if any(row[name] != "" for row in own)]
            lines = [columns, *([str(row[name]) for name in columns] for row in own)]
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            print(f"\n{part}")
            for line in lines:
                print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())

    def write(self, path) -> None:
        about = self.card | {"cuda": torch.version.cuda or ""} | self.versions
        write("gpu", [row | about for row in self.results()], path)

    def _say(self, line: str) -> None:
        print(f"[{self.left():.0f} s left] {line}", flush=True)


def _card(device: torch.device) -> tuple[dict[str, object], float]:
    """The card's name, driver, clock and multiprocessors, and how many exponentials it computes in a second."""
    if device.type != "cuda":
        return {"card": f"none: {REHEARSAL}"}, 1e9
    properties = torch.cuda.get_device_properties(device)
    clock = getattr(properties, "clock_rate", 0) / 1e3  # MHz
    driver = ""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader,nounits"]
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        driver, highest = output.splitlines()[0].split(", ")
        clock = clock or float(highest)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        pass  # there may be no nvidia-smi, or no clock of this kind
    clock = clock or 1500.0
    processors = properties.multi_processor_count
    card = {"card": properties.name, "driver": driver, "clock_mhz": clock, "multiprocessors": processors}
    return card, 16 * processors * clock * 1e6
