"""Time and achieved bandwidth of every fused kernel of a step of one stream, for each shape and form of the weights.

Every figure is taken from chains that are captured as a CUDA graph, twice. 'alone': one kind of kernel over all layers,
over as many copies of weights and states as it takes to exceed the L2 cache four times. 'in the step': what the whole
step gets faster by without that kind, so all that overlaps is taken off; the parts need not add up to the step. Bytes
are those of weights and state, each once; rows of ffn.value that relu² made zero are counted, though they are skipped.

``--ncu`` launches the kernels of three steps and measures nothing, for a profiler that finds them one by one:
``ncu --clock-control none --set full -k regex:v7_ -s 10 -c 10 python benchmarks/kernels_gpu.py --ncu --sizes 1.5B``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, relative, report
from step_gpu import OFFICIAL, PARITY_TOKENS, TOLERANCE, milliseconds, release_memory
from step_gpu_engines import FUSED, copy_bandwidth
from step_gpu_models import FLOAT, SCHEMES, SHAPES, Reference, place_of, prepared

from rwkv_edge.artifact import Artifact
from rwkv_edge.evaluation.roofline import read_bandwidth, usable_cores
from rwkv_edge.exporters.layout import INDEX_FILE
from rwkv_edge.runtime.cuda import CudaSession
from rwkv_edge.runtime.cuda_launch import Launch
from rwkv_edge.runtime.cuda_state import CudaState

LAYER = ("time_mix_in", "wkv", "time_mix_out", "channel_mix_in", "channel_mix_out")
LAST = ("head", "argmax")
OVER_CACHE = 4  # times the L2 cache, that copies of a kind's weights take at least
MOST_COPIES = 48
SECONDS = 0.02  # that one measure takes at least
NCU_STEPS = 3
HEADER = ("model", "kernel", "launches", "MB", "alone us", "alone GB/s", "share", "in the step us", "GB/s", "share")


@dataclass(frozen=True)
class Region:
    """Memory of the device that a copy can stand for."""

    start: int
    nbytes: int

    def moved(self, pointer: int, to: int) -> int:
        """The pointer into a copy that begins at ``to``; others stay."""
        return pointer - self.start + to if 0 <= pointer - self.start < self.nbytes else pointer


class Step:
    """The kernels of one step of one stream, and what they move.

    Attributes:
        launches: all, in order.
    """

    def __init__(self, session: CudaSession, folder: Path) -> None:
        """Nothing runs yet."""
        self._session, self._driver, self._chain = session, session._driver, session._chain(1)
        self._state = session.initial_state()
        session.step([5], self._state)  # no buffer holds NaN, nor a state only zeros
        self.launches = self._launches(self._state)
        entries = json.loads((folder / INDEX_FILE).read_bytes())
        memory = session._weights.memory
        self._weights = Region(memory, max(e["offset"] + e["nbytes"] for e in entries))
        self._places = {memory + e["offset"]: e["nbytes"] for e in entries if not e["name"].startswith("emb")}
        self._row = {memory + e["offset"]: e["nbytes"] // e["shape"][0] for e in entries if e["name"].startswith("emb")}
        self._places |= self._row | self._state_places()
        self._copies: list[list[Launch]] = []
        self._kept: list[CudaState] = []  # whose memory the copies point at

    def _launches(self, state: CudaState) -> list[Launch]:
        return self._chain.launches(state.places(0), 0, state.outputs(0), "choice")

    def _state_places(self) -> dict[int, int]:
        """Bytes of a state's tensors by address, on both sides."""
        tensors = self._session.spec.state
        return {self._state.address(t.name, side): t.nbytes for t in tensors for side in (0, 1)}

    def kinds(self) -> Iterator[tuple[str, list[int]]]:
        """Every kind of kernel, and the places of its launches in the step."""
        layers = self._session.spec.n_layer
        if len(self.launches) != len(LAYER) * layers + len(LAST):
            raise SystemExit(f"a step of {layers} layers has {len(self.launches)} kernels, not {len(LAYER)} a layer")
        for at, name in enumerate(LAYER):
            yield name, list(range(at, len(LAYER) * layers, len(LAYER)))
        for at, name in enumerate(LAST):
            yield name, [len(LAYER) * layers + at]

    def moved_bytes(self, places: Sequence[int]) -> int:
        """Of weights and state that these launches read and write: weights once, what is read and written twice."""
        total = 0
        for place in places:
            launch = self.launches[place]
            inputs = launch.pointers[: len(launch.kernel.inputs)]
            outputs = launch.pointers[len(launch.kernel.inputs) :]
            total += sum(self._places.get(pointer, 0) for group in (inputs, outputs) for pointer in {*group})
        return total

    def copies(self, places: Sequence[int], cache: int) -> list[Launch]:
        """These launches, over so many copies of weights and state that a cache of so many bytes is of no use."""
        nbytes = self.moved_bytes(places)
        count = min(MOST_COPIES, math.ceil(OVER_CACHE * cache / nbytes)) if nbytes else 1
        while len(self._copies) < count - 1:
            memory = self._driver.allocate(self._weights.nbytes)
            self._driver.copy(memory, self._weights.start, self._weights.nbytes)
            state = self._session.copy_state(self._state)
            self._kept.append(state)
            self._copies.append([self._moved(launch, memory) for launch in self._launches(state)])
        steps = [self.launches, *self._copies[: count - 1]] if count > 1 else [self.launches]
        return [step[place] for step in steps for place in places]

    def _moved(self, launch: Launch, memory: int) -> Launch:
        return replace(launch, pointers=tuple(self._weights.moved(p, memory) for p in launch.pointers))

    def seconds(self, launches: Sequence[Launch], runs: int) -> float:
        """Of these kernels in a row, by a graph of them."""
        graph = self._session._loaded.captured([launches])

        def measured(count: int) -> float:
            def work() -> None:
                for _ in range(count):
                    graph.launch()

            return self._driver.elapsed_ms(work) / 1e3 / count

        measured(2)
        count = max(2, math.ceil(SECONDS / measured(2)))
        found = statistics.median(measured(count) for _ in range(runs))
        graph.close()
        return found


def main() -> None:
    """Parity, then the kernels of every size and form."""
    options = arguments(__doc__ or "", add_options)
    gpu = not options.no_gpu
    sizes = [size for size in SHAPES if size in options.sizes]
    prepared(sizes, options.layers, options.forms, options.work, options.workers)
    if options.ncu:
        for size in sizes:
            for form in options.forms:
                launch_steps(place_of(size, options.layers, form, options.work))
        return
    bandwidth = copy_bandwidth(options.runs) if gpu else read_bandwidth() * 1e9
    cache = torch.cuda.get_device_properties(0).L2_cache_size if gpu else 0
    name = torch.cuda.get_device_name() if gpu else "none"
    figures: dict[str, Any] = {"gpu": name, "copy_gb_s": bandwidth / 1e9, "l2_bytes": cache}
    title = f"Fused kernels of RWKV-7, one stream, random weights, {name}; copies {bandwidth / 1e9:.0f} GB/s"
    for size in sizes:
        for form in options.forms:
            folder = place_of(size, options.layers, form, options.work)
            figures[f"{size} {form}"] = measured(folder, bandwidth, cache, options.runs)
            report(title, HEADER, rows_of(figures), figures, options.json)


def add_options(parser: argparse.ArgumentParser) -> None:
    """--sizes, --forms, --layers, --workers, --no-gpu, --ncu."""
    forms = (FLOAT, *SCHEMES)
    parser.add_argument("--sizes", nargs="*", default=OFFICIAL, choices=SHAPES, help="models")
    parser.add_argument("--forms", nargs="*", default=forms, choices=forms, help="forms of the weights")
    parser.add_argument("--layers", type=int, help="only so many layers, for a quick look")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes that make artifacts; 0: none")
    parser.add_argument("--no-gpu", action="store_true", help="where something stands for the GPU: a test")
    parser.add_argument("--ncu", action="store_true", help="launch the kernels of a few steps, for a profiler")


def launch_steps(folder: Path) -> None:
    """Some steps without a graph, so that a profiler sees every kernel."""
    session = CudaSession(Artifact.open(folder), check_content=False)
    step = Step(session, folder)
    for _ in range(NCU_STEPS):
        session._loaded.enqueue(step.launches)
    session.close()


def measured(folder: Path, bandwidth: float, cache: int, runs: int) -> dict[str, Any]:
    """Figures of all kernels of an artifact, once its logits are right."""
    tokens = np.random.default_rng(0).integers(0, Artifact.open(folder).manifest.spec.vocab_size, (PARITY_TOKENS, 1))
    expected = Reference(folder).logits(tokens)
    release_memory()
    session = CudaSession(Artifact.open(folder), check_content=False)
    session.retune(replace(session.tuning, merge=False))  # every kernel by itself
    state = session.initial_state()
    difference = relative(np.stack([session.step(row, state) for row in tokens]), expected)
    if not difference <= TOLERANCE[FUSED]:
        raise SystemExit(f"{folder.name}: the logits are wrong by {difference:.2g}, so there are no figures")
    step = Step(session, folder)
    whole = step.seconds(step.launches, runs)
    figures: dict[str, Any] = {"relative_difference": difference, "step_us": 1e6 * whole}
    for kind, places in step.kinds():
        nbytes = step.moved_bytes(places)
        rest = [launch for place, launch in enumerate(step.launches) if place not in set(places)]
        copies = step.copies(places, cache)
        alone = step.seconds(copies, runs) * len(places) / len(copies)
        figures[kind] = {"launches": len(places), "bytes": nbytes}
        figures[kind] |= speeds("alone", alone, nbytes, bandwidth)
        figures[kind] |= speeds("in_step", whole - step.seconds(rest, runs), nbytes, bandwidth)
    session.close()
    return figures


def speeds(how: str, seconds: float, nbytes: int, bandwidth: float) -> dict[str, float]:
    """Microseconds of all launches of a kind in a step; GB/s and the share of the copies' where it moves anything."""
    found = {f"{how}_us": 1e6 * seconds}
    if nbytes and seconds > 0:
        rate = nbytes / seconds
        found |= {f"{how}_gb_s": rate / 1e9, f"{how}_share_of_copy": rate / bandwidth}
    return found


def rows_of(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table so far; times are of all launches of a kind in one step."""
    rows = []
    for model, kinds in figures.items():
        if not isinstance(kinds, dict):
            continue
        rows.append((model, "whole step", "", "", milliseconds(kinds["step_us"] / 1e6) + " ms", *[""] * 5))
        for kind, found in kinds.items():
            if isinstance(found, dict):
                cells = [cell for how in ("alone", "in_step") for cell in cells_of(found, how)]
                rows.append((model, kind, str(found["launches"]), f"{found['bytes'] / 1e6:.2f}", *cells))
    return rows


def cells_of(found: Mapping[str, float], how: str) -> tuple[str, str, str]:
    """Microseconds, GB/s and share."""
    if f"{how}_gb_s" not in found:
        return f"{found[f'{how}_us']:.1f}", "", ""
    return (
        f"{found[f'{how}_us']:.1f}", f"{found[f'{how}_gb_s']:.0f}", f"{100 * found[f'{how}_share_of_copy']:.0f} %",
    )  # fmt: skip


if __name__ == "__main__":
    main()
