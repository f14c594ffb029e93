"""Words of messages."""

import difflib
from collections.abc import Iterable


def number_of(count: int, noun: str) -> str:
    """'1 file', '2 files', '0 classes'."""
    plural = noun + ("es" if noun.endswith(("s", "tch")) else "s")
    return f"{count} {noun if count == 1 else plural}"


def did_you_mean(words: Iterable[str], known: Iterable[str]) -> str:
    """' (did you mean epochs?)' for the known words that are nearest to unknown ones; '' if none is near."""
    known = list(known)
    close = [match for word in words for match in difflib.get_close_matches(word, known, 1)]
    return f" (did you mean {', '.join(close)}?)" if close else ""
