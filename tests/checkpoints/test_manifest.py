"""The manifest against upstream's table, the architectures, timm's registry and the README."""

import csv
import re
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch

from etmamba_timm.checkpoints import find_checkpoint, manifest
from etmamba_timm.checkpoints.card import views
from etmamba_timm.checkpoints.manifest import LABELS, STATUSES, label_names, weights_folder
from etmamba_timm.checkpoints.publish import check_folder
from etmamba_timm.checkpoints.read import variant_of
from etmamba_timm.clip import Clip
from etmamba_timm.models import VARIANTS

REPO = Path(__file__).parents[2]
UPSTREAM = list(csv.DictReader((REPO / "tests" / "golden" / "videomamba_checkpoints.csv").open(encoding="utf-8")))
SIZES = {"t16": "ti", "s16": "s", "m16": "m"}
CLASSES = {"in1k": 1000, "k400": 400, "ssv2": 174, "breakfast": 10, "coin": 180}
VIDEOMAMBA = [name for name in manifest() if name.startswith("videomamba_")]
LOCAL = [name for name, entry in manifest().items() if entry.status == "local"]


def tag_of(file: str) -> str:
    """videomamba_m16_k400_mask_ft_f8_res224to384.pth -> videomamba_m.k400_mask_ft_f8_384"""
    size, data, resolution = re.fullmatch(r"videomamba_(\w16)_(\w+)_res([\dto]+)\.pth", file).groups()
    last = resolution.rpartition("to")[2]
    return f"videomamba_{SIZES[size]}.{data}" + ("" if last == "224" else f"_{last}")


def left_out(row: dict) -> bool:
    return row["model"].endswith("-B") or "no classifier" in row["started_from"] or "unverified" in row["note"]


def test_every_checkpoint_of_upstream_is_there_or_left_out_for_a_reason():
    expected = [tag_of(row["file"]) for row in UPSTREAM if not left_out(row)]
    assert len(expected) == len(set(expected))
    assert set(expected) == set(VIDEOMAMBA)
    assert Counter(left_out(row) for row in UPSTREAM)[True] == len(UPSTREAM) - len(VIDEOMAMBA) == 7


@pytest.mark.parametrize("row", [row for row in UPSTREAM if not left_out(row)], ids=lambda row: row["file"])
def test_an_entry_says_what_upstream_does(row):
    entry = manifest()[tag_of(row["file"])]
    assert (entry.status, entry.source) == ("published", {"repo": "OpenGVLab/VideoMamba", "file": row["file"]})
    assert (entry.sha256, entry.size) == (None, None)
    assert "Apache-2.0" in entry.licence
    assert "non-commercial" in entry.licence
    assert entry.img_size == int(row["resolution"])
    assert entry.num_classes == CLASSES[entry.name.partition(".")[2].partition("_")[0]]
    (figure,) = entry.figures
    assert (figure["value"], figure["whose"]) == (float(row["top1"]), "reported by upstream")
    if row["frames_x_crops_x_clips"] == "image":
        assert (entry.num_frames, figure["views"]) == (1, None)
    else:
        views = figure["views"]
        assert f"{views['frames']}x{views['crops']}x{views['clips']}" == row["frames_x_crops_x_clips"]
        assert entry.num_frames == views["frames"]


@pytest.mark.parametrize("name", manifest())
def test_an_entry_is_consistent(name):
    entry = manifest()[name]
    assert name.partition(".")[0] == entry.architecture
    assert entry.architecture in VARIANTS
    assert entry.status in STATUSES
    assert entry.licence
    if "folder" not in entry.source:
        assert set(entry.source) - {"revision"} == {"repo", "file"}
    assert entry.labels in (None, "config.json", *LABELS)
    if entry.labels in LABELS:
        assert len(set(label_names(entry.labels))) == entry.num_classes
    assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
    for figure in entry.figures:
        assert figure.keys() == {"dataset", "metric", "value", "views", "whose"}
    if entry.status == "warm start":
        assert not entry.is_classifier
        assert manifest()[entry.started_from].source == entry.source
        assert entry.figures == []


@pytest.mark.parametrize("name", LOCAL)
def test_a_shipped_checkpoint_is_what_its_entry_says(name):
    entry = manifest()[name]
    folder = check_folder(entry.folder)
    assert (folder.sha256, folder.size, folder.left_out) == (entry.sha256, entry.size, ())
    assert folder.config["architecture"] == entry.architecture
    assert folder.config["num_classes"] == entry.num_classes
    assert folder.config["clip"]["num_frames"] == entry.num_frames


@pytest.mark.parametrize("name", VARIANTS)
def test_timm_lists_what_is_there_and_nothing_else(name):
    entries = [entry for entry in manifest().values() if entry.architecture == name]
    assert set(timm.list_pretrained(name + ".*")) == {
        e.name for e in entries if "file" in e.cfg() or "repo" in e.source
    }
    assert timm.models.is_model_pretrained(name) == bool(entries)
    if entries:
        assert timm.get_pretrained_cfg(name).tag == entries[0].name.partition(".")[2]


def test_a_local_checkpoint_without_its_folder_is_not_listed():
    from dataclasses import replace

    entry = replace(find_checkpoint("videomamba_ti"), status="local", source={"folder": "nowhere"})
    assert not timm.models.PretrainedCfg(**entry.cfg()).has_weights


@pytest.mark.parametrize("name", ["videomamba_ti", "videomamba_m.ssv2_f16_288", "videomamba_s.in1k_576", "etmamba_s"])
def test_a_tag_builds_the_model_that_its_weights_are_for(name):
    model, entry = timm.create_model(name, device="meta"), find_checkpoint(name)
    assert variant_of({**VARIANTS[entry.architecture], "in_chans": 3}) == entry.architecture
    if "." in name:
        assert (model.num_frames, model.num_classes) == (entry.num_frames, entry.num_classes)
        assert model.img_size == (entry.img_size, entry.img_size)
        assert model.clip == Clip(entry.num_frames, "spread")
    else:  # without weights, whatever the default tag is for
        assert (model.num_frames, model.num_classes, model.img_size) == (16, 400, (224, 224))
    assert "label_names" not in model.pretrained_cfg  # it knows no class yet


def test_label_names_are_torchvisions():
    names = label_names("kinetics400")
    assert (names[0], names[399], len(names)) == ("abseiling", "zumba", 400)
    assert label_names("imagenet1k")[0] == "tench"
    assert label_names(None) is None


def test_every_folder_of_weights_is_in_the_manifest():
    folders = {path.name for path in weights_folder().iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {entry.source["folder"] for entry in manifest().values() if "folder" in entry.source}


def test_the_pages_table_is_the_manifests():
    page = (REPO / "docs" / "weights.md").read_text(encoding="utf-8")
    section = page.partition("## VideoMamba's")[2]
    told = {}
    for row in re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE):
        shown, size, classes, *top1 = row[1].split(" | ")
        for model, value in zip(("videomamba_ti", "videomamba_s", "videomamba_m"), top1, strict=True):
            if value != "–":
                told[f"{model}.{row[0]}"] = (shown, size, classes, value)
    figures = {name: manifest()[name].figures[0] for name in VIDEOMAMBA}
    assert told == {
        name: (views(figure), str(manifest()[name].img_size), str(manifest()[name].num_classes), str(figure["value"]))
        for name, figure in figures.items()
    }


def test_defaults_are_those_that_the_page_names():
    for size in SIZES.values():
        assert find_checkpoint(f"videomamba_{size}").name == f"videomamba_{size}.k400_f8"
        starts = {name.partition(".")[2] for name in manifest() if name.startswith(f"etmamba_{size}.videomamba_")}
        at_224 = {n.partition(".")[2] for n in VIDEOMAMBA if re.fullmatch(rf"videomamba_{size}\.k400_f\d+", n)}
        assert starts == {"videomamba_in1k", *("videomamba_" + tag for tag in at_224)}
        assert find_checkpoint(f"etmamba_{size}").name == f"etmamba_{size}.videomamba_in1k"


def test_meta_models_have_the_positions_that_an_entry_says():
    model = timm.create_model("videomamba_ti.k400_f64_384", device="meta")
    assert model.pos_embed.shape == torch.Size([1, 1 + 24 * 24, 192])
    assert model.temporal_pos_embedding.shape == torch.Size([1, 64, 192])
