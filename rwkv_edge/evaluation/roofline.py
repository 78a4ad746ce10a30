"""What memory bandwidth allows: at batch 1, a step cannot be faster than reading the weights once."""

from __future__ import annotations

import os
import threading
import time

import numpy as np

DEVICES = {"Jetson Orin Nano Super": 102.0, "Jetson AGX Orin": 205.0, "Jetson Thor": 273.0}
"""GB/s of the boards' memory, from NVIDIA's data sheets."""

PROBE_BYTES = 1 << 28  # well past the last-level cache


def read_bandwidth(threads: int | None = None, repeats: int = 3) -> float:
    """GB/s at which this machine reads memory: the best of ``repeats`` sums over 256 MiB, split over threads.

    Args:
        threads: readers; one per usable core where it is None.
        repeats: tries.
    """
    count = threads or usable_cores()
    array = np.ones(PROBE_BYTES // 4, np.float32)
    parts = np.array_split(array, count)
    best = 0.0
    for _ in range(repeats):
        readers = [threading.Thread(target=part.sum) for part in parts]
        start = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        best = max(best, array.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bytes_per_token(weight_bytes: int, embedding_bytes: int, vocab_size: int, state_bytes: int) -> int:
    """Bytes that one step moves: every weight but the embedding table, one row of it, and the state in and out."""
    return weight_bytes - embedding_bytes + embedding_bytes // vocab_size + 2 * state_bytes


def tokens_per_second(nbytes: int, bandwidth: float) -> float:
    """Upper bound for steps of ``nbytes`` at ``bandwidth`` GB/s."""
    return bandwidth * 1e9 / nbytes
