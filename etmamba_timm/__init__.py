"""ETMamba and VideoMamba for video action recognition, as timm models, registered with timm on import."""

from . import on_import, zoo
from .version import __version__ as __version__

__all__ = ["zoo"]

on_import.run_after("transformers", "etmamba_timm.hf")
