"""Feeding windows to a graph that was changed in memory, chunk by chunk, the state carried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_edge.artifact import Artifact, GraphEntry
from rwkv_edge.errors import CalibrationError
from rwkv_edge.runtime.initial import initial_arrays
from rwkv_edge.runtime.ort_graph import first_line
from rwkv_edge.runtime.ort_providers import CPU, onnxruntime_module
from rwkv_edge.spec import numpy_dtype

FOLDER_KEY = "session.model_external_initializers_file_folder_path"


def float_graph(artifact: Artifact, dividing: Sequence[int], longest: int) -> GraphEntry:
    """The prefill graph with the longest chunk up to ``longest`` that divides all of ``dividing``; else the step.

    Raises:
        CalibrationError: the artifact is quantized, in a precision that does not run here, or of fused nodes.
    """
    manifest = artifact.manifest
    if manifest.quantization is not None:
        scheme = manifest.quantization.get("scheme")
        raise CalibrationError(f"{artifact.path} is quantized already ({scheme}); give the float artifact it came from")
    if manifest.spec.precision == "bf16":
        raise CalibrationError(f"{artifact.path} is in bf16, but INT8 comes from fp32 or fp16; export it again in one")
    step = artifact.graph("step", "cpu")
    if step.wkv == "fused":
        raise CalibrationError(
            f"{artifact.path} has its matrices inside fused nodes, whose kernels take float; export it again with "
            "--wkv inline or function"
        )
    fitting = [
        graph
        for graph in manifest.graphs
        if graph.kind == "prefill" and graph.tokens <= longest and not any(n % graph.tokens for n in dividing)
    ]
    return max(fitting, key=lambda graph: graph.tokens, default=step)


class WindowRunner:
    """A changed graph over the weights of an artifact.

    Args:
        artifact: where the weights lie, and the initial state.
        model: the graph, serialised.
        entry: the graph that it was made of.
        threads: compute threads; 0 for automatic.
        replaced: values of weights that take the place of the file's, by name, in the dtype of the graph.

    Raises:
        CalibrationError: ONNX Runtime cannot open it.
    """

    def __init__(
        self,
        artifact: Artifact,
        model: bytes,
        entry: GraphEntry,
        threads: int = 0,
        replaced: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        ort = onnxruntime_module()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what is fatal; errors are raised
        options.add_session_config_entry(FOLDER_KEY, str(artifact.path.resolve()))
        options.add_session_config_entry("session.disable_prepacking", "1")  # the weights stay mapped
        self._kept = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in (replaced or {}).items()}
        for name, value in self._kept.items():
            options.add_initializer(name, value)
        try:
            self._session = ort.InferenceSession(model, options, providers=[CPU], enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            raise CalibrationError(
                f"ONNX Runtime cannot open {entry.file} of {artifact.path}: {first_line(error)}"
            ) from error
        self.batch = artifact.manifest.spec.batch or 1
        self._spec, self._tokens = artifact.manifest.spec, entry.tokens
        self._start = initial_arrays(artifact)
        self._path: Path = artifact.path

    def run(self, window: np.ndarray, names: Sequence[str]) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Feed tokens [B, W], W a multiple of the chunk's; yields where each chunk began, and the outputs ``names``.

        Raises:
            CalibrationError: ONNX Runtime failed.
        """
        states = [f"{t.name}.out" for t in self._spec.state]
        feeds: dict[str, Any] = {}
        for t in self._spec.state:
            value = np.full(t.shape, t.fill, np.float32) if t.name not in self._start else self._start[t.name]
            feeds[t.name] = np.repeat(value[None], len(window), axis=0).astype(numpy_dtype(t.dtype))
        for at in range(0, window.shape[1], self._tokens):
            part = window[:, at : at + self._tokens].astype(np.int64)
            feeds |= {"token": part[:, 0]} if self._tokens == 1 else {"tokens": part}
            try:
                outputs = self._session.run([*names, *states], feeds)
            except Exception as error:  # see above
                raise CalibrationError(f"ONNX Runtime failed on {self._path}: {first_line(error)}") from error
            yield at, outputs[: len(names)]
            feeds |= dict(zip((t.name for t in self._spec.state), outputs[len(names) :], strict=True))
