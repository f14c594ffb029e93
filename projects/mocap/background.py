"""What is behind the figure: ground, wall and sky, with patterns, grain and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .variation import SIZE

if TYPE_CHECKING:
    from .scene import Camera

TEXTURE = 192  # pixels of a picture, both ways
PHOTOS = 0.6  # share of the pictures that are frames of videos, if there are videos
FIRST_FRAMES = 12  # of a video, one of which is taken


class Background:
    """Draws a video's background.

    Args:
        parameters: the video's.
        camera: the video's.
        points: the figure's, [T, P, 3].
        shadow: in each frame, as of `scene.shadow_of`.
        videos: where pictures are taken from.
    """

    def __init__(
        self, parameters: dict, camera: Camera, points: np.ndarray, light: np.ndarray, videos: Sequence[Path]
    ) -> None:
        self.look, self.camera, self.light = parameters["look"], camera, light
        self.tile = np.float32(parameters["tile"])
        self.alone = self.look["setting"] == "backdrop"  # a wall without ground
        kinds = ([] if self.alone else [self.look["ground"]]) + (
            [] if self.look["setting"] == "sky" else [self.look["wall"]]
        )
        rng = np.random.default_rng(self.look["picture_seed"])
        self.picture = picture(rng, videos) if "picture" in kinds else None
        self.grain = _grain(rng) if "grain" in kinds else None
        middle = camera.forward[len(points) // 2]
        if self.alone:
            self.facing = middle
        else:
            turn = np.radians(self.look["wall_turn"]) + np.arctan2(middle[2], middle[0])
            self.facing = np.array([np.cos(turn), 0, np.sin(turn)])
        self.away = (points @ self.facing).max() + self.look["wall_gap"]
        self.across = np.cross(self.facing, (0, 1, 0))
        self.across /= np.linalg.norm(self.across)
        self.upwards = np.cross(self.across, self.facing)

    def draw(self, frame: int, shadow: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
        """Ground, shadow, wall and sky, float32 [SIZE, SIZE, 3] of 0 to 1.

        Args:
            frame: which one.
            shadow: on the ground, as of `scene.shadow_of`.
        """
        look, camera = self.look, self.camera
        ambient, diffuse = look["light_strength"]
        sun = diffuse * self.light[1]
        level = np.float32(1 / (ambient + sun)) if look["flat"] else np.float32(1)
        slant, first, x, z, reach = camera.ground(frame, SIZE)
        overhead, horizon = (np.array(c, dtype=np.float32) for c in look["sky"])
        shown = np.empty((SIZE, SIZE, 3), dtype=np.float32)
        shown[:] = (horizon + np.clip(1.5 * slant[:, None], 0, 1) * (overhead - horizon))[:, None]
        if not self.alone:
            colour = self._surface(look["ground"], "ground", *self._turned(x, z))
            colour *= np.float32(ambient + sun) * level
            if look["shadow"]:
                colour *= 1 - np.float32(look["shadow"] * sun / (ambient + sun)) * darkness(x, z, *shadow)[..., None]
            fog = np.float32(look["fog"]) * np.clip((reach / np.float32(camera.distance) - 1.5) / 5, 0, 1)
            shown[first:] = colour + fog[..., None] * (horizon - colour)
        if look["setting"] != "sky":
            u, v, far = self._wall(frame)
            colour = self._surface(look["wall"], "wall", u, v) * (np.float32(ambient + 0.6 * diffuse) * level)
            if self.alone:
                return colour
            behind = np.ones((SIZE, SIZE), dtype=bool)
            behind[first:] = far[first:] < reach
            shown[behind] = colour[behind]
        return shown

    def _wall(self, frame: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each pixel's place on the wall, across and upwards, and its depth: [SIZE, SIZE] in metres."""
        camera, facing = self.camera, self.facing
        eye = camera.eye[frame]
        ahead, down, right = camera.rays(frame, SIZE)

        def along(axis: np.ndarray) -> np.ndarray:
            axis = axis.astype(np.float32)
            return (ahead @ axis + down @ axis)[:, None] + right @ axis

        depth = np.float32(self.away - eye @ facing) / np.maximum(along(facing), np.float32(0.05))
        u, v = (np.float32(eye @ axis) + depth * along(axis) for axis in (self.across, self.upwards))
        return u, v, depth

    def _turned(self, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        turn = np.radians(self.look["ground_turn"])
        one, two = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        return one * x + two * z, one * z - two * x

    def _surface(self, kind: str, name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Colours [..., 3] of a surface at places on it, in metres [...]."""
        one, two = (np.array(c, dtype=np.float32) for c in self.look[f"{name}_colours"])
        u, v = u + np.float32(self.look["offset"][0]), v + np.float32(self.look["offset"][1])
        if kind == "picture":
            dark, light = self.look["tones"]
            found = np.float32(dark) + np.float32(light - dark) * _sample(self.picture, u, v, self.look["picture_size"])
            return one + np.float32(self.look["picture_mix"]) * (found - one)
        if kind == "plain":
            return np.broadcast_to(one, (*u.shape, 3)).copy()
        if kind == "grain":
            share = _sample(self.grain, u, v, self.look["picture_size"])
        else:
            share = pattern(self.look["pattern"], u / self.tile, v / self.tile)[..., None]
        return one + share.astype(np.float32) * (two - one)


def picture(rng: np.random.Generator, videos: Sequence[Path] = ()) -> np.ndarray:
    """A picture, float32 [TEXTURE, TEXTURE, 3] of 0 to 1: a frame of a video, or a collage of shapes."""
    if len(videos) and rng.random() < PHOTOS:
        with av.open(str(videos[rng.integers(len(videos))])) as container:
            wanted = rng.integers(FIRST_FRAMES)
            for number, frame in enumerate(container.decode(video=0)):
                image = frame.to_image()
                if number == wanted:
                    break
        side = round(min(image.size) * rng.uniform(0.6, 1))
        left, top = (rng.integers(0, edge - side + 1) for edge in image.size)
        image = image.crop((left, top, left + side, top + side)).resize((TEXTURE, TEXTURE), Image.Resampling.BILINEAR)
    else:
        colours = (rng.beta(0.8, 0.8, (6, 3)) * 255).astype(int).tolist()
        image = Image.new("RGB", (TEXTURE, TEXTURE), tuple(colours[0]))
        pen = ImageDraw.Draw(image)
        for _ in range(rng.integers(10, 90)):
            size = TEXTURE * 0.03 / rng.uniform(0.06, 1, 2) ** 0.9
            x, y = rng.uniform(0, TEXTURE, 2)
            shade = rng.integers(-25, 26)
            colour = tuple(int(np.clip(c + shade, 0, 255)) for c in colours[rng.integers(len(colours))])
            box = (x - size[0], y - size[1], x + size[0], y + size[1])
            (pen.rectangle if rng.random() < 0.5 else pen.ellipse)(box, fill=colour)
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3)))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image, dtype=np.float32) / 255


def _grain(rng: np.random.Generator) -> np.ndarray:
    """Blotches of all sizes, float32 [TEXTURE, TEXTURE, 1] of 0 to 1."""
    total = np.zeros((TEXTURE, TEXTURE), dtype=np.float32)
    for octave in range(2, 8):
        small = rng.random((2**octave, 2**octave), dtype=np.float32)
        image = Image.fromarray(small).resize((TEXTURE, TEXTURE), Image.Resampling.BICUBIC)
        total += np.asarray(image) * 0.65**octave
    total -= total.min()
    return (total / total.max())[..., None]


def _sample(texture: np.ndarray, u: np.ndarray, v: np.ndarray, size: float) -> np.ndarray:
    """A texture at places in metres, `size` metres wide; its mirror images follow it without end."""
    spots = []
    for place in (u, v):
        pixel = np.floor(place * np.float32(TEXTURE / size)).astype(np.int32) % (2 * TEXTURE)
        spots.append(np.minimum(pixel, 2 * TEXTURE - 1 - pixel))
    return texture[TEXTURE - 1 - spots[1], spots[0]]


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


def pattern(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How much of a surface's second colour its points [...] have, 0 to 1; places in tiles."""
    patches = np.sin(1.1 * u + 0.7 * v) * np.sin(0.6 * v - 0.9 * u + 1) * 0.25  # so that it never quite repeats
    return np.clip(_PATTERNS[name](u, v) * np.float32(0.8) + 0.1 + patches, 0, 1)


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
