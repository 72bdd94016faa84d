"""Real workers: what they count is what the runtimes give, also where one is killed or cannot read a shard."""

import io
import multiprocessing
import os
import signal
import sys
import tempfile

import numpy as np
import pytest
from distributed import LocalCluster
from places import DIGITS_DATA

from tqexport import ReadOptions
from tqexport.artifacts.project import open_project
from tqexport.backends import open_runner
from tqexport.errors import HostError
from tqexport.evaluation import engine
from tqexport.evaluation.counts import Counts
from tqexport.evaluation.engine import Failed, Work, evaluate_shards, workers
from tqexport.evaluation.run import evaluate
from tqexport.evaluation.shards import SampleFormat, Shard, find_shards
from tqexport.evaluation.subjects import subjects_of
from tqexport.verification.classes import classes_of

WIDTHS, PARTS = (2, 8), 15


@pytest.fixture(scope="module")
def client():
    with workers(None, 2) as opened:
        yield opened


@pytest.fixture(scope="module")
def project(exported_once):
    return open_project(exported_once / "out", None, ReadOptions())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with np.load(DIGITS_DATA) as whole:
        for number in range(PARTS):
            rows = slice(30 * number, 30 * number + 30)
            np.savez(folder / f"{number:02}.npz", inputs=whole["inputs"][rows], labels=whole["labels"][rows])
    return folder


@pytest.fixture(scope="module")
def task(project, data):
    """Work, what is delivered for it, and the shards."""
    taken = SampleFormat(project.model.info.signature, project.model.info.normalization, ())
    subjects, delivery = subjects_of(project, WIDTHS, ())
    return Work(tuple(subjects), delivery.sha256, taken), delivery, find_shards([str(data)], taken)


@pytest.fixture(scope="module")
def expected(project, digits_samples):
    """The counts that the runtimes give in this process."""
    outputs = [
        [classes_of(output) for output in open_runner(content).run_untouched((digits_samples.inputs,))]
        for bits in WIDTHS
        for _, content in project.artifacts([bits])
    ]
    counts = Counts(len(outputs))
    counts.add(outputs, digits_samples.labels)
    return counts.record()


def total(client, task, shards=None, hook=lambda _: None):
    work, delivery, every = task
    counts, failed = Counts(len(work.subjects)), []

    def done(shard, result):
        hook(shard)
        if isinstance(result, Failed):
            failed.append((shard, result))
        else:
            counts.merge(result)

    evaluate_shards(client, work, delivery, every if shards is None else shards, done)
    return counts.record(), failed


def test_workers_count_what_the_runtimes_give(client, task, expected):
    assert [subject.title for subject in task[0].subjects] == ["onnxruntime", "LiteRT XNNPACK"] * 2
    assert total(client, task) == (expected, [])


def test_a_worker_that_is_killed_loses_nothing(client, task, expected):
    killed = []

    def kill_one(_):
        if not killed:
            killed.append(next(iter(client.run(os.getpid).values())))
            os.kill(killed[0], signal.SIGKILL)

    assert total(client, task, hook=kill_one) == (expected, [])
    client.wait_for_workers(2, timeout=30)
    assert killed[0] not in client.run(os.getpid).values()


def test_a_shard_that_one_worker_cannot_read_is_done_by_another(client, task, digits_samples):
    stream = io.BytesIO()
    np.savez(stream, inputs=digits_samples.inputs[:5], labels=digits_samples.labels[:5])
    client.wait_for_workers(2, timeout=30)
    address = next(iter(client.nthreads()))
    client.run(put_in_memory, stream.getvalue(), workers=[address])  # each process has a memory of its own
    shards = [Shard(f"part {number}", ("memory://only-here/a.npz",), (), f"{number}") for number in range(4)]
    counts, failed = total(client, task, shards)
    assert (counts["samples"], failed) == (20, [])


def put_in_memory(content):
    import fsspec

    fsspec.filesystem("memory").pipe("/only-here/a.npz", content)


def test_a_shard_that_nobody_can_read_is_given_up_with_its_reason(client, task):
    missing = Shard("gone", ("memory://nowhere/a.npz",), (), "0")
    counts, ((shard, failed),) = total(client, task, [missing, *task[2][:2]])
    assert (counts["samples"], shard) == (60, missing)
    assert "memory://nowhere/a.npz" in failed.reason


def test_an_evaluation_goes_on_where_another_ended(project, data, tmp_path, expected, monkeypatch):
    steps, journal = [], tmp_path / "journal"
    first = evaluate(project, WIDTHS, [f"{data}/0*.npz"], count=1, journal=journal)
    assert first.counts.samples == 300
    whole = evaluate(
        project, WIDTHS, [str(data)], count=2, journal=journal, advance=lambda *numbers: steps.append(numbers)
    )
    assert whole.counts.record() == expected
    assert steps[0] == (10, PARTS, 0)
    assert steps[-1] == (PARTS, PARTS, 150)
    left_by_a_dead_run = tmp_path / "tqexport.tmp.01234567"
    left_by_a_dead_run.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    again = evaluate(project, WIDTHS, [str(data)], scheduler="nothing is asked", journal=journal)
    assert again.document() == whole.document()
    assert not left_by_a_dead_run.exists()


def test_workers_that_do_not_start_are_an_error_of_the_machine(project, data):
    multiprocessing.set_executable("/bin/false")  # as where the system ends what is started
    try:
        with pytest.raises(HostError, match=r"worker processes do not start on this machine .*fewer with --workers"):
            evaluate(project, [2], [str(data)], count=1)
    finally:
        multiprocessing.set_executable(sys.executable)


def test_a_scheduler_with_workers_of_its_own(project, data, tmp_path, monkeypatch):
    with LocalCluster(n_workers=1, threads_per_worker=2, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        address = cluster.scheduler_address
        found = evaluate(project, [2], [str(data)], ["onnxruntime", "pytorch"], scheduler=address)
        assert [subject.title for subject in found.subjects] == ["onnxruntime", "PyTorch"]
        assert found.counts.agreeing.tolist() == [[450, 450], [450, 450]]
        monkeypatch.setattr(engine, "versions", lambda _: {"tqexport": "9.9"})
        with pytest.raises(HostError, match=r"the worker .* has .*, not tqexport 9\.9; install it there"):
            evaluate(project, [2], [str(data)], scheduler=address)
    monkeypatch.setattr(engine, "_CONNECT", 1)
    with pytest.raises(HostError, match=f"no Dask scheduler answers at {address}"):
        evaluate(project, [2], [str(data)], scheduler=address)
