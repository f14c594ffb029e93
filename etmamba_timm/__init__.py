"""ETMamba and VideoMamba for video action recognition, as timm models, registered with timm on import."""

from . import on_import, zoo

__version__ = "0.1.0"
__all__ = ["zoo"]

on_import.run_after("transformers", "etmamba_timm.hf")
