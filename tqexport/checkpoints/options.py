"""What the reader of a checkpoint says because the file does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args

from tqexport.errors import UsageError
from tqexport.reading import records
from tqexport.truncation import FLOAT_BITS, WIDTHS, Quantizer

__all__ = ["BatchNormKey", "ReadOptions"]

BatchNormKey = Literal["weight", "activation"]


@dataclass(frozen=True)
class ReadOptions:
    """How to read a checkpoint; None everywhere means as the file says, or as the research family does.

    Attributes:
        model: ``package.module:factory`` to build the network with.
        arch: Name of the architecture.
        quantizer: ``truncquant`` (default) or ``dorefa``.
        bias_correction: Whether the weights were moved and stretched; see :class:`tqexport.truncation.Scheme`.
        act_bits: Activation widths: one for every width, or a single one for all. Default: as wide as the weights.
        bn_key: Whether the BatchNorm of the weight width (default) or of the activation width is live.
        input_shape: Shape of one sample, channels first.
    """

    model: str | None = None
    arch: str | None = None
    quantizer: Quantizer | None = None
    bias_correction: bool | None = None
    act_bits: tuple[int, ...] | None = None
    bn_key: BatchNormKey | None = None
    input_shape: tuple[int, ...] | None = None

    def given(self) -> dict[str, Any]:
        """The options that say something, as plain values that JSON can hold."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if value is not None
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ReadOptions:
        """The options that :meth:`given` wrote down.

        Raises:
            UsageError: There is one that this version does not know.
            InputError: One is of another type.
        """
        if unknown := sorted(set(record) - set(cls.__dataclass_fields__)):
            raise UsageError(f"the options {unknown} are not known to this tqexport; update it")
        readers: dict[str, Callable[[Any, str], Any]] = {
            "bias_correction": records.flag,
            "act_bits": partial(records.wholes, allowed={*WIDTHS, FLOAT_BITS}),
            "input_shape": records.shape,
            "quantizer": partial(records.one_of, allowed=get_args(Quantizer)),
            "bn_key": partial(records.one_of, allowed=get_args(BatchNormKey)),
        }
        values: dict[str, Any] = {
            key: readers[key](value, key) if key in readers else records.text(value, key)
            for key, value in record.items()
            if value is not None
        }
        return cls(**values)
