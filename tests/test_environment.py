"""What a bug report needs."""

import os
import subprocess
import sys

import torch

import etmamba_timm
from etmamba_timm.cli import main
from etmamba_timm.environment import environment
from etmamba_timm.ops import scan_backends


def test_it_says_what_a_maintainer_needs(monkeypatch, tmp_path):
    backends = scan_backends()  # before the cache is another, for which kernels would be compiled
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("ETMAMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@hub.example/api")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = environment()
    assert found["etmamba_timm"].startswith(etmamba_timm.__version__)
    assert torch.__version__ in found["torch"]
    for name, reason in backends.items():
        assert found[f"scan {name}"] == (reason or "ready")
    assert found["kernels' cache"] == f"~{os.sep}cache, 0 files"
    assert all(name in found["packages"] for name in ("timm ", "torchvision ", "mamba-ssm "))
    assert "pytest" not in found["packages"]
    assert (found["$OMP_NUM_THREADS"], found["$ETMAMBA_CACHE"]) == ("3", f"~{os.sep}cache")
    assert (found["$HF_TOKEN"], found["$HF_ENDPOINT"]) == ("(set)", "https://hub.example/api")
    assert not any("secret" in value or str(tmp_path) in value or "\n" in value for value in found.values())


def test_the_command(capsys):
    assert main(["info", "--environment"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"etmamba_timm: {etmamba_timm.__version__}, from ")
    assert all(": " in line for line in lines)


def test_without_pytorch(tmp_path):
    code = "import sys, etmamba_command; sys.modules['torch'] = None; sys.argv[1:] = ['info', '--environment']\n"
    code += "sys.exit(etmamba_command.main())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "torch: can't be imported: ModuleNotFoundError: " in done.stdout
