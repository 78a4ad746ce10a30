"""Strategies of the `rwkv` package, such as 'cuda fp16': where a model runs and in which precision."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rwkv_edge.errors import InputError, MissingDependencyError, SessionError
from rwkv_edge.plugins.nvrtc import nvrtc_version
from rwkv_edge.runtime.cuda_driver import device_capability

CUDA = "CUDAExecutionProvider"
_FORM = re.compile(r"(?P<device>[a-z]+)(?::(?P<number>\d+))? +(?P<precision>fp32|fp16|bf16)(?P<bits>i\d+)?")
_EXAMPLES = "'cpu fp32' or 'cuda fp16'"


@dataclass(frozen=True)
class Strategy:
    """One device and one precision for the whole model.

    Attributes:
        device: 'cpu' or 'cuda'.
        number: of the GPU.
        precision: 'fp32', 'fp16' or 'bf16'.
        int8: the weights are stored in 8 bits.
    """

    device: str
    number: int
    precision: str
    int8: bool = False

    @property
    def providers(self) -> list[str] | None:
        """Execution providers for `open_session`; None for the CPU's."""
        if self.device == "cpu":
            return None
        return [f"{CUDA}:device_id={self.number}" if self.number else CUDA]


def strategy_from_text(text: str) -> Strategy:
    """The strategy that ``text`` names.

    Raises:
        InputError: no strategy, one that splits layers over devices, or one of weights in fewer than 8 bits.
    """
    if "->" in text or "*" in text:
        raise InputError(
            f"strategy '{text}' splits the layers, but an exported model runs on one device as a whole; "
            f"use {_EXAMPLES}, with a smaller model where memory is short"
        )
    found = _FORM.fullmatch(text.strip())
    if not found or (found["device"] == "cpu" and found["number"]):
        raise InputError(f"a strategy is a device and a precision, such as {_EXAMPLES}, not '{text}'")
    if found["device"] not in ("cpu", "cuda"):
        raise InputError(f"strategy '{text}': the device must be cpu or cuda, not {found['device']}")
    if found["bits"] not in (None, "i8") or (found["bits"] and found["precision"] == "bf16"):
        raise InputError(
            f"strategy '{text}': fp32i8 and fp16i8 store weights in 8 bits; for others run 'rwkv-edge quantize' and "
            "pass the folder that it wrote as the model"
        )
    return Strategy(found["device"], int(found["number"] or 0), found["precision"], found["bits"] == "i8")


def backend_for(strategy: Strategy) -> str:
    """What runs the model, found out before a checkpoint is exported for it.

    Returns:
        'onnxruntime'; or 'cuda', our own kernels, for the first GPU where ONNX Runtime has no CUDA provider.

    Raises:
        SessionError: neither runs on the device.
        MissingDependencyError: ONNX Runtime is not installed, for the CPU.
    """
    available = _onnxruntime_providers()
    if available is None and strategy.device == "cpu":
        raise MissingDependencyError("onnxruntime", "ort", "running a model")
    if strategy.device == "cpu" or CUDA in (available or ()):
        return "onnxruntime"
    if strategy.number == 0 and _has_kernels():
        return "cuda"
    here = ", ".join(available or ["none"])
    raise SessionError(
        f"'cuda {strategy.precision}' needs ONNX Runtime's {CUDA}, but here are only {here}; "
        "use 'cpu fp32', or on a machine with an NVIDIA GPU: pip install 'rwkv-edge[ort-gpu]' in place of onnxruntime, "
        "or for the first GPU: pip install 'rwkv-edge[cuda]'"
    )


def _onnxruntime_providers() -> list[str] | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    found: list[str] = onnxruntime.get_available_providers()
    return found


def _has_kernels() -> bool:
    """Whether there is a GPU, and what our own kernels are compiled and started with."""
    try:
        nvrtc_version()
        return device_capability() is not None
    except MissingDependencyError:
        return False
