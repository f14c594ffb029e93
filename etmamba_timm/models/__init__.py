"""The models. Importing this registers them with timm."""

from .backbone import EtMamba
from .checkpoint import CheckpointError, read_checkpoint
from .convert import checkpoint_filter_fn
from .cost import Cost, count_cost
from .etmamba import (
    etmamba_m,
    etmamba_m_ebs,
    etmamba_s,
    etmamba_s_ebs,
    etmamba_ti,
    etmamba_ti_ebs,
    videomamba_m,
    videomamba_m_stfp,
    videomamba_s,
    videomamba_s_stfp,
    videomamba_ti,
    videomamba_ti_stfp,
)
from .manifest import Checkpoint, find_checkpoint, manifest
from .pretrained import DownloadError
from .save import save_checkpoint
from .variants import VARIANTS

__all__ = [
    "VARIANTS",
    "Checkpoint",
    "CheckpointError",
    "Cost",
    "DownloadError",
    "EtMamba",
    "checkpoint_filter_fn",
    "count_cost",
    "etmamba_m",
    "etmamba_m_ebs",
    "etmamba_s",
    "etmamba_s_ebs",
    "etmamba_ti",
    "etmamba_ti_ebs",
    "find_checkpoint",
    "manifest",
    "read_checkpoint",
    "save_checkpoint",
    "videomamba_m",
    "videomamba_m_stfp",
    "videomamba_s",
    "videomamba_s_stfp",
    "videomamba_ti",
    "videomamba_ti_stfp",
]
