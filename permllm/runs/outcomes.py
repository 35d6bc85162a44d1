"""What became of the jobs of a sweep: a file of each in the sweep's folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from permllm.errors import DataError
from permllm.runs.files import read_json
from permllm.runs.schema import SweepJob

# The folder of the files.
JOBS = "jobs"


@dataclass
class Outcome:
    """What became of one job.

    Attributes:
        overrides: what was typed for it.
        outcome: `ran`, `skipped` (it was finished already, or another process runs it) or `failed`.
        reason: why it failed, or is run elsewhere.
        directory: of a finished run.
    """

    overrides: list[str]
    outcome: str
    reason: str = ""
    directory: str | None = None


def kept(folder: Path, since: float = 0.0) -> list[Outcome]:
    """The outcomes in a sweep's folder, in the order of the jobs; those that cannot be read are left out.

    Args:
        folder: of the sweep.
        since: seconds since the epoch; outcomes that are older are left out.
    """
    return [job for file, job in kept_files(folder) if file.stat().st_mtime >= since]


def kept_files(folder: Path) -> list[tuple[Path, Outcome]]:
    """The outcomes in a sweep's folder, each with its file, as `kept` has them."""
    found = []
    for file in sorted((folder / JOBS).glob("*.json")):
        try:
            read = read_json(file, SweepJob)
        except DataError:
            continue
        job = Outcome(read["overrides"], read["outcome"], read.get("reason", ""), read.get("directory"))
        if job.directory is not None:
            job.directory = os.path.normpath(folder / job.directory)
        found.append((file, job))
    return found
