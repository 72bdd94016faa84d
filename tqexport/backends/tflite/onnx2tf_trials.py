"""How onnx2tf finds out which axis is which, mended.

Where it does not know in which order an operator has its axes, it tries one order after the other on a sample, and
takes the first whose result is within 0.001 of what onnxruntime gives. Some things keep that from working:

* The sample is ones, which look alike in any order. So it is given another.
* 0.001 may be large or small beside the values. So the error is compared with them here.
* A result may have any order of axes that gives its shape. Here it has ONNX's, or channels last.
* A product of a value with itself, or with a constant that was transposed, is not tried at all. Here it is.
* Where channels, rows and columns are one number it takes for granted that channels come last, and where a
  transposition moves the samples it goes by the sizes of axes. Here the values decide; and an operator that takes
  channels last is given them so.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from tqexport.backends.tflite.layout import to_channels_first, to_channels_last

__all__ = ["mend_trials", "samples_for_trials", "save_array"]

Array = npt.NDArray[Any]

_SMALL = 1e-3  # of the largest value; onnx2tf has the same number
_CHANNELS_LAST = {
    *("AveragePool", "Conv", "ConvTranspose", "DepthToSpace", "LRN", "LpPool", "MaxPool", "Resize", "SpaceToDepth"),
}
_MASKED = 1e30  # attention adds about -3e38 where a place is not to be seen


def mend_trials() -> None:
    """Put the mended functions in the place of onnx2tf's; before it loads the operators, which copy them."""
    from onnx2tf.utils import common_functions

    compare = common_functions.onnx_tf_tensor_validation
    inputs_of = common_functions.acquisition_of_validation_data
    decide = common_functions.inverted_operation_enable_disable

    def compared_with_values(*, output_pairs: dict[Any, Any], **tolerances: float) -> dict[Any, list[Any]]:
        errors = {pair: min(_errors(*values)) for pair, values in output_pairs.items()}
        others = {pair: values for pair, values in output_pairs.items() if np.isinf(errors[pair])}
        results: dict[Any, list[Any]] = compare(output_pairs=others, **tolerances)
        for pair, (expected, _) in others.items():
            results[pair][2] = results[pair][2] / _largest(expected)
        return results | {pair: [output_pairs[pair][0], False, errors[pair], ""] for pair in errors.keys() - others}

    def inputs_of_any_kind(*, input_tensor_1: Any, input_tensor_2: Any, **others: Any) -> tuple[Any, Any, Any]:
        first, second = map(_as_array, (input_tensor_1, input_tensor_2))
        infos, of_first, of_second = inputs_of(input_tensor_1=first, input_tensor_2=second, **others)
        if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
            return infos, first, second
        return infos, of_first, of_first if input_tensor_2 is input_tensor_1 else of_second

    def decided_by_values(make_node: Callable[..., Any]) -> Callable[..., Any]:
        decided = decide(make_node)

        @wraps(make_node)
        def made(*args: Any, **facts: Any) -> Any:
            with _channels_last_for(facts["graph_node"], facts["tf_layers_dict"]):
                result = decided(*args, **facts)
            for output in facts["graph_node"].outputs:
                _put_in_order(output.name, facts["graph_node"].op, facts)
            return result

        return made

    common_functions.inverted_operation_enable_disable = decided_by_values
    common_functions.onnx_tf_tensor_validation = compared_with_values
    common_functions.acquisition_of_validation_data = inputs_of_any_kind
    from onnx2tf.ops import TopK

    TopK.int = _Count


class _Count(int):
    """A whole number, also from an array of one number, which ``int`` does not take from today's numpy."""

    def __new__(cls, value: Any) -> _Count:
        return super().__new__(cls, np.asarray(value).item())


@contextmanager
def _channels_last_for(node: Any, values: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Give an operator that takes channels last its value so, where the value has ONNX's order and no shape says it."""
    import tensorflow as tf

    name = node.inputs[0].name if node.inputs else ""
    value = values.get(name, {})
    if node.op not in _CHANNELS_LAST or value.get("before_op_output_shape_trans", True):
        yield
        return
    given = value["tf_node"]
    if len(given.shape) >= 3 and len({*given.shape[1:]}) == 1:
        moved = tf.transpose(given, [0, *range(2, len(given.shape)), 1])
        values[name] = {**value, "tf_node": moved, "before_op_output_shape_trans": True}
    try:
        yield
    finally:
        values[name] = value


def _put_in_order(name: str, operator: str, facts: Mapping[str, Any]) -> None:
    """Say in which order a value has its axes, where its shape does not; that of a transposition is put right.

    Args:
        name: Of the value.
        operator: What gives it.
        facts: What onnx2tf gives to an operator.
    """
    import tensorflow as tf
    import tf_keras

    made = facts["tf_layers_dict"][name]
    expected = (facts["onnx_tensor_infos_for_validation"] or {}).get(name)
    if expected is None or expected.ndim < 3 or not tf_keras.backend.is_keras_tensor(made["tf_node"]):
        return
    sizes = [size for size in expected.shape if size > 1]
    if len({*expected.shape[1:]}) > 1 and (operator != "Transpose" or len({*sizes}) == len(sizes)):
        return
    computed = _computed(made["tf_node"], facts)
    same, moved = _errors(expected, computed)
    if operator == "Transpose" and min(same, moved) > _SMALL:
        orders = permutations(range(computed.ndim))
        order = next((each for each in orders if _errors(expected, computed.transpose(each))[0] < _SMALL), None)
        if order is not None:
            made.update(tf_node=tf.transpose(made["tf_node"], order), before_op_output_shape_trans=False)
    elif np.isfinite(same) and np.isfinite(moved):
        made["before_op_output_shape_trans"] = moved < same


def _computed(value: Any, facts: Mapping[str, Any]) -> Array:
    """What TensorFlow computes for a value from the sample."""
    import tf_keras
    from onnx2tf.utils import common_functions

    inputs = common_functions.get_tf_model_inputs(tf_layers_dict=facts["tf_layers_dict"])
    (computed,) = common_functions.dummy_tf_inference(
        model=tf_keras.Model(inputs=inputs, outputs=[value]),
        inputs=inputs,
        test_data_nhwc=facts["test_data_nhwc"],
        custom_input_op_name_np_data_path=facts["custom_input_op_name_np_data_path"],
    ).values()
    return np.asarray(computed)


def _errors(expected: Array, computed: Array) -> tuple[float, float]:
    """How far off a value is, as a share of the largest, in ONNX's order of axes and with channels last.

    Infinite where the shape is another.
    """

    def error(order: Array) -> float:
        if order.shape != expected.shape:
            return np.inf
        off = np.abs(order.astype(np.float64) - expected)
        return float(off.max(initial=0, where=~np.isnan(off))) / _largest(expected)

    return error(computed), error(to_channels_first(computed))


def _largest(value: Array) -> float:
    """The largest magnitude of a value, but for those that stand for minus infinity; 1 where it is 0."""
    return float(np.abs(value[np.abs(value) < _MASKED], dtype=np.float64).max(initial=0)) or 1.0


def _as_array(value: Any) -> Any:
    """A constant of TensorFlow as an array; a value of the network as it is."""
    return value.numpy() if hasattr(value, "numpy") else value


def samples_for_trials(source: Path) -> list[list[str]]:
    """Each input of a network, and the file that its sample is in, channels last, as onnx2tf wants it.

    An input that no operator reads has none.

    Args:
        source: The network's ONNX file; the samples are in an NPZ file of the same name beside it, channels first, in
            the order of the inputs.
    """
    graph = onnx.load(source).graph
    read = {name for node in graph.node for name in node.input}
    pairs: list[list[str]] = []
    with np.load(source.with_suffix(".npz"), allow_pickle=False) as samples:
        for value, sample in zip(graph.input, samples.values(), strict=True):
            if value.name in read:
                pairs.append([value.name, f"{source.stem}_{len(pairs)}.npy"])
                save_array(Path(pairs[-1][1]), to_channels_last(sample))
    return pairs


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array as NPY; of a full disk the error says so, which that of ``np.save`` does not."""
    stream = io.BytesIO()
    np.save(stream, array)
    path.write_bytes(stream.getvalue())
