"""The examples: scripts learn from the few videos that they generate, frozen weights don't change; notebooks run."""

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
HEAD = {"head.weight", "head.bias"}
LINEAR = tuple(
    f"{layer}.weight" for layer in ("in_proj", "pw", "x_proj", "dt_proj", "out_proj", "local.proj", "fusion")
)


@pytest.mark.parametrize("name", NEEDS)
def test_example_learns(tmp_path, name):
    runs = {out: start(name, tmp_path, out, *more) for out, more in (("all", []), ("head", ["--freeze"]))}
    for out, run in runs.items():  # side by side
        changed, before = learned(run, tmp_path / out)
        assert changed == HEAD if out == "head" else changed >= HEAD | {k for k in before if "in_proj" in k}


def test_adapters_learn_on_every_linear_layer(tmp_path):
    """And nothing else changes but the head; merged, the weights have the model's own names."""
    changed, before = learned(start("peft_lora", tmp_path, "merged"), tmp_path / "merged")
    linear = {k for k in before if k.endswith(LINEAR)}
    assert len(linear) == 2 * len(LINEAR)
    assert changed == HEAD | linear


def start(name: str, folder: Path, out: str, *more: str) -> subprocess.Popen:
    if importlib.util.find_spec((NEEDS | {"peft_lora": "peft"})[name]) is None:
        pytest.skip(f"{name}.py needs a package that isn't installed")
    options = ["--model-kwargs", *(f"{k}={v}" for k, v in TINY.items()), "--frames", str(FRAMES), "--size", str(SIZE)]
    options += ["--epochs", str(EPOCHS), "--output", out, *more]
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *options],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def learned(run: subprocess.Popen, folder: Path) -> tuple[set[str], dict[str, torch.Tensor]]:
    """Which weights changed, and those that it started from."""
    stdout, stderr = run.communicate()
    assert run.returncode == 0, stderr
    losses = [float(loss) for loss in re.findall(r"^epoch \d+: loss (\S+)", stdout, re.M)]
    assert len(losses) == EPOCHS
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    accuracy = float(re.search(r"accuracy on the training clips: (\S+)", stdout)[1])
    assert accuracy >= 0.5  # of 4 classes
    torch.manual_seed(0)  # as the examples begin
    shape = {"num_frames": FRAMES, "img_size": SIZE, "global_pool": "avg"}
    before = timm.create_model("etmamba_ti", num_classes=4, **shape, **TINY).state_dict()
    after = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    return {k for k, v in after.items() if not torch.equal(v, before[k])}, before


def test_probe_on_features(tmp_path):
    pytest.importorskip("sklearn")
    command = [sys.executable, str(EXAMPLES / "sklearn_probe.py")]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert float(re.search(r"accuracy on videos left out: (\S+) of 4 classes", run.stdout)[1]) >= 0.75


@pytest.mark.parametrize(("name", "least"), [("classify", r"(\d+) of 20 right"), ("finetune", r"'top1': ([\d.]+)")])
def test_notebook(name, least, monkeypatch):
    """It runs without an error, gets most of its videos right, and holds no output of another run."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    outputs = [output for cell in code for output in cell.outputs]
    text = "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs)
    found = re.search(least, text)
    assert found, text
    assert float(found[1]) >= {"classify": 17, "finetune": 0.5}[name], text
