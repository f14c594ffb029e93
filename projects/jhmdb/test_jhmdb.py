"""Lists, tables recounted from scores, changed frames, preparation and pretraining, on small generated clips."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from shapes import DIRECTIONS, write_shapes
from torch import nn

from etmamba_timm.checkpoints import read_checkpoint, save_checkpoint
from etmamba_timm.cli import main as etmamba
from etmamba_timm.data import open_video, read_dataset
from etmamba_timm.training.evaluate import Scores
from etmamba_timm.training.recipe import load_recipe
from etmamba_timm.training.train import build_model

from .. import order
from ..ablation import ROWS, table
from ..order import Changed, scores_with
from ..runs import read_log
from . import ablation, ingredients, prepare, pretrain, report
from .clips import ENDING, kinds_of_test, read_clips

TINY = ["num_frames=2", "size=32", "batch_size=4", "precision=no", "model_args={depth: 2, embed_dim: 32}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """In HMDB-51's layout, four clips of each class for training and two for the test; but of 'up' five and one."""
    root = tmp_path_factory.mktemp("hmdb51")
    write_shapes(root, 6, seed=0)
    (root / "splits").mkdir()
    for label in DIRECTIONS:
        lines = []
        for i, file in enumerate(sorted((root / label).iterdir())):
            source = f"film{i}" if i < 5 or label == "up" else "film9"
            name = f"{source}_{label}_f_cm_np1_le_med_{i}"
            file.rename(file.with_name(name + file.suffix))
            lines.append(f"{name}.avi {1 if i < 4 or source == 'film5' else 2}\n")
        (root / "splits" / f"{label}{ENDING}").write_text("".join(lines))
    return root


def test_the_lists_are_those_that_the_data_came_with():
    clips = read_clips()
    assert [sum(clip.part == part for clip in clips) for part in ("train", "test")] == [671, 257]
    assert len({clip.name for clip in clips}) == len(clips) == 928
    assert {name: sum(marks) for name, marks in kinds_of_test().items()} == {
        "test": 257,
        "strict": 201,
        "seen source": 56,
    }
    of_train = {(clip.label, clip.source) for clip in clips if clip.part == "train"}
    assert not of_train & {(clip.label, clip.source) for clip in clips if clip.part == "test"}


def test_clips_are_in_the_order_of_the_layout(data):
    for part in ("train", "test"):
        names = [Path(str(path)).stem for path, _ in read_dataset("hmdb51", data, part).samples]
        assert names == [clip.name for clip in read_clips(data / "splits") if clip.part == part]


def test_a_source_counts_as_seen_under_any_class(tmp_path):
    (tmp_path / f"clap{ENDING}").write_text("A_clap_u_0.avi 1\nB_clap_u_0.avi 2\nC_clap_u_0.avi 2\n")
    (tmp_path / f"wave{ENDING}").write_text("B_wave_u_0.avi 1\nA_wave_u_0.avi 2\n")
    assert kinds_of_test(tmp_path) == {
        "test": [True, True, True],
        "strict": [False, True, False],
        "seen source": [True, False, True],
    }


def scores(taken_for: list[int], labels: list[int], classes: int = 3) -> Scores:
    """One-hot scores of videos 0, 1, ..."""
    rows = torch.eye(classes)[taken_for]
    return Scores(rows, torch.tensor(labels), torch.arange(len(labels)), 0, 0, [str(i) for i in range(classes)])


KINDS = {
    "test": [True] * 6,
    "strict": [True, True, False, True, True, False],
    "seen source": [False, False, True, False, False, True],
}
FOUND = scores([0, 1, 0, 0, 1, 2], [0, 0, 0, 0, 1, 1])  # 3 of 4 right, and 1 of 2


def test_accuracy_over_videos_and_over_classes():
    found = report.share_right(FOUND, KINDS["test"])
    assert found["videos"] == pytest.approx((4 / 6, (4 / 6 * 2 / 6 / 6) ** 0.5))
    assert found["classes"] == pytest.approx(((3 / 4 + 1 / 2) / 2, (3 / 16 / 4 + 1 / 4 / 2) ** 0.5 / 2))
    strict = report.share_right(FOUND, KINDS["strict"])
    assert strict["videos"][0] == 3 / 4
    assert strict["classes"][0] == pytest.approx((2 / 3 + 1) / 2)


def test_a_video_that_could_not_be_decoded_does_not_move_the_others():
    kept = torch.tensor([0, 1, 3, 4, 5])
    part = Scores(FOUND.probabilities[kept], FOUND.labels[kept], kept, 1, 0, FOUND.classes)
    assert report.share_right(part, KINDS["seen source"])["videos"][0] == 0
    assert report.share_right(part, KINDS["strict"])["videos"][0] == 3 / 4


def test_scores_of_other_videos_are_refused():
    with pytest.raises(ValueError, match="scores of 6 videos, 0 missing; evaluate all 5"):
        report.share_right(FOUND, [True] * 5)


def test_the_table_is_recounted_from_scores():
    other = scores([0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1])
    lines = report.table({"one": [FOUND], "two seeds": [FOUND, other]}, KINDS).splitlines()
    assert lines[0] == (
        "| | test (6), over videos | over classes | strict test (4), over videos | over classes "
        "| source in training under another class (2) |"
    )
    assert lines[2] == "| one | 66.7% ± 19.2 | 62.5% ± 20.7 | 75.0% ± 21.7 | 83.3% ± 13.6 | 50.0% ± 35.4 |"
    assert lines[3].startswith("| two seeds | 83.3% (66.7%–100.0%) | 81.2% (62.5%–100.0%) |")


def test_the_ablations_table_is_recounted_from_kept_scores(tmp_path):
    test = [clip for clip in read_clips() if clip.part == "test"]
    classes = list(ablation.ABLATION.classes)
    labels = torch.tensor([classes.index(clip.label) for clip in test])

    def right_on(count: int) -> Scores:
        taken = torch.where(torch.arange(len(labels)) < count, labels, (labels + 1) % len(classes))
        return Scores(torch.eye(len(classes))[taken], labels, torch.arange(len(labels)), 0, 0, classes)

    counts = {"real": 100, "one_frame": 40, "shuffled": 60}
    runs = [(row, seed) for row in ROWS for seed in range(2)]
    every = {f"{r}-{s}-{change}": right_on(n + s) for r, s in runs for change, n in counts.items()}
    report.keep(every, tmp_path / "kept.safetensors")
    found = report.kept(tmp_path / "kept.safetensors")
    assert found.keys() == every.keys()
    first = ablation.accuracies(found, "a-0")
    assert first["test"] == pytest.approx(100 / 257)
    strict = [is_strict for is_strict, _ in zip(kinds_of_test()["strict"], range(100), strict=False)]
    assert first["strict"] == pytest.approx(sum(strict) / 201)
    assert (first["one_frame"], first["shuffled"]) == pytest.approx((40 / 257, 60 / 257))
    cost = {"parameters": 1e6, "multiply_adds": 1e8, "step_ms_a_clip": 10}
    rows = [{"row": row} | cost | ablation.accuracies(found, f"{row}-{seed}") for row, seed in runs]
    lines = table(rows, ablation.COLUMNS).splitlines()
    assert lines[0].endswith("| test top-1 | mean of classes | strict test | test, one frame | test, shuffled |")
    assert lines[-1].startswith("| (d) `etmamba_ti` | 1.00 M | 100 M | 1.00 | 39.1% (38.9%–39.3%) |")


class Order(nn.Module):
    """Gives back the numbers that its clips' frames show."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        self.seen += clips[:, 0, :, 0, 0].long().tolist()
        return clips.new_zeros(len(clips), 2)


def test_one_frame_is_the_middle_one_and_shuffled_frames_are_all_there():
    clips = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(5, 3, 8, 2, 2)
    assert Changed(frames := Order(), "one_frame")(clips).shape == (5, 2)
    assert frames.seen == [[4] * 8] * 5
    orders = []
    for batch in (1, 5):
        changed = Changed(frames := Order(), "shuffled")
        for part in clips.split(batch):
            changed(part)
        orders.append(frames.seen)
    assert orders[0] == orders[1]  # whatever the batch size
    assert all(sorted(seen) == list(range(8)) for seen in orders[0])
    assert len({tuple(seen) for seen in orders[0]}) == 5


def test_scores_with_changed_frames_are_measured_once(data, tmp_path, monkeypatch):
    recipe = load_recipe(ablation.ABLATION.recipe, model="etmamba_ti", model_args={"depth": 1, "embed_dim": 32})
    torch.manual_seed(0)
    save_checkpoint(build_model(recipe, sorted(DIRECTIONS)), tmp_path / "model", label_names=sorted(DIRECTIONS))
    file, model = tmp_path / "one.safetensors", f"local-dir:{tmp_path / 'model'}"
    found = scores_with("one_frame", model, data, file)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2, 3]  # 'up' has one test clip
    monkeypatch.setattr(order, "load_model", None)
    assert torch.equal(scores_with("one_frame", "none", data, file).probabilities, found.probabilities)


@pytest.mark.parametrize("name", ["recipe", "quick", "short", "pretrain"])
def test_recipes_can_be_read(name):
    recipe = load_recipe(Path(__file__).with_name(f"{name}.yaml"))
    assert recipe.dataset == "hmdb51"


@pytest.mark.parametrize("name", ingredients.INGREDIENTS)
def test_ingredients_change_the_plain_recipe(name):
    text = [f"{key}={value}" for key, value in ingredients.INGREDIENTS[name].items()]
    plain = load_recipe(ingredients.RECIPE)
    changed = load_recipe(ingredients.RECIPE, **pretrain.parse_overrides(text))
    assert (changed == plain) == (name == "plain")


def test_prepared_clips_have_the_same_frames_and_a_short_side(data, tmp_path):
    prepare.prepare(data, tmp_path, data / "splits", side=16)
    for part in ("train", "test"):
        made = read_dataset("hmdb51", tmp_path, part)
        assert not made.missing
        for (path, _), (source, _) in zip(made.samples, read_dataset("hmdb51", data, part).samples, strict=True):
            info, old = open_video(path).info, open_video(source).info
            assert (info.height, info.width, info.num_frames) == (16, 16, old.num_frames)
            new_frames, old_frames = (open_video(p).read(range(old.num_frames)).float() for p in (path, source))
            small = nn.functional.avg_pool2d(old_frames.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
            assert (new_frames - small).abs().mean() < 12  # of 255
    with pytest.raises(ValueError, match="24 of 24 clips aren't below"):
        prepare.prepare(tmp_path / "splits", tmp_path / "other", data / "splits")


@pytest.fixture
def masked():
    recipe = load_recipe(pretrain.RECIPE, num_frames=3, size=32, model_args={"depth": 1, "embed_dim": 32})
    return pretrain.Masked(build_model(recipe, []), "pixels")


def test_the_page_has_what_the_scores_say():
    root = Path(__file__).parents[2]
    page, weights, readme = ((root / name).read_text() for name in ("docs/jhmdb.md", "docs/weights.md", "README.md"))
    kinds = kinds_of_test()
    for name, row in (
        ("motion", "motion, mixed clips"),
        ("one frame", "the same model, middle frame alone"),
        ("shuffled", "the same model, frames shuffled"),
    ):
        scores = report.kept(report.RESULTS / "jhmdb_test.safetensors")[name]
        (test, error), (classes, _) = report.share_right(scores, kinds["test"]).values()
        strict, strict_error = report.share_right(scores, kinds["strict"])["videos"]
        first = f"**{test:.1%}**" if name == "motion" else f"{test:.1%}"
        cells = f"{first} ± {100 * error:.1f} | {classes:.1%} | {strict:.1%} ± {100 * strict_error:.1f}"
        assert f"| {row} | {cells} |" in page
        if name == "motion":
            assert f"(jhmdb.md) of J-HMDB, 21 actions | not in the package | {test:.1%} |" in weights
            assert f"[{test:.1%} of 21 actions](docs/jhmdb.md)" in readme
    best = max(read_log(report.RESULTS / "jhmdb_val.csv"), key=lambda row: row["top1"])
    assert f"{best['top1']:.1%} on the {best['epoch'] + 1:.0f}th" in page


def test_patches_are_cut_where_the_model_cuts_them(masked):
    clips = torch.randn(2, 3, 3, 32, 32)
    wanted = masked.wanted(clips)
    assert wanted.shape == (2, 3, 2, 2, 16 * 16 * 3)
    patch = clips[1, :, 2, 16:, :16].permute(1, 2, 0).flatten()
    torch.testing.assert_close(wanted[1, 2, 1, 0], (patch - patch.mean()) / (patch.std() + 1e-3))
    masked.target = "motion"
    assert masked.wanted(clips[:, :, :1].expand_as(clips)).abs().max() == 0
    motion = masked.wanted(clips)
    assert torch.equal(motion[:, 1], motion[:, 2])  # nothing follows the last frame


def test_masked_pixels_are_hidden_from_the_model(masked):
    masked.eval()
    masked.wanted = lambda clips: torch.zeros(2, 3, 2, 2, 16 * 16 * 3)
    clips = torch.randn(2, 3, 3, 32, 32)
    torch.manual_seed(3)
    order = torch.rand(2, 4).argsort(1)
    left = (order == 3).view(2, 1, 1, 2, 2).repeat_interleave(16, 3).repeat_interleave(16, 4)  # a quarter of 4 patches
    others = torch.where(left, clips, torch.randn_like(clips))
    losses = []
    for given in (clips, others, clips + 1.0):
        torch.manual_seed(3)
        losses.append(masked(given))
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def run_pretraining(data: Path, out: Path, epochs: int) -> list[dict]:
    settings = [*TINY, f"epochs={epochs}", "warmup_epochs=0.5", "drop_path=0.2"]
    recipe = load_recipe(pretrain.RECIPE, **pretrain.parse_overrides(settings))
    pretrain.pretrain(recipe, pretrain.training_videos([data]), out, "pixels")
    with (out / "train.csv").open() as file:
        return list(csv.DictReader(file))


def test_pretraining_resumes_and_train_takes_its_weights(data, tmp_path, monkeypatch):
    assert len(pretrain.training_videos([data]).samples) == 17
    whole = run_pretraining(data, tmp_path / "whole", 3)
    weights = tmp_path / "whole" / "model" / "model.safetensors"
    assert whole[-1]["update"] == "12"
    assert read_checkpoint(weights).num_classes == 0

    monkeypatch.setattr(pretrain, "SAVE_UPDATES", 3)
    interrupted = torch.save

    def save(*args):
        interrupted(*args)
        if args[0]["update"] == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        run_pretraining(data, tmp_path / "parts", 3)
    monkeypatch.undo()
    resumed = run_pretraining(data, tmp_path / "parts", 3)
    assert resumed[-1]["update"] == "12"
    one, other = (read_checkpoint(tmp_path / name / "model").tensors for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    shutil.rmtree(tmp_path / "parts")

    common = ["train", "--recipe", str(ablation.ABLATION.recipe), "--data", str(data), "--workers", "0"]
    model = ["--model", "etmamba_ti", "--checkpoint", str(weights)]
    settings = ["--set", *TINY, "epochs=1", "warmup_epochs=0", "eval_epochs=1"]
    assert etmamba([*common, *model, "-o", str(tmp_path / "run"), *settings]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
