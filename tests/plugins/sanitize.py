"""Launches every kernel on buffers of exactly their sizes, for compute-sanitizer (torch's allocator hides overruns).

compute-sanitizer --tool memcheck --error-exitcode 1 python tests/plugins/sanitize.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/plugins/sanitize.py
"""

from __future__ import annotations

import math

import numpy as np
from cuda.bindings import driver

from rwkv_edge.plugins import kernel_spec
from rwkv_edge.plugins.launch import launch

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
BATCH, HEADS = 2, 3


def check(status, *values):
    if int(status) != 0:
        raise RuntimeError(status.name)
    return values[0] if values else None


def exercise(version: str, kind: str, dtype: str, head: int, tokens: int) -> None:
    spec = kernel_spec(version, kind, dtype, head)
    pointers = []
    for argument in (*spec.inputs, *spec.outputs):
        size = math.prod(argument.shape(BATCH, tokens, HEADS, head)) * BYTES[argument.dtype]
        pointer = check(*driver.cuMemAlloc(size))
        noise = np.random.default_rng(0).integers(0, 0x38, size, np.uint8)  # small floats in every dtype
        check(*driver.cuMemcpyHtoD(pointer, noise.ctypes.data, size))
        pointers.append(int(pointer))
    count = len(spec.inputs)
    launch(spec, pointers[:count], pointers[count:], BATCH, tokens, HEADS, head)
    check(*driver.cuCtxSynchronize())
    for pointer in pointers:
        check(*driver.cuMemFree(pointer))


def main() -> None:
    check(*driver.cuInit(0))
    device = check(*driver.cuDeviceGet(0))
    check(*driver.cuCtxSetCurrent(check(*driver.cuDevicePrimaryCtxRetain(device))))
    launches = 0
    for version in "4567":
        for head, dtype in ((8, "float32"), (48, "float16"), (64, "bfloat16"), (64, "float32"), (128, "float16")):
            for kind, counts in (("step", (1,)), ("sequence", (1, 4, 11))):
                for tokens in counts:
                    exercise(version, kind, dtype, head, tokens)
                    launches += 1
    print(f"{launches} launches done")


if __name__ == "__main__":
    main()
