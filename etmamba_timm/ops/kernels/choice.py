"""Which tensors the kernels can take, and what else their wrappers share."""

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import load_cpu, load_gpu

_logger = logging.getLogger(__name__)
_told: set[str] = set()
_plain_depth = 0

is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # from PyTorch 2.7 on


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """Within it, models use PyTorch's own operators alone, in the whole process.

    So they can be exported to run without this package, and be differentiated in every way: by `torch.func`, several
    times, forwards. Results are the same up to rounding; it takes several times as long.
    """
    global _plain_depth
    _plain_depth += 1
    try:
        yield
    finally:
        _plain_depth -= 1


def only_plain() -> bool:
    """Whether `plain_operators` is in force."""
    return _plain_depth > 0


def takes(operator: str, *tensors: Tensor | None, gpu_limit: str | None = None) -> bool:
    """Whether the kernels can take these tensors; if not on a GPU, the log says why, once.

    They take floating-point tensors on the CPU (and on 'meta', with only shapes) and on a GPU (there without float64),
    and have no forward-mode derivative. `gpu_limit` is a reason why the operator's GPU kernels don't take them, if any.
    """
    if _plain_depth:
        return False
    given = [t for t in tensors if t is not None]
    on_gpu = load_gpu.on_gpu(given[0])
    reason = _why_not(given, on_gpu) or (gpu_limit if on_gpu else None)
    if reason and on_gpu and not torch.compiler.is_compiling():
        _tell_once(f"{operator} runs on PyTorch's operators, because {reason}")
    return reason is None


def _why_not(given: list[Tensor], on_gpu: bool) -> str | None:
    device = given[0].device
    dtypes = load_gpu.DTYPES if on_gpu else load_cpu.DTYPES
    for t in given:
        if t.device != device:
            return "the tensors are on several devices"
        if t.dtype not in dtypes:
            return f"its kernels don't take {t.dtype}"
    if has_tangent(*given):
        return "its kernels have no forward-mode derivative"
    if on_gpu:
        return gpu_why_not(device)
    return _cpu_why_not() if device.type in ("cpu", "meta") else f"there are no kernels for {device.type}"


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        _logger.warning(message)


@torch.compiler.assume_constant_result  # asked once, at trace time: probing the machine can't be compiled
def _cpu_why_not() -> str | None:
    return load_cpu.why_not()


@torch.compiler.assume_constant_result
def gpu_why_not(device: torch.device) -> str | None:
    """None if this device can run the GPU kernels; else the reason and the remedy."""
    return load_gpu.why_not_on(device)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation goes through one of the tensors."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:  # outside of any `dual_level`
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def check_shapes(*expected: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """Raises ValueError for a tensor of the wrong shape: the kernels trust shapes. Takes (name, tensor, shape)."""
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; it must be {shape}")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32  # promote_types is an operator, and as slow
