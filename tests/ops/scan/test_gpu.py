"""The scan's GPU kernels, emulated, against the reference in float64: outputs, every gradient, registration, models."""

from dataclasses import replace

import pytest
import timm
import torch
from agreement import error
from emulated import ORDERS, emulate, needs_emulation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mamba_ssm_cases import SCANS, assert_close, forward_and_backward, only_reference
from parts import drawn
from scan_mutants import MUTANTS, spoils
from test_selective_scan import PARAMETERS, arguments, assert_agrees, both_directions, gradients, in_float64
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import etmamba_timm  # registers the models  # noqa: F401
from etmamba_timm.ops import bidirectional_scan, selective_scan
from etmamba_timm.ops.kernels import choice, load_gpu
from etmamba_timm.ops.scan import fused, gpu, reference
from etmamba_timm.ops.scan.backend import ScanInputs
from etmamba_timm.ops.scan.selective_scan import BACKENDS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = needs_emulation


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    """Tensors of the CPU are taken for a GPU's."""
    emulate(monkeypatch)
    monkeypatch.setitem(BACKENDS, "gpu", replace(fused.GPU, devices=("cpu",), why_not=lambda: None))


def agrees(scan, expected, args: dict, seed: int = 0) -> None:
    """Output and every gradient of `scan` are within BOUNDS of those of `expected` in float64."""
    with torch.no_grad():
        shape = scan(**args).shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(args["u"].dtype)
    out, grads = gradients(scan, args, weight)
    assert out.dtype == args["u"].dtype
    assert all(grad.dtype == args[name].dtype for name, grad in grads.items())
    assert_agrees(out, grads, expected, args, weight)


def in_dtypes(args: dict, A_log: bool, dtypes) -> dict:
    """A, or log(-A), D and delta_bias in these dtypes, as leaves."""
    A = (-args["A"].detach()).clamp_min(1e-4).log() if A_log else args["A"]  # float16 has no log of 0
    tensors = {"A": A, "D": args["D"], "delta_bias": args["delta_bias"]}
    return {k: t.detach().to(dtype).requires_grad_() for (k, t), dtype in zip(tensors.items(), dtypes, strict=True)}


@settings(max_examples=70, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    width=st.sampled_from([1, 3, 4, 31, 32, 36, 64, 65]),
    length=st.one_of(st.integers(1, 50), st.sampled_from([63, 64, 65, 130])),
    state=st.sampled_from([*range(1, 21), 16, 16, 16, 33]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["BLD", "BLD", "BDL", "strided"]),
    softplus=st.booleans(),
    absent=st.sets(st.sampled_from(["D", "z", "delta_bias"])),
    A_log=st.booleans(),
    parameters=st.one_of(st.just([torch.float32] * 3), st.tuples(*[st.sampled_from(DTYPES)] * 3)),
    way=st.sampled_from(["forwards", "backwards", "mixed", "both"]),
    segments=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    order=ORDERS,
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_reference(
    monkeypatch,
    batch,
    width,
    length,
    state,
    dtype,
    layout,
    softplus,
    absent,
    A_log,
    parameters,
    way,
    segments,
    order,
    seed,
):
    monkeypatch.setenv("EMULATION_ORDER", order)
    monkeypatch.setattr(gpu, "segments", lambda *sizes, backward=False: segments[backward])
    args = arguments(2 * batch if way == "both" else batch, width, length, state, dtype, seed, layout)
    args |= in_dtypes(args, A_log, parameters) | dict.fromkeys(absent)
    flags = {"delta_softplus": softplus, "A_log": A_log}
    if not softplus:  # a step must be positive for the scan to be stable
        args["delta"] = (args["delta"].detach().abs() * 0.2).requires_grad_()
        args["delta_bias"] = None
    reverse_from = {"forwards": batch, "backwards": 0, "mixed": batch // 2, "both": batch}[way]

    def one_call(**args):
        return fused.GPU.scan(ScanInputs(**args, **flags), reverse_from)[0]

    def expected(**args):
        out, _ = reference.scan(ScanInputs(**args, **flags).without_A_log(), reverse_from)
        return out[:batch] + out[batch:] if way == "both" else out

    def two_directions(**args):
        return fused.GPU.both(ScanInputs(**both(args), **flags))

    def both(args):
        return {k: t if t is None or k in PARAMETERS else t.unflatten(0, (2, -1)) for k, t in args.items()}

    agrees(two_directions if way == "both" else one_call, expected, args, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optional", [True, False])
def test_many_steps_as_the_models_hand_them_over(monkeypatch, dtype, optional):
    """Segments as the device asks for them, quads, both directions."""
    args = both_directions(arguments(2, 64, 530, 16, dtype, optional=optional))
    monkeypatch.setattr(load_gpu, "processors", lambda device: 132)
    assert gpu.segments(4, 530, 132) > 1
    assert gpu.segments(4, 530, 132, backward=True) > 1

    def scan(backend):
        return lambda **a: bidirectional_scan(**a, delta_softplus=True, backend=backend)

    agrees(scan("gpu"), scan("reference"), args)


@pytest.mark.parametrize("state", [5, 20])
@pytest.mark.parametrize("reverse", [False, True])
def test_last_state(state, reverse):
    args = {k: t.detach() for k, t in arguments(2, 33, 150, state, torch.float32).items()}
    got, want = (
        selective_scan(**args, delta_softplus=True, return_last_state=True, reverse=reverse, backend=backend)[1]
        for backend in ("gpu", "reference")
    )
    assert got.shape == want.shape
    assert error(got, want.double()) < 1e-5


@pytest.mark.parametrize("reverse", [False, True])
def test_a_step_reaches_those_after_it_alone(reverse):
    args = {k: t.detach() for k, t in arguments(1, 3, 300, 16, torch.float32).items()}
    args["A"] = args["A"] / 100  # a state lasts
    before = selective_scan(**args, delta_softplus=True, reverse=reverse, backend="gpu")
    args["u"] = args["u"].clone()
    args["u"][..., 150] += 1e3
    changed = (selective_scan(**args, delta_softplus=True, reverse=reverse, backend="gpu") != before).any(1)[0]
    reached = changed[:151] if reverse else changed[150:]
    assert reached.all()
    assert changed.sum() == reached.sum()


def test_views_are_read_where_they_lie(monkeypatch):
    """The directions and halves of one projection, and B and C within another, as EBS hands them over."""
    projected, coefficients = torch.randn(2, 30, 2, 2, 32), torch.randn(2, 2, 30, 68)
    args = {k: t.detach() for k, t in arguments(4, 32, 30, 16, torch.float32).items()}
    args["delta"] = args["delta"].unflatten(0, (2, -1))
    u, z = (x.mT for x in projected.permute(2, 3, 0, 1, 4))  # [2, B, D, L]
    views = {"u": u, "z": z, "B": coefficients[..., 36:52].mT, "C": coefficients[..., 52:].mT}

    def scan(sequences):
        leaves = {k: t.detach().requires_grad_() for k, t in (args | sequences).items()}
        out = bidirectional_scan(**leaves, delta_softplus=True, backend="gpu")
        return [out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))]

    expected = scan({k: t.contiguous() for k, t in views.items()})  # copied to the layout of the views
    for function in ("_readable", "_writable"):
        monkeypatch.setattr(gpu, function, lambda x: x if gpu._adjacent(x) else pytest.fail("a copy"))
    for got, want in zip(scan(views), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_outputs_gradient_may_have_any_strides():
    args = arguments(2, 8, 40, 16, torch.float32)

    def grads(dout, backend, inputs):
        out = selective_scan(**inputs, delta_softplus=True, backend=backend)
        return torch.autograd.grad(out, list(inputs.values()), dout.to(out.dtype))

    x = torch.randn(2, 8, 40)
    for dout in (x[:1, :1, :1].expand_as(x), x, x.mT.contiguous().mT, x.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        for got, want in zip(grads(dout, "gpu", args), grads(dout, "reference", in_float64(args)), strict=True):
            assert error(got, want) < 1e-5


def test_growth_beyond_float32_in_silent_segments_is_no_nan(monkeypatch):
    """A state that starts from zeros grows by e^1000 and stays 0."""
    monkeypatch.setattr(gpu, "segments", lambda *sizes, backward=False: 5)
    u = torch.zeros(1, 4, 80)
    ones = torch.ones(1, 16, 80)
    out, state = selective_scan(u, u + 1, torch.full((4, 16), 60.0), ones, ones, return_last_state=True, backend="gpu")
    assert not out.any()
    assert not state.any()


@pytest.mark.parametrize("A_log", [False, True])
@pytest.mark.parametrize(("layout", "width", "state", "optional"), [("BLD", 32, 16, True), ("BDL", 5, 3, False)])
def test_operators_are_proper_ones(layout, width, state, optional, A_log):
    """Schema, fake implementation, autograd registration and tracing, by torch's own checks."""
    args = both_directions(arguments(4, width, 40, state, torch.float32, optional=optional, layout=layout))
    if A_log and optional:
        args |= in_dtypes(args, A_log, (torch.bfloat16, torch.float16, torch.float32))
    torch.library.opcheck(fused._forward, (2, True, *args.values(), True, A_log))
    plain = [None if t is None else t.detach() for t in args.values()]
    out, _, states = fused._forward(2, True, *plain, True, A_log)
    torch.library.opcheck(fused._backward, (torch.randn_like(out), states, 2, *plain, True, A_log))


@pytest.mark.parametrize("state", [4, 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_layers_parameters(dtype, state):
    """log(-A) through the public functions; dtypes that the kernel has not, and more states than it takes."""
    args = arguments(2, 8, 40, state, torch.float32)
    args |= in_dtypes(args, True, [dtype, torch.float32, torch.float32])

    def scan(backend):
        return lambda **a: selective_scan(**a, delta_softplus=True, backend=backend, A_log=True)

    agrees(scan("gpu"), scan("reference"), args)


def test_parameters_go_to_the_kernel_as_they_are():
    """A mixer asks for no kernel that casts, takes exponentials or turns signs."""
    model, clip, _ = model_and_clip("etmamba_ti")
    model, clip, tokens = model.bfloat16(), clip.bfloat16(), torch.randn(2, 19, 64).bfloat16()
    with torch.inference_mode():
        model(clip)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model.blocks[0].mixer(tokens)
    asked = {event.key for event in profile.key_averages()}
    assert "etmamba_timm::scan" in asked
    assert not asked & {"aten::exp", "aten::neg", "aten::_to_copy"}


def test_fake_tensors_on_a_device(monkeypatch):
    monkeypatch.undo()  # real devices
    with FakeTensorMode():
        args = both_directions({k: t.cuda() for k, t in arguments(4, 33, 40, 16, torch.bfloat16).items()})
        out, state, kept = fused._forward(2, True, *args.values(), True)
        assert (out.shape, out.dtype, out.device.type) == ((2, 33, 40), torch.bfloat16, "cuda")
        assert (state.shape, state.dtype) == ((4, 33, 16), torch.float32)
        assert kept.shape == (4 * 2 * 3 * 32 * 16,)  # rows, blocks of channels, chunks
        grads = fused._backward(out, kept, 2, *args.values(), True)
        assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in args.values()]


def test_states_are_kept_for_a_backward_pass_alone():
    args = arguments(1, 8, 40, 16, torch.float32)
    flat = [t.unsqueeze(0) if k not in PARAMETERS else t for k, t in args.items()]
    out, _, kept = fused._forward(1, False, *flat, True)
    assert kept.numel() == 0
    expected = selective_scan(**args, delta_softplus=True, backend="gpu")
    for got, want in zip(*(torch.autograd.grad(o.sum(), list(args.values())) for o in (out, expected)), strict=True):
        torch.testing.assert_close(got, want)


def test_compiles_in_one_graph_and_exports_with_any_batch():
    class Scan(torch.nn.Module):
        def forward(self, *tensors):
            return bidirectional_scan(*tensors, delta_softplus=True)

    def inputs(batch, dtype=torch.float32):
        return tuple(both_directions(arguments(2 * batch, 8, 40, 4, dtype)).values())

    args = inputs(2)
    expected = Scan()(*args)
    compiled = torch.compile(Scan(), fullgraph=True, backend="aot_eager")
    out = compiled(*args)
    assert torch.equal(out, expected)
    for a, b in zip(torch.autograd.grad(out.sum(), args), torch.autograd.grad(expected.sum(), args), strict=True):
        torch.testing.assert_close(a, b)
    batch = torch.export.Dim("batch", max=64)
    dynamic = tuple({} if name in PARAMETERS else {1: batch} for name in ScanInputs._fields[:8])
    exported = torch.export.export(Scan(), args, dynamic_shapes=(dynamic,)).module()
    for size in (2, 3):
        args = inputs(size)
        assert torch.equal(exported(*args), Scan()(*args))


def test_flops_are_those_of_the_cpu(monkeypatch):
    args = {k: t.detach() for k, t in arguments(2, 8, 40, 16, torch.float32).items()}
    counts = []
    for backend in ("gpu", "cpu"):
        if backend == "cpu":
            monkeypatch.undo()
        with FlopCounterMode(display=False) as counter:
            selective_scan(**args, backend=backend)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * 8 * 40 * (4 * 16 + 3)] * 2


def test_what_it_declines(monkeypatch):
    with pytest.raises(RuntimeError, match="'gpu' can't run: the kernel has no float64; use float32, bfloat16 or"):
        selective_scan(**arguments(1, 2, 3, 4), backend="gpu")
    monkeypatch.setattr(choice, "gpu_why_not", lambda device: "the device has compute capability 7.5")
    with pytest.raises(RuntimeError, match="'gpu' can't run: the device has compute capability 7.5"):
        selective_scan(**arguments(1, 2, 3, 4, torch.float32), backend="gpu")


@pytest.mark.parametrize(
    ("batch", "width", "forward", "backward"),
    [
        (8, 576, (1, 1), (6, 22)),
        (1, 576, (14, 29), (22, 40)),
        (32, 576, (1, 1), (1, 11)),
        (8, 1152, (1, 1), (3, 11)),
        (1, 192, (24, 49), (40, 49)),
    ],
)
def test_the_number_of_segments_is_about_the_best_of_those_measured(batch, width, forward, backward):
    """Numbers within 10% of the best on an H200, with 3,137 steps in both directions."""
    blocks = 2 * batch * width // 32
    assert forward[0] <= gpu.segments(blocks, 3137, 132) <= forward[1]
    assert backward[0] <= gpu.segments(blocks, 3137, 132, backward=True) <= backward[1]


def test_short_sequences_have_one_segment():
    assert gpu.segments(1, 1, 132) == gpu.segments(1, 127, 132, backward=True) == gpu.segments(10**6, 10**6, 132) == 1


# --- models --------------------------------------------------------------------------------------


def model_and_clip(name: str, size: int = 48, frames: int = 4, **others):
    """A small model, a clip for it, and weights of its outputs."""
    torch.manual_seed(0)
    sizes = {"depth": 2, "embed_dim": 64, "img_size": size, "num_frames": frames, "num_classes": 7}
    model = timm.create_model(name, **sizes, **others).eval()
    return model, torch.randn(2, 3, frames, size, size), torch.randn(2, 7)


@pytest.mark.parametrize("name", ["etmamba_ti", "videomamba_ti"])
def test_models_agree_with_the_reference(monkeypatch, name):
    calls = []
    monkeypatch.setattr(gpu, "backward", lambda *args, run=gpu.backward: calls.append(1) or run(*args))
    model, clip, target = model_and_clip(name)
    got = forward_and_backward(model, clip, target)
    assert len(calls) == 2 * SCANS[name]
    monkeypatch.undo()
    only_reference(monkeypatch)
    want = forward_and_backward(model.double(), clip.double(), target.double())
    assert_close(got, want, 1e-4)


@pytest.mark.parametrize("name", ["etmamba_ti", "videomamba_ti"])
def test_both_directions_are_live(name):
    """The last patch reaches the first and the first the last, through the mixers alone."""
    model, clip, _ = model_and_clip(name, size=32, frames=2, stem="none")
    drawn(model, torch.float32)
    before = model.forward_features(clip)
    last, first = (..., 1, slice(16, 32), slice(16, 32)), (..., 0, slice(0, 16), slice(0, 16))
    for changed, watched in ((last, 1), (first, -1)):
        x = clip.clone()
        x[changed] += 1
        assert ((model.forward_features(x) - before)[:, watched].abs() > 1e-6).any()


# --- the tests themselves ------------------------------------------------------------------------


@pytest.mark.parametrize("mutant", [MUTANTS[4], MUTANTS[11]], ids=str)
def test_a_missing_barrier_shows(monkeypatch, tmp_path, mutant):
    """`python tests/ops/scan/scan_mutants.py` takes out every barrier and every wait, one at a time."""
    assert spoils(mutant, monkeypatch, tmp_path)
