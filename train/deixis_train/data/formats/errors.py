"""What goes wrong with data: an error for data that cannot be used, and the count of records passed over."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from deixis.errors import DeixisError

log = logging.getLogger(__name__)

JUDGED_FROM = 100  # records; before that a share says little
NAMED = 3  # records that the final error quotes


class DataError(DeixisError, ValueError):
    """A data set is absent, empty, of another format, or has too many malformed records."""


class MalformedError(ValueError):
    """One record cannot be used. Raised while it is parsed; `Skips` turns it into a count and a line in the log."""


class Skips:
    """Counts the records of one pass over a source, and gives up when too many of them are malformed.

    Args:
        name: of the source, for the message.
        allowed: share of records that may be malformed, 0 to 1. It is judged from 100 records on, and at the end.
    """

    def __init__(self, name: str, allowed: float) -> None:
        self.name = name
        self.allowed = allowed
        self.seen = 0
        self.skipped = 0
        self._first: list[str] = []

    @contextmanager
    def record(self, where: str) -> Iterator[None]:
        """Parse one record inside of this: a `MalformedError` is logged and counted, and the next one may come."""
        self.seen += 1
        try:
            yield
        except MalformedError as error:
            self._note(where, str(error), 1)

    def skip(self, where: str, what: str, records: int = 1) -> None:
        """Pass over `records` records that had not been counted yet, e.g. all those of a picture that is missing."""
        self.seen += records
        self._note(where, what, records)

    def finish(self) -> None:
        """Judge the whole pass. Raises DataError when more than the allowed share was malformed."""
        if self.skipped > self.allowed * self.seen:
            raise DataError(
                f"source {self.name!r}: {self.skipped} of {self.seen} records are malformed, more than the "
                f"{self.allowed:.1%} allowed (max_skipped); the first: {'; '.join(self._first)}"
            )

    def _note(self, where: str, what: str, records: int) -> None:
        self.skipped += records
        if len(self._first) < NAMED:
            self._first.append(f"{where}: {what}")
        log.warning("%s: %s", where, what)
        if self.seen >= JUDGED_FROM:
            self.finish()
