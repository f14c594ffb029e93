"""Compiling for GPUs: NVRTC itself, which needs no device, and the cache."""

import logging
import re
import sys

import pytest

from etmamba_timm.ops.kernels import build_gpu
from etmamba_timm.ops.kernels.cache import BuildError

SHORT_CONV = ("short_conv.cu", {"DTYPE": 1, "ALIGNED": 1, "TAPS": 4})

needs_nvrtc = pytest.mark.skipif(build_gpu.why_not() is not None, reason=str(build_gpu.why_not()))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ETMAMBA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@needs_nvrtc
def test_compiles_once_for_each_architecture_and_set_of_macros(cache, caplog):
    caplog.set_level(logging.DEBUG, "etmamba_timm")
    source, defines = SHORT_CONV
    variants = [(defines, (8, 0)), (defines, (9, 0)), (defines | {"TAPS": 3}, (9, 0))]
    made = [build_gpu.compile_gpu(source, *variant) for variant in variants]
    assert all(code.startswith(b"\x7fELF") for code in made)
    assert len(set(made)) == len(variants)
    assert [record.levelname for record in caplog.records] == ["INFO", *["DEBUG"] * len(variants)]
    assert f"they are kept in {cache}" in caplog.text
    assert [build_gpu.compile_gpu(source, *variant) for variant in variants] == made  # from the cache
    assert len(caplog.records) == 1 + len(variants)
    assert [bytes([i])[0] for i in range(256)] == list(range(256))  # the compiler didn't write to Python's own objects
    assert sorted(path.name.split("-")[1] for path in cache.glob("*.cubin")) == ["sm_80", "sm_90", "sm_90"]


@needs_nvrtc
def test_a_changed_header_is_compiled_anew(cache, tmp_path, monkeypatch):
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "kernel.h").write_text("#define ANSWER 42\n")
    (folder / "answer.cu").write_text(
        '#include "kernel.h"\nextern "C" __global__ void answer(int* to) { *to = ANSWER; }\n'
    )
    monkeypatch.setattr(build_gpu, "SOURCES", folder)
    first = build_gpu.compile_gpu("answer.cu", {}, (9, 0))
    (folder / "kernel.h").write_text("#define ANSWER 43\n")
    assert build_gpu.compile_gpu("answer.cu", {}, (9, 0)) != first
    (folder / "answer.cu").write_text("__global__ void answer() { forty_two(); }\n")
    with pytest.raises(BuildError, match=r"can't compile answer\.cu: answer\.cu\(1\): error: .*forty_two"):
        build_gpu.compile_gpu("answer.cu", {}, (9, 0))


@needs_nvrtc
def test_a_damaged_file_is_compiled_anew(cache):
    code = build_gpu.compile_gpu(*SHORT_CONV, (9, 0))
    [path] = cache.glob("*.cubin")
    path.write_bytes(code[:100])
    assert build_gpu.compile_gpu(*SHORT_CONV, (9, 0)) == code


@needs_nvrtc
def test_a_device_newer_than_the_compiler_gets_ptx():
    code = build_gpu.compile_gpu(*SHORT_CONV, (99, 0))
    assert b".entry short_conv" in code
    assert code.endswith(b"\0")


@needs_nvrtc
def test_without_a_folder_each_process_compiles(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ETMAMBA_CACHE", str(tmp_path / "file" / "cache"))
    assert build_gpu.compile_gpu(*SHORT_CONV, (9, 0)).startswith(b"\x7fELF")
    [warning] = caplog.records
    assert "compiled GPU kernels aren't kept" in warning.message
    assert "set ETMAMBA_CACHE" in warning.message


@pytest.fixture
def probed_anew():
    build_gpu._nvrtc.cache_clear()
    yield
    build_gpu._nvrtc.cache_clear()


def test_without_the_bindings(monkeypatch, probed_anew):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert re.search(
        r"isn't installed \(.*cuda\.bindings.*\); pip install 'cuda-bindings==\d+\.\*'", build_gpu.why_not()
    )
    with pytest.raises(BuildError, match="cuda-bindings=="):
        build_gpu.compile_gpu(*SHORT_CONV, (9, 0))


@needs_nvrtc
def test_without_the_library(monkeypatch, probed_anew):
    from cuda.bindings import nvrtc

    def missing():
        raise RuntimeError("libnvrtc.so isn't to be found\nin any of these folders")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    message = (
        r"NVRTC doesn't load \(libnvrtc.so isn't to be found\); pip install 'nvidia-cuda-nvrtc==\d+\.\*' 'cuda-bind"
    )
    assert re.search(message, build_gpu.why_not())
