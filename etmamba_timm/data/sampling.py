"""Which frames of a video make up its clips: arithmetic on whole numbers."""

from typing import SupportsIndex


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
    last = num_video_frames - 1
    last_start = max(last - (num_frames - 1) * stride, 0)
    if num_clips == 1:
        starts = [last_start // 2]
    else:
        starts = [last_start * clip // (num_clips - 1) for clip in range(num_clips)]
    return [[min(start + frame * stride, last) for frame in range(num_frames)] for start in starts]
