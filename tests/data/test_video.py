"""Each requested frame is the frame returned, whatever the file; a file that isn't a video is an error that says so."""

import contextlib
import logging
import pickle
import random
import re
import struct
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from videos import COLOURS, TICKS, numbers, picture, turn_video, write_audio, write_video

from etmamba_timm.data import VideoError, VideoReader, ffmpeg, probe, read_frames

FRAMES = 40  # in each of them

FORMATS: dict[str, dict] = {
    "h264.mp4": {},
    "h264-b.mp4": {"b_frames": 2},
    "h264-open-gop.mp4": {"b_frames": 3, "options": {"x264-params": "open-gop=1"}},
    "h264-intra-refresh.mp4": {"b_frames": 2, "options": {"x264-params": "intra-refresh=1"}},  # false keyframes
    "h264-long-gop.mp4": {"b_frames": 2, "gop": 250},
    "h264-irregular.mp4": {"b_frames": 2, "pts": [40 * i + 7 * (i * i % 5) for i in range(FRAMES)]},
    "h264-fragments.mp4": {"b_frames": 2, "container": {"movflags": "frag_keyframe+empty_moov"}},
    "h264-odd.mp4": {"pix_fmt": "yuv444p", "height": 51, "width": 67},
    "h264-grey.mp4": {"pix_fmt": "gray"},
    "h264-10bit.mp4": {"pix_fmt": "yuv420p10le", "b_frames": 2},
    "h264-two-streams.mp4": {"streams": 2, "height": 96, "width": 128},
    "h264.mov": {"b_frames": 2},
    "h264.mkv": {"b_frames": 2},
    "h264.flv": {"b_frames": 2},
    "h264.ts": {"b_frames": 2},
    "h264.mpg": {"b_frames": 2},  # most packets without a time
    "h264.avi": {"b_frames": 2},  # times that are not those of showing
    "h264.h264": {"b_frames": 2},  # no times, no container
    "mpeg2.mpg": {"codec": "mpeg2video", "b_frames": 2},  # wrong times
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4-b.avi": {"codec": "mpeg4", "b_frames": 2},
    "mpeg4-b-adaptive.avi": {"codec": "mpeg4", "b_frames": 4, "gop": 9, "options": {"b_strategy": "1"}},
    "msmpeg4.avi": {"codec": "msmpeg4"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "vp8.webm": {"codec": "libvpx"},
    "vp8-no-index.webm": {"codec": "libvpx", "container": {"live": "1"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"lag-in-frames": "16", "auto-alt-ref": "1"}},
    "vp9-odd.webm": {"codec": "libvpx-vp9", "height": 51, "width": 67},
    "gif.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}
GREY = "h264-grey.mp4"


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory):
    """A function from a name in FORMATS to the path of that video; the file is shared, so don't change it."""
    folder = tmp_path_factory.mktemp("videos")

    def get(name: str) -> Path:
        path = folder / name
        if not path.exists():
            codec = FORMATS[name].get("codec", "libx264")
            if codec not in av.codecs_available:
                pytest.skip(f"this FFmpeg has no {codec}")
            write_video(path, FRAMES, **FORMATS[name])
        return path

    return get


# --- the right frames -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_all_frames(video, name):
    reader = VideoReader(video(name))
    assert reader.info.num_frames == FRAMES
    frames = reader.read(range(FRAMES))
    assert frames.dtype == torch.uint8
    assert frames.shape == (FRAMES, reader.info.height, reader.info.width, 3)
    assert numbers(frames) == list(range(FRAMES))


@pytest.mark.parametrize("name", FORMATS)
def test_any_frames_in_any_order(video, name):
    reader, dice = VideoReader(video(name)), random.Random(0)
    asked = [[i] for i in (0, 1, 11, 12, 13, FRAMES - 1)] + [[FRAMES - 1, 0], [7, 7, 7], list(range(5, 37, 2))]
    asked += [[dice.randrange(FRAMES) for _ in range(dice.choice([2, 3, 16]))] for _ in range(6)]
    for indices in asked:
        assert numbers(reader.read(indices)) == indices


@pytest.mark.parametrize("name", [name for name in FORMATS if name != GREY])
def test_colours(video, name):
    frame = read_frames(video(name), [20])[0].numpy().astype(int)
    row, columns = frame.shape[0] // 8, (np.arange(4) * 2 + 1) * frame.shape[1] // 8
    tolerance = 60 if name == "gif.gif" else 30  # gif: 3, 3 and 2 bits
    assert np.abs(frame[row, columns] - COLOURS.astype(int)).max() < tolerance


def test_grey_has_three_equal_channels(video):
    frames = read_frames(video(GREY), [3, 4])
    assert torch.equal(frames[..., 0], frames[..., 1])
    assert torch.equal(frames[..., 0], frames[..., 2])


def test_indices_may_be_other_integers(video):
    indices = [3, 30]
    for kind in (np.array(indices), torch.tensor(indices), tuple(indices)):
        assert numbers(read_frames(video("h264.mp4"), kind)) == indices


@pytest.mark.parametrize("name", FORMATS)
def test_a_stream_gives_what_reading_gives(video, name):
    reader = VideoReader(video(name))
    wanted = [0, 3, 4, 20, 21, FRAMES - 1]
    streamed = list(reader.stream(wanted))
    assert torch.equal(torch.stack(streamed), reader.read(wanted))
    with pytest.raises(IndexError, match=f"choose from 0 to {FRAMES - 1}"):
        next(reader.stream([3, FRAMES]))


@pytest.mark.parametrize("name", ["h264.mp4", "h264-b.mp4", "h264.avi", "h264.h264", "vp9.webm"])
def test_times_of_a_steady_video(video, name):
    times = VideoReader(video(name)).times()
    assert times == pytest.approx([i / 25 for i in range(FRAMES)], abs=1e-3)


def test_times_of_an_irregular_video(video):
    name = "h264-irregular.mp4"
    pts = FORMATS[name]["pts"]
    assert VideoReader(video(name)).times() == pytest.approx([(time - pts[0]) / TICKS for time in pts], abs=1e-3)


def test_no_indices_no_frames(video):
    assert read_frames(video("h264.mp4"), []).shape == (0, 48, 64, 3)


@pytest.mark.parametrize("indices", [[-1], [0, FRAMES], [1000]])
def test_a_number_outside_the_video(video, indices):
    with pytest.raises(IndexError, match=f"choose from 0 to {FRAMES - 1}"):
        read_frames(video("h264.mp4"), indices)


def test_one_frame(tmp_path):
    path = write_video(tmp_path / "one.mp4", 1)
    assert numbers(read_frames(path, [0, 0])) == [0, 0]
    info = probe(path)
    assert (info.num_frames, info.fps, info.duration) == (1, 25, 0.04)


def test_reader_can_be_pickled(video):
    reader = pickle.loads(pickle.dumps(VideoReader(video("h264-b.mp4"))))
    assert numbers(reader.read([25, 3])) == [25, 3]


def test_changing_size_keeps_the_first(tmp_path):
    parts = [
        write_video(tmp_path / f"{i}.h264", 10, height=48 * (i + 1), width=64 * (i + 1), first_number=10 * i)
        for i in range(2)
    ]
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    frames = read_frames(path, range(20))
    assert frames.shape == (20, 48, 64, 3)
    assert numbers(frames) == list(range(20))


def test_edit_list_cuts_frames_away(tmp_path):
    path = write_video(tmp_path / "cut.mp4", FRAMES, b_frames=2)
    data = bytearray(path.read_bytes())
    entry = data.index(b"elst") + 12  # past version, flags and count: duration in 1/1000 s, first time in 1/12800 s
    duration, start = struct.unpack_from(">ii", data, entry)
    assert duration == FRAMES * 40
    struct.pack_into(">ii", data, entry, 20 * 40, start + 5 * 512)
    path.write_bytes(data)
    reader = VideoReader(path)
    assert reader.info.num_frames == 20
    assert numbers(reader.read(range(20))) == list(range(5, 25))
    assert numbers(reader.read([19, 14])) == [24, 19]


def test_hidden_vp8_frames_are_not_counted(tmp_path, video):
    source = video("vp8.webm")
    with av.open(str(source)) as container:
        packet = next(packet for i, packet in enumerate(container.demux(video=0)) if i == 20)
        payload = bytes(packet)
    data = source.read_bytes()
    assert data.count(payload) == 1
    path = tmp_path / "hidden.webm"
    path.write_bytes(data.replace(payload, bytes([payload[0] & ~0x10]) + payload[1:]))
    reader = VideoReader(path)
    assert reader.info.num_frames == FRAMES - 1
    assert numbers(reader.read(range(18, 23))) == [18, 19, 21, 22, 23]


def test_xvid_that_packs_two_frames_together(tmp_path):
    """Each B-frame rides with the frame stored before it, then a packet says `nothing new`: as in many old AVIs."""
    source = write_video(tmp_path / "plain.avi", FRAMES + 1, codec="mpeg4", b_frames=1, options={"b_strategy": "0"})
    path = tmp_path / "packed.avi"
    with av.open(str(source)) as container, av.open(str(path), "w") as output:
        stream = container.streams.video[0]
        if hasattr(output, "add_stream_from_template"):
            copy = output.add_stream_from_template(stream)
        else:
            copy = output.add_stream(template=stream)
        stored = [(packet.pts, bytes(packet)) for packet in container.demux(stream) if packet.size]
        stored = [(pts, re.sub(rb"(?<=\x00\x00\x01\xb2)Lavc[0-9.]+", b"DivX503b1393p", data)) for pts, data in stored]
        packed, nothing = [stored[0][1]], b"\0\0\1\xb6\x52\0\x7f"
        for (pts, data), (next_pts, next_data) in zip(stored[1::2], stored[2::2], strict=True):
            assert next_pts < pts
            packed += [data + next_data, nothing]
        for i, data in enumerate(packed):
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.pts, packet.dts = copy, stream.time_base, i, i
            output.mux(packet)
    reader = VideoReader(path)
    assert reader.info.num_frames == FRAMES + 1
    assert numbers(reader.read([*range(FRAMES), 9, 30, 2])) == [*range(FRAMES), 9, 30, 2]


def test_metadata_that_is_not_utf8(tmp_path):
    path = tmp_path / "old.avi"
    with av.open(str(path), "w") as output:
        output.metadata["title"] = "Zeppelin"
        stream = output.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(5), format="rgb24")))
        output.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"Zeppelin", b"Zeppel\xefn"))
    assert numbers(read_frames(path, [0])) == [5]


def test_a_colon_in_the_name_is_no_address(tmp_path, monkeypatch):
    write_video(tmp_path / "http:clip.mp4", 2)
    monkeypatch.chdir(tmp_path)
    assert numbers(read_frames("http:clip.mp4", [1])) == [1]


# --- what the file holds ----------------------------------------------------------------------------------------------


def test_info(video):
    info = probe(video("h264-b.mp4"))
    assert info.path == video("h264-b.mp4")
    assert (info.num_frames, info.height, info.width, info.rotation) == (FRAMES, 48, 64, 0)
    assert (info.fps, info.duration) == pytest.approx((25, FRAMES / 25))


def test_info_of_an_irregular_video(video):
    name = "h264-irregular.mp4"
    info, pts = probe(video(name)), FORMATS[name]["pts"]
    fps = (FRAMES - 1) / ((pts[-1] - pts[0]) / TICKS)
    assert (info.fps, info.duration) == pytest.approx((fps, FRAMES / fps), rel=1e-3)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation(tmp_path, degrees):
    path = turn_video(write_video(tmp_path / "telephone.mp4", 14), degrees)
    info = probe(path)
    assert info.rotation == degrees
    assert (info.height, info.width) == ((64, 48) if degrees % 180 else (48, 64))
    frame = read_frames(path, [13])[0].numpy()
    assert frame.shape == (info.height, info.width, 3)
    corner = {0: (0, 0), 90: (0, -1), 180: (-1, -1), 270: (-1, 0)}[degrees]  # where a clockwise turn takes top left
    red = frame[corner].astype(int)
    assert np.abs(red - COLOURS[0]).max() < 20
    assert numbers(np.rot90(frame, degrees // 90)[None]) == [13]  # turned back, counter-clockwise


# --- no more decoding than needed -------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by one with every frame decoded."""
    counts, decode = [], ffmpeg.decode

    def counting(*args):
        for frame in decode(*args):
            counts.append(frame.pts)
            yield frame

    monkeypatch.setattr(ffmpeg, "decode", counting)
    return counts


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("long") / "long.mp4", 240, b_frames=2, gop=24)


def test_index_decodes_one_frame(long_video, decoded):
    probe(long_video)
    assert len(decoded) == 1


@pytest.mark.parametrize("name", ["mpeg4.avi", "mpeg4-b.avi", "mpeg4-b-adaptive.avi", "msmpeg4.avi", "mjpeg.avi"])
def test_avi_index_decodes_one_frame(video, decoded, name):
    """How an AVI's frames are ordered is read off the packets."""
    reader = VideoReader(video(name))
    assert len(decoded) == 1
    decoded.clear()
    assert numbers(reader.read([FRAMES - 2])) == [FRAMES - 2]
    assert len(decoded) <= 2 * 12


def test_several_places_are_read_from_one_open_file(long_video, monkeypatch):
    reader, opened, count = VideoReader(long_video), ffmpeg.opened, []
    monkeypatch.setattr(ffmpeg, "opened", lambda path: count.append(path) or opened(path))
    assert numbers(reader.read([10, 110, 60, 210])) == [10, 110, 60, 210]
    assert len(count) == 1


def test_reading_starts_at_a_keyframe_and_stops(long_video, decoded):
    reader = VideoReader(long_video)
    decoded.clear()
    assert numbers(reader.read(range(100, 132, 2))) == list(range(100, 132, 2))
    assert len(decoded) <= 24 + 32


def test_the_way_between_is_skipped(long_video, decoded):
    reader = VideoReader(long_video)
    decoded.clear()
    assert numbers(reader.read([239, 1, 120])) == [239, 1, 120]
    assert len(decoded) <= 3 * 24


@pytest.mark.parametrize("trouble", [None, "error", "late"])
def test_where_seeking_fails_all_is_decoded(long_video, monkeypatch, trouble):
    reader = VideoReader(long_video)
    if trouble is None:
        monkeypatch.setattr(ffmpeg, "packets_from", lambda *_: None)
    else:
        real = ffmpeg.packets_from

        class Container:
            """A container that can't seek, or seeks too far."""

            def __init__(self, container):
                self.container = container

            def __getattr__(self, name):
                return getattr(self.container, name)

            def seek(self, time, stream):
                if trouble == "error":
                    raise av.error.PermissionError(1, "not this one")
                self.container.seek(time + 10**5, stream=stream)

        monkeypatch.setattr(ffmpeg, "packets_from", lambda container, *rest: real(Container(container), *rest))
    assert numbers(reader.read([200, 100])) == [200, 100]


# --- damage -----------------------------------------------------------------------------------------------------------


def damage(source: Path, target: Path, damaged) -> Path:
    """Copy a video, overwriting the data of these frames (counted in the order of storing)."""
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        for i, packet in enumerate(container.demux(video=0)):
            if i in damaged:
                start = data.index(bytes(packet), packet.pos)
                data[start : start + packet.size] = b"\xff" * packet.size
    target.write_bytes(data)
    return target


def warnings_of(caplog) -> list[str]:
    records = [record for record in caplog.records if record.name.startswith("etmamba_timm")]
    return [record.getMessage() for record in records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", ["h264.mp4", "mpeg4.avi", "vp8.webm"])
@pytest.mark.parametrize(
    ("damaged", "asked", "given"),
    [
        (range(24, 36), [22, 24, 30, 36], [22, 23, 23, 36]),
        (range(24, 36), [30], [23]),  # the frame before is behind another keyframe
        (range(14, 36), [35, 20, 13], [13, 13, 13]),
        (range(14, 36), [0, 34, 35], [0, 13, 13]),
        (range(36, 40), [39, 36, 1], [35, 35, 1]),
    ],
)
def test_neighbours_stand_in_for_damaged_frames(tmp_path, video, caplog, name, damaged, asked, given):
    path = damage(video(name), tmp_path / name, damaged)
    reader = VideoReader(path)
    assert reader.info.num_frames == FRAMES
    assert numbers(reader.read(asked)) == given
    lost = sum(a in damaged for a in asked)
    assert warnings_of(caplog) == [
        f"{path}: {lost} of {len(asked)} wanted frames cannot be decoded; the nearest ones stand in"
    ]
    reader.read(asked)
    assert len(warnings_of(caplog)) == 1


def test_later_frames_stand_in_where_none_are_earlier(tmp_path, video):
    path = damage(video("h264.mp4"), tmp_path / "a.mp4", range(12))
    assert numbers(read_frames(path, [3, 20, 0])) == [12, 20, 12]


def test_neighbours_stand_in_in_a_stream_too(tmp_path, video, caplog):
    reader = VideoReader(damage(video("h264.mp4"), tmp_path / "x.mp4", range(24, 36)))
    assert numbers(list(reader.stream([22, 24, 30, 36]))) == [22, 23, 23, 36]
    assert len(warnings_of(caplog)) == 1
    assert warnings_of(caplog)[0].endswith("2 of 4 wanted frames cannot be decoded; the nearest ones stand in")


def test_sound_frames_of_a_damaged_file_come_without_warning(tmp_path, video, caplog):
    path = damage(video("h264.mp4"), tmp_path / "a.mp4", range(24, 36))
    assert numbers(read_frames(path, [0, 23, 36, 39])) == [0, 23, 36, 39]
    assert warnings_of(caplog) == []


def test_damage_where_frames_are_counted(tmp_path, video):
    path = damage(video("h264.avi"), tmp_path / "a.avi", range(12, 14))
    reader = VideoReader(path)
    read = numbers(reader.read(range(reader.info.num_frames)))
    assert FRAMES - 12 <= len(read) <= FRAMES
    assert read[:5] == [0, 1, 2, 3, 4]
    assert read[-1] == FRAMES - 1


@pytest.mark.parametrize("name", ["h264-b.mp4", "h264.mkv", "h264.ts", "h264.avi", "mpeg4-b.avi", "vp9.webm"])
@pytest.mark.parametrize("seed", range(3))
def test_random_damage_gives_frames_or_a_video_error(tmp_path, video, name, seed):
    dice = random.Random(seed)
    data = bytearray(video(name).read_bytes())
    for _ in range(4):
        start = dice.randrange(len(data))
        data[start : start + 60] = dice.randbytes(len(data[start : start + 60]))
    path = tmp_path / name
    path.write_bytes(data)
    with contextlib.suppress(VideoError):
        reader = VideoReader(path)
        count = reader.info.num_frames
        frames = reader.read([dice.randrange(count) for _ in range(5)])
        assert frames.shape == (5, reader.info.height, reader.info.width, 3)


def test_nothing_decodes(tmp_path, video):
    path = damage(video("mpeg4.avi"), tmp_path / "a.avi", range(FRAMES))
    with pytest.raises(VideoError, match=r"a\.avi: none of its frames \(40\) can be decoded; it looks damaged"):
        probe(path)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_cut_off_with_its_index_in_front(tmp_path, caplog, share):
    path = write_video(tmp_path / "cut.mp4", FRAMES, container={"movflags": "faststart"})
    data = path.read_bytes()
    start = data.index(b"mdat")
    path.write_bytes(data[: start + int(share * (len(data) - start))])
    reader = VideoReader(path)
    count = reader.info.num_frames
    assert 2 < count < FRAMES
    assert warnings_of(caplog) == [f"{path}: the file is cut off; only its beginning can be read ({count} frames)"]
    assert numbers(reader.read(range(count - 1))) == list(range(count - 1))
    assert len(reader.read([count - 1])) == 1  # of which a part may be missing
    assert len(warnings_of(caplog)) == 1


def test_whole_files_are_not_taken_for_cut_off(video, caplog):
    for name in FORMATS:
        probe(video(name))
    assert warnings_of(caplog) == []


# --- what is no video -------------------------------------------------------------------------------------------------


def no_file(path):
    pass


def no_decoder(path):
    write_video(path, 3)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))


def cut_off_before_its_index(path):
    data = write_video(path, FRAMES).read_bytes()
    path.write_bytes(data[: len(data) // 2])


BAD = {
    "missing.mp4": (no_file, "no such file; check the path"),
    "folder.mp4": (Path.mkdir, "is a folder without pictures; name a video file"),
    "empty.mp4": (Path.touch, "the file is empty"),
    "text.mp4": (lambda path: path.write_text("Grüße\n" * 99, encoding="utf-8"), "is a text file, not a video"),
    "text.nfo": (lambda path: path.write_text("that FFmpeg would draw"), "is a text file, not a video"),
    "list.m3u8": (lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\nother.mp4\n"), "is a text file, not a video"),
    "noise.mp4": (lambda path: path.write_bytes(random.Random(0).randbytes(5000)), "cannot be read as a video"),
    "sound.m4a": (write_audio, r"has no video stream \(it holds audio\)"),
    "codec.mp4": (no_decoder, "there is no decoder for its video stream; convert it"),
    "cut.mp4": (cut_off_before_its_index, "it looks truncated or damaged, .*: copy or download it again"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    make, message = BAD[name]
    make(tmp_path / name)
    with pytest.raises(VideoError, match=message) as caught:
        read_frames(tmp_path / name, [0])
    assert str(caught.value).startswith(f"{tmp_path / name}: ")


def test_unreadable_file(tmp_path, video, monkeypatch):
    def refuse(self, *args):
        raise PermissionError(13, "Permission denied")

    path = video("h264.mp4")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(VideoError, match=r"cannot be opened \(Permission denied\)"):
        probe(path)


def test_a_cover_is_no_video(tmp_path):
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as output:
        sound = output.add_stream("aac", rate=48000)
        sound.layout = "mono"
        cover = output.add_stream("png", rate=1)
        cover.height, cover.width, cover.pix_fmt = 48, 64, "rgb24"
        if not hasattr(cover, "disposition"):
            pytest.skip("this PyAV doesn't tell covers from videos")
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        output.mux(cover.encode(av.VideoFrame.from_ndarray(picture(0), format="rgb24")))
        output.mux(cover.encode())
        output.mux(sound.encode(frame))
        output.mux(sound.encode())
    with pytest.raises(VideoError, match="has no video stream"):
        probe(path)


def test_nothing_is_left_open_or_warned_of(video):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_frames(video("h264.mp4"), [1, 39])
