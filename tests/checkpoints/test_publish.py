"""`etmamba publish`: what is checked, what the card says, and the upload to a server on loopback."""

import hashlib
import json
import subprocess
import sys

import pytest
import timm
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from etmamba_timm.checkpoints import CheckpointError
from etmamba_timm.checkpoints.publish import check_folder
from etmamba_timm.checkpoints.save import save_checkpoint
from etmamba_timm.cli import main

SMALL = {"img_size": 32, "num_frames": 2, "embed_dim": 16, "depth": 2, "num_classes": 3}
FIGURE = {
    "dataset": "mocap",
    "metric": "top-1",
    "value": 91.5,
    "views": {"frames": 2, "crops": 3, "clips": 4},
    "whose": "ours",
}
CARD = {"licence": "Apache-2.0", "recipe": {"epochs": 30, "rate": "3e-4"}, "figures": [FIGURE], "source": "scratch"}


@pytest.fixture
def folder(tmp_path):
    model = timm.create_model("etmamba_ti", **SMALL)
    save_checkpoint(model, tmp_path / "f", label_names=["run", "jump", "roll"], stride=2, card=CARD)
    return tmp_path / "f"


def edit(folder, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_the_card_says_what_there_is_to_say(folder):
    checked = check_folder(folder)
    model = timm.create_model(f"local-dir:{folder}")
    assert checked.params == sum(p.numel() for p in model.parameters())
    header, _, text = checked.card("me/tiny").removeprefix("---\n").partition("---\n")
    assert "pipeline_tag: video-classification\n" in header
    assert "license: apache-2.0\n" in header
    assert "image-classification" not in header
    for line in (
        "# tiny",
        f"- Parameters: {checked.params:,}; stored in float32",
        "- Clip: 2 frames of 32×32, 2 apart",
        "- Source: scratch",
        "- Licence: Apache-2.0",
        "- epochs: 30",
        "| mocap | top-1 | 91.5 | 2×3×4 | ours |",
        "run, jump, roll",
        'model = timm.create_model("hf-hub:me/tiny", pretrained=True).eval()',
        'classify = pipeline("video-classification", model="me/tiny")',
    ):
        assert line in text.splitlines()


def test_the_entry_for_the_manifest_is_one(folder):
    from etmamba_timm.checkpoints import Checkpoint

    entry = Checkpoint("etmamba_ti.tiny", **check_folder(folder).manifest_entry("me/tiny"))
    assert (entry.num_frames, entry.img_size, entry.num_classes, entry.stride) == (2, 32, 3, 2)
    content = (folder / "model.safetensors").read_bytes()
    assert (entry.sha256, entry.size) == (hashlib.sha256(content).hexdigest(), len(content))
    assert entry.labels == "config.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(architecture="etmamba_xl"), "architecture is 'etmamba_xl'; it must be one of"),
        (lambda c: c.pop("architecture"), "config.json has no key 'architecture'"),
        (lambda c: c.update(label_names=["run"]), "config.json says 1 label name, but the weights have 3"),
        (lambda c: c["clip"].update(num_frames=8), "config.json says 8 frames, but the weights have 2"),
        (lambda c: c.pop("clip"), "there is no block 'clip'"),
        (lambda c: c["card"].pop("licence"), "no licence is stated"),
        (
            lambda c: c["card"].update(figures=[{**FIGURE, "whose": ""}]),
            "card.figures is .*; it must be a list of objects with dataset",
        ),
        (lambda c: c["model_args"].update(depth=3), "model_args.depth is 3, but the weights have 2"),
        (lambda c: c["model_args"].update(num_classes=9), "model_args.num_classes is 9, but the weights have 3"),
        (lambda c: c.update(num_classes=9), "config.json says 9 classes, but the weights have 3"),
    ],
)
def test_a_config_that_does_not_hold(folder, change, message):
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        check_folder(folder)


def test_a_figure_may_be_0(folder):
    edit(folder, lambda c: c["card"].update(figures=[{**FIGURE, "value": 0.0}]))
    assert check_folder(folder).manifest_entry("me/tiny")["figures"][0]["value"] == 0


def test_a_licence_is_given_as_it_is_published(folder, capsys):
    edit(folder, lambda c: c.pop("card"))
    before = (folder / "config.json").read_bytes()
    assert main(["publish", str(folder), "me/tiny", "--dry-run", "--licence", "MIT"]) == 0
    assert "- Licence: MIT" in capsys.readouterr().out
    assert check_folder(folder, "MIT").config["card"] == {"licence": "MIT"}
    assert (folder / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_missing_and_damaged_files(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"{name} can't be read as"):
        check_folder(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}; `etmamba convert` makes such a folder"):
        check_folder(folder)


def test_weights_that_are_not_finite(folder):
    weights = load_file(folder / "model.safetensors")
    weights["norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="isn't finite"):
        check_folder(folder)


@pytest.mark.parametrize("repo", ["tiny", "me/you/tiny", "me/ti ny", "", "me/-x"])
def test_impossible_names(folder, repo, capsys):
    assert main(["publish", str(folder), repo, "--dry-run"]) == 2
    assert "can't be a repository's name" in capsys.readouterr().err


def test_a_dry_run_shows_everything_and_asks_nobody(folder, capsys, tmp_path):
    (folder / "optimizer.pth").write_bytes(b"")
    assert main(["publish", str(folder), "me/tiny", "--dry-run", "--private"]) == 0
    out = capsys.readouterr().out
    checked = check_folder(folder)
    assert "me/tiny, private, branch main: would get" in out
    assert f"{checked.size:,} bytes, sha256 {checked.sha256}" in out
    assert "left out: optimizer.pth" in out
    assert checked.card("me/tiny") in out
    entry = json.loads(out.partition("manifest.json:")[2])
    assert entry == {"etmamba_ti.TAG": checked.manifest_entry("me/tiny")}
    assert not (folder / "README.md").exists()


def test_published_and_loaded_by_its_name(folder, tmp_path):
    """Repository made, weights sent by LFS, one commit; another process then loads it from the Hub, bit by bit."""
    (folder / "optimizer.pth").write_bytes(b"not to be sent")
    publish = [sys.executable, "-m", "etmamba_timm", "publish", str(folder), "me/tiny"]
    code = "import timm, torch, etmamba_timm; model = timm.create_model('hf-hub:me/tiny', pretrained=True)"
    code += "; torch.save(model.state_dict(), 'out.pth')"
    with HubServer(tmp_path / "repos") as hub:
        environment = hub.environment(tmp_path / "home")
        refused = subprocess.run(publish, env=environment, capture_output=True, text=True)
        assert refused.returncode == 2
        assert "me/tiny can't be published" in refused.stderr
        assert "If you aren't logged in: `hf auth login` or HF_TOKEN" in refused.stderr
        assert not (tmp_path / "repos" / "me").exists()
        token = environment | {"HF_TOKEN": "hf_loopback"}
        branch = subprocess.run([*publish, "--revision", "dev"], env=token, capture_output=True, text=True)
        assert branch.returncode == 2
        assert not (tmp_path / "repos" / "me").exists()  # no repository is made for a branch that it can't have
        done = subprocess.run(publish, env=token, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{hub.endpoint}/me/tiny/commit/")
        assert sum("/commit/" in line for line in hub.requests) == 1
        assert any(line.startswith("PUT /lfs/") for line in hub.requests)
        subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)
    sent = tmp_path / "repos/me/tiny/main"
    names = {"model.safetensors", "config.json", "video_preprocessor_config.json", "README.md"}
    assert {path.name for path in sent.iterdir()} == names
    assert json.loads((sent / "config.json").read_text())["model_type"] == "etmamba_timm"
    assert (sent / "README.md").read_text(encoding="utf-8") == check_folder(folder).card("me/tiny")
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in torch.load(tmp_path / "out.pth").items())
