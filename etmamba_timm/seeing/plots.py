"""What all figures share: matplotlib, which an extra brings, without its global state; colours; whole files or none."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..files import check_file, whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
# Told apart by the colour-blind (Okabe & Ito 2008), the light yellow left out; and shapes that are told apart anyway.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*", "<", ">")
NO_VALUE = "#d9d9d9"  # grey: nothing is known there, or nothing arrives
_DPI = 150


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size, in inches; 10 are 1500 pixels.

    Raises:
        ImportError: matplotlib isn't installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing(error) from error
    figure = Figure((width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_target(path: str | Path) -> None:
    """Raises ValueError if no figure can be written to `path`: to be called before the work."""
    check_file(path, SUFFIXES, "figures")


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Writes the file, whole or not at all; its suffix picks the format.

    Raises:
        ValueError: as `check_target`.
    """
    check_target(path)
    with whole_file(path) as draft:
        figure.savefig(draft)


def missing(error: ImportError) -> ImportError:
    """The error that says how to get what the extra `analyze` brings."""
    return ImportError(f"{error.name} isn't installed; pip install 'etmamba-timm[analyze]'", name=error.name)


def short(label: str, length: int = 28) -> str:
    """A class's name; one too long for a figure loses its middle, since many differ at the end alone."""
    if len(label) <= length:
        return label
    end = (length - 1) // 2
    return label[: length - 1 - end].rstrip() + "…" + label[-end:].lstrip()
