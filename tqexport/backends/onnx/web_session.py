"""Running ONNX files in onnxruntime-web, as browsers do, in Node: one process for all files of a command.

The process is WebAssembly's on both counts: a file that takes the runtime over is shut in the memory of the module, and
one that ends it ends Node alone. So such files need no process of ours around them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from tqexport.backends.onnx.file import BITS_NAME
from tqexport.backends.onnx.web_package import MODULE, find_package
from tqexport.backends.running import Session
from tqexport.errors import HostError, InputError
from tqexport.reading import limits

if TYPE_CHECKING:
    from tqexport.backends.running import Array, Batch

__all__ = ["WEB_RUNTIME", "WebSession", "check_web"]

WEB_RUNTIME = "onnxruntime-web"  # its name, for people
_PROGRAM = Path(__file__).with_name("web.mjs")
_ENDED = f"ends the process that runs it in {WEB_RUNTIME}, so it is damaged, made to harm, or too much for it"


def check_web() -> None:
    """Make sure that Node and onnxruntime-web are here.

    Raises:
        HostError: One of them is not.
    """
    node()
    find_package()


def node() -> str:
    """The path of Node.

    Raises:
        HostError: It is not installed.
    """
    path = shutil.which("node")
    if path is None:
        raise HostError("Node, which runs onnxruntime-web, is not installed (node); install Node.js 18 or later")
    return path


class WebSession(Session):
    """An ONNX file in onnxruntime-web; takes what :class:`tqexport.backends.onnx.session.OnnxSession` takes."""

    def __init__(self, content: bytes, *, bits: int | None = None, optimized: bool = True) -> None:
        """Open a file.

        Args:
            content: The file.
            bits: The width to run a run-time file at; None for a fixed file.
            optimized: With the graph optimisations that onnxruntime makes by default; otherwise with none.

        Raises:
            InputError: onnxruntime-web does not take the file.
            HostError: Node or onnxruntime-web is not here.
        """
        self._node = _node()
        self._number = next(self._node.numbers)
        header = {"ask": "open", "session": self._number, "optimized": optimized}
        said, _ = self._node.ask("load the file", header, [content])
        shapes = [value.type.tensor_type.shape.dim for value in onnx.load_from_string(content).graph.input]
        self.batch = next((sizes[0].dim_value or None for sizes in shapes if sizes), None)
        self.input_names = [name for name in said["inputs"] if bits is None or name != BITS_NAME]
        self.output_names = said["outputs"]
        self._switch = {} if bits is None else {BITS_NAME: np.array(bits, np.uint8)}

    def run_group(self, *group: Array) -> list[Array]:
        said, parts = self._ask("run", group)
        try:
            return [
                np.frombuffer(part, np.dtype(tensor["type"]).newbyteorder("<")).reshape(tensor["shape"])
                for tensor, part in zip(said["tensors"], parts, strict=True)
            ]
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(f"{WEB_RUNTIME} gives outputs that are no tensors: {error}") from error

    def latency(self, sample: Batch) -> float:
        """Median seconds that one sample (1, ...) takes in Node."""
        return float(self._ask("time", sample)[0]["seconds"])

    def _ask(self, what: str, batch: Batch) -> tuple[dict[str, Any], list[bytes]]:
        """Ask for something that takes samples."""
        fed = dict(zip(self.input_names, batch, strict=True)) | self._switch
        tensors = [{"name": name, "type": str(value.dtype), "shape": value.shape} for name, value in fed.items()]
        header = {"ask": what, "session": self._number, "tensors": tensors}
        little = [value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes() for value in fed.values()]
        return self._node.ask("run the batch", header, little)

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            self._node.closed.append(self._number)  # said with the next question: this may run in the midst of one


@functools.lru_cache(maxsize=1)
def _running(program: str, module: Path) -> _Node:
    return _Node(program, module)


def _node() -> _Node:
    """The process, started when it is first asked for, and again when it died."""
    module = find_package().folder / MODULE
    process = _running(node(), module)
    if process.ended:
        _running.cache_clear()
        process = _running(node(), module)
    return process


class _Node:
    """Node with onnxruntime-web, which answers one question after the other."""

    def __init__(self, program: str, module: Path) -> None:
        self.numbers = itertools.count()  # of sessions
        self.closed: list[int] = []  # those that nobody needs any more
        try:
            self._process = subprocess.Popen(
                [program, str(_PROGRAM), str(module.resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt is the parent's affair
            )
        except OSError as error:
            raise HostError(f"Node cannot be started: {error}") from error

    @property
    def ended(self) -> bool:
        """Whether it answers no more."""
        return self._process.poll() is not None

    def ask(self, what: str, header: dict[str, Any], parts: Sequence[bytes]) -> tuple[dict[str, Any], list[bytes]]:
        """Send a question, and wait for the answer.

        Args:
            what: What is asked, for people: ``run the batch``.
            header: The question.
            parts: Bytes that belong to it.

        Returns:
            The answer, and bytes that belong to it.

        Raises:
            InputError: It is refused, or ended the process.
        """
        closed, self.closed = self.closed, []
        text = json.dumps({**header, "closed": closed, "sizes": [len(part) for part in parts]}).encode()
        to, back = self._process.stdin, self._process.stdout
        assert to is not None  # as it was started
        assert back is not None
        too_long = threading.Timer(limits.CHILD_SECONDS, self._process.kill)
        too_long.start()
        try:
            for part in (len(text).to_bytes(4, "little"), text, *parts):
                to.write(part)
            to.flush()
            answer = json.loads(_exactly(back, int.from_bytes(_exactly(back, 4), "little")))
            given = [_exactly(back, int(size)) for size in answer.get("sizes", ())]
        except (OSError, EOFError, ValueError) as error:
            self._process.kill()
            self._process.wait()
            raise InputError(_ENDED) from error
        finally:
            too_long.cancel()
        if "error" in answer:
            raise InputError(f"{WEB_RUNTIME} does not {what}: {answer['error']}")
        return answer, given

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()


def _exactly(stream: Any, length: int) -> bytes:
    """So many bytes.

    Raises:
        EOFError: There are fewer.
    """
    content: bytes = stream.read(length)
    if len(content) < length:
        raise EOFError
    return content
