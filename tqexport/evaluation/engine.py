"""Shards over workers: Dask carries tasks and files, what it does when a worker is lost is its own affair.

A task is a shard; what comes back are its counts. Files go to each worker once, under their hash, also to workers that
come later. A shard that fails is tried on other workers before it is given up.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import dask
from distributed import Client, LocalCluster, WorkerPlugin, as_completed, get_worker
from distributed.client import FutureCancelledError

from tqexport.errors import HostError, InputError, TqExportError, first_line, said_in_a_line
from tqexport.evaluation.counts import Counts
from tqexport.evaluation.shards import SampleFormat, Shard, read_shard
from tqexport.evaluation.subjects import Delivery, Subject, open_subject
from tqexport.files import temporary_files_in, temporary_folder
from tqexport.reading.apart import Apart
from tqexport.verification.classes import classes_of
from tqexport.versions import versions

if TYPE_CHECKING:
    from distributed import Future

    from tqexport.backends.running import Array, Batch

__all__ = ["ATTEMPTS", "Failed", "Work", "evaluate_shards", "workers"]

ATTEMPTS = 3  # of a shard, each on another worker while there are others
_AT_ONCE = 64  # samples that a runtime gets
_NUMBERS = 4_000_000  # of them all, so that large samples go through in smaller numbers
_CONNECT, _WAIT = 15, 60  # seconds for a scheduler to answer, and for its first worker
_AHEAD = 2  # shards that wait for each thread of the workers


@dataclass(frozen=True)
class Work:
    """What is done with each shard.

    Attributes:
        subjects: What is evaluated.
        delivery: Hash of the :class:`Delivery` with its files.
        taken: What the network takes.
    """

    subjects: tuple[Subject, ...]
    delivery: str
    taken: SampleFormat

    @property
    def at_once(self) -> int:
        """How many samples a runtime gets at once."""
        return max(1, min(_AT_ONCE, _NUMBERS // sum(prod(info.shape) for info in self.taken.signature)))


@dataclass(frozen=True)
class Failed:
    """A shard that could not be evaluated.

    Attributes:
        worker: Address of the worker that tried last, as far as it is known.
        reason: What was wrong, one sentence.
    """

    worker: str
    reason: str


# On the worker.

_deliveries: dict[str, Delivery] = {}
_opened: dict[int, _Opened] = {}  # by thread


@dataclass(frozen=True)
class _Opened:
    """The subjects of a piece of work, open in their runtimes for one thread."""

    work: Work
    apart: Apart
    runs: list[Callable[[Batch], list[Array]]]


class _Deliver(WorkerPlugin):  # type: ignore[misc] # Dask is untyped
    """Gives a worker the files before its first task; Dask keeps it for workers that come later."""

    idempotent = True  # files that are there are not sent again

    def __init__(self, delivery: Delivery) -> None:
        self.name, self._delivery = _plugin(delivery.sha256), delivery

    def setup(self, worker: object) -> None:  # noqa: ARG002 - Dask calls it so
        """Keep them."""
        _deliveries[self._delivery.sha256] = self._delivery

    def teardown(self, worker: object) -> None:  # noqa: ARG002 - Dask calls it so
        """Forget them, and end what runs them."""
        _deliveries.pop(self._delivery.sha256, None)
        for thread, opened in list(_opened.items()):
            if opened.work.delivery == self._delivery.sha256:
                opened.apart.close()
                del _opened[thread]


def _plugin(delivery: str) -> str:
    return f"tqexport-{delivery}"


def count_shard(work: Work, shard: Shard) -> Counts:
    """Evaluate a shard in this process.

    Raises:
        TqExportError: A file of it, or of what is evaluated, is refused, or a package is missing.
    """
    runs = _runs(work)
    counts = Counts(len(runs))
    for samples in read_shard(shard, work.taken, work.at_once):
        counts.add([[classes_of(output) for output in run(samples.inputs)] for run in runs], samples.labels)
    return counts


def _runs(work: Work) -> list[Callable[[Batch], list[Array]]]:
    """The subjects open in their runtimes, for this thread alone and one piece of work at a time."""
    thread = threading.get_ident()
    if thread not in _opened or _opened[thread].work != work:
        if former := _opened.pop(thread, None):
            former.apart.close()
        apart, delivery = Apart(), _deliveries[work.delivery]
        _opened[thread] = _Opened(work, apart, [open_subject(subject, delivery, apart) for subject in work.subjects])
    return _opened[thread].runs


def _tried(work: Work, shard: Shard) -> Counts | Failed:
    """As a task: the counts of a shard, or why there are none."""
    try:
        return count_shard(work, shard)
    except TqExportError as error:
        return Failed(get_worker().address, str(error))
    except Exception as error:
        return Failed(get_worker().address, f"internal error, {type(error).__name__}: {error}")


def _own_versions() -> Mapping[str, str]:
    """As a task: what the worker has of tqexport."""
    return versions(())


# On the machine that asks.


@contextmanager
def workers(scheduler: str | None, count: int | None) -> Iterator[Client]:
    """A Dask client: of a cluster of this machine that lives as long as the block, or of a scheduler that is there.

    Args:
        scheduler: Address of a scheduler, e.g. ``tcp://host:8786``; None for this machine.
        count: How many processes of this machine work, each on one thread; None for as many as it has cores.

    Raises:
        HostError: Dask is missing, workers of this machine do not start, or the scheduler does not answer, has no
            worker, or workers without this tqexport.
    """
    logging.getLogger("distributed").propagate = False  # it has handlers of its own
    if scheduler is None:
        import cryptography  # noqa: F401 - which makes the keys, and Dask says less well that it is missing

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with (
            temporary_folder() as folder,
            temporary_files_in(folder),
            dask.config.set({"temporary-directory": str(folder)}),
            _cluster(count or cores) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            yield client
        return
    try:
        client = Client(scheduler, timeout=_CONNECT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise HostError(f"no Dask scheduler answers at {scheduler}: {error}") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_WAIT)
            theirs = client.run(_own_versions, on_error="return")
        except TimeoutError as error:
            raise HostError(f"the scheduler at {scheduler} has no workers; start some with dask worker") from error
        for address, said in theirs.items():
            if said != _own_versions():
                has = said if isinstance(said, Exception) else ", ".join(f"{k} {v}" for k, v in said.items())
                needed = ", ".join(f"{k} {v}" for k, v in _own_versions().items())
                raise HostError(f"the worker {address} has {has}, not {needed}; install it there")
        yield client


def _cluster(count: int) -> LocalCluster:
    """Processes of this machine that work, started."""
    try:
        # Whoever reaches a port of a cluster can run what he likes, so the ports of this one take its own keys alone.
        return LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            host="127.0.0.1",
            protocol="tls://",
            security=True,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        )
    except RuntimeError as error:  # whatever kept a worker from starting, Dask raises this one
        raise HostError(
            f"worker processes do not start on this machine ({first_line(error)}); it may lack memory: try fewer with "
            "--workers"
        ) from error


def evaluate_shards(
    client: Client,
    work: Work,
    delivery: Delivery,
    shards: Sequence[Shard],
    done: Callable[[Shard, Counts | Failed], object],
) -> None:
    """Evaluate shards on the workers of a client.

    Args:
        client: See :func:`workers`.
        work: What to do with each.
        delivery: The files for it.
        shards: The shards.
        done: Called with each shard and its counts, or with why there are none, in the order in which they come.

    Raises:
        HostError: The scheduler is gone.
    """
    client.register_plugin(_Deliver(delivery))
    waiting = iter(shards)
    running: dict[Future, tuple[Shard, list[str]]] = {}
    completed = as_completed(loop=client.loop)

    def submit(shard: Shard, tried: list[str]) -> None:
        others = [address for address in client.nthreads() if address not in tried] if tried else []
        place = {"workers": others, "allow_other_workers": True} if others else {}
        future = client.submit(_tried, work, shard, pure=False, **place)
        running[future] = shard, tried
        completed.add(future)

    def refill() -> None:
        for shard in waiting:
            submit(shard, [])
            if len(running) >= _AHEAD * sum(client.nthreads().values()):
                break

    try:
        refill()
        for future in completed:
            shard, tried = running.pop(future)
            result = _result_of(future)
            future.release()
            if isinstance(result, Failed) and len(tried) + 1 < ATTEMPTS:
                submit(shard, [*tried, result.worker])
            else:
                done(shard, result)
            refill()
    except (FutureCancelledError, OSError) as error:
        raise HostError(f"the scheduler of the workers is gone ({error})") from error
    finally:
        client.cancel(list(running))
        client.unregister_worker_plugin(_plugin(work.delivery))


def _result_of(future: Future) -> Counts | Failed:
    """What a task gave; a worker that ended again and again, or does not know the task, fails it."""
    error = future.exception()
    if error is None:
        result = future.result()
        if not isinstance(result, Counts | Failed):
            raise InputError("a worker answers what no worker answers")
        return result
    return Failed("", said_in_a_line(error))
