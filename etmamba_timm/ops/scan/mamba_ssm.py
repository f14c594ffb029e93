"""The selective scan on mamba-ssm's CUDA kernel: the only file that imports mamba_ssm, at first use.

Written against `csrc/selective_scan/selective_scan.cpp` of mamba-ssm 2.2.6 to 2.3.2. Beyond what the public function
checks, that kernel needs: a CUDA device; stride 1 in the last dimension of u, delta, B, C and z, aligned to 16 bytes
where L is a multiple of 128 (vector loads); at most 256 states; at most 65535 channels (one thread block each).
"""

import functools
import importlib.util

import torch
from torch import Tensor

from .backend import Backend, ScanInputs, in_scan_order

MAX_STATE = 256
MAX_WIDTH = 65535


def why_not() -> str | None:
    """None if this machine can run the kernel, else why it can't and what to do about it.

    Probes the kernel, not the package, since mamba_ssm can be installed without it. The first call that finds a device
    imports both, which takes seconds; the answer is kept.
    """
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device; run where there is one, with a CUDA build of torch"
    return _why_no_kernel()


@functools.cache
def _why_no_kernel() -> str | None:
    if importlib.util.find_spec("mamba_ssm") is None:
        return (
            "mamba_ssm isn't installed; "
            "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation 'etmamba-timm[cuda]' installs it"
        )
    rebuild = (
        "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall "
        "mamba-ssm (which needs nvcc or a matching wheel; docs/install.md says what else PyTorch 2.14 needs)"
    )
    try:
        import selective_scan_cuda  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "selective_scan_cuda":
            return f"mamba_ssm's kernel selective_scan_cuda doesn't import ({error}); install what it misses"
        return (
            "mamba_ssm is installed without its compiled kernel selective_scan_cuda, which newer releases leave out "
            f"unless MAMBA_KEEP_CUDA_BUILD=TRUE is set at build; install it with {rebuild}"
        )
    except (ImportError, OSError) as error:  # built for another torch or CUDA
        return f"mamba_ssm's kernel selective_scan_cuda doesn't load ({error}); rebuild it with {rebuild}"
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # noqa: F401
    except (ImportError, OSError) as error:
        return f"mamba_ssm has its kernel but doesn't import ({error}); install what it misses"
    return None


def limits(inputs: ScanInputs) -> str | None:
    """Why the kernel can't take inputs on a CUDA device, or None. What `selective_scan` has checked is left out."""
    width, n_state = inputs.A.shape
    if inputs.u.dtype == torch.float64:
        return "the kernel has no float64; use float32, bfloat16 or float16"
    if n_state > MAX_STATE:
        return f"the state size is {n_state}; the kernel takes at most {MAX_STATE}"
    if width > MAX_WIDTH:
        return f"the width is {width}; the kernel takes at most {MAX_WIDTH}"
    return None


@torch.compiler.disable  # a C++ extension: a graph break, not an error
def scan(inputs: ScanInputs, reverse_from: int) -> tuple[Tensor, Tensor]:
    """One call of mamba-ssm's `selective_scan_fn`, see `Backend.scan`; gradients come from the kernel's own backward.

    The kernel only runs forwards, so sequences of the other direction are turned before and after. The last state is
    detached, because the kernel's backward would silently drop its gradient.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, A, B, C, D, z, delta_bias, delta_softplus, _ = inputs.with_sequences(
        lambda x: in_scan_order(x, reverse_from).contiguous()
    )
    if delta_bias is not None:
        delta_bias = delta_bias.contiguous()  # selective_scan_fn makes D contiguous, but not this
    out, last_state = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
    return in_scan_order(out, reverse_from).contiguous(), last_state.detach()


BACKEND = Backend("mamba_ssm", scan, devices=("cuda",), why_not=why_not, limits=limits)
