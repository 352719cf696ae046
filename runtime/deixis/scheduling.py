"""How the threads of graph runs share the machine: how many, whether they spin, and where they are pinned."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Protocol, runtime_checkable

from deixis.errors import PromptError

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Scheduling:
    """Threads of graph runs.

    threads: of one run, the calling one included; 0 = as many as the engine likes. spin: threads that wait for work
    stay awake for a while. cores: numbers of the processors, as the system counts them from 0; the n-th thread of a
    run belongs on the n-th, () = anywhere. The calling thread is the first, and the caller's to pin.
    """

    threads: int = 0
    spin: bool = False
    cores: tuple[int, ...] = ()


@runtime_checkable
class Schedulable(Protocol):
    """An engine whose threads can be arranged."""

    scheduling: Scheduling

    def schedule(self, scheduling: Scheduling) -> None:
        """Arrange the threads of graphs that are loaded from now on."""
        ...


def make_scheduling(threads: int | None = None, spin: bool = False, cores: Sequence[int] | None = None) -> Scheduling:
    """What a caller asked for, checked. threads None: one per core given, or one per core that this process may use.

    Raises PromptError.
    """
    if threads is not None and (not isinstance(threads, Integral) or isinstance(threads, bool) or threads < 1):
        raise PromptError(f"threads must be a whole number from 1 on, found {threads!r}")
    if not isinstance(spin, bool):
        raise PromptError(f"spin must be True or False, found {spin!r}")
    if cores is None:
        return Scheduling(usable_cores() if threads is None else int(threads), spin)
    chosen = _checked_cores(cores)
    if threads is not None and threads != len(chosen):
        raise PromptError(f"{threads} threads do not fit {len(chosen)} cores; give one core per thread, or no threads")
    return Scheduling(len(chosen), spin, chosen)


def usable_cores() -> int:
    """Physical cores that this process may use, within its affinity and its cgroup's quota; 0 where nothing tells."""
    processors = _processors()
    if processors is None:
        return 0
    cores = {_text_of(Path(_SIBLINGS.format(number))) or str(number) for number in processors}
    quota, _, period = _text_of(_QUOTA).partition(" ")
    if quota.isdigit() and period.isdigit():
        return max(1, min(len(cores), math.ceil(int(quota) / int(period))))
    return len(cores)


def _checked_cores(cores: Sequence[int]) -> tuple[int, ...]:
    if sys.platform == "darwin":
        raise PromptError("cores: this system cannot pin threads; leave the option out")
    whole = not isinstance(cores, (str, bytes)) and all(
        isinstance(core, Integral) and not isinstance(core, bool) and core >= 0 for core in cores
    )
    if not whole or not len(cores):
        raise PromptError(f"cores must be numbers of processors from 0 on, such as [0, 1], found {cores!r}")
    chosen = tuple(int(core) for core in cores)
    if len(set(chosen)) != len(chosen):
        raise PromptError(f"cores name a processor twice: {list(chosen)}")
    allowed = _processors() or set(range(os.cpu_count() or 1))
    if strange := sorted(set(chosen) - allowed):
        raise PromptError(f"cores {strange} are not among those this process may use: {sorted(allowed)}")
    return chosen


def _processors() -> set[int] | None:
    """Numbers of the processors that this process may use; None where the system does not say."""
    return os.sched_getaffinity(0) if sys.platform == "linux" else None


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
