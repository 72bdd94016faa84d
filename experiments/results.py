"""Running over seeds, and writing what came out."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

__all__ = ["RESULTS", "in_parallel", "options", "spread", "write_json"]

RESULTS = Path(__file__).parent / "results"
EPOCHS = 30

Job = TypeVar("Job")
Result = TypeVar("Result")


def options(seeds: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``--seeds``, ``--epochs``, ``--workers`` and ``--folder``, which every experiment with training has."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        for option in (
            click.option(
                "--folder", type=click.Path(path_type=Path), default=RESULTS, show_default="experiments/results"
            ),
            click.option("--workers", type=click.IntRange(1), default=os.cpu_count() or 1, help="Default: every core."),
            click.option("--epochs", type=click.IntRange(1), default=EPOCHS, show_default=True),
            click.option("--seeds", type=click.IntRange(2), default=seeds, show_default=True),
        ):
            function = option(function)
        return function

    return add


def in_parallel(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """Results in the order of the jobs, each process with one thread so that results do not depend on the machine."""
    if workers == 1:
        torch.set_num_threads(1)
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done, result in enumerate(pool.map(function, jobs), start=1):
            print(f"{done} of {len(jobs)}", flush=True)
            yield result


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Mean and sample standard deviation, in percent, of shares; and the shares in percent."""
    percent = [round(100 * value, 3) for value in values]
    return {
        "mean": round(statistics.mean(percent), 3),
        "deviation": round(statistics.stdev(percent), 3),
        "values": percent,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(path.name)
