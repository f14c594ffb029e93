"""Decoding ahead in worker processes: the same clips in the same order, whatever happens to the workers."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from videos import number, write_video

from etmamba_timm.data import Clip, EvalTransform, VideoError, VideoReader, Views, ahead, read_ahead

TRANSFORM = EvalTransform((32, 40))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Seven videos, of which the fourth is damaged, the fifth missing and the sixth too elongated."""
    folder = tmp_path_factory.mktemp("videos")
    files = [write_video(folder / f"{i}.mp4", 20 + i, first_number=100 * i) for i in range(7)]
    files[3].write_bytes(b"\0\0\0\x18ftypmp42" + bytes(200))
    files[4].unlink()
    files[5] = write_video(folder / "wide.mkv", 2, height=2, width=16384, codec="ffv1")
    return files


def told(results) -> list:
    """Comparable copies of what `read_ahead` yields."""
    return [(i, str(clip) if isinstance(clip, Exception) else clip.tolist()) for i, clip in results]


@pytest.mark.parametrize("workers", [1, 2, 3, 20])
@pytest.mark.parametrize(("num_clips", "num_crops", "ahead"), [(1, 1, 1), (3, 3, 8)])
def test_workers_tell_the_same_in_the_same_order(files, workers, num_clips, num_crops, ahead):
    views = Views(files, TRANSFORM, Clip(4, 2), num_clips, num_crops)
    indices = [6, 0, 3, 1, 4, 5, 2]
    results = told(read_ahead(views, indices))
    assert [i for i, _ in results] == [i for i in indices for _ in range(num_clips if i in (0, 1, 2, 6) else 1)]
    assert told(read_ahead(views, indices, workers, ahead)) == results
    errors = {i: text for i, text in results if isinstance(text, str)}
    assert errors[4] == f"{files[4]}: no such file; check the path"
    assert "too elongated" in errors[5]
    assert errors.keys() == {3, 4, 5}


def test_views_are_those_of_the_transform(files):
    views = Views(files, TRANSFORM, Clip(4, 2), num_clips=2, num_crops=3)
    for clip, frames in zip(views.read(1), ([0, 2, 4, 6], [14, 16, 18, 20]), strict=True):
        assert clip.shape == (3, *views.shape) == (3, 4, 32, 40, 3)
        expected = TRANSFORM(VideoReader(files[1]).read(frames), 3)
        assert torch.equal(TRANSFORM.normalize(clip), expected)
        assert [number(frame) for frame in VideoReader(files[1]).read(frames)] == [100 + i for i in frames]


def test_clips_that_do_not_fit_together_are_read_one_by_one(files, monkeypatch):
    views = Views(files, TRANSFORM, Clip(4, "spread"), num_clips=5)
    expected = [clip.tolist() for clip in views.read(0)]
    asked = []

    class Counting(VideoReader):
        def read(self, indices):
            asked.append(len(indices))
            return super().read(indices)

    monkeypatch.setattr("etmamba_timm.data.dataset.open_video", Counting)
    monkeypatch.setattr("etmamba_timm.data.dataset.MOST_BYTES", 2 * 4 * 48 * 64 * 3)
    assert [clip.tolist() for clip in views.read(0)] == expected
    assert asked == [8, 8, 4]
    monkeypatch.setattr("etmamba_timm.data.dataset.MOST_BYTES", 1)
    assert [clip.tolist() for clip in views.read(0)] == expected
    assert asked[3:] == [4] * 5


def test_only_so_many_clips_are_ahead(files, monkeypatch):
    """The workers wait for slots: the memory doesn't grow with the number of clips."""
    read = multiprocessing.get_context("fork").Value("i", 0)

    class Counting(Views):
        def read(self, index):
            for clip in super().read(index):
                read.value += 1
                yield clip

    clips = read_ahead(Counting(files[:1], TRANSFORM, Clip(4, 2), num_clips=100), [0], workers=1, ahead=5)
    for taken in range(1, 4):
        next(clips)
        time.sleep(0.5)
        assert read.value <= taken + 6  # five ahead, and one that waits for a slot
    clips.close()
    assert not multiprocessing.active_children()


def killer(index: int, times: int, how: int = signal.SIGKILL):
    """Views whose reader is killed, so many times, in the middle of a file."""
    count = multiprocessing.get_context("fork").Value("i", 0)

    class Killing(Views):
        def read(self, i):
            for place, clip in enumerate(super().read(i)):
                if i == index and place == 1 and count.value < times:
                    count.value += 1
                    os.kill(os.getpid(), how)
                yield clip

    return Killing


def test_a_killed_worker_is_replaced(files, caplog):
    arguments = files, TRANSFORM, Clip(4, 2), 3, 3
    expected = told(read_ahead(Views(*arguments), range(7)))
    assert told(read_ahead(killer(1, 1)(*arguments), range(7), 2, 8)) == expected
    assert f"{files[1]}: the process that decodes it has died (SIGKILL); a new one is started" in caplog.text


def test_a_file_that_kills_its_worker_again_is_reported_and_the_others_go_on(files):
    arguments = files, TRANSFORM, Clip(4, 2), 3, 3
    expected = told(read_ahead(Views(*arguments), range(7)))
    results = told(read_ahead(killer(2, 99, signal.SIGUSR1)(*arguments), range(7), 2, 8))
    assert [r for r in results if r[0] != 2] == [r for r in expected if r[0] != 2]
    clip, error = [r[1] for r in results if r[0] == 2]
    assert clip == next(r[1] for r in expected if r[0] == 2)
    assert error.startswith(f"{files[2]}: the process that decodes it has died (SIGUSR1), 2 times; the file may be")


def test_a_worker_killed_from_outside_loses_nothing(files):
    views = Views(files, TRANSFORM, Clip(4, 2), num_clips=20)
    expected = told(read_ahead(views, range(7)))
    results = []
    for count, result in enumerate(read_ahead(views, range(7), 2, 1)):
        results += told([result])
        if count in (0, 25):
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
    assert results == expected


def test_workers_that_cannot_start(files, monkeypatch):
    monkeypatch.setattr(ahead, "_work", exit)
    with pytest.raises(RuntimeError, match="a decoding process ended before its work began"):
        list(read_ahead(Views(files, TRANSFORM, Clip(4, 2)), [0, 1], 2))
    assert not multiprocessing.active_children()


def test_workers_end_with_their_parent(files, tmp_path):
    """Also if it is killed and can't end them."""
    code = f"""
import multiprocessing, sys
from pathlib import Path
from etmamba_timm.data import Clip, EvalTransform, Views, read_ahead
views = Views([Path({str(files[0])!r})] * 100, EvalTransform((32, 32)), Clip(4, 2), 10)
clips = read_ahead(views, range(100), 3, 2)
next(clips)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    children = list(map(int, parent.stdout.readline().split()))
    assert len(children) == 3
    parent.kill()
    parent.wait()
    for _ in range(100):
        alive = [pid for pid in children if Path(f"/proc/{pid}").exists() and "Z" not in _state(pid)]
        if not alive:
            return
        time.sleep(0.1)
    raise AssertionError(alive)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_spawned_workers(files, monkeypatch):
    """As on systems without fork: all that a worker needs can be pickled."""
    views = Views(files, TRANSFORM, Clip(4, 2), 2, 3)
    expected = told(read_ahead(views, range(4)))
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(ahead.torch.multiprocessing, "get_context", lambda: spawn)
    assert told(read_ahead(views, range(4), 1, 8)) == expected


def test_errors_that_cannot_be_sent_are_sent_as_text():
    class Stubborn(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    assert str(ahead.portable(Stubborn(1, 2))) == "Stubborn: 1 and 2"
    error = VideoError("no")
    assert ahead.portable(error) is error
    assert str(pickle.loads(pickle.dumps(error))) == "no"


@pytest.mark.parametrize(("num_clips", "num_crops"), [(0, 1), (1, 2), (-1, 3)])
def test_no_such_views(files, num_clips, num_crops):
    with pytest.raises(ValueError, match=f"num_clips is {num_clips} and num_crops {num_crops}; use 1 clip or more"):
        Views(files, TRANSFORM, Clip(4, 2), num_clips, num_crops)
