"""What an ONNX file with several widths holds besides the packed file of one of them, and the file made of both again.

The packed file has the upper bits of each code, and the constants of its width. What is left is the lower bits of the
codes, as a stream of bits, and the file without the constants that the packed one has.

Needs onnx and numpy alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tqexport.backends.onnx.file import CODES, is_right_shift, parse, shifted_codes
from tqexport.errors import InputError
from tqexport.facts import DAMAGED
from tqexport.truncation import STORED_BITS

__all__ = ["rejoined", "remainder"]

# The members of a remainder.
_GRAPH = "graph.onnx"  # the file without the values that the first part has
_CODES = "codes"  # the lower bits of the codes, weight after weight, each from a whole byte on


def remainder(whole: bytes, first: bytes, bits: int) -> dict[str, bytes]:
    """What a file holds besides its packed file of a width, by name.

    Args:
        whole: A run-time file, or a truncatable one.
        first: The packed file.
        bits: Its width.
    """
    model, known = parse(whole), _initializers(parse(first))
    codes = {node.input[0] for node in model.graph.node if is_right_shift(node)}
    streams = []
    for tensor in model.graph.initializer:
        if tensor.name in known:
            if known[tensor.name] == tensor:
                tensor.ClearField("raw_data")
        elif tensor.name in codes:
            streams.append(_lower_bits(numpy_helper.to_array(tensor), STORED_BITS - bits))
            tensor.ClearField("raw_data")
    return {_GRAPH: model.SerializeToString(deterministic=True), _CODES: b"".join(streams)}


def rejoined(first: bytes, rest: Mapping[str, bytes], bits: int) -> bytes:
    """The file that two parts were made of, byte for byte; the inverse of :func:`remainder`.

    Raises:
        InputError: A part is damaged.
    """
    low = STORED_BITS - bits
    try:
        packed = parse(first)
        known, upper = _initializers(packed), shifted_codes(packed, bits)
        model = onnx.ModelProto.FromString(rest[_GRAPH])
        place, stream = 0, np.frombuffer(rest[_CODES], np.uint8)
        for tensor in model.graph.initializer:
            if tensor.name in known:
                if not tensor.raw_data:
                    tensor.raw_data = known[tensor.name].raw_data
            elif not tensor.raw_data and tensor.name.removesuffix(CODES) in upper:
                (codes,) = upper[tensor.name.removesuffix(CODES)]
                length = -(-codes.size * low // 8)
                lower = _from_bits(stream[place : place + length], codes.size, low)
                tensor.raw_data = (codes.ravel() << np.uint8(low) | lower).tobytes()
                place += length
        whole: bytes = model.SerializeToString(deterministic=True)
    except Exception as error:  # protobuf raises classes of its own, without a common base
        raise InputError(DAMAGED) from error
    return whole


def _initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _lower_bits(codes: npt.NDArray[np.uint8], low: int) -> bytes:
    """The lowest bits of each code as one stream, the highest of them first."""
    return np.packbits(np.unpackbits(codes.reshape(-1, 1), axis=1)[:, STORED_BITS - low :]).tobytes()


def _from_bits(stream: npt.NDArray[np.uint8], count: int, low: int) -> npt.NDArray[np.uint8]:
    """The inverse of :func:`_lower_bits`, uint8 (count,)."""
    places = np.unpackbits(stream, count=count * low).reshape(count, low)
    return np.packbits(np.pad(places, ((0, 0), (STORED_BITS - low, 0))), axis=1).ravel()
