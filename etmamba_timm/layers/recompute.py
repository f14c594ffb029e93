"""Training on GPUs keeps less: what is quickly computed again is computed again in the backward pass."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import on_gpu
from ..ops.kernels.choice import has_tangent, is_exporting, only_plain
from .norm import LayerNorm
from .plain import is_plain

T = TypeVar("T")
PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, LayerNorm)


class Recomputing(nn.Module):
    """A part of a block with intermediate results that aren't worth their memory.

    Attributes:
        recomputes: whether it may compute them again. A block that is recomputed as a whole has no use for it.
    """

    recomputes = True

    def recomputed(self, function: Callable[..., T], modules: Sequence[nn.Module | None], *inputs: Tensor) -> T:
        """`function(*inputs)`, of which the backward pass keeps the inputs alone, on a GPU; elsewhere time counts more.

        Args:
            function: gives the same result each time.
            modules: what it calls. If one of them was wrapped or has hooks, everything is computed once and kept: a
                second call could have another result (an adapter's dropout), or be one too many (a hook that counts).
            inputs: its tensors, apart from parameters.
        """
        is_wanted = self.recomputes and torch.is_grad_enabled() and on_gpu(inputs[0])
        is_wanted = is_wanted and not (has_tangent(*inputs) or only_plain() or is_exporting())
        if is_wanted and all(module is None or _is_plain(module) for module in modules):
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return function(*inputs)


def _is_plain(module: nn.Module) -> bool:
    return type(module) in PLAIN and is_plain(module, type(module))
