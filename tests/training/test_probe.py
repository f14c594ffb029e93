"""A linear probe on real encoded files: it learns, its head alone is new, and the model gives its accuracy again."""

import json

import pytest
import timm
import torch
from shapes import write_shapes

from etmamba_timm.cli import main
from etmamba_timm.training.evaluate import Scores
from etmamba_timm.training.probe import _fit

MODEL = ("model=etmamba_ti.mocap", "num_frames=8", "stride=1", "size=64", "precision=no", "num_crops=1", "num_clips=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_shapes(root / "train", 20, seed=0, num_frames=8, side=64)
    write_shapes(root / "val", 6, seed=1, num_frames=8, side=64)
    return root


def probe(data, folder, *settings, kind: tuple[str, ...] = ()) -> int:
    """`kind` is what follows `--probe`; without, it is linear."""
    arguments = ["train", "--data", str(data), "-o", str(folder), "--workers", "0", "--probe", *kind]
    return main([*arguments, "--dataset", "folders", "--set", *MODEL, "batch_size=4", *settings])


def test_a_probe(data, tmp_path, capsys):
    assert probe(data, tmp_path / "run") == 0
    told = capsys.readouterr().out
    scores = Scores.load(tmp_path / "run" / "scores.safetensors")
    assert scores.topk(1) >= 0.75  # of 4 classes, 24 videos
    assert f"top-1 {scores.topk(1):.2%}" in told
    before = timm.create_model("etmamba_ti.mocap", pretrained=True).state_dict()
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True)
    after = model.state_dict()
    assert {k for k, v in after.items() if not torch.equal(v, before[k])} == {"head.weight", "head.bias"}
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert "a linear probe on the features of the weights of etmamba_ti.mocap on 80 videos" in config["card"]["source"]
    assert main(["eval", "--model", f"local-dir:{tmp_path / 'run' / 'model'}", "--data", str(data)]) == 0
    assert f"top-1 {scores.topk(1):.2%}" in capsys.readouterr().out
    assert probe(data, tmp_path / "run") == 2
    assert "choose a new or empty folder" in capsys.readouterr().err


def test_an_attentive_probe(data, tmp_path, capsys):
    settings = ("epochs=5", "epoch_updates=0", "repeat=2")
    assert probe(data, tmp_path / "run", *settings, "--teacher", "etmamba_ti.mocap", kind=("attentive",)) == 2
    assert "lacks 4 of 4 classes" in capsys.readouterr().err  # training takes one, a linear probe doesn't
    assert probe(data, tmp_path / "run", "--teacher", "etmamba_ti.mocap") == 2
    assert "a linear probe learns the true labels alone" in capsys.readouterr().err
    assert probe(data, tmp_path / "attentive", *settings, kind=("attentive",)) == 0
    told = capsys.readouterr().out
    assert "M are trained" in told
    scores = Scores.load(tmp_path / "attentive" / "scores.safetensors")
    assert scores.topk(1) >= 0.75  # of 4 classes, 24 videos
    before = timm.create_model("etmamba_ti.mocap", pretrained=True).state_dict()
    name = f"local-dir:{tmp_path / 'attentive' / 'model'}"
    after = timm.create_model(name, pretrained=True).state_dict()
    changed = {k.partition(".")[0] for k, v in after.items() if k not in before or not torch.equal(v, before[k])}
    assert changed == {"attn_pool", "head"}
    assert main(["eval", "--model", name, "--data", str(data)]) == 0
    assert f"top-1 {scores.topk(1):.2%}" in capsys.readouterr().out
    assert main(["predict", str(next((data / "val" / "up").iterdir())), "--model", name]) == 0
    assert probe(data, tmp_path / "attentive", *settings, kind=("attentive",)) == 0  # finished


def test_a_probe_of_a_random_model_is_refused(data, tmp_path, capsys):
    assert probe(data, tmp_path / "run", "pretrained=false") == 2
    assert "a probe needs a trained model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_logistic_regression_is_scikit_learns():
    """Its C is one over our penalty and the number of rows, with weights one each."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    x = torch.randn(60, 5, dtype=torch.float64)
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    expected = linear_model.LogisticRegression(C=1 / (0.1 * 60), tol=1e-10, max_iter=1000).fit(
        x.numpy(), labels.numpy()
    )
    weight, _ = _fit(x, labels, torch.full((60,), 1 / 60, dtype=torch.float64), 3, 0.1)
    torch.testing.assert_close(weight, torch.from_numpy(expected.coef_), rtol=0, atol=1e-4)
