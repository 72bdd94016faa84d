"""Do two artifacts compute the same, without the checkpoint that they came from?

Both are run as deployed; then both are run once more from one activation quantiser to the next, each time from the
activations that the first one had. So every stretch starts from equal input, what is rounded at its end must agree up
to float rounding, and a level that differs all the same is a flip (see :mod:`tqexport.verification.comparison`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.artifacts.truncate import OpenArtifact, open_artifact
from tqexport.backends.apart import BackendApart
from tqexport.backends.base import input_infos, is_exact
from tqexport.backends.running import RuntimeRun, Stretches
from tqexport.errors import InputError, UsageError, about
from tqexport.facts import ArtifactFacts
from tqexport.integer.names import is_integer
from tqexport.model import InputInfo
from tqexport.reading import limits
from tqexport.reading.apart import Apart
from tqexport.truncation import codes_of_integers, max_code
from tqexport.verification.classes import agreement, classes_of, wilson_interval
from tqexport.verification.codes import aligned, first_index
from tqexport.verification.comparison import DYNAMIC_TOLERANCE
from tqexport.verification.rounding_rules import MARGIN, UNIT
from tqexport.verification.samples import Samples, noise, read_samples
from tqexport.verification.trace import furthest_apart

__all__ = ["ArtifactAtWidth", "PairVerdict", "compare_artifacts", "open_pair", "samples_for"]

Array = npt.NDArray[Any]

_SPREAD = 4.0  # a stretch may hold a shortcut and a BatchNorm that enlarges what reaches it


@dataclass(frozen=True)
class ArtifactAtWidth:
    """An artifact, and the width that it is compared at."""

    artifact: OpenArtifact
    bits: int

    @property
    def facts(self) -> ArtifactFacts:
        """What it says of itself at that width."""
        return self.artifact.facts_at(self.bits)

    @property
    def chosen_width(self) -> int | None:
        """The width to run a run-time file at; None for a fixed file."""
        return self.bits if self.artifact.own is None else None


@dataclass(frozen=True)
class Side:
    """One of the two artifacts that are compared, and how it ran.

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
        problems: What differs, one sentence each, in the order of the network.
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


def open_pair(paths: tuple[Path, Path], bits: int | None) -> tuple[ArtifactAtWidth, ArtifactAtWidth]:
    """Open two artifacts at one width.

    Args:
        paths: The files.
        bits: The width, which run-time files need; None where a fixed file says it.

    Raises:
        InputError: One is missing, damaged, not of tqexport, or of a format that nothing here runs.
        UsageError: No width, or one that a file does not have.
    """
    artifacts = [open_artifact(path) for path in paths]
    wanted = bits or next((artifact.own for artifact in artifacts if artifact.own is not None), None)
    if wanted is None:
        raise UsageError(f"{paths[0]} and {paths[1]} hold several widths; say with --bits which one to compare")
    for artifact in artifacts:
        computes = artifact.widths if artifact.own is None else (artifact.own,)
        if wanted not in computes:
            have = ", ".join(map(str, computes))
            raise UsageError(f"{artifact.name} computes with {have} bits, so it cannot be compared at {wanted}")
        if is_integer(artifact.facts_at(wanted).kernel):
            raise UsageError(
                f"{artifact.name} computes in integers, whose reference is the calibrated checkpoint; compare it with "
                "that: tqexport verify FOLDER"
            )
    first, second = (ArtifactAtWidth(artifact, wanted) for artifact in artifacts)
    return first, second


def samples_for(artifact: ArtifactAtWidth, data: Path | None, count: int) -> Samples:
    """Samples that fit an artifact, normalised as it says: those of ``data``, or ``count`` random ones."""
    signature, facts = _signature(artifact), artifact.facts
    elements = sum(prod(info.shape) for info in signature)
    if data is None and elements > limits.SAMPLE_ELEMENTS:
        shapes = " and ".join("x".join(map(str, info.shape)) for info in signature)
        raise InputError(
            f"{artifact.artifact.name} takes samples of {shapes}, {4 * elements:,} bytes each, and makes some hundred "
            "times that of one; if this is what you want, name samples with --data"
        )
    raw = read_samples(data, signature, facts.class_names) if data else noise(count, signature)
    return raw.normalized(facts.normalization)


def compare_artifacts(pair: tuple[ArtifactAtWidth, ArtifactAtWidth], samples: Samples) -> PairVerdict:
    """Compare two artifacts on some samples.

    Raises:
        InputError: A runtime does not take its file.
    """
    apart = Apart()  # files of whoever made them
    runners, runs = [], []
    for side in pair:
        with about(side.artifact.name):
            runner = BackendApart(apart, side.artifact.backend.name).open_runner(
                side.artifact.content, side.chosen_width
            )
            if runner is None:
                raise InputError(f"is a {side.artifact.backend.title} file, which nothing here can run")
            runners.append(runner)
            runs.append(runner.run(samples.inputs))
    problems: dict[str, str] = {}
    codes, codes_wrong = _compare_codes(runs, pair[0].bits, problems)
    dynamic = any(not is_exact(side.facts.kernel) and side.chosen_width is None for side in pair)
    tolerance = DYNAMIC_TOLERANCE if dynamic else _tolerance(runs[0])
    shared = _shared_activations(runs, problems)
    levels = {name: runs[0].activations[name] for name in shared}
    (outputs, given), (other_outputs, other) = (
        _stretches(side, shared, apart)(samples.inputs, _shaped(levels, run))
        for side, run in zip(pair, runs, strict=True)
    )
    shared = [name for name in shared if name in given and name in other]  # not what is the same for all samples
    first_name, second_name = (Path(side.artifact.name).name for side in pair)
    steps = max_code(pair[0].facts.activation_width)
    flips = wrong = 0
    for name in shared:
        a, b = given[name], other[name].reshape(given[name].shape)
        differs = np.rint(a) != np.rint(b)
        apart = ~(np.abs(a - b) <= (max(1.0, tolerance * steps) if dynamic else tolerance * steps))  # NaN is apart
        wrong += int(apart.sum())
        flips += int((differs & ~apart).sum())
        if apart.any():
            layer, index = name.split("/")[0], first_index(apart)
            problems.setdefault(
                layer,
                f"activation {layer}: {int(apart.sum())} of {apart.size} differ, first at {index}: "
                f"{a[index]:.6g} in {first_name}, {b[index]:.6g} in {second_name}, of {steps} levels; "
                f"rounding explains {tolerance * steps:.1e}",
            )
    error = furthest_apart(other_outputs, outputs)
    both = [[*run.outputs.values()] for run in runs]
    one_sample = tuple(values[:1] for values in samples.inputs)
    if not error <= tolerance:
        problems.setdefault("the outputs", f"the outputs are off by {error:.1e}; rounding explains {tolerance:.1e}")
    agreeing = float(agreement(*both).mean()) if error < np.inf else 0.0
    first, second = (
        _side(side, run, runner.latency(one_sample), samples)
        for side, run, runner in zip(pair, runs, runners, strict=True)
    )
    return PairVerdict(
        bits=pair[0].bits,
        sides=(first, second),
        samples=len(samples),
        codes=codes,
        codes_wrong=codes_wrong,
        activations=sum(value.size for value in given.values()),
        flips=flips,
        activations_wrong=wrong,
        tolerance=tolerance,
        output_error=error,
        top1_agreement=agreeing,
        diverged=next(iter(problems), None),
        problems=tuple(problems.values()),
    )


def _shared_activations(runs: Sequence[RuntimeRun], problems: dict[str, str]) -> list[str]:
    """The activations that both files have as many numbers of; ``problems`` gets a sentence where they have not."""
    ours, theirs = (run.activations for run in runs)
    shared = [name for name in ours if name in theirs]
    for name in shared:
        if ours[name].size != theirs[name].size:
            layer = name.split("/")[0]
            shapes = f"{ours[name].shape} and {theirs[name].shape}"
            problems.setdefault(layer, f"activation {layer} has the shapes {shapes} for the samples")
    return [name for name in shared if ours[name].size == theirs[name].size]


def _stretches(side: ArtifactAtWidth, activations: Sequence[str], apart: Apart) -> Stretches:
    """An artifact that runs from one activation quantiser to the next."""
    backend = BackendApart(apart, side.artifact.backend.name)
    stretches = backend.open_stretches(side.artifact.content, side.chosen_width, activations)
    if stretches is None:
        raise InputError(f"{side.artifact.name} cannot be run from one activation quantiser to the next")
    return stretches


def _signature(side: ArtifactAtWidth) -> tuple[InputInfo, ...]:
    """The inputs, channels first, without the one that chooses a width."""
    inputs, _ = side.artifact.backend.describe(side.artifact.content)
    with about(side.artifact.name):
        return input_infos([tensor for tensor in inputs if len(tensor.shape)], side.facts)


def _side(side: ArtifactAtWidth, run: RuntimeRun, latency: float, samples: Samples) -> Side:
    """What is reported of one of the two."""
    classes = classes_of(next(iter(run.outputs.values())))
    labelled = samples.labels is not None and classes.shape == samples.labels.shape
    accuracy = float((classes == samples.labels).mean()) if labelled else None
    interval = None if accuracy is None else wilson_interval(accuracy, len(samples))
    return Side(side.artifact.name, run.runtime, len(side.artifact.content), latency, accuracy, interval)


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


def _compare_codes(runs: list[RuntimeRun], bits: int, problems: dict[str, str]) -> tuple[int, int]:
    """How many codes were compared, and how many differ; ``problems`` gets a sentence for each layer that does."""
    total = wrong = 0
    ours, theirs = (run.codes for run in runs)
    for weight in sorted({*ours, *theirs}):
        layer = weight.removesuffix(".weight")
        if weight not in ours or weight not in theirs:
            problems[layer] = f"layer {layer} has codes in one of the files only"
            continue
        one, other = ours[weight][0], theirs[weight][0]
        total += min(one.size, other.size)  # a file may hold further input channels, which the layer does not have
        differing = _differing(one, other, bits)
        if differing is None:
            wrong += one.size
            problems[layer] = f"layer {layer} has codes of shapes {one.shape} and {other.shape}"
        elif differing.any():
            wrong += int(differing.sum())
            share = f"{int(differing.sum())} of {differing.size}"
            problems[layer] = f"layer {layer}: {share} codes differ, first at {first_index(differing)}"
    return total, wrong


def _differing(ours: Array, theirs: Array, bits: int) -> npt.NDArray[np.bool_] | None:
    """Where the codes of one weight differ between two files; None where their shapes do not fit.

    Which axis counts output channels is not known without the checkpoint, so the better of the two readings is taken.
    """
    # Integers may be of more input channels than the layer has, so codes, or the fewer integers, are what is expected.
    if ours.dtype != np.uint8 and (theirs.dtype == np.uint8 or ours.size > theirs.size):
        ours, theirs = theirs, ours
    expected = ours if ours.dtype == np.uint8 else codes_of_integers(ours, bits)
    readings = [aligned(expected, theirs, bits, axis) for axis in (0, 1)]
    differing = [reading != expected for reading in readings if reading is not None]
    return min(differing, key=np.count_nonzero) if differing else None
