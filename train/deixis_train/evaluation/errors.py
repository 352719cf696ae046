"""The error of measurements."""

from __future__ import annotations

from deixis.errors import DeixisError


class EvaluationError(DeixisError, ValueError):
    """A measurement cannot be made: one line saying what is missing or wrong, and what to do."""
