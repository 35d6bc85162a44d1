"""Outcomes of the jobs of a sweep: a JSON file of each in the sweep's folder."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from permllm.runs.files import write_json


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


def file_of(folder: Path, number: int) -> Path:
    """Return the file of a job in the sweep's folder."""
    return folder / "jobs" / f"{number:04d}.json"


def keep(job: Outcome, folder: Path, number: int) -> None:
    """Write an outcome, with the run directory relative to the sweep's folder, so that all of it can be moved."""
    directory = None if job.directory is None else os.path.relpath(job.directory, folder)
    write_json(file_of(folder, number), asdict(job) | {"directory": directory})


def kept(folder: Path) -> list[Outcome]:
    """Read the outcomes in a sweep's folder, in the order of the jobs; unreadable files are left out."""
    found = []
    for file in sorted(folder.glob("jobs/*.json")):
        try:
            job = Outcome(**json.loads(file.read_text(encoding="utf-8")))
            if job.directory is not None:
                job.directory = os.path.normpath(folder / job.directory)
            found.append(job)
        except (OSError, ValueError, TypeError):
            continue
    return found
