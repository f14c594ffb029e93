"""The stand-in for mamba-ssm's compiled kernel, against mamba-ssm's own reference and the kernel's own conditions."""

import pytest
import selective_scan_cuda_standin as standin
import torch
from mamba_ssm_cases import OPTIONS, TOLERANCE, assert_close, make_inputs, strided, with_gradients
from torch import Tensor


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_standin_agrees_with_the_reference_of_mamba_ssm(mamba, options, dtype):
    inputs = make_inputs(options, dtype=dtype)
    dout = torch.randn(inputs["u"].shape).to(dtype)
    got = with_gradients(mamba.selective_scan_fn, inputs, dout)
    want = with_gradients(mamba.selective_scan_ref, inputs, dout)
    assert_close(got, want, 2 * TOLERANCE[dtype])  # the other rounds as well


def test_standin_agrees_over_two_chunks(mamba):
    inputs = make_inputs(OPTIONS[0], batch=1, width=2, length=standin.CHUNK + 3, n_state=2)
    dout = torch.randn(inputs["u"].shape)
    got = with_gradients(mamba.selective_scan_fn, inputs, dout)
    want = with_gradients(mamba.selective_scan_ref, inputs, dout)
    assert_close(got, want, 2 * TOLERANCE[torch.float32])  # the other rounds as well


def kernel_arguments(**changes) -> list:
    """Arguments that `fwd` takes, in its order, with changes to some."""
    inputs = make_inputs(OPTIONS[0])
    for name in ("u", "delta", "B", "C", "z"):
        inputs[name] = inputs[name].contiguous()
    inputs["B"], inputs["C"] = inputs["B"][:, None], inputs["C"][:, None]
    for name, change in changes.items():
        inputs[name] = change(inputs[name])
    return list(inputs.values())[:5] + [inputs[name] for name in ("D", "z", "delta_bias", "delta_softplus")]


def test_standin_keeps_the_states_the_kernel_keeps(mamba):
    u, delta, A, B, C, D, z, delta_bias, _ = arguments = kernel_arguments()
    _, x, _ = standin.fwd(*arguments)
    _, state = mamba.selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, True, return_last_state=True)
    step = torch.nn.functional.softplus(delta + delta_bias[:, None])
    torch.testing.assert_close(x[:, :, -1, 1::2], state)
    torch.testing.assert_close(x[:, :, -1, 0::2], torch.exp(step.sum(-1)[..., None] * A))


REFUSED = [
    *({name: strided} for name in ("u", "delta", "B", "C", "D", "z", "delta_bias")),
    *({name: Tensor.half} for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")),
    *({name: lambda t: t[..., 1:].contiguous()} for name in ("u", "delta", "B", "C", "D", "z", "delta_bias")),
    {"A": lambda t: t[1:]},
    {"B": lambda t: t[:1]},
    dict.fromkeys(("u", "delta", "A", "B", "C", "D", "z", "delta_bias"), Tensor.double),
    {"A": lambda t: t.repeat(1, 86)[:, :257]} | dict.fromkeys("BC", lambda t: t.repeat(1, 1, 86, 1)[:, :, :257]),
]


@pytest.mark.parametrize("changes", REFUSED, ids=lambda changes: "-".join(changes))
def test_standin_refuses_what_the_kernel_refuses(changes):
    standin.fwd(*kernel_arguments())
    with pytest.raises(RuntimeError):
        standin.fwd(*kernel_arguments(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"dout": strided},
        {"dout": Tensor.half},
        {"dout": lambda t: t[:1]},
        {"x": strided},
        {"x": Tensor.half},
        {"x": lambda t: t[..., 1:].contiguous()},
        {"out": strided},
        {"out": Tensor.half},
        {"out": lambda t: None},
    ],
    ids="-".join,
)
def test_standin_refuses_what_the_kernel_refuses_in_backward(changes):
    arguments = kernel_arguments()
    out, x, _ = standin.fwd(*arguments)
    rest = {"dout": torch.ones_like(out), "x": x, "out": out}
    standin.bwd(*arguments[:8], *rest.values(), None, True, False)
    for name, change in changes.items():
        rest[name] = change(rest[name])
    with pytest.raises(RuntimeError):
        standin.bwd(*arguments[:8], *rest.values(), None, True, False)
