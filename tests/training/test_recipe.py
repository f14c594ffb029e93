"""Recipes: the paper's four, overriding them, and what is refused."""

import re
from dataclasses import asdict, fields

import pytest

from etmamba_timm.clip import Clip
from etmamba_timm.training.recipe import (
    Recipe,
    RecipeError,
    describe_settings,
    load_recipe,
    parse_overrides,
    read_settings,
    recipe_names,
)


def test_the_papers_protocol():
    """Paper 4.2."""
    assert recipe_names() == ["breakfast", "finetune", "hmdb51", "k400", "ssv2"]
    recipes = {name: load_recipe(name) for name in recipe_names() if name != "finetune"}
    assert {name: (r.warmup_epochs, r.epochs) for name, r in recipes.items()} == {
        "breakfast": (5, 50),
        "hmdb51": (5, 50),
        "k400": (1, 30),
        "ssv2": (1, 35),
    }
    for recipe in recipes.values():
        assert (recipe.model, recipe.opt, recipe.betas, recipe.weight_decay) == (
            "etmamba_m",
            "adamw",
            (0.9, 0.999),
            0.05,
        )
        assert (recipe.lr, recipe.min_lr, recipe.warmup_lr, recipe.batch_size) == (3e-4, 1e-6, 1e-6, 64)
        assert (recipe.drop_path, recipe.label_smoothing, recipe.precision, recipe.size) == (0.1, 0.1, "bf16", 224)
        assert recipe.rand_augment.startswith("rand-m9-mstd0.5")
        assert recipe.erasing > 0
        assert (recipe.num_clips, recipe.num_crops) == (4, 3)
    assert recipes["ssv2"].flip == 0 < recipes["k400"].flip
    assert [recipes[n].num_frames for n in ("breakfast", "k400", "ssv2", "hmdb51")] == [64, 16, 16, 16]
    assert [recipes[n].stride for n in ("k400", "ssv2", "hmdb51")] == [2, 2, 2]


def test_rates_scale_with_the_clips_of_an_update():
    recipe = load_recipe("k400")
    assert recipe.scaled(recipe.lr, 1) == pytest.approx(3e-4 / 4)
    assert recipe.scaled(recipe.lr, 8) == pytest.approx(6e-4)
    fixed = load_recipe("k400", scale_lr=False)
    assert fixed.scaled(fixed.lr, 8) == fixed.lr


def test_files_and_overrides(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        "precision: no\nlr: 1e-3\nepochs: 7\nwarmup_epochs: 0.5\nscale: [0.5, 1]\nrand_augment:\n"
        "model_args: {depth: 2}\n"
    )
    recipe = load_recipe(file, epochs=9, flip=0)
    assert (recipe.lr, recipe.epochs, recipe.scale, recipe.rand_augment) == (1e-3, 9, (0.5, 1.0), "")
    assert (recipe.flip, recipe.model_args, recipe.precision) == (0.0, {"depth": 2}, "no")
    assert recipe.warmup_epochs == 0.5
    file.write_text(recipe.to_yaml())
    assert load_recipe(file) == recipe
    assert asdict(Recipe()) == asdict(load_recipe("k400", dataset="folders"))
    assert parse_overrides(["lr=1e-3", "scale=[0.5, 1]", "rand_augment="]) == {
        "lr": "1e-3",
        "scale": [0.5, 1],
        "rand_augment": None,
    }


def test_checkpointing_is_a_number_of_blocks_or_whether_at_all():
    values = [parse_overrides([f"grad_checkpointing={text}"]) for text in ("false", "true", "0", "1", "3")]
    assert [load_recipe("k400", **value).grad_checkpointing for value in values] == [0, 1, 0, 1, 3]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"grad_checkpointing": -1}, "grad_checkpointing is -1; it must be 0 or more"),
        ({"grad_checkpointing": "some"}, "grad_checkpointing is 'some'; it must be int"),
        ({"compile": "fast"}, "compile is 'fast'; it must be bool"),
        ({"epoch": 3}, r"unknown settings epoch \(did you mean epochs\?\); known are dataset, split, model"),
        ({"epochs": 2.5}, "epochs is 2.5; it must be int"),
        ({"epochs": 0}, "epochs is 0; it must be 1 or more"),
        ({"lr": "fast"}, "lr is 'fast'; it must be float"),
        ({"lr": float("nan")}, "lr is nan; it must be 0 or more"),
        ({"pretrained": 1}, "pretrained is 1; it must be bool"),
        ({"betas": [0.9]}, r"betas is \[0.9\]; it must be tuple"),
        ({"drop_path": 2}, "drop_path is 2.0; it must be between 0 and 1"),
        ({"epochs": 3, "warmup_epochs": 3}, "warmup_epochs is 3 and epochs 3; warmup_epochs must be smaller"),
        ({"accumulate": 5}, "batch_size is 64; it must be a multiple of accumulate, 5"),
        ({"mixup": 0.8, "batch_size": 3}, "mixup needs an even number of clips; batch_size / accumulate is 3"),
        ({"num_crops": 2}, "num_crops is 2; it must be 1 or 3"),
        ({"layer_decay": 0}, "set it to 1 for no decay"),
        ({"label_smoothing": 1}, "it must be below 1"),
        ({"mixup": -0.8}, "mixup is -0.8; it must be 0 or more"),
        ({"still": 1.5}, "still is 1.5; it must be between 0 and 1"),
        ({"precision": "fp8"}, "choose one of no, bf16, fp16"),
        ({"stride": 0}, "stride is 0; it must be the number of frames from one to the next .* or 'spread'"),
        ({"stride": "wide"}, "stride is 'wide'; it must be the number of frames"),
        ({"stride": True}, "stride is True; it must be int | str"),
        ({"num_frames": 0}, "num_frames is 0; it must be a whole number, 1 or more"),
        ({"size": 0}, "size is 0; it must be at least 1 pixel"),
        ({"size": [256]}, r"size is \[256\]; it must be int"),
        ({"size": [256, 320.5]}, r"size is \[256, 320.5\]; it must be int"),
        ({"model_args": {"img_size": 64}}, r"model_args can't contain img_size \(set size\)"),
        ({"model_args": {"num_classes": 3}}, r"model_args can't contain num_classes \(the dataset decides it\)"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe("k400", **settings)


def test_rectangular_sizes(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("size: [256, 320]\nstride: spread\n")
    recipe = load_recipe(file)
    assert recipe.img_size == recipe.size == (256, 320)
    assert recipe.clip == Clip(16, "spread")
    file.write_text(recipe.to_yaml())
    assert load_recipe(file) == recipe
    assert load_recipe(file, **parse_overrides(["size=64"])).img_size == (64, 64)


def test_files_that_cannot_be(tmp_path):
    with pytest.raises(
        RecipeError,
        match="unknown recipe 'ucf101'; give a YAML file, or one of breakfast, finetune, hmdb51, k400, ssv2",
    ):
        load_recipe("ucf101")
    file = tmp_path / "x.yaml"
    for text, said in (("a: [", "isn't valid YAML"), ("- 1\n", "contains a list; write lines `setting: value`")):
        file.write_text(text)
        with pytest.raises(RecipeError, match=said):
            load_recipe(file)
    with pytest.raises(RecipeError, match="'lr' isn't a setting; write name=value"):
        parse_overrides(["lr"])
    with pytest.raises(RecipeError, match="isn't valid YAML"):
        parse_overrides(["lr=["])


def test_the_help_describes_every_setting_with_the_recipes_value():
    rows = describe_settings("finetune")
    pairs = [pair for names, _ in rows for pair in re.split(r", (?=\w+=)", names)]
    shown = parse_overrides(pairs)
    assert set(shown) == {f.name for f in fields(Recipe)} - {"dataset"} | {"epoch_updates"}
    assert all(len(text) > 4 and not text.endswith(".") for _, text in rows)
    assert {name: shown[name] for name in read_settings("finetune")} == read_settings("finetune")
    defaults = {name: value for name, value in shown.items() if name not in read_settings("finetune")}
    assert Recipe(**defaults) == Recipe()
