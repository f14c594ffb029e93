"""ETMamba and VideoMamba for video action recognition, as timm models."""

__version__ = "0.1.0"
