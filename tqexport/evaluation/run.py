"""An evaluation from a project and patterns of data to counts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from tqexport.artifacts.project import Project
from tqexport.errors import InputError
from tqexport.evaluation.counts import Counts
from tqexport.evaluation.engine import ATTEMPTS, Failed, Work, evaluate_shards, workers
from tqexport.evaluation.journal import Journal
from tqexport.evaluation.result import Evaluation
from tqexport.evaluation.shards import SampleFormat, Shard, find_shards
from tqexport.evaluation.subjects import subjects_of
from tqexport.files import remove_folders_of_dead_runs

__all__ = ["evaluate"]


def evaluate(
    project: Project,
    widths: Sequence[int],
    patterns: Iterable[str],
    runtimes: Collection[str] = (),
    *,
    count: int | None = None,
    scheduler: str | None = None,
    journal: Path | None = None,
    advance: Callable[[int, int, int], object] = lambda *_: None,
) -> Evaluation:
    """Run every artifact of a project on data in shards, and count.

    Processes of this machine import the module that was started, so a script calls it below
    ``if __name__ == "__main__"``.

    Args:
        project: A checkpoint and its exports.
        widths: The widths.
        patterns: The data; see :func:`tqexport.evaluation.shards.find_shards`.
        runtimes: Evaluate in these alone; see :func:`tqexport.evaluation.subjects.subjects_of`.
        count: Processes of this machine; None for one per core.
        scheduler: Address of a Dask scheduler whose workers to use instead.
        journal: File that keeps the counts of each shard, and gives those that it has.
        advance: Called with the number of shards done, of all shards, and of the samples counted in this run.

    Raises:
        InputError: A checkpoint, artifact or shard is damaged, or does not fit the network. Other shards are done
            before, and are kept in the journal.
        UsageError: No file runs in any of ``runtimes``, or the journal is of another evaluation.
        HostError: A package is missing, processes of this machine do not start, or the scheduler does not answer.
    """
    remove_folders_of_dead_runs()  # with the keys of their workers, also where nothing is left to count
    info = project.model.info
    taken = SampleFormat(info.signature, info.normalization, tuple(info.class_names))
    shards = find_shards(patterns, taken)
    subjects, delivery = subjects_of(project, widths, runtimes)
    kept = None if journal is None else Journal(journal, subjects)
    before = {} if kept is None else kept.done
    counts, failed, samples = Counts(len(subjects)), list[tuple[Shard, Failed]](), 0
    finished = [shard for shard in shards if shard.key in before]
    for shard in finished:
        counts.merge(before[shard.key])
    left = [shard for shard in shards if shard.key not in before]
    ended = len(finished)
    advance(ended, len(shards), samples)

    def done(shard: Shard, result: Counts | Failed) -> None:
        nonlocal ended, samples
        ended += 1
        if isinstance(result, Failed):
            failed.append((shard, result))
        else:
            if kept is not None:
                kept.keep(shard.key, result)
            counts.merge(result)
            samples += result.samples
        advance(ended, len(shards), samples)

    if left:
        with workers(scheduler, count if count is None else min(count, len(left))) as client:
            evaluate_shards(client, Work(tuple(subjects), delivery.sha256, taken), delivery, left, done)
    if failed:
        shard, first = min(failed, key=lambda pair: pair[0].name)
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        rest = f"; the other {len(shards) - len(failed)} shards are in {journal}" if journal else ""
        raise InputError(f"{shard.name}{others} failed {ATTEMPTS} times: {first.reason}{rest}")
    return Evaluation(project.checkpoint.name, subjects, len(shards), counts)
