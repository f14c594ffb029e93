"""ETMamba and VideoMamba for video action recognition, as timm models. Importing this registers them with timm."""

from . import zoo

__version__ = "0.1.0"
__all__ = ["zoo"]
