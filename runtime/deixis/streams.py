"""Results that come piece by piece."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Whole = TypeVar("Whole")


class ResultStream(Iterator[Item], Generic[Item, Whole]):
    """Items of one result as they come; `result` is the whole of it. Belongs to one thread at a time.

    Nothing is computed but when an item is asked for. `close` (or the end of a `with` block) gives up what has not been
    taken.
    """

    def __init__(self, items: Generator[Item, None, Whole]) -> None:
        self._items = items
        self._whole: Whole | None = None
        self._error: BaseException | None = None

    def __enter__(self: Stream) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __next__(self) -> Item:
        try:
            return next(self._items)
        except StopIteration as end:
            if end.value is not None:
                self._whole = end.value
            raise StopIteration from None
        except BaseException as error:
            self._error = error
            raise

    @property
    def result(self) -> Whole:
        """The whole. Items not yet taken are run through first. Raises what the stream raised; ValueError when it was
        closed before its end.
        """
        if self._error is not None:
            raise self._error
        for _ in self:
            pass
        if self._whole is None:
            raise ValueError("the stream was closed before its end, so there is no result")
        return self._whole

    def close(self) -> None:
        """Give up what has not been taken. May be called twice, and after the end."""
        self._items.close()


Stream = TypeVar("Stream", bound=ResultStream)
