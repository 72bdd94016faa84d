"""A process of its own for what may end the process that does it: runtimes on files of strangers.

Runtimes are written for files that converters write. On others they may read where nothing is, and no check in front of
them knows all that hundreds of kernels take for granted. A process whose death is a sentence costs a quarter of a
second, once for a command; files that equal a fresh export byte for byte do without.

The parent sends what to build and what to call, the child answers with the result or with what was wrong. The child has
limits of time and of memory, which grow with the files and samples that it is given, no core dump, and does not look
for modules in the working folder. A file that took the child over could answer anything, so the parent builds of an
answer nothing but arrays, errors and records of them.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
from io import BytesIO
from multiprocessing.connection import Connection, Pipe
from typing import Any

from tqexport.errors import ConversionError, HostError, InputError, TqExportError, UsageError
from tqexport.reading import limits

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

__all__ = ["Apart", "Opened"]

_OF_ANSWERS = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("tqexport.backends.running", "RuntimeRun"),
    ("tqexport.integer.runtime", "IntegerRun"),
    *((error.__module__, error.__name__) for error in (ConversionError, HostError, InputError, UsageError)),
}


class Apart:
    """A process that is started when something is first opened in it, and again when it died."""

    def __init__(self, *, seconds: float = limits.CHILD_SECONDS, memory: int = limits.CHILD_MEMORY) -> None:
        """Start nothing yet.

        Args:
            seconds: How long one answer may take.
            memory: Bytes of address space.
        """
        self._seconds, self._memory = seconds, memory
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Any = None
        self._generation = self._opened = 0
        self._unused: list[int] = []  # what was opened in the process that runs now, and is to be let go

    def open(self, function: str, *arguments: Any, **settings: Any) -> Opened:
        """Build something in the process.

        Args:
            function: ``package.module:function``, a name that the caller knows, never a file.
            arguments: Its arguments, which can be pickled.
            settings: Its keyword arguments.

        Raises:
            InputError: The file among them was refused, or ended the process.
        """
        if self._process is None:
            self._start()
        self._opened += 1
        opened = Opened(self, self._generation, self._opened)
        self.ask(self._generation, "open", self._opened, function, arguments, settings)
        return opened

    def ask(self, generation: int, kind: str, number: int, *question: Any) -> Any:
        """Send a question and wait for the answer.

        Args:
            generation: Which of the processes that there were is asked.
            kind: ``open`` or ``call``.
            number: Of what is opened or called.
            question: Name of a function or method, arguments, and keyword arguments.

        Raises:
            InputError: What was asked is refused, or ended the process.
        """
        if self._process is None or generation != self._generation:
            raise InputError("ended the process that ran it; export it again")
        try:
            unused, self._unused = self._unused, []
            content = pickle.dumps(question)
            self._connection.send((unused, kind, number, len(content)))
            self._connection.send_bytes(content)
            if not self._connection.poll(self._seconds):
                self.close()
                raise InputError(f"takes more than {self._seconds:g} seconds to run; it may be made to harm")
            error, result = _Answer(BytesIO(self._connection.recv_bytes())).load()
        except (pickle.UnpicklingError, ValueError, TypeError) as error:
            self.close()
            raise InputError("gives answers that no runtime gives, so it may be made to harm") from error
        except (EOFError, OSError) as error:
            code = self._process.wait()
            self.close()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise InputError(
                f"ends the process that runs it ({how}), so it is damaged, made to harm, or too much for its runtime; "
                "export it again"
            ) from error
        if error is not None:
            raise error
        return result

    def let_go(self, generation: int, number: int) -> None:
        """Tell the process, with the next question, that nobody will ask for something that it opened."""
        if generation == self._generation:
            self._unused.append(number)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._process = None

    def __del__(self) -> None:
        self.close()

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(self._memory)]
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt is the parent's affair
            )
        except OSError as error:
            raise HostError(f"no process can be started to run the file in: {error}") from error
        theirs.close()
        self._generation += 1
        self._unused = []


class _Answer(pickle.Unpickler):
    """What the child answers: arrays, numbers, texts, and the few classes that hold them."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function of a name, of those that answers are made of."""
        if (module, name) not in _OF_ANSWERS:
            raise pickle.UnpicklingError(f"{module}.{name} is in no answer")
        return super().find_class(module, name)


class Opened:
    """Something that was built in a process of its own."""

    def __init__(self, apart: Apart, generation: int, number: int) -> None:
        self._apart, self._generation, self._number = apart, generation, number

    def call(self, method: str, *arguments: Any) -> Any:
        """Call one of its methods; raises as :meth:`Apart.ask`."""
        return self._apart.ask(self._generation, "call", self._number, method, arguments, {})

    def __del__(self) -> None:
        self._apart.let_go(self._generation, self._number)


def serve(connection: Any) -> None:
    """Answer questions until nobody is there to ask."""
    opened: dict[int, Any] = {}
    sizes: dict[int, int] = {}  # bytes of the questions that they were opened with, most of which are the file
    while True:
        try:
            unused, kind, number, size = connection.recv()
            for each in unused:
                opened.pop(each, None)
                sizes.pop(each, None)
            if kind == "open":
                sizes[number] = size
            _allow(sum(sizes.values()), 0 if kind == "open" else size)
            name, arguments, settings = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if kind == "open":
                module, _, function = name.partition(":")
                opened[number] = getattr(importlib.import_module(module), function)(*arguments, **settings)
                result = None
            else:
                result = getattr(opened[number], name)(*arguments)
            answer = pickle.dumps((None, result))
        except Exception as error:
            answer = pickle.dumps((_refusal(error), None))
        connection.send_bytes(answer)


def _refusal(error: Exception) -> TqExportError:
    """What the parent raises in the place of an error, which may hold what no answer holds."""
    if isinstance(error, MemoryError):
        return InputError("takes more memory to run than its size and the samples explain; it may be made to harm")
    if isinstance(error, TqExportError):
        return type(error)(str(error))
    # Runtimes raise classes of their own, of no common base.
    return InputError(f"cannot be run: {type(error).__name__}: {str(error)[:300]}; export it again")


def _limit(memory: int) -> None:
    """Take address space and core dumps away, where the system can."""
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _allow(files: int, samples: int) -> None:
    """Allow as much memory as honest files of so many bytes need for so many bytes of samples, where the system can."""
    if resource is not None:
        memory = limits.CHILD_DATA + limits.CHILD_OF_FILES * files + limits.CHILD_OF_SAMPLES * samples
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
        resource.setrlimit(resource.RLIMIT_DATA, (memory, most))


if __name__ == "__main__":
    for library in ("OMP", "OPENBLAS", "MKL"):  # each of their threads takes 40 MiB
        os.environ[f"{library}_NUM_THREADS"] = "1"
    _limit(int(sys.argv[2]))
    serve(Connection(int(sys.argv[1])))
