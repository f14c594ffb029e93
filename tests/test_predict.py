"""From real video files to scores and features, from Python."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from videos import write_video

from etmamba_timm.clip import Clip
from etmamba_timm.data import Annotations, EvalClips, EvalTransform, VideoError, read_frames, sample_clips
from etmamba_timm.export import export_model
from etmamba_timm.predict import (
    UntrainedError,
    extract_features,
    features_of_files,
    load_model,
    predict,
    predict_files,
    top_classes,
)
from etmamba_timm.seeing.timeline import timeline
from etmamba_timm.training.evaluate import evaluate

SMALL = {"img_size": 32, "num_frames": 4, "embed_dim": 16, "depth": 2, "num_classes": 6}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "clip.mp4", num_frames=40, height=48, width=80)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("etmamba_ti", **SMALL).eval()


@pytest.mark.parametrize(("num_clips", "num_crops"), [(1, 1), (1, 3), (4, 3)])
def test_scores_are_the_mean_over_views_of_the_softmax(model, video, num_clips, num_crops):
    transform = EvalTransform(size=(32, 32))
    views = [transform(read_frames(video, indices), num_crops) for indices in sample_clips(40, 4, 2, num_clips)]
    expected = torch.stack([model(view[None]).softmax(-1)[0] for view in torch.cat(views)]).mean(0)
    scores = predict(model, video, num_clips=num_clips, num_crops=num_crops)
    torch.testing.assert_close(scores, expected)
    assert scores.sum().item() == pytest.approx(1)


def test_features_are_what_the_classifier_reads(model, video):
    features = extract_features(model, video)
    torch.testing.assert_close(model.head(features).softmax(-1), predict(model, video))


def test_autocast_changes_little(model, video):
    expected = predict(model, video)
    scores = predict(model, video, dtype=torch.bfloat16)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, expected)
    torch.testing.assert_close(scores, expected, rtol=0.02, atol=0.0)


def test_one_channel_model(video):
    model = timm.create_model("videomamba_ti", **SMALL, in_chans=1).eval()
    assert predict(model, video).shape == (6,)


def test_top_classes_have_names_or_numbers(model):
    scores = torch.tensor([0.1, 0.5, 0.0, 0.3, 0.1, 0.0])
    assert top_classes(model, scores, 2) == [
        {"label": "class 1", "index": 1, "score": 0.5},
        {"label": "class 3", "index": 3, "score": pytest.approx(0.3)},
    ]
    model.pretrained_cfg["label_names"] = ("run", "jump", "roll", "kick", "punch", "spin")
    assert [c["label"] for c in top_classes(model, scores, 9)][:2] == ["jump", "kick"]
    assert len(top_classes(model, scores, 9)) == 6


def test_model_without_classes(model, video):
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="no classes to predict; use extract_features"):
        predict(model, video)
    assert extract_features(model, video).shape == (16,)


@pytest.mark.parametrize(
    "call",
    [
        predict,
        extract_features,
        timeline,
        lambda video, model: predict_files([video], model),
        lambda video, model: features_of_files([video], model),
        lambda video, model: top_classes(torch.zeros(6), model),
        lambda video, model: evaluate(EvalClips(Annotations([], [], []), None, Clip(4, 2)), model),
        lambda video, model: export_model(video, model),
    ],
)
def test_swapped_arguments(model, video, call):
    with pytest.raises(TypeError, match="model first|expected str"):
        call(video, model)


def test_one_path_for_several_and_several_for_one(model, video):
    with pytest.raises(TypeError, match="paths is .*clip.mp4'; give a list of videos"):
        predict_files(model, str(video))
    with pytest.raises(TypeError, match="predict_files and features_of_files take several"):
        extract_features(model, [video])


def test_training_mode_or_no_pooling_is_refused(model, video):
    with pytest.raises(ValueError, match=r"^the model is in training mode; call model.eval\(\)$"):
        predict(model.train(), video)
    model.reset_classifier(6, "")
    with pytest.raises(ValueError, match=r"^the model returns all tokens .*; create it with global_pool='token'"):
        predict(model.eval(), video)


def test_results_that_are_not_finite_are_refused(model, video):
    with torch.no_grad():
        model.head.weight[0] = torch.nan
    with pytest.raises(ValueError, match="the result isn't finite; check the checkpoint"):
        predict(model, video)


@pytest.mark.parametrize(
    ("stride", "frames"),
    [
        (None, [16, 18, 20, 22]),
        (3, [15, 18, 21, 24]),
        ("spread", [5, 15, 25, 35]),  # over all 40 frames
    ],
)
def test_frames_are_those_of_the_models_clips(model, video, stride, frames):
    model.stride = stride
    view = EvalTransform(size=(32, 32))(read_frames(video, frames))
    torch.testing.assert_close(predict(model, video), model(view).softmax(-1)[0])


def test_missing_file(model, tmp_path):
    with pytest.raises(VideoError, match="no such file"):
        predict(model, tmp_path / "nothing.mp4")


class TestLoadModel:
    def test_untrained_is_refused_unless_allowed(self, caplog):
        with pytest.raises(
            UntrainedError, match="'etmamba_ti_ebs' has no trained weights, so its results would be rand"
        ):
            load_model("etmamba_ti_ebs")
        assert load_model("etmamba_ti", allow_untrained=True).training is False
        assert "etmamba_ti has no trained weights: its results are random" in caplog.text

    @pytest.mark.parametrize("name", ["etmamba_ti", "etmamba_s.videomamba_k400_f8"])
    @pytest.mark.parametrize("need_classifier", [True, False])
    def test_a_starting_point_is_no_classifier(self, name, need_classifier):
        with pytest.raises(UntrainedError, match=f"'{name}' is a starting point for training .*, not a classifier"):
            load_model(name, need_classifier=need_classifier)

    def test_videomambas_weights_without_their_tag_are_sampled_otherwise_and_it_is_said(self, tmp_path, caplog):
        source = timm.create_model("videomamba_ti", num_classes=400, num_frames=2, img_size=32)
        save_file(source.state_dict(), tmp_path / "w.safetensors")
        assert load_model("videomamba_ti.k400_f8", tmp_path / "w.safetensors").clip.is_spread
        assert "doesn't say" not in caplog.text
        assert load_model("videomamba_ti", tmp_path / "w.safetensors").clip == Clip(2)
        assert "doesn't say how its clips are sampled, so frames are taken 2 apart" in caplog.text

    def test_class_names_are_those_of_a_tag(self, tmp_path):
        source = timm.create_model("videomamba_ti", num_classes=400, num_frames=2, img_size=32)
        save_file(source.state_dict(), tmp_path / "w.safetensors")
        scores = torch.eye(400)[1]
        named = load_model("videomamba_ti.k400_f8", tmp_path / "w.safetensors")
        assert top_classes(named, scores, 1)[0]["label"] == "air drumming"
        assert top_classes(load_model("videomamba_ti", tmp_path / "w.safetensors"), scores, 1)[0]["label"] == "class 1"
        scores = torch.eye(7)[1]
        assert top_classes(named, scores, 1)[0]["label"] == "class 1"  # not of these classes

    @pytest.mark.parametrize("form", ["safetensors", "pth"])
    def test_checkpoint_tells_classes_frames_and_size(self, tmp_path, video, form):
        source = timm.create_model("etmamba_ti", num_classes=6, num_frames=4, img_size=32).eval()
        path = tmp_path / f"weights.{form}"
        save_file(source.state_dict(), path) if form == "safetensors" else torch.save(source.state_dict(), path)
        model = load_model("etmamba_ti", path)
        assert (model.num_classes, model.num_frames, model.img_size) == (6, 4, (32, 32))
        torch.testing.assert_close(predict(model, video), predict(source, video))

    def test_checkpoint_without_classifier_gives_features_alone(self, tmp_path):
        source = timm.create_model("videomamba_ti", num_classes=0, num_frames=4, img_size=32)
        path = tmp_path / "weights.safetensors"
        save_file(source.state_dict(), path)
        with pytest.raises(UntrainedError, match="no trained classifier.*use features"):
            load_model("videomamba_ti", path)
        assert load_model("videomamba_ti", path, need_classifier=False).num_classes == 0

    def test_checkpoint_of_another_variant(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        save_file(timm.create_model("videomamba_ti", num_frames=4, img_size=32).state_dict(), path)
        with pytest.raises(ValueError, match=r"weights.safetensors looks like videomamba_ti, not like etmamba_ti "):
            load_model("etmamba_ti", path)

    def test_something_else_in_the_file(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        save_file({"weight": torch.zeros(3)}, path)
        with pytest.raises(ValueError, match="no tensor's name ends in 'patch_embed.proj.weight'"):
            load_model("etmamba_ti", path)

    @pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 and no more", bytes(range(256)) * 9])
    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    def test_a_damaged_checkpoint(self, tmp_path, content, suffix):
        path = tmp_path / f"weights.{suffix}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"weights.{suffix} (can't be read as a|is no) checkpoint"):
            load_model("etmamba_ti", path)

    def test_a_pickle_with_code_is_not_run(self, tmp_path):
        class Code:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "run",))

        path = tmp_path / "weights.pth"
        torch.save({"model": Code()}, path)
        with pytest.raises(ValueError, match="can't be read as a checkpoint.*weights_only=True blocked"):
            load_model("etmamba_ti", path)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("content", [{"patch_embed.proj.weight": 3}, {1: torch.zeros(2)}, {"a": None}])
    def test_other_things_than_tensors(self, tmp_path, content):
        path = tmp_path / "weights.pth"
        torch.save(content, path)
        with pytest.raises(ValueError, match="weights.pth (can't be read as a|is no) checkpoint"):
            load_model("etmamba_ti", path)

    def test_missing_checkpoint(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such checkpoint"):
            load_model("etmamba_ti", tmp_path / "weights.safetensors")

    def test_unknown_model(self):
        with pytest.raises(
            ValueError, match=r"unknown model 'etmamba_x' \(did you mean etmamba_s\?\); choose one of videomamba_ti,"
        ):
            load_model("etmamba_x")

    def test_a_model_of_timms_own(self, tmp_path):
        with pytest.raises(ValueError, match="unknown model 'test_vit'"):
            load_model("test_vit", allow_untrained=True)
        timm.models.save_for_hf(timm.create_model("test_vit"), tmp_path, safe_serialization=True)
        with pytest.raises(ValueError, match="config.json: architecture is 'test_vit'; it must be one of"):
            load_model(f"local-dir:{tmp_path}")

    def test_local_folder_in_the_hubs_layout(self, tmp_path, video):
        source = timm.create_model("etmamba_ti", **SMALL).eval()
        timm.models.save_for_hf(source, tmp_path, safe_serialization=True, model_args=SMALL)
        model = load_model(f"local-dir:{tmp_path}")
        torch.testing.assert_close(predict(model, video), predict(source, video))
