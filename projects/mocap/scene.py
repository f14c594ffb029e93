"""A video's frames from its parameters: where the figure and the camera are, and what is put together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import effects, motion
from .background import Background
from .bodies import Part, parts
from .figure import NOTHING, Drawn, cast
from .variation import ACTIONS, FPS, SIZE

FINE = SIZE * 3 // 2  # the figure is drawn at this size, then averaged
STILL = 0.3  # seconds: how far the camera's following is smoothed

# What the figure fills, for framing it and for its shadow: joint, place in the joint's frame, radius.
BALLS = {
    **{name: (name, (0, 0, 0), 0.06) for name in motion.NAMES},
    "breast": ("chest", (0, 0.12, 0), 0.15),
    "belly": ("root", (0, 0.03, 0), 0.13),
    "head": ("neck", (0, 0.17, 0), 0.12),
    **{f"{side}_hand": (f"{side}_elbow", (0, -0.28, 0), 0.06) for side in ("left", "right")},
    **{f"{side}_toes": (f"{side}_ankle", (0.13, -0.045, 0), 0.04) for side in ("left", "right")},
    **{f"{side}_heel": (f"{side}_ankle", (-0.04, -0.045, 0), 0.04) for side in ("left", "right")},
}
# What casts the shadow: from, to, radius.
BONES = (
    ("belly", "chest", 0.13),
    ("chest", "neck", 0.15),
    ("neck", "head", 0.1),
    ("left_shoulder", "right_shoulder", 0.06),
    *(
        (f"{side}_{a}", f"{side}_{b}", radius)
        for side in ("left", "right")
        for a, b, radius in (
            ("hip", "knee", 0.07),
            ("knee", "ankle", 0.05),
            ("heel", "toes", 0.04),
            ("shoulder", "elbow", 0.05),
            ("elbow", "hand", 0.045),
        )
    ),
)


def frames(parameters: dict, videos: Sequence[Path] = ()) -> np.ndarray:
    """A video, uint8 [T, SIZE, SIZE, 3] RGB; `videos` are where it takes pictures for its surfaces from."""
    times = np.arange(round(parameters["seconds"] * FPS)) / FPS
    body, look = parameters["body"], parameters["look"]
    positions, rotations = pose(parameters, times)
    points, radii = outline(positions, rotations, body)
    level = np.percentile((points[..., 1] - radii).min(axis=1), 5)
    positions[..., 1] -= level
    points[..., 1] -= level
    target = followed(points, times)
    if not ACTIONS[parameters["action"]].camera_follows:
        target = target.mean(axis=0, keepdims=True).repeat(len(times), axis=0)
    camera = Camera(parameters, points, radii, target)
    light = light_direction(parameters)
    made_of = parts(body, look)
    drawn = cast(made_of, camera, positions, rotations, light, FINE)
    background = Background(parameters, camera, points, light, videos)
    behind = np.stack([background.draw(i, shadow_of(points[i], body, light)) for i in range(len(times))])
    for other in look["others"]:
        effects.cover(behind, other)
    if look["back_blur"]:
        behind = effects.through(effects.blur(SIZE, look["back_blur"]), behind)
    figure = shrink(paint(drawn, made_of, look))
    return effects.apply(figure[..., :3] + behind * (1 - figure[..., 3:]), look)


def paint(drawn: Drawn, made_of: list[Part], look: dict) -> np.ndarray:
    """The figure in its style, float32 [T, S, S, 4]: colours of 0 to 1, and 1 where it is, 0 elsewhere."""
    style, palette = look["style"], look["palette"]
    mask = drawn.part != NOTHING
    part = drawn.part[mask]
    colours = [palette[p.colour] for p in made_of]
    if style == "patchwork":
        colours = [look["patches"][i % len(look["patches"])] for i in range(len(made_of))]
    elif style != "clothes":
        colours = [palette["shirt"]] * len(made_of)
    colour = np.array(colours, dtype=np.float32)[part]
    if style in ("rings", "checks"):
        cells = np.floor(drawn.place[mask] / look["pattern_size"] + 0.25).astype(int)
        odd = (cells[:, 1] if style == "rings" else cells.sum(axis=-1)) % 2 == 1
        colour[odd] = look["other"]
    if style == "outline":
        colour[:] = look["ground_colours" if look["setting"] == "sky" else "wall_colours"][0]
    if not look["flat"]:
        ambient, diffuse = look["light_strength"]
        colour *= (np.float32(ambient) + np.float32(diffuse) * drawn.lit[mask])[:, None]
    figure = np.zeros((*mask.shape, 4), dtype=np.float32)
    figure[mask] = np.pad(np.minimum(colour, 1), ((0, 0), (0, 1)), constant_values=1)
    if style == "outline":
        lines = edges(drawn.part, round(look["line_width"] * FINE))
        figure[lines] = [*palette["shirt"], 1]
    return figure


def shrink(pictures: np.ndarray) -> np.ndarray:
    """Two pixels for every three, each the average of what it covers: [T, 3·N, 3·N, C] to [T, 2·N, 2·N, C]."""
    for axis in (1, 2):
        first, middle, last = (pictures.take(range(i, pictures.shape[axis], 3), axis) for i in range(3))
        middle *= 0.5
        pairs = np.stack([first + middle, last + middle], axis=axis + 1)
        pictures = pairs.reshape(*pictures.shape[:axis], -1, *pictures.shape[axis + 1 :])
    return pictures / np.float32(2.25)


def edges(part: np.ndarray, width: int) -> np.ndarray:
    """Where one part ends and another begins: bool [T, S, S], lines of `width` pixels."""
    lines = np.zeros(part.shape, dtype=bool)
    down, right = part[:, 1:] != part[:, :-1], part[:, :, 1:] != part[:, :, :-1]
    size = part.shape[1]
    for shift in range(-(width // 2), width - width // 2):
        low, high = max(0, -shift), size - 1 - max(0, shift)
        lines[:, low + shift : high + shift] |= down[:, low:high]
        lines[:, :, low + shift : high + shift] |= right[:, :, low:high]
    return lines


def recording_times(parameters: dict, times: np.ndarray) -> np.ndarray:
    """The time in the recording that is shown at `times` in the video, both in seconds [T]."""
    action = ACTIONS[parameters["action"]]
    rate = action.pace * parameters["speed"]
    if action.part is None:
        start = parameters["phase"] * motion.read_recording(action.recording).seconds
        return start - rate * times if action.backwards else start + rate * times
    first, last = action.part
    shown = rate * parameters["seconds"]
    start = last - shown + parameters["phase"] * (shown - (last - first))
    return start + shown - rate * times if action.backwards else start + rate * times


def pose(parameters: dict, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions [T, 13, 3] and rotations [T, 13, 4] of the joints at `times` [T]."""
    action = ACTIONS[parameters["action"]]
    cyclic = action.part is None
    recording = motion.read_recording(action.recording)
    recording = recording.closed() if cyclic else recording
    recording = recording.mirrored() if parameters["mirror"] else recording
    root, rotations = recording.at(recording_times(parameters, times), cyclic)
    rng = np.random.default_rng(parameters["noise_seed"])
    rotations = motion.multiply(rotations, motion.wobble(rng, times, parameters["noise"]))
    return motion.place(root, rotations, parameters["body"])


def followed(points: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Where the camera looks [T, 3]: the middle of the figure's `points` [T, P, 3], smoothed; up and down half as far.

    A line is fitted around each time, so that the camera doesn't lag behind at the ends.
    """
    middle = (points.min(axis=1) + points.max(axis=1)) / 2
    middle[:, 1] = (middle[:, 1] + middle[:, 1].mean()) / 2
    gap = times - times[:, None]  # [T, T]
    weight = np.exp(-((gap / STILL) ** 2) / 2)
    zeroth, first, second = ((weight * gap**k).sum(axis=1, keepdims=True) for k in range(3))
    return weight * (second - first * gap) / (zeroth * second - first**2) @ middle


def outline(positions: np.ndarray, rotations: np.ndarray, body: dict) -> tuple[np.ndarray, np.ndarray]:
    """Balls that the figure fills, as in `BALLS`: centres [T, P, 3] and radii [P]."""
    joints = [motion.NAMES.index(joint) for joint, _, _ in BALLS.values()]
    offsets = np.array([offset for _, offset, _ in BALLS.values()])
    radii = np.array([radius for _, _, radius in BALLS.values()])
    return positions[:, joints] + motion.rotate(rotations[:, joints], offsets), radii * body["girth"]


class Camera:
    """Where the camera stands and looks in each frame, such that the figure takes `fill` of the picture.

    `eye`, `right`, `up`, `forward`: [T, 3]. `slope`: half the picture's width at distance 1.
    """

    def __init__(self, parameters: dict, points: np.ndarray, radii: np.ndarray, target: np.ndarray) -> None:
        count = len(points)
        part = np.linspace(0, 1, count)
        azimuth, elevation = (
            np.radians(a + part * (b - a)) for a, b in (parameters["azimuth"], parameters["elevation"])
        )
        self.forward = -np.stack(
            [np.cos(elevation) * np.cos(azimuth), np.sin(elevation), np.cos(elevation) * np.sin(azimuth)], axis=-1
        )
        self.right = motion.normalise(np.cross(self.forward, (0, 1, 0)))
        self.up = np.cross(self.right, self.forward)
        self.distance = distance = parameters["distance"]
        self.slope, shift = 0.5, np.zeros(2)
        wanted = 2 * np.array(parameters["aim"])
        for _ in range(10):
            self.eye = target + shift[0] * self.right + shift[1] * self.up - distance * self.forward
            x, y, reach = self.project(points, radii)
            low = np.array([(x - reach).min(), (y - reach).min()])
            high = np.array([(x + reach).max(), (y + reach).max()])
            shift += ((low + high) / 2 - wanted) * distance * self.slope
            self.slope *= (high - low).max() / 2 / parameters["fill"]
        across, upwards = (2 * distance * self.slope * shaken(parameters, count)).T[..., None]
        self.eye = self.eye + across * self.right + upwards * self.up

    def project(self, points: np.ndarray, radii: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x and y in the picture, -1 to 1, and the radii there, of balls: each [T, P]."""
        away = points - self.eye[:, None]
        depth = np.maximum((away * self.forward[:, None]).sum(-1), 0.3) * self.slope
        return (away * self.right[:, None]).sum(-1) / depth, (away * self.up[:, None]).sum(-1) / depth, radii / depth

    def rays(self, frame: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rays of a picture of size × size, of depth 1, float32.

        A pixel's is the sum of three: the ray ahead [3], what its row adds [size, 3], and its column [size, 3].
        """
        steps = (((np.arange(size) + 0.5) / size * 2 - 1) * self.slope)[:, None].astype(np.float32)
        forward, right, up = (a[frame].astype(np.float32) for a in (self.forward, self.right, self.up))
        return forward, -steps * up, steps * right

    def ground(self, frame: int, size: int) -> tuple[np.ndarray, int, np.ndarray, np.ndarray, np.ndarray]:
        """What the pixels of a picture of size × size see of the ground, which lies at height 0.

        Returns the rise of each row's rays per metre of depth [size], the first row that meets the ground, and from
        that row on the x and z of each pixel's place [rows, size] and each row's depth [rows, 1].
        """
        ahead, down, columns = self.rays(frame, size)
        eye = self.eye[frame].astype(np.float32)
        rows = ahead + down  # the rays in the middle; the camera doesn't roll, so the columns add no rise
        first = int(np.searchsorted(-rows[:, 1], 0.01))
        depth = -eye[1] / rows[first:, None, 1]  # [rows, 1]
        x = eye[0] + depth * (rows[first:, None, 0] + columns[:, 0])
        z = eye[2] + depth * (rows[first:, None, 2] + columns[:, 2])
        return rows[:, 1], first, x, z, depth


def light_direction(parameters: dict) -> np.ndarray:
    """Towards the light [3]."""
    azimuth, elevation = np.radians(parameters["look"]["light"]) + np.radians([parameters["azimuth"][0], 0])
    return np.array([np.cos(elevation) * np.cos(azimuth), np.sin(elevation), np.cos(elevation) * np.sin(azimuth)])


def shaken(parameters: dict, count: int) -> np.ndarray:
    """How far the camera is off in each of `count` frames of a video, across and upwards [count, 2], in frames."""
    slow, quick = parameters["look"]["shake"]
    rng = np.random.default_rng(parameters["noise_seed"] + 1)
    phase = np.arange(count)[:, None] / FPS * rng.uniform(0.5, 1.5, 2) + rng.uniform(0, 1, 2)
    return slow * np.sin(2 * np.pi * phase) + quick * rng.standard_normal((count, 2))


def shadow_of(points: np.ndarray, body: dict, light: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The shadow on the ground of `points` [P, 3], those of `outline`, as thick lines.

    They go from [S, 2] to [S, 2], in x and z, and are half as thick as [S].
    """
    flat = (points - light * (points[:, 1:2] / light[1]))[:, [0, 2]]
    names = list(BALLS)
    start, end = (flat[[names.index(bone[i]) for bone in BONES]] for i in (0, 1))
    return start, end, np.array([radius for _, _, radius in BONES]) * body["girth"]
