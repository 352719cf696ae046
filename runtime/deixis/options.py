"""What a caller may choose for one call."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

from deixis.errors import CancelledError, DeadlineError, PromptError

Check = Callable[[], None]  # called between graph runs; raises when the call has to end


@dataclass(frozen=True)
class DecodeOptions:
    """Options of one call of a task.

    refer, trace and segment generate no text: there `max_new_tokens` and `beams` do not apply and are ignored.

    max_new_tokens: most tokens to generate; None = as the bundle says. The cache capacity chosen at load is the upper
    limit.
    beams: hypotheses of beam search, 1 = greedy; None = as the bundle says.
    deadline_ms: wall-clock time of the call; when it has passed, the call raises DeadlineError.
    cancel: set it (from any thread) and the call raises CancelledError.
    Both are looked at before every graph run, so before every decoder step: a run that has begun is waited for. What a
    stream has given until then stays valid.

    Raises PromptError when a value makes no sense.
    """

    max_new_tokens: int | None = None
    beams: int | None = None
    deadline_ms: float | None = None
    cancel: threading.Event | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "beams"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
                raise PromptError(f"{name} must be a whole number from 1 on, found {value!r}")
        deadline = self.deadline_ms
        if deadline is not None and (
            not isinstance(deadline, Real) or isinstance(deadline, bool) or not math.isfinite(deadline) or deadline < 0
        ):
            raise PromptError(f"deadline_ms must be a number of milliseconds from 0 on, found {deadline!r}")

    def start(self) -> Check:
        """Start the clock. The returned function raises DeadlineError or CancelledError when the call has to end."""
        end = None if self.deadline_ms is None else time.monotonic() + self.deadline_ms / 1000

        def check() -> None:
            if self.cancel is not None and self.cancel.is_set():
                raise CancelledError("the call was cancelled")
            if end is not None and time.monotonic() >= end:
                raise DeadlineError(f"the deadline of {self.deadline_ms:g} ms passed; allow more time or fewer tokens")

        return check
