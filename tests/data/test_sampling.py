"""Clip sampling, by a table worked out by hand and by what must hold for all arguments."""

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etmamba_timm.data import random_clip, random_segments, sample_clips, sample_segments


@pytest.mark.parametrize(
    ("video", "frames", "stride", "clips", "expected"),
    [
        # a clip spans 7 frames: 0 . 2 . 4 . 6
        (7, 4, 2, 1, [[0, 2, 4, 6]]),  # fits exactly
        (8, 4, 2, 1, [[0, 2, 4, 6]]),  # one left over: it stays behind
        (9, 4, 2, 1, [[1, 3, 5, 7]]),
        (17, 4, 2, 1, [[5, 7, 9, 11]]),
        (17, 4, 2, 2, [[0, 2, 4, 6], [10, 12, 14, 16]]),
        (17, 4, 2, 3, [[0, 2, 4, 6], [5, 7, 9, 11], [10, 12, 14, 16]]),
        (17, 4, 2, 4, [[0, 2, 4, 6], [3, 5, 7, 9], [6, 8, 10, 12], [10, 12, 14, 16]]),
        (8, 4, 2, 3, [[0, 2, 4, 6], [0, 2, 4, 6], [1, 3, 5, 7]]),  # fewer starts than clips
        # shorter than the span
        (6, 4, 2, 1, [[0, 2, 4, 5]]),
        (3, 4, 2, 2, [[0, 2, 2, 2], [0, 2, 2, 2]]),
        (1, 4, 2, 1, [[0, 0, 0, 0]]),
        # single frames
        (5, 1, 1, 1, [[2]]),
        (5, 1, 9, 5, [[0], [1], [2], [3], [4]]),
        (10, 4, 1, 1, [[3, 4, 5, 6]]),
    ],
)
def test_table(video, frames, stride, clips, expected):
    assert sample_clips(video, frames, stride, clips) == expected


def test_defaults_are_the_papers():
    assert sample_clips(300) == [list(range(134, 166, 2))]


COUNTS = st.integers(1, 60)


@given(st.integers(1, 400), COUNTS, st.integers(1, 20), st.integers(1, 12))
def test_properties(video, num_frames, stride, num_clips):
    clips = sample_clips(video, num_frames, stride, num_clips)
    assert len(clips) == num_clips
    for clip in clips:
        assert len(clip) == num_frames
        assert 0 <= clip[0] <= clip[-1] < video
        steps = [after - before for before, after in pairwise(clip)]
        in_range = [step for step, after in zip(steps, clip[1:], strict=True) if after < video - 1]
        assert all(step == stride for step in in_range)
        assert all(0 <= step <= stride for step in steps)
    span = (num_frames - 1) * stride + 1
    starts = [clip[0] for clip in clips]
    if video < span:
        assert clips == [[min(i * stride, video - 1) for i in range(num_frames)]] * num_clips
    elif num_clips == 1:
        before, after = starts[0], video - (starts[0] + span)
        assert after - before in (0, 1)
    else:
        assert (starts[0], starts[-1]) == (0, video - span)
        gaps = [after - before for before, after in pairwise(starts)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    ("position", "name", "remedy"),
    [
        (0, "num_video_frames", "at least one frame"),
        (1, "num_frames", "at least one frame in a clip"),
        (2, "stride", "use 1 for neighbouring frames"),
        (3, "num_clips", "at least one clip"),
    ],
)
def test_arguments_below_one(position, name, remedy, value):
    arguments = [10, 4, 2, 1]
    arguments[position] = value
    with pytest.raises(ValueError, match=rf"^{name} is {value}; .*{remedy}"):
        sample_clips(*arguments)


@pytest.mark.parametrize(
    ("video", "frames", "clips", "expected"),
    [
        (8, 4, 1, [[1, 3, 5, 7]]),
        (30, 3, 1, [[5, 15, 25]]),
        (30, 3, 2, [[2, 12, 22], [7, 17, 27]]),
        (4, 4, 1, [[0, 1, 2, 3]]),
        (2, 4, 1, [[0, 0, 1, 1]]),  # shorter than the clip: frames are repeated
        (1, 3, 2, [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_segments(video, frames, clips, expected):
    assert sample_segments(video, frames, clips) == expected


@given(st.integers(1, 400), COUNTS, st.integers(1, 20), st.integers(0, 1000))
def test_random_clips_are_dense_clips(video, num_frames, stride, seed):
    clip = random_clip(video, num_frames, stride, random=Random(seed))
    last = video - 1
    assert clip == [min(clip[0] + i * stride, last) for i in range(num_frames)]
    assert 0 <= clip[0] <= max(0, last - (num_frames - 1) * stride)


@given(st.integers(1, 400), COUNTS, st.integers(0, 1000))
def test_random_segments_stay_in_their_segments(video, num_frames, seed):
    clip = random_segments(video, num_frames, random=Random(seed))
    for i, frame in enumerate(clip):
        first, after = i * video // num_frames, (i + 1) * video // num_frames
        assert first <= frame < max(after, first + 1)
    assert clip == sorted(clip)


def test_random_starts_reach_both_ends():
    starts = {random_clip(20, 4, 2, random=Random(seed))[0] for seed in range(300)}
    assert starts == set(range(14))
