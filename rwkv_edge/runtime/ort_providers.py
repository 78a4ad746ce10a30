"""Execution providers of ONNX Runtime: their names, their options, and what a session asks of each."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rwkv_edge.errors import InputError, MissingDependencyError, SessionError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
TENSORRT_RTX = "NvTensorRTRTXExecutionProvider"
NVIDIA = (CUDA, TENSORRT, TENSORRT_RTX)
SUFFIX = "ExecutionProvider"

_CAPTURE = "enable_cuda_graph"


@dataclass(frozen=True)
class Provider:
    """An execution provider by its full name, and the options that the user gave it."""

    name: str
    options: dict[str, str] = field(default_factory=dict)

    @property
    def device_id(self) -> int:
        """The GPU that its option ``device_id`` names."""
        return int(self.options.get("device_id", "0"))

    @property
    def captures(self) -> bool:
        """Whether a step may be captured into CUDA graphs."""
        return self.name == CUDA and self.options.get(_CAPTURE, "1") not in ("0", "false", "False")

    def __str__(self) -> str:
        """As `checked_providers` reads it."""
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name


def onnxruntime_module() -> Any:
    """The module.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "ort", "running a model on this backend") from error
    return onnxruntime


def first_line(error: Exception) -> str:
    """An error of the backend in one line, without the place in its source that it begins with."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^/\S+\.(?:cc|h|cu):\d+ .*?\)(?: const)? (?=\S)", "", line)[:300]


def checked_providers(providers: Sequence[str] | None) -> list[Provider]:
    """The providers to use, the CPU's where none is named.

    TensorRT's providers are followed by CUDA's where that is available: what they cannot run stays on the GPU.

    Args:
        providers: 'cuda', 'tensorrt', 'nv-tensorrt-rtx', 'cpu' or a name of ONNX Runtime ('CUDAExecutionProvider'),
            with options where it needs them: 'cuda:device_id=1,gpu_mem_limit=2147483648'.

    Raises:
        InputError: options that cannot be meant.
        SessionError: one is not available; the message lists those that are.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    available = onnxruntime_module().get_available_providers()
    chosen = [_parsed(text, available) for text in providers or (CPU,)]
    names = [provider.name for provider in chosen]
    if names[0] in (TENSORRT, TENSORRT_RTX) and CUDA in available and CUDA not in names:
        device = {"device_id": chosen[0].options["device_id"]} if "device_id" in chosen[0].options else {}
        chosen.insert(1, Provider(CUDA, device))
    return chosen


def session_providers(providers: Sequence[Provider], precision: str, capture: bool) -> list[tuple[str, dict[str, str]]]:
    """Names and options as `onnxruntime.InferenceSession` takes them.

    Args:
        providers: from `checked_providers`.
        precision: of the model.
        capture: whether runs of the session are captured into CUDA graphs.
    """
    found = []
    for provider in providers:
        defaults: dict[str, str] = {}
        if provider.name == CUDA:
            # TF32 has 10 bits of mantissa: fp32 would not be fp32. Memory by need: other programs use the GPU too.
            defaults = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
        elif provider.name == TENSORRT and precision in ("fp16", "bf16"):
            defaults = {f"trt_{precision}_enable": "1"}
        options = defaults | provider.options
        if provider.name == CUDA:
            options[_CAPTURE] = "1" if capture else "0"
        found.append((provider.name, options))
    return found


def preload_libraries() -> None:
    """Load CUDA and cuDNN from the wheels ``nvidia-*`` where they are installed, which no search path names."""
    preload = getattr(onnxruntime_module(), "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it did not find; the session says it better
            preload()


def _parsed(text: str, available: Sequence[str]) -> Provider:
    name, _, options = text.partition(":")
    full = next((known for known in available if _short(known) == _short(name)), None)
    if full is None:
        raise SessionError(
            f"provider '{name}' is not available here; available are {', '.join(available)}"
            + (": pip install 'rwkv-edge[ort-gpu]' in place of onnxruntime" if _is_nvidia(name) else "")
        )
    return Provider(full, _options(options, full) if options else {})


def _options(text: str, provider: str) -> dict[str, str]:
    found = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not name.strip() or not equals:
            raise InputError(f"an option of {provider} is written name=value, not '{part}'")
        found[name.strip()] = value.strip()
    if not found.get("device_id", "0").isdecimal():
        raise InputError(f"device_id of {provider} must be the number of a GPU, not '{found['device_id']}'")
    if found.get("trt_cuda_graph_enable", "0") not in ("0", "False"):
        raise InputError(
            f"{provider} cannot capture a step into a CUDA graph: it keeps one graph, and the two sets of the state "
            "need two; leave trt_cuda_graph_enable out"
        )
    return found


def _short(name: str) -> str:
    """'CUDAExecutionProvider' and 'cuda' → 'cuda'; 'nv-tensorrt-rtx' → 'nvtensorrtrtx'."""
    return name.strip().lower().replace("-", "").removesuffix(SUFFIX.lower())


def _is_nvidia(name: str) -> bool:
    return _short(name) in map(_short, NVIDIA)
