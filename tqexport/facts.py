"""What an artifact says of itself, and how that is written down: the same for every format.

A fixed file has the facts of its width. A file with several widths has those of every fixed file that can be cut from
it, and their hashes, so that what is cut can be proved. Formats keep the record as they can: ONNX as one metadata entry
per fact, TFLite as one JSON document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from tqexport.errors import InputError, UsageError
from tqexport.model import Normalization
from tqexport.reading import records
from tqexport.truncation import FLOAT_BITS, WIDTHS, Quantizer, Scheme, check_shiftable

if TYPE_CHECKING:
    from tqexport.model import TruncModel

__all__ = [
    "DAMAGED",
    "TEXT_FACTS",
    "ArtifactFacts",
    "Facts",
    "MultiWidthFacts",
    "check_mergeable",
    "decode",
    "encode",
    "facts_of_model",
    "normalization_of",
    "scheme_of",
]

DAMAGED = "was changed or damaged since its export; export it again"
"""What is said of a file that is not as it was exported."""
TEXT_FACTS = frozenset({"architecture", "checkpoint_sha256", "quantizer", "layout"})
"""The facts that ONNX files hold as plain text and not as JSON."""
_NOT_OURS = "was not written by tqexport, or lost its metadata since: it does not say its width"

# Keys of files with several widths, besides those of a fixed file and those of the format's own tables.
_WIDTHS = "widths"  # run-time files: the widths that they can run at, ascending
_TRUNCATABLE_TO = "truncatable_to"  # truncatable files: the widths that can be cut from it, ascending
_BY_WIDTH = "by_width"  # the facts that differ, each a list in the order of the widths; None where a width lacks it
_DIGESTS = "fixed_sha256"  # hashes of the fixed files, in the order of the widths


@dataclass(frozen=True)
class ArtifactFacts:
    """What a fixed file says of itself.

    Attributes:
        width: Bits of its weights.
        activation_width: Bits of its activations, 32 where they are float.
        batch_norm_width: The width whose BatchNorms it has.
        scheme: How its weights were quantised.
        architecture: Of the checkpoint; a registered name or ``package.module:factory``.
        checkpoint_sha256: Hash of the checkpoint, hex.
        layout: ``channels first`` or ``channels last``, of inputs and outputs.
        class_names: Names of the outputs, if known.
        normalization: How raw input becomes network input, if known.
        kernel: How it multiplies; None in a format that has one way alone.
        channels_first: Names of the values that are channels first although the layout is not.
        steps_in_front: By name, of values of a file that takes several samples at once, how often all samples come one
            behind the other where that is more than once: for every step of a sequence.
        input_limits: By input, what its whole numbers are below; 0 for floats. Empty where all inputs are floats.
        dynamic_sizes: By name, the size in the checkpoint of each axis whose size is free in the file.
    """

    width: int
    activation_width: int
    batch_norm_width: int
    scheme: Scheme
    architecture: str
    checkpoint_sha256: str
    layout: str
    class_names: tuple[str, ...] = ()
    normalization: Normalization | None = None
    kernel: str | None = None
    channels_first: tuple[str, ...] = ()
    steps_in_front: Mapping[str, int] = field(default_factory=dict)
    input_limits: tuple[int, ...] = ()
    dynamic_sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class MultiWidthFacts:
    """What a file with several widths says of itself.

    Attributes:
        by_width: What the fixed file of each width says, ascending.
        digests: By width: sha256 of its fixed file, hex; empty where none can be cut from the file.
        own: The width that a truncatable file computes with; None for a run-time file, which computes with any.
        tables: What the format needs to cut a width, by key; its own affair.
    """

    by_width: Mapping[int, ArtifactFacts]
    digests: Mapping[int, str]
    own: int | None = None
    tables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths, ascending."""
        return tuple(self.by_width)


Facts = ArtifactFacts | MultiWidthFacts
"""What a file of either make says of itself."""


def facts_of_model(
    model: TruncModel, bits: int, layout: str, kernel: str | None = None, sizes: Mapping[str, int] | None = None
) -> ArtifactFacts:
    """What the fixed file of a network at a width says of itself; see :class:`ArtifactFacts`."""
    info = model.info
    return ArtifactFacts(
        width=bits,
        activation_width=info.activation_width(bits),
        batch_norm_width=info.batch_norm_width(bits),
        scheme=info.scheme,
        architecture=info.architecture,
        checkpoint_sha256=model.sha256,
        layout=layout,
        class_names=info.class_names,
        normalization=info.normalization,
        kernel=kernel,
        input_limits=tuple(each.limit for each in info.signature) if any(each.limit for each in info.signature) else (),
        dynamic_sizes=sizes or {},
    )


def check_mergeable(fixed: Iterable[ArtifactFacts]) -> None:
    """Refuse fixed files that no one file can hold; see :func:`tqexport.truncation.check_shiftable`."""
    quantizers = {facts.width: facts.scheme.quantizer for facts in fixed}
    check_shiftable(tuple(quantizers), next(iter(quantizers.values()), "truncquant"))


def encode(facts: Facts) -> dict[str, Any]:
    """Facts as plain values by key, which JSON can hold; a format's tables as they are."""
    if isinstance(facts, ArtifactFacts):
        return _record(facts)
    shared, differing = _shared_and_differing([_record(fixed) for fixed in facts.by_width.values()])
    if facts.own is None:
        described = {**shared, _WIDTHS: list(facts.widths)}
    else:
        described = {**_record(facts.by_width[facts.own]), _TRUNCATABLE_TO: list(facts.widths)}
    return {**described, _BY_WIDTH: differing, _DIGESTS: list(facts.digests.values()), **facts.tables}


def decode(record: Mapping[str, Any]) -> Facts:
    """The inverse of :func:`encode`: facts from the record that a file holds.

    Raises:
        InputError: It is not of tqexport, or was damaged.
    """
    several = next((key for key in (_WIDTHS, _TRUNCATABLE_TO) if key in record), None)
    if several is None:
        if not _is_width(record.get("width")):
            raise InputError(_NOT_OURS)
        return _facts(record)
    try:
        widths = [int(bits) for bits in record[several] if _is_width(bits)]
        differing, digests = record[_BY_WIDTH], list(map(str, record[_DIGESTS]))
        if not widths or widths != record[several] or len(digests) not in (0, len(widths)):
            raise InputError(DAMAGED)
        by_width = {
            bits: _facts({**record, **{key: values[row] for key, values in differing.items()}})
            for row, bits in enumerate(widths)
        }
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(DAMAGED) from error
    known = _KEYS | {several, _BY_WIDTH, _DIGESTS}
    tables = {key: value for key, value in record.items() if key not in known}
    own = None if several == _WIDTHS else _facts(record).width
    return MultiWidthFacts(by_width, dict(zip(widths, digests, strict=bool(digests))), own, tables)


def _record(facts: ArtifactFacts) -> dict[str, Any]:
    """The record of a fixed file; what is empty by default is left out."""
    record = asdict(facts)
    record.update(record.pop("scheme"))
    return {key: value for key, value in record.items() if value or key not in _OPTIONAL}


def _facts(record: Mapping[str, Any]) -> ArtifactFacts:
    """What a fixed file says; None stands for a fact that it lacks."""
    try:
        present = {key: record[key] for key in _KEYS if record.get(key) is not None}
        scheme = scheme_of({entry.name: present[entry.name] for entry in fields(Scheme)})
        needed = _READERS.keys() - _OPTIONAL
        values = {key: read(present[key]) for key, read in _READERS.items() if key in needed | present.keys()}
        return ArtifactFacts(scheme=scheme, **values)
    except LookupError as error:
        raise InputError(f"{DAMAGED} (it does not say its {error})") from error
    except InputError as error:
        raise InputError(f"{DAMAGED} ({error})") from error


def _shared_and_differing(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The facts that all widths have alike, and the others as a list over the widths."""
    keys = {key for record in records for key in record}
    shared = {key: value for key, value in records[0].items() if all(record.get(key) == value for record in records)}
    return shared, {key: [record.get(key) for record in records] for key in sorted(keys - shared.keys())}


def _is_width(value: Any) -> bool:
    return type(value) is int and value in WIDTHS


def scheme_of(record: Any) -> Scheme:
    """How weights were quantised, from plain values.

    Raises:
        InputError: They are of other types, or no scheme.
    """
    values = records.mapping(record, "scheme")
    known = {entry.name for entry in fields(Scheme)}
    if unknown := {*values} - known:
        raise InputError(f"scheme has an entry {min(unknown)!r}, which this tqexport does not know; update it")
    flags = {key: records.flag(value, key) for key, value in values.items() if key != "quantizer"}
    quantizer: Any = records.one_of(values.get("quantizer"), "quantizer", get_args(Quantizer))
    try:
        return Scheme(quantizer, **flags)
    except UsageError as error:
        raise InputError(str(error)) from error


def normalization_of(record: Any) -> Normalization:
    """How raw input becomes network input, from plain values.

    Raises:
        InputError: They are of other types, or would divide by nothing.
    """
    values = records.mapping(record, "normalization")
    mean, std = (records.numbers(values.get(key), f"normalization {key}") for key in ("mean", "std"))
    if not mean or len(mean) != len(std) or min(std) <= 0:
        raise InputError(f"normalization is by mean {mean} and std {std}")
    return Normalization(mean, std)


def _sizes_of(record: Any, name: str) -> dict[str, int]:
    return {key: records.whole(size, key, low=1) for key, size in records.mapping(record, name).items()}


_KEYS = {item.name for item in (*fields(ArtifactFacts), *fields(Scheme))} - {"scheme"}
# Left out of a record where they are empty.
_OPTIONAL = {"normalization", "kernel", "channels_first", "steps_in_front", "input_limits", "dynamic_sizes"}
_READERS: dict[str, Callable[[Any], Any]] = {  # how each fact but the scheme is read from plain values
    **{key: partial(records.text, name=key) for key in ("architecture", "checkpoint_sha256", "layout", "kernel")},
    **{
        key: partial(records.whole, name=key, low=1, high=FLOAT_BITS)
        for key in ("activation_width", "batch_norm_width")
    },
    "width": partial(records.whole, name="width", low=min(WIDTHS), high=max(WIDTHS)),
    "class_names": partial(records.names, name="class_names"),
    "channels_first": partial(records.names, name="channels_first"),
    "input_limits": partial(records.wholes, name="input_limits"),
    **{key: partial(_sizes_of, name=key) for key in ("steps_in_front", "dynamic_sizes")},
    "normalization": normalization_of,
}
