"""What the figure is made of: balls, boxes and limbs, each fixed to a joint."""

from __future__ import annotations

from typing import NamedTuple

from .motion import NAMES


class Part(NamedTuple):
    """A ball, a box, or a limb that hangs from `place`, in the frame of a joint; metres.

    `size` is a ball's radii, half of a box's edges, or a limb's length and its radii at the top and at the bottom.
    `colour` names one of the palette.
    """

    kind: str
    joint: str
    colour: str
    place: tuple[float, float, float]
    size: tuple[float, float, float]


def parts(body: dict, look: dict) -> list[Part]:
    """The parts of a body of these proportions, in the look's shape."""
    shape = "points" if look["style"] == "points" else look["shape"]
    return _SHAPES[shape](body, look)


def _filled(body: dict, look: dict, wide: bool = False) -> list[Part]:
    g, torso, head = body["girth"] * look["thickness"], body["torso"], body["head"]
    thigh, shin, upper, lower = lengths(body)
    hips, shoulders = body["hips"], body["shoulders"]
    forearm = "shirt" if wide or look["sleeves"] == "long" else "skin"
    calf = "trousers" if wide or look["legs"] == "long" else "skin"
    arm, leg = (1.5, 1.35) if wide else (1, 1)
    found = [
        Part("ball", "root", "trousers", (0, 0.03, 0), (0.115 * g, 0.13, 0.155 * hips * g)),
        Part("ball", "root", "shirt", (0, 0.16 * torso, 0), (0.11 * g, 0.16 * torso, 0.14 * g)),
        Part("ball", "chest", "shirt", (0, 0.12 * torso, 0), (0.125 * g, 0.19 * torso, 0.185 * shoulders)),
        Part("limb", "neck", "skin", (0, 0.12, 0), (0.12, 0.045 * g, 0.05 * g)),
        Part("ball", "neck", "skin", (0.02, 0.16 * head, 0), (0.095 * head, 0.12 * head, 0.085 * head)),
        Part("ball", "neck", "hair", (-0.018, 0.19 * head, 0), (0.1 * head, 0.105 * head, 0.092 * head)),
        Part("ball", "neck", "skin", (0.115 * head, 0.15 * head, 0), (0.02, 0.03, 0.018)),
    ]
    if wide:
        found.append(Part("ball", "root", "shirt", (0, 0.06, 0), (0.15 * g, 0.22, 0.18 * hips * g)))
    if wide and look["skirt"]:
        found.append(Part("limb", "root", "trousers", (0, 0.05, 0), (0.45, 0.11 * g, 0.19 * g)))
    for side in ("left", "right"):
        found += [
            Part("limb", f"{side}_hip", "trousers", (0, 0, 0), (thigh, 0.085 * g * leg, 0.06 * g * leg)),
            Part("limb", f"{side}_knee", calf, (0, 0, 0), (shin, 0.058 * g * leg, 0.042 * g * leg**2)),
            Part("ball", f"{side}_ankle", "shoes", (0.055, -0.035, 0), (0.14, 0.05, 0.055)),
            Part("limb", f"{side}_shoulder", "shirt", (0, 0, 0), (upper, 0.06 * g * arm, 0.045 * g * arm)),
            Part("limb", f"{side}_elbow", forearm, (0, 0, 0), (lower, 0.044 * g * arm, 0.033 * g * arm)),
            Part("ball", f"{side}_elbow", "skin", (0, -lower - 0.03, 0), (0.04, 0.065, 0.035)),
        ]
    return found


def _loose(body: dict, look: dict) -> list[Part]:
    return _filled(body, look, wide=True)


def _rods(body: dict, look: dict, trunk: float, limb: float, head: float, knobs: float = 0) -> list[Part]:
    """Limbs of even thickness; `trunk`, `limb`, `head` and `knobs` are radii."""
    g, torso = body["girth"] * look["thickness"], body["torso"]
    trunk, limb = trunk * g, limb * g
    thigh, shin, upper, lower = lengths(body)
    spine, breast = 0.236 * torso, 0.2435 * torso
    across, below = (0.7 * limb, 0.7 * limb, 0.183 * body["shoulders"]), (0.7 * limb, 0.7 * limb, 0.085 * body["hips"])
    found = [
        Part("limb", "root", "shirt", (0, spine, 0), (spine, trunk, trunk)),
        Part("limb", "chest", "shirt", (0, 0.19 * torso, 0), (0.19 * torso, trunk, trunk)),
        Part("box", "chest", "shirt", (-0.024, breast, 0), across),
        Part("box", "root", "trousers", (0, 0, 0), below),
        Part("limb", "neck", "skin", (0, 0.1, 0), (0.1, limb, limb)),
        Part("ball", "neck", "skin", (0.01, 0.17 * body["head"], 0), (head * body["head"],) * 3),
    ]
    for side in ("left", "right"):
        found += [
            Part("limb", f"{side}_hip", "trousers", (0, 0, 0), (thigh, 1.2 * limb, 1.2 * limb)),
            Part("limb", f"{side}_knee", "trousers", (0, 0, 0), (shin, limb, limb)),
            Part("box", f"{side}_ankle", "shoes", (0.05, -0.03, 0), (0.12, limb, limb)),
            Part("limb", f"{side}_shoulder", "shirt", (0, 0, 0), (upper, limb, limb)),
            Part("limb", f"{side}_elbow", "skin", (0, 0, 0), (lower, limb, limb)),
        ]
        joints = ("hip", "knee", "ankle", "shoulder", "elbow") if knobs else ()
        found += [Part("ball", f"{side}_{joint}", "hair", (0, 0, 0), (knobs,) * 3) for joint in joints]
    return found


def _capsules(body: dict, look: dict) -> list[Part]:
    return _rods(body, look, trunk=0.125, limb=0.055, head=0.12)


def _sticks(body: dict, look: dict) -> list[Part]:
    return _rods(body, look, trunk=0.032, limb=0.026, head=0.11, knobs=look["knobs"])


def _boxes(body: dict, look: dict) -> list[Part]:
    g, torso, head = body["girth"] * look["thickness"], body["torso"], body["head"]
    thigh, shin, upper, lower = lengths(body)
    found = [
        Part("box", "root", "trousers", (0, 0.02, 0), (0.095 * g, 0.12, 0.14 * body["hips"])),
        Part("box", "chest", "shirt", (0, 0.06 * torso, 0), (0.1 * g, 0.2 * torso, 0.17 * body["shoulders"])),
        Part("box", "neck", "skin", (0.01, 0.16 * head, 0), (0.1 * head, 0.12 * head, 0.09 * head)),
        Part("box", "neck", "hair", (-0.01, 0.25 * head, 0), (0.11 * head, 0.06 * head, 0.1 * head)),
    ]
    for side in ("left", "right"):
        for joint, colour, length, wide in (
            ("hip", "trousers", thigh, 0.068),
            ("knee", "trousers", shin, 0.055),
            ("shoulder", "shirt", upper, 0.052),
            ("elbow", "skin", lower + 0.06, 0.042),
        ):
            size = (wide * g, length / 2, wide * g)
            found.append(Part("box", f"{side}_{joint}", colour, (0, -length / 2, 0), size))
        found.append(Part("box", f"{side}_ankle", "shoes", (0.05, -0.03, 0), (0.13, 0.05, 0.05)))
    return found


def _points(body: dict, look: dict) -> list[Part]:
    """A ball at every joint that turns, at the hands, and for the head; nothing between them."""
    size = (look["point_size"],) * 3
    _, _, _, lower = lengths(body)
    joints = [name for name in NAMES if name not in ("neck", "chest")]
    found = [Part("ball", joint, "shirt", (0, 0, 0), size) for joint in joints]
    found += [Part("ball", f"{side}_elbow", "shirt", (0, -lower, 0), size) for side in ("left", "right")]
    return [*found, Part("ball", "neck", "shirt", (0.01, 0.16 * body["head"], 0), (1.5 * look["point_size"],) * 3)]


def lengths(body: dict) -> tuple[float, float, float, float]:
    """Of thigh, shin, upper arm and forearm."""
    return 0.422 * body["legs"], 0.410 * body["legs"], 0.275 * body["arms"], 0.255 * body["arms"]


_SHAPES = {
    "filled": _filled,
    "loose": _loose,
    "capsules": _capsules,
    "boxes": _boxes,
    "sticks": _sticks,
    "points": _points,
}
