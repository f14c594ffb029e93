"""What mamba-ssm's compiled module `selective_scan_cuda` does, as loops over time in float32, for tests without a GPU.

Put into `sys.modules['selective_scan_cuda']` before `mamba_ssm.ops.selective_scan_interface` is imported, it lets the
real `selective_scan_fn` run. It takes the kernel's arguments in the kernel's order, refuses what the kernel's C++ part
refuses (devices aside), returns what it returns, and shares no code with the package. It rounds where the kernel
does: everything is float32 in between, and what goes in and out has the inputs' dtype.

Not built, as the package never asks for it: complex A, constant B and C, more than one group.

Shapes: u, delta, z, out, dout [b, d, L]; A [d, n]; B, C [b, 1, n, L]; D, delta_bias [d]. The kernel works in chunks of
2048 steps and keeps, for each, the state after its last step: x [b, d, chunks, 2n] float32, where x[..., 1::2] is that
state and x[..., 0::2] the product of all exp(ΔA) up to it.
"""

from collections import Counter

import torch
from torch import Tensor

CHUNK = 2048
calls: Counter[str] = Counter()  # 'fwd' and 'bwd': how often each was called


def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """[out before the gate, x] and, with z, the gated out. RuntimeError for what the kernel refuses."""
    calls["fwd"] += 1
    _check(u, delta, A, B, C, D, z, delta_bias)
    batch, width, length = u.shape
    n_state = A.shape[1]

    step, _ = _step_sizes(delta, delta_bias, delta_softplus)
    uf, Bf, Cf = u.float(), B.float()[:, 0], C.float()[:, 0]
    state = torch.zeros(batch, width, n_state)
    decay = torch.ones(batch, width, n_state)
    y = torch.empty(batch, width, length)
    x = torch.empty(batch, width, -(-length // CHUNK), 2 * n_state)
    for t in range(length):
        a = torch.exp(step[:, :, t, None] * A)
        state = a * state + (step[:, :, t] * uf[:, :, t])[..., None] * Bf[:, None, :, t]
        decay = a * decay
        y[:, :, t] = (state * Cf[:, None, :, t]).sum(-1)
        if (t + 1) % CHUNK == 0 or t + 1 == length:
            x[:, :, t // CHUNK, 0::2] = decay
            x[:, :, t // CHUNK, 1::2] = state
    if D is not None:
        y += D[:, None] * uf

    result = [torch.empty_like(delta).copy_(y), x]
    if z is not None:
        zf = z.float()
        result.append(torch.empty_like(z).copy_(y * zf / (1 + torch.exp(-zf))))
    return result


def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor | None]:
    """[du, ddelta, dA, dB, dC, dD or None, ddelta_bias or None], then dz with z, then out_z if it is to be recomputed.

    The adjoint of the state runs from the last step to the first, `g_t = dy_t C_t + exp(Δ_{t+1} A) g_{t+1}`; the
    states themselves are computed again, each chunk from the state that x holds for the one before.
    """
    calls["bwd"] += 1
    _check(u, delta, A, B, C, D, z, delta_bias)
    batch, width, length = u.shape
    n_state = A.shape[1]
    n_chunks = -(-length // CHUNK)
    _require(dout.dtype == u.dtype, "dout.scalar_type() == input_type")
    _require_rows("dout", dout)
    _require_shape("dout", dout, (batch, width, length))
    if z is not None:
        for name, t in (("out", out), ("dz", dz)):
            if t is None:
                _require(name == "dz", "out_.has_value()")
                continue
            _require(t.dtype == u.dtype, f"{name}.scalar_type() == input_type")
            _require_rows(name, t)
            _require_shape(name, t, (batch, width, length))
    _require(n_chunks <= 1 or x is not None, "x_.has_value()")
    if x is not None:
        _require(x.dtype == A.dtype, "x.scalar_type() == weight_type")
        _require(x.is_contiguous(), "x.is_contiguous()")
        _require_shape("x", x, (batch, width, n_chunks, 2 * n_state))

    step, slope = _step_sizes(delta, delta_bias, delta_softplus)
    uf, Bf, Cf = u.float(), B.float()[:, 0], C.float()[:, 0]
    dy = dout.float()
    if z is not None:
        zf, outf = z.float(), out.float()
        gate = 1 / (1 + torch.exp(-zf))
        dz = torch.empty_like(z) if dz is None else dz
        dz.copy_(dy * outf * gate * (1 + zf * (1 - gate)))
        dy = dy * zf * gate

    du = dy * D[:, None] if D is not None else torch.zeros_like(dy)
    dstep = torch.zeros(batch, width, length)
    dA = torch.zeros(width, n_state)
    dB = torch.zeros(batch, n_state, length)
    dC = torch.zeros(batch, n_state, length)
    g = torch.zeros(batch, width, n_state)
    a_next = torch.ones(batch, width, n_state)
    for chunk in reversed(range(n_chunks)):
        times = range(chunk * CHUNK, min((chunk + 1) * CHUNK, length))
        state = x[:, :, chunk - 1, 1::2].clone() if chunk else torch.zeros(batch, width, n_state)
        carried, states = [], []  # exp(Δ_t A) h_{t-1} and h_t
        for t in times:
            carried.append(torch.exp(step[:, :, t, None] * A) * state)
            state = carried[-1] + (step[:, :, t] * uf[:, :, t])[..., None] * Bf[:, None, :, t]
            states.append(state)
        for i, t in reversed(list(enumerate(times))):
            g = dy[:, :, t, None] * Cf[:, None, :, t] + a_next * g
            into_state = (g * Bf[:, None, :, t]).sum(-1)
            du[:, :, t] += into_state * step[:, :, t]
            dstep[:, :, t] = into_state * uf[:, :, t] + (g * A * carried[i]).sum(-1)
            dA += (g * step[:, :, t, None] * carried[i]).sum(0)
            dB[:, :, t] = (g * (step[:, :, t] * uf[:, :, t])[..., None]).sum(1)
            dC[:, :, t] = (dy[:, :, t, None] * states[i]).sum(1)
            a_next = torch.exp(step[:, :, t, None] * A)
    ddelta = dstep * slope

    result: list[Tensor | None] = [
        torch.empty_like(u).copy_(du),
        torch.empty_like(delta).copy_(ddelta),
        torch.zeros_like(A).copy_(dA),
        dB[:, None].to(B.dtype),
        dC[:, None].to(C.dtype),
        None if D is None else (dy * uf).sum((0, 2)),
        None if delta_bias is None else ddelta.sum((0, 2)),
    ]
    if z is not None:
        result.append(dz)
        if recompute_out_z:
            result.append(torch.empty_like(out).copy_(outf * zf * gate))
    return result


def _step_sizes(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """Δ [b, d, L] float32 and its derivative by delta."""
    raw = delta.float()
    if delta_bias is not None:
        raw = raw + delta_bias[:, None]
    if not delta_softplus:
        return raw, torch.ones_like(raw)
    small = raw <= 20
    return torch.where(small, torch.log1p(torch.exp(raw)), raw), torch.where(small, 1 / (1 + torch.exp(-raw)), 1.0)


def _check(u, delta, A, B, C, D, z, delta_bias) -> None:
    """Refuses with RuntimeError what the kernel's C++ part refuses in both directions."""
    if A.is_complex() or B.dim() < 3 or C.dim() < 3:
        raise NotImplementedError("the stand-in has no complex A and no constant B or C")
    _require(u.dtype in (torch.float32, torch.float16, torch.bfloat16), "input_type is Float, Half or BFloat16")
    _require(A.dtype == torch.float32, "weight_type is Float or ComplexFloat")
    for name, t in (("delta", delta), ("B", B), ("C", C)):
        _require(t.dtype == u.dtype, f"{name}.scalar_type() == input_type")
    _require_rows("u", u)
    _require_rows("delta", delta)
    _require(u.dim() == 3 and A.dim() == 2, "u has 3 dimensions and A 2")
    batch, width, length = u.shape
    n_state, n_groups = A.shape[1], B.shape[1]
    _require(n_state <= 256, "selective_scan only supports state dimension <= 256")
    _require_shape("delta", delta, (batch, width, length))
    _require_shape("A", A, (width, n_state))
    for name, t in (("B", B), ("C", C)):
        _require_shape(name, t, (batch, n_groups, n_state, length))
        _require_rows(name, t)
    for name, t in (("D", D), ("delta_bias", delta_bias)):
        if t is not None:
            _require(t.dtype == torch.float32, f"{name}.scalar_type() == Float")
            _require_rows(name, t)
            _require_shape(name, t, (width,))
    if z is not None:
        _require(z.dtype == u.dtype, "z.scalar_type() == input_type")
        _require_rows("z", z)
        _require_shape("z", z, (batch, width, length))
    _require(0 not in u.shape, "invalid configuration argument: an empty grid")
    if n_groups != 1:
        raise NotImplementedError("the stand-in has one group")


def _require(held: bool, what: str) -> None:
    if not held:
        raise RuntimeError(f"Expected {what} to be true, but got false")


def _require_rows(name: str, t: Tensor) -> None:
    _require(t.stride(-1) == 1 or t.size(-1) == 1, f"{name}.stride(-1) == 1 || {name}.size(-1) == 1")


def _require_shape(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    _require(tuple(t.shape) == shape, f"{name} must have shape {shape}")
