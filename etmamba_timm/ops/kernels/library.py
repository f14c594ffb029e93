"""Loads the CPU kernels of cpu/, compiled at first use; and what their wrappers share."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .build_cpu import BuildError, load

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # must match cpu/vec.h


class Strided(ctypes.Structure):  # must match cpu/vec.h
    """A tensor [directions, batch, channels, time]: its address, and strides in elements."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("direction", "batch", "channel", "time")),
    ]


def strided(x: Tensor | None) -> Strided:
    """A tensor of four dimensions as the kernels see it; no address for None."""
    return Strided(x.data_ptr(), *x.stride()) if x is not None else Strided()


@functools.cache
def _library() -> ctypes.CDLL | BuildError:
    folder = Path(__file__).with_name("cpu")
    try:
        return load(*sorted(folder.glob("*.cpp")), *sorted(folder.glob("*.h")))
    except BuildError as error:
        return error


def library() -> ctypes.CDLL:
    """The compiled kernels. Raises: BuildError."""
    loaded = _library()
    if isinstance(loaded, BuildError):
        raise loaded
    return loaded


def why_not() -> str | None:
    """None if the kernels load, from the cache or newly compiled; else the reason and the remedy."""
    loaded = _library()
    return str(loaded) if isinstance(loaded, BuildError) else None


@torch.compiler.assume_constant_result  # asked once, at trace time
def _compiled() -> bool:
    return why_not() is None


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these tensors.

    They take floating-point tensors on the CPU (and on 'meta', with only shapes), and have no forward-mode derivative.
    """
    given = [t for t in tensors if t is not None]
    return (
        all(t.device.type in ("cpu", "meta") and t.dtype in DTYPES for t in given)
        and not has_tangent(*given)
        and _compiled()
    )


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation goes through one of the tensors."""
    if torch.compiler.is_compiling():
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def check_shapes(*expected: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """Raises ValueError for a tensor of the wrong shape: the kernels trust shapes. Takes (name, tensor, shape)."""
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; it must be {shape}")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def pointer(x: Tensor | None) -> int | None:
    """The address of a tensor's data; None for no tensor or an empty one."""
    return x.data_ptr() if x is not None and x.numel() else None
