"""The mamba-ssm backend: mamba-ssm's real Python over the stand-in for its compiled kernel."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import selective_scan_cuda_standin as standin
import torch
from mamba_ssm_cases import (
    DIRECTIONS,
    OPTIONS,
    SCANS,
    TOLERANCE,
    assert_close,
    forward_and_backward,
    in_direction,
    make_inputs,
    make_model,
    only_reference,
    strided,
    with_gradients,
)
from torch import Tensor

from etmamba_timm.ops import scan_backends, selective_scan
from etmamba_timm.ops.scan import mamba_ssm, reference
from etmamba_timm.ops.scan.backend import ScanInputs

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
    got, got_state = mamba_ssm.scan(ScanInputs(**inputs), reverse_from)
    want, want_state = reference.scan(ScanInputs(**inputs), reverse_from)
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
    mamba_ssm.scan(ScanInputs(**inputs), reverse_from)
    u, delta, _, B, C, D, z, delta_bias, _ = seen
    assert all(t.is_contiguous() for t in (u, delta, B, C, D, z, delta_bias))


def test_scan_copies_nothing_that_is_in_order(mamba, monkeypatch):
    seen = []
    monkeypatch.setattr(standin, "fwd", lambda *args, fwd=standin.fwd: seen.extend(args) or fwd(*args))
    inputs = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in make_inputs(OPTIONS[0]).items()}
    mamba_ssm.scan(ScanInputs(**inputs), 2)
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
    compiled = torch.compile(lambda u, **rest: mamba_ssm.scan(ScanInputs(u * 2, **rest), 1)[0] + 1, backend="eager")
    u = inputs.pop("u").requires_grad_()
    got = compiled(u, **inputs)
    want = mamba_ssm.scan(ScanInputs(u * 2, **inputs), 1)[0] + 1
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), u)[0] for t in (got, want)))


# ---------------------------------------------------------------------------------------------------------------------
# Why not


def test_rejects_what_the_kernel_has_not():
    def rejects(width: int = 4, n_state: int = 2, dtype: torch.dtype = torch.float32) -> str | None:
        u = torch.empty(1, width, 3, device="meta", dtype=dtype)
        A = torch.empty(width, n_state, device="meta", dtype=torch.promote_types(dtype, torch.float32))
        B = torch.empty(1, n_state, 3, device="meta", dtype=dtype)
        return row.rejects(ScanInputs(u, u, A, B, B))

    row = mamba_ssm.BACKEND
    assert "on meta; move them to a cuda device" in rejects()
    row = replace(row, devices=("meta",))
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
    assert "no CUDA device" in mamba_ssm.why_not()
    assert scan_backends()["mamba_ssm"] == mamba_ssm.why_not()
    with pytest.raises(RuntimeError, match="no CUDA device"):
        selective_scan(**make_inputs(OPTIONS[0]), backend="mamba_ssm")
    assert not {"mamba_ssm", "selective_scan_cuda"} & sys.modules.keys()


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(("files", "words"), NOT_ENOUGH.values(), ids=NOT_ENOUGH.keys())
def test_without_all_of_mamba_ssm(no_mamba, tmp_path, monkeypatch, files, words):
    install(files, tmp_path, monkeypatch)
    if "mamba_ssm/__init__.py" not in files:
        sys.modules["mamba_ssm"] = None  # hides an installed one
    if "selective_scan_cuda.py" not in files:
        sys.modules["selective_scan_cuda"] = None
    reason = mamba_ssm.why_not()
    assert all(word in reason for word in words), reason
    assert "\n" not in reason


def test_errors_that_are_no_import_errors_come_through(no_mamba, tmp_path, monkeypatch):
    install(WITH_SCAN | {"selective_scan_cuda.py": "1 / 0"}, tmp_path, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        mamba_ssm.why_not()


def test_the_probe_s_answer_is_kept(no_mamba, tmp_path, monkeypatch):
    install(WITH_SCAN | {"selective_scan_cuda.py": ""}, tmp_path, monkeypatch)
    assert mamba_ssm.why_not() is None
    sys.modules["selective_scan_cuda"] = None
    assert mamba_ssm.why_not() is None


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
