"""Commands that are killed, interrupted, out of disk or out of step: nothing visible is half-written.

Run ``python tests/interruption.py``. Every trial is a command in a process of its own that is disturbed: in a quarter
it is ended by the clock, in half right before one of its operations on files, which are the moments that matter, and in
a quarter the disk is full. The network is a small one, and its layers are traced once, but for trials that are ended by
the clock: files are written in the same steps, and a trial spends its time on these. Processes are forked from one that
has imported what commands import, those of TFLite's converter and of Dask's workers too. After each trial:

* the inputs are as they were;
* every visible file is, byte for byte, what an undisturbed run writes, or what was there before;
* the manifest agrees with the files, or reading it says what to do;
* what is interrupted or out of disk says so in one line, with its exit code, and leaves nothing temporary;
* the same command, run again, succeeds, gives the files of an undisturbed run, and leaves nothing temporary either.

Exit code 1 where anything of this does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import dask
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "support"))

from tqexport.cli import main as tqexport
from warm_converter import convert_and_end
from web_copy import web_copy

from tqexport import CheckpointInfo, Normalization, prepare, save_checkpoint
from tqexport.artifacts.manifest import FILE_NAME, read_artifact, read_manifest
from tqexport.artifacts.project import open_project
from tqexport.backends.onnx import export
from tqexport.backends.tflite import onnx2tf, onnx2tf_worker
from tqexport.checkpoints.options import ReadOptions
from tqexport.deploy import deploy
from tqexport.errors import InputError
from tqexport.networks.registry import ARCHITECTURES
from tqexport.truncation import WIDTHS

FIXTURES = Path(__file__).parents[1] / "fixtures"
INPUTS = ("ckpt.pt", "int.pt", "other.pt", "data.npz", "given", "parts", "web")  # which no command may touch
OTHERS = (".ses",)  # what onnxruntime leaves among temporary files
VARIES = ("report.html",)  # with the clock, so that only its end is looked at
GROWS = ("counts.jsonl",)  # line by line, so that a beginning of it is right
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "tempfile.mkdtemp", "fcntl.flock")
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
SMALLEST_LIMIT = 4096  # bytes, so that what a command says still fits in a file


@dataclass(frozen=True)
class Command:
    """A command to disturb.

    Attributes:
        line: What is typed.
        before: What is typed before, undisturbed, once for all trials.
        starts: Whether it starts other processes.
    """

    line: str
    before: tuple[str, ...] = ()
    starts: bool = False


COMMANDS = {
    "onnx": Command("onnx ckpt.pt --bits 1,4,8 -o out"),
    "onnx again": Command("onnx ckpt.pt --bits 4,8 -o out", ("onnx other.pt --bits 4,8 -o out",)),
    "onnx runtime": Command("onnx ckpt.pt --bits runtime -o out"),
    "c": Command("c int.pt --bits 2,4 -o out"),
    "convert": Command("convert ckpt.pt new/net.pt"),
    "convert safetensors": Command("convert ckpt.pt new/net.safetensors"),
    "truncate": Command("truncate given/ckpt.onnx -o out", ("onnx ckpt.pt --bits 8 -o out",)),
    "calibrate": Command("calibrate ckpt.pt --data data.npz -o new/int.pt"),
    "gap": Command("gap ckpt.pt --plot gap.png"),
    "verify": Command("verify given --bits 4 --runtime onnxruntime --attest new/statement.json"),
    "page": Command("page ckpt.pt --data data.npz --onnxruntime-web web -o page"),
    "page again": Command(
        "page ckpt.pt --data data.npz --onnxruntime-web web -o page", ("page other.pt --onnxruntime-web web -o page",)
    ),
    "split": Command("split given/ckpt.onnx -o out"),
    "join": Command(
        "join parts/ckpt-w2-exact-packed.onnx parts/ckpt-w2-rest.zip -o out", ("split given/ckpt.onnx -o parts",)
    ),
    "tflite": Command("tflite given --bits 4 -o out", starts=True),
    "evaluate": Command(
        "evaluate given --bits 4 --runtime onnxruntime --data data.npz --workers 1 --resume counts.jsonl "
        "--report report.html",
        starts=True,
    ),
}
IMPORTED = (
    "distributed",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "onnxruntime",
    "rich.live",
    "rich.table",
)
WORKERS = "distributed.worker.multiprocessing-method"  # a setting of Dask; "fork", as they have nothing to import then
CONVERTER = ("onnx2tf", "tensorflow", "tf_keras")
TRACE = export.capture
EVERYTHING = (*COMMANDS, "two at once", "checkpoint replaced")


@dataclass
class Workplace:
    """A folder for trials, and what undisturbed runs make in it.

    Attributes:
        root: The folder.
        seconds_of_export: How long it takes to export a checkpoint at a width.
        wanted: By command: hash by name of every file after an undisturbed run.
        previous: The same before it.
        seconds: How long it takes.
        operations: How many operations on files it makes.
        largest: Bytes of the largest file that it writes.
    """

    root: Path
    seconds_of_export: float
    wanted: dict[str, dict[str, str]]
    previous: dict[str, dict[str, str]]
    seconds: dict[str, float]
    operations: dict[str, int]
    largest: dict[str, int]


def small_network() -> nn.Module:
    """Two quantised convolutions for digits, prepared, with random weights."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for before, after in ((1, 4), (4, 8), (8, 8)):
        parts += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return prepare(nn.Sequential(*parts, nn.Flatten(), nn.Linear(8, 10)), WIDTHS).eval()


def make_workplace(root: Path, names: list[str]) -> Workplace:
    """Make the inputs, and run every command once without disturbing it."""
    start = root / "start"
    start.mkdir()
    ARCHITECTURES["small"] = small_network
    shutil.copy(FIXTURES / "digits-test.npz", start / "data.npz")
    web_copy(start / "web")
    network = small_network()
    info = CheckpointInfo("small", {}, (1, 8, 8), WIDTHS, normalization=Normalization((0.3,), (0.4,)))
    save_checkpoint(start / "ckpt.pt", network, info)
    with torch.no_grad():
        network.state_dict()["10.bias"].add_(1)
    save_checkpoint(start / "other.pt", network, info)
    require(run(start, "calibrate ckpt.pt --data data.npz -o int.pt") == 0, f"calibrate fails: {said(start)}")
    os.environ |= onnx2tf_worker.ENVIRONMENT
    for library in IMPORTED + (CONVERTER if "tflite" in names else ()):
        importlib.import_module(library)
    onnx2tf.run_worker = forked_worker
    dask.config.set({WORKERS: "fork"})
    seconds, traced = 0.0, None
    if not all("convert" in COMMANDS[name].line for name in names):
        # In this process, so that all that it imports is there in those that are forked from it.
        project = open_project(start / "ckpt.pt", start / "given", ReadOptions())
        project.export_runtime("onnx")
        began = time.monotonic()
        list(project.export("onnx", (4,)))
        seconds = time.monotonic() - began
        traced = TRACE(deploy(project.model, 8), info.signature)
    place = Workplace(root, seconds, {}, {}, {}, {}, {})
    for name in names:
        command = COMMANDS[name]
        folder = fresh(place, None)
        for line in command.before:
            require(run(folder, line) == 0, f"{line} fails: {said(folder)}")
        if (folder / "out").is_dir():  # as the exports of an earlier state of the same checkpoint
            as_of_earlier(folder)
        shutil.copytree(folder, root / name)
        place.previous[name] = hashes(folder)
        counted = root / "count"
        began = time.monotonic()
        require(run(folder, command.line, counting=counted) == 0, f"{command.line} fails: {said(folder)}")
        place.seconds[name] = time.monotonic() - began
        place.operations[name] = int(counted.read_text())
        place.wanted[name] = hashes(folder)
        written = [folder / file for file in place.wanted[name] if not is_input(file)]
        place.largest[name] = max((path.stat().st_size for path in written), default=0)
        for grown in filter(lambda file: file.endswith(GROWS), place.wanted[name]):
            (root / "whole").mkdir(exist_ok=True)
            shutil.copy(folder / grown, root / "whole" / grown)
        require(not temporary(folder), f"{name} leaves {temporary(folder)}")
    if traced:
        export.capture = lambda *_: traced  # whose values are filled in for each width, here in a process of their own
    return place


def trace_anew() -> None:
    """Trace the network in this process, as commands do."""
    export.capture = TRACE


def forked_worker(folder: Path, pairs: Sequence[str]) -> tuple[int, str]:
    """What :func:`tqexport.backends.tflite.onnx2tf.run_worker` does, in a process that is forked: it has no imports."""
    lifeline, held = os.pipe()  # never written to; it ends with this process
    printed, printing = os.pipe()
    process = os.fork()
    if not process:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        kept = {0, 1, 2, lifeline, printing}
        for descriptor in {int(entry.name) for entry in Path("/proc/self/fd").iterdir()} - kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)  # neither locks nor pipes are inherited by a program that is started
        convert_and_end(folder, pairs, lifeline, printing)
    os.close(lifeline)
    os.close(printing)
    with os.fdopen(printed, errors="replace") as stream:
        words = stream.read()
    code = end_of(process)
    os.close(held)
    return code, words


def as_of_earlier(folder: Path) -> None:
    """Let the manifest of exports of ``other.pt`` say that they are of an earlier ``ckpt.pt``."""
    manifest = folder / "out" / FILE_NAME
    text = manifest.read_text().replace("other.pt", "ckpt.pt")
    for path in sorted((folder / "out").glob("other-*")):
        path.rename(path.with_name(path.name.replace("other-", "ckpt-")))
    manifest.write_text(text.replace('"other-', '"ckpt-'))


def fresh(place: Workplace, name: str | None) -> Path:
    """An empty place for a trial of a command."""
    folder = place.root / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place.root / (name or "start"), folder)
    (folder / "tmp").mkdir(exist_ok=True)
    return folder


def start(folder: Path, line: str, setup: Callable[[], object] = lambda: None, log: str = "said") -> int:
    """Start a command in a process of its own; returns its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        os.chdir(folder)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
        descriptor = os.open(folder.parent / log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv = ["tqexport", *line.split()]
        setup()
        tqexport()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 98
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def run(folder: Path, line: str, *, counting: Path | None = None) -> int:
    """Run a command undisturbed; returns its exit code."""
    return end_of(start(folder, line, (lambda: count_operations(counting)) if counting else lambda: None))


def end_of(process: int) -> int:
    """The exit code of a process, once it has ended; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def count_operations(target: Path) -> None:
    """Count this process's operations on files in the folder of the trial, and write the number when asked to end."""
    number, process = 0, os.getpid()
    folder = str(Path.cwd())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number
        if os.getpid() == process and is_operation(event, arguments, folder):
            number += 1
            descriptor = os.dup(counter)
            os.pwrite(descriptor, f"{number:9}".encode(), 0)
            os.close(descriptor)

    counter = os.open(target, os.O_RDWR | os.O_CREAT)
    sys.addaudithook(hook)


def end_before_operation(number: int, by: signal.Signals) -> None:
    """Send this process a signal right before its operation on files of that number."""
    left, process = number, os.getpid()
    folder = str(Path.cwd())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if os.getpid() == process and is_operation(event, arguments, folder):
            left -= 1
            if left == 0:
                os.kill(process, by)

    sys.addaudithook(hook)


def is_operation(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    """Whether an event of Python's audit is an operation on a file of the trial."""
    if event not in EVENTS:
        return False
    if event in ("fcntl.flock", "tempfile.mkdtemp"):
        return True
    path = str(arguments[0])
    return path.startswith(folder) or (not path.startswith("/") and path[:1].isalpha() and "/" in path)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 by name of every visible file; ``tmp`` is where temporary ones are."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.parts)
        and "tmp" not in path.relative_to(folder).parts
    }


def temporary(folder: Path) -> list[str]:
    """What is hidden or temporary in a folder."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if (path.name.startswith(".") or path.parent.name == "tmp") and path.name not in OTHERS
    )


def said(folder: Path, log: str = "said") -> str:
    """What a command printed."""
    return (folder.parent / log).read_text(errors="replace")


class WrongError(Exception):
    """What does not hold."""


def require(holds: bool, text: str) -> None:
    """Raise :class:`WrongError` with a text where something does not hold."""
    if not holds:
        raise WrongError(text)


def check_files(folder: Path, wanted: dict[str, str], previous: dict[str, str], inputs: dict[str, str]) -> None:
    """Inputs as they were; every other file whole, of this run or of before; the manifest agrees or says what to do."""
    now = hashes(folder)
    for name, sha256 in inputs.items():
        require(now.get(name) == sha256, f"{name} was touched")
    for name, sha256 in now.items():
        if name in inputs or name.endswith(FILE_NAME):
            continue
        if name.endswith(VARIES):
            require((folder / name).read_text().rstrip().endswith("</html>"), f"{name} is half-written")
            continue
        if name.endswith(GROWS):
            whole = (folder.parent / "whole" / name).read_bytes()
            require(whole.startswith((folder / name).read_bytes()), f"{name} is no beginning of the whole")
            continue
        require(sha256 in (wanted.get(name), previous.get(name)), f"{name} is half-written")
    for manifest in folder.rglob(FILE_NAME):
        for artifact in read_manifest(manifest.parent).artifacts:
            try:
                read_artifact(manifest.parent, artifact)
            except InputError as error:
                require("export it again" in str(error) or "export again" in str(error), f"no advice: {error}")


def is_input(name: str) -> bool:
    """Whether a file is one that commands read."""
    return name.startswith(INPUTS)


def trial(place: Workplace, name: str, random: Random, kind: str) -> str:
    """One disturbed run of a command, and one after it; returns what became of the first."""
    command = COMMANDS[name]
    folder = fresh(place, name)
    wanted, previous = place.wanted[name], place.previous[name]
    inputs = {file: sha256 for file, sha256 in previous.items() if is_input(file)}
    by, moment, setup = random.choice(SIGNALS), None, lambda: None
    if kind == "clock":
        moment, setup = random.uniform(0, 1.05 * place.seconds[name]), trace_anew
    elif kind == "operation":
        number = random.randint(1, place.operations[name])
        setup = lambda: end_before_operation(number, by)  # noqa: E731
    else:
        limit = random.randint(SMALLEST_LIMIT, max(SMALLEST_LIMIT, place.largest[name]))
        setup = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    process = start(folder, command.line, setup)
    if moment is not None:
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, by)
    code = end_of(process)
    words = said(folder)
    check_files(folder, wanted, previous, inputs)
    require("Traceback" not in words, f"it prints a traceback: {words[-300:]}")
    if code != -signal.SIGKILL:
        expected = {0, 4} if kind == "disk" else {0, 128 + by, -by}  # -by: before the command took the signal over
        require(code in expected, f"exit code {code}: {words[-300:]}")
        require(code < 0 or not temporary(folder), f"{temporary(folder)} is left after exit code {code}")
        if code > 0:
            require(len(words.strip().splitlines()[-1:]) == 1, "it does not say why")
    if command.starts:
        wait_for_children(folder)
    again = run(folder, command.line)
    require(again == 0, f"run again, it ends with {again}: {said(folder)[-300:]}")
    require(without(hashes(folder)) == without(wanted), f"run again, it gives other files: {differ(folder, wanted)}")
    require(not temporary(folder), f"{temporary(folder)} is left after the next run")
    return {0: "completed", -signal.SIGKILL: "killed"}.get(code, f"exit code {code}")


def without(files: dict[str, str]) -> dict[str, str]:
    """Files without those that vary with the clock."""
    return {name: sha256 for name, sha256 in files.items() if not name.endswith(VARIES)}


def differ(folder: Path, wanted: dict[str, str]) -> list[str]:
    """Names of the files that are not as wanted."""
    now = hashes(folder)
    return sorted(name for name in {*now, *wanted} if now.get(name) != wanted.get(name))


def wait_for_children(folder: Path) -> None:
    """Whatever a dead command had started ends within seconds."""
    for _ in range(100):
        working = []
        for entry in Path("/proc").glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):
                if str(entry.readlink()).startswith(str(folder)):
                    working.append(entry.parent.name)
        if not working:
            return
        time.sleep(0.1)
    raise WrongError(f"processes {working} go on after the command that started them")


def two_at_once(place: Workplace, random: Random) -> str:
    """Two exports into one folder at once: the manifest has both."""
    folder = fresh(place, None)
    widths = [sorted(random.sample(range(1, 9), 2)) for _ in range(2)]
    lines = [f"onnx ckpt.pt --bits {','.join(map(str, own))} -o out" for own in widths]
    processes = []
    for number, line in enumerate(lines):
        processes.append(start(folder, line, log=f"said{number}"))
        time.sleep(random.uniform(0, 0.1))
    for number, process in enumerate(processes):
        code = end_of(process)
        require(code == 0, f"exit code {code}: {said(folder, f'said{number}')}")
    manifest = read_manifest(folder / "out")
    have = {bits for artifact in manifest.artifacts for bits in artifact.widths}
    require(have == {*widths[0], *widths[1]}, f"the manifest has {have} of {widths}")
    for artifact in manifest.artifacts:
        read_artifact(folder / "out", artifact)
    require(not temporary(folder), f"{temporary(folder)} is left")
    return "both"


def replaced(place: Workplace, random: Random) -> str:
    """A checkpoint replaced while it is exported: the exports are of one or the other, and say of which."""
    folder = fresh(place, None)
    line, whole = "onnx ckpt.pt --bits 4,8 -o out", random.random() < 0.5
    process = start(folder, line, trace_anew)
    time.sleep(random.uniform(0, random.choice((0.1, 1.0)) * place.seconds_of_export))  # it is read at the beginning
    content = (folder / "other.pt").read_bytes()
    if whole:
        (folder / "new.pt").write_bytes(content)
        (folder / "new.pt").rename(folder / "ckpt.pt")
    else:
        with (folder / "ckpt.pt").open("r+b") as stream:  # in place, in two steps, as copying does
            stream.write(content[: len(content) // 2])
            stream.flush()
            time.sleep(random.uniform(0, 0.02))
            stream.write(content[len(content) // 2 :])
            stream.truncate()
    code = end_of(process)
    require(code in (0, 3), f"exit code {code}: {said(folder)}")
    require(len(said(folder).strip().splitlines()) == 1 or code == 0, f"more than a sentence: {said(folder)}")
    if code == 0:
        manifest = read_manifest(folder / "out")
        for artifact in manifest.artifacts:
            read_artifact(folder / "out", artifact)
        of = [
            name
            for name in ("start/ckpt.pt", "start/other.pt")
            if sha256(place.root / name) == manifest.checkpoint_sha256
        ]
        require(len(of) == 1, "the manifest is of neither checkpoint")
        facts = {json.dumps(str(path)): path.read_bytes() for path in (folder / "out").glob("*.onnx")}
        require(all(manifest.checkpoint_sha256.encode() in c for c in facts.values()), "files of another checkpoint")
    require(run(folder, line) == 0, f"run again, it fails: {said(folder)}")
    require(
        read_manifest(folder / "out").checkpoint_sha256 == sha256(folder / "ckpt.pt"), "run again, it is the old one"
    )
    return f"exit code {code}"


def sha256(path: Path) -> str:
    """Hash of a file, hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--trials", type=int, default=60, help="of each command")
    parser.add_argument("--commands", default=",".join(EVERYTHING), help="which, by name, separated by commas")
    arguments = parser.parse_args()
    names = arguments.commands.split(",")
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a command takes it over
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="interruption-") as root:
        place = make_workplace(Path(root), list(dict.fromkeys(name if name in COMMANDS else "onnx" for name in names)))
        kinds = ("clock", "operation", "operation", "disk")
        jobs: dict[str, Callable[[Random, int], str]] = {
            name: lambda random, number, name=name: trial(place, name, random, kinds[number % len(kinds)])
            for name in COMMANDS
        }
        jobs["two at once"] = lambda random, _: two_at_once(place, random)
        jobs["checkpoint replaced"] = lambda random, _: replaced(place, random)
        for name, job in ((name, jobs[name]) for name in names):
            outcomes: Counter[str] = Counter()
            for number in range(arguments.trials):
                seed = arguments.seed + number
                try:
                    outcomes[job(Random(f"{name} {seed}"), number)] += 1
                except (WrongError, InputError) as error:
                    outcomes["WRONG"] += 1
                    say(f"  {name}, seed {seed}: {error}")
            wrong += outcomes["WRONG"]
            counted = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
            say(f"{name}: {sum(outcomes.values())} trials, {outcomes['WRONG']} wrong ({counted})")
    return 1 if wrong else 0


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
