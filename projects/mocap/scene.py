"""A video's frames from its parameters: the figure by pybullet's software renderer, ground and sky by arithmetic."""

from __future__ import annotations

import numpy as np
import pybullet as bullet

from . import motion
from .variation import ACTIONS, FPS, SIZE

FINE = 2 * SIZE  # drawn at twice the size, then averaged
NEAR, FAR = 0.05, 60.0  # metres
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


def frames(parameters: dict) -> np.ndarray:
    """A video, uint8 [T, SIZE, SIZE, 3] RGB."""
    times = np.arange(round(parameters["seconds"] * FPS)) / FPS
    body = parameters["body"]
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
    strength = parameters["light_strength"]
    figure = Figure(body, parameters)
    video = []
    for i in range(len(times)):
        drawn = figure.draw(camera, i, positions[i], rotations[i], light, strength)
        video.append(compose(parameters, camera, i, drawn, shadow_of(points[i], body, light), light))
    return np.stack(video)


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

    def project(self, points: np.ndarray, radii: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x and y in the picture, -1 to 1, and the radii there, of balls: each [T, P]."""
        away = points - self.eye[:, None]
        depth = np.maximum((away * self.forward[:, None]).sum(-1), 0.3) * self.slope
        return (away * self.right[:, None]).sum(-1) / depth, (away * self.up[:, None]).sum(-1) / depth, radii / depth

    def ground(self, frame: int) -> tuple[np.ndarray, int, np.ndarray, np.ndarray, np.ndarray]:
        """What the pixels of a picture of FINE×FINE see of the ground, which lies at height 0.

        Returns the rise of each row's rays per metre of depth [FINE], the first row that meets the ground, and from
        that row on the x and z of each pixel's place [rows, FINE] and each row's depth [rows, 1].
        """
        steps = ((np.arange(FINE) + 0.5) / FINE * 2 - 1) * self.slope
        forward, right, up, eye = (a[frame].astype(np.float32) for a in (self.forward, self.right, self.up, self.eye))
        rows = (forward - steps[:, None] * up).astype(np.float32)  # the rays in the middle; the camera doesn't roll,
        columns = (steps[:, None] * right).astype(np.float32)  # so these have no rise
        first = int(np.searchsorted(-rows[:, 1], 0.01))
        depth = -eye[1] / rows[first:, None, 1]  # [rows, 1]
        x = eye[0] + depth * (rows[first:, None, 0] + columns[:, 0])
        z = eye[2] + depth * (rows[first:, None, 2] + columns[:, 2])
        return rows[:, 1], first, x, z, depth

    def matrices(self, frame: int) -> tuple[list[float], list[float]]:
        """View and projection, as pybullet takes them."""
        eye, ahead = self.eye[frame], self.eye[frame] + self.forward[frame]
        view = bullet.computeViewMatrix(eye.tolist(), ahead.tolist(), [0, 1, 0])
        return view, bullet.computeProjectionMatrixFOV(2 * np.degrees(np.arctan(self.slope)), 1, NEAR, FAR)


def light_direction(parameters: dict) -> np.ndarray:
    """Towards the light [3]."""
    azimuth, elevation = np.radians(parameters["light"]) + np.radians([parameters["azimuth"][0], 0])
    return np.array([np.cos(elevation) * np.cos(azimuth), np.sin(elevation), np.cos(elevation) * np.sin(azimuth)])


class Figure:
    """A body of meshes in pybullet, one for each part, each fixed to a joint; it replaces the one before it."""

    def __init__(self, body: dict, parameters: dict) -> None:
        if not bullet.isConnected():
            bullet.connect(bullet.DIRECT)
        bullet.resetSimulation()
        self.joints, self.bodies = [], []
        for joint, colour, (vertices, normals, triangles) in parts(body, parameters):
            shape = bullet.createVisualShape(
                bullet.GEOM_MESH,
                vertices=vertices.tolist(),
                indices=triangles.tolist(),
                normals=normals.tolist(),
                rgbaColor=[*colour, 1],
            )
            self.joints.append(motion.NAMES.index(joint))
            self.bodies.append(bullet.createMultiBody(0, baseVisualShapeIndex=shape))

    def draw(
        self,
        camera: Camera,
        frame: int,
        positions: np.ndarray,
        rotations: np.ndarray,
        light: np.ndarray,
        strength: tuple[float, float],
    ) -> tuple[np.ndarray, np.ndarray]:
        """The figure alone: float32 [FINE, FINE, 3] of 0 to 255, and where it is [FINE, FINE]."""
        for joint, body in zip(self.joints, self.bodies, strict=True):
            w, x, y, z = rotations[joint].tolist()
            bullet.resetBasePositionAndOrientation(body, positions[joint].tolist(), [x, y, z, w])
        ambient, diffuse = strength
        view, projection = camera.matrices(frame)
        _, _, rgb, _, owner = bullet.getCameraImage(
            FINE, FINE, view, projection, renderer=bullet.ER_TINY_RENDERER, shadow=0, lightDirection=light.tolist(),
            lightColor=[1, 1, 1], lightAmbientCoeff=ambient, lightDiffuseCoeff=diffuse, lightSpecularCoeff=0.05,
        )  # fmt: skip
        return rgb[..., :3].astype(np.float32), owner >= 0


def parts(body: dict, parameters: dict) -> list[tuple[str, list[float], tuple]]:
    """Joint, colour and mesh (in the joint's frame) of each part of the body."""
    g, torso, head = body["girth"], body["torso"], body["head"]
    thigh, shin = 0.422 * body["legs"], 0.410 * body["legs"]
    upper, lower = 0.275 * body["arms"], 0.255 * body["arms"]
    hips, shoulders = body["hips"], body["shoulders"]
    shirt, trousers, skin, shoes, hair = (parameters[k] for k in ("shirt", "trousers", "skin", "shoes", "hair"))
    forearm = shirt if parameters["sleeves"] == "long" else skin
    calf = trousers if parameters["legs"] == "long" else skin
    found = [
        ("root", trousers, ball((0, 0.03, 0), (0.115 * g, 0.13, 0.155 * hips * g))),
        ("root", shirt, ball((0, 0.16 * torso, 0), (0.11 * g, 0.16 * torso, 0.14 * g))),
        ("chest", shirt, ball((0, 0.12 * torso, 0), (0.125 * g, 0.19 * torso, 0.185 * shoulders))),
        ("neck", skin, limb(0.12, 0.05 * g, 0.045 * g, turned=True)),
        ("neck", skin, ball((0.02, 0.16 * head, 0), (0.095 * head, 0.12 * head, 0.085 * head))),
        ("neck", hair, ball((-0.018, 0.19 * head, 0), (0.1 * head, 0.105 * head, 0.092 * head))),
        ("neck", skin, ball((0.115 * head, 0.15 * head, 0), (0.02, 0.03, 0.018))),
    ]
    for side in ("left", "right"):
        found += [
            (f"{side}_hip", trousers, limb(thigh, 0.085 * g, 0.06 * g)),
            (f"{side}_knee", calf, limb(shin, 0.058 * g, 0.042 * g)),
            (f"{side}_ankle", shoes, ball((0.055, -0.035, 0), (0.14, 0.05, 0.055))),
            (f"{side}_shoulder", shirt, limb(upper, 0.06 * g, 0.045 * g)),
            (f"{side}_elbow", forearm, limb(lower, 0.044 * g, 0.033 * g)),
            (f"{side}_elbow", skin, ball((0, -lower - 0.03, 0), (0.04, 0.065, 0.035))),
        ]
    return found


def ball(centre: tuple, radii: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An ellipsoid: vertices [V, 3], normals [V, 3], triangles [3·N]."""
    angle = np.linspace(0, np.pi, 9)
    points, triangles = _turn(np.sin(angle), np.cos(angle))
    return points * radii + np.asarray(centre), motion.normalise(points / radii), triangles


def limb(length: float, top: float, bottom: float, turned: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A limb that hangs from the origin, round at both ends; `turned`, it stands on it. As `ball`."""
    angle = np.concatenate([np.linspace(0, np.pi / 2, 4), np.linspace(np.pi / 2, np.pi, 4)])
    radius = np.repeat([top, bottom], 4)
    normals, triangles = _turn(np.sin(angle), np.cos(angle))
    points, _ = _turn(np.sin(angle) * radius, np.cos(angle) * radius + np.repeat([0, -length], 4))
    return points + ((0, length, 0) if turned else (0, 0, 0)), normals, triangles


def _turn(radius: np.ndarray, height: np.ndarray, sides: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """A profile [R] turned about the y axis: points [R·sides, 3] and triangles."""
    angle = np.arange(sides) * 2 * np.pi / sides
    points = np.stack(
        [np.outer(radius, np.cos(angle)), np.repeat(height[:, None], sides, 1), np.outer(radius, np.sin(angle))], -1
    )
    a = np.arange((len(radius) - 1) * sides)
    b = a // sides * sides + (a + 1) % sides
    triangles = np.stack([a, b, a + sides, b, b + sides, a + sides], axis=-1)
    return points.reshape(-1, 3), triangles.reshape(-1)


def shadow_of(points: np.ndarray, body: dict, light: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The shadow on the ground of `points` [P, 3], those of `outline`, as thick lines.

    They go from [S, 2] to [S, 2], in x and z, and are half as thick as [S].
    """
    flat = (points - light * (points[:, 1:2] / light[1]))[:, [0, 2]]
    names = list(BALLS)
    start, end = (flat[[names.index(bone[i]) for bone in BONES]] for i in (0, 1))
    return start, end, np.array([radius for _, _, radius in BONES]) * body["girth"]


def compose(
    parameters: dict,
    camera: Camera,
    frame: int,
    figure: tuple[np.ndarray, np.ndarray],
    shadow: tuple[np.ndarray, np.ndarray, np.ndarray],
    light: np.ndarray,
) -> np.ndarray:
    """Sky, ground, shadow and figure in one frame, uint8 [SIZE, SIZE, 3]."""
    slant, first, x, z, reach = camera.ground(frame)
    sky = np.array(parameters["sky"], dtype=np.float32)
    picture = np.empty((FINE, FINE, 3), dtype=np.float32)
    picture[:] = (sky * (1 - 0.35 * np.clip(slant[:, None], 0, 1)))[:, None]
    ambient, diffuse = parameters["light_strength"]
    sun = diffuse * light[1]
    one, two = (np.array(c, dtype=np.float32) for c in parameters["ground_colours"])
    shade = np.float32(ambient + sun) - np.float32(0.8 * sun) * darkness(x, z, *shadow)
    fog = np.clip((reach / np.float32(camera.distance) - 1.5) / 5, 0, 1)
    share = ground(parameters, x, z)
    for channel in range(3):
        colour = (one[channel] + share * (two[channel] - one[channel])) * shade
        picture[first:, :, channel] = colour + fog * (sky[channel] - colour)
    picture = np.minimum(picture, 1) * 255
    colours, mask = figure
    picture[mask] = colours[mask]
    four = picture[::2, ::2] + picture[1::2, ::2] + picture[::2, 1::2] + picture[1::2, 1::2]
    return (four / 4 + 0.5).astype(np.uint8)


def darkness(x: np.ndarray, z: np.ndarray, start: np.ndarray, end: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """How far points of the ground [...] lie in the shadow, 0 to 1."""
    dark = np.zeros_like(x)
    edges = 1.3 * radii[:, None]
    low, high = np.minimum(start, end) - edges, np.maximum(start, end) + edges  # [S, 2]
    near = np.nonzero((x > low[:, 0].min()) & (x < high[:, 0].max()) & (z > low[:, 1].min()) & (z < high[:, 1].max()))
    x, z, found = x[near], z[near], dark[near]
    for (ax, az), (bx, bz), radius in zip(start.tolist(), end.tolist(), radii.tolist(), strict=True):
        dx, dz = bx - ax, bz - az
        px, pz = x - ax, z - az
        along = np.clip((px * dx + pz * dz) / (dx * dx + dz * dz + 1e-9), 0, 1)
        away = np.sqrt((px - along * dx) ** 2 + (pz - along * dz) ** 2)
        np.maximum(found, (1.3 * radius - away) / (0.6 * radius), out=found)
    dark[near] = np.minimum(found, 1)
    return dark


def ground(parameters: dict, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """How much of the ground's second colour points [...] of it have, 0 to 1."""
    turn, tile = np.radians(parameters["ground_turn"]), np.float32(parameters["tile"])
    across, along = parameters["ground_offset"]
    u = (np.float32(np.cos(turn)) * x + np.float32(np.sin(turn)) * z + np.float32(across)) / tile
    v = (np.float32(np.cos(turn)) * z - np.float32(np.sin(turn)) * x + np.float32(along)) / tile
    patches = np.sin(1.1 * u + 0.7 * v) * np.sin(0.6 * v - 0.9 * u + 1) * 0.25  # so that it never quite repeats
    return np.clip(_PATTERNS[parameters["ground"]](u, v) * np.float32(0.8) + 0.1 + patches, 0, 1)


def _bricks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    row = np.floor(2 * v)
    return np.minimum(_away(u + 0.5 * row), 0.5 * _away(2 * v)) > 0.04


def _away(u: np.ndarray) -> np.ndarray:
    """The distance to the next whole number."""
    return np.abs(u - np.round(u))


def _blotches(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    waves = np.sin(3.1 * u + 1.7 * np.sin(1.3 * v)) + np.sin(2.7 * v + 1.9 * np.sin(1.1 * u) + 2)
    return np.clip(0.5 + waves, 0, 1)


_PATTERNS = {
    "checker": lambda u, v: (np.floor(u) + np.floor(v)) % 2,
    "stripes": lambda u, v: np.floor(1.5 * u) % 2,
    "bricks": _bricks,
    "blotches": _blotches,
    "dots": lambda u, v: np.hypot(_away(u), _away(v)) < 0.3,
    "triangles": lambda u, v: (np.floor(u) + np.floor(v) + np.floor(u + v)) % 2,
}
