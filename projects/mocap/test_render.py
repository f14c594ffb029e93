"""What is held out stays apart, the same seed gives the same files, and the pictures show what they should.

pytest projects/mocap
"""

import itertools
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from etmamba_timm.data.layouts import read_dataset

from . import motion
from .render import encode, render
from .variation import CLASSES, GROUNDS, PARTS, RANGES, Range, draw

needs_pybullet = pytest.mark.skipif(
    find_spec("pybullet") is None,
    reason="pybullet isn't installed: pip install -r projects/mocap/requirements.txt",
)


@pytest.mark.parametrize("name", RANGES)
def test_each_parts_cells_are_apart_and_fill_the_range(name):
    whole = RANGES[name]
    cells = sorted(cell for part in PARTS for cell in whole.cells(part))
    assert all(whole.cells(part) for part in PARTS)
    assert (cells[0][0], cells[-1][1]) == pytest.approx((whole.low, whole.high))
    assert all(before[1] == pytest.approx(after[0]) for before, after in itertools.pairwise(cells))
    if not name.endswith("hue") and name != "phase":  # these go round
        assert whole.owners[0] == whole.owners[-1] == "t"  # what is held out is a gap, not an extreme


def cells_text(whole: Range, part: str) -> str:
    """The cells of a part as the README writes them: neighbours joined."""
    joined: list[list[float]] = []
    for low, high in whole.cells(part):
        if joined and joined[-1][1] == low:
            joined[-1][1] = high
        else:
            joined.append([low, high])
    return ", ".join(f"{low:.3g}–{high:.3g}" for low, high in joined)


def test_the_readme_tells_the_ranges_and_grounds():
    text = (Path(__file__).with_name("README.md")).read_text(encoding="utf-8")
    lines = [row for row in text.splitlines() if row.startswith("| `")]
    rows = {row.split("`")[1]: [cell.strip() for cell in row.split("|")[3:6]] for row in lines}
    for name, whole in RANGES.items():
        assert rows[name] == [cells_text(whole, part) for part in PARTS]
    assert rows["ground"] == [", ".join(GROUNDS[part]) for part in PARTS]


def test_grounds_are_apart():
    assert len({ground for part in PARTS for ground in GROUNDS[part]}) == sum(map(len, GROUNDS.values()))


@pytest.mark.parametrize("part", PARTS)
def test_drawn_values_lie_in_the_parts_own_cells(part):
    for number in range(50):
        drawn = draw(0, part, CLASSES[number % len(CLASSES)], number)
        assert drawn["ground"] in GROUNDS[part]
        for name in RANGES:
            values = np.abs(np.atleast_1d(drawn[name]))
            assert any(np.all((low <= values) & (values <= high)) for low, high in RANGES[name].cells(part)), name


def test_each_video_is_drawn_anew_and_the_same_each_time():
    jobs = [(seed, part, action, n) for seed in (0, 1) for part in PARTS for action in CLASSES for n in (0, 1)]
    assert draw(*jobs[0]) == draw(*jobs[0])
    assert len({json.dumps(draw(*job) | {"action": ""}) for job in jobs}) == len(jobs)


@needs_pybullet
def test_bones_keep_their_lengths_and_a_mirror_twice_is_none():
    recording = motion.read_recording("cartwheel")
    body = dict.fromkeys(("torso", "arms", "legs", "shoulders", "hips"), 1.0)
    times = np.linspace(-1, 5, 50)
    both = [motion.place(*r.at(times, False), body)[0] for r in (recording, recording.mirrored().mirrored())]
    np.testing.assert_allclose(*both, atol=1e-9)
    for i, (_, parent, offset) in enumerate(motion.JOINTS[1:], 1):
        lengths = np.linalg.norm(both[0][:, i] - both[0][:, motion.NAMES.index(parent)], axis=-1)
        np.testing.assert_allclose(lengths, np.linalg.norm(offset), atol=1e-9)
    once = motion.place(*recording.mirrored().at(times, False), body)[0]
    left, right = motion.NAMES.index("left_ankle"), motion.NAMES.index("right_ankle")
    np.testing.assert_allclose(once[:, left], both[0][:, right] * (1, 1, -1), atol=1e-9)


@needs_pybullet
@pytest.mark.parametrize("name", ["walk", "run", "crawl", "dance_a", "dance_b"])
def test_a_cycle_goes_round_without_a_jolt(name):
    recording = motion.read_recording(name).closed()
    step = 1 / 60
    times = np.arange(-1, 2, step / recording.seconds) * recording.seconds
    body = dict.fromkeys(("torso", "arms", "legs", "shoulders", "hips"), 1.0)
    positions, _ = motion.place(*recording.at(times, True), body)
    speed = np.linalg.norm(np.diff(positions, axis=0), axis=-1).max(axis=1) / step
    seam = np.abs(times[1:] / recording.seconds % 1 - 0.5) > 0.5 - 1.5 * step / recording.seconds
    assert speed[seam].max() < 1.5 * speed[~seam].max()


@needs_pybullet
def test_backwards_shows_the_same_in_reverse():
    from .scene import pose

    for forwards, backwards in (("walk", "walk_backwards"), ("getup_faceup", "lie_down_faceup")):
        one = draw(0, "train", forwards, 0) | {"noise": 0.0, "phase": 0.5}
        other = one | {"action": backwards}
        times = np.linspace(0, one["seconds"], 9)
        if forwards == "walk":  # both start at the phase, and part from there
            times = np.concatenate([-times[:0:-1], times])
        np.testing.assert_allclose(pose(other, times)[0], pose(one, times)[0][::-1], atol=1e-9)


@needs_pybullet
@pytest.mark.parametrize("action", ["walk", "getup_facedown"])
def test_the_figure_is_drawn_where_the_camera_fits_it(action):
    from . import scene

    drawn = draw(0, "train", action, 0)
    times = np.arange(12) / 6
    positions, rotations = scene.pose(drawn, times)
    points, radii = scene.outline(positions, rotations, drawn["body"])
    camera = scene.Camera(drawn, points, radii, scene.followed(points, times))
    figure = scene.Figure(drawn["body"], drawn)
    light = scene.light_direction(drawn)
    low, high = np.full(2, np.inf), np.full(2, -np.inf)
    for i in range(len(times)):
        _, mask = figure.draw(camera, i, positions[i], rotations[i], light, drawn["light_strength"])
        rows, columns = np.nonzero(mask)
        corners = np.array([(columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)]) / scene.FINE
        low, high = np.minimum(low, corners[0]), np.maximum(high, corners[1])
    assert (high - low).max() == pytest.approx(drawn["fill"], abs=0.05)
    across, upwards = (low + high) / 2 - 0.5
    assert (across, -upwards) == pytest.approx(drawn["aim"], abs=0.05)


@needs_pybullet
def test_the_ground_is_seen_by_the_figures_camera():
    from . import scene

    drawn = draw(0, "train", "run", 0)
    times = np.arange(6) / 6
    points, radii = scene.outline(*scene.pose(drawn, times), drawn["body"])
    points[..., 1] -= points[..., 1].min()
    camera = scene.Camera(drawn, points, radii, scene.followed(points, times))
    for i in (0, 5):
        _, first, x, z, _ = camera.ground(i)
        places = np.stack([x, np.zeros_like(x), z], axis=-1).reshape(1, -1, 3).repeat(len(times), axis=0)
        across, upwards, _ = camera.project(places, np.zeros(places.shape[1]))
        pixels = (np.arange(scene.FINE) + 0.5) / scene.FINE * 2 - 1
        wanted = np.stack(np.meshgrid(pixels, -pixels[first:]), axis=-1).reshape(-1, 2)
        np.testing.assert_allclose(np.stack([across[i], upwards[i]], axis=-1), wanted, atol=2e-3)


@needs_pybullet
def test_layout_resuming_and_the_same_bytes_again(tmp_path):
    from .scene import frames

    counts = {"train": 1, "val": 0, "test": 0}
    render(tmp_path / "out", 3, counts, workers=2)
    found = read_dataset("folders", tmp_path / "out", "train")
    assert found.classes == sorted(CLASSES)
    assert len(found.samples) == len(CLASSES)
    index = json.loads((tmp_path / "out" / "dataset.json").read_text())
    paths = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.mp4")}
    assert set(index["videos"]) == paths

    name = "train/kick/0000.mp4"
    video = tmp_path / "out" / name
    encode(tmp_path / "again.mp4", frames(index["videos"][name]))
    assert video.read_bytes() == (tmp_path / "again.mp4").read_bytes()

    video.unlink()
    others = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.mp4")}
    render(tmp_path / "out", 3, counts, workers=1)
    assert video.read_bytes() == (tmp_path / "again.mp4").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in others} == others
    with pytest.raises(ValueError, match="another seed"):
        render(tmp_path / "out", 4, counts, workers=1)
