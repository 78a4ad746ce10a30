"""Fixtures that several files share."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("RWKV_JIT_ON", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each worker: more would wait for each other, spinning
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a job in the background, whose children would ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
SHARED = Path(__file__).parents[2] / "shared"


def pytest_collection_finish() -> None:
    """What is imported stays: no collection of garbage has to walk it again. Graphs have many objects, few cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def signatures() -> Iterator[None]:
    """An operator's signature is made once; onnxscript makes it for every node, a quarter of an export's time."""
    if importlib.util.find_spec("onnx_ir") is None:
        yield
        return
    from onnx_ir import schemas

    made: dict[tuple[str, str, int], Any] = {}
    make = schemas.OpSignature.from_op_schema

    def once(schema: Any) -> Any:
        key = schema.domain, schema.name, schema.since_version
        if key not in made:
            made[key] = make(schema)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schemas.OpSignature, "from_op_schema", staticmethod(once))
        yield


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The test models beside the checkout."""
    folder = SHARED / "models"
    if not folder.is_dir():
        pytest.skip("../shared/models is absent")
    return folder


@pytest.fixture(scope="session")
def shared_text() -> Path:
    """The texts beside the checkout."""
    folder = SHARED / "text"
    if not folder.is_dir():
        pytest.skip("../shared/text is absent")
    return folder


@pytest.fixture(scope="session")
def gpu() -> Iterator[str]:
    """The device of torch's tensors, with its context current."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU")
    pytest.importorskip("cuda.bindings")
    torch.zeros(1, device="cuda")
    yield "cuda"
    torch.cuda.synchronize()
