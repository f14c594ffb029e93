"""From video files to the clips a model takes: annotations, frames, sampling, transforms, datasets."""

from ..clip import Clip
from .ahead import read_ahead
from .annotations import (
    AnnotationError,
    Annotations,
    read_breakfast,
    read_folders,
    read_hmdb51,
    read_kinetics,
    read_ssv2,
)
from .augment import TrainTransform
from .dataset import EvalClips, TrainClips, Views, collate
from .embedded import EmbeddedVideo
from .ffmpeg import VideoError
from .frames import FrameFolder, open_video, probe, read_frames
from .huggingface import read_huggingface
from .layouts import LAYOUTS, SOURCES, SUBSETS, find_layout, is_one_folder, is_undivided, read_dataset, with_classes
from .lists import read_list
from .sampling import draw_clip, fixed_clips, random_clip, random_segments, sample_clips, sample_segments
from .split import read_split, split_videos, write_split
from .transforms import EvalTransform
from .video import VideoInfo, VideoReader

__all__ = [
    "LAYOUTS",
    "SOURCES",
    "SUBSETS",
    "AnnotationError",
    "Annotations",
    "Clip",
    "EmbeddedVideo",
    "EvalClips",
    "EvalTransform",
    "FrameFolder",
    "TrainClips",
    "TrainTransform",
    "VideoError",
    "VideoInfo",
    "VideoReader",
    "Views",
    "collate",
    "draw_clip",
    "find_layout",
    "fixed_clips",
    "is_one_folder",
    "is_undivided",
    "open_video",
    "probe",
    "random_clip",
    "random_segments",
    "read_ahead",
    "read_breakfast",
    "read_dataset",
    "read_folders",
    "read_frames",
    "read_hmdb51",
    "read_huggingface",
    "read_kinetics",
    "read_list",
    "read_split",
    "read_ssv2",
    "sample_clips",
    "sample_segments",
    "split_videos",
    "with_classes",
    "write_split",
]
