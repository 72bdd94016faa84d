"""Filters packed as TFLite Micro unpacks them: a bit stream of places in a table of values.

TFLite Micro's operator ``TFLM_DECODE`` takes pairs of constants, each a stream and a description with the table, and
writes int8 filters into the arena for the operator right behind it. The format is that of its LUT decoder
(``tensorflow/lite/micro/kernels/decode_state_lut.cc``); the description is 16 bytes, then the table:

==== =======================================================================
byte holds
==== =======================================================================
0    0, for a look-up table
1    1, the version of the description
4    1, the version of the table
5    upper half 15, for one table; the lowest three bits are those of a place
6    how far the table of one channel is from that of the next: 0
==== =======================================================================

There is one table for all channels, although a filter has a scale for each: the integers of a layer are the same
``2^b`` values in every channel. The decoder takes one table per scale, whatever stands in the upper half of byte 5, and
with the distance that is usual it reads the tables of all channels but the first from behind the only one, silently.
With a distance of 0 every channel has the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.errors import InputError

__all__ = ["DECODE", "STREAM_SUFFIX", "TABLE_SUFFIX", "WIDEST", "PackedFilter", "pack_filter", "unpacked_filters"]

DECODE = "TFLM_DECODE"  # the name of TFLite Micro's custom operator
STREAM_SUFFIX, TABLE_SUFFIX = ".stream", ".table"  # of the names of its inputs, behind that of the filter
WIDEST = 7  # bits of a place in a table

_HEAD = bytes([0, 1, 0, 0, 1])
_ONE_TABLE = 15 << 4
_HEAD_SIZE = 16
_OVERHEAD = 240  # bytes at most that a file takes for two more tensors and an operator, without their names


@dataclass(frozen=True)
class PackedFilter:
    """A filter as a stream of places in a table.

    Attributes:
        stream: uint8 (n,): the places one after the other in the order of the filter, the highest bit first.
        table: uint8 (n,): 16 bytes of description, and the values, ascending, as the bytes of int8.
    """

    stream: npt.NDArray[np.uint8]
    table: npt.NDArray[np.uint8]


def pack_filter(name: str, values: npt.NDArray[np.int8]) -> PackedFilter | None:
    """Pack a filter.

    Args:
        name: Of its tensor, which the file has three times then.
        values: int8, of any shape.

    Returns:
        None where the file would not be sure to be smaller, or a place takes more than 7 bits.
    """
    table, places = np.unique(values, return_inverse=True)
    bits = max(1, (len(table) - 1).bit_length())
    if bits > WIDEST:
        return None
    stream = np.packbits((places.reshape(-1, 1).astype(np.uint8) >> np.arange(bits, dtype=np.uint8)[::-1]) & 1)
    head = (_HEAD + bytes([_ONE_TABLE | bits, 0])).ljust(_HEAD_SIZE, b"\0")
    described = np.frombuffer(head + table.tobytes(), np.uint8)
    size = len(stream) + len(described) + 2 * len(name) + _OVERHEAD
    return PackedFilter(stream, described) if size < values.size else None


def unpacked_filters(flat: FlatModel) -> Mapping[int, npt.NDArray[np.int8]]:
    """The filters that a file's ``TFLM_DECODE`` operators write, int8, by the tensor that they write.

    Raises:
        InputError: A stream or table is not what TFLite Micro could decode without reading beyond it.
    """
    filters = {}
    for operator in flat.graph.operators:
        if flat.operator_name(operator) != DECODE:
            continue
        inputs, outputs = list(operator.inputs), list(operator.outputs)
        if len(inputs) != 2 * len(outputs):
            raise InputError(f"the file has an operator {DECODE} with {len(inputs)} inputs for {len(outputs)} outputs")
        for stream, table, output in zip(inputs[::2], inputs[1::2], outputs, strict=True):
            filters[int(output)] = _unpacked(flat, int(stream), int(table), int(output))
    return filters


def _unpacked(flat: FlatModel, stream: int, table: int, output: int) -> npt.NDArray[np.int8]:
    """What one pair of constants decodes to, in the shape of the tensor that it is written to."""
    packed, described, shape = flat.constant(stream), flat.constant(table), flat.shape(output)
    damaged = InputError(f"the packed filter {flat.name(output)} is damaged; export it again")
    if packed is None or described is None or packed.dtype != np.uint8 or described.dtype != np.uint8:
        raise damaged
    content = described.tobytes()
    if len(content) <= _HEAD_SIZE or content[:5] != _HEAD or content[5] & ~WIDEST != _ONE_TABLE or content[6]:
        raise damaged
    bits, count, values = content[5] & WIDEST, prod(shape), np.frombuffer(content[_HEAD_SIZE:], np.int8)
    if not bits or packed.size < -(-bits * count // 8):
        raise damaged
    digits = np.unpackbits(packed, count=bits * count).reshape(count, bits)
    places = digits @ (1 << np.arange(bits, dtype=np.int64)[::-1])
    if places.max(initial=0) >= len(values):
        raise damaged
    return values[places].reshape(shape)
