"""Do two artifacts compute the same, without the checkpoint that they came from?

Both are run as deployed; then both are run once more from one activation quantiser to the next, each time from the
activations that the first one had. So every stretch starts from equal input, what is rounded at its end must agree up
to float rounding, and a level that differs all the same is a flip (see :mod:`tqexport.verification.parity`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.artifacts.truncate import artifact_widths, is_tflite
from tqexport.backends.onnx.runtime_file import WIDTHS, facts_of_width
from tqexport.errors import InputError, UsageError
from tqexport.model import Normalization
from tqexport.truncation import STORED_BITS, max_code
from tqexport.verification.parity import DYNAMIC_TOLERANCE, wilson_interval
from tqexport.verification.rounding import MARGIN, UNIT
from tqexport.verification.runtimes import Array, RuntimeRun, open_runner, single_graph
from tqexport.verification.samples import Samples, noise, normalized, read_samples
from tqexport.verification.stretches import open_stretches

__all__ = ["OpenArtifact", "PairVerdict", "compare_artifacts", "open_pair", "samples_for"]

_SPREAD = 4.0  # a stretch may hold a shortcut and a BatchNorm that enlarges what reaches it


@dataclass(frozen=True)
class OpenArtifact:
    """An artifact at one width.

    Attributes:
        path: The file.
        content: What is in it.
        bits: The width.
        switched: It is a run-time file.
        facts: What it says of itself at that width.
    """

    path: Path
    content: bytes
    bits: int
    switched: bool
    facts: dict[str, Any]

    @property
    def width(self) -> int | None:
        """The width to feed, of a run-time file."""
        return self.bits if self.switched else None


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        artifact: Its path.
        runtime: What ran it.
        bytes: Its size.
        latency: Median seconds for one sample, on one thread.
        accuracy: Share of samples classified right, if there are labels.
        accuracy_interval: 95 % confidence interval of that.
    """

    artifact: str
    runtime: str
    bytes: int
    latency: float
    accuracy: float | None
    accuracy_interval: tuple[float, float] | None


@dataclass(frozen=True)
class PairVerdict:
    """How two artifacts compare.

    Attributes:
        bits: The width of both.
        sides: The two.
        samples: Number of samples.
        codes: Number of codes compared.
        codes_wrong: How many differ.
        activations: Number of activations compared, of those that both files have.
        flips: Activations on different sides of a boundary that they lie on.
        activations_wrong: Activations that differ otherwise.
        tolerance: Largest difference that float rounding explains, as a share of a stretch's largest value.
        output_error: Largest difference of the outputs as a share of the largest one, given the same activations.
        top1_agreement: Share of samples with the same largest output, files as deployed.
        diverged: The first layer that differs, if one does.
        problems: What differs, one sentence each, the first to look at first.
    """

    bits: int
    sides: tuple[Side, Side]
    samples: int
    codes: int
    codes_wrong: int
    activations: int
    flips: int
    activations_wrong: int
    tolerance: float
    output_error: float
    top1_agreement: float
    diverged: str | None
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the two are equal."""
        return not self.problems


def open_pair(paths: tuple[Path, Path], bits: int | None) -> tuple[OpenArtifact, OpenArtifact]:
    """Open two artifacts at one width.

    Args:
        paths: The files.
        bits: The width, which run-time files need; None where a fixed file says it.

    Raises:
        InputError: One is missing, damaged, or not of tqexport.
        UsageError: No width, or one that a file does not have.
    """
    held = [artifact_widths(path) for path in paths]
    wanted = bits or next((widths.own for widths in held if widths.own is not None), None)
    if wanted is None:
        raise UsageError(f"{paths[0]} and {paths[1]} hold several widths; say with --bits which one to compare")
    for path, widths in zip(paths, held, strict=True):
        computes = widths.widths if widths.own is None else (widths.own,)
        if wanted not in computes:
            have = ", ".join(map(str, computes))
            raise UsageError(f"{path} computes with {have} bits, so it cannot be compared at {wanted}")
    first, second = (_open(path, wanted, widths.own is None) for path, widths in zip(paths, held, strict=True))
    return first, second


def samples_for(artifact: OpenArtifact, data: Path | None, count: int) -> Samples:
    """Samples that fit an artifact, normalised as it says: those of ``data``, or ``count`` random ones."""
    shape = _input_shape(artifact)
    said = artifact.facts.get("normalization")
    normalization = Normalization(tuple(said["mean"]), tuple(said["std"])) if said else None
    if data is None:
        return Samples(normalized(noise(count, shape), normalization), None, f"on {count} random samples")
    found = read_samples(data, shape, artifact.facts.get("class_names", ()))
    return Samples(normalized(found.inputs, normalization), found.labels, found.description)


def compare_artifacts(pair: tuple[OpenArtifact, OpenArtifact], samples: Samples) -> PairVerdict:
    """Compare two artifacts on some samples.

    Raises:
        InputError: A runtime does not take its file.
    """
    inputs = samples.inputs
    runners = [open_runner(each.content, each.width) for each in pair]
    runs = [runner.run(inputs) for runner in runners]
    problems: dict[str, str] = {}
    codes, codes_wrong = _compare_codes(runs, pair[0].bits, problems)
    dynamic = any(each.facts.get("kernel") == "dynamic" and not each.switched for each in pair)
    tolerance = DYNAMIC_TOLERANCE if dynamic else _tolerance(runs[0])
    shared = [name for name in runs[0].activations if name in runs[1].activations]
    levels = {name: runs[0].activations[name] for name in shared}
    (outputs, given), (other_outputs, other) = (
        open_stretches(each.content, each.width, shared)(inputs, _shaped(levels, run))
        for each, run in zip(pair, runs, strict=True)
    )
    steps = max_code(int(pair[0].facts.get("activation_width", STORED_BITS)))
    flips = wrong = 0
    for name in shared:
        a, b = given[name], other[name].reshape(given[name].shape)
        differs = np.rint(a) != np.rint(b)
        apart = np.abs(a - b) > (max(1.0, tolerance * steps) if dynamic else tolerance * steps)
        wrong += int(apart.sum())
        flips += int((differs & ~apart).sum())
        if apart.any():
            layer, index = name.split("/")[0], tuple(int(i) for i in np.argwhere(apart)[0])
            problems.setdefault(
                layer,
                f"activation {layer}: {int(apart.sum())} of {apart.size} differ, first at {index}: "
                f"{a[index]:.6g} in {pair[0].path.name}, {b[index]:.6g} in {pair[1].path.name}, of {steps} levels; "
                f"rounding explains {tolerance * steps:.1e}",
            )
    error = _error(outputs, other_outputs)
    if not error <= tolerance:
        problems.setdefault("the outputs", f"the outputs are off by {error:.1e}; rounding explains {tolerance:.1e}")
    agreement = float((runs[0].outputs.argmax(1) == runs[1].outputs.argmax(1)).mean()) if error < np.inf else 0.0
    first, second = (
        _side(each, run, runner.latency(inputs[:1]), samples)
        for each, run, runner in zip(pair, runs, runners, strict=True)
    )
    return PairVerdict(
        bits=pair[0].bits,
        sides=(first, second),
        samples=len(inputs),
        codes=codes,
        codes_wrong=codes_wrong,
        activations=sum(value.size for value in given.values()),
        flips=flips,
        activations_wrong=wrong,
        tolerance=tolerance,
        output_error=error,
        top1_agreement=agreement,
        diverged=next(iter(problems), None),
        problems=tuple(problems.values()),
    )


def _open(path: Path, bits: int, several: bool) -> OpenArtifact:
    from tqexport.backends.onnx.file import read_metadata, read_onnx
    from tqexport.backends.tflite.file import unpack

    content = path.read_bytes()
    try:
        facts = dict(unpack(content)[1] if is_tflite(content) else read_metadata(read_onnx(path)))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if several:
        row = list(facts[WIDTHS]).index(bits)
        facts = facts_of_width(facts, row)
    return OpenArtifact(path, content, bits, several, facts)


def _input_shape(artifact: OpenArtifact) -> tuple[int, ...]:
    """Shape of one sample, channels first."""
    import onnx

    if is_tflite(artifact.content):
        flat, _ = single_graph(artifact.content, artifact.width)
        *rest, channels = (int(n) for n in flat.tensor(int(flat.graph.inputs[0])).shape[1:])
        return (channels, *rest)
    dims = onnx.load_from_string(artifact.content).graph.input[0].type.tensor_type.shape.dim[1:]
    return tuple(int(dim.dim_value) for dim in dims)


def _side(artifact: OpenArtifact, run: RuntimeRun, latency: float, samples: Samples) -> Side:
    accuracy = None if samples.labels is None else float((run.outputs.argmax(1) == samples.labels).mean())
    interval = None if accuracy is None else wilson_interval(accuracy, len(samples.inputs))
    return Side(str(artifact.path), run.runtime, len(artifact.content), latency, accuracy, interval)


def _tolerance(run: RuntimeRun) -> float:
    """What rounding explains at the end of a stretch, from the widest layer of the file.

    See :mod:`tqexport.verification.rounding`, whose sums of squares are not known here: ``2 u sqrt(n)`` of the sum's
    usual size.
    """
    terms = max((place[0].size for places in run.codes.values() for place in places), default=1)
    return float(MARGIN * _SPREAD * 2 * UNIT * np.sqrt(terms))


def _shaped(levels: dict[str, Array], run: RuntimeRun) -> dict[str, Array]:
    """Levels in the shapes that a file has them in: TFLite keeps an axis of 1 through 1-D convolutions."""
    return {name: value.reshape(run.activations[name].shape) for name, value in levels.items()}


def _error(outputs: Array, other: Array) -> float:
    if outputs.shape != other.shape:
        return float("inf")
    return float(np.abs(outputs - other).max()) / max(float(np.abs(outputs).max()), 1e-30)


def _compare_codes(runs: list[RuntimeRun], bits: int, problems: dict[str, str]) -> tuple[int, int]:
    total = wrong = 0
    ours, theirs = (run.codes for run in runs)
    for weight in sorted({*ours, *theirs}):
        layer = weight.removesuffix(".weight")
        if weight.endswith("/constant"):
            continue  # a part of a layer that the TFLite form of its weights needs
        if weight not in ours or weight not in theirs:
            problems[layer] = f"layer {layer} has codes in one of the files only"
            continue
        a, b = (_codes(places[weight][0], bits) for places in (ours, theirs))
        inputs = min(a.shape[1], b.shape[1])  # a fixed TFLite file may have one more behind them
        a, b = a[:, :inputs].reshape(len(a), -1), b[:, :inputs].reshape(len(b), -1)
        total += a.size
        if a.shape != b.shape:
            wrong += a.size
            problems[layer] = f"layer {layer} has codes of shapes {a.shape} and {b.shape}"
            continue
        # An output channel with a negative gain is turned round in a fixed TFLite file, u -> M_b - u.
        b = np.where(
            ((max_code(bits) - b) != a).sum(1, keepdims=True) < (b != a).sum(1, keepdims=True), max_code(bits) - b, b
        )
        if differing := int((a != b).sum()):
            wrong += differing
            index = tuple(int(i) for i in np.argwhere(a != b)[0])
            problems[layer] = (
                f"layer {layer}: {differing} of {a.size} codes differ, first in output channel {index[0]}, {index[1]}: "
                f"{a[index]} and {b[index]}"
            )
    return total, wrong


def _codes(values: npt.NDArray[Any], bits: int) -> npt.NDArray[np.int16]:
    """Codes 0 to ``M_b``, from codes or from stored integers."""
    wide = values.astype(np.int16)
    if values.dtype == np.uint8:
        return wide
    return wide + 128 if bits == STORED_BITS else (wide + max_code(bits)) // 2
