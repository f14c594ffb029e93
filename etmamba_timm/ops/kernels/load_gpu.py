"""Loads the GPU kernels of gpu/, compiled at first use, and launches them.

The driver is called through cuda.bindings. Kernels go to PyTorch's current stream, and allocate nothing.
"""

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import build_gpu

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # must match gpu/kernel.h
DEVICES = ("cuda",)
ALIGNMENT = 16  # bytes: the most that a kernel reads at once
OLDEST = (8, 0)  # the compute capability from which on asynchronous copies exist


def on_gpu(x: Tensor) -> bool:
    """Whether an operator on x is one for the GPU kernels."""
    return x.device.type in DEVICES


def why_not() -> str | None:
    """None if this machine can run the kernels; else the reason and the remedy. Takes a moment at its first call."""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device; run where there is one, with a CUDA build of torch"
    if torch.version.hip:
        return "PyTorch is a build for AMD's GPUs; the kernels are for NVIDIA's"
    return build_gpu.why_not()


@functools.cache
def why_not_on(device: torch.device) -> str | None:
    """None if this device can run the kernels; else the reason and the remedy."""
    if reason := why_not():
        return reason
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        wanted, has = (".".join(map(str, capability)) for capability in (OLDEST, found))
        return f"the device has compute capability {has}; the kernels need {wanted} or newer"
    return None


class Module:
    """A compiled file of gpu/ on a device."""

    def __init__(self, source: str, defines: dict[str, int], device: torch.device) -> None:
        from cuda.bindings import driver

        self._driver, self._device = driver, device
        code = build_gpu.compile_gpu(source, defines, torch.cuda.get_device_capability(device))
        self._check(driver.cuInit(0))
        self._context = self._check(driver.cuDevicePrimaryCtxRetain(self._check(driver.cuDeviceGet(device.index))))
        self._enter()
        self._module = self._check(driver.cuModuleLoadData(code))
        self._kernels: dict[str, tuple[Any, int, int]] = {}  # function, threads, bytes of shared memory

    @functools.cache  # noqa: B019  # modules live as long as the process
    def config(self, kernel: str) -> tuple[int, ...]:
        """What CONFIG says of a kernel: threads, bytes of shared memory, and what else its caller needs."""
        self._enter()
        address, size = self._check(self._driver.cuModuleGetGlobal(self._module, f"{kernel}_config".encode()))
        values = (ctypes.c_int * (size // ctypes.sizeof(ctypes.c_int)))()
        self._check(self._driver.cuMemcpyDtoH(ctypes.addressof(values), address, size))
        return tuple(values)

    def launch(self, kernel: str, grid: Sequence[int], args: Any) -> None:
        """Runs a kernel with this many blocks in x, y and z on the device's current stream.

        Args:
            kernel: its name.
            grid: three numbers.
            args: its only argument, a ctypes structure or array.
        """
        if not all(grid):
            return
        function, threads, shared = self._kernels.get(kernel) or self._load(kernel)
        pointer = ctypes.c_void_p(ctypes.addressof(args))
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        call = (function, *grid, threads, 1, 1, shared, stream, ctypes.addressof(pointer), 0)
        returned = self._driver.cuLaunchKernel(*call)
        if returned[0] in (
            self._driver.CUresult.CUDA_ERROR_INVALID_CONTEXT,
            self._driver.CUresult.CUDA_ERROR_NOT_INITIALIZED,
        ):
            self._enter()
            returned = self._driver.cuLaunchKernel(*call)
        self._check(returned)

    def _load(self, kernel: str) -> tuple[Any, int, int]:
        driver = self._driver
        self._enter()
        function = self._check(driver.cuModuleGetFunction(self._module, kernel.encode()))
        threads, shared, *_ = self.config(kernel)
        if shared > 48 * 1024:  # more has to be asked for
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._check(driver.cuFuncSetAttribute(function, attribute, shared))
        self._kernels[kernel] = function, threads, shared
        return self._kernels[kernel]

    def _enter(self) -> None:
        """Makes the device's context that of this thread: PyTorch may have done nothing in it so far."""
        self._check(self._driver.cuCtxSetCurrent(self._context))

    def _check(self, returned: tuple[Any, ...]) -> Any:
        status, *values = returned
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the CUDA driver says {status.name}")
        return values[0] if len(values) == 1 else tuple(values)


def module(source: str, like: Tensor, **defines: int) -> Module:
    """The kernels of a file in gpu/, compiled with these macros, for the device of a tensor.

    Raises: BuildError.
    """
    return _module(source, tuple(defines.items()), like.device)


@functools.cache
def _module(source: str, defines: tuple[tuple[str, int], ...], device: torch.device) -> Module:
    return Module(source, dict(defines), device)


@dataclass
class Plan:
    """Launches whose only argument is known, apart from the addresses of tensors.

    Attributes:
        args: the argument, a structure of 8-byte fields.
        launches: module, kernel and grid of each, in order.
        scratch: fields that want the address of so many float32, uninitialised, during the launches.
    """

    args: ctypes.Structure
    launches: list[tuple[Module, str, tuple[int, int, int]]]
    scratch: dict[str, int] = field(default_factory=dict)


class _Ready:
    """A plan, ready to be launched often, by several threads at once."""

    def __init__(self, plan: Plan, tensors: Sequence[str]) -> None:
        fields = type(plan.args)
        self.words = ctypes.c_int64 * (ctypes.sizeof(fields) // 8)
        self.template, self.launches = bytes(plan.args), plan.launches
        self.places = [getattr(fields, name).offset // 8 for name in (*tensors, *plan.scratch)]
        self.scratch = list(plan.scratch.values())

    def launch(self, tensors: Sequence[Tensor | None], like: Tensor) -> None:
        args = self.words.from_buffer_copy(self.template)
        if self.scratch:
            tensors = [*tensors, *(like.new_empty(size, dtype=torch.float32) for size in self.scratch)]
        for place, tensor in zip(self.places, tensors, strict=True):
            args[place] = 0 if tensor is None else tensor.data_ptr()
        for module, kernel, grid in self.launches:
            module.launch(kernel, grid, args)


MOST_PLANS = 4096  # of several hundred bytes each
PLANS: dict[tuple[Any, ...], _Ready] = {}


def run(
    plan: Callable[..., Plan], given: Mapping[str, Tensor | None], made: Mapping[str, Tensor | None], *others: Any
) -> None:
    """Launches what `plan(*others, **given, **made)` says, asking it once for each layout of tensors.

    Args:
        plan: takes the tensors and what else decides; must not keep the tensors.
        given: inputs, by the names of the structure's fields for their addresses; the first isn't None.
        made: outputs, newly allocated: the layouts of the inputs and `others` decide theirs.
        others: hashable.
    """
    like, *_ = tensors = [*given.values(), *made.values()]
    assert like is not None
    layouts = [None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % ALIGNMENT) for t in given.values()]
    key = (plan, like.device, *layouts, *others)
    ready = PLANS.get(key)
    if ready is None:
        if len(PLANS) >= MOST_PLANS:  # inputs of ever new sizes
            PLANS.clear()
        ready = PLANS[key] = _Ready(plan(*others, **given, **made), [*given, *made])
    ready.launch(tensors, like)


def in_groups(x: Tensor, size: int) -> bool:
    """Whether `size` neighbouring elements of the last dimension can always be read at once.

    That is so if they are next to each other, and their number, the other strides and the address are multiples of it.
    """
    *others, last = x.stride()
    return last == 1 and not any(n % size for n in (x.shape[-1], *others)) and x.data_ptr() % (size * x.itemsize) == 0


def in_quads(x: Tensor) -> bool:
    """`in_groups` of four."""
    return in_groups(x, 4)


@functools.cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def threads_at_once(device: torch.device) -> int:
    """About the number of threads that keep a device busy with work that waits for memory."""
    return 512 * processors(device)


@functools.lru_cache
def stretch(length: int, blocks: int, room: int, margin: int) -> int:
    """How much of a length a block should have, if `room` blocks run at once and each reads `margin` more.

    Without any cut there would be `blocks` blocks.
    """
    stretches = sorted({-(-length // parts) for parts in range(1, length + 1)}, reverse=True)
    return min(stretches, key=lambda n: -(-blocks * -(-length // n) // room) * (n + margin))
