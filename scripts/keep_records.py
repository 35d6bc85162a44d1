"""Keep the small files of finished runs in the repository, so that documents can be generated from them.

python scripts/keep_records.py runs/RUN... --to experiments/quickstart
python scripts/keep_records.py runs/sweeps/table6-... --to experiments/table6/records

Of a sweep's folder the runs of its jobs are kept, and those that lay there before go.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from permllm.sweep import kept

KEPT = ("metrics.json", "config.yaml", "environment.json", "history.jsonl", "figure.png")


def keep(run: Path, target: Path) -> Path:
    """Copy a finished run's small files to a folder of its own in `target`.

    Raises:
        SystemExit: the run is not finished.
    """
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    if metrics["status"] != "finished":
        raise SystemExit(f"{run} is not finished")
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
    arguments = parser.parse_args()
    for given in arguments.runs:
        jobs = kept(given)
        if jobs:
            shutil.rmtree(arguments.to, ignore_errors=True)
        for run in [Path(job.directory) for job in jobs if job.directory] or [given]:
            print(keep(run, arguments.to))


if __name__ == "__main__":
    main()
