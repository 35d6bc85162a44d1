"""Views of studies: what each found, its picture, and what it was measured with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from permllm import studies
from permllm.errors import ConfigError, DataError
from permllm.record.names import RECORDS
from permllm.record.schema import validated
from permllm.results.collect import Run, collect
from permllm.results.published import published
from permllm.studies.base import Study
from scripts.views.tables import Entry, machine, published_table, typed

# By the name of an option in conf/study; the class is not taken from a record.
STUDIES: dict[str, type[Any]] = {
    "export_memory": studies.ExportMemory,
    "layer_runtime": studies.LayerRuntime,
    "saliency_and_error": studies.SaliencyAndError,
    "lcp_step": studies.LCPStep,
}


def study(
    folder: Path, study: str, records: str = RECORDS, experiment: str = "", claim: str = "", command: str = "", table: str = ""
) -> list[str]:
    """The tables of a study.

    Args:
        folder: of the document.
        study: which one: an option of the group `study`.
        records: the file of its records.
        experiment: that ran it.
        claim: what the paper shows with it, for the index, and the picture's text.
        command: what was run.
        table: of the paper, whose numbers stand below.
    """
    lines = ["", f"    {typed(experiment, command)}", ""] if experiment or command else [""]
    for run in _records(folder / records):
        lines += [*_of(study).lines(_results(run, study)), ""]
        picture = folder / records
        picture = picture.with_name(f"{run.directory.name}.png")
        if picture.is_file():
            lines += [f"![{claim}]({picture.relative_to(folder)})", ""]
        lines += [machine([run.environment]), ""]
    if table:
        lines += [f"The paper's {table.replace('table', 'table ')}:", "", *published_table(published(table)), ""]
    return lines[:-1]


def entry(
    folder: Path, study: str, records: str = RECORDS, experiment: str = "", claim: str = "", command: str = "", table: str = ""
) -> Entry:
    """Its row in the index; arguments as `study`."""
    (run,) = _records(folder / records)
    results = _results(run, study)
    lines = _of(study).lines(results)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]
    ours = "; ".join(f"{row[0]}: {', '.join(cell for cell in row[1:] if cell)}" for row in rows)
    theirs = "a picture, no numbers"
    if table:
        ours += f" (ms, {'on a GPU' if results['sparse_tensor_cores'] else 'on a CPU'})"
        theirs = _runtimes(table)
    return Entry(claim, typed(experiment, command), ours, theirs, sum(run.metrics["seconds"].values()))


def _runtimes(table: str) -> str:
    values = {(row.method, row.setting, row.metric): row.value for row in published(table)}
    parts = [
        f"{setting} {values['dense', setting, metric]:g}, 2:4 {values['2:4+cp', setting, metric]:g}"
        for (method, setting, metric) in values
        if method == "dense"
    ]
    parts += [f"{setting} {value:g}" for (_, setting, metric), value in values.items() if setting.startswith("channel")]
    return "; ".join(parts) + " (ms, on a GPU)"


def _of(name: str) -> Study:
    if name not in STUDIES:
        raise ConfigError(f"there is no study {name}; there are {', '.join(STUDIES)}")
    return STUDIES[name]()  # type: ignore[no-any-return]


def _records(file: Path) -> list[Run]:
    found = collect([file])
    if found.skipped or found.runs:
        raise DataError(f"{file} holds something other than studies: {'; '.join(found.left_out()[:1]) or 'runs'}")
    return found.studies


def _results(run: Run, name: str) -> dict[str, Any]:
    return dict(validated(f"{run.directory}: study", run.metrics["study"], _of(name).form))
