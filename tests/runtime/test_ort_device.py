"""States in the memory of a device: here the device is the CPU, so all bits must be those of the states in numpy."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import write_artifact

from rwkv_edge.errors import ArtifactError, SessionError
from rwkv_edge.runtime import onnxruntime as backend
from rwkv_edge.runtime import ort_device
from rwkv_edge.runtime.cache import PromptCache
from rwkv_edge.runtime.onnxruntime import OrtSession
from rwkv_edge.runtime.ort_device import CaptureError, DeviceMemory, DeviceState
from rwkv_edge.runtime.ort_graph import OrtGraph, SharedWeights
from rwkv_edge.runtime.ort_memory import Device, bytes_of, copy, view
from rwkv_edge.runtime.ort_providers import CPU, CUDA, Provider
from rwkv_edge.runtime.pool import StatePool
from rwkv_edge.runtime.session import open_session
from rwkv_edge.runtime.snapshot import History, load_snapshot, save_snapshot

HERE = Device("cpu")
PROMPT = [int(t) for t in np.random.default_rng(3).integers(0, 256, 41)]


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "artifact"
    options = ("--precision", request.param, "--batch", "dynamic", "--chunk", "16", "--all-logits")
    return write_artifact(folder, 0, *options)


def on_device(folder: Path, captured: bool = False) -> OrtSession:
    """A session whose states lie in memory of ONNX Runtime, and whose steps behave as those with CUDA graphs do."""
    session = open_session(folder, threads=1)
    assert isinstance(session, OrtSession)
    session._memory = DeviceMemory(session.spec, HERE)
    if captured:
        session._step = OrtGraph(Capturing(session._step.session), 1, False, None, captured=True)
    return session


class Capturing:
    """What ONNX Runtime's CUDA provider does with ``gpu_graph_id``: the first run of an id is two runs and the launch
    of what was captured; later ones launch that again, whatever binding is given.
    """

    def __init__(self, session: Any) -> None:
        self.session, self.graphs, self.released = session, dict[str, Any](), list[int]()

    def io_binding(self) -> Any:
        return self.session.io_binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        number = options.get_run_config_entry("gpu_graph_id")
        if number not in self.graphs:
            self.graphs[number] = binding
            for _ in range(2):
                self.session.run_with_iobinding(binding)
        self.session.run_with_iobinding(self.graphs[number])

    def release_captured_graph(self, number: int) -> None:
        self.released.append(number)
        del self.graphs[str(number)]


def same(a: Any, b: Any) -> bool:
    """Equal arrays by name."""
    return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_bits_are_those_of_states_in_numpy(artifact: Path, batch: int, captured: bool) -> None:
    host, device = open_session(artifact, threads=1), on_device(artifact, captured)
    states = [session.initial_state(batch) for session in (host, device)]
    assert isinstance(states[1], DeviceState)
    tokens = np.array([PROMPT] * batch)
    for call in ("prefill", "score"):
        found = [getattr(session, call)(tokens, state) for session, state in zip((host, device), states, strict=True)]
        assert np.array_equal(*found)
    for token in range(5):
        fed = (np.arange(batch) + token) % 256
        assert np.array_equal(host.step(fed, states[0]), device.step(fed, states[1]))
    assert same(host.export_state(states[0]), device.export_state(states[1]))


@pytest.mark.parametrize("captured", [False, True])
def test_forks_and_imports_go_their_own_way(artifact: Path, captured: bool) -> None:
    session = on_device(artifact, captured)
    state = session.initial_state()
    session.prefill([PROMPT], state)
    before = session.export_state(state)
    fork, imported = session.copy_state(state), session.import_state(before)
    logits = [session.step([7], s) for s in (state, fork, imported)]
    assert np.array_equal(logits[0], logits[1])
    assert np.array_equal(logits[0], logits[2])
    session.step([9], fork)
    assert same(session.export_state(state), session.export_state(imported))
    assert not same(session.export_state(state), session.export_state(fork))
    assert not same(session.export_state(state), before)


@pytest.mark.parametrize("captured", [False, True])
def test_streams_of_a_pool_come_and_go(artifact: Path, captured: bool) -> None:
    """The same random changes in a pool over either memory; the CPU takes its time for 16 bits."""
    found, changes = [], 100 if "fp32" in str(artifact) else 40
    for session in (open_session(artifact, threads=1), on_device(artifact, captured)):
        rng, pool, logits = np.random.default_rng(0), StatePool(session, 5), []
        streams = [pool.open()]
        for _ in range(changes):
            action = rng.integers(0, 6)
            if action == 0 and len(streams) < 5:
                streams.append(pool.open())
            elif action == 1 and len(streams) < 5:
                streams.append(pool.fork(streams[rng.integers(len(streams))]))
            elif action == 2 and len(streams) > 1:
                pool.close(streams.pop(rng.integers(len(streams))))
            elif action == 3:
                logits.append(pool.prefill(streams[-1], PROMPT[:18]))
            elif action == 4 and len(streams) < 5:
                streams.append(pool.open(pool.export(streams[0])))
            else:
                chosen = [s for s in streams if rng.random() < 0.7]
                stepped = pool.step({s: int(rng.integers(256)) for s in chosen})
                logits += [stepped[s] for s in chosen]
        logits += [array for s in streams for array in pool.export(s).values()]
        found.append(logits)
    assert len(found[0]) == len(found[1]) > changes
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_snapshots_and_prompts_travel_between_memories(artifact: Path, tmp_path: Path) -> None:
    host, device = open_session(artifact, threads=1), on_device(artifact)
    state = device.initial_state()
    device.prefill([PROMPT], state)
    save_snapshot(tmp_path / "a.state", device, state, [History().after(PROMPT)])
    again = host.import_state(load_snapshot(tmp_path / "a.state", host).arrays)
    assert np.array_equal(host.step([5], again), device.step([5], state))
    cache = PromptCache(tmp_path / "cache")
    first, second = (cache.prefill(device, PROMPT) for _ in range(2))
    assert (first.reused, second.reused) == (0, len(PROMPT))
    assert np.array_equal(device.step([6], first.state), device.step([6], second.state))


def test_a_state_takes_over_the_graphs_of_one_that_is_gone(artifact: Path) -> None:
    session = on_device(artifact, captured=True)
    expected = []
    for _ in range(3):
        state = session.initial_state()
        expected.append([session.step([t], state) for t in PROMPT[:4]])
        del state
        gc.collect()
    assert len(session._step.session.graphs) == 2  # there and back
    assert all(np.array_equal(a, b) for a, b in zip(expected[0], expected[2], strict=True))
    states = [session.initial_state() for _ in range(2)]
    for state in states:
        session.step([1], state)
    assert len(session._step.session.graphs) == 3


def test_too_much_unused_memory_goes(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = on_device(artifact, captured=True)
    monkeypatch.setattr(ort_device, "KEPT_BYTES", 0)
    state = session.initial_state()
    session.step([1], state)
    assert len(session._step.session.graphs) == 1
    del state
    gc.collect()
    assert session._step.session.released == [1]
    assert not session._memory._unused


def test_memory_goes_with_the_session(artifact: Path) -> None:
    session = on_device(artifact)
    kept, gone = session.initial_state(), session.initial_state()
    del gone
    gc.collect()
    assert len(session._memory._unused) == 1
    session.close()
    assert not session._memory._unused
    del kept
    gc.collect()
    assert not session._memory._unused


class Failing(Capturing):
    """A capture that CUDA refuses."""

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_a_graph_that_cannot_be_captured_runs_without_and_says_so_once(artifact: Path) -> None:
    session, host = on_device(artifact), open_session(artifact, threads=1)
    plain = session._step.session
    session._captures = True
    session._step = OrtGraph(Failing(plain), 1, False, None, captured=True)
    state, other = session.initial_state(), host.initial_state()
    with pytest.warns(RuntimeWarning, match="without CUDA graphs, which is slower: .*not permitted") as warned:
        logits = session.step([4], state)
    assert len(warned) == 1
    assert np.array_equal(logits, host.step([4], other))
    assert np.array_equal(session.step([5], state), host.step([5], other))  # another warning would be an error
    assert np.array_equal(session.step([6], session.copy_state(state)), host.step([6], other))
    assert not session._step.captured


def test_a_later_failure_is_an_error(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = on_device(artifact, captured=True)
    state = session.initial_state()
    session.step([4], state)
    session.step([4], state)
    before = session.export_state(state)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("CUDA error 700")

    monkeypatch.setattr(session._step.session, "run_with_iobinding", fail)
    with pytest.raises(SessionError, match="failed at a step: CUDA error 700") as raised:
        session.step([5], state)
    assert not isinstance(raised.value, CaptureError)
    assert same(before, session.export_state(state))


def test_a_model_that_cannot_be_captured_is_opened_without(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, opened, asked = open_session(artifact, threads=1), backend.open_graph, []

    def refusing(path: Path, providers: Any, *rest: Any) -> Any:
        asked.append(providers[0][1]["enable_cuda_graph"])
        if asked[-1] == "1":
            raise SessionError("FAIL : This session cannot use the graph capture feature as requested by the user")
        widened = path.with_suffix(".cpu.onnx")
        return opened(widened if widened.exists() else path, [(CPU, {})], *rest)

    monkeypatch.setattr(backend, "open_graph", refusing)
    monkeypatch.setattr(backend, "checked_providers", lambda _: [Provider(CUDA)])
    monkeypatch.setattr(backend, "preload_libraries", lambda: None)
    monkeypatch.setattr(backend, "Device", lambda *_: HERE)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs") as warned:
        session = open_session(artifact, threads=1)
    assert len(warned) == 1
    assert asked == ["1", "0"]
    assert np.array_equal(session.step([3], session.initial_state()), host.step([3], host.initial_state()))


# Memory


def test_views_are_the_memory_itself() -> None:
    block = HERE.block(64)
    block.update_inplace(np.arange(64, dtype=np.uint8))
    part = view(block, HERE, 8, [2, 2], 1)  # float32
    assert part.shape() == [2, 2]
    assert part.data_type() == "tensor(float)"
    assert np.array_equal(np.array(part.numpy()).reshape(-1).view(np.uint8), np.arange(8, 24, dtype=np.uint8))
    copy(view(block, HERE, 0, [4]), view(block, HERE, 60, [4]))
    assert block.numpy()[-4:].tolist() == [0, 1, 2, 3]
    del block
    gc.collect()


def test_copies_where_only_arrays_can_be_copied() -> None:
    class Old:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def update_inplace(self, array: np.ndarray) -> None:
            if not isinstance(array, np.ndarray):
                raise TypeError("incompatible function arguments")
            self.array[:] = array

        def numpy(self) -> np.ndarray:
            return self.array

    target = Old(np.zeros(3, np.uint8))
    copy(Old(np.array([1, 2, 3], np.uint8)), target)
    assert target.array.tolist() == [1, 2, 3]


def test_bytes_of_anything() -> None:
    strided = np.arange(8, dtype=np.int16)[::2]
    assert bytes_of(strided).view(np.int16).tolist() == [0, 2, 4, 6]
    assert bytes_of(np.zeros((2, 3), np.float32)).shape == (24,)


def test_memory_that_is_not_there() -> None:
    with pytest.raises(SessionError, match=r"gives no memory on cuda:9 .*; check its driver"):
        Device("cuda", 9).block(8)


# Weights


def test_weights_on_a_device_serve_all_graphs(artifact: Path) -> None:
    """On the CPU the block of the device is another memory than the mapped file: zeros there change the logits."""
    session, prompt = open_session(artifact, threads=1), [PROMPT[:32]]  # two chunks: the step keeps the mapped file
    assert isinstance(session, OrtSession)
    expected, mapped = session.prefill(prompt, session.initial_state()), session._weights
    session._chunks.clear()
    session._weights = SharedWeights(artifact / "weights.json", artifact / "weights.bin", HERE)
    assert np.array_equal(session.prefill(prompt, session.initial_state()), expected)
    assert mapped.values.keys() == session._weights.values.keys()
    if session.spec.precision == "fp32":  # else the CPU's provider widens them for every graph when it is opened
        block = session._weights._block
        block.update_inplace(np.zeros(block.shape(), np.uint8))
        assert not np.array_equal(session.prefill(prompt, session.initial_state()), expected)


def test_damaged_weights_are_not_copied(artifact: Path, tmp_path: Path) -> None:
    short = tmp_path / "weights.bin"
    short.write_bytes((artifact / "weights.bin").read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=r"does not describe weights\.bin"):
        SharedWeights(artifact / "weights.json", short, HERE)
