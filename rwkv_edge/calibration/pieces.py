"""What becomes of each parameter in weights.bin: the tensors that replace it, and how their values are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rwkv_edge.calibration.gptq import gptq
from rwkv_edge.calibration.record import Calibration
from rwkv_edge.calibration.rounding import Rounded, rounded
from rwkv_edge.calibration.schemes import BLOCKS, EMBEDDING, block_of
from rwkv_edge.calibration.source import FloatWeights, Place
from rwkv_edge.errors import CalibrationError
from rwkv_edge.exporters.layout import PAGE, PAGE_FROM
from rwkv_edge.spec import stored_from_float32

BITS = {"w8a8": 8, "w8": 8, "w4": 4}
CPU_BLOCK = 128  # inputs of a scale in the CPU form of int8; measured, smaller blocks only cost bytes


@dataclass(frozen=True)
class Piece:
    """One tensor of the new weights.bin; ``dtype`` 'int4' packs two values a byte, the first in the low half."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class QuantizedWeight:
    """How one parameter is stored.

    Attributes:
        name: of the parameter.
        form: 'w8a8', 'w8', 'w4', or 'rows' for an embedding with a scale for each token.
        shape: [in, out], or [V, D].
        block: inputs that share a scale; None for all.
        scale_dtype: that of the activations.
        target: 'any' or 'cpu'.
    """

    name: str
    form: str
    shape: tuple[int, int]
    block: int | None
    scale_dtype: str
    target: str

    @property
    def cpu_block(self) -> int:
        """Block of the CPU form."""
        return self.block or block_of(self.shape[0], CPU_BLOCK) or min(BLOCKS)

    @property
    def groups(self) -> int:
        """Scales of an output."""
        return self.shape[0] // (self.block or self.shape[0])

    def pieces(self) -> list[Piece]:
        """The tensors: ``<name>.q``, ``<name>.scale`` and, with static activations, ``<name>.input_scale``."""
        rows, columns = self.shape
        size = 2 if self.scale_dtype != "float32" else 4
        if self.form == "rows":
            return [
                Piece(f"{self.name}.q", "int8", self.shape, rows * columns),
                Piece(f"{self.name}.scale", self.scale_dtype, (rows, 1), rows * size),
            ]
        if self.target == "cpu":
            return self._cpu_pieces(size)
        q = ("int4", -(-rows * columns // 2)) if self.form == "w4" else ("int8", rows * columns)
        scales = (self.groups, columns) if self.block else (columns,)
        found = [
            Piece(f"{self.name}.q", q[0], self.shape, q[1]),
            Piece(f"{self.name}.scale", self.scale_dtype, scales, self.groups * columns * size),
        ]
        if self.form == "w8a8":
            found.append(Piece(f"{self.name}.input_scale", self.scale_dtype, (), size))
        return found

    def _cpu_pieces(self, size: int) -> list[Piece]:
        rows, columns = self.shape
        blocks = -(-rows // self.cpu_block)
        nbytes = self.cpu_block * BITS[self.form] // 8
        return [
            Piece(f"{self.name}.q", "uint8", (columns, blocks, nbytes), columns * blocks * nbytes),
            Piece(f"{self.name}.scale", self.scale_dtype, (columns * blocks,), columns * blocks * size),
        ]

    def arrays(self, found: Rounded, input_scale: float | None) -> list[np.ndarray]:
        """The bytes of `pieces`, in their order."""
        scales = stored_from_float32(found.scales, self.scale_dtype)
        if self.form == "rows":
            return [found.values.T, scales.T]
        if self.target == "cpu":
            return self._cpu_arrays(found, scales)
        values = packed_int4(found.values.ravel()) if self.form == "w4" else found.values
        arrays = [values, scales]
        if self.form == "w8a8":
            assert input_scale is not None
            arrays.append(stored_from_float32(np.array(input_scale, np.float32), self.scale_dtype))
        return arrays

    def _cpu_arrays(self, found: Rounded, scales: np.ndarray) -> list[np.ndarray]:
        """Unsigned, [out, blocks, block], around 128 or 8; inputs past the last are zeros; scales [out, blocks]."""
        rows, columns = self.shape
        blocks, middle = -(-rows // self.cpu_block), 1 << (BITS[self.form] - 1)
        values = np.full((columns, blocks * self.cpu_block), middle, np.uint8)
        values[:, :rows] = (found.values.T.astype(np.int16) + middle).astype(np.uint8)
        if self.form == "w4":
            values = packed_int4(values.ravel())
        return [values, np.repeat(scales.T, blocks // len(scales), axis=1)]


def packed_int4(values: np.ndarray) -> np.ndarray:
    """Pairs of 4-bit integers in one byte, the first in the low half, uint8; an odd one is followed by 0."""
    nibbles = (values & 15).astype(np.uint8)
    if len(nibbles) % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    found: np.ndarray = nibbles[0::2] | (nibbles[1::2] << 4)
    return found


def quantized_weights(
    places: Mapping[str, Place], formats: Mapping[str, str], block: int, embedding: str, dtype: str, target: str
) -> dict[str, QuantizedWeight]:
    """How every parameter that does not stay in float is stored."""
    found = {}
    for name, form in formats.items():
        if form == "float":
            continue
        rows, columns = places[name].shape
        size = block_of(rows, block) if form == "w4" else None
        found[name] = QuantizedWeight(name, form, (rows, columns), size, dtype, target)
    if embedding == "int8":
        rows, columns = places[EMBEDDING].shape
        found[EMBEDDING] = QuantizedWeight(EMBEDDING, "rows", (rows, columns), None, dtype, target)
    return found


def placed(places: Mapping[str, Place], quantized: Mapping[str, QuantizedWeight]) -> tuple[dict[str, Place], int]:
    """Where every tensor of the new weights.bin lies, in the order of the old one; and the bytes of all."""
    found: dict[str, Place] = {}
    end = 0
    for name, place in places.items():
        pieces = [Piece(name, place.dtype, place.shape, place.nbytes)]
        if name in quantized:
            pieces = quantized[name].pieces()
        for piece in pieces:
            align = PAGE if piece.nbytes >= PAGE_FROM else 64
            offset = -(-end // align) * align
            found[piece.name] = Place(piece.name, piece.dtype, piece.shape, offset, piece.nbytes)
            end = offset + piece.nbytes
    return found, end


def rounded_weight(
    weights: FloatWeights, quantized: QuantizedWeight, calibration: Calibration | None, inputs: Mapping[str, np.ndarray]
) -> Rounded:
    """Integers and scales of a parameter: GPTQ where the calibration has its Hessian and 4 bits need it.

    Args:
        weights: the float values, factors included.
        quantized: how to store it.
        calibration: statistics of its input; None for none.
        inputs: factors by which smoothing made inputs smaller.

    Raises:
        CalibrationError: the parameter holds NaN or infinity.
    """
    weight = weights.load(quantized.name)
    if not np.isfinite(weight).all():
        raise CalibrationError(
            f"'{quantized.name}' holds NaN or infinity, which no integer stands for; export a checkpoint that is whole"
        )
    if quantized.form == "rows":
        return rounded(np.ascontiguousarray(weight.T), 8, None, None, quantized.scale_dtype)
    bits = BITS[quantized.form]
    if calibration is None:
        return rounded(weight, bits, quantized.block, None, quantized.scale_dtype)
    source = calibration.input_of(quantized.name)
    factor = inputs.get(quantized.name, np.ones(1, np.float32))
    if bits == 4 and calibration.has_hessians:
        hessian = calibration.statistic("hessian", source) / (factor[:, None] * factor)
        return gptq(weight, hessian, bits, quantized.block, quantized.scale_dtype)
    square = calibration.statistic("square", source) / factor**2
    return rounded(weight, bits, quantized.block, square, quantized.scale_dtype)
