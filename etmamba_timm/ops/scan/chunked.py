"""The selective scan in plain PyTorch, vectorised over time: for machines with neither a GPU kernel nor a C++ compiler.

Time is cut into blocks that run one after another, and each block into K chunks of S steps that run side by side: one
operation advances all chunks by one step. A first pass finds the last state of each chunk if it starts from zeros, a
short loop carries the true states from chunk to chunk, and a second pass runs each chunk from its true first state.
Exponentials are only taken of Δ·A and of its sums over chunks, and nothing is divided, so any decay is safe, down to 0.
One chunk and one pass are enough where a step is already enough work for one operation. They are also used where Δ·A
may be positive, because its sum could overflow when the states don't.

Only one block of the [B, D, N, L] states exists at a time. The backward pass recomputes each block from its first
state, which is kept.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Backend, ScanInputs, in_scan_order

# Sizes in elements, measured on CPUs.
BLOCK = 2**19  # the states of a block: they should stay in the cache
WIDE = 2**13  # from this many states in a step on, a second pass costs more than it saves in calls
# For GPUs, which have more memory and where the number of launches decides; estimated, not measured.
GPU_BLOCK, GPU_WIDE = 2**24, 2**22


@torch.compiler.disable  # branches on values, and has its own backward
def scan(inputs: ScanInputs, reverse_from: int) -> tuple[Tensor, Tensor]:
    """See `Backend.scan`. The last state carries a gradient; differentiable only once."""
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, _ = inputs
    dtype, out_dtype, length = A.dtype, u.dtype, u.shape[-1]
    u, delta = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    decaying = u.is_meta or bool((A.max() <= 0) & (delta.min() >= 0))
    blocks, chunks, steps = _cut(length, u.shape[0] * A.numel(), decaying, u.device.type == "cpu")

    def cut(x: Tensor) -> Tensor:  # [B, R, L] -> [blocks, S, K, B, R]; added steps have Δ = 0 and change nothing
        x = F.pad(in_scan_order(x.to(dtype), reverse_from), (0, blocks * chunks * steps - length))
        return x.unflatten(-1, (blocks, chunks, steps)).permute(2, 4, 3, 0, 1).contiguous()

    rows, columns = (cut(delta)[..., None, :], cut(delta * u)[..., None, :]), (cut(B)[..., None], cut(C)[..., None])
    y, h = _Recurrence.apply(*rows, A.t().contiguous(), *columns)
    y = in_scan_order(y.permute(3, 4, 0, 2, 1).flatten(2)[..., :length], reverse_from)  # -> [B, D, L]
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(out_dtype), h.transpose(1, 2).contiguous()


BACKEND = Backend("torch", scan)


def _cut(length: int, width: int, decaying: bool, on_cpu: bool = True) -> tuple[int, int, int]:
    """The numbers of blocks, of chunks in a block and of steps in a chunk; width is B·N·D, the states of one step."""
    block, wide = (BLOCK, WIDE) if on_cpu else (GPU_BLOCK, GPU_WIDE)
    steps = min(length, max(block // width, math.isqrt(length)))  # from √L steps on, blocks outweigh the states kept
    blocks = math.ceil(length / steps)
    steps = math.ceil(length / blocks)
    chunks = math.isqrt(steps) if decaying and width < wide else 1
    return blocks, chunks, math.ceil(steps / chunks)


class _Recurrence(torch.autograd.Function):
    """`h_t = exp(Δ_t A) h_{t-1} + B_t x_t` and `y_t = C_t·h_t` for rows delta, x [blocks, S, K, B, 1, D], A [N, D] and
    columns B, C [blocks, S, K, B, N, 1]. Returns y [blocks, S, K, B, D] and the last state [B, N, D].
    """

    @staticmethod
    def forward(ctx, delta: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        blocks, steps, chunks, batch = x.shape[:4]
        y, first = torch.empty_like(x).squeeze(-2), A.new_zeros(blocks + 1, batch, *A.shape)
        decay, h = A.new_ones(2, steps + 1, chunks, batch, *A.shape)
        for i in range(blocks):
            first[i + 1] = _states(delta[i], x[i], A, B[i], first[i], decay, h)
            y[i] = torch.mul(h[1:], C[i], out=decay[:-1]).sum(-2)
        ctx.save_for_backward(delta, x, A, B, C, first)
        return y, first[-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor, dh: Tensor) -> tuple[Tensor, ...]:
        delta, x, A, B, C, first = ctx.saved_tensors
        dy, dA = dy.unsqueeze(-2), torch.zeros_like(A)
        ddelta, dx, dB, dC = (torch.empty_like(t) for t in (delta, x, B, C))
        decay, h, g, product = A.new_ones(4, x.shape[1] + 1, *x.shape[2:4], *A.shape)
        product = product[:-1]
        for i in reversed(range(len(x))):
            _states(delta[i], x[i], A, B[i], first[i], decay, h)
            # g[t], the gradient of h[t + 1], is dy_t C_t + exp(Δ_{t+1} A) g[t + 1]: the same backwards in time
            torch.mul(dy[i], C[i], out=g[:-1])
            dh = _recur(decay, g, delta[i], A, dh, backwards=True)
            dC[i] = torch.mul(h[1:], dy[i], out=product).sum(-1, keepdim=True)
            dB[i] = torch.mul(g[:-1], x[i], out=product).sum(-1, keepdim=True)
            dx[i] = torch.mul(g[:-1], B[i], out=product).sum(-2, keepdim=True)
            dexponent = g[:-1].mul_(decay[:-1]).mul_(h[:-1])  # the gradient of Δ_t A
            ddelta[i] = torch.mul(dexponent, A, out=product).sum(-2, keepdim=True)
            dA += torch.mul(dexponent, delta[i], out=product).sum((0, 1, 2))
        return ddelta, dx, dA, dB, dC


def _states(delta: Tensor, x: Tensor, A: Tensor, B: Tensor, first: Tensor, decay: Tensor, h: Tensor) -> Tensor:
    """Runs a block from its first state [B, N, D] on, and returns its last.

    Fills decay and h [S + 1, K, B, N, D]: decay[t] is exp(Δ_t A), h[t] the state before it, h[t + 1] the one after.
    decay[S] stays 1, because what leaves a chunk is decay[S] h[S].
    """
    torch.mul(delta, A, out=decay[:-1]).exp_()
    torch.mul(x, B, out=h[1:])
    return _recur(decay, h, delta, A, first)


def _recur(decay: Tensor, h: Tensor, delta: Tensor, A: Tensor, first: Tensor, backwards: bool = False) -> Tensor:
    """`h[t + 1] += decay[t] h[t]` in place, where h[0] is `first` in the first chunk.

    In the others h[0] is what left the previous chunk. Returns what leaves the last one. Backwards, the last step
    of the last chunk comes first.
    """
    decays, states, chunks = decay.unbind(), h.unbind(), range(h.shape[1])
    if backwards:
        decays, states, chunks = decays[::-1], states[::-1], chunks[::-1]
    states[0][chunks[0]] = first
    if len(chunks) > 1:
        leaving = states[1].clone()  # what leaves each chunk if it starts from zeros
        for d, x in zip(decays[1:-1], states[2:], strict=True):
            torch.addcmul(x, d, leaving, out=leaving)
        leaving *= decays[-1]
        total = (delta.sum(0) * A).exp_()  # the decay over each chunk [K, B, N, D]
        for k, after in itertools.pairwise(chunks):
            torch.addcmul(leaving[k], total[k], states[0][k], out=states[0][after])
    for d, before, x in zip(decays, states, states[1:], strict=False):
        x.addcmul_(d, before)
    return decays[-1][chunks[-1]] * states[-1][chunks[-1]]
