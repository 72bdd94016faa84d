"""Every benchmark can be started: none is left behind when what it measures moves."""

import runpy
from pathlib import Path

import pytest
from click.testing import CliRunner

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_starts(path):
    done = CliRunner().invoke(runpy.run_path(str(path))["main"], ["--help"])
    assert done.exit_code == 0, done.output
    assert "Options:" in done.output
