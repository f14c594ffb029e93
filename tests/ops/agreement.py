"""How a kernel's gradients are compared with those of a formula in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def error(found: Tensor, wanted: Tensor, size: float = 0.0) -> float:
    """max|found - wanted| / the larger of max|wanted| and `size`; where both are 0, max|found|."""
    size = max(size, wanted.abs().max().item())
    return (found.double() - wanted).abs().max().item() / (size or 1.0)


def assert_gradients_agree(
    grads: Sequence[Tensor], out: Tensor, inputs: Sequence[Tensor], weight: Tensor, bounds: Sequence[float]
) -> None:
    """Each gradient is within its bound of the formula's.

    A gradient is a sum, and with one `weight` it may cancel by chance: what is left is small beside the rounding of
    its terms, in whatever order they are added. So an error beyond the bound is taken again, relative to the gradient's
    largest value over several random weights.

    Args:
        grads: the gradients found.
        out: the formula's output in float64.
        inputs: what `out` was made of, in the order of `grads`.
        weight: the gradient of the output for which `grads` were found.
        bounds: the largest relative error of each.
    """

    def wanted(weight: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, weight.to(out.dtype), retain_graph=True)

    def errors() -> list[float]:
        return [error(*triple) for triple in zip(grads, expected, sizes, strict=True)]

    expected, sizes = wanted(weight), [0.0] * len(inputs)
    if any(e > bound for e, bound in zip(errors(), bounds, strict=True)):
        generator = torch.Generator().manual_seed(0)
        for _ in range(8):
            others = wanted(torch.randn(out.shape, generator=generator, dtype=out.dtype))
            sizes = [max(size, other.abs().max().item()) for size, other in zip(sizes, others, strict=True)]
    assert all(e <= bound for e, bound in zip(errors(), bounds, strict=True)), (errors(), bounds)
