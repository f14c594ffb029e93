"""Sampling: the frame numbers of a video's clips, in integer arithmetic."""

from random import Random
from typing import SupportsIndex

from ..clip import Clip


def draw_clip(clip: Clip, num_video_frames: int, random: Random) -> list[int]:
    """The frame numbers of one random clip, for training. An unknown stride is the paper's."""
    clip = clip.known()
    if isinstance(clip.stride, int):
        return random_clip(num_video_frames, clip.num_frames, clip.stride, random=random)
    return random_segments(num_video_frames, clip.num_frames, random=random)


def fixed_clips(clip: Clip, num_video_frames: int, num_clips: int = 1) -> list[list[int]]:
    """The frame numbers of fixed clips, for evaluation. An unknown stride is the paper's."""
    clip = clip.known()
    if isinstance(clip.stride, int):
        return sample_clips(num_video_frames, clip.num_frames, clip.stride, num_clips)
    return sample_segments(num_video_frames, clip.num_frames, num_clips)


def sample_clips(num_video_frames: int, num_frames: int = 16, stride: int = 2, num_clips: int = 1) -> list[list[int]]:
    """Dense sampling: the frame numbers of `num_clips` clips of `num_frames` frames each, `stride` frames apart.

    A clip spans `(num_frames - 1) * stride + 1` frames. A single clip is centred in the video; the starts of several
    are spread evenly from the first possible one to the last, both included (rounded down), and overlap in a short
    video. In a video shorter than the span, every clip starts at frame 0 and ends with repeats of the last frame.

    Returns:
        `num_clips` lists of `num_frames` numbers, each ascending and between 0 and num_video_frames - 1.

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

    A single clip takes the middle of each segment; several take `num_clips` positions spread evenly in each segment.
    In a video with fewer frames, frames repeat.

    Returns, raises: as `sample_clips`.
    """
    _check(num_video_frames, num_frames, 1, num_clips)
    parts = 2 * num_frames * num_clips  # in units of half the distance between positions
    return [
        [(2 * (frame * num_clips + clip) + 1) * num_video_frames // parts for frame in range(num_frames)]
        for clip in range(num_clips)
    ]


def random_clip(num_video_frames: int, num_frames: int = 16, stride: int = 2, *, random: Random) -> list[int]:
    """One clip of dense sampling with a uniformly random start; see `sample_clips`."""
    _check(num_video_frames, num_frames, stride, 1)
    last = num_video_frames - 1
    start = random.randint(0, max(last - (num_frames - 1) * stride, 0))
    return [min(start + frame * stride, last) for frame in range(num_frames)]


def random_segments(num_video_frames: int, num_frames: int = 16, *, random: Random) -> list[int]:
    """One clip of uniform sampling, a uniformly random frame of each segment; see `sample_segments`."""
    _check(num_video_frames, num_frames, 1, 1)
    edges = [frame * num_video_frames // num_frames for frame in range(num_frames + 1)]
    return [random.randint(edges[i], max(edges[i], edges[i + 1] - 1)) for i in range(num_frames)]


def _check(num_video_frames: int, num_frames: int, stride: int, num_clips: int) -> None:
    for name, value, remedy in (
        ("num_video_frames", num_video_frames, "give a video with at least one frame"),
        ("num_frames", num_frames, "ask for at least one frame in a clip"),
        ("stride", stride, "use 1 for neighbouring frames"),
        ("num_clips", num_clips, "ask for at least one clip"),
    ):
        if not isinstance(value, SupportsIndex):
            raise ValueError(f"{name} is {value!r}; it must be a whole number")
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more: {remedy}")
