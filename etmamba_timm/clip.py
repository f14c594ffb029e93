"""How a clip is sampled: how many frames of a video, and how far apart."""

import operator
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
        stride: distance between neighbouring frames of the clip; 'spread' for one frame from each of `num_frames`
            equal parts of the whole video; None if unknown.

    Raises:
        ValueError: a number below 1, or a value of another type.
    """

    num_frames: int = 16
    stride: Stride = None

    def __post_init__(self) -> None:
        if not _is_count(self.num_frames):
            raise ValueError(f"num_frames is {self.num_frames!r}; it must be a whole number, 1 or more")
        if self.stride not in (None, SPREAD) and not _is_count(self.stride):
            raise ValueError(
                f"stride is {self.stride!r}; it must be the number of frames from one to the next (1 or more), or "
                f"{SPREAD!r} for frames spread over the whole video"
            )
        object.__setattr__(self, "num_frames", operator.index(self.num_frames))
        if self.stride not in (None, SPREAD):
            object.__setattr__(self, "stride", operator.index(self.stride))

    @property
    def is_spread(self) -> bool:
        """Whether the frames are spread over the whole video."""
        return self.stride == SPREAD

    def known(self) -> "Clip":
        """The clip with an unknown stride replaced by the paper's."""
        return replace(self, stride=DEFAULT_STRIDE) if self.stride is None else self

    @property
    def spacing(self) -> str:
        """The stride in words, such as '2 apart'."""
        if self.stride is None:
            return "at an unknown stride"
        return "spread over the whole video" if self.is_spread else f"{self.stride} apart"

    def to_config(self) -> dict:
        """The block `clip` of config.json."""
        return {"num_frames": self.num_frames, "stride": self.stride}

    @classmethod
    def from_config(cls, block: Mapping) -> "Clip":
        """Reads what `to_config` wrote.

        Raises:
            ValueError: an unknown setting, or an invalid value.
        """
        if unknown := sorted(map(str, block.keys() - {"num_frames", "stride"})):
            raise ValueError(f"unknown settings {', '.join(unknown)}; a clip has num_frames and stride")
        return cls(block.get("num_frames"), block.get("stride"))  # type: ignore[arg-type]  # Clip checks them


def parse_stride(text: str) -> Stride:
    """Parses a stride on the command line: a whole number, or 'spread'.

    Raises:
        ValueError: anything else.
    """
    return Clip(1, int(text) if text.isdecimal() else text).stride  # type: ignore[arg-type]  # Clip checks it


def _is_count(value: object) -> bool:
    return isinstance(value, SupportsIndex) and not isinstance(value, bool) and value.__index__() >= 1
