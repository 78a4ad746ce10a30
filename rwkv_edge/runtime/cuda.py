"""Sessions over our own CUDA kernels: a model with nothing but a driver, NVRTC and numpy on the device.

The kernels read the artifact's weights as they lie in weights.bin. The state stays on the GPU; a step is one CUDA
graph, captured for each of the two directions between the token-shift states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from rwkv_edge.artifact import Artifact
from rwkv_edge.errors import InputError, SessionError
from rwkv_edge.plugins.fused import Kernels
from rwkv_edge.plugins.fused_spec import MAX_BATCH, Dimensions, Tuning
from rwkv_edge.plugins.fused_versions import KERNELS
from rwkv_edge.runtime.cuda_ahead import Ahead, Fetch, drawn_tokens
from rwkv_edge.runtime.cuda_chain import Chain, Give
from rwkv_edge.runtime.cuda_driver import Driver, Graph
from rwkv_edge.runtime.cuda_launch import Launch, Loaded
from rwkv_edge.runtime.cuda_pieces import MOST_ROWS, Piece, Pieces
from rwkv_edge.runtime.cuda_rows import StateRows
from rwkv_edge.runtime.cuda_sampling import DrawKey, Draws, checked_samplers, draws_on_device, take_all
from rwkv_edge.runtime.cuda_staging import Staging
from rwkv_edge.runtime.cuda_state import CudaState
from rwkv_edge.runtime.cuda_tuning import default_tuning, keep_tuning, tuning_for
from rwkv_edge.runtime.cuda_weights import INDEX_FILE, WEIGHTS_FILE, check_scheme, load_weights, stored_forms
from rwkv_edge.runtime.cuda_wide import WideChain
from rwkv_edge.runtime.initial import initial_arrays, stored_initial
from rwkv_edge.runtime.sampling import Sampler, SamplerConfig
from rwkv_edge.runtime.session import (
    Watch,
    checked_tokens,
    named_from_stored,
    stored_from_named,
)
from rwkv_edge.spec import ModelSpec, numpy_dtype


def dimensions_of(spec: ModelSpec) -> Dimensions:
    """What the kernels are compiled for.

    Raises:
        SessionError: they do not run this model; the message says why.
    """
    if spec.version not in KERNELS:
        known = ", ".join(KERNELS)
        raise SessionError(f"the backend 'cuda' runs RWKV-{known}, not RWKV-{spec.version}; use another backend")
    with _refused():
        return KERNELS[spec.version].dimensions_of(spec)


def checked_dimensions(artifact: Artifact) -> Dimensions:
    """What the kernels are compiled for, once it is known that they take the artifact's matrices.

    Raises:
        ArtifactError: the artifact is damaged.
        SessionError: they do not run this model, or a matrix in the form in which it is stored; the message says why.
    """
    spec = artifact.manifest.spec
    dimensions = dimensions_of(spec)
    check_scheme(artifact)
    stored = stored_forms(artifact.path)
    with _refused():
        KERNELS[spec.version](dimensions, 1, default_tuning(dimensions, stored), stored)
    return dimensions


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """What the kernels refuse, in the words of a session."""
    try:
        yield
    except InputError as error:
        raise SessionError(f"the backend 'cuda' cannot run this model: {error}; use another backend") from error


class CudaSession:
    """`rwkv_edge.runtime.session.Session` over the fused kernels."""

    def __init__(
        self, artifact: Artifact, check_content: bool = True, tuning: Tuning | None = None, device: int = 0
    ) -> None:
        """Compile the kernels and load the weights.

        Args:
            artifact: in fp32, fp16 or bf16, or with int8 or int4 weights.
            check_content: compare the files' sha256 with the manifest.
            tuning: choices of the kernels; None for what `rwkv-edge tune` found on this GPU, else for the defaults.
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
        self._dimensions = checked_dimensions(artifact)
        if check_content:
            artifact.check_content(INDEX_FILE, WEIGHTS_FILE)
        self._driver = Driver(device)
        self._start = initial_arrays(artifact)
        self._weights = load_weights(self._driver, artifact.path)
        self._tuning = tuning or tuning_for(self._driver.name, self._dimensions, self._weights.stored)
        self._chains: dict[int, Chain] = {}
        self._loaded, self._staging = Loaded(self._driver), Staging(self._driver, self.spec.vocab_size)
        self._pieces = Pieces(self._driver, self.spec, self._dimensions, self._weights, self._loaded)
        self._work: CudaState | None = None
        self._generation = 0

    @property
    def chunks(self) -> tuple[int, ...]:
        """See `rwkv_edge.runtime.cuda_pieces`; none where the wide kernels do not run the model."""
        return self._pieces.chunks

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
        array = checked_tokens(tokens, 1, state.batch, self.spec)
        self.repay(state)
        self._feed(array, state)
        self._advance(state, "logits")
        return self.logits(state)

    def prefill(
        self, tokens: Sequence[Sequence[int]] | np.ndarray, state: CudaState, watch: Watch | None = None
    ) -> np.ndarray:
        """Chunks through the wide kernels; the head is computed for the last token, or for the last of each chunk where
        they are watched. A state that an exception of ``watch`` leaves behind stands at the chunk before."""
        array = checked_tokens(tokens, 2, state.batch, self.spec)
        work = self._borrowed(state)
        at, count = 0, array.shape[1]
        with self._pieces.uploaded(array) as pieces:
            for piece in pieces:
                at += piece.tokens
                wanted = piece.ends_chunk and (watch is not None or at == count)
                self._feed_piece(piece, work, "logits" if wanted else "state")
                if wanted and watch is not None:
                    self._give_back(work, state)
                    watch(at, self.logits(work))
        self._give_back(work, state)
        return self.logits(work)

    def score(self, tokens: Sequence[Sequence[int]] | np.ndarray, state: CudaState) -> np.ndarray:
        """Chunks through the wide kernels."""
        array = checked_tokens(tokens, 2, state.batch, self.spec)
        work = self._borrowed(state)
        logits = np.empty((*array.shape, self.spec.vocab_size), np.float32)
        at = 0
        with self._pieces.uploaded(array) as pieces:
            for piece in pieces:
                chain = self._feed_piece(piece, work, "logits" if piece.tokens == 1 else "state")
                found = self.logits(work)[:, None] if chain is None else self._pieces.scored(chain, piece, work.batch)
                logits[:, at : at + piece.tokens] = found
                at += piece.tokens
        self._give_back(work, state)
        return logits

    def greedy(self, tokens: Sequence[int] | np.ndarray, state: CudaState, count: int) -> np.ndarray:
        """Feed ``tokens`` [B], then the largest logit's token, ``count`` times, without the host in between.

        Vocabularies that the kernels do not draw from (`draws_on_device`) come through the host.

        Returns:
            The tokens chosen, [B, count] int64; the last of them has not been fed.

        Raises:
            InputError: a token outside the vocabulary.
            SessionError: logits hold NaN or +inf.
        """
        array = checked_tokens(tokens, 1, state.batch, self.spec)
        largest = [Sampler(SamplerConfig(temperature=0)) for _ in range(state.batch)]
        if draws_on_device(self.spec.vocab_size):
            return self.sample(array, state, largest, count)
        chosen = np.empty((state.batch, count), np.int64)
        for i in range(count):
            logits = self.step(array, state)
            array = np.array([one.sample(row) for one, row in zip(largest, logits, strict=True)], np.int64)
            chosen[:, i] = array
        return chosen

    def sample(
        self,
        tokens: Sequence[int] | np.ndarray,
        state: CudaState,
        samplers: Sequence[Sampler],
        count: int,
        stop_tokens: Collection[int] = (),
    ) -> np.ndarray:
        """Feed ``tokens`` [B], then what each stream's sampler draws, ``count`` times, without the host in between.

        A stream that draws a stop token ends there; the others go on.

        Args:
            tokens: as for `step`.
            state: has consumed, at the end, ``tokens`` and what was drawn, but for the last token of each stream.
            samplers: one for each stream; at the end as if they had drawn the tokens themselves.
            count: of tokens for each stream.
            stop_tokens: end a stream.

        Returns:
            The tokens drawn, [B, count] int64; -1 behind a stop token.

        Raises:
            InputError: a token outside the vocabulary, or not a sampler for each stream.
            SessionError: logits hold NaN or +inf, or the vocabulary is none of those that the kernels draw from.
        """
        array = checked_tokens(tokens, 1, state.batch, self.spec)
        own = checked_samplers(samplers, state.batch)
        self.repay(state)
        self.draws(state).load(own, stop_tokens)
        drawn = drawn_tokens(self, array, state, count, stop_tokens)
        self.resume(state)
        take_all(drawn, own)
        return drawn

    def draw_ahead(
        self, token: int, state: CudaState, sampler: Sampler, stop_tokens: Collection[int], limit: int | None
    ) -> Iterator[tuple[int, Fetch]] | None:
        """Tokens behind ``token``, drawn before they are asked for; see `rwkv_edge.runtime.cuda_ahead.Ahead`.

        None where the kernels do not draw from such a vocabulary.
        """
        if not draws_on_device(self.spec.vocab_size):
            return None
        ahead = Ahead(self, sampler, token, stop_tokens, limit)
        return iter(lambda: ahead.next(state), None)

    def copy_state(self, state: CudaState) -> CudaState:
        """A state of its own memory; of one with which the GPU runs ahead, what it is for the caller."""
        copied = self.empty_state(state.batch)
        if state.ahead is not None:
            state.ahead.copy_to(state, copied)
        else:
            copied.copy_from(state)
            copied.owed = list(state.owed)
        return copied

    def export_state(self, state: CudaState) -> dict[str, np.ndarray]:
        """Copies by name."""
        self.repay(state)
        stored = {}
        for t in self.spec.state:
            stored[t.name] = np.empty((state.batch, *t.shape), numpy_dtype(t.dtype))
            self._driver.download(state.address(t.name, state.side), stored[t.name])
        return named_from_stored(stored, self.spec)

    def import_state(self, arrays: Mapping[str, np.ndarray]) -> CudaState:
        """A state with these values."""
        return self._uploaded(stored_from_named(arrays, self.spec))

    @property
    def tuning(self) -> Tuning:
        """Choices of the kernels."""
        return self._tuning

    def compile(self, tuning: Tuning) -> None:
        """Put the kernels of one stream's step into the cache of compiled texts; threads may do so side by side.

        Raises:
            InputError: the choices do not fit the model or the GPU.
        """
        for kernel in self._kernels(1, tuning).of_step(self.spec.n_layer):
            kernel.ptx(self._driver.capability)

    def retune(self, tuning: Tuning) -> None:
        """Take other choices from the next step on; states stay valid."""
        self._tuning = tuning
        self._generation += 1
        for chain in self._chains.values():
            chain.close()
        self._chains.clear()

    def keep_tuning(self) -> Path:
        """Keep the choices for all sessions of such a model on such a GPU; returns the file.

        Raises:
            OSError: the cache folder cannot be written.
        """
        return keep_tuning(self._driver.name, self._dimensions, self._weights.stored, self._tuning)

    def step_seconds(self, state: CudaState, count: int) -> float:
        """Seconds of a step on the GPU with the greedy choice fed back, over ``count`` steps: for benchmarks."""

        self.repay(state)

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
        self._work = None
        self._pieces.close()
        self._driver.free(self._weights.memory)
        self._driver.close()

    def repay(self, state: CudaState) -> None:
        """Bring a state to where it stands for the caller."""
        if state.ahead is not None:
            state.ahead.land(state)
        while state.owed:
            self._feed(np.array(state.owed[:1]), state)
            self._advance(state, "state")
            del state.owed[0]

    def empty_state(self, batch: int = 1) -> CudaState:
        """Memory for a state, whose values are still to come."""
        return CudaState(self._driver, self.spec, batch)

    def draws(self, state: CudaState) -> Draws:
        """What the tokens of a state are drawn with.

        Raises:
            SessionError: the kernels do not draw from such a vocabulary.
        """
        if state.draws is None:
            state.draws = Draws(self._driver, state.batch, self.spec.vocab_size)
        return state.draws

    def draw(self, state: CudaState) -> None:
        """Enqueue one step and the choice of the next tokens."""
        self._advance(state, self.draws(state).key)

    def rows(self, state: CudaState) -> StateRows:
        """Its streams one by one."""
        return StateRows(self._driver, self.spec, state)

    def keeps_rows_apart(self, batch: int) -> bool:
        """Whether the bits of a stream are the same whatever the others of so many are."""
        return self._is_wide(batch) or not self._tuning.skip

    def step_rows(self, tokens: np.ndarray, goes: np.ndarray, state: CudaState) -> np.ndarray:
        """One token for each stream that goes, both [B]; the others stay as they are. Returns all logits [B, V]."""
        self._driver.upload(np.where(goes, 0, 1).astype(np.int32), state.halted)
        self._feed(tokens, state)
        self._advance(state, "logits")
        return self.logits(state)

    def resume(self, state: CudaState) -> None:
        """No stream is halted any more."""
        self._driver.upload(np.zeros(state.batch, np.int32), state.halted)

    def feed(self, tokens: np.ndarray, state: CudaState) -> None:
        """Tokens of the next step; no stream is halted any more."""
        self.resume(state)
        self._feed(tokens, state)

    def _uploaded(self, stored: Mapping[str, np.ndarray]) -> CudaState:
        batch = stored[self.spec.state[0].name].shape[0]
        state = CudaState(self._driver, self.spec, batch)
        for name, array in stored.items():
            self._driver.upload(np.ascontiguousarray(array), state.address(name, state.side))
        return state

    def _feed(self, tokens: np.ndarray, state: CudaState) -> None:
        self._staging.feed(tokens, state.tokens)

    def logits(self, state: CudaState) -> np.ndarray:
        """Those [B, V] of the last step that computed them."""
        return self._staging.logits(state.logits, state.batch)

    def _borrowed(self, state: CudaState) -> CudaState:
        """A state of the session's own with the values of this one: its graphs are there when a new prompt comes.

        Large batches are not worth the copies and the memory: they keep their own.
        """
        self.repay(state)
        if state.batch > MAX_BATCH:
            return state
        if self._work is None or self._work.batch != state.batch:
            self._work = self.empty_state(state.batch)
        self._work.side = 0
        self._work.copy_from(state)
        self._driver.copy(self._work.halted, state.halted, 4 * state.batch)
        return self._work

    def _give_back(self, work: CudaState, state: CudaState) -> None:
        """What has become of a state's values."""
        if work is not state:
            state.copy_from(work)

    def _feed_piece(self, piece: Piece, state: CudaState, give: Give) -> WideChain | None:
        """Enqueue tokens of all streams; returns the chain that they went through, None for a single step."""
        if piece.tokens == 1:
            self._driver.copy(state.tokens, piece.ids, 4 * state.batch)
            self._advance(state, give)
            return None
        self._renew_graphs(state)
        chain = self._pieces.enqueue(piece, state, lasts=state is self._work)
        if give == "logits":
            self._pieces.give_last(chain, piece, state)
        return chain

    def _renew_graphs(self, state: CudaState) -> None:
        if state.generation != self._generation:
            state.drop_graphs(self._generation)

    def _advance(self, state: CudaState, give: Give | DrawKey) -> None:
        """Enqueue one step of all streams."""
        self._renew_graphs(state)
        key = (state.side, give)
        if key not in state.graphs:
            state.graphs[key] = self._captured(state, give)
        state.graphs[key].launch()
        state.side = 1 - state.side

    def _captured(self, state: CudaState, give: Give | DrawKey) -> Graph:
        """The graph of a step from the side of the shifts that is current; capturing runs nothing."""
        groups: list[list[Launch]] = []
        wide = self._is_wide(state.batch)
        wanted: Give = "logits" if isinstance(give, DrawKey) else give
        for row in range(0, state.batch, MOST_ROWS if wide else MAX_BATCH):
            batch, outputs = min(MOST_ROWS if wide else MAX_BATCH, state.batch - row), state.outputs(row)
            chain: Chain | WideChain = self._pieces.chain(batch) if wide else self._chain(batch)
            if isinstance(chain, WideChain):
                launches = chain.step(batch, state.places(row), state.side, outputs, wanted)
            else:
                launches = chain.launches(state.places(row), state.side, outputs, wanted)
            if isinstance(give, DrawKey):
                launches += self.draws(state).launches(row, batch, launches[-1], outputs)
            groups.append(launches)
        return self._loaded.captured(groups)

    def _is_wide(self, batch: int) -> bool:
        return self._pieces.runs and batch >= min(self._tuning.wide_from, MAX_BATCH + 1)

    def _kernels(self, batch: int, tuning: Tuning) -> Kernels:
        shared = self._driver.block_shared
        return KERNELS[self.spec.version](self._dimensions, batch, tuning, self._weights.stored, shared=shared)

    def _chain(self, batch: int) -> Chain:
        if batch not in self._chains:
            kernels = self._kernels(batch, self._tuning)
            self._chains[batch] = Chain(self._driver, self.spec, kernels, self._weights.address)
        return self._chains[batch]
