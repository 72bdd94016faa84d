"""Reading the ONNX files that tqexport writes: which layers hold codes, and what else they say.

Needs onnx and numpy alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tqexport.errors import InputError

__all__ = ["CodedWeight", "activation_outputs", "coded_weights", "read_metadata", "read_onnx"]

INPUT_NAME = "input"
OUTPUT_NAME = "output"
METADATA_PREFIX = "tqexport."
CONSTANT_PREFIX = "constant/"  # initializers that belong to an operator, not to the network
LEVELS_SUFFIX = ".levels"  # the number of steps of an activation quantiser
_CODES = ".codes"


@dataclass(frozen=True)
class CodedWeight:
    """One quantised weight of a file: ``scale * (codes >> shift) + offset``.

    Attributes:
        name: Name of the weight, e.g. ``layers.0.conv0.weight``; the codes are its ``.codes`` initializer.
        codes: uint8, as stored, in PyTorch's layout.
        shift: Right shift in bits.
        scale: float32 value.
        offset: float32 value.
        bits: Width of the shifted codes.
    """

    name: str
    codes: npt.NDArray[np.uint8]
    shift: int
    scale: float
    offset: float
    bits: int

    @property
    def layer(self) -> str:
        """Name of the layer, e.g. ``layers.0.conv0``."""
        return self.name.removesuffix(".weight")

    def shifted(self) -> npt.NDArray[np.uint8]:
        """The codes at the file's width, uint8."""
        return self.codes >> np.uint8(self.shift)

    def dequantized(self) -> npt.NDArray[np.float64]:
        """The weight in float64, the shape of ``codes``."""
        return self.shifted().astype(np.float64) * self.scale + self.offset


def read_onnx(path: Path) -> onnx.ModelProto:
    """Load and check a file; data outside of it is not read.

    Raises:
        InputError: Missing, empty, damaged, or with external data.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; export it again with tqexport onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker raise classes of their own, without a common base
        raise InputError(f"{path} is not a valid ONNX file; export it again with tqexport onnx") from error
    if not model.graph.node or any(tensor.external_data for tensor in model.graph.initializer):
        raise InputError(f"{path} is empty or keeps data outside of the file; export it again with tqexport onnx")
    return model


def read_metadata(model: onnx.ModelProto) -> dict[str, Any]:
    """The ``tqexport.*`` metadata without the prefix, JSON values decoded."""
    facts: dict[str, Any] = {}
    for entry in model.metadata_props:
        if entry.key.startswith(METADATA_PREFIX):
            key = entry.key.removeprefix(METADATA_PREFIX)
            try:
                facts[key] = json.loads(entry.value)
            except json.JSONDecodeError:
                facts[key] = entry.value
    return facts


def coded_weights(model: onnx.ModelProto) -> list[CodedWeight]:
    """The quantised weights of a file, in graph order.

    Raises:
        InputError: There is none, or one is not followed by the shift, scale and offset that tqexport writes.
    """
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    width = read_metadata(model).get("width")
    found: dict[str, CodedWeight] = {}
    for node in model.graph.node:
        if node.op_type != "BitShift":
            continue
        name = node.input[0].removesuffix(_CODES)
        try:
            codes, shift, scale, offset = (
                numpy_helper.to_array(values[name + part]) for part in (_CODES, ".shift", ".scale", ".offset")
            )
        except KeyError as error:
            raise InputError(f"{node.name} was not written by tqexport: there is no initializer {error}") from error
        bits = int(width) if width is not None else 8 - int(shift)
        found[name] = CodedWeight(name, codes, int(shift), float(scale), float(offset), bits)
    if not found:
        raise InputError("the ONNX file holds no BitShift node, so it was not written by tqexport")
    return list(found.values())


def activation_outputs(model: onnx.ModelProto) -> list[str]:
    """The values that hold quantised activations as whole numbers 0 to ``M_a``, in the order they are computed.

    Named ``<module>/Round`` by the exporter; a module called again has ``<module>/Round_2``.
    """
    rounded = {node.output[0] for node in model.graph.node if node.op_type == "Round"}
    return [
        node.input[0]
        for node in model.graph.node
        if node.op_type == "Div" and node.input[0] in rounded and node.input[1].endswith(LEVELS_SUFFIX)
    ]
