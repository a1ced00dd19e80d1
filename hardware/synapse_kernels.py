"""The emulator's compiled synapses: what every target position receives, gathered from all that it reads.

Spikes are bits, so that one step over a machine word finds the next neuron that spiked; silent neurons cost
nothing. A tile of outputs is summed in vector registers, which numba has no type for: :class:`Tile` and the
intrinsics below give it one. They are written for vectors of any machine; LLVM splits those that are too wide.

Neurons are in (position, channel) order. Rows are samples, or samples times steps. Each kernel is compiled for two
widths: int16 weights with int32 sums where the bounds allow it, int32 weights with int64 sums otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic, models, register_model
from numpy.typing import NDArray

from hardware.geometry import Windows, positions_and_channels, windows
from hardware.kernels import compiled
from hardware.network import Shape, Synapse

Array = NDArray[Any]

TILE_SIZES = (16, 32, 64)
"""Outputs that are summed at a time: the smallest that holds all outputs, or else the largest."""
WORD_BITS = 56
"""Spikes in a word that may begin at any bit: eight bytes, less the seven bits before its beginning."""
SLACK_BYTES = 8
"""Bytes behind the last spike, so that a word may begin at any of them."""


@dataclass(frozen=True)
class GatheringSynapse:
    """A synapse laid out for the kernels.

    Attributes:
        windows: what each target position reads, a word at a time.
        weight: ``(tiles, taps * channels + 1, tile)``, outputs filled up with zeros to whole tiles; the last row
            is of zeros.
        outputs: target channels.
    """

    windows: Windows
    weight: Array
    outputs: int

    @classmethod
    def of(cls, synapse: Synapse, source_shape: Shape, narrow: bool) -> GatheringSynapse:
        """Lay out ``synapse``, which reads ``source_shape``; ``narrow`` for int16 weights, which they must fit."""
        positions, channels = positions_and_channels(source_shape)
        outputs = len(synapse.weight)
        taps = positions if synapse.kind == "dense" else int(np.prod(synapse.weight.shape[2:]))
        tile = next((size for size in TILE_SIZES if size >= outputs), TILE_SIZES[-1])
        tiles = -(-outputs // tile)
        rows = np.zeros((taps * channels + 1, tiles * tile), np.int16 if narrow else np.int32)
        rows[:-1, :outputs] = synapse.weight.reshape(outputs, channels, taps).transpose(2, 1, 0).reshape(-1, outputs)
        weight = np.ascontiguousarray(rows.reshape(-1, tiles, tile).swapaxes(0, 1))
        return cls(windows(synapse, source_shape, WORD_BITS), weight, outputs)

    def add_spikes(self, spikes: NDArray[np.uint8], sums: Array) -> None:
        """Add the weights of every neuron that spiked to ``sums``.

        Args:
            spikes: ``(rows, bytes)`` of :func:`pack_spikes`.
            sums: int32 with narrow weights, else int64; ``(rows, target neurons)``, changed in place.
        """
        self._add(_SPIKE_ADDERS, spikes, sums)

    def add_codes(self, codes: NDArray[np.int32], sums: Array) -> None:
        """Add the weighted codes, ``(rows, source neurons)``, to ``sums`` as in :meth:`add_spikes`."""
        self._add(_CODE_ADDERS, codes, sums)

    def _add(self, adders: dict[int, Callable[..., None]], activity: Array, sums: Array) -> None:
        add = adders[self.weight.shape[2]]
        add(activity, self.windows.first, self.windows.runs, self.weight, self.outputs, sums)


def pack_spikes(spikes: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Bits of spikes ``(rows, neurons)``, the first neuron in the lowest bit, with slack behind each row."""
    rows, neurons = spikes.shape
    packed = np.zeros((rows, -(-neurons // 8) + SLACK_BYTES), np.uint8)
    packed[:, :-SLACK_BYTES] = np.packbits(spikes, axis=1, bitorder="little")
    return packed


class Tile(types.Type):  # type: ignore[misc]
    """Numba's type of a vector of integers."""

    def __init__(self, bits: int, size: int) -> None:
        self.vector = ir.VectorType(ir.IntType(bits), size)
        self.mask = ir.VectorType(ir.IntType(1), size)
        self.bits, self.size = bits, size
        super().__init__(name=f"Tile({bits} x {size})")


@register_model(Tile)
class _TileModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, tile: Tile) -> None:
        super().__init__(manager, tile, tile.vector)


@intrinsic  # type: ignore[untyped-decorator]
def no_sum(_context: Any, sums: Any, size: Any) -> Any:
    """A tile of ``size`` zeros, of the type of ``sums``."""
    if not isinstance(size, types.IntegerLiteral):
        raise RequireLiteralValue("the size of a tile is a constant")
    tile = Tile(sums.dtype.bitwidth, size.literal_value)

    def generate(_context: Any, _builder: Any, _signature: Any, _arguments: Any) -> Any:
        return ir.Constant(tile.vector, None)

    return tile(sums, size), generate


@intrinsic  # type: ignore[untyped-decorator]
def plus_row(_context: Any, tile: Any, weight: Any, _at: Any) -> Any:
    """``tile`` plus the weights from a flat index on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total, weights, index = arguments
        return builder.add(total, _load_row(context, builder, signature.args[1], weights, index, tile))

    return tile(tile, weight, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def plus_scaled_row(_context: Any, tile: Any, weight: Any, _at: Any, code: Any) -> Any:
    """``tile`` plus ``code`` times the weights from a flat index on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total, weights, index, code = arguments
        row = _load_row(context, builder, signature.args[1], weights, index, tile)
        lane = context.cast(builder, code, signature.args[3], types.Integer.from_bitwidth(tile.bits))
        undefined = ir.Constant(tile.vector, ir.Undefined)
        first = builder.insert_element(undefined, lane, ir.Constant(ir.IntType(32), 0))
        codes = builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), tile.size), None))
        return builder.add(total, builder.mul(codes, row))

    return tile(tile, weight, types.intp, code), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_tile(_context: Any, sums: Any, _at: Any, tile: Any, _outputs: Any) -> Any:
    """Add ``tile``, or as much of it as there are outputs, to ``sums`` from a flat index on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index, total, left = arguments

        def add(at: Any, values: Any) -> None:
            address = _address(context, builder, signature.args[0], array, at, values.type)
            before = builder.load(address, align=tile.bits // 8)
            builder.store(builder.add(before, values), address, align=tile.bits // 8)

        whole = builder.icmp_signed(">=", left, ir.Constant(left.type, tile.size))
        with builder.if_else(whole) as (if_whole, if_part):
            with if_whole:
                add(index, total)
            with if_part, cgutils.for_range(builder, left) as output:
                add(builder.add(index, output.index), builder.extract_element(total, output.index))
        return context.get_dummy_value()

    return types.void(sums, types.intp, tile, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def word_at(_context: Any, spikes: Any, _byte: Any) -> Any:
    """The 64 bits that begin at a byte."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index = arguments
        return builder.load(_address(context, builder, signature.args[0], array, index, ir.IntType(64)), align=1)

    return types.uint64(spikes, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def lowest_bit(_context: Any, _word: Any) -> Any:
    """Index of the lowest bit that is set; 64 if none is."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any, pointee: Any) -> Any:
    """Where ``array`` (contiguous, of any number of axes) holds its element ``index``."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), pointee.as_pointer())


def _load_row(context: Any, builder: Any, weight_type: Any, weight: Any, index: Any, tile: Tile) -> Any:
    """Weights in a row, as wide as the tile's sums."""
    bits = weight_type.dtype.bitwidth
    narrow = ir.VectorType(ir.IntType(bits), tile.size)
    row = builder.load(_address(context, builder, weight_type, weight, index, narrow), align=bits // 8)
    return row if bits == tile.bits else builder.sext(row, tile.vector)


def _spike_adder(size: int) -> Callable[..., None]:
    @compiled
    def add_spikes(spikes: Array, first: Array, runs: Array, weight: Array, outputs: int, sums: Array) -> None:
        tiles, rows, _ = weight.shape
        one = np.uint64(1)
        for sample in range(len(spikes)):
            bits, into = spikes[sample], sums[sample]
            for target in range(len(first) - 1):
                for tile in range(tiles):
                    total = no_sum(sums, size)
                    silence = (tile + 1) * rows - 1
                    for run in range(first[target], first[target + 1]):
                        neuron, row = runs[run, 0], tile * rows + runs[run, 1]
                        word = word_at(bits, neuron >> 3) >> np.uint64(neuron & 7)
                        word &= (one << np.uint64(runs[run, 2])) - one
                        # Four at a time, the row of zeros where no spike is left: how often a loop is entered is
                        # guessed wrongly less often, which costs more than adding zeros.
                        while word != 0:
                            for _ in range(4):
                                spiked = row + lowest_bit(word) if word != 0 else silence
                                total = plus_row(total, weight, spiked * size)
                                word &= word - one
                    add_tile(into, target * outputs + tile * size, total, outputs - tile * size)

    return add_spikes


def _code_adder(size: int) -> Callable[..., None]:
    @compiled
    def add_codes(codes: Array, first: Array, runs: Array, weight: Array, outputs: int, sums: Array) -> None:
        tiles, rows, _ = weight.shape
        for sample in range(len(codes)):
            presented, into = codes[sample], sums[sample]
            for target in range(len(first) - 1):
                for tile in range(tiles):
                    total = no_sum(sums, size)
                    for run in range(first[target], first[target + 1]):
                        neuron, row = runs[run, 0], tile * rows + runs[run, 1]
                        for index in range(runs[run, 2]):
                            code = presented[neuron + index]
                            total = plus_scaled_row(total, weight, (row + index) * size, code)
                    add_tile(into, target * outputs + tile * size, total, outputs - tile * size)

    return add_codes


_SPIKE_ADDERS = {size: _spike_adder(size) for size in TILE_SIZES}
_CODE_ADDERS = {size: _code_adder(size) for size in TILE_SIZES}
