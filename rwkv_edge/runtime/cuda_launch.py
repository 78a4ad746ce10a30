"""Kernels that are loaded on a GPU, and their launches."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from rwkv_edge.plugins.fused_spec import FusedKernel
from rwkv_edge.runtime.cuda_driver import Driver, Graph

LOGGER: Final = logging.getLogger(__name__)
PATIENCE: Final = 0.3  # seconds after which somebody who waits wants to know for what


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with its arguments.

    Attributes:
        kernel: to be compiled when it is first needed.
        pointers: its arguments, 8 bytes each.
        grid: blocks along x, y and z.
    """

    kernel: FusedKernel
    pointers: tuple[int, ...]
    grid: tuple[int, int, int]


class Loaded:
    """The kernels of one GPU, each loaded once, when it is first needed."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._functions: dict[FusedKernel, Any] = {}
        # by identity, for as long as there is the object: a hash of a kernel takes as long as a launch
        self._same: dict[int, tuple[weakref.ref[FusedKernel], Any]] = {}

    def function(self, kernel: FusedKernel) -> Any:
        """What `Driver.launch` takes."""
        self._load([kernel])
        return self._same[id(kernel)][1]

    def enqueue(self, launches: Sequence[Launch]) -> None:
        """Put kernels on the stream. The first waits for all ahead of it; the others may overlap the one ahead."""
        self._load([launch.kernel for launch in launches])
        for index, launch in enumerate(launches):
            kernel, (_, function) = launch.kernel, self._same[id(launch.kernel)]
            self._driver.launch(function, launch.grid, kernel.threads, kernel.shared, launch.pointers, early=index > 0)

    def captured(self, groups: Sequence[Sequence[Launch]]) -> Graph:
        """A graph of launches; those of a group wait for the group ahead. Capturing runs nothing."""
        self._load([launch.kernel for group in groups for launch in group])
        with self._driver.capture() as graph:
            for group in groups:
                self.enqueue(group)
        return graph

    def _load(self, kernels: Sequence[FusedKernel]) -> None:
        """Compile and load those that are new."""
        new = [kernel for kernel in kernels if id(kernel) not in self._same]
        missing = [kernel for kernel in dict.fromkeys(new) if kernel not in self._functions]
        for kernel, ptx in zip(missing, self._compiled(missing), strict=True):
            self._functions[kernel] = self._driver.function(ptx, kernel.name, kernel.shared)
        for kernel in new:
            key = id(kernel)
            self._same[key] = weakref.ref(kernel, partial(self._forget, key)), self._functions[kernel]

    def _forget(self, key: int, _: weakref.ref[FusedKernel]) -> None:
        self._same.pop(key, None)

    def _compiled(self, kernels: Sequence[FusedKernel]) -> list[str]:
        """PTX of kernels, compiled side by side: NVRTC takes up to a second for one.

        Where that takes a while, the log says so.
        """
        if not kernels:
            return []
        capability = self._driver.capability
        with ThreadPoolExecutor(min(len(kernels), os.cpu_count() or 1)) as pool:
            compiling = [pool.submit(kernel.ptx, capability) for kernel in kernels]
            if wait(compiling, PATIENCE).not_done:
                LOGGER.info("compiling kernels for %s; the next start finds them in the cache", self._driver.name)
            return [one.result() for one in compiling]
