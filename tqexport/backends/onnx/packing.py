"""Fixed ONNX files that pay for their own width: several codes in a byte, in front of the same chain.

A plain file stores all eight bits of each code and shifts ``8 - b`` of them away. A packed one stores the bits that are
left, in 1, 2 or 4 bits a code, as bytes. ``BitShift`` to the left brings each code of a byte to the byte's top, where a
plain file has it, a ``Reshape`` gives the weight its shape, and the value goes by the name that the plain file's codes
have. What follows is the plain file's chain, unchanged: its own shift to the right drops the neighbours in the byte as
it drops the lower bits of a plain code. So every constant, name and node behind is that of the plain file, of the exact
kernel and of the integer one alike, and onnxruntime folds all of it when it loads the file.

ONNX has types of 2 and 4 bits as well. They need opset 25 or 21, a later onnxruntime, and a Cast before the shift; a
code of 1 bit takes 2 in them.

Needs onnx and numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from tqexport.backends.base import EXACT, EXACT_PACKED
from tqexport.backends.onnx import WIDEST_PACKED
from tqexport.backends.onnx.file import CODES, is_right_shift, parse, read_facts, rebuild, shifted_codes, write_facts
from tqexport.backends.packing import PACKED_WIDTHS, packed
from tqexport.errors import ConversionError, InputError, UsageError
from tqexport.facts import DAMAGED, ArtifactFacts
from tqexport.integer.names import INTEGER, PACKED
from tqexport.truncation import STORED_BITS

__all__ = ["PACKED_FORMS", "check_packable", "pack_onnx"]

PACKED_FORMS = {EXACT: EXACT_PACKED, INTEGER: PACKED}  # by kernel


def check_packable(bits: int) -> None:
    """Refuse a width of which no two codes fit into a byte.

    Raises:
        UsageError: It is one of them.
    """
    if bits > WIDEST_PACKED:
        raise UsageError(
            f"no two codes of {bits} bits fit into a byte, so packing them saves nothing; name widths of 1 to "
            f"{WIDEST_PACKED}, or leave the others unpacked"
        )


def pack_onnx(content: bytes) -> bytes:
    """Pack the codes of a fixed file.

    Args:
        content: A fixed file of the exact or the integer kernel, not packed, without tables of other widths.

    Returns:
        The packed file of its kernel. Weights that would not be smaller are as they were.

    Raises:
        UsageError: Its width is above 4 bits, or its kernel has no packed form.
        ConversionError: No weight is smaller when it is packed.
        InputError: It is damaged.
    """
    model = parse(content)
    facts = read_facts(model)
    kernel = facts.kernel or EXACT if isinstance(facts, ArtifactFacts) else None
    if not isinstance(facts, ArtifactFacts) or kernel not in PACKED_FORMS:
        raise UsageError("only fixed ONNX files of the exact and the integer kernel, not packed yet, can be packed")
    check_packable(facts.width)
    codes_at_width = shifted_codes(model, facts.width)
    left = {tensor.name: tensor for tensor in model.graph.initializer}
    in_place_of: dict[str, onnx.TensorProto] = {}
    shared: dict[str, onnx.TensorProto] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if is_right_shift(node) and {*node.input} <= left.keys():
            codes, shift = (left[name] for name in node.input)
            (values,) = codes_at_width[codes.name.removesuffix(CODES)]
            weight = _packed(codes.name, values, facts.width)
            if weight.size < codes.ByteSize():
                in_place_of[codes.name] = weight.stored
                # The codes of a network that rounds were not to be shifted; in a byte they have neighbours.
                in_place_of[shift.name] = numpy_helper.from_array(
                    np.array(STORED_BITS - facts.width, np.uint8), shift.name
                )
                shared.update({tensor.name: tensor for tensor in weight.shared})
                nodes += weight.nodes
                del left[codes.name]
        nodes.append(node)
    if not in_place_of:
        raise ConversionError(
            f"no layer is smaller when its codes of {facts.width} bits are packed; use --kernel {kernel}"
        )
    kept = [in_place_of.get(tensor.name, tensor) for tensor in model.graph.initializer]
    rebuild(model.graph, nodes, (*kept, *shared.values()))
    write_facts(model, replace(facts, kernel=PACKED_FORMS[kernel]))
    smaller: bytes = model.SerializeToString(deterministic=True)
    try:
        onnx.checker.check_model(smaller, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(DAMAGED) from error
    return smaller


@dataclass(frozen=True)
class _PackedWeight:
    """What stands in the place of a weight's codes: bytes, constants that weights share, and nodes."""

    stored: onnx.TensorProto
    shared: Sequence[onnx.TensorProto]
    nodes: Sequence[onnx.NodeProto]

    @property
    def size(self) -> int:
        """Bytes in the file, of what other weights do not share."""
        return int(self.stored.ByteSize() + sum(node.ByteSize() for node in self.nodes))


def _packed(name: str, codes: npt.NDArray[np.uint8], bits: int) -> _PackedWeight:
    """Pack the codes of a weight, uint8 below ``2^bits``, so that the last node gives the value ``name``."""
    stored_bits = next(width for width in PACKED_WIDTHS if width >= bits)
    stem, per_byte = name.removesuffix(CODES), STORED_BITS // stored_bits
    in_bytes = packed(codes.reshape(1, -1) << np.uint8(stored_bits - bits), stored_bits).reshape(-1, 1)
    stored = numpy_helper.from_array(in_bytes, f"{stem}.packed")
    shared: list[onnx.TensorProto] = []

    def constant(name: str, value: npt.NDArray[Any]) -> str:
        shared.append(numpy_helper.from_array(value, f"constant/{name}"))
        return shared[-1].name

    def node(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    nodes: list[onnx.NodeProto] = []
    # The first code of a byte is in its lowest bits.
    places = constant(f"places{stored_bits}", np.arange(per_byte, dtype=np.uint8)[::-1] * np.uint8(stored_bits))
    value = node("BitShift", [stored.name, places], f"{stem}.apart", direction="LEFT")
    if codes.size % per_byte:  # the last byte is not full
        value = node("Reshape", [value, constant("flat", np.array([-1], np.int64))], f"{stem}.flat")
        ends = [constant(f"index{end}", np.array([end], np.int64)) for end in (0, codes.size)]
        value = node("Slice", [value, *ends], f"{stem}.counted")
    shape = constant("shape" + "x".join(map(str, codes.shape)), np.array(codes.shape, np.int64))
    node("Reshape", [value, shape], name)
    return _PackedWeight(stored, shared, nodes)
