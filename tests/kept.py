"""Records that are kept in the repository, as plain values and as the folders that runs of earlier versions left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from permllm.runs.files import read_record_lines
from permllm.runs.schema import KeptRecord
from tests.conftest import ROOT

EXPERIMENTS = ROOT / "experiments"
# No permutation, the heuristic, LCP: of a version before checksums.
THREE_RUNS = ROOT / "tests" / "three_runs"


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of records, each as it was written."""
    found = []
    for _, line in read_record_lines(file, KeptRecord):
        assert not isinstance(line, Exception), line
        found.append(dict(line))
    return found


def as_folder(line: dict[str, Any], parent: Path) -> Path:
    """The small files of the run directory that a line is of."""
    folder = parent / line["run"]
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(line["config"]))
    for name in ("metrics", "environment"):
        (folder / f"{name}.json").write_text(json.dumps(line[name]))
    if "history" in line:
        (folder / "history.jsonl").write_text("\n".join(map(json.dumps, line["history"])))
    return folder
