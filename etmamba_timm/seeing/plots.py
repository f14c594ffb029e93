"""Shared by all plots: matplotlib without its global state, colours, and writing files."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..files import check_file, whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
# Safe for colour-blind readers (Okabe & Ito 2008, without the light yellow); markers differ as well.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*", "<", ">")
NO_VALUE = "#d9d9d9"  # grey, for unknown values and exact zeros
_DPI = 150


def new_figure(width: float, height: float) -> "Figure":
    """Creates an empty figure.

    Args:
        width, height: in inches, at 150 pixels per inch.

    Returns: the figure.

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


def check_plot_file(path: str | Path) -> None:
    """Checks that a plot can be written to `path`. Call it before the work.

    Raises:
        ValueError: another suffix than .png, .pdf or .svg, or a path that can't be written.
    """
    check_file(path, SUFFIXES, "plots")


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Writes a figure to a file, completely or not at all; the suffix decides the format.

    Raises:
        ValueError: as `check_plot_file`.
    """
    check_plot_file(path)
    with whole_file(path) as draft:
        figure.savefig(draft)


def missing(error: ImportError) -> ImportError:
    """The error to raise if a package of the extra `analyze` can't be imported."""
    return ImportError(f"{error.name} isn't installed; pip install 'etmamba-timm[analyze]'", name=error.name)


def short(label: str, length: int = 28) -> str:
    """Shortens a class name for a plot. It loses its middle, since many names only differ at the end."""
    if len(label) <= length:
        return label
    end = (length - 1) // 2
    return label[: length - 1 - end].rstrip() + "…" + label[-end:].lstrip()
