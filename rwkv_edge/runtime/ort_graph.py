"""Opening graphs with ONNX Runtime: providers, shared weights, and checks of what a graph takes and gives."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_edge.errors import ArtifactError, SessionError
from rwkv_edge.runtime.ort_memory import Device, bytes_of, view
from rwkv_edge.runtime.ort_providers import CPU, onnxruntime_module
from rwkv_edge.runtime.ort_providers import first_line as first_line
from rwkv_edge.runtime.session import spec_from_metadata
from rwkv_edge.spec import ITEM_SIZE, ModelSpec, numpy_dtype

SPEC_KEY = "rwkv_edge.spec"
ONNX_TYPE = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7}  # TensorProto.DataType
_ENDS = (rb"\.q\b", rb"\.input_scale\b")  # of the names of integer weights, and of static scales of their inputs
_KIND = {"float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}


@dataclass(frozen=True, eq=False)
class OrtGraph:
    """An open graph: ``tokens`` per run (1 for a step), and whether it gives the logits of all of them.

    ``run_options`` go with every run; None for the backend's own. ``captured`` says that runs become CUDA graphs.
    """

    session: Any
    tokens: int
    all_logits: bool
    run_options: Any = None
    captured: bool = False

    @property
    def input_name(self) -> str:
        """The name of the input of tokens."""
        return "token" if self.tokens == 1 else "tokens"


class SharedWeights:
    """weights.bin once for all graphs: initializers that ONNX Runtime reads where they lie, mapped or on a device.

    Each graph would otherwise map the file again, and the memory of a process would seem to grow with every graph; on
    a GPU, each would take as much memory as the weights. ONNX Runtime takes an initializer from outside if it lies on
    the device where its provider wants it, and else loads the file itself.
    """

    def __init__(self, index: Path, weights: Path, device: Device | None = None) -> None:
        """Map the file, and copy it to ``device`` if one is given.

        Args:
            index: weights.json.
            weights: weights.bin.
            device: where the provider that runs the graphs has its memory; None for the host's, without a copy.

        Raises:
            ArtifactError: they do not fit each other.
            SessionError: the device has not enough memory.
        """
        self.values: dict[str, Any] = {}
        self._block: Any = None
        try:
            mapped = np.memmap(weights, np.uint8, mode="r")
            entries = list(_entries(index, weights.name, mapped))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ArtifactError(
                f"{index} does not describe {weights.name} ({error}); export the checkpoint again"
            ) from error
        make = onnxruntime_module().OrtValue.ortvalue_from_numpy_with_onnx_type
        if device is None:
            self.values = {name: make(array, ONNX_TYPE[dtype]) for name, dtype, _, array in entries}
            return
        self._block = device.block(mapped.size)
        self._block.update_inplace(bytes_of(mapped))
        for name, dtype, offset, array in entries:
            self.values[name] = view(self._block, device, offset, array.shape, ONNX_TYPE[dtype])


def _entries(index: Path, weights: str, mapped: np.ndarray) -> Iterator[tuple[str, str, int, np.ndarray]]:
    """Name, dtype, offset and values of every tensor.

    Raises:
        ValueError: one does not lie inside the file; and what a text that is no index raises.
    """
    for entry in json.loads(index.read_bytes()):
        start, stop = int(entry["offset"]), int(entry["offset"]) + int(entry["nbytes"])
        dtype, shape = str(entry["dtype"]), [int(n) for n in entry["shape"]]
        if not 0 <= start <= stop <= mapped.size or (stop - start) != int(np.prod(shape)) * ITEM_SIZE[dtype]:
            raise ValueError(f"'{entry['name']}' does not lie inside {weights}")
        name = entry["name"].encode().decode()  # a name of Unicode text
        yield name, dtype, start, mapped[start:stop].view(numpy_dtype(dtype)).reshape(shape)


def open_graph(
    path: Path,
    providers: list[tuple[str, dict[str, str]]],
    threads: int,
    weights: SharedWeights | None,
    prepack: bool = False,
) -> Any:
    """An InferenceSession whose first provider is the wanted one.

    Weights are used where they lie, without ONNX Runtime's repacking: measured, a step of one stream is as fast,
    opening takes a twentieth of the time, and no second copy of the weights is made. With ``prepack`` they are
    repacked: steps of several streams, which else repack them every time, are up to twice as fast.

    Args:
        path: the graph.
        providers: from `rwkv_edge.runtime.ort_providers.session_providers`.
        threads: compute threads; 0 for automatic.
        weights: shared with other graphs; None to load them from the file.
        prepack: see above.

    Raises:
        SessionError: the graph cannot be opened, or the provider does not start.
    """
    ort = onnxruntime_module()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; warnings about fallbacks are checked below
    options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")  # int8 products, 100 x as fast
    if path.is_file() and saturates(path.read_bytes()):
        options.add_session_config_entry("session.x64quantprecision", "1")
    for name, value in weights.values.items() if weights else ():
        options.add_initializer(name, value)
    if not path.is_file():
        raise SessionError(f"{path} does not exist")
    try:  # its own fallback would try the same once more, and print to standard output
        session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        raise SessionError(f"ONNX Runtime cannot open {path}: {first_line(error)}") from error
    wanted, found = providers[0][0], session.get_providers()[0]
    if found != wanted:
        raise SessionError(
            f"ONNX Runtime could not start '{wanted}' and would run on {found} instead; "
            "check its driver and libraries, or name the other provider"
        )
    return session


def saturates(graph: bytes) -> bool:
    """Whether ONNX Runtime makes products of int8 with int8 of all integer weights of a serialized graph.

    Those saturate in 16 bits on x86 processors without VNNI (AVX2: up to a quarter off), unless the session asks for
    precision. Asked for it, ONNX Runtime 1.32 fails where it does not make such products: weights alone in int8, fp16.
    """
    integers, static = (set(re.findall(rb"((?:blocks\.\d+\.\w+\.\w+|head))" + end, graph)) for end in _ENDS)
    return bool(integers) and integers == static and b'"precision": "fp32"' in graph


def chunk_options(session: Any) -> Any:
    """Options of a chunk's runs: on the CPU, the memory of its activations goes back to the system after each.

    Measured at 12 × 768: 60 MB less beside 560 MB of weights after three lengths of chunks, and as fast.
    """
    if session.get_providers()[0] != CPU:
        return None
    options = onnxruntime_module().RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def spec_of(session: Any, path: Path) -> ModelSpec:
    """The spec that a graph carries.

    Raises:
        SessionError: it carries none, or a damaged one.
    """
    try:
        text: str | None = session.get_modelmeta().custom_metadata_map.get(SPEC_KEY)
    except UnicodeDecodeError as error:
        raise SessionError(f"{path} has damaged metadata ({error.reason}); export it again") from error
    return spec_from_metadata(text, path)


def checked_graph(
    session: Any, spec: ModelSpec, path: Path, tokens: int = 1, all_logits: bool = False, captured: bool = False
) -> OrtGraph:
    """The graph, if it takes and gives what the spec says, since raw memory is bound to it.

    Raises:
        SessionError: an input or output is missing, unknown, or of another type or shape.
    """
    graph = OrtGraph(session, tokens, all_logits, chunk_options(session) if tokens > 1 else None, captured)
    found = {x.name: (x.type, tuple(x.shape[1:])) for x in (*session.get_inputs(), *session.get_outputs())}
    length, rows = ((tokens,) if tokens > 1 else ()), ((tokens,) if all_logits else ())
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        graph.input_name: ("tensor(int64)", length),
        "logits": ("tensor(float)", (*rows, spec.vocab_size)),
    }
    for t in spec.state:
        expected[t.name] = expected[f"{t.name}.out"] = (_KIND[t.dtype], t.shape)
    if found != expected:
        odd = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))[0]
        raise SessionError(
            f"{path} has '{odd}' as {found.get(odd)}, but its spec says {expected.get(odd)}; export it again"
        )
    batch = session.get_inputs()[0].shape[0]
    if (batch if isinstance(batch, int) else None) != spec.batch:
        raise SessionError(f"{path} takes batch {batch}, but its spec says {spec.batch}; export it again")
    return graph
