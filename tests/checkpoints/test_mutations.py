"""A hunt in small: damaged files end in an answer, or in the error that says which file is damaged."""

import copy
import json
import random

import pytest
import timm
import torch

import etmamba_timm  # registers the models  # noqa: F401
from etmamba_timm.checkpoints import CheckpointError, read_checkpoint, save_checkpoint
from etmamba_timm.checkpoints.publish import check_folder
from etmamba_timm.predict import UntrainedError, load_model

SMALL = {"img_size": 32, "num_frames": 2, "embed_dim": 8, "depth": 1, "num_classes": 3}
CARD = {
    "licence": "MIT",
    "recipe": {"epochs": 3},
    "figures": [{"dataset": "d", "metric": "top-1", "value": 1.5, "views": None, "whose": "mine"}],
}
VALUES = (None, True, 0, -1, 1, 2, 10**12, 1.5, float("nan"), "", "text", "192", [], [1], [1, "a"], {}, {"a": 1}, [[]])
CONFIGS, BYTES = 60, 300
FOUND = (117, 1454, 1709, 1778, 2604, 3292)  # what longer hunts have found


def published(folder):
    """What `etmamba publish --dry-run` shows."""
    checked = check_folder(folder, "MIT")
    return checked.card("me/tiny"), checked.manifest_entry("me/tiny")


DOORS = (
    read_checkpoint,
    published,
    lambda folder: load_model(f"local-dir:{folder}"),
    lambda folder: load_model("etmamba_ti", folder),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mutated") / "model"
    model = timm.create_model("etmamba_ti", **SMALL)
    save_checkpoint(model, folder, label_names=["a", "b", "c"], stride=2, card=CARD)
    return folder


def mutate(config: dict, draw: random.Random) -> dict:
    """The config with one to three values replaced, removed, or renamed, at any depth."""
    config = copy.deepcopy(config)
    for _ in range(draw.randint(1, 3)):
        places = []

        def collect(node, places=places):
            keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
            for key in keys:
                places.append((node, key))
                collect(node[key])

        collect(config)
        if not places:
            return config
        node, key = draw.choice(places)
        what = draw.choice(["replace", "replace", "remove", "rename"])
        if what == "replace" or isinstance(node, list):
            node[key] = copy.deepcopy(draw.choice(VALUES))
        elif what == "remove":
            del node[key]
        else:
            node[key + "x"] = node.pop(key)
    return config


@pytest.mark.parametrize("seed", [*range(CONFIGS), *FOUND])
def test_a_damaged_config_is_told_by_its_file(folder, tmp_path, seed):
    draw = random.Random(seed)
    (tmp_path / "model.safetensors").hardlink_to(folder / "model.safetensors")
    file = tmp_path / "config.json"
    text = json.dumps(mutate(json.loads((folder / "config.json").read_text()), draw))
    if draw.random() < 0.1:
        text = text[: draw.randrange(len(text))]
    file.write_text(text)
    answers = []
    for door in DOORS:
        try:
            door(tmp_path)
            answers.append("fine")
        except UntrainedError:
            answers.append("fine")
        except CheckpointError as error:
            answers.append(str(error))
    assert all(answer == "fine" or str(tmp_path) in answer for answer in answers)
    if answers[0] != "fine":
        assert set(answers) == {answers[0]}, "one file, one error"


@pytest.mark.parametrize("form", ["zip", "old"])
def test_a_damaged_pickle(folder, tmp_path, form):
    torch.save(read_checkpoint(folder).tensors, tmp_path / "w.pth", _use_new_zipfile_serialization=form == "zip")
    content = (tmp_path / "w.pth").read_bytes()
    draw = random.Random(1)
    damaged = 0
    for _ in range(BYTES):
        data = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            at = draw.choice([draw.randrange(len(data)), draw.randrange(min(2000, len(data)))])
            data[at] = draw.randrange(256)
        (tmp_path / "w.pth").write_bytes(data[: draw.randrange(len(data))] if draw.random() < 0.2 else data)
        try:
            read_checkpoint(tmp_path / "w.pth")
        except CheckpointError as error:
            damaged += "w.pth" in str(error)
    assert damaged > BYTES // 10
