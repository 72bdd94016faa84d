"""The optional parts of an installation: what each extra of the package brings, and what to say where one is missing.

The base installation loads no framework. ``pip install 'tqexport[litert]'`` runs TFLite files and switches their width,
``tqexport[onnx]`` exports to ONNX without TensorFlow; pyproject.toml says the same to pip.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tqexport.errors import HostError

__all__ = ["EXTRAS", "lacking", "needs"]

_ONNXRUNTIME = ("onnx", "onnxruntime")
_LITERT = ("ai_edge_litert", "flatbuffers")
_ONNX = (*_ONNXRUNTIME, "onnx_ir", "onnxscript", "safetensors", "torch")
_CONVERTER = ("onnx2tf", "tensorflow", "tf_keras", "onnx_graphsurgeon", "onnxsim", "psutil", "sng4onnx")

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": _ONNXRUNTIME,
    "litert": _LITERT,
    "torch": ("safetensors", "torch"),
    "onnx": _ONNX,
    "tflite": (*_ONNX, *_LITERT, *_CONVERTER),
    "report": ("jinja2", "matplotlib", "PIL"),
    "evaluate": ("cryptography", "dask", "distributed", "fsspec"),
    "devices": ("ethosu", "openvino", "tflite_micro"),
}
"""The modules that each extra brings, by its name; the smaller of two that bring the same comes first."""


def lacking(error: ImportError, extra: str | None = None) -> HostError | None:
    """What to say of a failed import, or None where no extra brings the module.

    Args:
        error: The failed import.
        extra: The extra to name if it brings the module; otherwise the smallest that does is named.

    Example:
        >>> str(lacking(ModuleNotFoundError("No module named 'torch'", name="torch"), "onnx"))
        "this machine lacks torch, or it does not load (No module named 'torch'): pip install 'tqexport[onnx]'"
    """
    module = (error.name or "").partition(".")[0]
    preferred = [extra] if extra else []
    for name in (*preferred, *EXTRAS):
        if module in EXTRAS[name]:
            return HostError(
                f"this machine lacks {module}, or it does not load ({error}): pip install 'tqexport[{name}]'"
            )
    return None


@contextmanager
def needs(extra: str | None = None) -> Iterator[None]:
    """Within the block, an import that fails becomes a sentence that says what to install; see :func:`lacking`.

    Raises:
        HostError: A package is missing that an extra brings.
    """
    try:
        yield
    except ImportError as error:
        explained = lacking(error, extra)
        if explained is None:
            raise
        raise explained from error
