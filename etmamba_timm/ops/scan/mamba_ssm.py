"""The selective scan on mamba-ssm's CUDA kernel: the only file that imports mamba_ssm, and not before it is asked to.

Written against `csrc/selective_scan/selective_scan.cpp` of mamba-ssm 2.2.6 to 2.3.2. Beyond what the public function
checks, that kernel wants: a CUDA device; the last dimension of u, delta, B, C and z with stride 1, and (its vector
loads, where L is a multiple of 128) 16-byte aligned; at most 256 states; one thread block a row and channel, and so at
most 65535 channels.
"""

import functools
import importlib.util

import torch
from torch import Tensor

DEVICE_TYPE = "cuda"
MAX_STATE = 256
MAX_WIDTH = 65535


def why_not() -> str | None:
    """None if this machine can run the kernel, else why it can't and what to do about it.

    The kernel is probed, not the package: mamba_ssm can be installed without it. The first call that finds a device
    imports both, which takes seconds; its answer is kept.
    """
    if not getattr(torch, DEVICE_TYPE).is_available():
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
        "mamba-ssm (which needs nvcc or finds a matching wheel; the README tells what PyTorch 2.14 wants beside)"
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


def rejects(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> str | None:
    """Why the kernel can't take these arguments, or None. What `selective_scan` has checked already is left out."""
    if u.device.type != DEVICE_TYPE:
        return f"the tensors are on {u.device}; move them to a {DEVICE_TYPE} device"
    if u.dtype == torch.float64:
        return "the kernel has no float64; use float32, bfloat16 or float16"
    if A.shape[1] > MAX_STATE:
        return f"the state size is {A.shape[1]}; the kernel takes at most {MAX_STATE}"
    if A.shape[0] > MAX_WIDTH:
        return f"the width is {A.shape[0]}; the kernel takes at most {MAX_WIDTH}"
    return None


@torch.compiler.disable  # a C++ extension: a graph break, not an error
def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse_from: int,
) -> tuple[Tensor, Tensor]:
    """One call of mamba-ssm's `selective_scan_fn` for both directions: the kernel knows only one, so we turn its rows.

    Shapes and dtypes are those of `selective_scan`, where `rejects` has nothing to say. Batch rows `reverse_from:` run
    from the last time step to the first. Gradients come from the kernel's own backward.

    Returns: the output [B, D, L] in `u`'s dtype and the input's order, the state after the last step taken [B, D, N]
    in float32. The state is detached: the kernel's backward would silently drop its gradient.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, B, C = (_in_scan_order(t, reverse_from) for t in (u, delta, B, C))
    if z is not None:
        z = _in_scan_order(z, reverse_from)
    if delta_bias is not None:
        delta_bias = delta_bias.contiguous()  # selective_scan_fn sees to D's strides, not to these
    out, last_state = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
    return _in_scan_order(out, reverse_from), last_state.detach()


def _in_scan_order(x: Tensor, reverse_from: int) -> Tensor:
    """Turns the rows `reverse_from:` of x [B, ..., L] back to front, contiguous; x itself if it is both already."""
    if reverse_from == 0:
        return x.flip(-1).contiguous()
    if reverse_from < x.shape[0]:
        return torch.cat([x[:reverse_from], x[reverse_from:].flip(-1)])  # transposes as it joins
    return x.contiguous()
