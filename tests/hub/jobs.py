"""Several jobs in one process, for tests that need the hub's clients to be imported anew: HF_ENDPOINT is read at import.

`python -m tests.hub.jobs` reads a list of `Job` as JSON from stdin and writes a list of `Outcome`,
the last line of stdout.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

from huggingface_hub import constants

from tests.conftest import ROOT


@dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        overrides: as on the command line.
        environment: variables for it alone.
        copies: files that are copied to other places before it.
        removed: files that are removed before it.
    """

    overrides: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What became of a job: exit code, stdout, and stderr without progress bars."""

    code: int
    output: str
    errors: str


def run_jobs(jobs: list[Job], cwd: Path, **environment: str) -> list[Outcome]:
    """Run jobs one after the other in one new process, with `cwd` as its working directory; it knows no other hub."""
    ours = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING_FACE_", "WANDB_"))
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.hub.jobs"],
        input=json.dumps([asdict(job) for job in jobs]),
        cwd=cwd,
        env=ours
        | {"PYTHONPATH": os.pathsep.join((os.environ.get("PYTHONPATH", ""), str(ROOT)))}
        | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [Outcome(**outcome) for outcome in json.loads(result.stdout.splitlines()[-1])]


def _run(job: Job) -> Outcome:
    from hydra import compose, initialize_config_dir

    from permllm.cli import Session

    for source, target in job.copies.items():
        shutil.copyfile(source, target)
    for name in job.removed:
        Path(name).unlink()
    os.environ |= job.environment
    output, errors = io.StringIO(), io.StringIO()
    session = Session()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
                composed = compose("config", overrides=job.overrides)
            session.job(composed)
            code = session.close()
        except Exception:
            traceback.print_exc()
            code = 1
    for name in job.environment:
        del os.environ[name]
    lines = errors.getvalue().split("\n")
    return Outcome(
        code, output.getvalue(), "\n".join(line for line in lines if not line.startswith("\r"))
    )


def main() -> None:
    """The process of `run_jobs`."""
    time.sleep = lambda seconds: None  # the clients wait between attempts
    constants.DOWNLOAD_CHUNK_SIZE = 1000  # what is kept of a body that breaks; our files are small
    outcomes = [_run(Job(**job)) for job in json.loads(sys.stdin.read())]
    print(json.dumps([asdict(outcome) for outcome in outcomes]))


if __name__ == "__main__":
    main()
