"""deixis against other runtimes: same weights, same inputs, outputs compared, each competitor in its own process."""

from deixis_bench.rivals.campaign import run_rivals

__all__ = ["run_rivals"]
