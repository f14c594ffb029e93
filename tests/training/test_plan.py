"""What a run will do: open values settled by the model and the data, facts, and warnings where it can't work."""

from dataclasses import replace
from pathlib import Path

import pytest

from etmamba_timm.checkpoints.manifest import weights_folder
from etmamba_timm.data import Annotations
from etmamba_timm.training.plan import make_plan, settle
from etmamba_timm.training.recipe import Recipe, RecipeError, load_recipe, read_settings

# Published sizes: videos for training, for validation, and classes. HMDB-51's and Breakfast's are their first split's
# videos for training, of which a fifth is for validation.
SIZES = {"k400": (240_436, 19_796, 400), "ssv2": (168_913, 24_777, 174), "hmdb51": (2856, 714, 51)}
SIZES["breakfast"] = (1262, 315, 10)


def videos(*counts: int) -> Annotations:
    """So many videos of each class; they aren't read."""
    samples = [(Path(f"{label}/{i}.mp4"), label) for label, count in enumerate(counts) for i in range(count)]
    return Annotations(samples, [f"class {label}" for label in range(len(counts))], [])


def even(total: int, classes: int) -> Annotations:
    return videos(*(total // classes + (i < total % classes) for i in range(classes)))


def finetuned(train: Annotations, processes: int = 1, **overrides) -> Recipe:
    return settle(read_settings("finetune", **overrides), train, processes)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("processes", [1, 8])
def test_no_warning_on_the_papers_recipes(name, processes):
    train, val, classes = SIZES[name]
    recipe = load_recipe(name)
    assert recipe == settle(read_settings(name), even(train, classes), processes)
    plan = make_plan(recipe, even(train, classes), even(val, classes), processes)
    assert plan.warnings == []
    assert plan.updates == recipe.epochs * (train // (64 * processes))


def test_several_labels_are_told():
    samples = [(Path(f"{i}.mp4"), (0, 1) if i % 2 else (0,)) for i in range(40)]
    train, val = Annotations(samples, ["a", "b"], []), Annotations(samples[:12], ["a", "b"], [])
    plan = make_plan(finetuned(train), train, val)
    facts = dict(plan.facts)
    told = "40 for training with several labels (1.5 on average), 20 (b) to 40 (a) of each of 2 classes, and 12 for"
    assert facts["videos"] == f"{told} validation"
    assert facts["loss"] == "binary cross entropy of each class; measured by mAP"
    assert plan.warnings == []
    few = make_plan(finetuned(train), train, replace(val, samples=samples[:1]))
    assert few.warnings == [
        "no video for validation in 1 class, first b: it can't be measured",
        "only 1 video for validation: the mAP is rough",
    ]


@pytest.mark.parametrize("of_each", [9, 900])
def test_finetune_suits_few_clips_and_many(of_each):
    train, val = videos(*[of_each] * 6), videos(*[3] * 6)
    recipe = finetuned(train)
    plan = make_plan(recipe, train, val)
    assert plan.warnings == []
    assert (recipe.num_frames, recipe.stride, recipe.size) == (8, "spread", 64)  # etmamba_ti.mocap's
    assert recipe.scaled(recipe.lr, 1) == recipe.lr
    clips = recipe.epochs * recipe.repeat * len(train.samples)
    assert plan.updates == pytest.approx(clips / 16, abs=recipe.epochs)
    assert plan.updates >= 200
    assert (recipe.repeat > 1) == (of_each == 9)
    assert finetuned(train, epochs=20).repeat == recipe.repeat  # so that a finished run can go on for more epochs


def test_a_frozen_backbone():
    pooled = {"freeze_backbone": True, "model_args": {"global_pool": "map"}}
    plan = make_plan(finetuned(GOOD[0], **pooled), *GOOD)
    assert plan.warnings == []
    pool, head = 12 * 192**2 + 12 * 192, 193 * len(GOOD[0].classes)  # 12 D² weights; query, biases and norm
    assert f"of which {(pool + head) / 1e6:.3g} M are trained, weights: etmamba_ti.mocap" in dict(plan.facts)["model"]
    plan = make_plan(finetuned(GOOD[0], pretrained=False, **pooled), *GOOD)
    assert plan.warnings == ["the frozen backbone is drawn at random; set pretrained=true, or give a checkpoint"]


def test_batches_are_no_larger_than_the_data():
    assert [finetuned(videos(1, n)).batch_size for n in (1, 4, 14, 15, 99)] == [2, 4, 8, 16, 16]
    assert finetuned(videos(50), processes=2).batch_size == 8
    assert finetuned(videos(50), processes=64).batch_size == 1


def test_the_clip_is_that_of_the_weights():
    train = videos(9, 9)
    for model, clip in (
        ("videomamba_m.k400_f8", (8, "spread", 224)),
        ("videomamba_ti.k400_f64_384", (64, "spread", 384)),
        ("etmamba_m", (16, 2, 224)),  # VideoMamba's of images: the paper's clip
    ):
        recipe = finetuned(train, model=model)
        assert (recipe.num_frames, recipe.stride, recipe.size) == clip
    folder = weights_folder() / "etmamba_ti.mocap"
    for settings in ({"model": f"local-dir:{folder}"}, {"model": "etmamba_ti", "checkpoint": str(folder)}):
        recipe = finetuned(train, **settings)
        assert (recipe.num_frames, recipe.stride, recipe.size) == (8, "spread", 64)
        assert make_plan(recipe, *GOOD).warnings == []
        assert len(make_plan(replace(recipe, size=96), *GOOD).warnings) == 1
    assert finetuned(train, num_frames=4, stride=3).clip.to_config() == {"num_frames": 4, "stride": 3}


def test_few_epochs_have_a_short_warm_up():
    train = videos(9, 9)
    found = {epochs: finetuned(train, epochs=epochs).warmup_epochs for epochs in (1, 4, 10, 40)}
    assert found == {1: 0.1, 4: 0.4, 10: 1, 40: 1}
    assert finetuned(train, warmup_epochs=2).warmup_epochs == 2


def test_no_video_for_validation_is_an_error():
    train, nothing = videos(1, 1), videos(0, 0)
    with pytest.raises(RecipeError, match="no video for validation: add a second one to a class, or give some"):
        make_plan(finetuned(train), train, nothing)


def test_a_linear_probe_has_no_updates():
    facts = dict(make_plan(finetuned(GOOD[0]), *GOOD, linear_probe=True).facts)
    assert facts["probe"] == "logistic regression on the videos' features, which are computed once"
    assert not facts.keys() & {"updates", "rate"}
    assert make_plan(finetuned(GOOD[0], epochs=1, epoch_updates=1), *GOOD, linear_probe=True).warnings == []


def test_the_device_is_told(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert dict(make_plan(finetuned(GOOD[0], precision="no"), *GOOD).facts)["device"] == "cpu, float32"
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:0")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda name: f"a card at {name}")
    facts = dict(make_plan(finetuned(GOOD[0], precision="bf16"), *GOOD).facts)
    assert facts["device"] == "a card at cuda:0, bfloat16"


def test_classes_of_a_side_are_not_flipped():
    assert finetuned(videos(9, 9)).flip == 0.5
    for name in ("turn left", "Clockwise"):
        train = videos(9, 9)
        train.classes[0] = name
        assert finetuned(train).flip == 0


def test_what_stays_open_is_an_error():
    with pytest.raises(RecipeError, match="lr can't be 'auto'"):
        finetuned(videos(9), lr="auto")
    with pytest.raises(RecipeError, match="epoch_updates is 'x'; it must be a whole number, 0 or more"):
        finetuned(videos(9), epoch_updates="x")
    left = "num_frames, stride, size, epoch_updates, warmup_epochs, batch_size, flip, precision"
    with pytest.raises(RecipeError, match=f"finetune leaves {left} to the"):
        load_recipe("finetune")
    with pytest.raises(RecipeError, match="no videos for training"):
        finetuned(videos())


def test_facts():
    train, val = videos(3, 40), videos(2, 10)
    facts = dict(make_plan(finetuned(train), train, val).facts)
    assert facts["videos"] == "43 for training, 3 (class 0) to 40 (class 1) of each of 2 classes, and 12 for validation"
    assert facts["classes"] == "class 0, class 1"
    assert facts["model"].endswith("weights: etmamba_ti.mocap (in the package)")
    assert facts["clip"].startswith("8 frames of 64×64, spread over the whole video: 1.")
    assert "of 16 clips: 10 epochs of 8 clips of each video" in facts["updates"]
    scratch = finetuned(train, model="etmamba_ti.videomamba_in1k", pretrained=False)
    assert "drawn at random" in dict(make_plan(scratch, train, val).facts)["model"]
    download = dict(make_plan(load_recipe("k400"), train, val).facts)["model"]
    assert "etmamba_m.videomamba_in1k (from OpenGVLab/VideoMamba, unless it is in the cache)" in download


GOOD = videos(20, 20), videos(9, 9)


@pytest.mark.parametrize(
    ("train", "val", "overrides", "said"),
    [
        (*GOOD, {"lr": 9e-6}, "the learning rate is 9e-06, at which little is learnt; raise lr"),
        (
            *GOOD,
            {"lr": 1e-4, "scale_lr": True},
            "the learning rate is 6.3e-06 (0.0001 for 256 clips, scaled to 16), at which little is learnt; "
            "raise lr, or set scale_lr=false",
        ),
        (
            *GOOD,
            {"num_frames": 16, "size": 224},
            "clips are 16 frames of 224×224, and the weights are for 8 frames of 64×64: 24.3 times the cost, and "
            "weights that have to adapt. Set num_frames=8 size=64 unless you mean it",
        ),
        (
            *GOOD,
            {"epochs": 2, "warmup_epochs": 1},
            "updates, 20 of them warm-up: too few to learn much. Raise epochs or repeat",
        ),
        (*GOOD, {"warmup_epochs": 8}, "Raise epochs or repeat, or lower warmup_epochs"),
        (GOOD[0], videos(3, 2), {}, "only 5 videos for validation: each is 20 points of accuracy"),
        (videos(20, 1), GOOD[1], {}, "fewer than two videos for training in 1 class, first class 1: add some"),
        (GOOD[0], videos(20, 0), {}, "no video for validation in 1 class, first class 1: it can't be measured"),
    ],
)
def test_warnings(train, val, overrides, said):
    (warning,) = make_plan(finetuned(train, **overrides), train, val).warnings
    assert said in warning
    assert make_plan(finetuned(GOOD[0]), *GOOD).warnings == []
