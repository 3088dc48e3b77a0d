"""Interleaved comparison of this package with the ways a user would run the same network.

Every engine lives in a process of its own: thread pools that spin after a call and allocator
state that one library leaves behind would otherwise be charged to the next.
"""

from resnet_fast.bench.runner import BenchError, bench, bench_model

__all__ = ["BenchError", "bench", "bench_model"]
