"""What the machine can do at best, measured in the same run: reading memory, and multiplying matrices.

Reading: threads go through a buffer far larger than the caches, each through its share, and only read. Two ways are
tried, and the faster counts: libc's memchr for a byte that is not there, and numpy's largest int64. Both let other
threads run. Multiplying: onnxruntime's own product of square matrices, the best of two sizes.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from deixis_bench.bench.machine import free_memory_bytes, last_cache_bytes
from deixis_bench.bench.ort_probe import ProbeError, product_rate

CACHES = 8  # times the last cache, so that what is in it at the start is little of the buffer
LEAST, MOST = 256 << 20, 1 << 30  # bytes of the buffer
REPEATS = 5
SIDES = (1024, 2048)  # of the matrices
ABSENT = 7  # the buffer holds ones


def measure(device: str, threads: int, repeats: int = REPEATS, sides: tuple[int, ...] = SIDES) -> dict[str, Any]:
    """The roofline with so many threads, in GB/s (10^9 bytes) and Gflop/s (10^9 operations).

    A number that cannot be measured is None, and `notes` says why. read_gb_s is the main memory's, also with CUDA: what
    a GPU reads from its own is not measured.
    """
    notes: list[str] = []
    rates: dict[str, float | None] = {}
    for precision in ("fp32", "int8"):
        try:
            rates[precision] = max(product_rate(precision, device, threads, side, repeats) for side in sides) / 1e9
        except ProbeError as error:
            rates[precision] = None
            notes.append(str(error))
    if device != "cpu":
        notes.append("read_gb_s is not measured on this device, so no share of bandwidth is given")
        return {"threads": threads, "read_gb_s": None, "gflop_s": rates, "notes": notes}
    size = buffer_bytes()
    ways = read_rates(size, threads, repeats)
    best = max(ways, key=lambda name: ways[name])
    return {
        "threads": threads,
        "read_gb_s": ways[best] / 1e9,
        "read_by": best,
        "buffer_mb": size >> 20,
        "gflop_s": rates,
        "notes": notes,
    }


def better(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The higher of two measurements, number by number: what disturbs them only makes them lower."""
    rates = {name: max((first["gflop_s"][name], second["gflop_s"][name]), key=_or_zero) for name in first["gflop_s"]}
    return {**max((first, second), key=lambda limits: _or_zero(limits["read_gb_s"])), "gflop_s": rates}


def _or_zero(value: float | None) -> float:
    return value or 0.0


def buffer_bytes() -> int:
    """Size of the buffer: several last caches, but not more than a quarter of what is free."""
    free = free_memory_bytes() or MOST * 4
    return max(1 << 20, min(max(LEAST, CACHES * last_cache_bytes()), MOST, free // 4))


def read_rates(size: int, threads: int, repeats: int) -> dict[str, float]:
    """Bytes per second by way of reading a buffer of `size` bytes, the best of some runs each."""
    buffer = np.ones(size // 8 * 8, np.uint8)
    numbers = buffer.view(np.int64)
    ends = np.linspace(0, len(numbers), threads + 1).astype(int)

    def largest(thread: int) -> None:
        numbers[ends[thread] : ends[thread + 1]].max()

    ways: dict[str, Callable[[int], object]] = {"numpy max": largest}
    find = _memchr()
    if find is not None:

        def absent(thread: int) -> None:
            start, end = int(ends[thread]) * 8, int(ends[thread + 1]) * 8
            find(buffer.ctypes.data + start, ABSENT, end - start)

        ways["memchr"] = absent
    found = dict.fromkeys(ways, 0.0)
    for _ in range(repeats):  # in turn, so that both are disturbed alike
        for name, read in ways.items():
            found[name] = max(found[name], len(buffer) / _seconds(read, threads))
    return found


def _seconds(read: Callable[[int], object], threads: int) -> float:
    """Until the last of the threads is done."""
    running = [threading.Thread(target=read, args=(number,)) for number in range(threads)]
    start = time.perf_counter()
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return time.perf_counter() - start


def _memchr() -> Callable[[int, int, int], object] | None:
    try:
        function = ctypes.CDLL(None).memchr
    except (OSError, AttributeError, TypeError):  # a system whose C library is not found this way
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
    return function
