"""How onnx2tf finds out which axis is which, mended.

Where it does not know in which order an operator has its axes, it tries one order after the other on a sample, and
takes the first whose result is within 0.001 of what onnxruntime gives. Three things keep that from working:

* The sample is ones, which look alike in any order. So it is given another.
* 0.001 may be large or small beside the values. So the error is compared with them here.
* A product of a value with itself, or with a constant that was transposed, is not tried at all. Here it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tqexport.backends.tflite.layout import to_channels_last

__all__ = ["mend_trials", "samples_for_trials"]

_MASKED = 1e30  # attention adds about -3e38 where a place is not to be seen


def mend_trials() -> None:
    """Put the mended functions in the place of onnx2tf's; before it loads the operators, which copy them."""
    from onnx2tf.utils import common_functions

    compare = common_functions.onnx_tf_tensor_validation
    inputs_of = common_functions.acquisition_of_validation_data

    def compared_with_values(*, output_pairs: dict[Any, Any], **tolerances: float) -> dict[Any, list[Any]]:
        results: dict[Any, list[Any]] = compare(output_pairs=output_pairs, **tolerances)
        for pair, (expected, _) in output_pairs.items():
            largest = np.abs(expected[np.abs(expected) < _MASKED], dtype=np.float64).max(initial=0)
            results[pair][2] = results[pair][2] / (largest or 1)
        return results

    def inputs_of_any_kind(*, input_tensor_1: Any, input_tensor_2: Any, **others: Any) -> tuple[Any, Any, Any]:
        first, second = map(_as_array, (input_tensor_1, input_tensor_2))
        infos, of_first, of_second = inputs_of(input_tensor_1=first, input_tensor_2=second, **others)
        return infos, of_first, of_first if input_tensor_2 is input_tensor_1 else of_second

    common_functions.onnx_tf_tensor_validation = compared_with_values
    common_functions.acquisition_of_validation_data = inputs_of_any_kind


def _as_array(value: Any) -> Any:
    """A constant of TensorFlow as an array; a value of the network as it is."""
    return value.numpy() if hasattr(value, "numpy") else value


def samples_for_trials(source: Path) -> list[list[str]]:
    """Each input of a network, and the file that its sample is in, channels last, as onnx2tf wants it.

    An input that no operator reads has none.

    Args:
        source: The network's ONNX file; the samples are in an NPZ file of the same name beside it, channels first.
    """
    graph = onnx.load(source).graph
    read = {name for node in graph.node for name in node.input}
    pairs: list[list[str]] = []
    with np.load(source.with_suffix(".npz"), allow_pickle=False) as samples:
        for name in (value.name for value in graph.input if value.name in read):
            path = f"{source.stem}_{len(pairs)}.npy"
            np.save(path, to_channels_last(samples[name]))
            pairs.append([name, path])
    return pairs
