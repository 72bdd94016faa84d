"""How onnx2tf finds out which axis is which, mended.

Where it does not know in which order an operator has its axes, it tries one order after the other on a sample, and
takes the first whose result is within 0.001 of what onnxruntime gives. Five things keep that from working:

* The sample is ones, which look alike in any order. So it is given another.
* 0.001 may be large or small beside the values. So the error is compared with them here.
* A product of a value with itself, or with a constant that was transposed, is not tried at all. Here it is.
* A result may have any order of axes that gives its shape. Here it has ONNX's, or channels last.
* Where channels, rows and columns are one number it takes for granted that channels come last. Here it tries, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from tqexport.backends.tflite.layout import to_channels_first, to_channels_last

__all__ = ["mend_trials", "samples_for_trials"]

Array = npt.NDArray[Any]

_MASKED = 1e30  # attention adds about -3e38 where a place is not to be seen


def mend_trials() -> None:
    """Put the mended functions in the place of onnx2tf's; before it loads the operators, which copy them."""
    from onnx2tf.utils import common_functions

    compare = common_functions.onnx_tf_tensor_validation
    inputs_of = common_functions.acquisition_of_validation_data

    def compared_with_values(*, output_pairs: dict[Any, Any], **tolerances: float) -> dict[Any, list[Any]]:
        results: dict[Any, list[Any]] = compare(output_pairs=output_pairs, **tolerances)
        for pair, (expected, computed) in output_pairs.items():
            errors = [error for error in _errors(expected, computed) if error is not None]
            largest = np.abs(expected[np.abs(expected) < _MASKED], dtype=np.float64).max(initial=0)
            results[pair][2] = min(errors, default=results[pair][2]) / (largest or 1)
        return results

    def inputs_of_any_kind(*, input_tensor_1: Any, input_tensor_2: Any, **others: Any) -> tuple[Any, Any, Any]:
        first, second = map(_as_array, (input_tensor_1, input_tensor_2))
        infos, of_first, of_second = inputs_of(input_tensor_1=first, input_tensor_2=second, **others)
        return infos, of_first, of_first if input_tensor_2 is input_tensor_1 else of_second

    decide = common_functions.inverted_operation_enable_disable

    def decided_by_values(make_node: Callable[..., Any]) -> Callable[..., Any]:
        decided = decide(make_node)

        @wraps(make_node)
        def made(*args: Any, **facts: Any) -> Any:
            result = decided(*args, **facts)
            for output in facts["graph_node"].outputs:
                made_value = facts["tf_layers_dict"][output.name]
                if (last := _channels_are_last(output.name, made_value["tf_node"], facts)) is not None:
                    made_value["before_op_output_shape_trans"] = last
            return result

        return made

    common_functions.inverted_operation_enable_disable = decided_by_values
    common_functions.onnx_tf_tensor_validation = compared_with_values
    common_functions.acquisition_of_validation_data = inputs_of_any_kind


def _channels_are_last(name: str, value: Any, facts: Mapping[str, Any]) -> bool | None:
    """Whether a value has its channels last, where its shape does not say it; None where it does, or for a constant."""
    import tf_keras
    from onnx2tf.utils import common_functions

    expected = (facts["onnx_tensor_infos_for_validation"] or {}).get(name)
    sizes = value.shape[1:]
    if expected is None or len(sizes) < 2 or len({*sizes}) > 1 or not tf_keras.backend.is_keras_tensor(value):
        return None
    inputs = common_functions.get_tf_model_inputs(tf_layers_dict=facts["tf_layers_dict"])
    (computed,) = common_functions.dummy_tf_inference(
        model=tf_keras.Model(inputs=inputs, outputs=[value]),
        inputs=inputs,
        test_data_nhwc=facts["test_data_nhwc"],
        custom_input_op_name_np_data_path=facts["custom_input_op_name_np_data_path"],
    ).values()
    same, moved = _errors(expected, computed)
    return None if same is None or moved is None else moved < same


def _errors(expected: Array, computed: Array) -> tuple[float | None, float | None]:
    """Largest errors of a value in ONNX's order of axes, and with channels last; None where the shape is another."""

    def error(order: Array) -> float | None:
        if order.shape != expected.shape:
            return None
        return float(np.abs(order.astype(np.float64) - expected).max(initial=0))

    return error(computed), error(to_channels_first(computed))


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
