"""Confusions, features, receptive fields and costs: the numbers are checked by hand, the plots are drawn."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from shapes import write_shapes
from torch import Tensor, nn

import etmamba_timm
from etmamba_timm.checkpoints.save import save_checkpoint
from etmamba_timm.cli import main
from etmamba_timm.data import Clip, EvalClips, EvalTransform, read_folders
from etmamba_timm.seeing.analyze import (
    MEASURED,
    CostRow,
    collect_features,
    confusion_matrix,
    manifest_rows,
    most_confused,
    plot_confusion,
    plot_cost,
    plot_receptive_field,
    plot_tsne,
    receptive_field,
    smallest_share,
    tsne,
)
from etmamba_timm.seeing.plots import short
from etmamba_timm.training.evaluate import Scores

SMALL = {"embed_dim": 32, "depth": 2, "num_frames": 4, "img_size": 32, "patch_size": 8}
PNG = b"\x89PNG"


def scores_of(true: list[int], taken: list[int], classes: int) -> Scores:
    probabilities = torch.eye(classes)[taken] * 0.8 + 0.1 / classes
    names = [f"class {i}" for i in range(classes)]
    return Scores(probabilities, torch.tensor(true), torch.arange(len(true)), 0, 0, names)


def test_confusions():
    scores = scores_of([0, 0, 0, 1, 1, 3], [0, 2, 2, 1, 0, 3], 4)
    assert confusion_matrix(scores).tolist() == [[1, 0, 2, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert most_confused(scores) == [("class 0", "class 2", 2 / 3, 2), ("class 1", "class 0", 0.5, 1)]
    assert most_confused(scores, 1) == most_confused(scores)[:1]


@pytest.mark.parametrize("classes", [4, 51, 400])
def test_confusions_are_drawn(classes, tmp_path):
    true = torch.randint(classes, (300,)).tolist()
    taken = [label if i % 3 else i % classes for i, label in enumerate(true)]
    plot_confusion(scores_of(true, taken, classes), tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_shapes(root / "val", 3, seed=0)
    return root


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("etmamba_ti", num_classes=4, **SMALL).eval()


def test_features_are_the_mean_over_views(model, data):
    clips = EvalClips(read_folders(data / "val"), EvalTransform((32, 32)), Clip(4, 1), num_clips=2)
    features, labels, indices = collect_features(model, clips, batch_size=3)
    assert features.shape == (12, 32)
    assert labels.tolist() == [label for _, label in clips.annotations.samples]
    assert indices.tolist() == list(range(12))
    with torch.no_grad():
        views = model.forward_head(model.forward_features(clips[5]["clip"]), pre_logits=True)
    torch.testing.assert_close(features[5], views.mean(0), rtol=1e-4, atol=1e-5)


def test_tsne_keeps_clusters_apart(tmp_path):
    features = torch.cat([torch.randn(12, 8) + 30 * torch.eye(8)[i] for i in range(3)])
    labels = torch.arange(3).repeat_interleave(12)
    points = tsne(features)
    nearest = torch.cdist(points, points).fill_diagonal_(float("inf")).argmin(1)
    assert torch.equal(labels[nearest], labels)
    assert torch.equal(tsne(features), points)
    plot_tsne(features, labels, ["a", "b", "c"], tmp_path / "t.png", num_classes=2)
    assert (tmp_path / "t.png").read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match="3 videos: too few"):
        tsne(features[:3])


def conv(kernel: tuple[int, int, int], dilation: int = 1) -> nn.Module:
    layer = nn.Conv3d(2, 3, kernel, padding="same", dilation=dilation)
    nn.init.constant_(layer.weight, 1.0)
    return layer


@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3, 3), 1), ((1, 5, 3), 1), ((3, 3, 1), 2)])
def test_a_known_field_is_that_field(kernel, dilation):
    field = receptive_field(conv(kernel, dilation), torch.randn(2, 2, 7, 11, 9))
    expected = torch.zeros(7, 11, 9)
    reach = [[dilation * (j - k // 2) for j in range(k)] for k in kernel]
    for a in reach[0]:
        for b in reach[1]:
            for c in reach[2]:
                expected[3 + a, 5 + b, 4 + c] = 1
    torch.testing.assert_close(field, expected / expected.sum())


def test_two_layers_reach_further_and_weigh_as_they_meet():
    field = receptive_field(nn.Sequential(conv((1, 3, 1)), nn.Conv3d(3, 1, (1, 3, 1), padding="same")), ones())
    assert field.nonzero()[:, 1].tolist() == [3, 4, 5, 6, 7]


def ones() -> Tensor:
    return torch.ones(1, 2, 1, 11, 1)


@pytest.mark.parametrize("name", ["etmamba_ti", "videomamba_ti"])
def test_fields_of_our_models(name, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **SMALL).train()
    clips = torch.randn(2, 3, 4, 32, 32)
    field = receptive_field(model, clips)
    assert model.training
    assert field.shape == (4, 32, 32)
    assert field.sum().item() == pytest.approx(1, rel=1e-5)
    patches = field.unflatten(2, (4, 8)).unflatten(1, (4, 8)).sum((2, 4))  # [4 frames, 4 rows, 4 columns]
    assert patches.argmax() == (2 * 4 + 2) * 4 + 2  # the central one
    assert (field > 0).all()  # the scan goes both ways
    assert not torch.equal(receptive_field(model, clips, "token"), field)
    plot_receptive_field(field, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(PNG)


def test_what_has_no_field(model):
    with pytest.raises(ValueError, match="choose 'centre'"):
        receptive_field(model, torch.randn(1, 3, 4, 32, 32), "corner")
    with pytest.raises(ValueError, match="give one or more"):
        receptive_field(model, torch.randn(3, 4, 32, 32))
    with pytest.raises(ValueError, match="zero or not finite"):
        receptive_field(lambda clip: clip * 0, torch.randn(1, 3, 4, 32, 32))
    with pytest.raises(ValueError, match="it must be a map"):
        receptive_field(lambda clip: clip.flatten(1), torch.randn(1, 3, 4, 32, 32))


def test_smallest_share():
    assert smallest_share(torch.tensor([[[4.0, 3.0], [2.0, 1.0]]]), 0.5) == 0.5
    assert smallest_share(torch.tensor([[[10.0, 0.0], [0.0, 0.0]]]), 0.9) == 0.25


def test_costs(tmp_path):
    rows = manifest_rows()
    assert {row.source for row in rows} == {"reported by OpenGVLab/VideoMamba"}
    row = next(row for row in rows if row.name == "videomamba_m.k400_f8")
    model = timm.create_model("videomamba_m", device="meta", num_classes=400, num_frames=8)
    assert row.params == sum(p.numel() for p in model.parameters())
    assert row.macs == etmamba_timm.models.count_cost(model).total_macs * 12
    plot_cost([*rows, CostRow("ours", 8_000_000, 10**11, 50.0, MEASURED)], tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match="the manifest has no top-1 on 'UCF'; choose one of Breakfast"):
        manifest_rows("UCF")
    with pytest.raises(ValueError, match="must have a source"):
        plot_cost([CostRow("x", 1, 1, 50.0, " ")], tmp_path / "x.png")


def test_plots_go_where_they_can(tmp_path):
    scores = scores_of([0, 1], [0, 1], 2)
    with pytest.raises(ValueError, match="plots are written as .png, .pdf or .svg"):
        plot_confusion(scores, tmp_path / "c.jpg")
    with pytest.raises(ValueError, match="no such folder; create it first"):
        plot_confusion(scores, tmp_path / "no" / "c.png")
    for suffix in ("pdf", "svg"):
        plot_confusion(scores, tmp_path / f"c.{suffix}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pdf", "c.svg"]


def test_long_names_lose_their_middle():
    names = [f"Pushing something from {a} to {b}" for a, b in (("left", "right"), ("right", "left"))]
    assert [short(name) for name in names] == ["Pushing someth…left to right", "Pushing someth…right to left"]
    assert short(names[0], 40) == names[0]


def test_the_commands(model, data, tmp_path, capsys):
    save_checkpoint(model, tmp_path / "m", label_names=["down", "left", "right", "up"], stride=1)
    save_checkpoint(model, tmp_path / "other", label_names=list("abcd"))  # features don't need the dataset's classes
    source = ["--model", f"local-dir:{tmp_path / 'm'}"]
    dataset = ["--data", str(data), "--workers", "0"]
    assert main(["eval", *source, *dataset, "--scores", str(tmp_path / "s.safetensors")]) == 0
    capsys.readouterr()
    files = [str(path) for path in sorted((data / "val" / "up").iterdir())]
    for name, arguments in {
        "confusion": [str(tmp_path / "s.safetensors")],
        "tsne": ["--model", f"local-dir:{tmp_path / 'other'}", *dataset],
        "erf": [*files, *source],
        "cost": [],
    }.items():
        assert main(["analyze", name, *arguments, "-o", str(tmp_path / f"{name}.png")]) == 0
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    told = capsys.readouterr().out
    assert " predicted as " in told
    assert "of the pixels of 4 frames" in told
    save_file({"x": torch.zeros(1)}, tmp_path / "no.safetensors")
    assert main(["analyze", "confusion", str(tmp_path / "no.safetensors"), "-o", str(tmp_path / "x.png")]) == 2
    assert "holds no scores" in capsys.readouterr().err
    arguments = [*files, *source, "--dtype", "bfloat16", "-o", str(tmp_path / "x.png")]
    assert main(["analyze", "erf", *arguments]) == 2
    assert "computed in float32" in capsys.readouterr().err
    table = tmp_path / "rows.csv"
    table.write_text("name,params,macs,top1,source\na,1000,2000,50,measured here\nb,1,x,2,the paper\n")
    assert main(["analyze", "cost", "--rows", str(table), "-o", str(tmp_path / "x.png")]) == 2
    assert "rows.csv, line 3" in capsys.readouterr().err
    table.write_text("name,params,macs,top1,source\na,1000,2000,50\n")
    assert main(["analyze", "cost", "--rows", str(table), "-o", str(tmp_path / "x.png")]) == 2
    assert "rows.csv, line 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("blocked", "arguments"), [("matplotlib", ["cost"]), ("sklearn", ["tsne", "--model", "x", "--data", "x"])]
)
def test_without_the_extra(blocked, arguments, tmp_path):
    code = (
        f"import sys; sys.modules[{blocked!r}] = None; from etmamba_timm.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "analyze", *arguments, "-o", str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"{blocked} isn't installed; pip install 'etmamba-timm[analyze]'" in done.stderr
