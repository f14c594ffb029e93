"""The selective scan: one public function and a table of backends."""

from .selective_scan import bidirectional_scan, scan_backends, selective_scan

__all__ = ["bidirectional_scan", "scan_backends", "selective_scan"]
