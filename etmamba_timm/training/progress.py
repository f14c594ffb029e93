"""The progress of a training run. What concerns single updates is counted on the device, so that no update waits."""

import torch
from torch import Tensor


class Progress:
    """The progress of a run; part of its saved state. Losses and gradients are read from the device only on demand.

    Args:
        device: where losses and gradient norms are.

    Attributes:
        update: number of updates, including skipped ones.
        replaced: clips that replaced one of a video that couldn't be decoded.
        best, best_epoch: highest top-1 so far, and its epoch.
    """

    def __init__(self, device: torch.device) -> None:
        self.update = self.replaced = self.best_epoch = 0
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
        """Starts new sums."""
        self._sums.zero_()
        self._counts[0] = 0

    def state_dict(self) -> dict:
        """For accelerate."""
        names = ("update", "replaced", "best", "best_epoch")
        return {name: getattr(self, name) for name in names} | self.read()

    def load_state_dict(self, state: dict) -> None:
        """For accelerate."""
        for name in ("update", "replaced", "best", "best_epoch"):
            setattr(self, name, state[name])
        self._sums = self._sums.new_tensor([state["losses"], state["norms"]])
        counts = [state[name] for name in ("counted", "skipped", "in_a_row")]
        self._counts = self._counts.new_tensor([*counts, state.get("most_in_a_row", 0)])
