"""Memory that the C library keeps back."""

from __future__ import annotations

import ctypes
import logging

log = logging.getLogger(__name__)


def return_freed_memory() -> None:
    """Ask glibc to hand freed memory back to the system: else it keeps small blocks, tens of MB after a few graphs."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # another C library, another system
        log.debug("no malloc_trim here")
