"""XᵀX of the inputs of linears, a few at a time, each group in a file of its own: what GPTQ needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rwkv_edge.artifact import sha256_of
from rwkv_edge.calibration.stream import WindowRunner
from rwkv_edge.calibration.taps import Tapped
from rwkv_edge.runtime.atomic import write_whole

if TYPE_CHECKING:
    from rwkv_edge.calibration.calibrate import CalibrateOptions, Report

KEY = "rwkv_edge.hessian"


def write_hessians(
    target: Path,
    runner: WindowRunner,
    tapped: Tapped,
    windows: np.ndarray,
    options: CalibrateOptions,
    digest: str,
    report: Report | None,
) -> dict[str, str]:
    """Write ``<stem>.hessian-<n>.safetensors`` with ``hessian/<name>`` [K, K] float32, the mean of x xᵀ over tokens.

    Every group takes a pass over all windows; files that an interrupted calibration had finished are kept.

    Returns:
        Names of the files and their sha256.

    Raises:
        OSError: one cannot be written.
    """
    widths = {name: values.shape[-1] for name, values in _one_chunk(runner, tapped, windows)}
    groups = list(_groups(widths, options.hessian_memory))
    update = report("tokens for Hessians", windows.size * len(groups)) if report else lambda _: None
    files = {}
    for number, group in enumerate(groups):
        path = target.with_name(f"{target.stem}.hessian-{number}.safetensors")
        mark = hashlib.sha256(f"{digest} {group}".encode()).hexdigest()
        if _mark_of(path) != mark:
            _write_group(path, runner, tapped, windows, options.windows.warmup, group, mark, update)
        else:
            update(windows.size)
        files[path.name] = sha256_of(path)
    return files


def _one_chunk(runner: WindowRunner, tapped: Tapped, windows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    _, values = next(iter(runner.run(windows[: runner.batch], list(tapped.taps.values()))))
    yield from zip(tapped.taps, values, strict=True)


def _groups(widths: dict[str, int], memory: int) -> Iterator[tuple[str, ...]]:
    """Names whose matrices fit into ``memory`` together; at least one a group."""
    group: list[str] = []
    held = 0
    for name, width in widths.items():
        nbytes = width * width * 4
        if group and held + nbytes > memory:
            yield tuple(group)
            group, held = [], 0
        group.append(name)
        held += nbytes
    if group:
        yield tuple(group)


def _write_group(
    path: Path,
    runner: WindowRunner,
    tapped: Tapped,
    windows: np.ndarray,
    warmup: int,
    group: tuple[str, ...],
    mark: str,
    update: Callable[[int], None],
) -> None:
    from safetensors.numpy import save

    sums: dict[str, np.ndarray] = {}
    rows = 0
    for start in range(0, len(windows), runner.batch):
        window = windows[start : start + runner.batch]
        for at, values in runner.run(window, [tapped.taps[name] for name in group]):
            if at < warmup:
                continue
            for name, value in zip(group, values, strict=True):
                vectors = value.reshape(-1, value.shape[-1]).astype(np.float32, copy=False)
                product = vectors.T @ vectors
                sums[name] = sums[name] + product if name in sums else product
            rows += len(vectors)
        update(window.size)
    arrays = {f"hessian/{name}": total / np.float32(rows) for name, total in sums.items()}
    write_whole(path, save(arrays, {KEY: mark}))


def _mark_of(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get(KEY)
    except (OSError, SafetensorError):
        return None
