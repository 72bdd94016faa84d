"""What tqexport evaluate costs besides the runtimes: time that no worker computes in, and memory over many samples.

    python benchmarks/evaluation.py                  shards of a second, 100,000 samples
    python benchmarks/evaluation.py --seconds 0.2    shorter shards

The digits network at eight widths in onnxruntime, on the bundled samples over and over. The share that is lost is of
the time of all workers, from the first shard to the last result; in it Dask's task stream says how long each shard took
in its worker. Starting workers and opening files is measured apart. Memory is resident, of the workers and of the
processes in which they run artifacts.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np
import psutil
from distributed import get_task_stream

from tqexport import ReadOptions
from tqexport.artifacts.project import open_project
from tqexport.evaluation.counts import Counts
from tqexport.evaluation.engine import Failed, Work, evaluate_shards, workers
from tqexport.evaluation.shards import SampleFormat, Shard, find_shards
from tqexport.evaluation.subjects import subjects_of

FIXTURES = Path(__file__).parents[1] / "fixtures"
GOAL = 0.05


@click.command(help=__doc__)
@click.option("--seconds", type=float, default=1.0, show_default=True, help="That a shard takes.")
@click.option("--samples", type=int, default=100_000, show_default=True, help="Over all shards, at least.")
@click.option("--workers", "counts", type=int, multiple=True, default=(1, 2), help="Default: 1 and then 2.")
def main(seconds: float, samples: int, counts: tuple[int, ...]) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        for count in counts:
            measure(Path(name) / str(count), count, seconds, samples)


def measure(folder: Path, count: int, seconds: float, samples: int) -> None:
    """One run with a number of workers."""
    folder.mkdir()
    with np.load(FIXTURES / "digits-test.npz") as data:
        inputs, labels = data["inputs"], data["labels"]
    project = open_project(FIXTURES / "digits-resnet8.pt", folder / "out", ReadOptions())
    subjects, delivery = subjects_of(project, range(1, 9), ["onnxruntime"])
    taken = SampleFormat(project.model.info.signature, project.model.info.normalization, ())
    work = Work(tuple(subjects), delivery.sha256, taken)

    def write(name: str, times: int) -> Shard:
        np.savez(folder / f"{name}.npz", inputs=np.tile(inputs, (times, 1, 1, 1)), labels=np.tile(labels, times))
        (shard,) = find_shards([str(folder / f"{name}.npz")], taken)
        return shard

    first, second = write("first", 1), write("second", 4)
    start = time.perf_counter()
    with workers(None, count) as client:
        evaluate_shards(client, work, delivery, [first] * count, lambda *_: None)
        started = time.perf_counter() - start
        one = tasks_of(client, work, delivery, [second])[0] / (4 * len(inputs))  # seconds a sample
        times = max(1, round(seconds / one / len(inputs)))
        shards = [write(str(number), times) for number in range(max(10 * count, -(-samples // (times * len(inputs)))))]
        memory: list[int] = []
        total = Counts(len(subjects))

        def done(_: Shard, result: Counts | Failed) -> None:
            assert isinstance(result, Counts), result
            total.merge(result)
            memory.append(resident(client))

        start = time.perf_counter()
        taken_seconds = tasks_of(client, work, delivery, shards, done)
        wall = time.perf_counter() - start
    lost = 1 - sum(taken_seconds) / (count * wall)
    half = len(memory) // 2
    print(
        f"{count} workers, {len(shards)} shards of {np.median(taken_seconds):.2f} s, {total.samples:,} samples, "
        f"{8 * total.samples / wall:,.0f} answers a second: lost {100 * lost:.1f} % (goal {100 * GOAL:.0f} %); "
        f"start {started:.1f} s; memory {memory[0] >> 20} MiB after the first shard, at most "
        f"{max(memory[:half]) >> 20} in the first half and {max(memory[half:]) >> 20} in the second, "
        f"{max(memory[half:]) / max(memory[:half]):.3f} times",
        flush=True,
    )


def tasks_of(client, work, delivery, shards, done=lambda *_: None) -> list[float]:  # noqa: ANN001
    """Evaluate shards; the seconds that each took in its worker."""
    with get_task_stream(client) as stream:
        evaluate_shards(client, work, delivery, shards, done)
        time.sleep(0.1)  # the stream is behind
    return [
        part["stop"] - part["start"]
        for task in stream.data
        for part in task["startstops"]
        if part["action"] == "compute" and "_tried" in str(task["key"])
    ]


def resident(client) -> int:  # noqa: ANN001
    """Bytes of all workers and of the processes that they started."""
    return sum(client.run(_resident).values())


def _resident() -> int:
    process = psutil.Process()
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))


if __name__ == "__main__":
    main()
