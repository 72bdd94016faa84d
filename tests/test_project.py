"""The files about the project say the same thing."""

from __future__ import annotations

import re
import tomllib

import yaml
from places import ROOT


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert yaml.safe_load(read("CITATION.cff"))["version"] == version
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[1].rstrip(",") == version


def test_a_commit_runs_what_make_lint_runs():
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"  # nothing is downloaded, so the versions are those of constraints.txt
    assert [hook["entry"] for hook in repository["hooks"]] == ["make lint"]


def test_the_workflow_calls_targets_that_exist():
    targets = {*re.findall(r"^([\w-]+):(?!=)", read("Makefile"), re.MULTILINE)}
    jobs = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"]
    called = [step["run"].split() for job in jobs.values() for step in job["steps"] if "run" in step]
    assert len(called) == 3
    for command, *arguments in called:
        assert command == "make"
        assert {argument for argument in arguments if "=" not in argument} <= targets


def test_every_dependency_is_pinned():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in read("constraints.txt").splitlines()}
    names = {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in wanted} - {"tqexport"}
    assert names - pinned == set()
