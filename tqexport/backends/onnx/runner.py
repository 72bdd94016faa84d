"""Running ONNX files for verification: with their inner values, and from one activation quantiser to the next."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx

from tqexport.backends.grouping import in_groups, put_together
from tqexport.backends.onnx.file import activation_outputs, is_right_shift, of_samples, steps_in_front
from tqexport.backends.onnx.session import OnnxSession
from tqexport.backends.onnx.web_session import WEB_RUNTIME, WebSession
from tqexport.backends.running import Runner
from tqexport.layer_kinds import ONNX_OPERATORS

if TYPE_CHECKING:
    from tqexport.backends.running import Array, Batch

__all__ = ["OnnxRunner", "OnnxStretches", "WebRunner"]

_BATCH = 64
# Operators whose results are kept: those of the layers, what else adds, normalises or clips, and where attention ends.
_KEPT_OPERATORS = ONNX_OPERATORS | {"Add", "BatchNormalization", "Relu", "Transpose"}


class OnnxRunner(Runner):
    """An ONNX file in onnxruntime, and a copy of it whose codes, activations and layer outputs are outputs."""

    runtime = "onnxruntime"
    _open: ClassVar[Callable[..., OnnxSession | WebSession]] = OnnxSession

    def __init__(self, content: bytes, bits: int | None = None, *, deployed: bool = True) -> None:
        """Open a file; see :meth:`tqexport.backends.base.Backend.open_runner`."""
        model = onnx.load_from_string(content)
        shifts = [node for node in model.graph.node if is_right_shift(node)]
        self._weights = [node.input[0].removesuffix(".codes") for node in shifts]
        activations = activation_outputs(model)
        values = [] if deployed else [name for name in _layer_outputs(model) if name not in self._weights]
        super().__init__([value.name for value in model.graph.output], activations, values, deployed=deployed)
        self._of_samples = of_samples(model, sizes=True)
        self._steps = steps_in_front(model)
        self._untouched = self._open(content, bits=bits, optimized=deployed)
        kept = (*(node.output[0] for node in shifts), *activations, *values)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in kept)
        self._traced = self._open(model.SerializeToString(), bits=bits, optimized=deployed)

    def run_traced(self, batch: Batch) -> tuple[dict[str, list[Array]], list[Array]]:
        self._traced.check(batch)
        size = self._traced.batch
        groups = [*in_groups(batch, size)] if size else [(part, len(part[0])) for part in _parts(batch)]
        traced = [self._traced.run_group(*group) for group, _ in groups]
        codes: dict[str, list[Array]] = {}
        ends = len(self._outputs)
        for weight, value in zip(self._weights, traced[0][ends:], strict=False):
            codes.setdefault(weight, []).append(value)
        names = (*self._outputs, *self._activations, *self._values)
        of_parts = zip(*(values[:ends] + values[ends + len(self._weights) :] for values in traced), strict=True)
        counts = [count for _, count in groups]
        return codes, [self._joined(name, parts, counts) for name, parts in zip(names, of_parts, strict=True)]

    def _joined(self, name: str, parts: Sequence[Array], counts: Sequence[int]) -> Array:
        """A value of all samples from those of groups, each of which has so many of them."""
        if name not in self._of_samples:
            return parts[0]
        return put_together(parts, counts, self._traced.batch, self._steps.get(name, 1))

    @property
    def batch(self) -> int | None:
        return self._untouched.batch

    def run_untouched(self, batch: Batch) -> list[Array]:
        of_parts = zip(*map(self._untouched.run, _parts(batch)), strict=True)
        return [np.concatenate(values) for values in of_parts]


class WebRunner(OnnxRunner):
    """The same in onnxruntime-web."""

    runtime = WEB_RUNTIME
    _open = WebSession

    def _seconds(self, batch: Batch) -> float:
        assert isinstance(self._untouched, WebSession)
        return self._untouched.latency(batch)


class OnnxStretches:
    """An ONNX file cut at its roundings: their results are inputs, and what they would have rounded is output."""

    def __init__(self, content: bytes, bits: int | None, activations: Collection[str]) -> None:
        """Open a file; see :meth:`tqexport.backends.base.Backend.open_stretches`."""
        model = onnx.load_from_string(content)
        names = ({*activations} & of_samples(model, sizes=True)) - steps_in_front(model).keys()
        cut = [node for node in model.graph.node if node.op_type == "Round" and node.output[0] in names]
        for node in cut:
            model.graph.node.remove(node)
            model.graph.input.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None))
            model.graph.output.append(onnx.ValueInfoProto(name=node.input[0]))
        self._names = [node.output[0] for node in cut]
        self._session = OnnxSession(model.SerializeToString(), bits=bits)

    def __call__(self, batch: Batch, levels: Mapping[str, Array]) -> tuple[list[Array], dict[str, Array]]:
        values = self._session.run((*batch, *(levels[name] for name in self._names)))
        ends = len(values) - len(self._names)
        return values[:ends], dict(zip(self._names, values[ends:], strict=True))


def _parts(batch: Batch) -> list[Batch]:
    """As many samples at once as a runtime should get."""
    return [tuple(values[i : i + _BATCH] for values in batch) for i in range(0, len(batch[0]), _BATCH)]


def _layer_outputs(model: onnx.ModelProto) -> list[str]:
    """The last value of each module that computes with samples: names without an operator behind a slash."""
    ends = {value.name for value in model.graph.output}
    computed = of_samples(model, sizes=False)
    return [
        node.output[0]
        for node in model.graph.node
        if node.op_type in _KEPT_OPERATORS and "/" not in node.output[0] and node.output[0] in computed - ends
    ]
