"""What a clip is: how many frames of a video it takes, and how far apart they are."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, SupportsIndex

SPREAD: Literal["spread"] = "spread"
Stride = int | Literal["spread"] | None
DEFAULT_STRIDE = 2  # paper 4.2


@dataclass(frozen=True)
class Clip:
    """The sampling of a clip.

    Attributes:
        num_frames: frames in the clip.
        stride: frames from one to the next; 'spread' for one frame from each of `num_frames` equal parts of the whole
            video; None where it isn't known.

    Raises:
        ValueError: a number below 1, or another kind of value.
    """

    num_frames: int = 16
    stride: Stride = None

    def __post_init__(self) -> None:
        if not _is_count(self.num_frames):
            raise ValueError(f"num_frames is {self.num_frames!r}; it must be a whole number, 1 or more")
        if self.stride not in (None, SPREAD) and not _is_count(self.stride):
            raise ValueError(
                f"stride is {self.stride!r}; it must be the frames from one to the next (1 or more), or {SPREAD!r} for "
                "frames spread over the whole video"
            )

    @property
    def is_spread(self) -> bool:
        """Whether the frames are spread over the whole video."""
        return self.stride == SPREAD

    def known(self) -> "Clip":
        """The same clip; an unknown stride becomes the paper's."""
        return replace(self, stride=DEFAULT_STRIDE) if self.stride is None else self

    @property
    def spacing(self) -> str:
        """'2 apart'."""
        if self.stride is None:
            return "at an unknown stride"
        return "spread over the whole video" if self.is_spread else f"{self.stride} apart"

    def to_config(self) -> dict:
        """The block `clip` of config.json."""
        return {"num_frames": self.num_frames, "stride": self.stride}

    @classmethod
    def from_config(cls, block: Mapping) -> "Clip":
        """What `to_config` wrote. Raises ValueError for anything else."""
        if unknown := sorted(map(str, block.keys() - {"num_frames", "stride"})):
            raise ValueError(f"unknown settings {', '.join(unknown)}; a clip has num_frames and stride")
        return cls(block.get("num_frames"), block.get("stride"))  # type: ignore[arg-type]  # checked there


def parse_stride(text: str) -> Stride:
    """A stride as it is written on a command line: a whole number, or 'spread'. Raises ValueError."""
    return Clip(1, int(text) if text.isdecimal() else text).stride  # type: ignore[arg-type]


def _is_count(value: object) -> bool:
    return isinstance(value, SupportsIndex) and not isinstance(value, bool) and value.__index__() >= 1
