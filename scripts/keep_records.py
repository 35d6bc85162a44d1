"""Keep the small files of finished runs in the repository, so that documents can be generated from them.

python scripts/keep_records.py runs/RUN... --to experiments/quickstart
python scripts/keep_records.py runs/sweeps/table6-... --to experiments/table6/records --replace

Of a sweep's folder the runs of its jobs are kept. With --replace the records that lay there before go.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from permllm.record.outcomes import kept
from permllm.record.store import is_finished

KEPT = ("metrics.json", "config.yaml", "environment.json", "history.jsonl", "figure.png")


def check(run: Path) -> None:
    """Raise SystemExit unless a directory holds a finished run."""
    if not is_finished(run):
        raise SystemExit(f"{run} is not a finished run")


def keep(run: Path, target: Path) -> Path:
    """Copy a finished run's small files to a folder of its own in `target`."""
    folder = target / run.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    return folder


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--to", required=True, type=Path)
    parser.add_argument("--replace", action="store_true", help="remove the records that are there")
    arguments = parser.parse_args()
    runs: list[Path] = []
    for given in arguments.runs:
        jobs = kept(given)
        missing = [f"{' '.join(job.overrides)}: {job.reason}" for job in jobs if not job.directory]
        if missing:
            raise SystemExit(f"{given} is not complete: {'; '.join(missing)}")
        runs += [Path(job.directory or "") for job in jobs] or [given]
    for run in runs:
        check(run)
    if arguments.replace and arguments.to.is_dir():
        for file in arguments.to.glob("*/metrics.json"):
            shutil.rmtree(file.parent)
    for run in runs:
        print(keep(run, arguments.to))


if __name__ == "__main__":
    main()
