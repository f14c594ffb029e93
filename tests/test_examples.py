"""The examples, run as scripts on the few videos that they generate: they learn, and frozen weights don't change."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import etmamba_timm  # noqa: F401 (registers the models)

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"pytorch_loop": "torch", "transformers_trainer": "transformers", "lightning_module": "lightning"}
TINY = {"depth": 2, "embed_dim": 96}
FRAMES, SIZE, EPOCHS = 6, 32, 25


@pytest.mark.parametrize("name", NEEDS)
def test_example_learns(tmp_path, name):
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs the package {NEEDS[name]}")
    options = ["--model-kwargs", *(f"{k}={v}" for k, v in TINY.items()), "--frames", str(FRAMES), "--size", str(SIZE)]
    options += ["--epochs", str(EPOCHS), "--output"]
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *options]
    runs = {}
    for out, more in (("all", []), ("head", ["--freeze"])):  # side by side
        runs[out] = subprocess.Popen(
            [*command, out, *more],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    torch.manual_seed(0)  # as the examples begin
    shape = {"num_frames": FRAMES, "img_size": SIZE, "global_pool": "avg"}
    start = timm.create_model("etmamba_ti", num_classes=4, **shape, **TINY).state_dict()
    head = {"head.weight", "head.bias"}
    for out, run in runs.items():
        stdout, stderr = run.communicate()
        assert run.returncode == 0, stderr
        losses = [float(loss) for loss in re.findall(r"^epoch \d+: loss (\S+)", stdout, re.M)]
        assert len(losses) == EPOCHS
        assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
        accuracy = float(re.search(r"accuracy on the training clips: (\S+)", stdout)[1])
        assert accuracy >= 0.5  # of 4 classes
        trained = timm.create_model(f"local-dir:{tmp_path / out}", pretrained=True).state_dict()
        changed = {k for k, v in trained.items() if not torch.equal(v, start[k])}
        assert changed == head if out == "head" else changed >= head | {k for k in start if "in_proj" in k}
