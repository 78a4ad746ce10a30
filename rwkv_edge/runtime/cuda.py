"""Sessions over our own CUDA kernels: RWKV-7 with nothing but a driver, NVRTC and numpy on the device.

The kernels read the artifact's weights as they lie in weights.bin. The state stays on the GPU; a step is one CUDA
graph, captured for each of the two directions between the token-shift states.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import numpy as np

from rwkv_edge.artifact import Artifact
from rwkv_edge.errors import InputError, SessionError
from rwkv_edge.plugins.fused_spec import MAX_BATCH, Choice, Dimensions, Tuning
from rwkv_edge.plugins.fused_versions import KERNELS
from rwkv_edge.runtime.cuda_chain import Chain, Give, Outputs, StatePlaces, row_bytes, state_layout
from rwkv_edge.runtime.cuda_driver import Driver, Graph
from rwkv_edge.runtime.cuda_weights import INDEX_FILE, WEIGHTS_FILE, check_scheme, load_weights
from rwkv_edge.runtime.initial import initial_arrays, stored_initial
from rwkv_edge.runtime.session import (
    Watch,
    checked_tokens,
    named_from_stored,
    stored_from_named,
)
from rwkv_edge.spec import ModelSpec, numpy_dtype

WIDE = 2048  # widths D from which a model counts as large
SMALL = Tuning(
    time_mix_in=Choice(32), time_mix_out=Choice(32, 2), channel_mix_in=Choice(32), channel_mix_out=Choice(32, 4),
    head=Choice(128), skip=False,
)  # fmt: skip
LARGE = Tuning(
    time_mix_in=Choice(64), time_mix_out=Choice(32, 4), channel_mix_in=Choice(64), channel_mix_out=Choice(64, 8),
    head=Choice(128), skip=True,
)  # fmt: skip


def dimensions_of(spec: ModelSpec) -> Dimensions:
    """What the kernels are compiled for.

    Raises:
        SessionError: they do not run this model; the message says why.
    """
    if spec.version not in KERNELS:
        known = ", ".join(KERNELS)
        raise SessionError(f"the backend 'cuda' runs RWKV-{known}, not RWKV-{spec.version}; use another backend")
    try:
        return KERNELS[spec.version].dimensions_of(spec)
    except InputError as error:
        raise SessionError(f"the backend 'cuda' cannot run this model: {error}; use another backend") from error


class CudaState:
    """The memory of streams on the GPU: matrices updated in place, token shifts on two sides that take turns.

    Attributes:
        batch: number of streams.
        side: of the token shifts that hold the state.
    """

    def __init__(self, driver: Driver, spec: ModelSpec, batch: int) -> None:
        self.batch, self.side = batch, 0
        self._driver, self._spec = driver, spec
        self.single, self.double = state_layout(spec, batch)
        self._sizes = tuple(_end(places) for places in (self.single, self.double))
        self.matrices = driver.allocate(self._sizes[0])
        self.shifts = driver.allocate(self._sizes[1]), driver.allocate(self._sizes[1])
        self.tokens = driver.allocate(4 * batch)
        self.logits = driver.allocate(4 * batch * spec.vocab_size)
        self.halted = driver.allocate(4 * batch)
        self.graphs: dict[tuple[int, Give], Graph] = {}
        pointers = (self.matrices, *self.shifts, self.tokens, self.logits, self.halted)
        weakref.finalize(self, _release, driver, pointers, self.graphs)

    def address(self, name: str, side: int, row: int = 0) -> int:
        """Of a stream's part of a state tensor."""
        at = row * row_bytes(self._spec, name)
        if name in self.single:
            return self.matrices + self.single[name][0] + at
        return self.shifts[side] + self.double[name][0] + at

    def places(self, row: int) -> StatePlaces:
        """The streams from ``row`` on."""
        layers = range(self._spec.n_layer)
        shifts = [
            tuple(
                (self.address(f"att_shift.{i}", side, row), self.address(f"ffn_shift.{i}", side, row)) for i in layers
            )
            for side in (0, 1)
        ]
        parts = [(name, *name.rsplit(".", 1)) for name in self.single]
        single = tuple({part: self.address(name, 0, row) for name, part, i in parts if i == str(n)} for n in layers)
        return StatePlaces(single, (shifts[0], shifts[1]))

    def outputs(self, row: int) -> Outputs:
        """Tokens, logits and flags of the streams from ``row`` on."""
        logits = self.logits + 4 * row * self._spec.vocab_size
        return Outputs(self.tokens + 4 * row, logits, self.halted + 4 * row)

    def copy_from(self, other: CudaState) -> None:
        """Take the state of ``other``, of as many streams."""
        self._driver.copy(self.matrices, other.matrices, self._sizes[0])
        self._driver.copy(self.shifts[self.side], other.shifts[other.side], self._sizes[1])


def _release(driver: Driver, pointers: Sequence[int], graphs: dict[tuple[int, Give], Graph]) -> None:
    """Give back what a state held."""
    for graph in graphs.values():
        graph.close()
    graphs.clear()
    driver.free(*pointers)


class CudaSession:
    """`rwkv_edge.runtime.session.Session` over the fused kernels."""

    def __init__(
        self, artifact: Artifact, check_content: bool = True, tuning: Tuning | None = None, device: int = 0
    ) -> None:
        """Compile the kernels and load the weights.

        Args:
            artifact: of RWKV-7 in fp32, fp16 or bf16.
            check_content: compare the files' sha256 with the manifest.
            tuning: choices of the kernels; by the model's size where none are given.
            device: ordinal of the GPU.

        Raises:
            ArtifactError: the artifact is incomplete or damaged.
            SessionError: no GPU, too little memory, or a model that the kernels do not run.
            MissingDependencyError: cuda-bindings or NVRTC is not installed.
        """
        self.spec: ModelSpec = artifact.manifest.spec
        self.model_hash: str | None = artifact.manifest.model_hash
        initial = artifact.manifest.initial_state
        self.initial_hash = None if initial is None else artifact.manifest.files[initial].sha256
        self._dimensions = dimensions_of(self.spec)
        check_scheme(artifact)
        if check_content:
            artifact.check_content(INDEX_FILE, WEIGHTS_FILE)
        self._driver = Driver(device)
        self._tuning = tuning or default_tuning(self._dimensions)
        self._start = initial_arrays(artifact)
        self._weights = load_weights(self._driver, artifact.path)
        self._chains: dict[int, Chain] = {}

    @property
    def chunks(self) -> tuple[int, ...]:
        """None: a prompt is fed in single steps, each one graph without the head."""
        return ()

    @property
    def numerics(self) -> str:
        """GPU and tuning: they decide the order of sums."""
        return f"cuda kernels, {self._driver.name}, {self._tuning}"

    def initial_state(self, batch: int = 1) -> CudaState:
        """See `Session.initial_state`, as for all that follows."""
        if batch < 1:
            raise InputError(f"batch must be at least 1, not {batch}")
        return self._uploaded(stored_initial(self.spec, self._start, batch))

    def step(self, tokens: Sequence[int] | np.ndarray, state: CudaState) -> np.ndarray:
        """One token for each stream."""
        self._feed(checked_tokens(tokens, 1, state.batch, self.spec), state)
        self._advance(state, "logits")
        return self._logits(state)

    def prefill(
        self, tokens: Sequence[Sequence[int]] | np.ndarray, state: CudaState, watch: Watch | None = None
    ) -> np.ndarray:
        """Single steps; the head is computed for the last token, or for all where they are watched."""
        array = checked_tokens(tokens, 2, state.batch, self.spec)
        count = array.shape[1]
        places = self._driver.allocate(4 * array.size)
        try:
            self._driver.upload(np.ascontiguousarray(array.T.astype(np.int32)), places)
            for t in range(count):
                self._driver.copy(state.tokens, places + 4 * t * state.batch, 4 * state.batch)
                self._advance(state, "state" if watch is None and t < count - 1 else "logits")
                if watch is not None:
                    watch(t + 1, self._logits(state))
        finally:
            self._driver.free(places)
        return self._logits(state)

    def score(self, tokens: Sequence[Sequence[int]] | np.ndarray, state: CudaState) -> np.ndarray:
        """Single steps."""
        array = checked_tokens(tokens, 2, state.batch, self.spec)
        logits = np.empty((*array.shape, self.spec.vocab_size), np.float32)
        for t in range(array.shape[1]):
            logits[:, t] = self.step(array[:, t], state)
        return logits

    def greedy(self, tokens: Sequence[int] | np.ndarray, state: CudaState, count: int) -> np.ndarray:
        """Feed ``tokens`` [B], then the largest logit's token, ``count`` times, without the host in between.

        Returns:
            The tokens chosen, [B, count] int64; the last of them has not been fed.
        """
        self._feed(checked_tokens(tokens, 1, state.batch, self.spec), state)
        size = 4 * state.batch
        history = self._driver.allocate(size * count)
        try:
            for i in range(count):
                self._advance(state, "choice")
                self._driver.copy(history + i * size, state.tokens, size)
            chosen = np.empty((count, state.batch), np.int32)
            self._driver.download(history, chosen)
        finally:
            self._driver.free(history)
        return chosen.T.astype(np.int64)

    def copy_state(self, state: CudaState) -> CudaState:
        """A state of its own memory."""
        copied = CudaState(self._driver, self.spec, state.batch)
        copied.copy_from(state)
        return copied

    def export_state(self, state: CudaState) -> dict[str, np.ndarray]:
        """Copies by name."""
        stored = {}
        for t in self.spec.state:
            stored[t.name] = np.empty((state.batch, *t.shape), numpy_dtype(t.dtype))
            self._driver.download(state.address(t.name, state.side), stored[t.name])
        return named_from_stored(stored, self.spec)

    def import_state(self, arrays: Mapping[str, np.ndarray]) -> CudaState:
        """A state with these values."""
        return self._uploaded(stored_from_named(arrays, self.spec))

    def step_seconds(self, state: CudaState, count: int) -> float:
        """Seconds of a step on the GPU with the greedy choice fed back, over ``count`` steps: for benchmarks."""

        def work() -> None:
            for _ in range(count):
                self._advance(state, "choice")

        work()
        return self._driver.elapsed_ms(work) / 1000 / count

    def close(self) -> None:
        """Give the GPU's memory back."""
        for chain in self._chains.values():
            chain.close()
        self._chains.clear()
        self._driver.free(self._weights.memory)
        self._driver.close()

    def _uploaded(self, stored: Mapping[str, np.ndarray]) -> CudaState:
        batch = stored[self.spec.state[0].name].shape[0]
        state = CudaState(self._driver, self.spec, batch)
        for name, array in stored.items():
            self._driver.upload(np.ascontiguousarray(array), state.address(name, state.side))
        return state

    def _feed(self, tokens: np.ndarray, state: CudaState) -> None:
        self._driver.upload(np.ascontiguousarray(tokens.astype(np.int32)), state.tokens)

    def _logits(self, state: CudaState) -> np.ndarray:
        logits = np.empty((state.batch, self.spec.vocab_size), np.float32)
        self._driver.download(state.logits, logits)
        return logits

    def _advance(self, state: CudaState, give: Give) -> None:
        """Enqueue one step of all streams."""
        key = (state.side, give)
        if key not in state.graphs:
            state.graphs[key] = self._captured(state, give)
        state.graphs[key].launch()
        state.side = 1 - state.side

    def _captured(self, state: CudaState, give: Give) -> Graph:
        """The graph of a step from the side of the shifts that is current; capturing runs nothing."""
        groups = []
        for row in range(0, state.batch, MAX_BATCH):
            chain = self._chain(min(MAX_BATCH, state.batch - row))
            groups.append((chain, chain.launches(state.places(row), state.side, state.outputs(row), give)))
        with self._driver.capture() as graph:
            for chain, launches in groups:
                chain.enqueue(launches)
        return graph

    def _chain(self, batch: int) -> Chain:
        if batch not in self._chains:
            stored, shared = self._weights.stored, self._driver.block_shared
            kernels = KERNELS[self.spec.version](self._dimensions, batch, self._tuning, stored, shared=shared)
            self._chains[batch] = Chain(self._driver, self.spec, kernels, self._weights.address)
        return self._chains[batch]


def default_tuning(dimensions: Dimensions) -> Tuning:
    """The choices that were fastest on an H100 at 0.1 and 0.4, 1.5, and 2.9 billion parameters.

    In large models half of a tile's loads are spared by skipping; in small ones the time goes into waiting for the
    first of them, so all are asked for at once.
    """
    return SMALL if dimensions.width < WIDE else LARGE


def _end(places: Mapping[str, tuple[int, int]]) -> int:
    return max((offset + nbytes for offset, nbytes in places.values()), default=0)
