"""Table of a sweep, which ends the command."""

from collections.abc import Sequence
from pathlib import Path

from permllm.report.read import collect
from permllm.report.render import print_comparison, print_jobs
from permllm.report.table import Table
from permllm.store.sweep import Outcome, read_outcomes


def print_sweep(folder: Path) -> bool:
    """Print the finished runs of a sweep of several jobs, and all its jobs.

    Returns:
        True: a job has failed.
    """
    jobs = read_outcomes(folder)
    if len(jobs) > 1:
        finished = [Path(job.directory) for job in jobs if job.directory]
        runs = collect(finished).runs if len(finished) > 1 else []
        if len(runs) > 1:
            print_comparison(Table(runs))
        print_jobs(
            [
                (label, job.outcome, job.reason or job.directory or "")
                for label, job in zip(_labels(jobs), jobs, strict=True)
            ]
        )
    return any(job.outcome == "failed" for job in jobs)


def _labels(jobs: Sequence[Outcome]) -> list[str]:
    """Return for each job its overrides without those that all jobs share."""
    shared = set.intersection(*(set(job.overrides) for job in jobs))
    return [" ".join(word for word in job.overrides if word not in shared) for job in jobs]
