"""What a sample's video may be: a file, or bytes in a row of a Hugging Face dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, eq=False)
class EmbeddedVideo:
    """A video stored in a row of a dataset. `VideoReader` takes it like a path; its bytes are read when it is opened.

    Attributes:
        rows: the column of videos as Arrow tables, memory-mapped from disk.
        row: the number of the video's row.
        name: the name of the original file, or None.
    """

    rows: datasets.Dataset
    row: int
    name: str | None

    def open(self, mode: str = "rb") -> BinaryIO:
        """The encoded video as a file, without copying it."""
        import pyarrow

        return pyarrow.BufferReader(self.rows[self.row].column(0)[0]["bytes"].as_buffer())

    def is_file(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"row {self.row}" + (f" ({self.name})" if self.name else "")


VideoFile: TypeAlias = Path | EmbeddedVideo
