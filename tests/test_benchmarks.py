"""benchmarks/gpu.py, rehearsed on the CPU: everything but the clock is the same on a GPU."""

import csv
import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from etmamba_timm.data import find_layout, read_dataset, read_frames
from etmamba_timm.ops.kernels import build_gpu, load_cpu

FOLDER = Path(__file__).parents[1] / "benchmarks"
PARTS = {"copies", "scan", "convolutions", "models", "training", "replayed", "profile", "compiled"}


@pytest.fixture
def load(monkeypatch):
    """Imports a file of the folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def bench(load):
    return lambda minutes: load("gpu_bench").Bench(torch.device("cpu"), tiny=True, minutes=minutes)


def run(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FOLDER / "gpu.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(load_cpu.why_not() is not None, reason="the CPU kernels can't run")
def test_rehearsal(tmp_path):
    file = tmp_path / "gpu.csv"
    done = run("--device", "cpu", "--tiny", "--check", "--out", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    assert "WRONG" not in done.stdout
    rows = list(csv.DictReader(file.open()))
    assert {row["part"] for row in rows} == PARTS
    assert all("rehearsal, not measured on a GPU" in row["note"] for row in rows)
    assert all(float(row["ms"]) > 0 for row in rows if row["part"] != "profile")  # some operators take no time
    floors = {row["floor_of"] for row in rows if row["part"] in ("scan", "convolutions")}
    assert floors <= {"bytes", "exponentials"}
    twins = [row for row in rows if row["what"].endswith("plain twin")]
    assert len(twins) == 14  # two passes of the scan, and of three others in two dtypes
    assert all(row["ratio"] for row in twins)
    if importlib.util.find_spec("transformers"):
        compared = [row for row in rows if row["part"] == "models" and not row["what"].startswith("VideoMAE-B")]
        assert {row["ratio_to"] for row in compared} == {"VideoMAE-B (transformers)"}


def test_no_gpu_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = run()
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr


def test_tasks_run_by_rank_and_failures_stop_nothing(load, bench):
    task, ran = load("gpu_bench").Task, []
    made = bench(1)
    made.run(
        [
            ("b", task(2, "later", lambda: ran.append("later"))),
            ("a", task(1, "broken", lambda: [].pop())),
            ("a", task(0, "first", lambda: ran.append("first"))),
        ]
    )
    assert ran == ["first", "later"]
    assert [failure.partition(":")[0] for failure in made.failed] == ["broken"]
    assert not made.left_out


def test_time_budget(load, bench):
    """A task without end is broken off, one that would take too long isn't begun, and the rest is left out."""
    task = load("gpu_bench").Task

    def endless():
        while True:
            time.sleep(0.01)

    made = bench(0.05)
    start = time.monotonic()
    long = task(0, "long", lambda: made.time(lambda: time.sleep(1)))
    made.run([("a", long), ("a", task(1, "endless", endless)), ("a", task(2, "last", lambda: None))])
    assert time.monotonic() - start < 6
    assert [line.partition(":")[0] for line in made.left_out] == ["long", "endless", "last"]
    assert not made.failed


def test_ratios_and_floors(bench):
    made = bench(1)
    made.record("slow", "8×16", "float32", ("fast", "8×16", "bfloat16"), ms=3.0, floor_ms=1.5)
    made.record("fast", "8×16", "bfloat16", ms=2.0)
    slow, fast = made.results()
    assert (slow["ratio"], slow["ratio_to"], slow["times_floor"]) == (1.5, "fast, bfloat16", 2.0)
    assert fast["ratio"] == ""


def test_segments_are_compared_with_those_chosen(load, bench, monkeypatch):
    """With a scan that sleeps longer the further its number of segments is from 4."""
    operators = load("gpu_operators")
    gpu = ModuleType("etmamba_timm.ops.scan.gpu")
    gpu.segments = lambda: 8
    monkeypatch.setitem(sys.modules, gpu.__name__, gpu)

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            time.sleep(0.002 * (1 + abs(gpu.segments() - 4)))
            return x.clone()

        backward = forward

    plain = operators.Operator(Scan.apply, Scan.apply, [torch.ones(2)], 1)
    monkeypatch.setattr(operators, "_full_scan", lambda *_: plain)
    made = bench(1)
    [task] = operators.segment_tasks(made)
    made.run([("segments", task)])
    rows = list(made.results())
    assert [row["case"] for row in rows] == ["2×32, forward", "2×32, backward"]
    for row in rows:
        assert row["note"].startswith("chosen: 8, best: 4;")
        assert row["times_floor"] > 2
    assert gpu.segments() == 8


def test_kinds_of_kernels(load):
    """Our own as the sources name them; others by names of the form that PyTorch's and NVIDIA's kernels have."""
    kind_of = load("gpu_models").kind_of
    files = {
        "short_conv": "short convolution",
        "scan": "scan",
        "local_conv": "local branch",
        "conv_norm_relu": "STFP",
        "norm": "norms",
    }
    for source in build_gpu.SOURCES.glob("*.cu"):
        kernels = re.findall(r"^KERNEL\((\w+)", source.read_text(), re.MULTILINE)
        kind = next(kind for name, kind in files.items() if source.stem.startswith(name))
        assert kernels
        assert {kind_of(name) for name in kernels} == {kind}, source
    for name, kind in {
        "void selective_scan_fwd_kernel<Selective_Scan_fwd_kernel_traits<128, 16, 1, false, true> >": "scan",
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT": "products",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "products",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_64x64_64x6_tn_align8>": "products",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": "products",
        "void at::native::conv_depthwise2d_forward_kernel<5, c10::BFloat16>": "other convolutions",
        "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc": "other convolutions",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>": "norms",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2u>, 3, 64>": "copies and joins",
        "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>": "copies and joins",
        "Memcpy DtoD (Device -> Device)": "copies and joins",
        "void at::native::vectorized_elementwise_kernel<8, CUDAFunctor_add<float> >": "elementwise",
        "void at::native::reduce_kernel<512, 1, ReduceOp<float> >": "other",
    }.items():
        assert kind_of(name) == kind, name


def test_generated_clips_are_a_dataset(load, tmp_path):
    """Drawn anew from the seed, with a class for each motion; those of one class differ."""
    finetune = load("finetune")
    first, again, other = (
        finetune.write_clips(tmp_path / name, 2, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    videos = read_dataset(find_layout(first), first)
    assert videos.classes == list(finetune.KINDS)
    assert len(videos.samples) == 2 * len(finetune.KINDS)
    for path, _ in videos.samples:
        frames, same, different = (
            read_frames(root / path.relative_to(first), range(24)).float() for root in (first, again, other)
        )
        assert (frames - same).abs().mean() < 2  # the encoder isn't the same to the bit each time
        assert (frames - different).abs().mean() > 10
        assert (frames.std(0) > 20).any()  # something moves
