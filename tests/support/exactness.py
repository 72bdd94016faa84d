"""Is a network exact in every kind of file, at every width?"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from torch import nn

from tqexport import CheckpointInfo, InputInfo, TruncModel
from tqexport.artifacts.truncate import truncate_file
from tqexport.backends import open_runner
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.onnx.runtime_file import merge_onnx
from tqexport.backends.tflite.runtime_file import convert_to_runtime_tflite
from tqexport.verification.comparison import Comparison, Verdict
from tqexport.verification.samples import noise

__all__ = ["assert_exact", "verdicts"]


def verdicts(
    model: TruncModel, content: bytes, bits: int, *, switched: bool = False, samples: int = 3
) -> list[Verdict]:
    """A file against PyTorch, as deployed and without the runtime's optimisations."""
    batch = noise(samples, model.info.signature).inputs
    runners = [open_runner(content, bits if switched else None, deployed=deployed) for deployed in (True, False)]
    comparisons = [Comparison(model, bits) for _ in runners]
    for comparison, runner in zip(comparisons, runners, strict=True):
        comparison.add(runner.run(batch), batch)
    return [comparison.verdict() for comparison in comparisons]


def assert_exact(
    network: nn.Module, inputs: Sequence[int] | Sequence[InputInfo], widths: Sequence[int]
) -> dict[int, list[bytes]]:
    """Export a network to ONNX and TFLite, fixed and run-time, verify every file at every width, and cut them back.

    Args:
        network: Prepared, with weights.
        inputs: Shape of one sample, or every input.
        widths: The widths that its BatchNorms have.

    Returns:
        By width, the fixed files of both formats.
    """
    model = TruncModel(network.eval(), CheckpointInfo("test", {}, tuple(inputs), tuple(widths)))
    onnx_files = dict(export_onnx(model, tuple(widths)))
    models = [onnx.load_from_string(content) for content in onnx_files.values()]
    runtime_tflite, tflite_files = convert_to_runtime_tflite(models)
    for runtime, fixed in ((merge_onnx(onnx_files.items()), onnx_files), (runtime_tflite, tflite_files)):
        for bits, content in fixed.items():
            for verdict in (*verdicts(model, content, bits), *verdicts(model, runtime, bits, switched=True)):
                assert verdict.passed, (verdict.runtime, bits, verdict.problems)
                assert verdict.codes > 0
            assert truncate_file(runtime, bits) == content
    return {bits: [onnx_files[bits], tflite_files[bits]] for bits in widths}
