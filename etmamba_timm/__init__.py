"""ETMamba and VideoMamba for video action recognition, as timm models. Importing this registers them with timm."""

from . import models

__version__ = "0.1.0"
__all__ = ["models"]
