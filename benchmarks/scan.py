"""The selective scan on the CPU, compared with mamba-ssm's reference and mambapy's parallel scan. See README.md.

python benchmarks/scan.py [--length 3137] [--width 576] [--threads 2] [--runs 5]
"""

import argparse
import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from common import in_turn, spread, write
from mambapy.pscan import pscan

from etmamba_timm.ops import selective_scan

sys.modules.setdefault("selective_scan_cuda", ModuleType("selective_scan_cuda"))  # its reference doesn't need it
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--width", type=int, default=576)
parser.add_argument("--length", type=int, default=3137)
parser.add_argument("--state", type=int, default=16)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--runs", type=int, default=5)
args = parser.parse_args()
torch.set_num_threads(args.threads)
torch.manual_seed(0)

B, D, L, N = args.batch, args.width, args.length, args.state
tokens = [torch.randn(B, L, width) for width in (D, D, D, N, N)]
tokens[1] -= 4
u, delta, z, b, c = (t.transpose(1, 2) for t in tokens)
inputs = [u, delta, -torch.arange(1, N + 1.0).repeat(D, 1), b, c, torch.ones(D), z, torch.randn(D) * 0.1]
leaves = [t.detach().requires_grad_() for t in inputs]


def ours(u, delta, A, B, C, D, z, bias):
    return selective_scan(u, delta, A, B, C, D, z, bias, True, backend="cpu")


def plain(u, delta, A, B, C, D, z, bias):
    return selective_scan(u, delta, A, B, C, D, z, bias, True, backend="torch")


def mamba_ssm_ref(u, delta, A, B, C, D, z, bias):
    return selective_scan_ref(u, delta, A, B, C, D, z, bias, True)


def mambapy_pscan(u, delta, A, B, C, D, z, bias):
    """As mambapy's own block calls it: [B, L, D, N] tensors of decays and inputs, then the parallel scan."""
    u, delta, B, C, z = (t.transpose(1, 2) for t in (u, delta, B, C, z))
    delta = F.softplus(delta + bias)
    decay = torch.exp(delta.unsqueeze(-1) * A)
    h = pscan(decay, (delta * u).unsqueeze(-1) * B.unsqueeze(2))
    y = (h @ C.unsqueeze(-1)).squeeze(3) + D * u
    return (y * F.silu(z)).transpose(1, 2)


def forward(scan):
    def run():
        with torch.no_grad():
            return scan(*inputs)

    return run


def both(scan):
    def run():
        for leaf in leaves:
            leaf.grad = None
        scan(*leaves).sum().backward()

    return run


rows = []
scans = {"ours": ours, "ours, plain PyTorch": plain, "mambapy pscan": mambapy_pscan, "mamba-ssm ref": mamba_ssm_ref}
expected = ours(*(t.double() for t in inputs))
for name, scan in scans.items():
    error = ((scan(*inputs) - expected).abs().max() / expected.abs().max()).item()
    print(f"{name}: {error:.1e} from float64")
for what, wrap in (("forward", forward), ("forward + backward", both)):
    # The reference's backward takes minutes and many gigabytes.
    timed = {name: wrap(scan) for name, scan in scans.items() if not (wrap is both and scan is mamba_ssm_ref)}
    seconds = in_turn(args.runs, settle=True, **timed)
    for name, values in seconds.items():
        ratio = sorted(v / o for v, o in zip(values, seconds["ours"], strict=True))[len(values) // 2]
        shape = {"batch": B, "width": D, "length": L, "state": N}
        rows.append({"what": what, "scan": name, **shape, **spread(values), "times_ours": round(ratio, 1)})
        print(f"{what}, {name}: {spread(values)}, {ratio:.1f} times ours")
write("scan", rows)
