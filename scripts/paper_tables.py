"""Write what is generated in experiments/: each table's README from the records beside it, and the index.

python scripts/paper_tables.py

`experiments/peers` has ours beside the official implementations of the base pruners instead, from `peers.csv`.

A folder's README is prose around a block between markers; the block holds our rows with the paper's beside them, and what the
runs took. `scripts/keep_records.py` brings records there.
"""

from __future__ import annotations

import csv
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permllm.record import evaluations
from permllm.record.files import read_json, with_block
from permllm.record.schema import Environment, Metrics, validated
from permllm.results.collect import Run, collect
from permllm.results.published import Comparison, Published, published
from permllm.results.render import find_baseline, heading, main_measure, render, shown
from permllm.results.summary import Summary, summarise
from permllm.studies.base import Study
from permllm.studies.layer_runtime import LayerRuntime
from permllm.studies.saliency_and_error import SaliencyAndError

ROOT = Path(__file__).parent.parent / "experiments"
BEGIN, END = "<!-- generated -->\n", "<!-- /generated -->"
IN_README = ("<!-- experiments -->\n", "<!-- /experiments -->")
CPU = "model=smollm2-135m budget=cpu"


@dataclass(frozen=True)
class Experiment:
    """One of the paper's results.

    Attributes:
        name: of the experiment and its folder.
        claim: what the paper shows with it.
        baseline: the row that the others are compared with, for `find_baseline`; empty for a study.
        columns: the settings that it varies; whatever else differs follows from them.
        accuracies: show every task, not the mean alone.
        command: what was run.
    """

    name: str
    claim: str
    baseline: str = ""
    columns: tuple[str, ...] = ("pruner", "permutation")
    accuracies: bool = False
    command: str = ""

    @property
    def typed(self) -> str:
        """The command line."""
        return self.command or f"python run.py experiment={self.name} {CPU}"


EXPERIMENTS = [
    Experiment("table1", "A learned order gives the lowest perplexity at 2:4", "pruner=wanda,permutation=none"),
    Experiment(
        "table2",
        "A learned order gives the highest zero-shot accuracy at 2:4",
        "pruner=wanda,permutation=none",
        accuracies=True,
    ),
    Experiment(
        "table3",
        "2:4 products are 1.6 to 1.7 times as fast, a permutation costs little",
        command="python run.py experiment=table3",
    ),
    Experiment(
        "table4",
        "Five Sinkhorn iterations are better than none",
        "permutation.sinkhorn_iterations=0",
        ("permutation.sinkhorn_iterations",),
    ),
    Experiment("table5", "The calibration text matters little", "calibration.dataset=law-questions", ("calibration.dataset",)),
    Experiment("table6", "Larger blocks are better and cost more", "block_size=32", ("block_size",)),
    Experiment(
        "table7",
        "Learning the last six layers alone gives a part of the gain",
        "permutation=heuristic",
        ("permutation", "permutation.last_layers"),
    ),
    Experiment("table8", "The order of the methods is the same at 4:8", "pruner=wanda,permutation=none"),
    Experiment("figure1", "More saliency retained is not less loss"),
]

# Those that are no table of runs. Their class is not taken from a record.
STUDIES: dict[str, Study] = {"table3": LayerRuntime(), "figure1": SaliencyAndError()}


def summary_of(experiment: Experiment) -> tuple[Summary, list[Run]]:
    """The kept runs of an experiment, with the measures that its table shows."""
    collection = collect([ROOT / experiment.name / "records"])
    if collection.left_out():
        raise SystemExit(f"{experiment.name}: {'; '.join(collection.left_out())}")
    return _narrowed(experiment, collection.runs), collection.runs


def _narrowed(experiment: Experiment, runs: list[Run]) -> Summary:
    summary = summarise(runs)
    summary.settings = [name for name in summary.settings if name in experiment.columns]
    for row in summary.rows:
        row.labels = {name: row.labels[name] for name in summary.settings}
    shown_too = ("gap closed", "average acc", "saliency retained", "output error", "seconds")
    summary.measures = [
        name
        for name in summary.measures
        if "perplexity" in name or name in shown_too or (experiment.accuracies and name.endswith(" acc"))
    ]
    return summary


def block(experiment: Experiment) -> str:
    """What stands between the markers of an experiment's README."""
    folder = ROOT / experiment.name
    if not experiment.baseline:
        return _study_block(experiment, folder)
    summary, runs = summary_of(experiment)
    paper = Comparison(published(experiment.name), runs[0].config["model"]["name"])
    lines = ["", f"    {experiment.typed}", ""]
    lines += [render(summary, "md", find_baseline(summary, experiment.baseline), paper).rstrip(), "", paper.note, ""]
    lines += [*_provenance(runs), ""]
    if (folder / "recipe").is_dir():
        recipe = collect([folder / "recipe"]).runs
        lines += ["The paper's recipe at the same budget:", "", render(_narrowed(experiment, recipe), "md").rstrip(), ""]
    lines += [f"The paper's table {experiment.name.removeprefix('table')}:", ""]
    lines += [*published_table(published(experiment.name)), ""]
    return "\n".join(lines)


def published_table(rows: list[Published]) -> list[str]:
    """All numbers of one of the paper's tables, metrics across."""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    keys = list(dict.fromkeys((row.model, row.sparsity, row.method, row.setting) for row in rows))
    values = {(row.model, row.sparsity, row.method, row.setting, row.metric): row.value for row in rows}
    lines = [f"| model | sparsity | method | setting | {' | '.join(metrics)} |", "| --- " * (4 + len(metrics)) + "|"]
    for key in keys:
        cells = ["" if (value := values.get((*key, metric))) is None else f"{value:g}" for metric in metrics]
        lines.append(f"| {' | '.join([*key, *cells])} |")
    return lines


def peers_block() -> str:
    """Our base pruners beside their official implementations, on each text."""
    runs = collect([ROOT / "peers" / "records"]).runs
    with open(ROOT / "peers" / "peers.csv", encoding="utf-8", newline="") as stream:
        theirs = list(csv.DictReader(stream))
    lines = ["", "    python run.py experiment=peers", ""]
    lines += ["| method | text | official implementation | theirs | ours | difference | records |", "| --- " * 7 + "|"]
    for peer in theirs:
        which = "dense" if peer["method"] == "dense" else "sparse"
        of_method = [run for run in runs if peer["method"] in ("dense", run.config["pruner"]["name"])]
        # `wikitext2-test` is our `wikitext2`.
        found = [
            (entry.get("config_hash", run.metrics["config_hash"]), result["value"])
            for run in of_method
            for entry in evaluations.all_of(run.metrics, run.config)
            for name, result in entry["perplexity"][which].items()
            if peer["text"].startswith(name)
        ]
        (value,) = {value for _, value in found}
        source = ", ".join(filter(None, (f"{peer['repository']} {peer['commit']}".strip(), peer["note"])))
        records = ", ".join(f"`{name}`" for name, _ in found if which == "sparse")
        cells = [peer["method"], f"{peer['text']}, {peer['windows']} windows of {peer['window']}", source, peer["perplexity"]]
        difference = round(value / float(peer["perplexity"]) - 1, 3) + 0.0  # no minus before a zero
        cells += [f"{value:.2f}", f"{difference:+.1%}", records]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_provenance(runs), ""])


def index(folder: str) -> str:
    """The table of experiments/README.md and of the README, which calls that folder `experiments/`."""
    lines = [
        "",
        "| result | the paper's claim | command | cost | ours | the paper's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for experiment in EXPERIMENTS:
        if not (ROOT / experiment.name / "records").is_dir():
            continue
        ours, theirs, seconds = _results(experiment)
        link = f"[{experiment.name}]({folder}{experiment.name}/README.md)"
        cost = f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
        lines.append(f"| {link} | {experiment.claim} | `{experiment.typed}` | {cost} | {ours} | {theirs} |")
    return "\n".join([*lines, ""])


def _results(experiment: Experiment) -> tuple[str, str, float]:
    """Our numbers in a line, the paper's, and the seconds of all our runs."""
    if not experiment.baseline:
        metrics = _study(experiment)
        seconds = sum(metrics["seconds"].values())
        study, lines = metrics["study"], STUDIES[experiment.name].lines(metrics["study"])
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
        ours = "; ".join(f"{row[0]}: {', '.join(cell for cell in row[1:] if cell)}" for row in rows[1:])
        if "products" in study:
            return f"{ours} (ms, {'on a GPU' if study['sparse_tensor_cores'] else 'on a CPU'})", _runtimes(), seconds
        return ours, "a picture, no numbers", seconds
    summary, runs = summary_of(experiment)
    name = "average acc" if experiment.accuracies else main_measure(summary)
    assert name is not None
    limited = heading(summary, name).removeprefix(name)
    paper = Comparison(published(experiment.name), runs[0].config["model"]["name"])
    ours = "; ".join(f"{_name(row.labels)}: {shown(row.measures[name])}" for row in summary.rows)
    values = [(row, paper.value(row, name)) for row in summary.rows]
    theirs = "; ".join(
        f"{_name(row.labels)}: {f'{value:.2%}' if experiment.accuracies else f'{value:.2f}'}"
        for row, value in values
        if value is not None
    )
    if not theirs:  # no row of ours is one of the paper's
        metric = "average_acc" if experiment.accuracies else "wikitext2_ppl"
        theirs = "; ".join(
            f"{row.setting.split('=')[-1]}: {row.value:g}" for row in published(experiment.name) if row.metric == metric
        )
    return ours + limited, theirs, sum(sum(run.metrics["seconds"].values()) for run in runs)


def _runtimes() -> str:
    values = {(row.method, row.setting, row.metric): row.value for row in published("table3")}
    parts = [
        f"{setting} {values['dense', setting, metric]:g}, 2:4 {values['2:4+cp', setting, metric]:g}"
        for (method, setting, metric) in values
        if method == "dense"
    ]
    parts += [f"{setting} {value:g}" for (_, setting, metric), value in values.items() if setting.startswith("channel")]
    return "; ".join(parts) + " (ms, on a GPU)"


def _study_block(experiment: Experiment, folder: Path) -> str:
    metrics = _study(experiment)
    (directory,) = (file.parent for file in (folder / "records").glob("*/metrics.json"))
    environment = dict(read_json(directory / "environment.json", Environment))
    lines = ["", f"    {experiment.typed}", "", *STUDIES[experiment.name].lines(metrics["study"]), ""]
    if (directory / "figure.png").is_file():
        lines += [f"![{experiment.claim}](records/{directory.name}/figure.png)", ""]
    lines += [_machine([environment]), ""]
    if experiment.name.startswith("table"):
        lines += ["The paper's table 3:", "", *published_table(published(experiment.name)), ""]
    return "\n".join(lines)


def _study(experiment: Experiment) -> dict[str, Any]:
    (file,) = (ROOT / experiment.name / "records").glob("*/metrics.json")
    metrics = dict(read_json(file, Metrics))
    validated(str(file), metrics.get("study"), STUDIES[experiment.name].form)
    return metrics


def _name(labels: dict[str, str]) -> str:
    return " ".join(value for value in labels.values() if value)


def _provenance(runs: list[Run]) -> list[str]:
    seconds = sum(sum(run.metrics["seconds"].values()) for run in runs)
    seeds = ", ".join(sorted({str(run.config["seed"]) for run in runs}))
    budget = runs[0].config["calibration"]
    return [
        f"{len(runs)} runs, {seconds / 60:.0f} minutes, evaluation included. Runs of several tables count in each; what "
        "an earlier job had left of the dense model's evaluation and calibration does not. "
        f"Seed {seeds}; calibrated on {budget['samples']} samples of {budget['length']} tokens. "
        + _machine([run.environment for run in runs])
    ]


def _machine(environments: Iterable[dict[str, Any]]) -> str:
    entries = list(environments)
    hardware = sorted({f"{e['hardware']['processor']}, {e['hardware']['threads']} threads" for e in entries})
    versions = sorted(
        {
            f"Python {e['versions']['python']}, torch {e['versions']['torch']}, transformers {e['versions']['transformers']}"
            for e in entries
        }
    )
    commits = sorted({e["git"]["commit"][:10] + " with changes" * e["git"]["dirty"] for e in entries if e.get("git")})
    started = sorted(e["started"][:10] for e in entries)
    return f"{'; '.join(hardware)}; {'; '.join(versions)}; commit {', '.join(commits)}; {started[0]}."


def with_blocks() -> dict[Path, str]:
    """Every document of experiments/ that has a generated block, with the block anew."""
    found = {}
    for experiment in EXPERIMENTS:
        file = ROOT / experiment.name / "README.md"
        if (ROOT / experiment.name / "records").is_dir():
            found[file] = with_block(file.read_text(encoding="utf-8"), BEGIN, END, block(experiment))
    peers = ROOT / "peers" / "README.md"
    found[peers] = with_block(peers.read_text(encoding="utf-8"), BEGIN, END, peers_block())
    for readme, begin, end in ((ROOT / "README.md", BEGIN, END), (ROOT.parent / "README.md", *IN_README)):
        text = index("" if readme.parent == ROOT else "experiments/")
        found[readme] = with_block(readme.read_text(encoding="utf-8"), begin, end, text)
    return found


def main() -> None:
    """Rewrite the documents."""
    for file, text in with_blocks().items():
        file.write_text(text, encoding="utf-8")
        print(shlex.quote(str(file)))


if __name__ == "__main__":
    main()
