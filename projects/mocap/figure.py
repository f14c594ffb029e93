"""Draws the figure by casting a ray through each pixel at the parts of the body, all frames at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import motion
from .bodies import Part

if TYPE_CHECKING:
    from .scene import Camera

NOTHING = 255  # the part that a pixel without one shows


class Drawn(NamedTuple):
    """What each pixel shows of the figure: [T, S, S].

    `part`: which one, or `NOTHING`. `lit`: 0 where the light doesn't fall to 1 where it falls straight. `place`
    [T, S, S, 3]: where on the part, in metres, in the joint's frame.
    """

    part: np.ndarray
    lit: np.ndarray
    place: np.ndarray


def cast(
    parts: list[Part], camera: Camera, positions: np.ndarray, rotations: np.ndarray, light: np.ndarray, size: int
) -> Drawn:
    """The figure in each frame, in pictures of size × size.

    Args:
        parts: of the body.
        camera: of T frames.
        positions, rotations: of the joints, [T, 13, 3] and [T, 13, 4].
        light: towards it [3].
        size: of the pictures.
    """
    count = len(positions)
    depth = np.full(count * size * size, np.inf, dtype=np.float32)
    drawn = Drawn(
        np.full(count * size * size, NOTHING, dtype=np.uint8),
        np.zeros(count * size * size, dtype=np.float32),
        np.zeros((count * size * size, 3), dtype=np.float32),
    )
    steps = (((np.arange(size) + 0.5) / size * 2 - 1) * camera.slope).astype(np.float32)
    turns, axes = motion.matrices(rotations), (camera.forward, camera.up, camera.right)
    for index, (kind, joint, _, place, extent) in enumerate(parts):
        j = motion.NAMES.index(joint)
        turn = turns[:, j]  # [T, 3, 3]; a vector from the left is turned back
        ahead, up, right = ((a[:, None] @ turn)[:, 0].astype(np.float32) for a in axes)
        away = ((camera.eye - positions[:, j])[:, None] @ turn)[:, 0]
        towards = (light @ turn).astype(np.float32)
        for shape, start, sizes in _primitives(kind, place, extent):
            rows, columns = _window(camera, positions[:, j], turn, shape, start, sizes, size)
            if rows.size == 0 or columns.size == 0:
                continue
            origin = (away - np.asarray(start)).astype(np.float32)
            down = ahead[:, None] - steps[np.clip(rows, 0, size - 1)][..., None] * up[:, None]  # [T, H, 3]
            along = steps[np.clip(columns, 0, size - 1)][..., None] * right[:, None]  # [T, W, 3]
            rays = [down[:, :, None, i] + along[:, None, :, i] for i in range(3)]  # [T, H, W]
            inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None]
            where, far, hit, normal = _MEET[shape](origin, rays, sizes, inside)
            t, h, w = where
            pixel = (t * size + rows[t, h]) * size + columns[t, w]
            near = far < depth[pixel]
            pixel = pixel[near]
            depth[pixel] = far[near]
            drawn.part[pixel] = index
            drawn.lit[pixel] = np.clip((normal[near] * towards[t[near]]).sum(-1), 0, 1)
            drawn.place[pixel] = hit[near] + np.asarray(start, dtype=np.float32)
    return Drawn(*(array.reshape(count, size, size, *array.shape[1:]) for array in drawn))


def _primitives(kind: str, place: tuple, size: tuple) -> list[tuple[str, tuple, tuple]]:
    """Shape, place and size of what a part consists of: a limb is a cone with a ball at each end."""
    if kind != "limb":
        return [(kind, place, size)]
    length, top, bottom = size
    end = (place[0], place[1] - length, place[2])
    return [("cone", place, size), ("ball", place, (top,) * 3), ("ball", end, (bottom,) * 3)]


def _window(
    camera: Camera, at: np.ndarray, turn: np.ndarray, shape: str, start: tuple, sizes: tuple, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [T, H] and columns [T, W] that may show a primitive; some may lie beyond the picture."""
    ends = [start] if shape != "cone" else [start, (start[0], start[1] - sizes[0], start[2])]
    reach = {"ball": max(sizes), "box": float(np.linalg.norm(sizes)), "cone": max(sizes[1:])}[shape]
    points = at[:, None] + np.array(ends, dtype=float) @ turn.swapaxes(1, 2)
    x, y, radius = camera.project(points, np.full(len(ends), 1.1 * reach))
    found = []
    for low, high in (((-y - radius).min(1), (-y + radius).max(1)), ((x - radius).min(1), (x + radius).max(1))):
        first = np.floor((low + 1) / 2 * size).astype(int)
        last = np.ceil((high + 1) / 2 * size).astype(int)
        seen = (last > 0) & (first < size)
        first, last = np.clip(first, 0, size - 1), np.clip(last, 1, size)
        longest = (last - first)[seen].max() if seen.any() else 0
        found.append(np.where(seen, first, size)[:, None] + np.arange(longest))
    return found[0], found[1]


def _ball(origin: np.ndarray, rays: list, radii: tuple, inside: np.ndarray) -> tuple:
    radius = np.asarray(radii, dtype=np.float32)
    o = (origin / radius).T[:, :, None, None]
    d = [ray / r for ray, r in zip(rays, radii, strict=True)]
    a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] + o[2] * d[2]
    root = b * b - a * ((o * o).sum(0) - 1)
    where = np.nonzero((root > 0) & inside)
    far = (-b[where] - np.sqrt(root[where])) / a[where]
    hit = origin[where[0]] + far[:, None] * np.stack([ray[where] for ray in rays], axis=-1)
    return where, far, hit, motion.normalise(hit / radius**2)


def _cone(origin: np.ndarray, rays: list, size: tuple, inside: np.ndarray) -> tuple:
    length, top, bottom = (np.float32(s) for s in size)
    slant = (top - bottom) / length  # the radius is top + slant · y
    ox, oy, oz = origin.T[:, :, None, None]
    dx, dy, dz = rays
    girth = top + slant * oy
    a = dx * dx + dz * dz - slant * slant * dy * dy
    b = ox * dx + oz * dz - slant * dy * girth
    root = b * b - a * (ox * ox + oz * oz - girth * girth)
    where = np.nonzero((root > 0) & (a > 1e-6) & inside)
    far = (-b[where] - np.sqrt(root[where])) / a[where]
    hit = origin[where[0]] + far[:, None] * np.stack([ray[where] for ray in rays], axis=-1)
    between = (hit[:, 1] < 0) & (hit[:, 1] > -length)
    hit, far = hit[between], far[between]
    normal = np.stack([hit[:, 0], -slant * (top + slant * hit[:, 1]), hit[:, 2]], axis=-1)
    return tuple(axis[between] for axis in where), far, hit, motion.normalise(normal)


def _box(origin: np.ndarray, rays: list, half: tuple, inside: np.ndarray) -> tuple:
    near, out = np.float32(-np.inf), np.float32(np.inf)
    for o, d, h in zip(origin.T[:, :, None, None], rays, half, strict=True):
        d = np.where(np.abs(d) < 1e-6, np.float32(1e-6), d)
        one, other = (-np.float32(h) - o) / d, (np.float32(h) - o) / d
        near = np.maximum(near, np.minimum(one, other))
        out = np.minimum(out, np.maximum(one, other))
    where = np.nonzero((near < out) & inside)
    far = near[where]
    hit = origin[where[0]] + far[:, None] * np.stack([ray[where] for ray in rays], axis=-1)
    share = hit / np.asarray(half, dtype=np.float32)
    face = np.abs(share).argmax(axis=-1)
    normal = np.zeros_like(hit)
    rows = np.arange(len(hit))
    normal[rows, face] = np.sign(share[rows, face])
    return where, far, hit, normal


_MEET = {"ball": _ball, "cone": _cone, "box": _box}
