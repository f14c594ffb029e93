"""Which frames of a video make up its clips: arithmetic on whole numbers."""

from random import Random
from typing import SupportsIndex

from ..clip import Clip


def draw_clip(clip: Clip, num_video_frames: int, random: Random) -> list[int]:
    """The frame numbers of one clip for training, drawn at random. An unknown stride is taken as the paper's."""
    clip = clip.known()
    if isinstance(clip.stride, int):
        return random_clip(num_video_frames, clip.num_frames, clip.stride, random=random)
    return random_segments(num_video_frames, clip.num_frames, random=random)


def fixed_clips(clip: Clip, num_video_frames: int, num_clips: int = 1) -> list[list[int]]:
    """The frame numbers of clips for evaluation, always the same. An unknown stride is taken as the paper's."""
    clip = clip.known()
    if isinstance(clip.stride, int):
        return sample_clips(num_video_frames, clip.num_frames, clip.stride, num_clips)
    return sample_segments(num_video_frames, clip.num_frames, num_clips)


def sample_clips(num_video_frames: int, num_frames: int = 16, stride: int = 2, num_clips: int = 1) -> list[list[int]]:
    """Dense sampling: the frame numbers of `num_clips` clips of `num_frames` frames each, `stride` frames apart.

    A clip spans `(num_frames - 1) * stride + 1` frames. One clip stands in the video's middle; the starts of several
    are spread evenly from the first one possible to the last, both included (rounded down), so that in a short video
    they overlap. In a video shorter than the span, every clip starts at frame 0 and repeats the last frame at its end.

    Returns:
        `num_clips` lists of `num_frames` numbers, each list ascending and within 0 ... num_video_frames - 1.

    Raises:
        ValueError: an argument is below 1.
    """
    _check(num_video_frames, num_frames, stride, num_clips)
    last = num_video_frames - 1
    last_start = max(last - (num_frames - 1) * stride, 0)
    if num_clips == 1:
        starts = [last_start // 2]
    else:
        starts = [last_start * clip // (num_clips - 1) for clip in range(num_clips)]
    return [[min(start + frame * stride, last) for frame in range(num_frames)] for start in starts]


def sample_segments(num_video_frames: int, num_frames: int = 16, num_clips: int = 1) -> list[list[int]]:
    """Uniform sampling: each clip takes one frame from each of `num_frames` equal segments of the whole video.

    One clip takes the segments' middles; several take `num_clips` places spread evenly within each segment. A video
    with fewer frames repeats them.

    Returns, raises: as `sample_clips`.
    """
    _check(num_video_frames, num_frames, 1, num_clips)
    parts = 2 * num_frames * num_clips  # half a place is one part
    return [
        [(2 * (frame * num_clips + clip) + 1) * num_video_frames // parts for frame in range(num_frames)]
        for clip in range(num_clips)
    ]


def random_clip(num_video_frames: int, num_frames: int = 16, stride: int = 2, *, random: Random) -> list[int]:
    """One clip of dense sampling that starts anywhere with equal chance; see `sample_clips`."""
    _check(num_video_frames, num_frames, stride, 1)
    last = num_video_frames - 1
    start = random.randint(0, max(last - (num_frames - 1) * stride, 0))
    return [min(start + frame * stride, last) for frame in range(num_frames)]


def random_segments(num_video_frames: int, num_frames: int = 16, *, random: Random) -> list[int]:
    """One clip of uniform sampling, a frame drawn from each segment with equal chance; see `sample_segments`."""
    _check(num_video_frames, num_frames, 1, 1)
    edges = [frame * num_video_frames // num_frames for frame in range(num_frames + 1)]
    return [random.randint(edges[i], max(edges[i], edges[i + 1] - 1)) for i in range(num_frames)]


def _check(num_video_frames: int, num_frames: int, stride: int, num_clips: int) -> None:
    for name, value, remedy in (
        ("num_video_frames", num_video_frames, "give a video that holds at least one frame"),
        ("num_frames", num_frames, "ask for at least one frame in a clip"),
        ("stride", stride, "use 1 for neighbouring frames"),
        ("num_clips", num_clips, "ask for at least one clip"),
    ):
        if not isinstance(value, SupportsIndex):
            raise ValueError(f"{name} is {value!r}; it must be a whole number")
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more: {remedy}")
