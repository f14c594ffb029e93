"""The operators and the models on a CUDA device, against float64 on the CPU. All together at most two minutes."""

import importlib
import threading

import pytest
import timm
import torch
from agreement import assert_gradients_agree, error
from test_convolutions import BOUNDS

import etmamba_timm  # registers the models  # noqa: F401
from etmamba_timm.ops import bidirectional_scan, conv_norm_relu, local_conv, selective_scan, short_conv
from etmamba_timm.ops.kernels import load_gpu

pytestmark = pytest.mark.cuda

SHORT, LOCAL, STAGE, NORM = (
    importlib.import_module(f"etmamba_timm.ops.{name}")
    for name in ("short_conv", "local_conv", "conv_norm_relu", "norm")
)
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    if reason := load_gpu.why_not():
        pytest.skip(reason)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def assert_agrees(kernel, plain, activations: list, parameters: list) -> None:
    """Output and every gradient on the device, against `plain` in float64 on the CPU, which gets the same numbers."""
    inputs = [t.cuda().requires_grad_() for t in (*activations, *parameters)]
    wanted = [t.double().requires_grad_() for t in (*activations, *parameters)]
    out, expected = kernel(*inputs), plain(*wanted)
    dout = randn(*out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, inputs, dout.cuda())
    activation_bound, parameter_bound = BOUNDS[activations[0].dtype]
    assert error(out.cpu(), expected) <= activation_bound
    bounds = [activation_bound] * len(activations) + [parameter_bound] * len(parameters)
    assert_gradients_agree([grad.cpu() for grad in grads], expected, wanted, dout, bounds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "width", "way"), [(1, 8, "both"), (37, 5, "both"), (300, 192, False), (300, 64, True)]
)
def test_short_conv(dtype, length, width, way):
    x = randn(2, length, 2, 2 * width, dtype=dtype).permute(2, 0, 1, 3)[..., width:]
    x, reverse = (x, False) if way == "both" else (x[0], way)

    def call(function):
        return lambda *t: function(*t, reverse)

    assert_agrees(call(short_conv), call(SHORT._plain), [x], [randn(width, 1, 4), randn(width)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "channels"), [((1, 1, 1), 4), ((2, 14, 14), 48), ((3, 5, 7), 9), ((1, 20, 18), 16)])
def test_local_conv(dtype, grid, channels):
    tokens, apart = 1 + grid[0] * grid[1] * grid[2], 4 * (channels % 16 != 0)
    x, residual = randn(2, tokens, channels + apart, dtype=dtype)[..., apart:], randn(2, tokens, 4 * channels)
    parameters = [randn(channels, 1, k, k) / k for k in (3, 5, 7)] + [randn(channels) for _ in range(3)]

    def call(function):
        return lambda x, residual, *rest: function(x, residual, list(rest[:3]), list(rest[3:]), grid)

    assert_agrees(call(local_conv), call(LOCAL._plain), [x, residual], parameters)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(3, (4, 32, 32)), (3, (16, 9, 21)), (5, (1, 3, 8))])
def test_conv_norm_relu(dtype, depthwise, channels, size):
    x = [randn(2, channels, *size, dtype=dtype) for _ in range(2)]
    # Biases far apart keep the norm's variance away from 0, where no precision would be enough.
    parameters = [randn(channels, channels, 1, 1, 1) / 10, 10.0 * torch.arange(channels), 1 + randn(channels) / 10]
    parameters += [2 + randn(channels)] + depthwise * [randn(channels, 1, 3, 3, 3) / 3, randn(channels)]

    def call(function):
        return lambda x, residual, *p: function(x, p[4:] or None, p[:2], p[2:4], 1e-5, residual)

    assert_agrees(call(conv_norm_relu), call(STAGE._plain), x, parameters)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 192])
def test_norm(rms, dtype, width):
    x, parameters = 3 + randn(50, width), [1 + randn(width) / 3, randn(width)][: 1 if rms else 2]
    inputs = [t.cuda().requires_grad_() for t in (x, *(p.to(dtype) for p in parameters))]
    wanted = [t.detach().cpu().double().requires_grad_() for t in inputs]
    out = NORM._forward(*inputs, *([None] * rms), 1e-5, dtype)[0]
    expected = NORM._plain(*wanted, *([None] * rms), 1e-5, torch.float64)
    dout = randn(50, width, dtype=dtype)
    got = (out, *torch.autograd.grad(out, inputs, dout.cuda()))
    want = (expected, *torch.autograd.grad(expected, wanted, dout.double()))
    activations, of_parameters = BOUNDS[dtype]
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert error(a.cpu(), b) <= (activations if i < 2 else of_parameters), i


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "width", "length", "state", "optional"),
    [
        (2, 32, 1, 16, True),
        (2, 32, 13, 3, False),
        (1, 192, 2051, 16, True),
        (2, 33, 300, 16, True),
        (1, 8, 100, 20, True),
    ],
)
def test_scan(dtype, batch, width, length, state, optional):
    """Against the vectorised scan in float64: the reference would take minutes for thousands of steps."""
    shapes = [(2, batch, length, width)] * 2 + [(2, batch, length, state)] * 2 + [(2, batch, length, width)] * optional
    sequences = [randn(*shape, dtype=dtype) for shape in shapes]
    parameters = [-4 * torch.rand(width, state) - 0.1, *([randn(width), randn(width) - 2] if optional else [])]

    def call(backend):
        def run(u, delta, B, C, *rest):
            z, A, D, bias = rest if optional else (None, *rest, None, None)
            z = None if z is None else z.mT
            return bidirectional_scan(u.mT, delta.mT, A, B.mT, C.mT, D, z, bias, True, backend=backend).mT

        return run

    assert_agrees(call("gpu"), call("torch"), sequences, parameters)
    u, delta, B, C, *rest = (t[0].cuda().mT for t in sequences)
    A, *others = (t.cuda() for t in parameters)
    D, bias = others or (None, None)
    for reverse in (False, True):  # each direction alone, and the last state
        out, state_ = selective_scan(u, delta, A, B, C, D, *(rest or [None]), bias, True, True, reverse, backend="gpu")
        cpu = [None if t is None else t.cpu().double() for t in (u, delta, A, B, C, D, *(rest or [None]), bias)]
        wanted, wanted_state = selective_scan(*cpu, True, True, reverse, backend="torch")
        assert error(out.cpu(), wanted) <= BOUNDS[dtype][0]
        assert error(state_.cpu(), wanted_state) <= BOUNDS[dtype][0]


def small_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, depth=2, embed_dim=64, img_size=64, num_frames=4, num_classes=7).eval()


def logits_and_gradients(model: torch.nn.Module, clip: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(clip)
    logits[:, ::2].sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", ["etmamba_ti", "etmamba_ti_ebs", "videomamba_ti"])
def test_models(name):
    model, clip = small_model(name), randn(2, 3, 4, 64, 64)
    wanted = logits_and_gradients(small_model(name).double(), clip.double())
    got = logits_and_gradients(model.cuda(), clip.cuda())
    for a, b in zip(got, wanted, strict=True):
        assert error(a.cpu(), b) <= 1e-4
    for dtype in HALF:
        with torch.autocast("cuda", dtype):
            got = logits_and_gradients(model, clip.cuda())
        assert error(got[0].cpu(), wanted[0]) <= 3e-2
        assert all(t.isfinite().all() for t in got)
    with torch.no_grad():
        assert error(small_model(name).cuda().bfloat16()(clip.cuda().bfloat16()).cpu(), wanted[0]) <= 5e-2


def test_in_a_cuda_graph_on_another_stream_and_in_another_thread():
    model, clips = small_model("etmamba_ti").cuda().bfloat16(), randn(2, 2, 3, 4, 64, 64).cuda().bfloat16()
    clip = clips[0].clone()
    with torch.inference_mode():
        wanted = [model(x) for x in clips]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            assert torch.equal(model(clip), wanted[0])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(clip)
        for x, logits in zip(clips, wanted, strict=True):
            clip.copy_(x)
            graph.replay()
            assert torch.equal(captured, logits)

    results = []

    def run() -> None:
        with torch.inference_mode():
            results.append(model(clips[1]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert torch.equal(results[0], wanted[1])


@pytest.mark.parametrize("name", ["etmamba_ti", "videomamba_ti"])
def test_compiled_as_one_graph(name):
    model, clip = small_model(name).cuda(), randn(2, 3, 4, 64, 64).cuda()
    wanted = logits_and_gradients(model, clip)
    got = logits_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), clip)
    for a, b in zip(got, wanted, strict=True):
        assert error(a, b.double()) <= 1e-4
