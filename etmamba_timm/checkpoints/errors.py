"""What goes wrong with checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint that can't be read, or doesn't fit the model."""


class DownloadError(RuntimeError):
    """The Hub can't be reached, is too slow, or doesn't have the file."""


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
