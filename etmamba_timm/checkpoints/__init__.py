"""Everything about weights: finding, reading, fitting and saving checkpoints."""

from .fetch import DownloadError
from .manifest import Checkpoint, find_checkpoint, manifest
from .read import CheckpointError, read_checkpoint
from .remap import checkpoint_filter_fn
from .save import save_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "DownloadError",
    "checkpoint_filter_fn",
    "find_checkpoint",
    "manifest",
    "read_checkpoint",
    "save_checkpoint",
]
