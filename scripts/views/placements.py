"""The view of what runs take by where the weights waited: memory beside the plan, and seconds beside `device`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from permllm.errors import DataError
from permllm.runs.cost import method_of
from permllm.runs.names import RECORDS
from permllm.runs.read import Run, collect
from permllm.runs.render import as_text
from scripts.views.tables import machine


def placements(folder: Path, records: str = RECORDS) -> list[str]:
    """A row for each model, method and placement, in the order of their first runs.

    Runs of one row did the same work: the fastest counts, as what else a machine does only adds to it, and the largest peak.

    Args:
        folder: of the document.
        records: the file of the runs.
    """
    found = collect([folder / records], apart=True)
    rows: dict[tuple[str, str, str], list[Run]] = {}
    for run in found.runs:
        if not {"placement", "planned_memory_bytes"} <= run.metrics.keys():
            raise DataError(f"{folder / records}: {run.directory.name} does not say what was planned for which placement")
        key = (str(run.config["model"]["name"]), method_of(run.config), str(run.metrics["placement"]))
        rows.setdefault(key, []).append(run)
    lines = []
    for (model, method, placement), runs in rows.items():
        seconds = _seconds(runs)
        on_device = rows.get((model, method, "device"))
        beside = "" if on_device is None else f"{seconds / _seconds(on_device) - 1:+.0%}"
        lines.append(
            {
                "model": model,
                "method": method,
                "placement": placement,
                "runs": f"{len(runs)}",
                "planned": f"{max(run.metrics['planned_memory_bytes'] for run in runs) / 1e9:.2f} GB",
                "peak": f"{max(run.metrics['peak_memory_bytes'] for run in runs) / 1e9:.2f} GB",
                "seconds": f"{seconds:.0f}",
                "beside device": "" if placement == "device" else beside,
            }
        )
    return [*as_text(pd.DataFrame(lines), "md").splitlines(), "", machine(run.environment for run in found.runs)]


def _seconds(runs: list[Run]) -> float:
    """Of all stages of the fastest run."""
    return min(sum(run.metrics["seconds"].values()) for run in runs)
