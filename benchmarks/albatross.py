"""Albatross v3a, the engine of the package rwkv-quant-nv, as `step_gpu.py` times it. None of its code is here.

The package is read from its wheel or a folder, never installed: its top-level module `cuda` would hide cuda-bindings.
Its CUDA extensions are built on the spot by torch, which needs nvcc, ninja and a C++ compiler; `start_builds` does that
in processes of its own, all of them at once.

``python benchmarks/albatross.py FOLDER NUMBER`` builds one extension of an unpacked package, for `start_builds`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

MODULE = "rwkv7_fast_v3a"
EXTENSIONS = 3  # that its `load_extensions` builds
WARM_UP = 3  # calls before a capture


def unpacked(package: Path, work: Path) -> Path:
    """The folder of the package: ``package`` itself, or what its wheel holds."""
    if package.is_dir():
        return package
    folder = work / package.stem
    if not folder.exists():
        with zipfile.ZipFile(package) as wheel:
            wheel.extractall(folder)
    return folder


def version_of(folder: Path) -> str:
    """Of an unpacked package."""
    found = [path.name for path in folder.glob("rwkv_quant_nv-*.dist-info")]
    if len(found) != 1:
        raise SystemExit(f"{folder} must hold one package rwkv_quant_nv; found {', '.join(found) or 'none'}")
    return found[0].removeprefix("rwkv_quant_nv-").removesuffix(".dist-info")


def imported(folder: Path) -> Any:
    """Its module; what it calls `cuda` stays out of the way."""
    with contextlib.suppress(ImportError):
        importlib.import_module("cuda.bindings.driver")  # once imported, no other `cuda` can hide it
    sys.path.append(str(folder))
    try:
        return importlib.import_module(MODULE)
    finally:
        sys.path.remove(str(folder))


def start_builds(folder: Path, work: Path) -> list[tuple[subprocess.Popen[bytes], Path]]:
    """Begin to build every extension; `finish_builds` waits for them."""
    found = []
    for number in range(EXTENSIONS):
        log = work / f"albatross-{number}.log"
        command = [sys.executable, __file__, str(folder), str(number)]
        with log.open("wb") as file:
            found.append((subprocess.Popen(command, stdout=file, stderr=file, env=environment()), log))
    return found


def finish_builds(builds: list[tuple[subprocess.Popen[bytes], Path]]) -> None:
    """Wait for `start_builds`.

    Raises:
        SystemExit: an extension cannot be built; with the end of the compiler's words.
    """
    for process, log in builds:
        if process.wait():
            raise SystemExit(f"an extension of {MODULE} cannot be built:\n{log.read_text(errors='replace')[-3000:]}")
    if builds:
        os.environ.update(environment())  # what is built is found again under the same flags


def environment() -> dict[str, str]:
    """Variables for the builds: this GPU alone, and headers of cuBLAS where the toolkit has none."""
    major, minor = torch.cuda.get_device_capability()
    variables = {**os.environ, "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or not (Path(CUDA_HOME) / "include" / "cublasLt.h").exists():
        spec = importlib.util.find_spec("nvidia")
        places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
        headers = [str(found.parent) for place in places for found in place.glob("*/include/cublasLt.h")]
        variables["CPATH"] = os.pathsep.join([*headers, *filter(None, [os.environ.get("CPATH")])])
    return variables


@contextlib.contextmanager
def loaded(module: Any, checkpoint: Path) -> Iterator[Any]:
    """The engine with a checkpoint of official names; its own defaults, but for the embedding, which is on the GPU."""
    module.MODEL_PATH, module.EMB_DEVICE = str(checkpoint), "gpu"
    with contextlib.redirect_stdout(io.StringIO()):
        module.load_extensions(module.WKV_MODE)
        model = module.RWKV7()
    yield model
    del model
    gc.collect()
    torch.cuda.empty_cache()


def logits_of(model: Any, tokens: np.ndarray, state: Any) -> np.ndarray:
    """[B, T] → [B, V] float32, of the last token; ``state`` from its `zero_state` moves on."""
    logits: np.ndarray = model.forward(torch.from_numpy(tokens.astype(np.int64)), state).float().cpu().numpy()
    return logits.reshape(len(tokens), -1)


@dataclass(frozen=True)
class Replay:
    """A captured call, and the tensors that it works on: they live as long as the graph does."""

    graph: torch.cuda.CUDAGraph
    kept: tuple[Any, ...]

    def seconds(self, count: int) -> float:
        """Of one of ``count`` replays in a row, which carry the state on."""
        event: Any = torch.cuda.Event  # untyped in torch
        start, end = event(enable_timing=True), event(enable_timing=True)
        self.graph.replay()
        start.record()
        for _ in range(count):
            self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count


def forward_replay(module: Any, model: Any, batch: int, count: int) -> Replay:
    """As the package's own benchmark captures it: from embedded tokens [B, T] to the last one's logits."""
    tokens = torch.arange(batch * count).view(batch, count).cuda() * 7919 % module.V
    state, path, embedded = model.zero_state(batch), module.select_path(batch, count), model.embed(tokens)
    return _captured(lambda: model.forward_from_x(embedded, state, path), embedded, state)


def greedy_replay(model: Any) -> Replay:
    """A step of one stream with its embedding and the largest logit's token, which is the next one's input."""
    token, state = torch.full((1, 1), 5, device="cuda"), model.zero_state(1)

    def step() -> None:
        token.copy_(model.forward(token, state).view(1, -1).argmax(1, keepdim=True))

    return _captured(step, token, state)


def _captured(call: Callable[[], object], *kept: Any) -> Replay:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        call()
    torch.cuda.synchronize()
    return Replay(graph, kept)


def build_one(folder: Path, number: int) -> None:
    """Build the extension that the package would load after ``number`` others, with the package's own flags."""
    module = imported(folder)
    load, calls = module.load, iter(range(EXTENSIONS))

    def chosen(*given: Any, **options: Any) -> None:
        if next(calls) == number:
            load(*given, **options)

    module.load = chosen
    module.load_extensions(module.WKV_MODE)


if __name__ == "__main__":
    build_one(Path(sys.argv[1]), int(sys.argv[2]))
