"""Training on GPUs keeps less: what is quickly computed again is computed again in the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import on_gpu
from ..ops.kernels.choice import has_tangent, is_exporting, only_plain
from .norm import LayerNorm
from .plain import is_plain

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, LayerNorm)


class Recomputing(nn.Module):
    """A part of a block with intermediate results that aren't worth their memory.

    Attributes:
        recomputes: whether it may compute them again. A block that is recomputed as a whole has no use for it.
    """

    recomputes = True

    def recomputed(
        self,
        function: Callable[..., Tensor],
        modules: Sequence[nn.Module | None],
        *inputs: Tensor,
        parameters: Sequence[str] = (),
    ) -> Tensor:
        """`function(*inputs)`, of which the backward pass keeps the inputs alone, on a GPU; elsewhere time counts more.

        Args:
            function: gives the same result each time.
            modules: what it calls. If one of them was wrapped or has hooks, everything is computed once and kept: a
                second call could have another result (an adapter's dropout), or be one too many (a hook that counts).
            inputs: its tensors, apart from parameters.
            parameters: the names of this module's own parameters that it uses.
        """
        is_wanted = self.recomputes and torch.is_grad_enabled() and on_gpu(inputs[0])
        is_wanted = is_wanted and not (has_tangent(*inputs) or only_plain() or is_exporting())
        if not (is_wanted and all(module is None or _is_plain(module) for module in modules)):
            return function(*inputs)
        if torch.compiler.is_compiling():
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

        def weights() -> list[Tensor | None]:  # asked again in the backward pass: FSDP may have put others in place
            found = [getattr(self, name) for name in parameters]
            return found + [weight for m in modules if m is not None for weight in (m.weight, m.bias)]

        return _Recomputed.apply(function, weights, len(inputs), *inputs, *weights())


class _Recomputed(torch.autograd.Function):
    """PyTorch's `checkpoint`, in a fraction of its time on the host. Takes the inputs, then the weights."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], weights: Callable[[], list[Tensor | None]], count: int, *tensors: Any
    ) -> Tensor:
        kind = tensors[0].device.type
        ctx.function, ctx.weights = function, weights
        # Without a cache: what is cast here would have no gradient where it is taken from the cache.
        ctx.autocast = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
            "cache_enabled": False,
        }
        ctx.save_for_backward(*tensors[:count])
        with torch.autocast(**ctx.autocast):
            return function(*tensors[:count])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            out = ctx.function(*inputs)
        wanted = [t for t, is_needed in zip((*inputs, *ctx.weights()), needed, strict=True) if is_needed]
        grads = iter(torch.autograd.grad(out, wanted, dout, allow_unused=True))
        return (None, None, None, *(next(grads) if is_needed else None for is_needed in needed))


def _is_plain(module: nn.Module) -> bool:
    return type(module) in PLAIN and is_plain(module, type(module))
