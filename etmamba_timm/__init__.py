"""ETMamba and VideoMamba for video action recognition, as timm models, registered with timm on import."""

from . import zoo

__version__ = "0.1.0"
__all__ = ["zoo"]
