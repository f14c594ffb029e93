"""This package's folders in transformers: pipeline, Auto classes, Trainer, in both orders of imports."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hub_server import HubServer

import etmamba_timm  # noqa: F401 (registers the models)
from etmamba_timm.checkpoints import save_checkpoint
from etmamba_timm.checkpoints.convert import convert_checkpoint
from etmamba_timm.checkpoints.manifest import weights_folder
from etmamba_timm.checkpoints.save import KEPT_IN_FLOAT32
from etmamba_timm.data import EvalTransform, VideoError, VideoReader, Views, read_frames
from etmamba_timm.predict import load_model, predict, top_classes

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("etmamba_timm.hf")

SMALL = {"img_size": 32, "num_frames": 2, "embed_dim": 16, "depth": 2, "num_classes": 3}
NAMES = ["run", "jump", "roll"]
MOCAP = weights_folder() / "etmamba_ti.mocap"
VIDEOS = [weights_folder() / "sample_spinkick.mp4", Path(__file__).parent / "mocap/test/kick/0001.mp4"]


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(timm.create_model("etmamba_ti", **SMALL), tmp_path / "model", label_names=NAMES, stride=3)
    return tmp_path / "model"


def auto(folder, **kwargs):
    return transformers.AutoModelForVideoClassification.from_pretrained(folder, **kwargs).eval()


def same(results: list[dict], expected: list[dict]) -> None:
    assert [result["label"] for result in results] == [result["label"] for result in expected]
    for result, other in zip(results, expected, strict=True):
        assert result["score"] == pytest.approx(other["score"], abs=1e-6)


@pytest.mark.parametrize("views", [{}, {"num_clips": 2, "num_crops": 3}], ids=str)
def test_the_pipeline_says_what_predict_says(views):
    """With the same frames: the shipped model, in half precision, on videos of other lengths and sizes."""
    model = load_model("etmamba_ti.mocap")
    pipe = transformers.pipeline("video-classification", model=str(MOCAP))
    pipe.video_processor = transformers.AutoVideoProcessor.from_pretrained(MOCAP, **views)
    results = pipe([str(path) for path in VIDEOS])
    for path, result in zip(VIDEOS, results, strict=True):
        same(result, top_classes(model, predict(model, path, **views)))
    assert [result[0]["label"] for result in results] == ["spinkick", "kick"]
    (best,) = pipe(str(VIDEOS[0]), top_k=1)
    same([best], results[0][:1])


def test_the_pipeline_takes_other_numbers_of_frames(folder):
    model = load_model(f"local-dir:{folder}")
    pipe = transformers.pipeline("video-classification", model=str(folder))
    longer = timm.create_model(f"local-dir:{folder}", pretrained=True, num_frames=5).eval()
    same(pipe(str(VIDEOS[0]), num_frames=5), top_classes(longer, predict(longer, VIDEOS[0])))
    same(pipe(str(VIDEOS[0])), top_classes(model, predict(model, VIDEOS[0])))


@pytest.mark.parametrize(
    ("arguments", "overlay"),
    [
        ({}, {"crop_pct": 0.8, "interpolation": "bicubic", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}),
        ({"in_chans": 1, "img_size": (32, 64)}, {"interpolation": "nearest"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("stride", [None, 2, "spread"])
def test_the_processor_makes_the_views_of_predict(arguments, overlay, stride, tmp_path):
    model = timm.create_model("etmamba_ti", **SMALL | arguments, pretrained_cfg_overlay=overlay)
    save_checkpoint(model, tmp_path / "model", stride=stride)
    processor = transformers.AutoVideoProcessor.from_pretrained(tmp_path / "model", num_clips=2, num_crops=3)
    again = load_model(f"local-dir:{tmp_path / 'model'}")
    views = Views([VIDEOS[1]], EvalTransform.from_model(again, size=again.img_size), again.clip, 2, 3)
    expected = torch.cat([views.transform.normalize(view) for view in views.read(0)])  # [6, C, T, H, W]
    pixels = processor(VIDEOS[1])["pixel_values"]
    assert torch.equal(pixels, expected.transpose(1, 2)[None])
    processor.save_pretrained(tmp_path / "processor")
    saved = transformers.AutoVideoProcessor.from_pretrained(tmp_path / "processor")  # without a model
    assert torch.equal(saved(VIDEOS[1])["pixel_values"], pixels)
    assert saved.to_dict() == processor.to_dict()


class TestProcessor:
    @pytest.fixture
    def processor(self, folder):
        return transformers.AutoVideoProcessor.from_pretrained(folder)

    def test_files_and_decoded_frames_are_alike(self, processor):
        expected = processor(VIDEOS)["pixel_values"]
        assert expected.shape == (2, 2, 3, 32, 32)
        reader = VideoReader(VIDEOS[0])
        frames = reader.read(range(reader.info.num_frames))
        first = expected[:1]
        assert torch.equal(processor(str(VIDEOS[0]))["pixel_values"], first)
        assert torch.equal(processor(frames)["pixel_values"], first)
        assert torch.equal(processor(frames.permute(0, 3, 1, 2))["pixel_values"], first)
        assert torch.equal(processor([frames.numpy(), frames.numpy()])["pixel_values"], first.repeat(2, 1, 1, 1, 1))
        from PIL import Image

        assert torch.equal(processor([Image.fromarray(frame.numpy()) for frame in frames])["pixel_values"], first)
        clip = read_frames(VIDEOS[0], (reader.info.num_frames - 4) // 2 * np.array([1, 1]) + np.array([0, 3]))
        assert torch.equal(processor(clip, do_sample_frames=False)["pixel_values"], first)

    @pytest.mark.parametrize(
        ("video", "error", "message"),
        [
            ("missing.mp4", VideoError, "missing.mp4"),
            (__file__, VideoError, "test_hf.py"),
            ("https://example.org/clip.mp4", ValueError, "is an address; download the video"),
            (torch.zeros(4, 32, 32, 3), ValueError, "frames are torch.float32"),
        ],
        ids=["missing", "text", "address", "floats"],
    )
    def test_what_is_no_video(self, processor, video, error, message):
        with pytest.raises(error, match=message):
            processor(video)

    @pytest.mark.parametrize(
        "setting", [{"stride": 0}, {"num_crops": 2}, {"num_clips": 0}, {"resample": 1}, {"crop_pct": 2.0}], ids=str
    )
    def test_settings_that_can_not_be(self, folder, setting):
        processor = transformers.AutoVideoProcessor.from_pretrained(folder, **setting)
        name = "interpolation" if "resample" in setting else next(iter(setting))
        with pytest.raises(ValueError, match=f"{name} is '?{next(iter(setting.values()))}"):
            processor(VIDEOS[0])


class TestModel:
    clips = property(lambda self: torch.randn(4, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))

    @pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
    def test_logits_and_back_to_timm(self, dtype, tmp_path):
        """Whatever the weights are stored in, and however often they go round."""
        save_checkpoint(timm.create_model("etmamba_ti", **SMALL), tmp_path / "one", dtype=dtype, label_names=NAMES)
        model, ours = auto(tmp_path / "one"), load_model(f"local-dir:{tmp_path / 'one'}")
        expected = ours(self.clips.transpose(1, 2))
        assert model.dtype == torch.float32
        assert torch.equal(model(self.clips).logits, expected)
        model.save_pretrained(tmp_path / "two")
        assert torch.equal(auto(tmp_path / "two")(self.clips).logits, expected)
        again = load_model(f"local-dir:{tmp_path / 'two'}")
        assert torch.equal(again(self.clips.transpose(1, 2)), expected)
        assert (again.clip, list(again.pretrained_cfg["label_names"])) == (ours.clip, NAMES)
        save_checkpoint(model.timm_model, tmp_path / "three")
        assert torch.equal(auto(tmp_path / "three")(self.clips).logits, expected)

    def test_bfloat16_keeps_what_the_scan_uses_in_float32(self, folder):
        model = auto(folder, dtype=torch.bfloat16)
        kept = {name for name, value in model.named_parameters() if value.dtype == torch.float32}
        assert kept == {name for name, _ in model.named_parameters() if name.endswith(KEPT_IN_FLOAT32)}
        difference = model(self.clips.bfloat16()).logits.float() - auto(folder)(self.clips).logits
        assert 0 < difference.abs().max() < 0.02

    def test_views_are_averaged_by_their_probabilities(self, folder):
        model = auto(folder)
        logits = model(self.clips.unflatten(0, (2, 2)), return_dict=False)[0]
        expected = model(self.clips).logits.softmax(-1).unflatten(0, (2, 2)).mean(1)
        torch.testing.assert_close(logits.softmax(-1), expected, rtol=0, atol=1e-6)

    def test_several_labels(self, tmp_path):
        """The pipeline's scores are sigmoids, the loss is binary cross entropy, and the setting goes back to timm."""
        model = timm.create_model("etmamba_ti", **SMALL)
        torch.nn.init.normal_(model.head.weight)
        model.is_multilabel = True
        save_checkpoint(model, tmp_path / "model", label_names=NAMES, stride=3)
        views = {"num_clips": 2, "num_crops": 3}
        model = load_model(f"local-dir:{tmp_path / 'model'}")
        scores = predict(model, VIDEOS[0], **views)
        pipe = transformers.pipeline("video-classification", model=str(tmp_path / "model"))
        pipe.video_processor = transformers.AutoVideoProcessor.from_pretrained(tmp_path / "model", **views)
        same(pipe(str(VIDEOS[0])), top_classes(model, scores))
        assert not 0.9 < scores.sum() < 1.1
        labels, clips = torch.tensor([[1.0, 0, 1]]), torch.randn(1, 2, 3, 32, 32)
        out = auto(tmp_path / "model")(clips, labels=labels)
        torch.testing.assert_close(
            out.loss, torch.nn.functional.binary_cross_entropy_with_logits(out.logits, labels), rtol=1e-6, atol=1e-6
        )
        auto(tmp_path / "model").save_pretrained(tmp_path / "again")
        assert load_model(f"local-dir:{tmp_path / 'again'}").is_multilabel

    def test_loss(self, folder):
        model, labels = auto(folder), torch.tensor([0, 1, 2, 2])
        output = model(self.clips, labels=labels)
        assert output.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(output.logits, labels).item())
        several = auto(folder, problem_type="multi_label_classification")
        targets = torch.eye(3)[labels]
        expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, targets)
        assert several(self.clips, labels=targets).loss.item() == pytest.approx(expected.item())

    @pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 3, 2, 32, 32), (1, 1, 1, 2, 3, 32, 32)], ids=str)
    def test_pixel_values_of_another_shape(self, folder, shape):
        with pytest.raises(ValueError, match=r"pixel_values are \(.*; give clips \[B, T, C, H, W\]"):
            auto(folder)(torch.zeros(shape))

    def test_devices(self, folder):
        assert auto(folder, device_map="auto").device.type in ("cpu", "cuda")

    def test_a_new_model_is_initialised_as_timm_does_it(self, tmp_path):
        arguments = {key: value for key, value in SMALL.items() if key != "num_classes"}
        config = hf.EtMambaConfig(architecture="etmamba_ti", num_labels=3, model_args=arguments)
        torch.manual_seed(1)
        model = transformers.AutoModelForVideoClassification.from_config(config).eval()
        torch.manual_seed(1)
        other = timm.create_model("etmamba_ti", **SMALL).state_dict()
        assert all(torch.equal(v, other[k]) for k, v in model.timm_model.state_dict().items() if "head" not in k)
        assert model.timm_model.head.weight.std().item() == pytest.approx(0.02, rel=0.4)
        model.save_pretrained(tmp_path / "new")
        again = timm.create_model(f"local-dir:{tmp_path / 'new'}", pretrained=True).eval()
        assert torch.equal(again(self.clips.transpose(1, 2)), model(self.clips).logits)


class TestClasses:
    def test_names(self, folder):
        config = transformers.AutoConfig.from_pretrained(folder)
        assert config.id2label == dict(enumerate(NAMES))
        assert config.label2id == {name: i for i, name in enumerate(NAMES)}
        assert (config.num_labels, config.num_frames) == (3, 2)

    def test_another_number(self, folder, tmp_path, caplog):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            auto(folder, num_labels=5)
        torch.manual_seed(1)
        model, info = auto_with_info(folder, num_labels=5, ignore_mismatched_sizes=True)
        assert {key[0] for key in info["mismatched_keys"]} == {"timm_model.head.weight", "timm_model.head.bias"}
        assert model.config.id2label == {i: f"LABEL_{i}" for i in range(5)}
        assert 0.01 < model.timm_model.head.weight.std() < 0.03
        assert not model.timm_model.head.bias.any()
        before = auto(folder).state_dict()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if ".head." not in k)
        model.save_pretrained(tmp_path / "five")
        again = timm.create_model(f"local-dir:{tmp_path / 'five'}", pretrained=True)
        assert (again.num_classes, again.pretrained_cfg.get("label_names")) == (5, None)

    def test_other_names(self, folder, tmp_path):
        labels = {0: "a", 1: "b"}
        model = auto(folder, id2label=labels, label2id={"a": 0, "b": 1}, ignore_mismatched_sizes=True)
        assert model.timm_model.num_classes == 2
        model.save_pretrained(tmp_path / "two")
        again = timm.create_model(f"local-dir:{tmp_path / 'two'}", pretrained=True)
        assert list(again.pretrained_cfg["label_names"]) == ["a", "b"]
        assert transformers.AutoConfig.from_pretrained(tmp_path / "two").id2label == labels

    def test_a_model_without_classes(self, tmp_path):
        save_checkpoint(timm.create_model("etmamba_ti", **SMALL | {"num_classes": 0}), tmp_path / "features")
        with pytest.raises(ValueError, match="has no classifier here; give num_labels"):
            auto(tmp_path / "features")
        model, info = auto_with_info(tmp_path / "features", num_labels=4)
        assert info["missing_keys"] == {"timm_model.head.weight", "timm_model.head.bias"}
        assert model.timm_model.num_classes == 4

    def test_other_weights_are_not_made_up(self, folder):
        config = json.loads((folder / "config.json").read_text())
        config["model_args"]["img_size"] = 48
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"weights such as timm_model.pos_embed \(1 in all\) .* timm.create_model"):
            auto(folder, ignore_mismatched_sizes=True)
        config["model_args"] |= {"img_size": 32, "depth": 3}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"such as timm_model.blocks.2"):
            auto(folder)
        config["model_args"]["depth"] = 1
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"such as timm_model.blocks.1"):
            auto(folder)


def auto_with_info(folder, **kwargs):
    return transformers.AutoModelForVideoClassification.from_pretrained(folder, output_loading_info=True, **kwargs)


def test_figures_are_not_those_of_a_model_trained_further(tmp_path):
    auto(MOCAP).save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["card"] == {"licence": "Apache-2.0"}


@pytest.fixture
def own_accelerator():
    """Trainer's accelerator and its settings, which a process has once, don't outlive the test."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("own_accelerator")
def test_trainer(tmp_path):
    """Trains, resumes from its checkpoint, and saves what timm and a pipeline load."""
    folder = tmp_path / "model"
    model = timm.create_model("etmamba_ti", **SMALL, global_pool="avg")
    save_checkpoint(model, folder, label_names=NAMES, stride="spread")
    processor = transformers.AutoVideoProcessor.from_pretrained(folder)
    pixels = processor(VIDEOS)["pixel_values"]
    data = [{"pixel_values": clip, "labels": i} for i, clip in enumerate(pixels)] * 2

    def trainer(**more):
        settings = transformers.TrainingArguments(
            output_dir=tmp_path / "runs",
            max_steps=12,
            save_steps=6,
            logging_steps=1,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            **more,
        )
        return transformers.Trainer(auto(folder), settings, train_dataset=data, processing_class=processor)

    whole = trainer()
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < 0.5 * losses[0]
    resumed = trainer(gradient_checkpointing=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "runs/checkpoint-6"))
    assert resumed.model.timm_model.grad_checkpointing
    state = whole.model.state_dict()
    for key, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=1e-5, msg=key)
    whole.save_model(tmp_path / "out")
    model = whole.model.eval()
    expected = model(pixels).logits
    assert torch.equal(auto(tmp_path / "out")(pixels).logits, expected)
    assert torch.equal(load_model(f"local-dir:{tmp_path / 'out'}")(pixels.transpose(1, 2)), expected)
    pipe = transformers.pipeline("video-classification", model=str(tmp_path / "out"))
    assert [result[0]["label"] for result in pipe([str(path) for path in VIDEOS])] == NAMES[:2]


def test_a_folder_without_a_processor(folder, tmp_path):
    auto(folder).save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="requires either a video processor or an image processor|AutoVideoProcessor"):
        transformers.pipeline("video-classification", model=str(tmp_path / "alone"))(str(VIDEOS[0]))


def test_older_folders(folder, tmp_path):
    """They load in timm as ever, but transformers takes them for models of images."""
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "video_preprocessor_config.json").unlink()
    load_model(f"local-dir:{folder}")
    transformers.TimmWrapperForImageClassification.from_pretrained(folder)
    with pytest.raises(ValueError, match="Unrecognized configuration class .*TimmWrapperConfig"):
        auto(folder)
    with pytest.raises(OSError, match="video_preprocessor_config.json"):
        transformers.AutoVideoProcessor.from_pretrained(folder)
    convert_checkpoint(folder, tmp_path / "new")  # as README says
    pipe = transformers.pipeline("video-classification", model=str(tmp_path / "new"))
    assert {result["label"] for result in pipe(str(VIDEOS[0]))} == set(NAMES)


def test_published_and_used_by_its_name(folder, tmp_path):
    publish = [sys.executable, "-m", "etmamba_timm", "publish", str(folder), "me/tiny", "--licence", "MIT"]
    code = f"""
import etmamba_timm
from transformers import AutoVideoProcessor, pipeline
pipe = pipeline("video-classification", model="me/tiny")
print(AutoVideoProcessor.from_pretrained("me/tiny").stride, [r["score"] for r in pipe({str(VIDEOS[0])!r})])
"""
    with HubServer(tmp_path / "repos") as hub:
        environment = hub.environment(tmp_path / "home")
        subprocess.run(publish, env=environment | {"HF_TOKEN": "hf_loopback"}, check=True, capture_output=True)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stride, _, scores = done.stdout.partition(" ")
    assert stride == "3"
    pipe = transformers.pipeline("video-classification", model=str(folder))
    assert json.loads(scores) == pytest.approx([result["score"] for result in pipe(str(VIDEOS[0]))], abs=1e-6)


class TestImports:
    def run(self, code: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    @pytest.mark.parametrize(
        "imports",
        [
            "import etmamba_timm; from transformers import AutoConfig",
            "from transformers import AutoConfig; import etmamba_timm",
            "import importlib.util, etmamba_timm; importlib.util.find_spec('transformers'); "
            "from transformers import AutoConfig",
            "import etmamba_timm.hf; from transformers import AutoConfig",
        ],
    )
    def test_the_order_does_not_matter(self, folder, imports):
        done = self.run(f"{imports}; print(type(AutoConfig.from_pretrained({str(folder)!r})).__name__, end='')")
        assert (done.returncode, done.stdout) == (0, "EtMambaConfig"), done.stderr

    def test_without_this_package(self, folder):
        """What the model card and the README tell about."""
        done = self.run(f"from transformers import pipeline; pipeline('video-classification', model={str(folder)!r})")
        assert "has model type `etmamba_timm` but Transformers does not recognize this architecture" in done.stderr
        done = self.run(f"import timm; timm.create_model('local-dir:{folder}')")
        assert done.stderr.splitlines()[-1].startswith("RuntimeError: Unknown model")

    def test_without_transformers(self):
        code = "import sys; sys.modules['transformers'] = None; import etmamba_timm; import transformers"
        assert self.run(code).stderr.splitlines()[-1].startswith("ModuleNotFoundError: import of transformers halted")

    def test_a_transformers_that_does_not_fit(self, tmp_path):
        """It can be imported all the same, and the log says why the models aren't there."""
        (tmp_path / "transformers.py").write_text("version = 'too old'")
        code = f"import sys, etmamba_timm; sys.path.insert(0, {str(tmp_path)!r})"
        code += "; import transformers; print(transformers.version)"
        done = self.run(code)
        assert done.stdout == "too old\n"
        assert "etmamba_timm.hf can't be imported (ImportError: cannot import name 'AutoConfig'" in done.stderr
