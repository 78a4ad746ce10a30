"""An engine that is loaded, checked against the model, and ready to be bound to memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rwkv_edge.engines import CANDIDATE_LOGITS, CANDIDATE_NORM, CANDIDATE_TOKENS, EngineEntry
from rwkv_edge.errors import SessionError
from rwkv_edge.runtime.cuda_driver import Driver
from rwkv_edge.runtime.trt_module import CudaEngine, EngineLoader, ExecutionContext
from rwkv_edge.spec import ModelSpec

DATA_TYPE = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}

Port = tuple[str, str, tuple[int, ...]]
"""TensorIOMode, DataType and shape of an input or output; -1 for a dynamic axis."""


@dataclass(frozen=True, eq=False)
class TrtGraph:
    """An open engine.

    All contexts of it share one piece of scratch memory, since everything runs in order on one stream.

    Attributes:
        engine: of the library.
        entry: what the manifest says of it.
        scratch: address of scratch memory.
        scratch_nbytes: its size.
    """

    engine: CudaEngine
    entry: EngineEntry
    scratch: int
    scratch_nbytes: int

    @property
    def input_name(self) -> str:
        """The name of the input of tokens."""
        return input_name(self.entry)

    def tokens_shape(self, batch: int) -> tuple[int, ...]:
        """[B] for steps, else [B, T]."""
        return (batch,) if self.entry.tokens == 1 else (batch, self.entry.tokens)

    def logits_shape(self, batch: int, spec: ModelSpec) -> tuple[int, ...]:
        """[B, V], or [B, T, V] where the logits of all tokens are given."""
        return (batch, *((self.entry.tokens,) if self.entry.kind == "score" else ()), spec.vocab_size)

    def candidate_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Outputs of 4 bytes an element beside the logits, where the engine has them; names of `rwkv_edge.engines`."""
        return candidate_shapes(self.entry, batch)

    def context(self, loader: EngineLoader, spec: ModelSpec, batch: int) -> ExecutionContext:
        """A context for ``batch`` streams; its inputs and outputs have no memory yet.

        Raises:
            SessionError: the engine does not take so many, or there is too little memory.
        """
        made = loader.context(self.engine, self.entry.file)
        made.set_device_memory(self.scratch, self.scratch_nbytes)
        if spec.batch is None:
            shapes = {self.input_name: self.tokens_shape(batch)} | {t.name: (batch, *t.shape) for t in spec.state}
            for name, shape in shapes.items():
                if not made.set_input_shape(name, shape):
                    raise SessionError(
                        f"{self.entry.file} does not take '{name}' of shape {list(shape)}: {loader.reason()}; "
                        "run 'rwkv-edge build' again with a larger --max-batch"
                    )
        return made


def open_graph(loader: EngineLoader, driver: Driver, spec: ModelSpec, entry: EngineEntry, folder: Path) -> TrtGraph:
    """Load an engine that `rwkv_edge.engines.check_engine` has not refused.

    Raises:
        ArtifactError: its file cannot be read.
        SessionError: it cannot be loaded, takes or gives something else than the spec says, or needs too much memory.
    """
    path = folder / entry.file
    engine = loader.load(path, entry.version_compatible)
    check_ports(engine, spec, entry, path)
    nbytes = int(engine.device_memory_size_v2)
    return TrtGraph(engine, entry, driver.allocate(nbytes), nbytes)


def input_name(entry: EngineEntry) -> str:
    """The name of the input of tokens."""
    return "token" if entry.tokens == 1 else "tokens"


def check_ports(engine: CudaEngine, spec: ModelSpec, entry: EngineEntry, path: Path) -> None:
    """Compare inputs and outputs with the spec, since raw memory is bound to them.

    Raises:
        SessionError: one is missing, unknown, or of another type or shape.
    """
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    found: dict[str, Port] = {
        name: (
            engine.get_tensor_mode(name).name,
            engine.get_tensor_dtype(name).name,
            tuple(int(n) for n in engine.get_tensor_shape(name)),
        )
        for name in names
    }
    expected = expected_ports(spec, entry)
    if found != expected:
        odd = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))[0]
        raise SessionError(
            f"{path} has '{odd}' as {found.get(odd)}, but its model says {expected.get(odd)}; "
            "run 'rwkv-edge build' again"
        )


def expected_ports(spec: ModelSpec, entry: EngineEntry) -> dict[str, Port]:
    """What the engine of a model takes and gives."""
    batch = -1 if spec.batch is None else spec.batch
    length = (entry.tokens,) if entry.tokens > 1 else ()
    rows = (entry.tokens,) if entry.kind == "score" else ()
    ports: dict[str, Port] = {
        input_name(entry): ("INPUT", "INT64", (batch, *length)),
        "logits": ("OUTPUT", "FLOAT", (batch, *rows, spec.vocab_size)),
    }
    for name, shape in candidate_shapes(entry, batch).items():
        ports[name] = ("OUTPUT", "INT32" if name == CANDIDATE_TOKENS else "FLOAT", shape)
    for t in spec.state:
        ports[t.name] = ("INPUT", DATA_TYPE[t.dtype], (batch, *t.shape))
        ports[f"{t.name}.out"] = ("OUTPUT", DATA_TYPE[t.dtype], (batch, *t.shape))
    return ports


def candidate_shapes(entry: EngineEntry, batch: int) -> dict[str, tuple[int, ...]]:
    """What an engine with candidates gives for them: [B, K], [B, K] and [B, 1]; nothing of others."""
    if not entry.sample_k:
        return {}
    shape = (batch, entry.sample_k)
    return {CANDIDATE_LOGITS: shape, CANDIDATE_TOKENS: shape, CANDIDATE_NORM: (batch, 1)}
