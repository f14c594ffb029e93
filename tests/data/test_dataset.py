"""Datasets of clips from real encoded files, damaged ones among them; transforms alike on all frames."""

import logging
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from videos import numbers, write_video

from etmamba_timm.data import (
    Annotations,
    Clip,
    EvalClips,
    EvalTransform,
    TrainClips,
    TrainTransform,
    VideoError,
    collate,
    read_ahead,
)
from etmamba_timm.data.augment import blend_still


@pytest.fixture(scope="module")
def annotations(tmp_path_factory) -> Annotations:
    """Three videos, the last of which is damaged beyond reading."""
    folder = tmp_path_factory.mktemp("videos")
    good = [write_video(folder / "a.mp4", 30), write_video(folder / "b.webm", 9, codec="libvpx-vp9", first_number=100)]
    bad = folder / "c.mp4"
    bad.write_bytes(good[0].read_bytes()[:200])
    return Annotations([(path, i) for i, path in enumerate([*good, bad])], ["a", "b", "c"], [])


def as_numbers(frames: torch.Tensor) -> torch.Tensor:
    """A transform that shows which frames came: [1, T, 1, 1]."""
    return torch.tensor(numbers(frames)).view(1, -1, 1, 1).float()


def test_training_clips_depend_on_seed_epoch_and_index_alone(annotations):
    data = TrainClips(annotations, as_numbers, Clip(4, 2))
    random.seed(1)
    first = data[0]["clip"].flatten().tolist()
    assert [b - a for a, b in pairwise(first)] == [2, 2, 2]
    random.seed(2)
    assert data[0]["clip"].flatten().tolist() == first
    workers = DataLoader(data, batch_size=2, num_workers=2, collate_fn=collate)
    assert next(iter(workers))["clip"][0].flatten().tolist() == first
    seen = set()
    for data.epoch in range(20):
        seen.add(tuple(data[0]["clip"].flatten().tolist()))
    assert len(seen) > 5
    assert TrainClips(annotations, as_numbers, Clip(4, 2), seed=1)[0]["clip"].flatten().tolist() != first
    data.epoch = 0
    again = [data[i] for i in (0, 3, 6, 9, 12)]  # further clips of the first of three videos
    assert [item["index"] for item in again] == [0] * 5
    assert len({tuple(item["clip"].flatten().tolist()) for item in again}) > 2


def test_the_global_generators_are_left_as_they_were(annotations):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    TrainClips(annotations, TrainTransform((32, 32)), Clip(4, 2))[0]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_training_takes_the_next_video_for_one_that_cannot_be_decoded(annotations, caplog):
    data = TrainClips(annotations, as_numbers, Clip(4, 2))
    batch = collate([data[0], data[2], data[1], data[2]])
    assert batch["label"].tolist() == batch["index"].tolist() == [0, 0, 1, 0]
    assert torch.equal(batch["clip"][0], batch["clip"][1])
    assert caplog.text.count("left out") == 1
    bad = Annotations(annotations.samples[2:] * 3, annotations.classes, [])
    with pytest.raises(VideoError, match="c.mp4: 3 videos in a row, starting with this one, can't be decoded"):
        TrainClips(bad, as_numbers, Clip(4, 2))[1]


def test_a_broken_file_is_told_of_once_by_all_workers_in_all_passes(tmp_path):
    """A file that can't be read, one whose end is missing, and both again as further clips and in evaluations."""
    good = write_video(tmp_path / "a.mp4", 60)
    (tmp_path / "none.mp4").write_bytes(good.read_bytes()[:200])
    write_video(tmp_path / "cut.mp4", 60, container={"movflags": "faststart"})
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:-1500])
    samples = [(tmp_path / name, 0) for name in ("a.mp4", "none.mp4", "cut.mp4")]
    logger, handler = logging.getLogger("etmamba_timm"), logging.FileHandler(tmp_path / "log")
    logger.addHandler(handler)  # also in the workers
    try:
        training = TrainClips(Annotations(samples * 2, ["a"], []), as_numbers, Clip(4, 2))
        for training.epoch in range(3):
            list(DataLoader(training, batch_size=2, num_workers=2, collate_fn=collate))
        told = (tmp_path / "log").read_text().splitlines()
        evaluation = EvalClips(Annotations(samples, ["a"], []), EvalTransform((32, 32)), Clip(4, 2))
        for _ in range(2):
            for index, clip in read_ahead(evaluation.views(), range(3), workers=2):
                if isinstance(clip, VideoError):
                    evaluation.leave_out(index, clip)
    finally:
        logger.removeHandler(handler)
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(told) == sorted(lines[len(told) :])
    assert len(told) == 2
    assert sum("none.mp4" in line for line in told) == sum("the file is cut off" in line for line in told) == 1


def test_evaluation_leaves_out_what_cannot_be_decoded(annotations, caplog):
    data = EvalClips(annotations, EvalTransform((32, 32)), Clip(4, 2))
    assert collate([data[0], data[2], data[2]])["index"].tolist() == [0]
    assert collate([data[2]]) is None
    assert caplog.text.count("left out") == 1
    assert "c.mp4" in caplog.text


def test_evaluation_leaves_out_what_is_too_elongated(tmp_path, caplog):
    write_video(tmp_path / "line.mkv", num_frames=8, height=2, width=2048)
    data = EvalClips(Annotations([(tmp_path / "line.mkv", 0)], ["a"], []), EvalTransform((224, 224)), Clip(4, 2))
    assert data[0] is None
    assert "line.mkv: frames are 2×2048" in caplog.text
    assert "too elongated" in caplog.text


@pytest.mark.parametrize(
    ("stride", "clips", "expected"),
    [
        (2, 1, [[11, 13, 15, 17]]),
        (2, 2, [[0, 2, 4, 6], [23, 25, 27, 29]]),
        ("spread", 1, [[3, 11, 18, 26]]),
        ("spread", 2, [[1, 9, 16, 24], [5, 13, 20, 28]]),
    ],
)
def test_views_for_evaluation(annotations, stride, clips, expected):
    data = EvalClips(annotations, lambda frames, crops: as_numbers(frames)[None], Clip(4, stride), clips)
    assert data[0]["clip"].flatten(1).tolist() == expected
    assert data[2] is None


def test_crops_times_clips(annotations):
    data = EvalClips(annotations, EvalTransform((32, 32)), Clip(4, 2), num_clips=2, num_crops=3)
    assert data[1]["clip"].shape == (6, 3, 4, 32, 32)
    batch = next(iter(DataLoader(data, batch_size=3, collate_fn=collate)))
    assert batch["clip"].shape == (2, 6, 3, 4, 32, 32)


@pytest.mark.parametrize("kind", ["rand-m9-mstd0.5-inc1", ""])
def test_frames_of_a_clip_are_treated_alike(kind):
    """A clip of one picture repeated stays a picture repeated, whatever is drawn; erased noise is new in each frame."""
    picture = torch.randint(0, 256, (1, 40, 60, 3), dtype=torch.uint8).repeat(5, 1, 1, 1)
    outs = []
    for seed in range(8):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        clip = TrainTransform((32, 32), rand_augment=kind, erasing=0.0)(picture)
        assert (clip.dtype, clip.shape) == (torch.float32, (3, 5, 32, 32))
        assert torch.equal(clip, clip[:, :1].expand_as(clip))
        outs.append(clip)
    assert len({out.sum().item() for out in outs}) > 4


def test_the_strongest_augmentation_is_one_that_pillow_takes():
    """At timm's magnitude 10 a picture would be posterised to 0 bits, which newer Pillows refuse."""
    frames = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8)
    transform = TrainTransform((16, 16), rand_augment="rand-m10-inc1")
    for seed in range(100):
        random.seed(seed), np.random.seed(seed)
        assert transform(frames).isfinite().all()


def test_the_same_rectangle_is_erased_in_all_frames():
    frames = torch.zeros(4, 32, 32, 3, dtype=torch.uint8)
    transform = TrainTransform((32, 32), (0.0,) * 3, (1.0,) * 3, flip=0.0, rand_augment="", erasing=1.0)
    erased = (transform(frames) != 0).all(0)  # [T, h, w]
    assert 0.01 < erased.float().mean() < 0.4
    assert torch.equal(erased, erased[:1].expand_as(erased))


def test_no_flip_where_left_and_right_matter():
    frames = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    frames[:, :, :8] = 255
    plain = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "rand_augment": "", "erasing": 0.0}
    for flip, lefts in ((0.0, {True}), (0.5, {True, False}), (1.0, {False})):
        transform = TrainTransform((16, 16), flip=flip, **plain)
        assert {bool(transform(frames)[0, 0, 0, 0] > 0) for _ in range(30)} == lefts


@pytest.mark.parametrize(
    ("field", "value"),
    [("flip", 1.5), ("erasing", -0.1), ("mean", (0.5,)), ("rand_augment", "none"), ("rand_augment", "augmix-m3-w3")],
)
def test_bad_arguments(field, value):
    with pytest.raises(ValueError, match=field):
        TrainTransform(**{field: value})


def test_clips_are_blended_with_one_still_frame_of_another_clip():
    clips = torch.rand(6, 3, 4, 5, 5)
    torch.manual_seed(1)
    blended = blend_still(clips, 0.5)
    kept = (blended.diff(dim=2) / clips.diff(dim=2)).flatten(1)  # the still frame falls out of the change in time
    shares = 1 - kept.mean(1)
    torch.testing.assert_close(kept, (1 - shares)[:, None].expand_as(kept), atol=1e-3, rtol=0)
    assert 0 <= shares.min() < shares.max() <= 0.5
    stills = (blended - (1 - shares).view(-1, 1, 1, 1, 1) * clips) / shares.view(-1, 1, 1, 1, 1)
    times = []
    for still, other in zip(stills, clips.roll(1, 0), strict=True):
        apart = (other - still.mean(1, keepdim=True)).abs().amax((0, 2, 3))  # of each frame
        assert apart.min() < 1e-3
        times.append(int(apart.argmin()))
    assert len(set(times)) > 1
    assert torch.equal(blend_still(clips, 0.0), clips)
