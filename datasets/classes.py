"""Classes are joined by name, never by position, wherever two data sets, or a data set and a network, meet."""

import unicodedata
from collections.abc import Sequence

from datasets.errors import DataError


def join_classes(found: Sequence[str], known: Sequence[str], *, place: str, owner: str) -> dict[str, int]:
    """The label of each class that was found: its position among those that the `owner` knows, which may be more.
    DataError for a name that is not known, saying `place` and which are."""
    labels = {name: label for label, name in enumerate(known)}
    for name in found:
        if name not in labels:
            alike = next((other for other in known if folded(other) == folded(name)), None)
            remedy = ("leave it out, or train with images of it" if alike is None else
                      f"that one has {alike}, which is spelled in another way: rename one of them")
            raise DataError(f"{place}{name}: no such class in {owner}, which knows {some_of(known)}; {remedy}")
    return {name: labels[name] for name in found}


def some_of(names: Sequence[str]) -> str:
    """The first names of many."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def folded(name: str) -> str:
    """A class name without what people and file systems do not tell apart: case, and how accents are stored."""
    return unicodedata.normalize("NFC", name).casefold().strip()
