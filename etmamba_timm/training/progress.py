"""The progress of a training run. What concerns single updates is counted on the device, so that no update waits."""

import time

import torch
from torch import Tensor

FIRST_LINE, LINES = 5, 30  # seconds until a line in the log, and between two


class Progress:
    """The progress of a run; part of its saved state. Losses and gradients are read from the device only on demand.

    Args:
        device: where losses and gradient norms are.

    Attributes:
        update: number of updates, including skipped ones.
        replaced: clips that replaced one of a video that couldn't be decoded.
        best, best_epoch: highest top-1 (or mAP) so far, and its epoch.
        row: number of updates when the log's current row was started.
    """

    NAMES = ("update", "replaced", "best", "best_epoch", "row")

    def __init__(self, device: torch.device) -> None:
        self.update = self.replaced = self.best_epoch = self.row = 0
        self.best = -1.0
        self._sums = torch.zeros(2, device=device)  # of losses and norms since the log's last row
        # Updates that these sums are over; all skipped ones, the latest in a row, and the most in a row.
        self._counts = torch.zeros(4, dtype=torch.int64, device=device)

    @torch.no_grad()
    def count(self, loss: Tensor, norm: Tensor, is_finite: Tensor) -> None:
        """Counts an update; nothing is read back. Scalars: its loss, its gradient's norm, and whether that is finite.

        An update whose gradient isn't finite counts as skipped, and its loss not at all.
        """
        self.update += 1
        self._sums += torch.where(is_finite, torch.stack([loss, norm]), 0.0)
        counted, skipped, in_a_row, most = self._counts.unbind()
        in_a_row = torch.where(is_finite, 0, in_a_row + 1)
        self._counts = torch.stack(
            [counted + is_finite, skipped + is_finite.logical_not(), in_a_row, torch.maximum(most, in_a_row)]
        )

    def read(self) -> dict[str, float]:
        """What was counted, read from the device, which waits for it.

        Returns: since the last `start_row` the sums 'losses' and 'norms' over 'counted' updates; over the whole run the
            number of 'skipped' updates, how many of them are the latest 'in_a_row', and the 'most_in_a_row'.
        """
        sums, counts = self._sums.tolist(), self._counts.tolist()
        names = ("losses", "norms", "counted", "skipped", "in_a_row", "most_in_a_row")
        return dict(zip(names, [*sums, *counts], strict=True))

    def start_row(self) -> None:
        """Starts new sums, for the next row of the log."""
        self.row = self.update
        self._sums.zero_()
        self._counts[0] = 0

    def state_dict(self) -> dict:
        """For accelerate."""
        return {name: getattr(self, name) for name in self.NAMES} | self.read()

    def load_state_dict(self, state: dict) -> None:
        """For accelerate."""
        for name in self.NAMES:
            setattr(self, name, state[name])
        self._sums = self._sums.new_tensor([state["losses"], state["norms"]])
        counts = [state[name] for name in ("counted", "skipped", "in_a_row")]
        self._counts = self._counts.new_tensor([*counts, state.get("most_in_a_row", 0)])


class Timer:
    """Says when it is time for a line in the log: after `FIRST_LINE` seconds, and then every `LINES` seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + FIRST_LINE

    def is_due(self) -> bool:
        """Whether it is time; if so, the next time is `LINES` seconds from now."""
        now = time.monotonic()
        if due := now >= self._next:
            self._next = now + LINES
        return due


class Pace:
    """How fast a run is, measured in this process, and how long the rest of it takes."""

    def __init__(self) -> None:
        self._updates, self._seconds = 0, 0.0
        self._evaluation: float | None = None  # seconds for one view of each video
        self._is_first = True

    def start(self) -> None:
        """Starts to measure updates, after other work."""
        self._since = time.perf_counter()

    def count(self) -> None:
        """Counts an update. The first isn't representative: kernels are compiled, and workers start."""
        now = time.perf_counter()
        if not self._is_first:
            self._updates, self._seconds = self._updates + 1, self._seconds + now - self._since
        self._is_first, self._since = False, now

    def count_evaluation(self, seconds: float) -> None:
        """Keeps the time of an evaluation with one view per video."""
        self._evaluation = seconds

    @property
    def updates_per_second(self) -> float:
        """0 before the second update."""
        return self._updates / self._seconds if self._updates else 0.0

    def left(self, updates: int, evaluations: int) -> str:
        """How long so many updates and evaluations take, in words."""
        if not self._updates:
            return "time left unknown"
        seconds = updates * self._seconds / self._updates + evaluations * (self._evaluation or 0)
        beside = "" if self._evaluation is not None or not evaluations else " and evaluation"
        return f"about {duration(seconds)}{beside} left"


def duration(seconds: float) -> str:
    """'40 s', '12 min', '3 h 20 min', '2 d 5 h'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
