"""What all tests share."""

import logging
import os
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of several processes, and for those that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _as_talkative_as_before() -> Iterator[None]:
    """A command that a test runs in this process doesn't leave its log levels to the next test."""
    loggers = [logging.getLogger(name) for name in ("etmamba_timm", "etmamba_timm.ops.kernels")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
