"""A backend that is added as one row: the scans, the list of backends and the warning pick it up from the table."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from etmamba_timm.ops import bidirectional_scan, scan_backends, selective_scan
from etmamba_timm.ops.scan import reference
from etmamba_timm.ops.scan.backend import Backend, ScanInputs

MODULE = sys.modules[selective_scan.__module__]
ONE = [(2, 5, 7), (5, 3), (2, 3, 7)]  # u, A and B of selective_scan
TWO = [(2, 2, 5, 7), (5, 3), (2, 2, 3, 7)]  # of bidirectional_scan


class Recorder:
    """A backend that computes what the reference does, and records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def scan(self, inputs: ScanInputs, reverse_from: int) -> tuple[Tensor, Tensor]:
        self.calls.append(("scan", tuple(inputs.u.shape), inputs.delta_softplus, reverse_from))
        return reference.scan(inputs, reverse_from)

    def both(self, inputs: ScanInputs) -> Tensor:
        self.calls.append(("both", tuple(inputs.u.shape), inputs.delta_softplus))
        forwards, backwards = (inputs.with_sequences(lambda x, i=i: x[i]) for i in range(2))
        return reference.scan(forwards, 2)[0] + reference.scan(backwards, 0)[0]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def add(monkeypatch):
    """Puts a row first in the table, and forgets what was logged."""

    def put(backend: Backend) -> None:
        monkeypatch.setattr(MODULE, "BACKENDS", {backend.name: backend, **MODULE.BACKENDS})
        monkeypatch.setattr(MODULE, "_announced", set())

    return put


def tensors(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """u, delta, A, B and C."""
    u, A, B = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return [u, torch.randn_like(u), -A.abs(), B, torch.randn_like(B)]


@pytest.mark.parametrize("backend", ["auto", "new"])
def test_it_runs_where_it_is_the_fastest(add, recorder, backend):
    add(Backend("new", recorder.scan, devices=("cpu",)))
    assert next(iter(scan_backends().items())) == ("new", None)
    args = tensors(ONE)
    for reverse, reverse_from in ((False, 2), (True, 0)):
        out = selective_scan(*args, delta_softplus=True, reverse=reverse, backend=backend)
        assert recorder.calls.pop() == ("scan", (2, 5, 7), True, reverse_from)
        assert torch.equal(out, selective_scan(*args, delta_softplus=True, reverse=reverse, backend="reference"))
    assert not recorder.calls


@pytest.mark.parametrize("backend", ["auto", "new"])
@pytest.mark.parametrize("in_one_call", [False, True])
def test_both_directions_in_one_call_or_as_one_batch(add, recorder, backend, in_one_call):
    add(Backend("new", recorder.scan, recorder.both if in_one_call else None))
    args = tensors(TWO)
    out = bidirectional_scan(*args, delta_softplus=True, backend=backend)
    assert recorder.calls == [("both", (2, 2, 5, 7), True) if in_one_call else ("scan", (4, 5, 7), True, 2)]
    torch.testing.assert_close(out, bidirectional_scan(*args, delta_softplus=True, backend="reference"))


def test_a_whole_process_may_prefer_one(add, recorder, monkeypatch):
    add(Backend("new", recorder.scan, limits=lambda inputs: "too long" if inputs.u.shape[-1] > 7 else None))
    monkeypatch.setattr(MODULE, "BACKENDS", dict(reversed(MODULE.BACKENDS.items())))  # the slowest
    selective_scan(*tensors(ONE))
    assert not recorder.calls
    monkeypatch.setattr(MODULE, "PREFERRED", "new")
    selective_scan(*tensors(ONE))
    assert len(recorder.calls) == 1
    selective_scan(*tensors([(2, 5, 8), (5, 3), (2, 3, 8)]))  # falls back
    assert len(recorder.calls) == 1
    monkeypatch.setattr(MODULE, "PREFERRED", "mamba")
    with pytest.raises(ValueError, match="the environment variable ETMAMBA_SCAN is 'mamba'; set it to reference or "):
        selective_scan(*tensors(ONE))


def test_the_environment_variable_is_read_at_import():
    code = "from etmamba_timm.ops.scan.selective_scan import PREFERRED; print(PREFERRED)"
    env = {**os.environ, "ETMAMBA_SCAN": "torch"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "torch\n", done.stderr


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"why_not": lambda: "no driver; install one"}, "no driver; install one"),
        ({"limits": lambda inputs: f"the width is {inputs.u.shape[1]}; use 4"}, "the width is 5; use 4"),
    ],
    ids=["machine", "inputs"],
)
def test_a_warning_says_why_a_faster_one_was_passed_over(add, recorder, caplog, row, reason):
    add(Backend("new", recorder.scan, devices=("cpu",), **row))
    for _ in range(2):
        selective_scan(*tensors(ONE))
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "runs on the slower backend" in record.message
    assert f"because 'new' can't run: {reason}" in record.message
    assert not recorder.calls
    with pytest.raises(RuntimeError, match=f"scan backend 'new' can't run: {reason}"):
        selective_scan(*tensors(ONE), backend="new")
    assert scan_backends()["new"] == (reason if "why_not" in row else None)


def test_a_slow_one_behind_two_faster_ones_names_both(add, recorder, caplog):
    for name in ("second", "first"):
        add(Backend(name, recorder.scan, devices=("cpu",), why_not=lambda name=name: f"{name} is missing"))
    selective_scan(*tensors(ONE))
    assert "'first' can't run: first is missing; 'second' can't run: second is missing" in caplog.text


def test_one_for_another_device_is_passed_over_silently(add, recorder, caplog):
    """Nor is the machine asked whether it could: that may take seconds."""
    asked = []
    add(Backend("new", recorder.scan, devices=("cuda",), why_not=lambda: asked.append(1)))
    caplog.set_level(logging.INFO)
    out = selective_scan(*tensors(ONE), delta_softplus=True)
    assert "'new'" not in caplog.text
    assert out.device.type == "cpu"
    assert not recorder.calls
    assert not asked
    with pytest.raises(RuntimeError, match="'new' can't run: the tensors are on cpu; move them to a cuda device"):
        selective_scan(*tensors(ONE), backend="new")


@pytest.mark.parametrize("forward_mode", [False, True])
def test_forward_mode_needs_its_derivative(add, recorder, forward_mode):
    add(Backend("new", recorder.scan, forward_mode=forward_mode))
    args = tensors(ONE)
    torch.func.jvp(lambda u: selective_scan(u, *args[1:]), (args[0],), (args[0],))
    assert len(recorder.calls) == forward_mode


def test_it_compiles(add, recorder):
    """In one graph, if the backend's own code does."""

    def scan(inputs: ScanInputs, reverse_from: int) -> tuple[Tensor, Tensor]:
        return inputs.u * reverse_from, inputs.A

    def both(inputs: ScanInputs) -> Tensor:
        return inputs.u.sum(0)

    args = tensors(TWO)
    for row, expected in ((Backend("a", scan), args[0].sum(0) * 2), (Backend("b", scan, both), args[0].sum(0))):
        add(row)
        compiled = torch.compile(lambda *args: bidirectional_scan(*args), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*args), expected)
        torch._dynamo.reset()
