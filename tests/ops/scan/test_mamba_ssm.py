"""The mamba-ssm backend: mamba-ssm's real Python over a stand-in for its compiled kernel, which needs no GPU.

The stand-in itself is held against mamba-ssm's own reference. Tests marked `cuda` do the same on a GPU and its kernel.
"""

import importlib
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import selective_scan_cuda_standin as standin
import timm
import torch
from torch import Tensor

import etmamba_timm  # registers the models  # noqa: F401
from etmamba_timm.ops import bidirectional_scan, scan_backends, selective_scan
from etmamba_timm.ops.scan import mamba_ssm as cuda
from etmamba_timm.ops.scan import reference
from etmamba_timm.ops.scan.selective_scan import BACKENDS

VERSION = "2.3.2.post1"

# Largest error over largest value, against the reference in float64. Half types: an output is rounded once, and the
# kernel's backward reads it, rounded, for the gate's gradient.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
GPU_TOLERANCE = TOLERANCE | {torch.float32: 1e-4}  # the kernel is compiled with --use_fast_math

OPTIONS = [
    {"D": True, "z": True, "delta_bias": True, "delta_softplus": True},
    {"D": False, "z": True, "delta_bias": False, "delta_softplus": True},
    {"D": True, "z": False, "delta_bias": True, "delta_softplus": False},
    {"D": False, "z": False, "delta_bias": False, "delta_softplus": False},
]
DIRECTIONS = ["forwards", "backwards", "both"]


# ---------------------------------------------------------------------------------------------------------------------
# mamba-ssm's Python, over the stand-in


def is_mamba(name: str) -> bool:
    return name.split(".")[0] in ("mamba_ssm", "selective_scan_cuda")


@pytest.fixture
def no_mamba():
    """Nothing of mamba-ssm is imported or probed; what was before comes back afterwards."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_mamba(name)}
    cuda._why_no_kernel.cache_clear()
    yield
    for name in list(sys.modules):
        if is_mamba(name):
            del sys.modules[name]
    sys.modules.update(before)
    cuda._why_no_kernel.cache_clear()


@pytest.fixture
def mamba(no_mamba, mamba_modules, monkeypatch) -> ModuleType:
    """mamba_ssm.ops.selective_scan_interface over the stand-in; the backend takes the CPU for its device."""
    sys.modules.update(mamba_modules)
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "cpu")
    standin.calls.clear()
    return mamba_modules["mamba_ssm.ops.selective_scan_interface"]


@pytest.fixture(scope="session")
def mamba_modules(request) -> dict[str, ModuleType]:
    """What `import mamba_ssm.ops.selective_scan_interface` puts into sys.modules, over the stand-in.

    Left out is what the scan's module imports and the scan doesn't use: mamba_ssm/__init__.py, whose language models
    need transformers, and a layer norm that needs triton, which comes with PyTorch's CUDA builds alone.
    """
    init = find_mamba_ssm(request.config)
    spec = importlib.util.spec_from_file_location("mamba_ssm", init, submodule_search_locations=[str(init.parent)])
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_mamba(name)}
    sys.modules["mamba_ssm"] = importlib.util.module_from_spec(spec)
    sys.modules["mamba_ssm.ops.triton.layer_norm"] = MagicMock()
    sys.modules["selective_scan_cuda"] = standin
    try:
        importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    finally:
        modules = {name: sys.modules.pop(name) for name in list(sys.modules) if is_mamba(name)}
        sys.modules.update(before)
    return modules


def find_mamba_ssm(config: pytest.Config) -> Path:
    """mamba_ssm/__init__.py of the installed package, or else of its Python installed into pytest's cache."""
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is not None:
        return Path(spec.origin)
    cache = config.cache.mkdir("mamba-ssm")
    if not (cache / VERSION).exists():
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-build-isolation", "--no-deps"]
            done = subprocess.run(
                [sys.executable, "-m", "pip", "install", *options, "--target", unfinished, f"mamba-ssm=={VERSION}"],
                env=os.environ | {"MAMBA_FORCE_BUILD": "TRUE", "MAMBA_SKIP_CUDA_BUILD": "TRUE"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                reason = f"mamba-ssm's Python can't be installed: {lines[-1] if lines else 'pip says nothing'}"
                (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
            Path(unfinished, "mamba_ssm").rename(cache / VERSION)
    return cache / VERSION / "__init__.py"


# ---------------------------------------------------------------------------------------------------------------------
# Inputs, and what to do with them


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


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = (got[name].cpu().double() - value.double()).abs().max().item()
        largest = value.double().abs().max().item()
        assert error <= tolerance * largest, f"{name}: error {error:.2e} with values up to {largest:.2e}"


# ---------------------------------------------------------------------------------------------------------------------
# The stand-in


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


def strided(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, dim=-1)[..., ::2]


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
    ids=str,
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


# ---------------------------------------------------------------------------------------------------------------------
# The backend


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_scan_agrees_with_the_reference(mamba, direction, options):
    inputs = make_inputs(options)
    dout = torch.randn(2, 13, 5).transpose(1, 2)
    got = with_gradients(in_direction(direction, "mamba_ssm"), inputs, dout)
    want = with_gradients(in_direction(direction, "reference"), inputs, dout, torch.float64)
    assert_close(got, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scan_agrees_in_half_types(mamba, direction, dtype):
    inputs = make_inputs(OPTIONS[0], dtype=dtype)
    dout = torch.randn(inputs["u"].shape).to(dtype)
    got = with_gradients(in_direction(direction, "mamba_ssm"), inputs, dout)
    assert got["out"].dtype == dtype
    want = with_gradients(in_direction(direction, "reference"), inputs, dout, torch.float64)
    assert_close(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize(("batch", "width", "length", "n_state"), [(2, 1, 1, 1), (2, 3, 2, 16), (4, 17, 128, 2)])
def test_scan_agrees_in_odd_sizes(mamba, batch, width, length, n_state):
    inputs = make_inputs(OPTIONS[0], batch, width, length, n_state)
    dout = torch.randn(inputs["u"].shape)
    got = with_gradients(in_direction("both", "mamba_ssm"), inputs, dout)
    want = with_gradients(in_direction("both", "reference"), inputs, dout, torch.float64)
    assert_close(got, want, TOLERANCE[torch.float32])


def test_scan_agrees_over_two_chunks(mamba):
    inputs = make_inputs(OPTIONS[0], width=2, length=standin.CHUNK + 1, n_state=2)
    dout = torch.randn(inputs["u"].shape)
    got = with_gradients(in_direction("both", "mamba_ssm"), inputs, dout)
    want = with_gradients(in_direction("both", "reference"), inputs, dout, torch.float64)
    assert_close(got, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("reverse_from", [0, 1, 3, 4])
def test_scan_splits_the_batch_anywhere(mamba, reverse_from):
    inputs = make_inputs(OPTIONS[0], batch=4)
    got, got_state = cuda.scan(**inputs, reverse_from=reverse_from)
    want, want_state = reference.scan(**inputs, reverse_from=reverse_from)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_state, want_state)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "layout",
    [
        Tensor.contiguous,
        strided,
        lambda t: t[:1].expand(t.shape),
        lambda t: t[..., :1].expand(t.shape),
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    ],
    ids=["contiguous", "strided", "expanded batch", "expanded length", "slice"],
)
def test_scan_takes_any_strides(mamba, direction, layout):
    inputs = {k: layout(v) if isinstance(v, Tensor) else v for k, v in make_inputs(OPTIONS[0]).items()}
    dout = layout(torch.randn(inputs["u"].shape))
    got = with_gradients(in_direction(direction, "mamba_ssm"), inputs, dout)
    want = with_gradients(in_direction(direction, "reference"), inputs, dout, torch.float64)
    assert_close(got, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("layout", [strided, lambda t: torch.cat([t, t], -1)[..., 1 : 1 + t.shape[-1]]])
@pytest.mark.parametrize("reverse_from", [0, 1, 2])
def test_scan_hands_the_kernel_whole_rows(mamba, monkeypatch, layout, reverse_from):
    """Contiguous, whatever comes in: where L is a multiple of 128 the kernel loads 16 bytes at a time, unchecked."""
    seen = []
    monkeypatch.setattr(standin, "fwd", lambda *args, fwd=standin.fwd: seen.extend(args) or fwd(*args))
    inputs = {k: layout(v) if isinstance(v, Tensor) else v for k, v in make_inputs(OPTIONS[0]).items()}
    cuda.scan(**inputs, reverse_from=reverse_from)
    u, delta, _, B, C, D, z, delta_bias, _ = seen
    assert all(t.is_contiguous() for t in (u, delta, B, C, D, z, delta_bias))


def test_scan_copies_nothing_that_is_in_order(mamba, monkeypatch):
    seen = []
    monkeypatch.setattr(standin, "fwd", lambda *args, fwd=standin.fwd: seen.extend(args) or fwd(*args))
    inputs = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in make_inputs(OPTIONS[0]).items()}
    cuda.scan(**inputs, reverse_from=2)
    assert [t.data_ptr() for t in seen[:8]] == [
        inputs[name].data_ptr() for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    ]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_scan_is_one_call_each_way(mamba, direction):
    inputs = make_inputs(OPTIONS[0])
    with_gradients(in_direction(direction, "mamba_ssm"), inputs, torch.ones(2, 5, 13))
    assert standin.calls == {"fwd": 1, "bwd": 1}


@pytest.mark.parametrize("reverse", [False, True])
def test_last_state_is_the_reference_s_and_has_no_gradient(mamba, reverse):
    inputs = make_inputs(OPTIONS[0], dtype=torch.bfloat16)
    inputs["u"].requires_grad_()
    out, state = selective_scan(**inputs, reverse=reverse, return_last_state=True, backend="mamba_ssm")
    _, want = selective_scan(**inputs, reverse=reverse, return_last_state=True, backend="reference")
    assert state.dtype == torch.float32
    torch.testing.assert_close(state, want.detach())
    assert out.requires_grad
    assert not state.requires_grad


def test_autocast_changes_nothing(mamba):
    inputs, dout = make_inputs(OPTIONS[0]), torch.randn(2, 5, 13)
    want = with_gradients(in_direction("both", "mamba_ssm"), inputs, dout)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(in_direction("both", "mamba_ssm"), inputs, dout)
    assert got["out"].dtype == torch.float32
    assert_close(got, want, 0.0)


def test_compile_breaks_the_graph_around_it(mamba):
    inputs = make_inputs(OPTIONS[0])
    compiled = torch.compile(lambda u, **rest: cuda.scan(u * 2, **rest, reverse_from=1)[0] + 1, backend="eager")
    u = inputs.pop("u").requires_grad_()
    got = compiled(u, **inputs)
    want = cuda.scan(u * 2, **inputs, reverse_from=1)[0] + 1
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), u)[0] for t in (got, want)))


# ---------------------------------------------------------------------------------------------------------------------
# Why not


def test_rejects_what_the_kernel_has_not(monkeypatch):
    def rejects(width: int = 4, n_state: int = 2, dtype: torch.dtype = torch.float32) -> str | None:
        u = torch.empty(1, width, 3, device="meta", dtype=dtype)
        A = torch.empty(width, n_state, device="meta", dtype=torch.promote_types(dtype, torch.float32))
        B = torch.empty(1, n_state, 3, device="meta", dtype=dtype)
        return cuda.rejects(u, u, A, B, B, None, None, None)

    assert "on meta; move them to a cuda device" in rejects()
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "meta")
    assert rejects(65535, 256, torch.bfloat16) is None
    assert "no float64" in rejects(dtype=torch.float64)
    assert "257" in rejects(n_state=257)
    assert "65536" in rejects(width=65536)


def test_auto_goes_by_what_it_rejects(mamba):
    inputs = make_inputs(OPTIONS[0])
    selective_scan(**inputs)
    assert standin.calls == {"fwd": 1}
    inputs = {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    selective_scan(**inputs)
    assert standin.calls == {"fwd": 1}
    with pytest.raises(RuntimeError, match="no float64"):
        selective_scan(**inputs, backend="mamba_ssm")


def test_without_a_device(no_mamba, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in cuda.why_not()
    assert scan_backends()["mamba_ssm"] == cuda.why_not()
    with pytest.raises(RuntimeError, match="no CUDA device"):
        selective_scan(**make_inputs(OPTIONS[0]), backend="mamba_ssm")
    assert not any(is_mamba(name) for name in sys.modules)


WITH_SCAN = {"mamba_ssm/__init__.py": "", "mamba_ssm/ops/selective_scan_interface.py": "selective_scan_fn = print"}
NOT_ENOUGH = {
    "no package": ({"selective_scan_cuda.py": ""}, ["isn't installed", "etmamba-timm[cuda]"]),
    "no kernel": (WITH_SCAN, ["without its compiled kernel", "MAMBA_KEEP_CUDA_BUILD=TRUE pip install"]),
    "kernel for another torch": (
        WITH_SCAN | {"selective_scan_cuda.py": "raise ImportError('undefined symbol: _ZN3c104cuda9SetDeviceEi')"},
        ["undefined symbol: _ZN3c104cuda9SetDeviceEi", "rebuild"],
    ),
    "kernel for another CUDA": (
        WITH_SCAN | {"selective_scan_cuda.py": "raise OSError('libcudart.so.12: cannot open shared object file')"},
        ["libcudart.so.12", "rebuild"],
    ),
    "kernel that lacks a module": (
        WITH_SCAN | {"selective_scan_cuda.py": "import missing_for_the_kernel"},
        ["No module named 'missing_for_the_kernel'", "install what it misses"],
    ),
    "package that lacks a module": (
        {"selective_scan_cuda.py": "", "mamba_ssm/__init__.py": "import missing_for_the_package"},
        ["No module named 'missing_for_the_package'", "install what it misses"],
    ),
    "package without the scan": (
        {"selective_scan_cuda.py": "", **WITH_SCAN, "mamba_ssm/ops/selective_scan_interface.py": ""},
        ["cannot import name 'selective_scan_fn'"],
    ),
}


def install(files: dict[str, str], folder: Path, monkeypatch) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "cpu")


@pytest.mark.parametrize(("files", "words"), NOT_ENOUGH.values(), ids=NOT_ENOUGH.keys())
def test_without_all_of_mamba_ssm(no_mamba, tmp_path, monkeypatch, files, words):
    install(files, tmp_path, monkeypatch)
    if "mamba_ssm/__init__.py" not in files:
        sys.modules["mamba_ssm"] = None  # hides an installed one
    if "selective_scan_cuda.py" not in files:
        sys.modules["selective_scan_cuda"] = None
    reason = cuda.why_not()
    assert all(word in reason for word in words), reason
    assert "\n" not in reason


def test_errors_that_are_no_import_errors_come_through(no_mamba, tmp_path, monkeypatch):
    install(WITH_SCAN | {"selective_scan_cuda.py": "1 / 0"}, tmp_path, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        cuda.why_not()


def test_the_probe_s_answer_is_kept(no_mamba, tmp_path, monkeypatch):
    install(WITH_SCAN | {"selective_scan_cuda.py": ""}, tmp_path, monkeypatch)
    assert cuda.why_not() is None
    sys.modules["selective_scan_cuda"] = None
    assert cuda.why_not() is None


def test_importing_the_package_leaves_mamba_ssm_alone(tmp_path):
    (tmp_path / "mamba_ssm.py").write_text("raise SystemExit('mamba_ssm was imported')")
    (tmp_path / "selective_scan_cuda.py").write_text("raise SystemExit('its kernel was imported')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    subprocess.run(
        [sys.executable, "-c", "import etmamba_timm.ops.scan.mamba_ssm"],
        env=os.environ | {"PYTHONPATH": path},
        check=True,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Whole models


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
        monkeypatch.setitem(BACKENDS, name, reference)


# One scan a block for both directions where they share the SSM, two where each has its own.
SCANS = {"etmamba_ti": 1, "etmamba_ti_ebs": 1, "videomamba_ti": 2}


@pytest.mark.parametrize(("name", "scans"), SCANS.items())
def test_models_run_on_it(mamba, monkeypatch, name, scans):
    depth = 3
    model, clip, target = make_model(name, depth)
    got = forward_and_backward(model, clip, target)
    assert standin.calls == {"fwd": scans * depth, "bwd": scans * depth}
    only_reference(monkeypatch)
    want = forward_and_backward(model, clip, target)
    assert standin.calls == {"fwd": scans * depth, "bwd": scans * depth}
    assert_close(got, want, TOLERANCE[torch.float32])


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.fixture
def gpu(monkeypatch) -> str:
    """The device, or a skip with the backend's own reason. No TF32 in convolutions, unlike by default."""
    reason = cuda.why_not()
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return "cuda"


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", GPU_TOLERANCE)
@pytest.mark.parametrize("length", [1, 13, 128, 2048, 2051])
def test_kernel_agrees_with_the_reference(gpu, dtype, length):
    for direction, options in itertools.product(DIRECTIONS, OPTIONS):
        inputs = make_inputs(options, width=32, length=length, n_state=16, dtype=dtype, device=gpu)
        dout = torch.randn(inputs["u"].shape).to(gpu, dtype)
        got = with_gradients(in_direction(direction, "mamba_ssm"), inputs, dout)
        want = with_gradients(in_direction(direction, "reference"), inputs, dout, torch.float64)
        assert_close(got, want, GPU_TOLERANCE[dtype])


@pytest.mark.cuda
@pytest.mark.parametrize("name", SCANS)
def test_models_run_on_the_kernel(gpu, monkeypatch, name):
    model, clip, target = make_model(name)
    got = forward_and_backward(model.to(gpu), clip.to(gpu), target.to(gpu))
    only_reference(monkeypatch)
    want = forward_and_backward(model.cpu().double(), clip.double(), target.double())
    assert_close(got, want, GPU_TOLERANCE[torch.float32])


@pytest.mark.cuda
@pytest.mark.parametrize("name", SCANS)
def test_models_run_under_autocast(gpu, name):
    model, clip, target = make_model(name)
    with torch.autocast("cuda", torch.bfloat16):
        got = forward_and_backward(model.to(gpu), clip.to(gpu), target.to(gpu))
    assert all(value.isfinite().all() for value in got.values())
