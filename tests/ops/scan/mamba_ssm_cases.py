"""What the tests of the mamba-ssm backend share: inputs, how they are run, how results are compared, small models."""

import timm
import torch
from torch import Tensor

import etmamba_timm  # registers the models  # noqa: F401
from etmamba_timm.ops import bidirectional_scan, selective_scan
from etmamba_timm.ops.scan import reference
from etmamba_timm.ops.scan.selective_scan import BACKENDS

# Largest error over largest value, against the reference in float64. Half types: an output is rounded once, and the
# kernel's backward reads it, rounded, for the gate's gradient.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}

OPTIONS = [
    {"D": True, "z": True, "delta_bias": True, "delta_softplus": True},
    {"D": False, "z": True, "delta_bias": False, "delta_softplus": True},
    {"D": True, "z": False, "delta_bias": True, "delta_softplus": False},
    {"D": False, "z": False, "delta_bias": False, "delta_softplus": False},
]
DIRECTIONS = ["forwards", "backwards", "both"]


def make_inputs(
    options: dict[str, bool],
    batch: int = 2,
    width: int = 5,
    length: int = 13,
    n_state: int = 3,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Tensor | bool | None]:
    """Random arguments of `selective_scan`; u, delta, z, B and C are transposed views, as in the models."""
    random = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    def tokens(n: int) -> Tensor:
        return normal(batch, length, n).to(device, dtype).transpose(1, 2)

    return {
        "u": tokens(width),
        "delta": tokens(width) if options["delta_softplus"] else tokens(width).abs(),
        "A": -normal(width, n_state).exp().to(device),
        "B": tokens(n_state),
        "C": tokens(n_state),
        "D": normal(width).to(device) if options["D"] else None,
        "z": tokens(width) if options["z"] else None,
        "delta_bias": normal(width).abs().to(device) if options["delta_bias"] else None,
        "delta_softplus": options["delta_softplus"],
    }


def strided(t: Tensor) -> Tensor:
    """The same values, with a stride of 2 in the last dimension."""
    return t.repeat_interleave(2, dim=-1)[..., ::2]


def with_gradients(scan, inputs: dict, dout: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """scan's output and the gradients of all tensors in `inputs`; of float64 copies on the CPU if dtype says so."""
    target = {} if dtype is None else {"device": "cpu", "dtype": dtype}
    inputs = {k: v.detach().to(**target).requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    out = scan(**inputs)
    gradients = torch.autograd.grad(out, [inputs[name] for name in names], dout[: len(out)].to(**target))
    return {"out": out.detach()} | dict(zip(names, gradients, strict=True))


def in_halves(inputs: dict) -> dict:
    """The first half of the batch runs forwards, the second backwards: [B, ...] -> [2, B/2, ...]."""
    rows = ("u", "delta", "B", "C", "z")
    return {k: v.unflatten(0, (2, -1)) if k in rows and v is not None else v for k, v in inputs.items()}


def in_direction(direction: str, backend: str):
    """The public function that scans in this direction, as a function of `make_inputs`."""
    if direction == "both":
        return lambda **inputs: bidirectional_scan(**in_halves(inputs), backend=backend)
    return lambda **inputs: selective_scan(**inputs, reverse=direction == "backwards", backend=backend)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, of_zero: float = 0.0) -> None:
    """Errors are at most `tolerance` times the largest value, or `of_zero` where every value is exactly 0."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = (got[name].cpu().double() - value.double()).abs().max().item()
        largest = value.double().abs().max().item()
        assert error <= (tolerance * largest or of_zero), f"{name}: error {error:.2e} with values up to {largest:.2e}"


def forward_and_backward(model: torch.nn.Module, clip: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The logits, and the gradient of every parameter under a fixed linear loss."""
    model.zero_grad()
    logits = model(clip)
    (logits * target).sum().backward()
    return {"logits": logits.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def make_model(name: str, depth: int = 2) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """A small model in evaluation, a clip for it, and weights of the loss."""
    torch.manual_seed(0)
    model = timm.create_model(name, depth=depth, embed_dim=32, img_size=32, num_frames=2, num_classes=7).eval()
    return model, torch.randn(2, 3, 2, 32, 32), torch.randn(2, 7)


def only_reference(monkeypatch) -> None:
    for name in BACKENDS:
        monkeypatch.setitem(BACKENDS, name, reference.BACKEND)


# One scan a block for both directions where they share the SSM, two where each has its own.
SCANS = {"etmamba_ti": 1, "etmamba_ti_ebs": 1, "videomamba_ti": 2}
