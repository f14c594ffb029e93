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

from . import effects, motion
from .background import TEXTURE, Background, picture
from .bodies import parts
from .figure import NOTHING, cast
from .looks import PALETTE, SHAPES, STYLES
from .render import encode, picture_videos, render
from .scene import FINE, Camera, followed, frames, light_direction, outline, paint, pose, shrink
from .variation import CLASSES, FPS, GROUNDS, PARTS, RANGES, SETS, SIZE, Range, draw

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


def test_the_readme_tells_what_is_held_out():
    text = (Path(__file__).with_name("README.md")).read_text(encoding="utf-8")
    lines = [row for row in text.splitlines() if row.startswith("| `")]
    rows = {row.split("`")[1]: [cell.strip() for cell in row.split("|")[3:-1]] for row in lines}
    for name, whole in RANGES.items():
        assert rows[name] == [cells_text(whole, part) for part in PARTS]
    assert rows["ground"] == [", ".join(GROUNDS[part]) for part in PARTS]
    assert rows["style"] == [", ".join(STYLES[part]) for part in SETS]


def test_grounds_and_styles_are_apart():
    assert len({ground for part in PARTS for ground in GROUNDS[part]}) == sum(len(GROUNDS[part]) for part in PARTS)
    assert STYLES["test"] == STYLES["train"]
    apart = [style for part in ("train", "val", "looks") for style in STYLES[part]]
    assert len(set(apart)) == len(apart)
    assert len(STYLES["looks"]) >= 2


@pytest.mark.parametrize("part", SETS)
def test_drawn_values_lie_in_the_parts_own_cells(part):
    styles = set()
    for number in range(100):
        drawn = draw(0, part, CLASSES[number % len(CLASSES)], number)
        assert drawn["look"]["pattern"] in GROUNDS[part]
        styles.add(drawn["look"]["style"])
        for name in RANGES:
            values = np.abs(np.atleast_1d(drawn[name]))
            assert any(np.all((low <= values) & (values <= high)) for low, high in RANGES[name].cells(part)), name
    assert styles == set(STYLES[part])


def test_each_video_is_drawn_anew_and_the_same_each_time():
    jobs = [(seed, part, action, n) for seed in (0, 1) for part in SETS for action in CLASSES for n in (0, 1)]
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
    for forwards, backwards in (("walk", "walk_backwards"), ("getup_faceup", "lie_down_faceup")):
        one = draw(0, "train", forwards, 0) | {"noise": 0.0, "phase": 0.5}
        other = one | {"action": backwards}
        times = np.linspace(0, one["seconds"], 9)
        if forwards == "walk":  # both start at the phase, and part from there
            times = np.concatenate([-times[:0:-1], times])
        np.testing.assert_allclose(pose(other, times)[0], pose(one, times)[0][::-1], atol=1e-9)


def filmed(drawn: dict, times: np.ndarray) -> tuple:
    """Camera, positions and rotations of the joints of a video that begins with these parameters."""
    positions, rotations = pose(drawn, times)
    points, radii = outline(positions, rotations, drawn["body"])
    return Camera(drawn, points, radii, followed(points, times)), positions, rotations


@needs_pybullet
@pytest.mark.parametrize("action", ["walk", "getup_facedown"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_drawn_where_the_camera_fits_it(shape, action):
    drawn = draw(0, "train", action, 0)
    look = drawn["look"] | {"shape": shape, "shake": [0, 0], "thickness": 1.0, "skirt": False}
    camera, positions, rotations = filmed(drawn | {"look": look}, np.arange(12) / 6)
    light = light_direction(drawn)
    seen = cast(parts(drawn["body"], look), camera, positions, rotations, light, FINE).part != NOTHING
    assert seen.any(axis=(1, 2)).all()
    _, rows, columns = np.nonzero(seen)
    low = np.array([columns.min(), rows.min()]) / FINE
    high = np.array([columns.max() + 1, rows.max() + 1]) / FINE
    assert (high - low).max() == pytest.approx(drawn["fill"], abs=0.05)
    across, upwards = (low + high) / 2 - 0.5
    assert (across, -upwards) == pytest.approx(drawn["aim"], abs=0.05)


@needs_pybullet
@pytest.mark.parametrize(
    ("part", "style"), [(part, style) for part in ("train", "val", "looks") for style in STYLES[part]]
)
def test_each_style_shows_a_figure(part, style):
    """In every frame; 'points' shows dots and 'outline' lines, so less of the picture than a filled figure."""
    drawn = next(d for d in (draw(0, part, "walk", n) for n in range(100)) if d["look"]["style"] == style)
    look = drawn["look"] | {"flat": True}
    camera, positions, rotations = filmed(drawn, np.arange(6) / 6)
    made_of = parts(drawn["body"], look)
    seen = cast(made_of, camera, positions, rotations, light_direction(drawn), FINE)
    figure = paint(seen, made_of, look)
    assert figure.shape == (6, FINE, FINE, 4)
    assert figure.dtype == np.float32
    assert ((figure >= 0) & (figure <= 1)).all()
    filled = (seen.part != NOTHING).mean(axis=(1, 2))
    assert (filled > 0.01).all()
    if style != "outline":  # whose lines reach over the edge
        np.testing.assert_array_equal(figure[..., 3] > 0, seen.part != NOTHING)
    colours = figure[figure[..., 3] > 0][:, :3]
    _, often = np.unique(colours, axis=0, return_counts=True)
    assert len(often) == {"clothes": 5, "patchwork": PALETTE, "rings": 2, "outline": 2, "checks": 2}.get(style, 1)
    assert often.min() > {"rings": 0.1, "outline": 0.1, "checks": 0.1}.get(style, 0) * often.sum()


@needs_pybullet
def test_the_nearer_part_hides_the_other_and_light_comes_from_its_side():
    drawn = draw(0, "train", "walk", 0)
    camera, positions, rotations = filmed(drawn, np.arange(3) / 6)
    parts_of = parts(drawn["body"], drawn["look"] | {"style": "points", "point_size": 0.1})
    centres = np.stack([positions[:, 0] - away * camera.forward for away in (0, 1)], axis=1)
    both = positions.copy()
    both[:, :2] = centres  # two balls on one ray: the root's, and the chest's nearer to the camera
    balls = [parts_of[0], parts_of[0]._replace(joint="chest")]
    for order in (balls, balls[::-1]):
        seen = cast(order, camera, both, rotations, camera.right[0], SIZE)
        x, y, _ = camera.project(centres, np.zeros(2))
        for i in range(3):
            column, row = int((x[i, 1] + 1) / 2 * SIZE), int((1 - y[i, 1]) / 2 * SIZE)
            assert order[seen.part[i, row, column]].joint == "chest"
    disc = seen.lit[0] * (seen.part[0] == 0)
    columns = np.nonzero((seen.part[0] == 0).any(axis=0))[0]
    middle = (columns[0] + columns[-1]) // 2
    assert disc[:, middle + 1 :].sum() > 3 * disc[:, :middle].sum()


@needs_pybullet
def test_ground_and_wall_are_seen_by_the_figures_camera():
    drawn = draw(0, "train", "run", 0)
    look = drawn["look"] | {"setting": "wall", "shake": [0, 0]}
    times = np.arange(6) / 6
    points, radii = outline(*pose(drawn, times), drawn["body"])
    points[..., 1] -= points[..., 1].min()
    camera = Camera(drawn | {"look": look}, points, radii, followed(points, times))
    background = Background(drawn | {"look": look}, camera, points, light_direction(drawn), ())
    pixels = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
    for i in (0, 5):
        _, first, x, z, _ = camera.ground(i, SIZE)
        u, v, depth = background._wall(i)
        far = background.away * background.facing + u[..., None] * background.across
        assert (depth > 0).all()
        for rows, places in (
            (pixels[first:], np.stack([x, np.zeros_like(x), z], axis=-1)),
            (pixels, far + v[..., None] * background.upwards),
        ):
            places = places.reshape(1, -1, 3).repeat(len(times), axis=0)
            across, upwards, _ = camera.project(places, np.zeros(places.shape[1]))
            wanted = np.stack(np.meshgrid(pixels, -rows), axis=-1).reshape(-1, 2)
            np.testing.assert_allclose(np.stack([across[i], upwards[i]], axis=-1), wanted, atol=2e-3)


@needs_pybullet
@pytest.mark.parametrize("setting", ["sky", "wall", "backdrop"])
@pytest.mark.parametrize("surface", ["plain", "grain", "pattern", "picture"])
def test_videos_of_every_surface_and_setting(setting, surface):
    drawn = draw(0, "train", "kick", 0)
    changed = {"setting": setting, "ground": surface, "wall": surface}
    video = frames(drawn | {"seconds": 0.4, "look": drawn["look"] | changed})
    assert video.shape == (round(0.4 * FPS), SIZE, SIZE, 3)
    assert video.dtype == np.uint8
    assert len(np.unique(video)) > 10


EFFECTS = {
    "shake": [0.03, 0.008],
    "back_blur": 2.0,
    "blur": 0.9,
    "lines": 0.5,
    "noise": 0.05,
    "gains": [0.8, 1.0, 1.0],
    "gamma": 0.75,
    "grey": True,
    "flicker": 0.08,
    "vignette": 0.6,
    "blend": 0.5,
    "letterbox": [0.1, True],
    "false_colours": 1,
    **{
        f"{where} {kind}": [
            {"kind": kind, "place": [0.38, 0.35], "motion": [0.1, 0.0], "turn": 10.0, "width": [0.03, 0.06], "gap": 0.2}
            | {"colour": [1.0, 0.0, 0.5], "opacity": 0.8}
        ]
        for where in ("occluders", "others")
        for kind in ("bar", "fence", "blob")
    },
}


@needs_pybullet
@pytest.mark.parametrize("name", EFFECTS)
def test_each_effect_changes_the_picture_and_keeps_its_form(name):
    drawn = draw(0, "train", "kick", 0) | {"seconds": 0.4}
    none = {
        "occluders": [],
        "others": [],
        "shake": [0, 0],
        "back_blur": 0,
        "blur": 0,
        "lines": 1,
        "noise": 0,
        "gains": [1, 1, 1],
    }
    none |= {"gamma": 1, "grey": False, "flicker": 0, "vignette": 0, "blend": 0, "letterbox": [0, False]}
    look = drawn["look"] | none | {"setting": "wall", "wall": "picture", "ground": "pattern", "false_colours": None}
    plain = frames(drawn | {"look": look})
    changed = frames(drawn | {"look": look | {name.split()[0]: EFFECTS[name]}})
    assert (changed.shape, changed.dtype) == (plain.shape, plain.dtype)
    moved = np.abs(changed.astype(int) - plain).mean(axis=(1, 2, 3))
    assert (moved[1:] > 0.2).all()  # a blend leaves the first frame as it is


def test_shrinking_averages_what_a_pixel_covers():
    pictures = np.random.default_rng(0).random((2, 9, 9, 4), dtype=np.float32)
    doubled = pictures.repeat(2, axis=1).repeat(2, axis=2)  # 18 × 18, of which 3 × 3 make a pixel
    wanted = doubled.reshape(2, 6, 3, 6, 3, 4).mean(axis=(2, 4))
    np.testing.assert_allclose(shrink(pictures), wanted, rtol=1e-6)


def test_resizing_and_blurring_keep_what_is_even():
    even = np.full((2, SIZE, SIZE, 3), 0.4, dtype=np.float32)
    for matrix in (effects.blur(SIZE, 1.5), effects.resize(SIZE, 50), effects.resize(50, SIZE)[:, :50]):
        found = effects.through(matrix, even[:, : matrix.shape[1], : matrix.shape[1]])
        assert found.shape == (2, len(matrix), len(matrix), 3)
        np.testing.assert_allclose(found, 0.4, atol=1e-6)
    np.testing.assert_array_equal(effects.blur(SIZE, 0), np.eye(SIZE, dtype=np.float32))


def test_pictures_come_from_videos_of_training_alone(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "walk").mkdir(exist_ok=True)
        encode(tmp_path / "walk" / f"{name}.mp4", np.full((4, 32, 48, 3), 200, dtype=np.uint8))
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "walk_test_split1.txt").write_text("a.avi 1\nb.avi 2\n")
    found = picture_videos(tmp_path)
    assert [path.name for path in found] == ["a.mp4"]
    shown = [picture(rng, found) for _ in range(10)]
    assert all(p.shape == (TEXTURE, TEXTURE, 3) and p.dtype == np.float32 for p in shown)
    photos = [np.allclose(p, 200 / 255, atol=0.03) for p in shown]
    assert 0 < sum(photos) < 10  # the others are collages


@needs_pybullet
def test_layout_resuming_and_the_same_bytes_again(tmp_path):
    counts = {"train": 1, "val": 0, "test": 0, "looks": 1}
    render(tmp_path / "out", 3, counts, workers=2)
    found = read_dataset("folders", tmp_path / "out", "train")
    assert found.classes == sorted(CLASSES)
    assert len(found.samples) == len(CLASSES)
    assert len(read_dataset("folders", tmp_path / "out" / "looks", "test").samples) == len(CLASSES)
    index = json.loads((tmp_path / "out" / "dataset.json").read_text())
    paths = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.mp4")}
    assert set(index["videos"]) == paths

    name = "train/kick/0000.mp4"
    video = tmp_path / "out" / name
    drawn = index["videos"][name]
    encode(tmp_path / "again.mp4", frames(drawn), drawn["look"]["crf"])
    assert video.read_bytes() == (tmp_path / "again.mp4").read_bytes()

    video.unlink()
    others = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.mp4")}
    render(tmp_path / "out", 3, counts, workers=1)
    assert video.read_bytes() == (tmp_path / "again.mp4").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in others} == others
    with pytest.raises(ValueError, match="another seed"):
        render(tmp_path / "out", 4, counts, workers=1)
