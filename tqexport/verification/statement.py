"""What ``verify`` compared and what came of it, as a statement that release tools sign and check.

The format is in-toto's Statement v1 (https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md) with the
predicate test-result v0.1 (spec/predicates/test-result.md there). It is not signed: that is for whoever vouches for it.
Details that the predicate has no words for are in an extension field, named by a URI as the format asks.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqexport.artifacts.project import Project
from tqexport.errors import HostError, UsageError
from tqexport.files import ensure_folder, sha256_of
from tqexport.model import TruncModel
from tqexport.verification.comparison import Verdict
from tqexport.verification.run import Checked
from tqexport.verification.samples import Samples
from tqexport.versions import COMPARING, versions

__all__ = ["prepare_statement", "render_statement"]

STATEMENT = "https://in-toto.io/Statement/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
DETAILS = "urn:tqexport:parity:v1"


def prepare_statement(path: Path) -> None:
    """Make sure that a statement can be written, before any slow work, and remove one of an earlier run.

    Whatever ends the run, no statement of then is taken for one of now.

    Raises:
        UsageError: The file is there and is no statement.
        HostError: It cannot be written.
    """
    ensure_folder(path.parent)
    if not path.exists():
        return
    try:
        known = json.loads(path.read_bytes())["_type"] == STATEMENT
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        known = False
    if not known:
        raise UsageError(f"{path} is there and is no statement of an earlier run; name another file with --attest")
    try:
        path.unlink()
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror or error}") from error


def render_statement(
    project: Project, checked: Sequence[Checked], samples: Samples, data: Path | None, runtimes: Sequence[str]
) -> bytes:
    """The statement as JSON, UTF-8; the same results give the same bytes.

    Args:
        project: What was verified.
        checked: The results.
        samples: What was compared on.
        data: The file or folder that they were read from, if they were.
        runtimes: The runtimes that the comparison was limited to; empty where it was not.
    """
    names = {state: [_name(check) for check in checked if _state(check) == state] for state in _STATES}
    result = next(state for state in reversed(_STATES) if names[state] or state == _STATES[0])
    sizes = {(check.file, check.sha256): check.bytes for check in checked}
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": file, "digest": {"sha256": sha256}} for file, sha256 in sizes],
        "predicateType": TEST_RESULT,
        "predicate": {
            "result": result,
            "configuration": _configuration(project, samples, data),
            **{f"{state.lower()}Tests": names[state] for state in _STATES},
            DETAILS: {
                "checkpoint": _checkpoint(project, project.model),
                "samples": {"description": samples.description, "count": len(samples), "sha256": samples.sha256},
                "runtimes": list(runtimes) or "all that are installed, but programs of their own",
                "versions": versions(COMPARING),
                "machine": _machine(),
                "results": [_result(check) for check in checked],
            },
        },
    }
    return (json.dumps(_plain(statement), indent=2, allow_nan=False) + "\n").encode()


_STATES = ("PASSED", "WARNED", "FAILED")  # from good to bad


def _state(check: Checked) -> str:
    """The result of one comparison; a warning says that its parameters were not compared."""
    if not check.passed:
        return "FAILED"
    return "PASSED" if check.proved else "WARNED"


def _name(check: Checked) -> str:
    """What a policy looks for: which file, at which width, in which runtime."""
    return f"{check.file} at {check.bits} bits in {check.runtime}"


def _configuration(project: Project, samples: Samples, data: Path | None) -> list[dict[str, Any]]:
    """What the artifacts were compared with and on, each with its hash."""
    described = [
        {"name": project.checkpoint.name, "digest": {"sha256": project.model.sha256}},
        {"name": "samples", "digest": {"sha256": samples.sha256}, "annotations": {"description": samples.description}},
    ]
    if data is not None and data.is_file():
        described.append({"name": data.name, "digest": {"sha256": sha256_of(data)}})
    return described


def _checkpoint(project: Project, model: TruncModel) -> dict[str, Any]:
    """Which checkpoint it was, and how it was read."""
    return {
        "file": project.checkpoint.name,
        "sha256": model.sha256,
        "architecture": model.info.architecture,
        "scheme": asdict(model.info.scheme),
        "options": project.options.given(),
    }


def _machine() -> dict[str, str]:
    """Where it ran, as far as results may depend on it."""
    import torch

    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _result(check: Checked) -> dict[str, Any]:
    """One comparison: verdicts, differences, and the bounds that they were held against."""

    def entry(verdict: Verdict) -> dict[str, Any]:
        return {"passed": verdict.passed, **asdict(verdict)}

    return {
        "artifact": check.file,
        "sha256": check.sha256,
        "bits": check.bits,
        "runtime": check.runtime,
        "exported_for_this_check_alone": check.temporary,
        "result": _state(check),
        "diverged": check.diverged,
        "problems": list(check.problems),
        "as_deployed": entry(check.deployed),
        "unoptimized": entry(check.unoptimized),
    }


def _plain(value: Any) -> Any:
    """The same with numbers that JSON lacks (NaN, infinity) as words."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
