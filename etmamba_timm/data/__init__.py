"""From a video file to the clips a model takes: frames, sampling, transforms."""

from .ffmpeg import VideoError
from .sampling import sample_clips
from .transforms import EvalTransform
from .video import VideoInfo, VideoReader, probe, read_frames

__all__ = [
    "EvalTransform",
    "VideoError",
    "VideoInfo",
    "VideoReader",
    "probe",
    "read_frames",
    "sample_clips",
]
