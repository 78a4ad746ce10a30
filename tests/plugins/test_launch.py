"""What the launcher hands to the driver, with a driver that only records."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from rwkv_edge.errors import InputError, SessionError
from rwkv_edge.plugins import kernel_spec, launch


class Status(int):
    name = "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"


class Driver:
    """Answers as cuda.bindings.driver does: a status first."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
    )

    def __init__(self, context=1, load=0):
        self.context, self.load, self.launches = context, load, []

    def cuInit(self, flags):
        return (Status(0),)

    def cuCtxGetCurrent(self):
        return Status(0), self.context

    def cuCtxGetDevice(self):
        return Status(0), 0

    def cuDeviceGetAttribute(self, attribute, device):
        return Status(0), {"major": 8, "minor": 7}[attribute]

    def cuModuleLoadData(self, image):
        assert image.endswith(b"\0")
        return Status(self.load), "module"

    def cuModuleGetFunction(self, module, name):
        return Status(0), name.decode()

    def cuLaunchKernel(self, *arguments):
        self.launches.append(arguments)
        return (Status(0),)


@pytest.fixture
def install(monkeypatch):
    def put(driver):
        monkeypatch.setattr(launch, "_driver", lambda: driver)
        monkeypatch.setattr("rwkv_edge.plugins.nvrtc.compile_ptx", lambda *arguments: "ptx")
        launch._function.cache_clear()
        return driver

    yield put
    launch._function.cache_clear()


def test_inputs_then_scalars_then_outputs(install):
    driver = install(Driver())
    spec = kernel_spec("6", "sequence", "float16", 64)
    for _ in range(2):
        launch.launch(spec, [10, 11, 12, 13, 14, 15], [20, 21], 3, 9, 5, 64, stream=77)
    function, gx, gy, gz, bx, by, bz, shared, stream, (values, kinds), extra = driver.launches[1]
    assert function == spec.name
    assert (gx, gy, gz) == spec.grid(3, 9, 5, 64)
    assert (bx, by, bz) == spec.block(3, 9, 5, 64)
    assert (shared, stream, extra) == (spec.shared_memory, 77, 0)
    assert values == (10, 11, 12, 13, 14, 15, 5, 9, 20, 21)
    assert kinds == (ctypes.c_void_p,) * 6 + (ctypes.c_int,) * 2 + (ctypes.c_void_p,) * 2


def test_capability(install):
    install(Driver())
    assert launch.current_capability() == 87


def test_no_context(install):
    install(Driver(context=0))
    with pytest.raises(SessionError, match="context must be current"):
        launch.launch(kernel_spec("7", "step", "float32", 64), [0] * 7, [0] * 2, 1, 1, 1, 64)


def test_a_driver_older_than_nvrtc(install):
    install(Driver(load=222))
    with pytest.raises(SessionError, match="NVRTC is newer than the driver"):
        launch.launch(kernel_spec("7", "step", "float32", 64), [0] * 7, [0] * 2, 1, 1, 1, 64)


@pytest.mark.parametrize(
    ("inputs", "sizes", "message"),
    [
        (1, (1, 1, 1, 64), "7 inputs and 2 outputs; found 1 and 2"),
        (7, (1, 1, 1, 32), "N=64, T=1; found B=1, T=1, H=1, N=32"),
        (7, (1, 2, 1, 64), "found B=1, T=2"),
        (7, (0, 1, 1, 64), "positive sizes.*B=0"),
    ],
)
def test_wrong_counts_are_refused(inputs, sizes, message):
    with pytest.raises(InputError, match=message):
        launch.launch(kernel_spec("7", "step", "float32", 64), [0] * inputs, [0] * 2, *sizes)
