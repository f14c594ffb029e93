"""What all tests share."""

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _as_talkative_as_before() -> Iterator[None]:
    """A command that a test runs in this process doesn't leave its log level to the next test."""
    package = logging.getLogger("etmamba_timm")
    level = package.level
    yield
    package.setLevel(level)
