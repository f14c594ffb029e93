"""Everything about weights: finding, reading, fitting and saving checkpoints."""

from .errors import CheckpointError, DownloadError
from .fit import fit
from .manifest import Checkpoint, find_checkpoint, manifest
from .read import LoadedCheckpoint, read_checkpoint
from .save import save_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "DownloadError",
    "LoadedCheckpoint",
    "find_checkpoint",
    "fit",
    "manifest",
    "read_checkpoint",
    "save_checkpoint",
]
