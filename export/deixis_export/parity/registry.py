"""Which comparison belongs to which golden file.

Every module of cases offers `CASES`: a function by the name, or the pattern of names, of the files that it compares. To
cover another file, write its case and add its module here.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable

from deixis_export.parity import (
    cases_bert,
    cases_boxes,
    cases_data,
    cases_e2e,
    cases_evaluation,
    cases_losses,
    cases_modules,
)
from deixis_export.parity.context import Context
from deixis_export.parity.report import GoldenFile, Report

Case = Callable[[Context, GoldenFile, Report], None]

CASES: dict[str, Case] = {
    **cases_modules.CASES,
    **cases_bert.CASES,
    **cases_e2e.CASES,
    **cases_boxes.CASES,
    **cases_losses.CASES,
    **cases_evaluation.CASES,
    **cases_data.CASES,
}

# Parts of the reference that have no counterpart here yet.
NOT_COVERED: tuple[str, ...] = ()


def matching(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns means this file."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
