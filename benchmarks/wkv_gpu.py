"""The WKV kernels on an NVIDIA GPU, shapes of a 1.5B model: steps against the memory's speed, sequences against `rwkv`.

Needs torch with CUDA. The kernels of the `rwkv` package are compiled with nvcc, unless their .cubin lies beside them.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import statistics
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import torch
from common import arguments, report

from rwkv_edge.models.torch_ops import TorchOps
from rwkv_edge.plugins import KernelSpec, kernel_spec
from rwkv_edge.plugins.launch import launch

LAYERS, HEADS, HEAD = 24, 32, 64  # RWKV 1.5B; RWKV-4 of that size has 2048 channels too
DTYPE = "float16"
BATCH, TOKENS = 8, 512  # of the sequences
PARITY = {"float16": 5e-4, "float32": 1e-5}  # ‖out − float64‖ / ‖float64‖
SAME_WORK = 0.05  # the other kernel takes its decay in 16 bits
# nvcc's options in rwkv/model.py
NVCC = ("nvcc", "-cubin", "-O3", "--use_fast_math", "--extra-device-vectorization", "--expt-relaxed-constexpr", "-w")
SOURCES = {"4": "operators.cu", "5": "rwkv5.cu", "6": "rwkv6.cu", "7": "rwkv7.cu"}

Tensors = dict[str, torch.Tensor]


def main() -> None:
    """Parity and times of every version, one table."""
    options = arguments(__doc__ or "")
    bandwidth = copy_bandwidth(options.runs)
    folder = Path(os.environ.get("RWKV_CUDA", "")) if "RWKV_CUDA" in os.environ else package_folder()
    rows, figures = [], {"gpu": torch.cuda.get_device_name(), "copy_gb_s": bandwidth / 1e9, "dtype": DTYPE}
    for version in SOURCES:
        for batch in (1, 64):
            seconds, nbytes = step_time(version, batch, options.runs)
            share = nbytes / seconds / bandwidth
            rows.append((f"v{version} step, B={batch}", f"{seconds * 1e6:.2f}", f"{share:.0%} of copy"))
            figures[f"v{version}_step_b{batch}"] = {"us": seconds * 1e6, "bytes": nbytes, "share_of_copy": share}
    for version in SOURCES:
        ours, theirs = sequence_times(version, folder, options.runs)
        rows.append((f"v{version} T={TOKENS}, B={BATCH}", f"{ours * 1e6:.1f}", f"rwkv {theirs * 1e6:.1f}"))
        figures[f"v{version}_sequence"] = {"us": ours * 1e6, "rwkv_us": theirs * 1e6, "ratio": theirs / ours}
    title = f"WKV kernels, {figures['gpu']}, {HEADS} heads x {HEAD}, {DTYPE}; copies {bandwidth / 1e9:.0f} GB/s"
    report(title, ("kernel", "microseconds", "compared with"), rows, figures, options.json)


def copy_bandwidth(runs: int) -> float:
    """Bytes read plus bytes written each second by a copy of 1 GiB."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), 4 * runs)


def median_seconds(call: Callable[[], object], runs: int) -> float:
    """Of one call on the current stream, by events, after three to warm up."""
    event: Any = torch.cuda.Event  # untyped in torch
    times = []
    for i in range(runs + 3):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(float(start.elapsed_time(end)) / 1e3)
    return statistics.median(times)


def step_time(version: str, batch: int, runs: int) -> tuple[float, int]:
    """Seconds of one step kernel among those of all layers in a CUDA graph, and the bytes that it must move."""
    spec = kernel_spec(version, "step", DTYPE, HEAD)
    shape = (batch, 1, HEADS, HEAD)
    layers = [(draw(spec, shape, seed), outputs_of(spec, shape)) for seed in range(LAYERS)]
    enqueue(spec, *layers[0], shape)
    check_parity(spec, *layers[0], batch)
    queue = cycle(layers)  # a replay goes through all layers, whose states do not fit the cache together
    nbytes = sum(x.nbytes for x in (*layers[0][0].values(), *layers[0][1]))
    return graph_seconds(lambda: enqueue(spec, *next(queue), shape), 3 * runs, LAYERS), nbytes


def sequence_times(version: str, folder: Path, runs: int) -> tuple[float, float]:
    """Seconds of this project's sequence kernel, and of the `rwkv` package's."""
    spec = kernel_spec(version, "sequence", DTYPE, HEAD)
    shape = (BATCH, TOKENS, HEADS, HEAD)
    values, outputs = draw(spec, shape, 0), outputs_of(spec, shape)
    enqueue(spec, values, outputs, shape)
    expected = check_parity(spec, values, outputs, BATCH)
    call, y = package_kernel(version, folder, values)
    call()
    error = norm_error(y().reshape(expected.shape), expected)
    if not error < SAME_WORK:
        raise SystemExit(f"the kernel of rwkv for version {version} computes something else: {error:.2g}")
    ours = graph_seconds(lambda: enqueue(spec, values, outputs, shape), runs)
    return ours, graph_seconds(call, runs)


def graph_seconds(call: Callable[[], object], runs: int, count: int = 10) -> float:
    """Of one of ``count`` calls replayed by a CUDA graph: the time to enqueue them stays out of the figure."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return median_seconds(graph.replay, 4 * runs) / count


def draw(spec: KernelSpec, shape: tuple[int, int, int, int], seed: int) -> Tensors:
    """Random inputs by name, of the sizes that a model gives them."""
    torch.manual_seed(seed)
    values = {}
    for argument in spec.inputs:
        x = torch.randn(argument.shape(*shape), device="cuda")
        decay = -torch.exp(x) if spec.version == "4" else torch.exp(-0.606531 * torch.sigmoid(x))  # exp(-0.5)
        known = {"w": decay, "kk": torch.nn.functional.normalize(x, dim=-1), "a": torch.sigmoid(x), "den": x.abs() + 1}
        values[argument.name] = known.get(argument.name, x).to(getattr(torch, argument.dtype))
    return values


def outputs_of(spec: KernelSpec, shape: tuple[int, int, int, int]) -> list[torch.Tensor]:
    """Memory full of NaN."""
    return [torch.full(a.shape(*shape), math.nan, dtype=getattr(torch, a.dtype), device="cuda") for a in spec.outputs]


def enqueue(spec: KernelSpec, values: Tensors, outputs: list[torch.Tensor], shape: tuple[int, int, int, int]) -> None:
    """One launch on torch's current stream."""
    pointers = [values[a.name].data_ptr() for a in spec.inputs], [x.data_ptr() for x in outputs]
    launch(spec, *pointers, *shape, stream=torch.cuda.current_stream().cuda_stream)


def check_parity(spec: KernelSpec, values: Tensors, outputs: list[torch.Tensor], batch: int) -> torch.Tensor:
    """The float64 reference of y, once every output agrees with its reference."""
    ops = TorchOps({}, cast(Any, None), batch, torch.float64)
    wide = {name: x.double() for name, x in values.items()}
    axes = 1 if spec.version == "4" else 2
    rows = {name: x.reshape(-1, *x.shape[-axes:]) for name, x in wide.items()}
    expected: tuple[Any, ...]
    if spec.version == "4":
        y, new = ops.wkv4((wide["num"], wide["den"], wide["top"]), wide["w"], wide["u"], rows["k"], rows["v"])
        expected = (y, *new)
    elif spec.version == "7":
        expected = ops.wkv7(
            wide["state"], *(rows[n] if n != "w" else rows[n].log() for n in ("r", "w", "k", "v", "kk", "a"))
        )
    else:
        wkv = ops.wkv5 if spec.version == "5" else ops.wkv6
        expected = wkv(wide["state"], rows["r"], rows["w"].log(), wide["u"], rows["k"], rows["v"])
    for argument, found, wanted in zip(spec.outputs, outputs, expected, strict=True):
        error = norm_error(found.reshape(wanted.shape), wanted)
        if not error < PARITY[argument.dtype]:
            raise SystemExit(f"parity is not green: {spec.name} {argument.name} differs by {error:.2g}")
    return expected[0]


def norm_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found.double() - expected).norm() / expected.norm())


def package_folder() -> Path:
    """Where the `rwkv` package keeps its CUDA sources; $RWKV_CUDA names another folder."""
    found = find_spec("rwkv")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the package rwkv is not installed: set RWKV_CUDA to the folder of its .cu files")
    return Path(found.submodule_search_locations[0]) / "cuda"


def package_kernel(
    version: str, folder: Path, values: Tensors
) -> tuple[Callable[[], None], Callable[[], torch.Tensor]]:
    """A launch of the `rwkv` package's kernel on the same values, and its y as [B, T, H, N].

    Its kernels for 5, 6 and 7 mix up the states of several streams, so the streams become heads of one: the same work.
    """
    function = package_function(folder / SOURCES[version], HEAD)
    if version == "4":
        state = [values[name].clone() for name in ("num", "den", "top")]
        y = torch.empty_like(values["v"])
        inputs = [values[name] for name in ("w", "u", "k", "v")]
        channels = HEADS * HEAD
        call = caller(function, (BATCH * channels // 32, 32), [BATCH, TOKENS, channels], [*inputs, y, *state])
        return call, lambda: y

    def as_heads(x: torch.Tensor) -> torch.Tensor:  # [B, T, H, N] → [T, B·H, N]
        return x.permute(1, 0, 2, 3).reshape(TOKENS, BATCH * HEADS, HEAD).contiguous()

    half = {n: as_heads(x) for n, x in values.items() if x.dim() == 4 and n not in ("state", "w")}
    y, state5 = torch.empty_like(half["v"]), values["state"].reshape(-1, HEAD, HEAD)
    if version == "7":
        raw = torch.log(-torch.log(as_heads(values["w"]))).half()
        tensors = [state5.clone(), half["r"], raw, half["k"], half["v"], -half["kk"], half["kk"] * half["a"], y]
    else:
        w = as_heads(values["w"]) if version == "6" else values["w"].repeat(BATCH, 1)
        state5 = state5.transpose(1, 2).contiguous()  # [value, key] there
        tensors = [state5, half["r"], half["k"], half["v"], w, values["u"].repeat(BATCH, 1).half(), y]
    counts = [1, TOKENS, BATCH * HEADS * HEAD, BATCH * HEADS]
    call = caller(function, (BATCH * HEADS, HEAD), counts, tensors)
    return call, lambda: y.reshape(TOKENS, BATCH, HEADS, HEAD).permute(1, 0, 2, 3)


def package_function(source: Path, head: int) -> Any:
    """The float16 kernel of a source file of the package."""
    from cuda.bindings import driver

    cubin = source.with_suffix(".cubin")
    if not cubin.exists():
        include = Path(torch.__path__[0]) / "include"
        cubin = Path(os.environ.get("TMPDIR", "/tmp")) / cubin.name
        flags = [f"-D_N_={head}", "-arch=native", "-std=c++20", f"-I{include}"]
        flags.append(f"-I{include / 'torch/csrc/api/include'}")
        subprocess.run([*NVCC, *flags, str(source), "-o", str(cubin)], check=True)
    image = cubin.read_bytes()
    symbol = re.search(rb"_Z\w*kernel_(wkv_)?forward\w*Half\w*", image)
    if symbol is None:
        raise SystemExit(f"{cubin} holds no float16 kernel")
    status, module = driver.cuModuleLoadData(image)
    status, function = driver.cuModuleGetFunction(module, symbol[0])
    if int(status) != 0:
        raise SystemExit(f"{cubin} cannot be loaded: {status.name}")
    return function


def caller(function: Any, size: tuple[int, int], counts: list[int], tensors: list[torch.Tensor]) -> Callable[[], None]:
    """A launch of `size` blocks and threads with int32 ``counts`` and then pointers."""
    from cuda.bindings import driver

    kinds = (ctypes.c_int,) * len(counts) + (ctypes.c_void_p,) * len(tensors)

    def call() -> None:  # holds the tensors
        values = (*counts, *(x.data_ptr() for x in tensors))
        stream = torch.cuda.current_stream().cuda_stream
        (status,) = driver.cuLaunchKernel(function, size[0], 1, 1, size[1], 1, 1, 0, stream, (values, kinds), 0)
        if int(status) != 0:
            raise SystemExit(f"a kernel of rwkv cannot be launched: {status.name}")

    return call


if __name__ == "__main__":
    main()
