"""Which comparison belongs to which golden file of GLaMM."""

from __future__ import annotations

from collections.abc import Callable

from deixis_export.parity.glamm import (
    cases_evaluation,
    cases_language,
    cases_modules,
    cases_training,
    cases_words,
)
from deixis_export.parity.glamm.context import GlammContext
from deixis_export.parity.report import GoldenFile, Report

CASES: dict[str, Callable[[GlammContext, GoldenFile, Report], None]] = {
    **cases_modules.CASES,
    **cases_language.CASES,
    **cases_training.CASES,
    **cases_words.CASES,
    **cases_evaluation.CASES,
}

# Annotating pictures automatically is no part of deixis.
NOT_COVERED: tuple[str, ...] = ("grand_pipeline.json",)
