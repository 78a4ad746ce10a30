"""Every kernel, launched from its spec, against the naive torch twin in float64."""

from __future__ import annotations

import pytest

from rwkv_edge.plugins import kernel_spec

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")

HEADS = [8, 12, 16, 48, 64, 80, 96, 112, 128]
CASES = [(v, "float32", n) for v in ("5", "6", "7") for n in HEADS]
CASES += [(v, d, n) for v in ("5", "6", "7") for d in ("float16", "bfloat16") for n in (48, 64, 128)]
CASES += [("4", d, n) for d in ("float32", "float16", "bfloat16") for n in (64, 7)]
SHAPES = [
    (1, 1, 2),
    (2, 2, 3),
    (3, 3, 1),
    (1, 4, 2),
    (2, 5, 2),
    (64, 9, 4),
    (1, 64, 2),
    (2, 127, 3),
    (1, 300, 5),
]  # B T H
# One rounding to nearest: half the spacing of the format's numbers relative to the number.
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SUBNORMAL = {"float32": 0.0, "float16": 2.0**-25, "bfloat16": 0.0}
FLOAT32 = 1e-5  # of the largest value


def draw(spec, B, T, H, N, device, seed=0):
    """Inputs by name, of the sizes that a model gives them, states not zero."""
    generator = torch.Generator(device).manual_seed(seed)
    values = {}
    for argument in spec.inputs:
        x = torch.randn(argument.shape(B, T, H, N), generator=generator, device=device)
        if argument.name == "w":
            x = {"4": -torch.exp(x), "7": torch.exp(-0.606531 * torch.sigmoid(x))}.get(
                spec.version, torch.exp(-torch.exp(x))
            )
        elif argument.name == "kk":
            x = torch.nn.functional.normalize(x, dim=-1)
        elif argument.name == "a":
            x = torch.sigmoid(x)
        elif argument.name == "den":
            x = x.abs() + 0.1
        elif argument.name == "k" and spec.version == "4":
            x = 3 * x
        values[argument.name] = x.to(getattr(torch, argument.dtype))
    return values


def twin(spec, values, B, T):
    """Outputs by the loop over tokens of `rwkv_edge.models.torch_ops`, in float64."""
    from rwkv_edge.models.torch_ops import TorchOps

    ops = TorchOps({}, None, B, torch.float64)
    wide = {name: x.double() for name, x in values.items()}
    rows = {name: wide[name].reshape(-1, *wide[name].shape[-(1 if spec.version == "4" else 2) :]) for name in wide}
    if spec.version == "4":
        old = wide["num"], wide["den"], wide["top"]
        y, new = ops.wkv4(old, wide["w"], wide["u"], rows["k"], rows["v"])
    elif spec.version == "7":
        y, *new = ops.wkv7(wide["state"], rows["r"], rows["w"].log(), rows["k"], rows["v"], rows["kk"], rows["a"])
    else:
        wkv = ops.wkv5 if spec.version == "5" else ops.wkv6
        y, *new = wkv(wide["state"], rows["r"], rows["w"].log(), wide["u"], rows["k"], rows["v"])
    assert y.shape[0] == B * T
    return [y, *new]


def run(spec, values, B, T, H, N, in_place=False):
    """Outputs of the kernel, into memory full of NaN (states: over the old ones if ``in_place``)."""
    from rwkv_edge.plugins.launch import launch

    outputs = []
    for argument in spec.outputs:
        shape, dtype = argument.shape(B, T, H, N), getattr(torch, argument.dtype)
        state = argument.name.removesuffix(".out")
        outputs.append(
            values[state]
            if in_place and state in values
            else torch.full(shape, float("nan"), dtype=dtype, device="cuda")
        )
    pointers = [values[argument.name].data_ptr() for argument in spec.inputs]
    launch(spec, pointers, [o.data_ptr() for o in outputs], B, T, H, N, torch.cuda.current_stream().cuda_stream)
    return outputs


def assert_close(spec, outputs, reference):
    for argument, out, ref in zip(spec.outputs, outputs, reference, strict=True):
        error = (out.double() - ref.reshape(out.shape)).abs()
        assert not error.isnan().any(), f"{spec.name}: {argument.name} has elements that nobody wrote"
        bound = FLOAT32 * ref.abs().max() + ROUNDING[argument.dtype] * ref.reshape(out.shape).abs()
        excess = (error - bound - SUBNORMAL[argument.dtype]).max()
        assert excess <= 0, f"{spec.name} {argument.name}: max error {error.max():.3g}, largest {ref.abs().max():.3g}"


@pytest.mark.parametrize(("version", "dtype", "head"), CASES)
def test_sequence(version, dtype, head, gpu):
    spec = kernel_spec(version, "sequence", dtype, head)
    for seed, (batch, tokens, heads) in enumerate(SHAPES):
        values = draw(spec, batch, tokens, heads, head, gpu, seed)
        outputs = run(spec, values, batch, tokens, heads, head)
        assert_close(spec, outputs, twin(spec, values, batch, tokens))


@pytest.mark.parametrize(("version", "dtype", "head"), CASES)
def test_steps_chained(version, dtype, head, gpu):
    """Five steps, the state fed back, equal the sequence of five, bit for bit nearly; single steps equal the twin."""
    step, sequence = (kernel_spec(version, kind, dtype, head) for kind in ("step", "sequence"))
    for batch, heads in ((1, 3), (3, 2), (64, 5)):
        values = draw(sequence, batch, 5, heads, head, gpu, seed=batch)
        state = [a.name for a in step.inputs if a.name + ".out" in {o.name for o in step.outputs}]
        current = {name: values[name] for name in state}
        rows = []
        for t in range(5):
            inputs = {
                a.name: values[a.name] if "T" not in b.axes else values[a.name][:, t].contiguous()
                for a, b in zip(step.inputs, sequence.inputs, strict=True)
            } | current
            y, *new = run(step, inputs, batch, 1, heads, head)
            assert_close(step, [y, *new], twin(step, inputs, batch, 1))
            current = dict(zip(state, new, strict=True))
            rows.append(y)
        reference = twin(sequence, values, batch, 5)
        assert_close(sequence, [torch.stack(rows, 1), *current.values()], reference)


@pytest.mark.parametrize("kind", ["step", "sequence"])
@pytest.mark.parametrize("version", ["4", "5", "6", "7"])
def test_one_token(version, kind, gpu):
    """A step is a sequence of one; both from the state of an empty stream, and in place."""
    spec = kernel_spec(version, kind, "float32", 64)
    values = draw(spec, 2, 1, 3, 64, gpu)
    for name, empty in (("state", 0.0), ("num", 0.0), ("den", 0.0), ("top", -1e38)):
        if name in values:
            values[name].fill_(empty)
    reference = twin(spec, values, 2, 1)
    assert_close(spec, run(spec, values, 2, 1, 3, 64), reference)
    assert_close(spec, run(spec, values, 2, 1, 3, 64, in_place=True), reference)


@pytest.mark.parametrize("version", ["4", "5", "6", "7"])
def test_long_sequence_in_place(version, gpu):
    spec = kernel_spec(version, "sequence", "float32", 64)
    values = draw(spec, 2, 33, 3, 64, gpu)
    reference = twin(spec, values, 2, 33)
    assert_close(spec, run(spec, values, 2, 33, 3, 64, in_place=True), reference)
