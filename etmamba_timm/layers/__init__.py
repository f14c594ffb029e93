"""The parts of the models. `STEMS` and `BLOCKS` are what the models' `stem` and `block` arguments choose from."""

from .bimamba import BiMamba
from .block import BiMambaBlock, EbsBlock
from .ebs import Ebs
from .embed import PatchEmbed, resample_spatial, resample_temporal, to_tokens
from .fold import fold_weights
from .motion import Motion
from .norm import LayerNorm, RmsNorm
from .recompute import Recomputing
from .stcm import LocalBranch, StcmBlock
from .stfp import Stfp

STEMS = {"stfp": Stfp, "none": None}
BLOCKS = {"stcm": StcmBlock, "ebs": EbsBlock, "bimamba": BiMambaBlock}

__all__ = [
    "BLOCKS",
    "STEMS",
    "BiMamba",
    "BiMambaBlock",
    "Ebs",
    "EbsBlock",
    "LayerNorm",
    "LocalBranch",
    "Motion",
    "PatchEmbed",
    "Recomputing",
    "RmsNorm",
    "StcmBlock",
    "Stfp",
    "fold_weights",
    "resample_spatial",
    "resample_temporal",
    "to_tokens",
]
