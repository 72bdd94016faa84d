"""Grids from samples: what turns a trained network into one that can run in integers alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tqexport.errors import InputError, UsageError
from tqexport.integer.biases import round_biases
from tqexport.integer.capture import capture_calls
from tqexport.integer.estimators import ESTIMATORS, RangeEstimator, grid_of_values
from tqexport.integer.grids import Grid, attach_grids, detach_grids, grid_of_range
from tqexport.integer.naming import INPUT, NamedCalls
from tqexport.integer.plan import Plan, plan_of
from tqexport.integer.weights import round_float_layers
from tqexport.model import TruncModel

__all__ = ["FEWEST_SAMPLES", "calibrate"]

FEWEST_SAMPLES = 16
_BATCH = 64
_MOST_VALUES = 1 << 21  # of each value, evenly chosen


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch compute on one thread: on several it adds in another order, and grids have other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def calibrate(
    model: TruncModel,
    inputs: npt.NDArray[np.float32],
    estimator: RangeEstimator = "min-max",
    *,
    symmetric: bool = False,
) -> TruncModel:
    """Give a network the grids that integers need, at every width it has.

    The float layers' weights are rounded to int8 per output channel, once for all widths. Every value that no
    activation quantiser rounds gets a grid of 256 levels per width, from what it is on the samples. Biases of
    BatchNorms are moved to whole multiples of what an integer sum counts in, see :mod:`tqexport.integer.biases`.

    Args:
        model: The trained network; it is not changed. Grids that it has already are found again.
        inputs: float32 (N, *input_shape), normalised as the network wants them; as many as show what values occur.
        estimator: ``min-max``, ``percentile`` or ``mse``, see :func:`tqexport.integer.estimators.grid_of_values`.
        symmetric: Put zero on the middle level of every grid, for devices whose int8 has no zero point; values that are
            never negative lose one bit so.

    Returns:
        A network that rounds to its grids when it runs, in evaluation mode. Save it with ``save_checkpoint``.

    Raises:
        UsageError: There is no such estimator.
        InputError: The samples are too few, of another shape, NaN, or constant in a channel; or a value of the network
            is NaN or the same number on all of them.
        ConversionError: An operation has no integer form.
    """
    if estimator not in ESTIMATORS:
        raise UsageError(f"there is no estimator {estimator!r}; choose {', '.join(ESTIMATORS)}")
    _check_samples(inputs, model.info.input_shape)
    module = copy.deepcopy(model.module).eval()
    detach_grids(module)
    round_float_layers(module)
    plain = TruncModel(module, model.info)
    plans: dict[int, Plan] = {}
    grids: dict[int, Mapping[str, Grid]] = {}
    for bits in model.info.widths:
        with plain.at_width(bits) as network:
            plans[bits] = plan_of(capture_calls(network, model.info.input_shape))
            grids[bits] = _grids_at(network, plans[bits], inputs, estimator, symmetric)
    # Widths with float activations may need grids where others have an activation quantiser.
    names = tuple(dict.fromkeys(name for plan in plans.values() for name in plan.grids))
    if len({plan.grids for plan in plans.values()}) > 1:
        raise InputError("the network has quantised activations at some widths and floats at others; keep one kind")
    table = attach_grids(module, names, model.info.widths)
    for bits in model.info.widths:
        table.set(bits, grids[bits])
    calibrated = TruncModel(module, replace(model.info, grids=names))
    for bits in model.info.widths:
        round_biases(calibrated, bits)
    return calibrated


def _check_samples(inputs: Any, input_shape: tuple[int, ...]) -> None:
    """Refuse samples that no grid should be found from."""
    if not isinstance(inputs, np.ndarray) or inputs.dtype != np.float32 or inputs.shape[1:] != input_shape:
        shape = getattr(inputs, "shape", ())
        raise InputError(f"the samples are {tuple(shape)}, the network takes float32 (N, {str(input_shape)[1:]}")
    if len(inputs) < FEWEST_SAMPLES:
        raise InputError(f"{len(inputs)} samples are too few to calibrate on; give at least {FEWEST_SAMPLES}")
    if not np.isfinite(inputs).all():
        raise InputError("the samples hold NaN or infinite numbers; leave those out")
    if inputs.ndim > 2:
        lowest, highest = (f(inputs, axis=(0, *range(2, inputs.ndim))) for f in (np.min, np.max))
        if constant := np.flatnonzero(lowest == highest).tolist():
            raise InputError(f"channel {constant[0]} of the samples is the same number everywhere; give real samples")


def _grids_at(
    network: nn.Module, plan: Plan, inputs: npt.NDArray[np.float32], estimator: RangeEstimator, symmetric: bool
) -> dict[str, Grid]:
    """The grids of a network at its current width."""
    seen: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in plan.grids if name not in plan.fixed}
    batches = -(-len(inputs) // _BATCH)

    def look(name: str, value: Tensor) -> None:
        if name in seen:
            flat = value.detach().numpy().ravel()
            seen[name].append(flat[:: max(1, flat.size * batches // _MOST_VALUES)].copy())

    with torch.no_grad():
        for start in range(0, len(inputs), _BATCH):
            batch = torch.from_numpy(np.ascontiguousarray(inputs[start : start + _BATCH]))
            look(INPUT, batch)
            with _Observer(network, look):
                network(batch)
    grids = {
        name: grid_of_values(name, np.concatenate(parts), estimator, symmetric=symmetric)
        for name, parts in seen.items()
    }
    return grids | {name: grid_of_range(0.0, 1.0, symmetric=symmetric) for name in plan.fixed}


class _Observer(NamedCalls):
    """Shows every named value of a running network to a function."""

    def __init__(self, root: nn.Module, look: Callable[[str, Tensor], None]) -> None:
        super().__init__(root)
        self._look = look

    def on_module(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002
        if isinstance(output, Tensor):
            self._look(name, output)
        return output

    def on_function(self, name: str, function: Any, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ARG002
        self._look(name, output)
        return output
