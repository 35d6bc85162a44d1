"""Make the tables of documents anew.

    python scripts/readme_tables.py [--check] README.md experiments/*/README.md

A table stands between `<!-- view: table records=records.jsonl columns=block_size -->` and `<!--
/view -->`, files are named from the document's folder. With --check nothing is written, and 1 is
returned where a document is stale.
"""

from __future__ import annotations

import argparse
import csv
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parent.parent))

from permllm.config import NMPattern, flatten, read_config
from permllm.errors import ConfigError, DataError
from permllm.models.load import meta_model
from permllm.pruning.composition import composed
from permllm.runs.compare import Comparison, paired, published
from permllm.runs.files import RECORDS, write_text
from permllm.runs.measures import method_of, pruning_minutes
from permllm.runs.plots import points
from permllm.runs.read import Run, collect
from permllm.runs.render import as_text, cells, machine, processor, render
from permllm.runs.table import GAP, Table, gap_closed
from permllm.runtime.terminal import run_tool
from permllm.sparsity.windows import window_count
from scripts.memory_table import gigabytes, memory

_BLOCK = re.compile(
    r"(?P<begin><!-- view: (?P<words>[^\n]*) -->\n)(?P<block>.*?)(?P<end><!-- /view -->)", re.DOTALL
)
_SHOWN = "perplexity, gap closed, average acc, saliency retained, output error, zeros, seconds"
_GROUPS = ("pruner", "permutation", "mask", "reconstruction", "temperature")
_SETTINGS = (
    "block_size",
    "compute_dtype",
    "calibration.samples",
    "calibration.seqlen",
    "calibration.statistics",
)
_LEFT_OUT = (
    "block_size",
    "temperature",
    "mask_temperature",
    "compile",
    "path",
    "target",
    "_target_",
    "uses",
)


def table(
    folder: Path,
    records: str = RECORDS,
    baseline: str = "",
    columns: str = "",
    measures: str = _SHOWN,
    sort: str = "",
) -> str:
    """Return runs as `permllm results` shows them, and what they were measured with.

    With `sort` the rows follow the dense model's by this measure, the largest value first.
    """
    runs = runs_of(folder / records)
    if not sort:
        return f"{shown(runs, columns, measures, baseline)}\n{machine(runs)}"
    found = Table(runs, baseline)
    found.show(columns, measures)
    rows = found.means[sort].sort_values(ascending=False, kind="stable").index
    return f"{as_text(cells(found).iloc[[0, *(rows + 1)]], 'md')}\n{machine(runs)}"


def shown(
    runs: list[Run],
    columns: str,
    measures: str,
    baseline: str = "",
    paper: Comparison | None = None,
) -> str:
    """Return runs as `permllm results` shows them."""
    found = Table(runs, baseline)
    found.show(columns, measures)
    return render(found, "md", paper)


def paper(folder: Path, table: str, baseline: str, recipe: str = "", **options: str) -> str:
    """Return our runs, and a file of runs of the paper's `recipe`, beside one of its tables."""
    runs, numbers = runs_of(folder / RECORDS), published(table)
    options = {"columns": "pruner,permutation", "measures": _SHOWN} | options
    compared = Comparison(numbers, runs[0].config["model"]["name"])
    gap = "The gap closed is a share of the log-perplexity between the row that closes 0.00% and"
    parts = [
        f"\n    python run.py experiment={table} model=smollm2-135m protocol=offline budget=quick\n"
    ]
    parts += [
        shown(runs, **options, baseline=baseline, paper=compared),
        f"{compared.note} {gap} the dense model.\n",
        provenance(runs),
    ]
    if recipe:
        parts += [
            "The paper's recipe at the same budget:\n",
            shown(runs_of(folder / recipe), **options),
        ]
    frame = pd.DataFrame(numbers)
    keys = ["model", "sparsity", "method", "setting"]
    across = frame.pivot(index=keys, columns="metric", values="value")  # sorted, unlike the paper's
    across = across.reindex(
        index=pd.MultiIndex.from_frame(frame[keys].drop_duplicates()),
        columns=frame["metric"].unique(),
    )
    theirs = across.map(lambda value: "" if pd.isna(value) else f"{value:g}").reset_index()
    return "\n".join(
        [*parts, f"The paper's {table.replace('table', 'table ')}:\n", as_text(theirs, "md")]
    )


def _with_gaps(runs: list[Run], baseline: str, columns: str | None) -> Table:
    """Return a table of the mean gap, before the perplexities."""
    found = Table(runs, baseline)
    found.baseline = None  # the gaps say it
    found.show(columns, "gap closed, perplexity (")
    found.measures = [GAP, *(name for name in found.measures if GAP not in name)]
    return found


def frontier(
    folder: Path, baseline: str, columns: str = "", records: str = RECORDS, methods: str = ""
) -> str:
    """Return rows by the gap that they close, with minutes, processor and memory (`points`).

    Args:
        folder: that of the document.
        baseline: settings of the row from which the gap is measured.
        columns: settings to show.
        records: the file of records.
        methods: options of the group `method`, whose rows alone are shown, in the place of columns.
    """
    runs = runs_of(folder / records)
    found = _with_gaps(runs, baseline, columns)
    names = {found.find(_settings_of(method), records): method for method in methods.split()}
    if names:
        found.labels["method"] = pd.Series(names).reindex(found.labels.index).map("`{}`".format)
        found.settings = ["method"]
    drawn = points(found, GAP).sort_values("value", ascending=False, kind="stable")
    drawn = drawn[drawn.index.isin([*names] or drawn.index)]
    frame = cells(found).iloc[[0, *(drawn.index + 1)]]
    fastest = (runs[int(found.frame["minutes"][found.rows[row]].idxmin())] for row in drawn.index)
    costs = {
        "minutes": drawn["minutes"].map("{:.1f}".format),
        "on": map(_computed_on, fastest),
        "peak memory": (drawn["memory"] / 1e9).map("{:.2f} GB".format),
    }
    for name, values in costs.items():
        frame.insert(list(frame).index(GAP), name, ["", *values])
    return f"{as_text(frame, 'md')}\n{machine(runs)}"


def _computed_on(run: Run) -> str:
    name = processor(run).replace("(R)", "").replace(" Processor", "")
    threads = run.environment["hardware"]["threads"]
    return f"{name}, {threads} thread{'s' * (threads > 1)}, {run.metrics['compute_dtype']}"


def differences(
    folder: Path, baseline: str, columns: str, measures: str, records: str = RECORDS
) -> str:
    """Return the difference of each row from the baseline in some measures, with 95 % intervals."""
    found = Table(runs_of(folder / records), baseline)
    found.show(columns, measures)
    start, rows = found.baseline, []
    if start is None:
        raise ConfigError("baseline: missing, expected settings that name one row")
    for row in found.labels.index.drop(start):
        line = [found.label(row, name) for name in found.settings]
        for name in found.measures:
            pair = paired(found, row, start, name)
            change, (low, high) = pair["difference"], pair["interval"]
            line.append(f"{100 * change:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]")
        rows.append(line)
    return as_text(pd.DataFrame(rows, columns=[*found.settings, *found.measures]), "md")


def needs(folder: Path, records: str, baseline: str, model: str, **uses: str) -> str:
    """Return by need what to type, the gap that it closes, and the memory that `model` takes.

    Args:
        folder: that of the document.
        records: the file of records.
        baseline: settings of the row from which the gap is measured.
        model: option of the group `model`.
        uses: what is typed by need, with `method=NAME` first.
    """
    found = Table(runs_of(folder / records), baseline)
    shape = meta_model(read_config(composed([f"model={model}"])).model)
    rows = []
    for need, words in uses.items():
        method = words.split()[0].removeprefix("method=")
        row = found.find(_settings_of(method), records)
        gap = f"{found.means.at[row, GAP]:.0%}"
        rows.append([need, f"`{words}`", gap, gigabytes(f"model={model} method={method}", shape)])
    columns = ["you want", "use", GAP, f"GB for {model}, on a GPU / with layers on the host"]
    return as_text(pd.DataFrame(rows, columns=columns), "md")


def bounds(folder: Path, methods: str, records: str) -> str:
    """Return methods at 2:4 and at 6:8, with the bytes and the bound of the speed on 2:4 kernels.

    All gaps are measured from the first method at 2:4.

    Args:
        folder: that of the document.
        methods: options of the group `method`.
        records: files of records, which have them in both patterns.
    """
    runs = [run for file in records.split() for run in runs_of(folder / file)]
    settings = {method: _settings_of(method) for method in methods.split()}
    first, *_ = settings.values()
    found = _with_gaps(runs, f"{first},sparsity=2:4", None)
    rows, costs = list[int](), [("dense", "", "100.0%", "100.0%", "1.00")]
    for text in ("2:4", "6:8"):
        pattern = NMPattern.parse(text)
        # Half of four channels in each window is stored, with a bit for each channel.
        width = 4 * (window_count(pattern) or 0) / pattern.m
        sizes = [f"{width * (bits / 2 + 1) / bits:.1%}" for bits in (16, 8)]
        for method, said in settings.items():
            rows.append(found.find(f"{said},sparsity={text}", records))
            costs.append((text, f"`{method}`", *sizes, f"{2 / width:.2f}"))
    names = ["pattern", "method", "bytes, bfloat16", "bytes, FP8", "speed at most"]
    frame = cells(found).iloc[[0, *(row + 1 for row in rows)]].drop(columns=found.settings)
    shown = pd.concat([pd.DataFrame(costs, columns=names), frame.reset_index(drop=True)], axis=1)
    used = [runs[number] for row in rows for number in found.rows[row]]
    return f"{as_text(shown, 'md')}\n{machine(used)}"


def placements(folder: Path, records: str = RECORDS) -> str:
    """Return largest memory beside the plan, and fewest seconds beside `device`."""
    runs = collect([folder / records], apart=True).runs
    found: dict[tuple[str, str, str], list[tuple[float, float, float]]] = {}
    for run in runs:
        key = (run.config["model"]["name"], method_of(run.config), run.metrics["placement"])
        sizes = (run.metrics["planned_memory_bytes"] / 1e9, run.metrics["peak_memory_bytes"] / 1e9)
        found.setdefault(key, []).append((*sizes, sum(run.metrics["seconds"].values())))
    rows = []
    for (model, method, placement), numbers in found.items():
        seconds, device = (
            min((one[2] for one in of), default=0.0)
            for of in (numbers, found.get((model, method, "device"), []))
        )
        beside = f"{seconds / device - 1:+.0%}" if device and placement != "device" else ""
        planned, peak = (f"{max(one[number] for one in numbers):.2f} GB" for number in (0, 1))
        rows.append(
            [model, method, placement, str(len(numbers)), planned, peak, f"{seconds:.0f}", beside]
        )
    header = ["model", "method", "placement", "runs", "planned", "peak", "seconds", "beside device"]
    return f"{as_text(pd.DataFrame(rows, columns=header), 'md')}\n{machine(runs)}"


def peers(folder: Path, theirs: str) -> str:
    """Return our base pruners beside their official implementations, the CSV file `theirs`."""
    runs = runs_of(folder / RECORDS)
    rows = []
    for peer in csv.DictReader((folder / theirs).read_text(encoding="utf-8").splitlines()):
        which = "dense" if peer["method"] == "dense" else "sparse"
        # `wikitext2-test` is our `wikitext2`.
        found = [
            (evaluation["config_hash"], result["value"])
            for run in runs
            if peer["method"] in ("dense", run.config["pruner"]["name"])
            for evaluation in run.evaluations
            for name, result in evaluation["perplexity"][which].items()
            if peer["text"].startswith(name)
        ]
        (value,) = {value for _, value in found}
        source = ", ".join(
            filter(None, (f"{peer['repository']} {peer['commit']}".strip(), peer["note"]))
        )
        difference = round(value / float(peer["perplexity"]) - 1, 3) + 0.0  # no minus before a zero
        kept = ", ".join(f"`{name}`" for name, _ in found if which == "sparse")
        text = f"{peer['text']}, {peer['windows']} windows of {peer['window']}"
        rows.append(
            [
                peer["method"],
                text,
                source,
                peer["perplexity"],
                f"{value:.2f}",
                f"{difference:+.1%}",
                kept,
            ]
        )
    header = [
        "method",
        "text",
        "official implementation",
        "theirs",
        "ours",
        "difference",
        "records",
    ]
    return "\n".join(
        [
            "\n    python run.py experiment=peers\n",
            as_text(pd.DataFrame(rows, columns=header), "md"),
            provenance(runs),
        ]
    )


def landscape(folder: Path, theirs: str, reference: str, **ours: str) -> str:
    """Return published results, the CSV file `theirs`, by the share of the gap that they close.

    Args:
        folder: that of the document.
        theirs: the CSV file.
        reference: rows that measure the gap from this method are shown.
        ours: by file of records our methods, each with settings that tell its rows apart.
    """
    found = csv.DictReader((folder / theirs).read_text(encoding="utf-8").splitlines())
    rows = [_published(row) for row in found if row["reference_method"] == reference]
    for records, methods in ours.items():
        rows += _measured(folder / records, methods, reference)
    frame = pd.DataFrame(rows).sort_values(GAP, ascending=False, kind="stable")
    frame[GAP] = frame[GAP].map("{:.1%}".format)
    return as_text(frame, "md")


def _published(row: dict[str, str]) -> dict[str, Any]:
    here, start, dense = (
        pd.DataFrame([float(row[name])]) for name in ("perplexity", "reference", "dense")
    )
    return {
        "method": row["method"] + " †" * row["note"].startswith("second-hand"),
        **{name: row[name] for name in ("year", "model", "window", "dense")},
        row["reference_method"]: row["reference"],
        "perplexity": row["perplexity"],
        GAP: gap_closed(here, start, dense).iat[0, 0],
        "weights change": row["changes_weights"],
        "cost": row["cost"],
        "source": "; ".join(filter(None, (row["source"], row["note"]))),
    }


def _measured(file: Path, methods: str, reference: str) -> Iterator[dict[str, Any]]:
    """Give our row of each method; a perplexity has a number for each text."""
    found = Table(runs_of(file), _settings_of(reference.lower()))
    texts, start = found.gaps[GAP], found.baseline
    for words in methods.split():
        method, _, others = words.partition(",")
        row = found.find(",".join(filter(None, (_settings_of(method), others))), str(file))
        runs = [found.runs[run] for run in found.rows[row]]
        # Other jobs of a machine only add to the minutes.
        fastest = min(runs, key=lambda run: pruning_minutes(run.metrics["seconds"]))
        minutes = pruning_minutes(fastest.metrics["seconds"])
        asked = fastest.metrics["perplexity"]["sparse"].values()
        values = {
            "dense": [found.dense[text][0] for text in texts],
            reference: found.means.loc[start, texts],
            "perplexity": found.means.loc[row, texts],
        }
        seeds = ", ".join(sorted(str(run.config["seed"]) for run in runs))
        yield {
            "method": f"ours: `{method.rpartition('/')[2]}`",
            "year": fastest.environment["started"][:4],
            "model": fastest.config["model"]["name"],
            "window": ", ".join(sorted({str(one["window"]) for one in asked})),
            **{name: " / ".join(map("{:.2f}".format, of)) for name, of in values.items()},
            GAP: found.means.at[row, GAP],
            "weights change": "yes" if fastest.metrics["sparsity"]["weights_changed"] else "no",
            "cost": f"{minutes:.1f} minutes; {processor(fastest)}, "
            f"{fastest.environment['hardware']['threads']} threads, "
            f"{fastest.metrics['compute_dtype']}",
            "source": f"[frontier](../frontier/README.md), seed {seeds}",
        }


def _settings_of(method: str) -> str:
    """Return the settings by which `Table.find` finds a method's row."""
    config = composed([f"method={method}"])
    said = {group: config[group].get("name") for group in _GROUPS[:4]}
    said |= {
        f"{group}.{key}": config[group].get(key)
        for group, key in (("permutation", "constraint"), ("reconstruction", "start"))
    }
    return ",".join(f"{name}={value}" for name, value in said.items() if value)


def ablation(folder: Path, records: str = RECORDS) -> str:
    """Return rows by perplexity, the worst first, with what differs from a job without settings."""
    lines = pd.DataFrame([_ablated(run) for run in collect([folder / records], apart=True).runs])
    keys = ["pruner", "permutation", "reconstruction", "settings", "processor"]
    groups = lines.groupby(keys, sort=False)
    found = groups.agg(
        {
            "perplexity": partial(_spread, digits=1),
            "final loss": partial(_spread, digits=3),
            "records": ", ".join,
        }
    )
    found = found.assign(
        mean=groups["perplexity"].mean(), seconds=groups["seconds"].mean().map("{:.0f}".format)
    ).reset_index()
    found[keys[:3]] = "`" + found[keys[:3]] + "`"
    columns = [*keys[:4], "perplexity", "final loss", "seconds", "processor", "records"]
    text = as_text(found.sort_values("mean", ascending=False, kind="stable")[columns], "md")
    seconds = "Seconds of calibration, learning and pruning on two cores."
    return f"{text}\nDense: {lines['dense'].iloc[0]:.1f}. {seconds}"


def _ablated(run: Run) -> dict[str, Any]:
    config, metrics = run.config, run.metrics
    said = ", ".join(
        f"{key.removeprefix('permutation.')}={value}" for key, value in _differing(run)
    )
    order = config["permutation"].get("path", "").rpartition("-")[2]
    ((sparse, dense),) = zip(
        metrics["perplexity"]["sparse"].values(),
        metrics["perplexity"]["dense"].values(),
        strict=True,
    )
    return {group: config[group]["name"] for group in _GROUPS} | {
        "settings": ", ".join(filter(None, [f"the order of `{order}`" if order else "", said])),
        "perplexity": sparse["value"],
        "dense": dense["value"],
        "final loss": min(
            (one["measured_loss"] for one in run.history if one["measured_loss"] is not None),
            default=None,
        ),
        "seconds": sum(
            value
            for name, value in metrics["seconds"].items()
            if not name.startswith(("evaluate", "load"))
        ),
        "processor": processor(run).replace("(R)", "").replace(" Processor", ""),
        "records": f"`{run.directory.name.rsplit('-', 1)[-1]}`",
    }


def _differing(run: Run) -> Iterator[tuple[str, Any]]:
    """Give what sets a run apart from `python run.py budget.epochs=3` with its methods."""
    groups = ("pruner", "mask", "reconstruction")
    usual = _usual("budget.epochs=3", *(f"{group}={run.config[group]['name']}" for group in groups))
    for key, value in _flat(
        run.config | {"compute_dtype": run.metrics.get("compute_dtype", "float32")}
    ).items():
        group, _, rest = key.partition(".")
        if value != usual.get(key) and (rest != "name" or group in ("temperature", "mask")):
            yield group if rest == "name" else key, value


@cache
def _usual(*words: str) -> dict[str, Any]:
    config: Any = OmegaConf.to_container(composed(list(words)), resolve=True)
    return _flat(config | {"compute_dtype": "bfloat16"}) | {"mask.name": "pruner"}


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Return what makes a result, flat; settings of learning only where something is learned."""
    learned, flat = "epochs" in config["permutation"], flatten(config)
    found = {key: flat.get(key) for key in _SETTINGS if learned or key != "block_size"}
    for group in _GROUPS if learned else _GROUPS[:-1]:
        found |= {
            f"{group}.{key}": value for key, value in config[group].items() if key not in _LEFT_OUT
        }
    if learned and found["permutation.loss"] is None:
        found["permutation.loss"] = (
            "kl" if found["permutation.layers_per_stage"] == "all" else "cosine"
        )
    return found


def _spread(values: pd.Series, digits: int) -> str:
    spread = f" ± {values.std():.{digits}f}" if values.count() > 1 else ""
    return f"{values.mean():.{digits}f}{spread}" if values.count() else ""


def runs_of(file: Path) -> list[Run]:
    """Return the runs of a file of records. Raises DataError where one of them is left out."""
    if (found := collect([file])).notes:
        raise DataError("; ".join(found.notes))
    return found.runs


def provenance(runs: list[Run]) -> str:
    """Return number, minutes and calibration of runs, and what they were computed with."""
    minutes = sum(sum(run.metrics["seconds"].values()) for run in runs) / 60
    seeds = ", ".join(sorted({str(run.config["seed"]) for run in runs}))
    budget = runs[0].config["calibration"]
    return (
        f"{len(runs)} runs of seed {seeds}, {minutes:.0f} minutes with evaluation, "
        f"{budget['samples']} calibration windows of {budget['seqlen']} tokens. "
        "A run that is in several tables counts in each. The minutes lack the dense model's "
        f"evaluation and calibration where an earlier job had left them. {machine(runs)}\n"
    )


_TABLES = (table, paper, frontier, differences, needs, bounds, ablation, placements, peers)
_VIEWS = {view.__name__: view for view in (*_TABLES, landscape, memory)}


def with_views(file: Path) -> str:
    """Return a document with each of its tables made anew.

    Raises ConfigError, which names the document.
    """

    def anew(match: re.Match[str]) -> str:
        name, *words = shlex.split(match["words"])
        try:
            text = _VIEWS[name](file.parent, **dict(word.partition("=")[::2] for word in words))
        except (ConfigError, DataError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file}: view {name}: {error}; views are {', '.join(_VIEWS)}"
            ) from error
        return f"{match['begin']}{text.rstrip()}\n{match['end']}"

    return _BLOCK.sub(anew, file.read_text(encoding="utf-8"))


def main(words: list[str]) -> int:
    """Write what is stale, or name it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.md")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(words)
    stale = {
        file: text
        for file in options.files
        if (text := with_views(file)) != file.read_text(encoding="utf-8")
    }
    for file, text in stale.items():
        if not options.check:
            write_text(file, text)
        print(f"{file} is {'stale' if options.check else 'new'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
