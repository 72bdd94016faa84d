"""Putting the codes back into a float TFLite file.

The float filter of every quantised layer is replaced by the integers of ``integers.py``: int8 in front of a DEQUANTIZE
that carries scale and gain, which XNNPACK unpacks once when it loads the file. Where there is a constant k, the rest of
``conv(x, scale * (q + k))`` is added by one of four forms (``half_step.py``), each exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tqexport.backends.coded_weight import CodedWeight
from tqexport.backends.tflite import DYNAMIC
from tqexport.backends.tflite.filter_storage import store, store_dequantized
from tqexport.backends.tflite.flatbuffer import FlatModel, Operator
from tqexport.backends.tflite.half_step import (
    add_second_filter,
    add_to_result,
    can_scale_results,
    scale_result,
    widen_input,
)
from tqexport.backends.tflite.integers import integer_filter
from tqexport.backends.tflite.provenance import FilterOrigin
from tqexport.errors import ConversionError
from tqexport.layer_kinds import FILTER_OPERATORS

__all__ = ["encode_filter", "put_codes_back"]


def put_codes_back(
    flat: FlatModel, weights: Sequence[CodedWeight], origins: Sequence[FilterOrigin], kernel: str
) -> None:
    """Replace the float filter of every quantised layer by its stored integers.

    Args:
        flat: The file as the converter wrote it; changed in place.
        weights: The quantised weights of the network.
        origins: Where its filters come from; those of float layers are left as they are.
        kernel: ``exact``: the integers are de-quantised, once, for the float kernels. ``dynamic``: the kernels multiply
            with the integers themselves and round their input to 8 bits as they run; operators that have no such
            kernel (depthwise and grouped convolutions among them) stay exact.

    Raises:
        ConversionError: A weight is not found in the file; the layer is named.
    """
    by_name = {weight.name: weight for weight in weights}
    coded = [origin for origin in origins if origin.weight in by_name]
    if missing := set(by_name) - {origin.weight for origin in coded}:
        first = next(weight for weight in weights if weight.name in missing)
        raise ConversionError(
            f"after conversion the weights of layer {first.layer} are not recognisable in the TFLite file "
            f"({len(missing)} of {len(weights)} layers); keep the layer in float or report its operators"
        )
    for origin in coded:
        encode_filter(flat, origin, by_name[origin.weight], kernel)


def encode_filter(flat: FlatModel, origin: FilterOrigin, weight: CodedWeight, kernel: str) -> None:
    """Put integers in the place of one float filter.

    Args:
        flat: The file; changed in place.
        origin: The filter.
        weight: The quantised weight that it is.
        kernel: See :func:`put_codes_back`.
    """
    layout = FILTER_OPERATORS[origin.operator]
    shape = flat.shape(origin.filter)
    form = integer_filter(weight, layout, shape, origin.total_gain(shape[layout.channel_axis]))
    readers = flat.consumers(origin.filter)
    # Whether every reader's output channels run over all of its input channels; those of groups do not.
    whole = all(_channels(flat, reader) == form.integers.shape[1] for reader in readers)
    multiplied_as_integers = kernel == DYNAMIC and layout.dynamic and whole
    stored, scales = form.integers, form.scales
    if form.constants.any() and layout.looks_up:
        for reader in readers:
            add_to_result(flat, reader, form, weight.name)
    elif form.constants.any():
        if not whole and (form.constants == 0.5).all() and can_scale_results(flat, readers, scales):
            odd = (2 * stored.astype(np.int16) + 1).astype(np.float16)
            store_dequantized(flat, origin.filter, layout, weight.name, odd, None)
            for reader in readers:
                scale_result(flat, reader, scales * np.float32(0.5), weight.name)
            return
        if whole and not multiplied_as_integers:
            stored = widen_input(flat, readers, form)
        else:
            add_second_filter(flat, readers, form, origin.operator, weight.name, by_sum=multiplied_as_integers)
    if multiplied_as_integers:
        store(flat, origin.filter, layout, weight.name, stored, scales)
    else:
        store_dequantized(flat, origin.filter, layout, weight.name, stored, scales)


def _channels(flat: FlatModel, reader: Operator) -> int:
    """Input channels of an operator; 0 where its filter never runs over all of them."""
    layout = FILTER_OPERATORS[flat.operator_name(reader)]
    return flat.shape(reader.inputs[layout.data])[-1] if layout.over_all_channels else 0
