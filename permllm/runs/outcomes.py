"""Outcomes of the jobs of a sweep: a JSON file of each in the sweep's folder."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from permllm.runs.files import write_json

# The folder of the files.
JOBS = "jobs"


@dataclass
class Outcome:
    """Outcome of one job.

    Attributes:
        overrides: the words that were typed for it.
        outcome: `ran`, `skipped` (it was finished already, or another process runs it) or `failed`.
        reason: why it failed, or is run elsewhere.
        directory: of a finished run.
    """

    overrides: list[str]
    outcome: str
    reason: str = ""
    directory: str | None = None


def keep(job: Outcome, folder: Path, number: int) -> None:
    """Write the outcome of the job `number` into the sweep's folder.

    The run directory is written relative to that folder, so that all of it can be moved.
    """
    directory = None if job.directory is None else os.path.relpath(job.directory, folder)
    write_json(_file(folder, number), asdict(job) | {"directory": directory})


def forget(folder: Path, number: int) -> None:
    """Remove the outcome that a job had before."""
    _file(folder, number).unlink(missing_ok=True)


def _file(folder: Path, number: int) -> Path:
    return folder / JOBS / f"{number:04d}.json"


def kept(folder: Path) -> list[Outcome]:
    """Read the outcomes in a sweep's folder, in the order of the jobs; unreadable files are left out."""
    found = []
    for file in sorted((folder / JOBS).glob("*.json")):
        try:
            job = Outcome(**json.loads(file.read_text(encoding="utf-8")))
            if job.directory is not None:
                job.directory = os.path.normpath(folder / job.directory)
            found.append(job)
        except (OSError, ValueError, TypeError):
            continue
    return found
