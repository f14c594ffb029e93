"""Timelines of real long videos: what happens when, to within a hop."""

import csv
import json
import weakref
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from etmamba_timm.cli import main
from etmamba_timm.clip import Clip, Stride
from etmamba_timm.data import VideoError, VideoReader
from etmamba_timm.seeing.timeline import Segment, Timeline, _batches, plot_timeline, timeline, write_segments

COLOURS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230)}


class ByColour(nn.Module):
    """Red, green or blue: the colour that a clip has most of. Counts the clips that it is given."""

    num_frames, img_size, in_chans, num_classes, global_pool = 4, (16, 16), 3, 3, "token"

    def __init__(self, stride: Stride = 2) -> None:
        super().__init__()
        self.clip = Clip(self.num_frames, stride)
        self.pretrained_cfg = {"label_names": list(COLOURS), "input_size": (3, 16, 16), "mean": (0.5,) * 3}
        self.pretrained_cfg |= {"std": (0.5,) * 3}
        self.scale = nn.Parameter(torch.tensor(5.0))
        self.clips = 0
        self.eval()

    def forward(self, clips: Tensor) -> Tensor:
        self.clips += len(clips)
        return clips.mean((2, 3, 4)) * self.scale


def write_colours(path: Path, parts: list[tuple[str, float]], fps: int = 20, pts: list[int] | None = None) -> Path:
    """A video of these colours, each for so many seconds; `pts` are the frames' own times in 1/1000 s."""
    frames = [colour for colour, seconds in parts for _ in range(round(seconds * fps))]
    base = Fraction(1, 1000) if pts else Fraction(1, fps)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=fps)
        stream.width = stream.height = 32
        stream.pix_fmt, stream.options = "yuv420p", {"g": "10", "bf": "0"}
        stream.codec_context.time_base = base
        for i, colour in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), COLOURS[colour], np.uint8), format="rgb24")
            frame.pts, frame.time_base = pts[i] if pts else i, base
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


PARTS = [("red", 3), ("blue", 2), ("red", 2.5), ("green", 4)]


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_colours(tmp_path_factory.mktemp("video") / "long.mp4", PARTS)


@pytest.mark.parametrize(("clip_seconds", "hop"), [(None, None), (0.8, 0.1), (1.0, 0.5), (0.4, 0.37)])
def test_segments_are_those_of_the_video(video, clip_seconds, hop):
    found = timeline(ByColour(), video, clip_seconds=clip_seconds, hop=hop)
    hop = hop or 0.2  # half of 4 frames, 2 apart, at 20 a second
    assert found.times[0, 0] == 0
    assert found.times[-1, 1].item() == pytest.approx(11.5)
    assert torch.equal(found.times[1:, 0], found.times[:-1, 1])
    segments = found.segments(smooth=1)
    assert [segment.label for segment in segments] == ["red", "blue", "red", "green"]
    for segment, start in zip(segments, (0, 3, 5, 7.5), strict=True):
        assert abs(segment.start - start) <= hop + 1e-6
        assert segment.score > 0.8


def test_each_moment_is_the_mean_of_the_clips_that_cover_it(video):
    model = ByColour()
    found = timeline(model, video, clip_seconds=1.0, hop=0.5)
    frames = VideoReader(video).read(range(230)).float().mean((1, 2)) / 127.5 - 1  # [frames, 3]
    scores = []
    for start in range(0, 220, 10):  # clips of 20 frames every 10
        picked = [start + offset for offset in (2, 7, 12, 17)]
        scores.append((frames[[min(i, 229) for i in picked]].mean(0) * 5).softmax(-1))
    assert model.clips == 22
    expected = torch.stack([scores[max(0, i - 1)] / 2 + scores[min(i, 21)] / 2 for i in range(23)])
    torch.testing.assert_close(found.probabilities, expected, rtol=0, atol=0.02)


def test_batches_make_no_difference(video):
    expected = timeline(ByColour(), video)
    torch.testing.assert_close(timeline(ByColour(), video, batch_size=3).probabilities, expected.probabilities)


def test_frames_come_by_their_times_where_the_rate_changes(tmp_path):
    """Two seconds of red in 40 frames, then two of blue in 10."""
    pts = [*range(0, 2000, 50), *range(2000, 4000, 200)]
    path = write_colours(tmp_path / "v.mkv", [("red", 2), ("blue", 0.5)], pts=pts)
    found = timeline(ByColour(), path, clip_seconds=0.8, hop=0.2)
    segments = found.segments(1)
    assert [segment.label for segment in segments] == ["red", "blue"]
    assert segments[1].start == pytest.approx(2, abs=0.2)
    assert segments[1].end == pytest.approx(4, abs=0.2)


def test_few_frames_are_held(tmp_path):
    """Three minutes take no more memory than one."""
    peaks = []
    for name, seconds in (("one", 60), ("three", 180)):
        path = write_colours(tmp_path / f"{name}.mp4", [("red", seconds)], fps=10)
        held, most = [], 0
        for batch in _batches(VideoReader(path), [[i, i + 2] for i in range(0, seconds * 10 - 2)], _kept(held), 4):
            assert len(batch) <= 4
            most = max(most, sum(reference() is not None for reference in held))
        assert len(held) == seconds * 10
        peaks.append(most)
    assert peaks[0] == peaks[1] < 12


def _kept(held: list) -> Callable[[Tensor], Tensor]:
    def transform(frames: Tensor) -> Tensor:
        clip = frames.permute(0, 3, 1, 2)[:, :, None].float()  # [1, 3, 1, H, W]
        held.append(weakref.ref(clip))
        return clip

    return transform


def test_short_videos(tmp_path):
    short = write_colours(tmp_path / "short.mp4", [("green", 0.15)])
    found = timeline(ByColour(), short)
    assert [(s.label, s.start, round(s.end, 3)) for s in found.segments()] == [("green", 0, 0.15)]


def test_clips_that_span_whole_videos_need_a_length(video):
    with pytest.raises(ValueError, match="set clip_seconds to the length of the videos it was trained on"):
        timeline(ByColour(stride="spread"), video)
    assert [s.label for s in timeline(ByColour(None), video, clip_seconds=1).segments()][:2] == ["red", "blue"]


def test_what_cannot_be(video, tmp_path):
    with pytest.raises(ValueError, match="the hop no longer than a clip"):
        timeline(ByColour(), video, clip_seconds=1, hop=2)
    with pytest.raises(ValueError, match="the model is in training mode"):
        timeline(ByColour().train(), video)
    with pytest.raises(VideoError, match="nowhere"):
        timeline(ByColour(), tmp_path / "nowhere.mp4")
    model = ByColour()
    model.scale.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the result isn't finite"):
        timeline(model, video)


def test_smoothing_drops_single_moments_and_keeps_borders():
    probabilities = torch.tensor([[0.9, 0.1]] * 3 + [[0.45, 0.55]] + [[0.9, 0.1]] * 2 + [[0.1, 0.9]] * 4)
    edges = torch.arange(11, dtype=torch.float64)
    line = Timeline(torch.stack([edges[:-1], edges[1:]], 1), probabilities, ["a", "b"])
    assert [(s.start, s.end, s.label) for s in line.segments(3)] == [(0, 6, "a"), (6, 10, "b")]
    assert [(s.start, s.end, s.label) for s in line.segments(1)] == [
        *((0, 3, "a"), (3, 4, "b"), (4, 6, "a"), (6, 10, "b")),
    ]
    assert line.segments(1)[0].score == pytest.approx(0.9)
    with pytest.raises(ValueError, match="must be an odd number"):
        line.segments(2)


def test_segments_are_written(tmp_path):
    segments = [Segment(0, 1.23456, "a, b", 0.5), Segment(1.23456, 2, "ü", 1)]
    write_segments(segments, tmp_path / "s.csv")
    write_segments(segments, tmp_path / "s.json")
    with (tmp_path / "s.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["start"], row["end"], row["label"]) for row in rows] == [("0", "1.235", "a, b"), ("1.235", "2", "ü")]
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))[1]["label"] == "ü"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.csv", "s.json"]
    with pytest.raises(ValueError, match="change the suffix"):
        write_segments(segments, tmp_path / "s.txt")
    with pytest.raises(ValueError, match="no such folder"):
        write_segments(segments, tmp_path / "no" / "s.csv")


def test_plot(video, tmp_path):
    plot_timeline(timeline(ByColour(), video), tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(video, tmp_path, capsys):
    options = ["--model", "etmamba_ti", "--allow-untrained", "--clip-seconds", "4", "--hop", "4"]
    written = ["-o", str(tmp_path / "t.png"), "--segments", str(tmp_path / "s.csv")]
    assert main(["timeline", str(video), *options, *written]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("  0:00.0 to ")
    assert told[-1].split(" to ")[1].split()[0] == "0:11.5"
    assert (tmp_path / "t.png").exists()
    with (tmp_path / "s.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(told)
    assert main(["timeline", str(video), "--model", "videomamba_ti_stfp", "-o", "x.png"]) == 2
    assert "no trained weights" in capsys.readouterr().err
    assert main(["timeline", str(video), *options, "-o", "t.bmp"]) == 2
    assert "plots are written as .png, .pdf or .svg" in capsys.readouterr().err
