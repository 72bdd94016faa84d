"""What a TFLite file may ask for before anything runs it."""

from __future__ import annotations

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from tqexport.backends.tflite.door import check_tflite
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.errors import InputError
from tqexport.reading import limits

HALF = limits.VALUES_BYTES // 8 - 2  # elements of a float32 value that takes nearly half of what is allowed


def file_of(*operators):
    """A file of operators on values of half the limit: kind, values that it reads, the one it gives; 0 is the input."""
    model = schema.ModelT()
    model.version, graph = 3, schema.SubGraphT()
    graph.tensors, graph.operators = [], []
    model.subgraphs, model.buffers, model.operatorCodes = [graph], [schema.BufferT()], []
    flat = FlatModel.of(model)
    for number in range(len(operators) + 1):
        flat.add_tensor(f"value{number}", (1 if number in (0, len(operators)) else HALF,))
    for kind, reads, gives in operators:
        graph.operators.append(flat.operator(kind, reads, gives))
    graph.inputs, graph.outputs = np.array([0], np.int32), np.array([len(operators)], np.int32)
    return flat.pack()


def test_values_may_take_much_one_after_the_other():
    check_tflite(file_of(*(("RELU", [i], i + 1) for i in range(20))))


def test_values_may_not_take_much_at_once():
    kept = [("RELU", [i], i + 1) for i in range(10)]
    with pytest.raises(InputError, match="computes values of 1,610,612,720 bytes at once, more than 1,073,741,824"):
        check_tflite(file_of(*kept, ("ADD", [2, 10], 11)))
