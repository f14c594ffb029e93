"""Loads the CPU kernels of cpu/, compiled at first use; and tensors as they and the GPU kernels see them."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from .build_cpu import load
from .cache import BuildError

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # must match cpu/vec.h


class Strided(ctypes.Structure):  # must match cpu/vec.h and gpu/kernel.h
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


def pointer(x: Tensor | None) -> int | None:
    """The address of a tensor's data; None for no tensor or an empty one."""
    return x.data_ptr() if x is not None and x.numel() else None
