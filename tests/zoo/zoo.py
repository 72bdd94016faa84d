"""Every network of the zoo: prepared, trained a little, exported, and verified at four widths."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import convolutions
import onnx
import onnxsim
import operators
import sequences
import torch
from entry import EXACT, Entry
from torch import Tensor, nn

from tqexport import CheckpointInfo, TruncModel, joint_backward, prepare
from tqexport.artifacts.project import Project
from tqexport.backends import BACKENDS
from tqexport.backends.tflite.runtime_file import convert_to_runtime_tflite
from tqexport.errors import TqExportError
from tqexport.outputs import outputs_of
from tqexport.verification.fresh import FreshExports
from tqexport.verification.jobs import Job
from tqexport.verification.run import check, verify_made
from tqexport.verification.samples import noise
from tqexport.verification.trial import project_of

__all__ = ["ENTRIES", "FAILS", "GROUPS", "WIDTHS", "Outcome", "run_entry"]

GROUPS = {
    "Convolutional networks": convolutions.ENTRIES,
    "Operators between two convolutions": operators.ENTRIES,
    "Attention, recurrence, tokens, several inputs and outputs": sequences.ENTRIES,
}
ENTRIES = [entry for entries in GROUPS.values() for entry in entries]
WIDTHS = (1, 3, 4, 8)
FAILS = "fails"
_EQUAL, _BY_OUTPUTS = "parameters equal", "outputs equal"
_REWRITTEN = 4  # bits
_STEPS = 3
_SAMPLES = 4


@dataclass(frozen=True)
class Outcome:
    """What came of a network.

    Attributes:
        onnx: ``exact``, the sentence that refuses it, or what is wrong, which begins with ``WRONG``.
        tflite: The same.
        rewritten: What verify says of an ONNX file behind onnxsim: ``parameters equal``, ``outputs equal`` where the
            structure is another one, or that it fails; empty where it was not asked.
        quantized: How many of its weights have codes.
    """

    onnx: str
    tflite: str
    rewritten: str = ""
    quantized: int = 0

    def as_expected(self, entry: Entry) -> bool:
        """Whether all of it is what the entry says."""
        pairs = ((self.onnx, entry.onnx), (self.tflite, entry.tflite))
        as_rewritten = not self.rewritten or (self.rewritten != FAILS) is entry.rewritten
        return as_rewritten and all(
            came == EXACT if expected == EXACT else _refused(came, expected) for came, expected in pairs
        )


def _refused(came: str, words: str) -> bool:
    return words in came and not came.startswith("WRONG") and came != EXACT


def run_entry(entry: Entry, *, rewritten: bool = False) -> Outcome:
    """Take a network through everything: both formats, fixed files and run-time files; perhaps behind onnxsim, too."""
    model = trained(entry)
    project = project_of(model)
    codes = sum("parametrizations" in name for name, _ in model.module.named_parameters())
    outcomes = _outcome(_onnx, project), _outcome(_tflite, project)
    return Outcome(*outcomes, _rewritten(project) if rewritten and outcomes[0] == EXACT else "", codes)


def trained(entry: Entry) -> TruncModel:
    """The network after three steps of training on random numbers."""
    torch.manual_seed(0)
    network = prepare(
        entry.build(), WIDTHS, float_layers=entry.float_layers, learned_ranges=entry.learned_ranges
    ).train()
    batch = tuple(map(torch.from_numpy, noise(8, entry.inputs).inputs))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        joint_backward(network, batch, None, WIDTHS, _loss)
        optimizer.step()
    return TruncModel(network.eval(), CheckpointInfo("zoo", {}, entry.inputs, WIDTHS))


def _loss(outputs: Any, _targets: None) -> Tensor:
    """Half of each output is to be one, the others nothing."""
    losses = []
    for value in outputs_of(outputs).values():
        if value.requires_grad:
            wanted = (torch.arange(value.numel()) % 2).reshape(value.shape).float()
            losses.append(nn.functional.mse_loss(value, wanted))
    return torch.stack(losses).sum()


def _outcome(make: Any, project: Project) -> str:
    """What comes of a format."""
    try:
        name, fixed, run_time = make(project)
        _compare(project, name, fixed, run_time=False)
        _compare(project, name, [(bits, run_time) for bits in WIDTHS], run_time=True)
    except _WrongError as error:
        return f"WRONG: {error}"
    except TqExportError as error:
        return str(error)
    except Exception as error:  # an internal error is one of the things that are looked for
        return f"WRONG: internal error, {type(error).__name__}: {error}"
    return EXACT


def _rewritten(project: Project) -> str:
    """What verify says of the file of a width behind onnxsim, as it is and with the batch fixed to one sample."""
    fresh, said = FreshExports(project, {}), set()
    for batch in (None, 1):
        file = onnx.load_from_string(fresh.fixed("onnx", EXACT, _REWRITTEN))
        shapes = {each.name: (batch, *each.shape) for each in project.model.info.signature} if batch else None
        content = onnxsim.simplify(file, overwrite_input_shapes=shapes)[0].SerializeToString()
        job = Job(_REWRITTEN, BACKENDS["onnx"], EXACT, "file", content, batch=batch)
        for checked in check(project, job, noise(_SAMPLES, project.model.info.signature), (), fresh):
            passed = checked.deployed.passed and checked.unoptimized.passed
            said.add((_EQUAL if checked.deployed.parameters == "equal" else _BY_OUTPUTS) if passed else FAILS)
    return max(said, key=(_EQUAL, _BY_OUTPUTS, FAILS).index)


def _onnx(project: Project) -> tuple[str, list[tuple[int, bytes]], bytes]:
    return "onnx", [*project.make("onnx", WIDTHS)], BACKENDS["onnx"].export_runtime(project)


def _tflite(project: Project) -> tuple[str, list[tuple[int, bytes]], bytes]:
    models = [onnx.load_from_string(content) for _, content in project.make("onnx", WIDTHS)]
    run_time, fixed = convert_to_runtime_tflite(models)
    return "tflite", [*fixed.items()], run_time


class _WrongError(Exception):
    """A file was written that computes something else."""


def _compare(project: Project, name: str, files: Iterable[tuple[int, bytes]], *, run_time: bool) -> None:
    """Compare files of every width with PyTorch."""
    info = project.model.info
    samples = noise(_SAMPLES, info.signature)
    for checked in verify_made(project, BACKENDS[name], EXACT, files, samples, run_time=run_time):
        if not checked.passed:
            raise _WrongError(f"{checked.file} at {checked.bits} bits: {checked.problems[0]}")
