"""The one value that says how a clip is sampled, wherever it is written."""

import json

import numpy as np
import pytest

from etmamba_timm.clip import Clip, parse_stride


@pytest.mark.parametrize("clip", [Clip(8, 2), Clip(16, "spread"), Clip(1), Clip(64, 1)])
def test_it_comes_back_from_config_json(clip):
    assert Clip.from_config(json.loads(json.dumps(clip.to_config()))) == clip


@pytest.mark.parametrize(
    ("clip", "words"), [(Clip(8, 3), "3 apart"), (Clip(8, "spread"), "spread over"), (Clip(8), "at an unknown stride")]
)
def test_it_is_told_in_words(clip, words):
    assert words in clip.spacing


def test_an_unknown_stride_becomes_the_papers_and_no_other_changes():
    assert Clip(8).known() == Clip(8, 2)
    assert Clip(8, 3).known() == Clip(8, 3)
    assert Clip(8, "spread").known().is_spread


@pytest.mark.parametrize("stride", [0, -1, 1.5, True, "wide", "2", [2]])
def test_strides_that_are_none(stride):
    with pytest.raises(
        ValueError, match="stride is .* it must be the number of frames from one to the next .* or 'spread'"
    ):
        Clip(8, stride)


@pytest.mark.parametrize("frames", [0, None, "8", True])
def test_numbers_of_frames_that_are_none(frames):
    with pytest.raises(ValueError, match="num_frames is .* 1 or more"):
        Clip(frames)


@pytest.mark.parametrize(("text", "stride"), [("2", 2), ("spread", "spread")])
def test_command_lines(text, stride):
    assert parse_stride(text) == stride


@pytest.mark.parametrize("text", ["0", "", "two", "1.5", "-1", "²"])
def test_command_lines_that_say_nothing(text):
    with pytest.raises(ValueError, match="it must be the number of frames from one to the next"):
        parse_stride(text)


def test_numpy_integers_become_ints():
    clip = Clip(np.int64(8), np.int64(2))
    assert json.loads(json.dumps(clip.to_config())) == {"num_frames": 8, "stride": 2}


def test_settings_it_does_not_have():
    with pytest.raises(ValueError, match="unknown settings strides; a clip has num_frames and stride"):
        Clip.from_config({"num_frames": 3, "strides": 2})
