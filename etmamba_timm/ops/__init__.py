"""The operators of the models: the selective scan, and convolutions with a kernel of their own on the CPU."""

from .conv_norm_relu import conv_norm_relu
from .local_conv import local_conv
from .norm import norm
from .scan import bidirectional_scan, scan_backends, selective_scan
from .short_conv import short_conv

__all__ = [
    "bidirectional_scan",
    "conv_norm_relu",
    "local_conv",
    "norm",
    "scan_backends",
    "selective_scan",
    "short_conv",
]
