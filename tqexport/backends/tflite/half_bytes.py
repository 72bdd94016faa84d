"""Fixed TFLite files whose integers take half a byte each: INT4 constants in the place of int8 ones.

The integers ``2 u - (2^b - 1)`` of 1 to 3 bits lie between -7 and 7. LiteRT de-quantises INT4 in front of a float
kernel, once, and its dynamic kernels take INT4 filters. XNNPACK does neither: it leaves these layers to LiteRT's own
kernels, which take two or three times as long. Integers of 4 bits, -15 to 15, do not fit, nor do those of the integer
kernel, which are multiplied by what int8 leaves room for.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tqexport.backends.base import EXACT, EXACT_PACKED
from tqexport.backends.tflite import DYNAMIC, DYNAMIC_PACKED, WIDEST_PACKED
from tqexport.backends.tflite.file import finish_fixed, single_graph
from tqexport.errors import ConversionError, UsageError

__all__ = ["PLAIN_KERNELS", "check_packable", "pack_tflite"]

PLAIN_KERNELS = {EXACT_PACKED: EXACT, DYNAMIC_PACKED: DYNAMIC}  # by the kernel of the packed file
_PACKED_KERNELS = {plain: packed for packed, plain in PLAIN_KERNELS.items()}
_LARGEST = 7  # of a half byte
_READS_INT4 = 6  # the version of DEQUANTIZE that does


def check_packable(bits: int) -> None:
    """Refuse a width whose integers do not fit.

    Raises:
        UsageError: It is one of them.
    """
    if bits > WIDEST_PACKED:
        raise UsageError(
            f"the integers of {bits} bits do not fit INT4, which holds -8 to 7; name widths of 1 to {WIDEST_PACKED}, "
            "or leave the others unpacked"
        )


def pack_tflite(content: bytes) -> bytes:
    """Pack the integers of a fixed file.

    Args:
        content: A fixed file of the exact or the dynamic kernel, not packed.

    Returns:
        The packed file of its kernel.

    Raises:
        UsageError: Its width is above 3 bits, or its kernel has no packed form.
        ConversionError: It would not be smaller.
    """
    flat, facts = single_graph(content, None)
    if facts is None or (facts.kernel or EXACT) not in _PACKED_KERNELS:
        raise UsageError("only fixed TFLite files of the exact and the dynamic kernel, not packed yet, take INT4")
    check_packable(facts.width)
    for index in range(len(flat.graph.tensors)):
        value = flat.constant(index)
        if value is not None and flat.name(index).endswith(".codes") and np.abs(value).max() <= _LARGEST:
            flat.tensor(index).type = schema.TensorType.INT4
            flat.set_constant(index, value)
    for code in flat.model.operatorCodes:
        if max(code.builtinCode, code.deprecatedBuiltinCode) == schema.BuiltinOperator.DEQUANTIZE:
            code.version = max(code.version, _READS_INT4)
    packed = finish_fixed(flat, replace(facts, kernel=_PACKED_KERNELS[facts.kernel or EXACT]))
    if len(packed) >= len(content):
        raise ConversionError(f"the file is not smaller with integers of {facts.width} bits as INT4; leave it unpacked")
    return packed
