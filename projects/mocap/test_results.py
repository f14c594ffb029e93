"""What the results are made of: pairs, tables, joined videos, and the shipped folder's place in the manifest."""

import csv
import json
import statistics
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from etmamba_timm.checkpoints import save_checkpoint
from etmamba_timm.training.evaluate import Scores
from etmamba_timm.training.recipe import load_recipe
from etmamba_timm.training.run_folder import RECIPE_FILE, RUN_FILE
from etmamba_timm.training.train import build_model

from .. import ablation
from ..runs import read_log
from . import ship, warm_start
from .ablation import COLUMNS
from .join import join, share_right
from .pairs import PAIRS, accuracies, by_sector, by_style, drawn, table
from .render import encode
from .sheet import read
from .variation import ACTIONS, CLASSES, FPS

PAGE = (ship.ROOT / "docs" / "mocap.md").read_text(encoding="utf-8")


def scores(taken_for: dict[str, list[tuple[str, str]]]) -> Scores:
    """Of one video for each `class: [(likeliest, second)]`."""
    names = sorted(CLASSES)
    labels, rows = [], []
    for name, takes in taken_for.items():
        for first, second in takes:
            row = torch.zeros(len(names))
            row[names.index(first)], row[names.index(second)] = 0.6, 0.4
            rows.append(row)
            labels.append(names.index(name))
    return Scores(torch.stack(rows), torch.tensor(labels), torch.arange(len(rows)), 0, 0, names)


def test_each_backwards_class_has_its_motion():
    assert len(PAIRS) == sum(action.backwards for action in ACTIONS.values()) == 5
    assert ("getup_faceup", "lie_down_faceup") in PAIRS
    assert ("walk", "walk_backwards") in PAIRS


def test_accuracies_of_a_pair():
    everywhere = {name: [(name, "kick")] for pair in PAIRS for name in pair}
    of_walk = {
        "walk": [("walk", "walk_backwards"), ("kick", "walk"), ("walk_backwards", "walk"), ("walk", "kick")],
        "walk_backwards": [("walk_backwards", "kick"), ("walk", "walk_backwards")],
    }
    found = accuracies(scores(everywhere | of_walk | {"kick": [("walk", "kick")]}))
    assert found["walk", "walk_backwards"] == pytest.approx((2 / 4, 1 / 2, 4 / 6))
    assert found["run", "run_backwards"] == (1, 1, 1)


def test_the_page_has_the_measured_table():
    with (ship.RESULTS / "mocap_ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {name: float(row[name]) for name in ("parameters", "multiply_adds", "step_ms_a_clip")}
        row |= {name: float(row[name]) for name in ("test_top1", "test_pairs")}
    assert ablation.table(rows, COLUMNS) in PAGE
    lines = [json.loads(row["val_top1"]) for row in rows]
    gains = [100 * (tops[-1] - tops[-2]) for tops in lines]
    assert f"All runs gained {min(gains):.0f} to {max(gains):.0f} points of validation accuracy" in " ".join(
        PAGE.split()
    )


def test_the_page_has_the_shipped_checkpoints_figures():
    text, walks = " ".join(PAGE.split()), ("walk", "walk_backwards")
    for part in ship.TESTS:
        scores = Scores.load(ship.RESULTS / f"mocap_{part}.safetensors")
        assert table(scores) in PAGE
        taken_for = list(zip(scores.labels.tolist(), scores.probabilities.argmax(1).tolist(), strict=True))
        wrong = sum(a != b for a, b in taken_for)
        walk, backwards = map(scores.classes.index, walks)
        turned = taken_for.count((walk, backwards)) + taken_for.count((backwards, walk))
        assert (
            f"{wrong} of {len(scores.labels)} are wrong, {turned} of them walking taken for walking backwards or the "
            "other way round."
        ) in text
    styles = by_style(scores, "looks")
    assert f"By style: {', '.join(f'{right:.1%} of {style}' for style, right in styles.items())}." in text
    checks = {True: [], False: []}
    for name, video, row in drawn(scores, "looks"):
        if video["look"]["style"] == "checks":
            checks[bool(video["look"]["occluders"])].append(scores.classes[row.argmax()] == name)
    hidden, free = (f"{statistics.mean(right):.1%}" for right in checks.values())
    assert f"{hidden} are right where something passes in front, {free} of the others" in text
    jumps = taken_for.count((scores.classes.index("jump"), scores.classes.index("spinkick")))
    assert f"{jumps} of the 40 jumps for spin kicks" in text
    (side, behind) = by_sector(Scores.load(ship.RESULTS / "mocap_test.safetensors"), walks).items()
    assert (side[0], behind[0]) == ((70, 80), (120, 130))
    assert f"seen from the side it is right in {side[1]:.1%}, obliquely from behind in {behind[1]:.1%}" in text
    best = max(row["top1"] for row in read_log(ship.RESULTS / "mocap_val.csv"))
    assert f"validation videos ({best:.1%})" in PAGE
    assert f"validation videos of other views and other styles at once ({best:.1%})" in " ".join(
        ship.NOTES.read_text(encoding="utf-8").split()
    )


def test_the_shipped_card_has_the_notes():
    notes = ship.NOTES.read_text(encoding="utf-8").strip()
    folder = ship.WEIGHTS / ship.NAME
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["card"]["notes"] == notes
    assert notes in (folder / "README.md").read_text(encoding="utf-8")


def test_the_page_has_what_the_warm_start_ends_at():
    with (ship.RESULTS / "mocap_warm_start.csv").open() as file:
        assert warm_start.summary(list(csv.DictReader(file))) in " ".join(PAGE.split())


def test_warm_starts_take_all_but_the_classifier(tmp_path):
    recipe = load_recipe(warm_start.RECIPE, model="videomamba_ti")
    recipe = replace(recipe, model_args=recipe.model_args | {"embed_dim": 32, "depth": 2})
    classes = [str(i) for i in range(10)]
    source = build_model(recipe, classes)
    save_checkpoint(source, tmp_path / "model")
    file = warm_start.without_classifier(tmp_path / "model" / "model.safetensors", tmp_path / "start.safetensors")
    model = build_model(replace(recipe, model=warm_start.WARM, checkpoint=str(file)), classes)
    assert any(name.startswith("blocks.0.local") for name, _ in model.named_parameters())
    assert torch.equal(model.patch_embed.proj.weight, source.patch_embed.proj.weight)
    assert not torch.equal(model.head.weight, source.head.weight)


@pytest.fixture
def data(tmp_path):
    """Three test videos, each of one brightness."""
    for i, name in enumerate(("kick", "punch", "walk")):
        (tmp_path / "test" / name).mkdir(parents=True)
        encode(tmp_path / "test" / name / "0000.mp4", np.full((15 + 3 * i, 32, 32, 3), 60 * (i + 1), np.uint8))
    return tmp_path


def test_joined_videos_begin_when_it_is_said(data):
    truth = join(data, data / "long.mp4", 3, seed=0)
    levels = read(data / "long.mp4").mean((1, 2, 3))
    shown = {"kick": 60, "punch": 120, "walk": 180}
    assert sorted(name for _, name in truth) == sorted(shown)
    assert len(levels) == 15 + 18 + 21
    for start, name in truth:
        assert levels[round(start * FPS)] == pytest.approx(shown[name], abs=8)
        assert levels[round(start * FPS) + 14] == pytest.approx(shown[name], abs=8)


def test_share_of_the_time_that_is_right(tmp_path):
    file = tmp_path / "segments.csv"
    file.write_text("start,end,label,score\n0,1.5,kick,0.9\n1.5,3,walk,0.8\n3,4,kick,0.7\n")
    assert share_right([(0.0, "kick"), (2.0, "walk")], file) == pytest.approx((1.5 + 1) / 4)


def test_shipping_a_run_twice_leaves_one_entry(tmp_path):
    run, weights = tmp_path / "run", tmp_path / "weights"
    weights.mkdir()
    before = json.dumps({"one": {"status": "published"}, ship.NAME: {"old": 1}, "two": {"a": 0}}, indent=2)
    (weights / "manifest.json").write_text(before)
    model = timm.create_model("etmamba_ti", num_classes=20, num_frames=8, img_size=32, depth=1, embed_dim=32)
    save_checkpoint(model, run / "model", label_names=list(CLASSES), stride="spread")
    (run / RECIPE_FILE).write_text(load_recipe(ship.ROOT / "projects" / "mocap" / "recipe.yaml").to_yaml())
    (run / RUN_FILE).write_text('{"processes": 2, "videos": 6000}')
    everything = scores({name: [(name, "kick" if name != "kick" else "walk")] for name in CLASSES})
    folder = weights / ship.NAME
    for _ in range(2):
        ship.save(run, folder, ship.card(run, {"test": everything, "looks": everything}))
        ship.enter(folder, ship.DATASET, file=weights / "manifest.json")
    manifest = json.loads((weights / "manifest.json").read_text())
    assert list(manifest) == ["one", "two", ship.NAME]
    assert "on 6,000 videos" in (folder / "README.md").read_text()
    assert "- processes: 2\n" in (folder / "README.md").read_text()
    for figure, kind in zip(manifest[ship.NAME]["figures"], ("views", "looks"), strict=True):
        assert figure | {"views": 0} == {
            "dataset": f"rendered motion capture, 20 videos of held-out {kind}",
            "metric": "top-1",
            "value": 100.0,
            "views": 0,
            "whose": "measured here",
        }
    card = (folder / "README.md").read_text()
    assert "one recording of one person" in card
    assert "zlib" in card
    assert (folder / "model.safetensors").stat().st_size < 3 * sum(p.numel() for p in model.parameters())


def test_the_videos_that_ship_are_drawn_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(ship, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(ship, "VIDEOS", tmp_path / "mocap" / "test")
    for old in (tmp_path / "weights" / "sample_old.mp4", tmp_path / "mocap" / "test" / "kick" / "old.mp4"):
        old.parent.mkdir(parents=True)
        old.touch()
    for name in CLASSES:
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        for number in range(ship.EACH + 1):
            (tmp_path / "data" / "test" / name / f"{number}.mp4").write_text(f"{name} {number}")
    ship.copy_videos(ship.test_videos(tmp_path / "data"))
    copies = [file.read_text() for file in (tmp_path / "mocap").rglob("*.mp4")]
    (sample,) = (tmp_path / "weights").iterdir()
    assert len(set(copies)) == len(copies) == ship.EACH * len(CLASSES)
    assert sample.read_text() not in copies  # the tests' videos are others
    assert sample.name == f"sample_{sample.read_text().split()[0]}.mp4"


def test_too_few_test_videos_are_an_error_before_anything_is_replaced(tmp_path):
    for name in CLASSES:
        (tmp_path / "test" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="backflip holds 0 videos, 6 are needed; render the dataset"):
        ship.test_videos(tmp_path)
