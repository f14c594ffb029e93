"""What PyTorch's `FlopCounterMode` counts for the CPU kernels, which it can't look into: two operations a multiply-add.

A backward pass counts as twice the forward pass, by the usual convention: what is computed again isn't counted.
"""

from collections.abc import Callable
from math import prod

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import conv_norm_relu, local_conv, short_conv  # noqa: F401 (they define the operators)
from .scan import cpu  # noqa: F401

Shape = tuple[int, ...]
_ops = torch.ops.etmamba_timm


def _formula(operator) -> Callable:
    """`register_flop_formula`; PyTorch 2.4 files a formula under an operator's overloads, where it doesn't look."""

    def register(formula: Callable) -> Callable:
        flop_registry.setdefault(operator, register_flop_formula(operator)(formula))
        return formula

    return register


def _scan(u: Shape, A: Shape) -> int:
    """For each step and channel 4 multiply-adds for each state and 3 beside them; exponentials aren't counted."""
    return 2 * prod(u) * (4 * A[1] + 3)


def _short_conv(x: Shape, taps: Shape) -> int:
    return 2 * prod(x) * taps[0]


def _local_conv(x: Shape, taps: Shape, *grid: int) -> int:
    return 2 * x[0] * prod(grid) * prod(taps)


def _conv_norm_relu(x: Shape, depthwise: bool) -> int:
    return 2 * prod(x) * (x[1] + 27 * depthwise)


@_formula(_ops.cpu_scan)
def _(u, delta, A, *args, **kwargs) -> int:
    return _scan(u, A)


@_formula(_ops.cpu_scan_backward)
def _(dout, u, delta, A, *args, **kwargs) -> int:
    return 2 * _scan(u, A)


@_formula(_ops.cpu_short_conv)
def _(x, taps, *args, **kwargs) -> int:
    return _short_conv(x, taps)


@_formula(_ops.cpu_short_conv_backward)
def _(dout, x, taps, *args, **kwargs) -> int:
    return 2 * _short_conv(x, taps)


@_formula(_ops.cpu_local_conv)
def _(x, residual, taps, biases, t, h, w, **kwargs) -> int:
    return _local_conv(x, taps, t, h, w)


@_formula(_ops.cpu_local_conv_backward)
def _(dout, x, taps, biases, t, h, w, **kwargs) -> int:
    return 2 * _local_conv(x, taps, t, h, w)


@_formula(_ops.cpu_conv_norm_relu)
def _(x, residual, parameters, depthwise, eps, **kwargs) -> int:
    return _conv_norm_relu(x, depthwise)


@_formula(_ops.cpu_conv_norm_relu_backward)
def _(dout, x, parameters, depthwise, *args, **kwargs) -> int:
    return 2 * _conv_norm_relu(x, depthwise)
