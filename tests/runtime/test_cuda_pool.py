"""Streams that come and go in a batch of the CUDA kernels: on a GPU where there is one, and with numpy in its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import cuda_double
import numpy as np
import pytest

from rwkv_edge.artifact import Artifact
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.errors import InputError, StateError
from rwkv_edge.evaluation.synthetic import Shape7, random_v7, save_pth
from rwkv_edge.exporters.onnx import ExportOptions, export_checkpoint
from rwkv_edge.plugins.fused_spec import FusedKernel
from rwkv_edge.runtime.cuda import CudaSession
from rwkv_edge.runtime.cuda_pool import CudaStatePool
from rwkv_edge.runtime.pool import StatePool

CAPACITY = 6


@pytest.fixture(scope="module", params=["numpy", pytest.param("gpu", marks=pytest.mark.gpu)])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CudaSession]:
    folder = tmp_path_factory.mktemp("pool")
    checkpoint = save_pth(random_v7(Shape7(2, 64, 256, 32, 4, (16, 8, 8, 16))), folder / "model.pth")
    options = ExportOptions(precision="fp16", chunks=(), tokenizer="none")
    export_checkpoint(open_checkpoint(checkpoint), folder / "artifact", options)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "gpu":
            request.getfixturevalue("gpu")
        else:
            patch.setattr("rwkv_edge.runtime.cuda.Driver", cuda_double.Driver)
            patch.setattr(FusedKernel, "ptx", cuda_double.described)
        found = CudaSession(Artifact.open(folder / "artifact"))
        yield found
        found.close()


def texts(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (CAPACITY, 8))


def alone(session: CudaSession) -> np.ndarray:
    """Logits [stream, step, V] of `texts`, each the only stream of a pool."""
    found = np.empty((*texts().shape, 256), np.float32)
    pool = StatePool(session, CAPACITY)
    for number, text in enumerate(texts()):
        stream = pool.open()
        for t, token in enumerate(text):
            found[number, t] = pool.step({stream: int(token)})[stream]
        pool.close(stream)
    return found


def test_no_stream_notices_the_others(session: CudaSession) -> None:
    """Streams begin, pause and end at random; the bits of each are those that it has alone."""
    expected, draw = alone(session), np.random.default_rng(1)
    pool = StatePool(session, CAPACITY)
    assert isinstance(pool, CudaStatePool)
    streams = {}
    at = np.zeros(CAPACITY, int)
    while at.min() < texts().shape[1]:
        going = [n for n in range(CAPACITY) if at[n] < texts().shape[1] and draw.random() < 0.5]
        for n in going:
            if n not in streams:
                streams[n] = pool.open()
        found = pool.step({streams[n]: int(texts()[n, at[n]]) for n in going})
        for n in going:
            np.testing.assert_array_equal(found[streams[n]], expected[n, at[n]])
            at[n] += 1
            if at[n] == texts().shape[1]:
                pool.close(streams[n])
    assert len(pool) == 0


def test_who_pauses_stays(session: CudaSession) -> None:
    pool = StatePool(session, 3)
    one, other = pool.open(), pool.open()
    pool.step({one: 1, other: 2})
    before = pool.export(one)
    for token in (3, 4, 5):
        pool.step({other: token})
    for name, array in pool.export(one).items():
        np.testing.assert_array_equal(array, before[name])


def test_forks_exports_and_prompts(session: CudaSession) -> None:
    pool = StatePool(session, 4)
    stream = pool.open()
    prompt = pool.prefill(stream, [1, 2, 3, 4, 5, 6, 7])
    state = session.initial_state()
    np.testing.assert_array_equal(prompt, session.prefill([[1, 2, 3, 4, 5, 6, 7]], state)[0])
    twin, again = pool.fork(stream), pool.open(pool.export(stream))
    found = pool.step({stream: 9, twin: 9, again: 9})
    np.testing.assert_array_equal(found[twin], found[stream])
    np.testing.assert_array_equal(found[again], found[stream])
    pool.step({twin: 1})
    apart = pool.step({stream: 2, twin: 2})
    assert not np.array_equal(apart[stream], apart[twin])
    assert pool.step({}) == {}


def test_few_rows_are_padded_to_those_that_are_apart(session: CudaSession) -> None:
    tuning = session.tuning
    try:
        session.retune(replace(tuning, skip=True, wide_from=5))
        assert [StatePool(session, n).rows(1) for n in (1, 5, 12)] == [5, 5, 12]
        assert StatePool(session, 2, exact=False).rows(1) == 2
        session.retune(replace(tuning, skip=False, wide_from=5))
        assert StatePool(session, 2).rows(1) == 2
    finally:
        session.retune(tuning)


def test_kernels_that_leave_out_zeros(session: CudaSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaSession, "keeps_rows_apart", lambda self, batch: False)
    with pytest.raises(InputError, match="exact=False"):
        StatePool(session, 2)
    assert StatePool(session, 2, exact=False).rows(2) == 2


def test_what_is_refused(session: CudaSession) -> None:
    with pytest.raises(InputError, match="at least 1"):
        StatePool(session, 0)
    pool = StatePool(session, 1)
    stream = pool.open()
    with pytest.raises(InputError, match="the pool is full"):
        pool.open()
    for use in (lambda: pool.step({stream: 256}), lambda: pool.prefill(stream, [])):
        with pytest.raises(InputError):
            use()
    with pytest.raises(InputError, match="another pool"):
        StatePool(session, 1).step({stream: 1})
    pool.close(stream)
    with pytest.raises(InputError, match="closed"):
        pool.export(stream)
    with pytest.raises(StateError, match="not of 2"):
        pool.open(session.export_state(session.initial_state(2)))
