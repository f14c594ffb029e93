"""The operators of the models, with kernels of their own for CPUs and GPUs."""

from .conv_norm_relu import conv_norm_relu
from .kernels.choice import plain_operators
from .kernels.load_gpu import on_gpu
from .local_conv import local_conv
from .norm import norm
from .scan import bidirectional_scan, scan_backends, selective_scan
from .short_conv import short_conv

__all__ = [
    "bidirectional_scan",
    "conv_norm_relu",
    "local_conv",
    "norm",
    "on_gpu",
    "plain_operators",
    "scan_backends",
    "selective_scan",
    "short_conv",
]
