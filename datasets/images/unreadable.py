"""Unreadable images: the first one ends the run, unless some may be skipped."""

from collections.abc import Callable, Iterable, Mapping

from datasets.errors import DataError


class BadImages:
    """The distinct unreadable images of a run so far, as {path: reason}, and how many there may be; `add`, `share` and
    `check` raise DataError for more. A rank is told of another's at the end of an epoch, and may pass it until then."""

    def __init__(self, limit: int, *, exchange: Callable[[dict[str, str]], list[dict[str, str]]] = lambda mine: [mine],
                 log: Callable[[str], None] = lambda line: None, known: Mapping[str, str] | None = None) -> None:
        self.limit, self.exchange, self.log, self.known = limit, exchange, log, dict(known or {})

    def add(self, found: Iterable[tuple[str, str]], *, log: bool = True) -> None:
        """Add images, and log those that are new."""
        for path, reason in found:
            if path not in self.known:
                self.known[path] = reason
                self.check(path)
                if log:
                    self.log(f"WARNING data: {path}: skipped, not readable as an image ({reason}); "
                             f"{len(self.known)} of at most {self.limit}")

    def share(self) -> None:
        """Add what the other ranks have found; called by all of them together, and raises on all."""
        for theirs in self.exchange(self.known):
            self.known |= theirs
        if self.known:
            self.check(next(reversed(self.known)))

    def check(self, path: str) -> None:
        """Raise DataError if there are too many."""
        if len(self.known) > self.limit:
            count = f" and {len(self.known) - 1} more" if len(self.known) > 1 else ""
            raise DataError(f"{path}{count}: not readable as an image ({self.known[path]}); repair or remove it, or "
                            f"allow some with --skip-bad {len(self.known)}")
