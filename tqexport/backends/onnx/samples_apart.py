"""Has every sample of a batch its own place in what a network computes?

Whoever runs a file of a fixed number of samples fills a batch up with any, and takes those of his own from the front of
the outputs. Files are run on samples in one order and in another, with so many activation levels that rounding does not
matter.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tqexport.backends.base import TensorInfo
from tqexport.backends.onnx.file import LEVELS_SUFFIX, describe, read_facts
from tqexport.backends.onnx.session import OnnxSession
from tqexport.errors import ConversionError
from tqexport.facts import ArtifactFacts

if TYPE_CHECKING:
    from tqexport.backends.running import Batch

__all__ = [
    "ends_and_batches",
    "input_limits",
    "refuse_dependent_samples",
    "rounded_values",
    "run_on",
    "samples_not_apart",
    "samples_of",
    "steps_found",
    "with_fine_levels",
]

_APART = 1e-2  # of a value's largest element; a sample in another's place is off by a tenth and more
_FINE = np.float32(2**20)

Array = npt.NDArray[Any]


def refuse_dependent_samples(model: onnx.ModelProto) -> None:
    """Refuse a network that no file can compute for its batch.

    Args:
        model: The network as a fixed file for its batch, all but continuous: see :func:`with_fine_levels`.

    Raises:
        ConversionError: Samples depend on each other, or are not in front in an output.
    """
    _, outputs, batches = ends_and_batches(model)
    if len(batches) == 1:
        return
    runs, samples = run_on(model, (), batches), len(batches[0][0])
    for name in outputs:
        if steps_found(name, [run[name] for run in runs], samples) > 1:
            raise ConversionError(
                f"{name} has something else than its samples in front, as the steps of a sequence, so that no file can "
                "take a fixed number of them at once; transpose it in the network, or leave --batch out"
            )


def with_fine_levels(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network with 2^20 levels in each activation quantiser, so that it is all but continuous."""
    changed = copy.deepcopy(model)
    for tensor in changed.graph.initializer:
        if tensor.name.endswith(LEVELS_SUFFIX):
            tensor.CopyFrom(numpy_helper.from_array(np.full(tuple(tensor.dims), _FINE), tensor.name))
    return changed


def samples_of(model: onnx.ModelProto, limits: Sequence[int], sizes: Mapping[str, int] | None = None) -> Batch:
    """A batch of samples, always the same: normally distributed, or whole numbers below a limit that is not 0.

    Args:
        model: A file of a fixed batch.
        limits: See :func:`input_limits`.
        sizes: Numbers for other sizes that are free.
    """
    generator = np.random.default_rng(0)

    def sample(tensor: TensorInfo, limit: int) -> Array:
        shape = tuple(size if isinstance(size, int) else (sizes or {})[size] for size in tensor.shape)
        if limit:
            return generator.integers(0, limit, shape).astype(tensor.dtype)
        return generator.standard_normal(shape, np.float32)

    return tuple(map(sample, describe(model)[0], limits))


def input_limits(model: onnx.ModelProto) -> tuple[int, ...]:
    """For each input of a fixed file the number that its integers are below; 0 where it takes other numbers."""
    inputs, _ = describe(model)
    facts = read_facts(model)
    return (facts.input_limits if isinstance(facts, ArtifactFacts) else ()) or (0,) * len(inputs)


def ends_and_batches(model: onnx.ModelProto) -> tuple[list[str], list[str], list[Batch]]:
    """Names of rounded values and of outputs; and samples, where they are several backwards as well.

    Backwards, the last stands for the first, too: the sum of all samples would not depend on their order.
    """
    outputs = [output.name for output in model.graph.output]
    facts = read_facts(model)
    sizes = facts.dynamic_sizes if isinstance(facts, ArtifactFacts) else None
    batches = [samples_of(model, input_limits(model), sizes)]
    if (count := len(batches[0][0])) > 1:
        order = [*range(count - 1, 0, -1), count - 1]
        batches.append(tuple(values[order] for values in batches[0]))
    return rounded_values(model), outputs, batches


def rounded_values(model: onnx.ModelProto) -> list[str]:
    """Names of the levels of activations, in the order in which they are computed."""
    return [node.output[0] for node in model.graph.node if node.op_type == "Round"]


def run_on(model: onnx.ModelProto, names: Sequence[str], batches: Sequence[Batch]) -> list[dict[str, Array]]:
    """The outputs and the named values of each batch, by onnxruntime."""
    traced = copy.deepcopy(model)
    outputs = [output.name for output in model.graph.output]
    traced.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    session = OnnxSession(traced.SerializeToString(), optimized=False)  # slower to run, quicker to load
    return [dict(zip((*outputs, *names), session.run(batch), strict=True)) for batch in batches]


def steps_found(name: str, values: Sequence[Array], samples: int) -> int:
    """How often all samples of a batch come one behind the other in a value; 1 where they are in front.

    Args:
        name: Of the value.
        values: It; and the same of the samples backwards, without the first and with the last once more in its place.
        samples: Size of the batch.

    Raises:
        ConversionError: Samples depend on each other.
    """
    if samples == 1:
        return 1
    value, of_backwards = values
    if np.array_equal(value, of_backwards):
        return 1  # of no sample
    largest = max(float(np.abs(value).max()), 1e-30)
    shape = value.shape

    def error(steps: int) -> float:
        given, moved = (each.reshape(steps, samples, -1).astype(np.float64) for each in (value, of_backwards))
        return float(np.abs(given[:, 1:] - moved[:, -2::-1]).max()) / largest

    fitting = [axis for axis, length in enumerate(shape) if length % samples == 0]
    places = [prod(shape[:axis]) * part for axis in fitting for part in (1, shape[axis] // samples)]
    steps = min(places, key=error, default=0)
    if not steps or not error(steps) <= _APART:
        raise samples_not_apart(name)
    return steps


def samples_not_apart(name: str) -> ConversionError:
    """What is said of a value in which samples depend on each other."""
    return ConversionError(
        f"{name} does not have every sample by itself, one behind the other, so that no file can take a fixed number "
        "of them at once; leave --batch out"
    )
