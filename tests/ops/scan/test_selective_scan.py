"""The public scan: what it computes on every backend that runs here, what it refuses, how it compiles."""

import os
import subprocess
import sys

import pytest
import torch
from agreement import assert_gradients_agree, error
from hypothesis import given, settings
from hypothesis import strategies as st

from etmamba_timm.ops import bidirectional_scan, scan_backends, selective_scan
from etmamba_timm.ops.scan import reference
from etmamba_timm.ops.scan.backend import ScanInputs

# mamba_ssm has tests of its own: test_mamba_ssm.py
HERE = [name for name, reason in scan_backends().items() if reason is None and name != "mamba_ssm"]
FAST = [name for name in HERE if name != "reference"]
PARAMETERS = ("A", "D", "delta_bias")
# max|a - b| / max|b| against float64: activations and their gradients, gradients of parameters
BOUNDS = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (1e-2, 3e-2),
    torch.float16: (1e-2, 3e-2),
}


def arguments(batch, width, length, state, dtype=torch.float64, seed=0, layout="BLD", optional=True) -> dict:
    """Random arguments by name, as leaves; `layout` says which dimension is contiguous in memory."""
    random = torch.Generator().manual_seed(seed)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def sequence(channels):
        if layout == "BLD":
            x = torch.randn(batch, length, channels, generator=random).transpose(1, 2)
        elif layout == "BDL":
            x = torch.randn(batch, channels, length, generator=random)
        else:  # every other element of something larger
            x = torch.randn(batch, 2 * channels, 3 * length, generator=random)[:, ::2, ::3]
        return x.to(dtype).requires_grad_()

    def parameter(*shape):
        return torch.randn(*shape, generator=random).to(state_dtype)

    return {
        "u": sequence(width),
        "delta": sequence(width),
        "A": (-parameter(width, state).abs() * 4).requires_grad_(),
        "B": sequence(state),
        "C": sequence(state),
        "D": parameter(width).requires_grad_() if optional else None,
        "z": sequence(width) if optional else None,
        "delta_bias": (parameter(width) - 2).requires_grad_() if optional else None,
    }


def both_directions(args: dict) -> dict:
    """Arguments of `bidirectional_scan` from those of an even batch: its halves are the directions."""
    return {
        k: t if t is None or k in PARAMETERS else t.detach().unflatten(0, (2, -1)).requires_grad_()
        for k, t in args.items()
    }


def in_float64(args: dict) -> dict:
    return {k: None if t is None else t.detach().double().requires_grad_() for k, t in args.items()}


def gradients(scan, args: dict, weight: torch.Tensor) -> tuple[torch.Tensor, dict]:
    given = {k: t for k, t in args.items() if t is not None}
    out = scan(**args)
    return out, dict(zip(given, torch.autograd.grad(out, list(given.values()), weight.to(out.dtype)), strict=True))


def assert_agrees(out: torch.Tensor, grads: dict, reference, args: dict, weight: torch.Tensor) -> None:
    """Output and every gradient are within BOUNDS of those of `reference` in float64."""
    activations, parameters = BOUNDS[args["u"].dtype]
    args = in_float64(args)
    wanted = reference(**args)
    assert error(out, wanted) <= activations
    bounds = [max(parameters, BOUNDS[grad.dtype][1]) if k in PARAMETERS else activations for k, grad in grads.items()]
    assert_gradients_agree(list(grads.values()), wanted, [args[name] for name in grads], weight, bounds)


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    width=st.integers(1, 40),
    length=st.integers(1, 100),
    state=st.sampled_from([1, 2, 5, 16, 17]),
    dtype=st.sampled_from(list(BOUNDS)),
    layout=st.sampled_from(["BLD", "BDL", "strided"]),
    softplus=st.booleans(),
    optional=st.booleans(),
    reverse=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_backends_agree_with_the_reference(
    backend, batch, width, length, state, dtype, layout, softplus, optional, reverse, seed
):
    """Output and every gradient, over shapes, strides, dtypes and directions."""
    args = arguments(batch, width, length, state, dtype, seed, layout, optional)
    if not softplus:  # a step must be positive for the scan to be stable
        args["delta"] = (args["delta"].detach().abs() * 0.2).requires_grad_()
        args["delta_bias"] = None
    weight = torch.randn(batch, width, length, generator=torch.Generator().manual_seed(seed)).to(dtype)
    options = {"delta_softplus": softplus, "reverse": reverse}
    out, grads = gradients(lambda **a: selective_scan(**a, **options, backend=backend), args, weight)
    assert out.dtype == dtype
    assert_agrees(out, grads, lambda **a: selective_scan(**a, **options, backend="reference"), args, weight)


@pytest.mark.parametrize("backend", FAST)
def test_long_memories_in_16_bits(backend):
    """A state that decays by 0.1% to 10% a step, for 2000 steps, to within twice the output's rounding."""
    rates = torch.arange(1, 17).expand(40, 16)
    args = {"u": torch.ones(1, 40, 2000), "delta": torch.linspace(-7, -5, 40)[:, None].expand(1, 40, 2000)}
    args = {k: v.to(torch.float16) for k, v in args.items()} | {"A": -rates.float()}
    args |= {"B": torch.ones(1, 16, 2000, dtype=torch.float16), "C": torch.ones(1, 16, 2000, dtype=torch.float16)}
    out = selective_scan(**args, delta_softplus=True, backend=backend)
    wanted = selective_scan(**in_float64(args), delta_softplus=True, backend="reference")
    torch.testing.assert_close(out.double(), wanted, rtol=2**-10, atol=0)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_log_of_A_in_any_dtype(backend, dtype):
    """As if the caller worked A out in the states' dtype."""
    args = arguments(2, 5, 30, 4, torch.float32)
    args |= {k: args[k].detach().abs().log().to(dtype).requires_grad_() for k in PARAMETERS}
    given = dict(args)
    args |= {k: args[k].float() for k in PARAMETERS}
    args["A"] = -torch.exp(args["A"])
    for run in (selective_scan, lambda **a: bidirectional_scan(**both_views(a))):
        outs = run(**given, backend=backend, A_log=True), run(**args, backend=backend)
        assert torch.equal(*outs)
        leaves = list(given.values())
        for got, want in zip(*(torch.autograd.grad(out.sum(), leaves, retain_graph=True) for out in outs), strict=True):
            assert torch.equal(got, want)


def both_views(args: dict) -> dict:
    return {k: v if k in PARAMETERS or not torch.is_tensor(v) else v.unflatten(0, (2, -1)) for k, v in args.items()}


@pytest.mark.parametrize("backend", HERE)
def test_bidirectional_is_both_directions(backend):
    args = both_directions(arguments(4, 6, 50, 5))
    out = bidirectional_scan(**args, delta_softplus=True, backend=backend)
    expected = 0
    for direction, reverse in ((0, False), (1, True)):
        half = {k: t if k in PARAMETERS else t[direction] for k, t in args.items()}
        expected = expected + selective_scan(**half, delta_softplus=True, reverse=reverse, backend=backend)
    assert error(out, expected) < 1e-13


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_bidirectional_agrees_with_the_reference(backend, dtype):
    args = both_directions(arguments(4, 37, 70, 16, dtype))
    weight = torch.randn(2, 37, 70, generator=torch.Generator().manual_seed(0)).to(dtype)

    def scan(name):
        return lambda **a: bidirectional_scan(**a, delta_softplus=True, backend=name)

    out, grads = gradients(scan(backend), args, weight)
    assert_agrees(out, grads, scan("reference"), args, weight)


@pytest.mark.parametrize("backend", [name for name in HERE if name == "cpu"])
def test_views_are_read_where_they_lie(backend):
    """The directions and halves of one projection, as EBS hands them over."""
    projected = torch.randn(2, 30, 2, 2, 21, dtype=torch.float64, requires_grad=True)
    args = both_directions(arguments(4, 21, 30, 5))

    def scan(u, z):
        return bidirectional_scan(**(args | {"u": u, "z": z}), delta_softplus=True, backend=backend)

    views = [x.mT for x in projected.permute(2, 3, 0, 1, 4)]  # [2, B, D, L] each
    out, expected = scan(*views), scan(*(x.contiguous() for x in views))
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(o.sum(), projected)[0] for o in (out, expected)))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("reverse", [False, True])
def test_last_state_is_where_a_further_step_starts(backend, reverse):
    """The state after L steps, found again as what an (L+1)th step with B = 0 reads out."""
    args = {k: t.detach() for k, t in arguments(2, 3, 9, 4).items()}
    _, state = selective_scan(**args, delta_softplus=True, reverse=reverse, return_last_state=True, backend=backend)
    args = {k: None if k == "z" else t for k, t in args.items()} | {"D": None, "delta_bias": None}
    ones = torch.ones(2, 3, 1, dtype=torch.float64)
    delta = torch.nn.functional.softplus(args["delta"] + arguments(2, 3, 9, 4)["delta_bias"].detach()[:, None])
    for n in range(4):
        read = torch.zeros(2, 4, 1, dtype=torch.float64)
        read[:, n] = 1
        silent = torch.zeros(2, 4, 1, dtype=torch.float64)
        where = 0 if reverse else -1
        longer = {
            key: torch.cat([more, args[key]] if where == 0 else [args[key], more], dim=-1)
            for key, more in (("u", ones), ("B", silent), ("C", read))
        }
        longer["delta"] = torch.cat([0 * ones, delta] if where == 0 else [delta, 0 * ones], dim=-1)
        out = selective_scan(**(args | longer), reverse=reverse, backend=backend)
        assert error(out[..., where], state[..., n]) < 1e-12


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_step_reaches_those_after_it_alone(backend, reverse):
    args = {k: t.detach() for k, t in arguments(1, 3, 40, 16, torch.float32).items()}
    before = selective_scan(**args, delta_softplus=True, reverse=reverse, backend=backend)
    args["u"] = args["u"].clone()
    args["u"][..., 20] += 1
    changed = (selective_scan(**args, delta_softplus=True, reverse=reverse, backend=backend) != before).any(1)[0]
    reached = changed[:21] if reverse else changed[20:]
    assert reached.all()
    assert changed.sum() == reached.sum()


@pytest.mark.parametrize("backend", HERE)
def test_gradcheck(backend):
    args = both_directions(arguments(2, 3, 5, 2))
    assert torch.autograd.gradcheck(
        lambda *tensors: bidirectional_scan(*tensors, delta_softplus=True, backend=backend), list(args.values())
    )


@pytest.mark.parametrize("backend", HERE)
def test_large_steps_and_gates_stay_finite(backend):
    args = {k: t.detach() for k, t in arguments(1, 4, 50, 3, torch.float32).items()}
    args |= {name: (args[name] * 1e3).requires_grad_() for name in ("delta", "z")}
    y = selective_scan(**args, delta_softplus=True, backend=backend)
    assert y.isfinite().all()
    y.sum().backward()
    assert args["delta"].grad.isfinite().all()
    assert args["z"].grad.isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_threads_do_not_change_the_result(backend):
    args = {k: t.detach() for k, t in arguments(2, 50, 70, 16, torch.float32).items()}
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(selective_scan(**args, delta_softplus=True, backend=backend))
    finally:
        torch.set_num_threads(threads)
    assert error(results[1], results[0].double()) < 1e-6
    assert error(results[2], results[0].double()) < 1e-6


@pytest.mark.parametrize("backend", [name for name in HERE if name == "cpu"])
def test_cpu_operator_is_a_proper_one(backend):
    """Schema, fake implementation, autograd registration and tracing, by torch's own checks."""
    from etmamba_timm.ops.scan import fused

    for optional in (True, False):
        args = both_directions(arguments(4, 5, 40, 4, torch.float32, optional=optional))
        torch.library.opcheck(fused._forward, (2, True, *args.values(), True))
        out, _, states = fused._forward(2, True, *args.values(), True)
        with torch.no_grad():
            torch.library.opcheck(fused._backward, (torch.randn_like(out), states, 2, *args.values(), True))


@pytest.mark.parametrize("backend", [name for name in HERE if name == "cpu"])
def test_cpu_operator_compiles_in_one_graph_and_exports(backend):
    class Scan(torch.nn.Module):
        def forward(self, *tensors):
            return bidirectional_scan(*tensors, delta_softplus=True)

    args = tuple(both_directions(arguments(2, 5, 40, 4, torch.float32)).values())
    expected = Scan()(*args)
    compiled = torch.compile(Scan(), fullgraph=True, backend="aot_eager")
    out = compiled(*args)
    assert torch.equal(out, expected)
    for a, b in zip(torch.autograd.grad(out.sum(), args), torch.autograd.grad(expected.sum(), args), strict=True):
        assert torch.equal(a, b)
    exported = torch.export.export(Scan(), args)
    assert torch.equal(exported.module()(*args), expected)


def test_auto_takes_the_first_that_can():
    args = arguments(1, 2, 3, 4)
    expected = selective_scan(**args, backend=HERE[0])
    assert torch.equal(selective_scan(**args), expected)


def test_every_backend_says_why_it_cannot():
    backends = scan_backends()
    assert backends["reference"] is None
    assert all(reason is None or len(reason) > 20 for reason in backends.values())
    for name, reason in backends.items():
        if reason is not None:
            with pytest.raises(RuntimeError, match=name):
                selective_scan(**arguments(1, 2, 3, 4), backend=name)


def test_unknown_backend_names_the_known():
    with pytest.raises(ValueError, match=r"'triton'.*'auto' or one of .*reference"):
        selective_scan(**arguments(1, 2, 3, 4), backend="triton")


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("u", torch.zeros(2, 3), r"u is \(2, 3\); it must be \[batch, width, length\]"),
        ("u", torch.zeros(2, 3, 0), "none of them 0"),
        ("u", torch.zeros(2, 3, 7, dtype=torch.int64), "int64; it must be float32, bfloat16, float16 or float64"),
        ("delta", torch.zeros(2, 3, 6), r"delta is \(2, 3, 6\).*must be \(2, 3, 7\)"),
        ("delta", torch.zeros(2, 3, 7, dtype=torch.float64), "delta is torch.float64"),
        ("A", torch.zeros(4, 5), "u's width is 3"),
        ("A", torch.zeros(3, 5, dtype=torch.bfloat16), "A is torch.bfloat16.*float32"),
        ("B", torch.zeros(2, 4, 7), r"B is \(2, 4, 7\).*must be \(2, 5, 7\)"),
        ("C", torch.zeros(2, 1, 5, 7), "C is"),
        ("D", torch.zeros(5), r"D is \(5,\)"),
        ("z", torch.zeros(2, 3, 8), "z is"),
        ("delta_bias", torch.zeros(3, 1), "delta_bias is"),
        ("z", torch.zeros(2, 3, 7, device="meta"), "z is on meta and u on cpu"),
    ],
)
def test_arguments_that_do_not_fit(name, bad, message):
    args = {k: t.detach() for k, t in arguments(2, 3, 7, 5, torch.float32).items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**(args | {name: bad}))


def test_two_directions_are_wanted():
    args = both_directions(arguments(4, 2, 3, 4))
    for bad in (args["u"][:1], args["u"][0]):
        with pytest.raises(ValueError, match=r"u is .*; it must be \[2, batch, width, length\]"):
            bidirectional_scan(**(args | {"u": bad}))
    with pytest.raises(ValueError, match=r"B is \(2, 4, 3\); with u \(2, 2, 2, 3\).* must be \(2, 2, 4, 3\)"):
        bidirectional_scan(**(args | {"B": args["B"][0]}))


def test_reference_matches_the_closed_form():
    """One channel, one state, constant coefficients: h_t is a geometric sum."""
    ones = torch.ones(1, 1, 6, dtype=torch.float64)
    A = torch.full((1, 1), -0.5, dtype=torch.float64)
    out, state = reference.scan(ScanInputs(ones, ones * 0.2, A, ones * 3, ones * 2), 1)
    decay = torch.exp(torch.tensor(-0.1, dtype=torch.float64))
    h = torch.stack([0.2 * 3 * sum(decay**k for k in range(t + 1)) for t in range(6)])
    assert error(out[0, 0], 2 * h) < 1e-14
    assert error(state[0, 0, 0], h[-1]) < 1e-14


def test_without_a_compiler_one_warning_and_the_same_result(tmp_path):
    """A fresh process with an empty cache and no compiler: `auto` goes on with plain PyTorch."""
    code = """
import logging, torch
logging.basicConfig(format='%(levelname)s %(message)s')
from etmamba_timm.ops import scan_backends
from etmamba_timm.ops import selective_scan
torch.manual_seed(0)
x = torch.randn(2, 3, 20)
A, B = -torch.rand(3, 4), torch.randn(2, 4, 20)
outs = [selective_scan(x, x, A, B, B, delta_softplus=True, backend=b) for b in ('auto', 'auto', 'reference')]
torch.testing.assert_close(outs[1], outs[2])
print(scan_backends()['cpu'])
"""
    environment = os.environ | {"PATH": "", "CXX": "", "ETMAMBA_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "install a C++ compiler" in done.stdout
    assert (
        done.stderr.count("WARNING selective scan runs on the slower backend 'torch', because 'cpu' can't run: ") == 1
    )
    assert done.stderr.count("install a C++ compiler") == 1


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C"])
def test_a_missing_argument_is_an_error(name):
    with pytest.raises(ValueError, match=f"{name} is NoneType; it must be a tensor"):
        selective_scan(**(arguments(1, 2, 3, 4) | {name: None}))


def test_something_else_than_a_tensor_is_an_error():
    with pytest.raises(ValueError, match="D is float; it must be a tensor or None"):
        selective_scan(**(arguments(1, 2, 3, 4) | {"D": 3.0}))


def test_forward_mode_goes_through_the_reference():
    args = arguments(2, 3, 5, 2)
    names = list(args)
    primals = tuple(t.detach() for t in args.values())
    tangents = tuple(torch.randn_like(t) for t in primals)

    def scan(*tensors, backend="auto"):
        return selective_scan(**dict(zip(names, tensors, strict=True)), delta_softplus=True, backend=backend)

    _, tangent = torch.func.jvp(scan, primals, tangents)
    step = 1e-6
    moved = [scan(*(p + s * t for p, t in zip(primals, tangents, strict=True))) for s in (step, -step)]
    torch.testing.assert_close(tangent, (moved[0] - moved[1]) / (2 * step), rtol=1e-5, atol=1e-7)
    for backend in FAST:
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(lambda *t: scan(*t, backend=backend), primals, tangents)  # noqa: B023
