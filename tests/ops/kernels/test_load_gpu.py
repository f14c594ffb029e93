"""Loading and launching GPU kernels: cuda.bindings' real calls, on a stand-in driver that runs emulated kernels."""

import importlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from emulated import COMPILER, EmulatedModule, emulate, needs_emulation

from etmamba_timm.ops import short_conv
from etmamba_timm.ops.kernels import load_gpu

HERE = Path(__file__).parent
SHORT_CONV = importlib.import_module("etmamba_timm.ops.short_conv")
SCRIPT = """
import importlib, sys, threading, torch
import emulated
from etmamba_timm.ops import short_conv
from etmamba_timm.ops.kernels import build_gpu, choice, load_gpu

def compile_gpu(source, defines, capability):
    print("compiled for", capability)
    return emulated.compile_emulated(source, defines)._name.encode() + b"\\0"

torch.cuda.get_device_capability = lambda device: (9, 0)
torch._C._cuda_getCurrentRawStream = lambda device: 77
build_gpu.compile_gpu = compile_gpu
device = torch.device("cuda", 0)
load_gpu.DEVICES, choice.gpu_why_not, load_gpu.processors = ("cpu",), lambda device: None, lambda device: 4
load_gpu.module = lambda source, like, **defines: load_gpu._module(source, tuple(defines.items()), device)

x, weight = torch.randn(2, 3, 40, 8, requires_grad=True), torch.randn(8, 1, 4)
plain = importlib.import_module("etmamba_timm.ops.short_conv")._plain

def agrees(out):
    got, want = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, plain(x, weight, None, False)))
    print("agrees", torch.allclose(got, want, atol=1e-4))

def in_a_thread(function):  # the driver's context is a thread's own
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()

out = short_conv(x, weight)
in_a_thread(lambda: agrees(out))  # as PyTorch's backward passes are
agrees(short_conv(x, weight))
in_a_thread(lambda: agrees(short_conv(x, weight)))
module = load_gpu.module("short_conv.cu", x, DTYPE=0, ALIGNED=1, TAPS=4)
try:
    module.launch("no_such_kernel", (1, 1, 1), None)
except RuntimeError as error:
    print(error)
"""


def run(script: str, folder: Path, **env: str) -> list[str]:
    paths = [str(HERE.parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LD_LIBRARY_PATH": str(folder), **env}
    environment["PYTHONWARNINGS"] = "ignore::UserWarning"  # PyTorch's, of a driver that can next to nothing
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="the stand-in is a Linux library")
def test_the_drivers_calls(tmp_path):
    """Configuration, launches forward and backward, PyTorch's stream, another thread, and an error."""
    pytest.importorskip("cuda.bindings")
    library = tmp_path / "libcuda.so.1"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, HERE / "driver_standin.cpp", "-ldl"], check=True)
    lines = run(SCRIPT, tmp_path, DRIVER_LOG="1")
    launches = [
        f"{threads} threads, {shared} bytes, stream 0x4d" for threads, shared in ((128, 0), (128, 10240), (256, 1024))
    ]
    assert lines == [
        "compiled for (9, 0)",
        *[*launches, "agrees True"] * 3,  # forward, backward and its sums
        "the CUDA driver says CUDA_ERROR_NOT_FOUND",
    ]


def test_why_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no CUDA device" in load_gpu.why_not()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "AMD" in load_gpu.why_not()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(load_gpu.build_gpu, "why_not", lambda: None)
    assert load_gpu.why_not() is None
    for capability, reason in (((9, 0), None), ((7, 5), "the device has compute capability 7.5; the kernels need 8.0")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        load_gpu.why_not_on.cache_clear()
        found = load_gpu.why_not_on(torch.device("cuda", 0))
        assert found == reason or found.startswith(reason)
    load_gpu.why_not_on.cache_clear()


@needs_emulation
def test_plans_are_made_once_for_each_layout(monkeypatch):
    """The same plan for other data, also by several threads at once; another one for other strides or addresses."""
    emulate(monkeypatch)
    monkeypatch.setattr(load_gpu, "MOST_PLANS", 4)
    weight, lock, launch = torch.randn(8, 1, 4), threading.Lock(), EmulatedModule.launch

    def launch_alone(self: EmulatedModule, *args: object) -> None:  # the emulation takes one kernel at a time
        with lock:
            launch(self, *args)

    monkeypatch.setattr(EmulatedModule, "launch", launch_alone)

    def agrees(x: torch.Tensor) -> bool:
        return torch.allclose(short_conv(x, weight), SHORT_CONV._plain(x, weight, None, False), atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(agrees, torch.randn(40, 3, 50, 8)))
    assert len(load_gpu.PLANS) == 1
    assert agrees(torch.randn(3, 50, 12)[..., 4:])  # other strides
    assert agrees(torch.randn(3, 50, 12)[..., 3:11])  # not aligned
    assert len(load_gpu.PLANS) == 3
    for length in range(1, 11):
        assert agrees(torch.randn(3, length, 8))
        assert len(load_gpu.PLANS) <= 4


def test_in_quads():
    x = torch.zeros(2, 3, 8, dtype=torch.bfloat16)
    assert load_gpu.in_quads(x)
    assert load_gpu.in_quads(x[..., 4:])
    assert not load_gpu.in_quads(x[..., 2:6])  # its address isn't a multiple of four elements
    assert not load_gpu.in_quads(x[..., :6])  # nor is its width
    assert not load_gpu.in_quads(x.mT)
    assert not load_gpu.in_quads(torch.zeros(3, 6)[:, :4])  # nor its stride
