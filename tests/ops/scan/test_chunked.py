"""The vectorised PyTorch scan against the reference in float64: outputs, last states and every gradient.

The sizes of its blocks are drawn along with the shapes: the one it ships with cuts nothing that a test has time for.
"""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from etmamba_timm.ops.scan import chunked, reference
from etmamba_timm.ops.scan.backend import ScanInputs

NAMES = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"]
PARAMETERS = {"A", "D", "delta_bias"}  # their gradients are sums over the batch and time

# Largest error over largest value
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
PARAMETER_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def make(
    batch: int, width: int, length: int, n_state: int, without: tuple[str, ...] = (), transposed: bool = False, seed=0
) -> list[Tensor | None]:
    """The scan's eight tensors in float64, holding float32 values. Δ is positive with softplus and without."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def sequence(rows: int) -> Tensor:
        return normal(batch, length, rows).transpose(1, 2) if transposed else normal(batch, rows, length)

    values = {
        "u": sequence(width),
        "delta": sequence(width).abs() * 0.5,
        "A": -torch.exp(normal(width, n_state)),
        "B": sequence(n_state),
        "C": sequence(n_state),
        "D": normal(width),
        "z": sequence(width),
        "delta_bias": normal(width).abs() * 0.1,
    }
    return [None if name in without else values[name].double() for name in NAMES]


def cast(args: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The sequences in dtype, the parameters in float32 at least; strides as they are."""
    wide = dtype if dtype == torch.float64 else torch.float32
    return [
        t if t is None else t.to(wide if name in PARAMETERS else dtype) for name, t in zip(NAMES, args, strict=True)
    ]


def results(scan, args: list[Tensor | None], softplus: bool, reverse_from: int) -> dict[str, Tensor]:
    """The output, the last state and, for random gradients of both, the gradient of every argument."""
    args = [t if t is None else t.detach().requires_grad_() for t in args]
    out, state = scan(ScanInputs(*args, softplus), reverse_from)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randint(-8, 9, t.shape, generator=generator).to(t.dtype) / 4 for t in (out, state)]  # exact
    given = {name: t for name, t in zip(NAMES, args, strict=True) if t is not None}
    grads = torch.autograd.grad((out, state), list(given.values()), weights)
    return {"out": out.detach(), "state": state.detach()} | dict(zip(given, grads, strict=True))


def error(found: Tensor, wanted: Tensor) -> Tensor:
    assert found.shape == wanted.shape
    return (found.double() - wanted).abs().max()


def check(args: list[Tensor | None], softplus: bool = True, reverse_from: int = 1) -> None:
    """Holds both wide dtypes to the reference in float64.

    A sum may cancel, above all where the width is 1 and the largest value is the only one. Where the reference in
    float32 misses the tolerance itself, twice its error is allowed.
    """
    wanted = results(reference.scan, args, softplus, reverse_from)
    for dtype in (torch.float64, torch.float32):
        found = results(chunked.scan, cast(args, dtype), softplus, reverse_from)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            tolerance = (PARAMETER_TOLERANCE if name in PARAMETERS else TOLERANCE)[dtype] * value.abs().max()
            if error(found[name], value) > tolerance and dtype == torch.float32:
                own = results(reference.scan, cast(args, dtype), softplus, reverse_from)[name]
                tolerance = max(tolerance, 2 * error(own, value))
            assert error(found[name], value) <= tolerance, name


def sizes(block: int, wide: int):
    return mock.patch.multiple(chunked, BLOCK=block, WIDE=wide)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 4),
    width=st.integers(1, 9),
    length=st.integers(1, 150),
    n_state=st.integers(1, 20),
    without=st.sets(st.sampled_from(["D", "z", "delta_bias"])),
    softplus=st.booleans(),
    backwards=st.sampled_from(["none", "half", "all"]),
    transposed=st.booleans(),
    block=st.sampled_from([1, 2**10, 2**13, chunked.BLOCK]),
    wide=st.sampled_from([1, chunked.WIDE]),
)
def test_any_arguments(batch, width, length, n_state, without, softplus, backwards, transposed, block, wide):
    args = make(batch, width, length, n_state, tuple(without), transposed, seed=length)
    reverse_from = {"none": batch, "half": batch // 2, "all": 0}[backwards]
    with sizes(block, wide):
        check(args, softplus, reverse_from)


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 31, 32, 33, 48, 49, 50])
@pytest.mark.parametrize("wide", [12, 13])
def test_lengths_around_the_cuts(length, wide):
    args = make(2, 3, length, 2)
    with sizes(16 * 12, wide):  # 16 steps a block; 1 chunk or 4
        blocks, chunks, steps = chunked._cut(length, 12, True)
        assert length <= blocks * chunks * steps < length + blocks * chunks
        check(args)


def test_sizes_it_ships_with():
    """Without a patch: several blocks of several chunks."""
    args = make(1, 192, 197, 16, transposed=True)
    blocks, chunks, steps = chunked._cut(3137, 576 * 16, True, on_cpu=False)
    assert blocks * (2 * steps + chunks) < 300  # calls, on a GPU; one for each step on a CPU
    blocks, chunks, steps = chunked._cut(197, 192 * 16, True)
    assert min(blocks, chunks, steps) > 1
    check(args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reverse_from", [0, 1, 2])
def test_half_types_are_rounded_once(dtype, reverse_from):
    args = cast(make(2, 5, 100, 4), dtype)
    wanted = results(reference.scan, cast(args, torch.float64), True, reverse_from)
    found = results(chunked.scan, args, True, reverse_from)
    assert found["out"].dtype == found["u"].dtype == dtype
    assert found["state"].dtype == found["A"].dtype == torch.float32
    for name in set(NAMES) | {"out"}:
        tolerance = 1e-4 if name in PARAMETERS else torch.finfo(dtype).eps
        assert error(found[name], wanted[name]) <= tolerance * wanted[name].abs().max(), name


@pytest.mark.parametrize("softplus", [False, True])
def test_steps_of_any_size(softplus):
    """Δ of 1000 forgets everything, Δ of 0 nothing: side by side in time, and each on its own in a channel."""
    args = make(2, 4, 120, 3, without=("delta_bias",))
    sizes_of_step = torch.tensor([1e3, -2.0, -1e3] if softplus else [1e3, 0.1, 0.0]).double()
    args[1] = sizes_of_step[torch.arange(2 * 4 * 120).mul(7).remainder(11).remainder(3).view(2, 4, 120)]
    args[1][:, 0], args[1][:, 1] = sizes_of_step[0], sizes_of_step[2]
    with sizes(2**10, 2**13):
        found = results(chunked.scan, cast(args, torch.float32), softplus, 1)
        assert all(t.isfinite().all() for t in found.values())
        check(args, softplus)


def test_growing_states():
    """A may be positive, and Δ negative."""
    args = make(2, 4, 100, 3, without=("delta_bias",))
    args[2] *= torch.tensor([1.0, -0.1, 0.2])
    args[1][:, ::2] *= -0.1
    with sizes(2**10, 2**13):
        check(args, softplus=False)


def test_growth_of_nothing_stays_nothing():
    """A state of 0 may grow without bounds, over any number of steps; a decay over many of them would be infinite."""
    args = make(1, 3, 100, 2, without=("delta_bias",))
    args[1], args[2] = torch.ones_like(args[1]), torch.full_like(args[2], 50.0)
    args[0][..., :-1] = 0
    found = results(chunked.scan, cast(args, torch.float32), False, 1)
    wanted = results(reference.scan, cast(args, torch.float32), False, 1)
    for name in ("out", "state"):
        assert found[name].isfinite().all()
        torch.testing.assert_close(found[name], wanted[name])


@pytest.mark.parametrize("reverse_from", [0, 1, 2])
def test_gradcheck(reverse_from):
    args = [t.requires_grad_() for t in make(2, 2, 11, 2)]
    with sizes(5 * 8, 2**13):  # 3 blocks of 2 chunks
        assert chunked._cut(11, 8, True)[:2] == (3, 2)
        assert torch.autograd.gradcheck(lambda *args: chunked.scan(ScanInputs(*args, True), reverse_from), args)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.itemsize)
        return out


def test_memory():
    """Neither direction holds anything near [B, D, N, L], nor keeps it."""
    args = [t.requires_grad_() for t in cast(make(1, 64, 500, 16), torch.float32)]
    naive = 64 * 500 * 16
    kept = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.itemsize
        return t

    with sizes(2**15, 2**13), LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out, _ = chunked.scan(ScanInputs(*args, True), 0)
        out.sum().backward()
    assert largest.numel < 0.5 * naive  # the backward's four buffers of a block
    assert sum(kept.values()) < naive


def test_needs_nothing():
    inputs = ScanInputs(*cast(make(1, 2, 3, 2), torch.bfloat16))
    assert chunked.BACKEND.why_not() is None
    assert chunked.BACKEND.rejects(inputs) is None
