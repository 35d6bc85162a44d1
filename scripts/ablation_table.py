"""Write the tables of experiments/lcp_ablation/README.md from the records beside it and in full_test/.

python scripts/ablation_table.py

A row is what runs of the same settings found, mean and standard deviation over their seeds. It names what differs from the
settings that `python run.py` has now.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from permllm.config import register_resolvers
from permllm.record.files import read_json, read_json_lines, read_yaml, with_block
from permllm.record.schema import Environment, FinishedRun, Pass, Settings

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "experiments" / "lcp_ablation"
TABLES = {"table": RECORDS, "full test": RECORDS / "full_test"}  # by the name of their place in the document

GROUPS = ("pruner", "permutation", "reconstruction", "temperature")
# Single settings that make a result; of a group that is named below, all.
SETTINGS = ("block_size", "compute_dtype", "calibration.samples", "calibration.length", "calibration.statistics")
# What a record ran with that is older than the setting.
BEFORE = {
    "compute_dtype": "float32",
    "permutation.rounds": 1,
    "permutation.gumbel": 0.0,
    "permutation.loss": "cosine",
    "permutation.window": "model",
}
# Settings that follow from others, or say nothing about a result.
LEFT_OUT = ("block_size", "temperature", "mask_temperature", "compile", "path", "target", "_target_")
COLUMNS = (
    "pruner",
    "permutation",
    "reconstruction",
    "settings",
    "perplexity",
    "final loss",
    "seconds",
    "processor",
    "records",
)


@dataclass(frozen=True)
class Run:
    """One record."""

    options: dict[str, str]
    settings: dict[str, Any]
    order: str
    perplexity: float
    dense: float
    loss: float | None
    seconds: float
    processor: str
    identity: str


def read_run(folder: Path) -> Run:
    """The record in a folder."""
    config = dict(read_yaml(folder / "config.yaml", Settings))
    metrics = dict(read_json(folder / "metrics.json", FinishedRun))
    config["compute_dtype"] = metrics.get("compute_dtype", BEFORE["compute_dtype"])
    processor = read_json(folder / "environment.json", Environment)["hardware"]["processor"]
    return Run(
        options={group: config.get(group, {}).get("name", "none") for group in GROUPS},
        settings=_settings(config),
        order=Path(config["permutation"].get("path", "")).name.rsplit("-", 1)[-1],
        perplexity=_perplexity(metrics, "sparse"),
        dense=_perplexity(metrics, "dense"),
        loss=_final_loss(folder),
        seconds=sum(value for name, value in metrics["seconds"].items() if not name.startswith(("evaluate", "load"))),
        processor=processor.replace("(R)", "").replace(" Processor", ""),
        identity=folder.name.rsplit("-", 1)[-1],
    )


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """What makes a result, flat; settings of learning only where something is learned."""
    learned = "passes" in config["permutation"]
    found = {key: OmegaConf.select(OmegaConf.create(config), key) for key in SETTINGS if learned or key != "block_size"}
    for group in GROUPS:
        if group != "temperature" or learned:
            found |= {f"{group}.{key}": value for key, value in config.get(group, {"name": "none"}).items()}
    for key, value in BEFORE.items():
        if key not in found and (learned or not key.startswith("permutation.")):
            found[key] = value
    if learned and found["permutation.loss"] is None:
        found["permutation.loss"] = "kl" if found["permutation.window"] == "model" else "cosine"
    return {key: value for key, value in found.items() if "." not in key or key.split(".")[1] not in LEFT_OUT}


def table(folder: Path) -> str:
    """The rows of the records in a folder, worst perplexity first; nothing where there are none."""
    runs = [read_run(file.parent) for file in sorted(folder.glob("*/metrics.json"))]
    if not runs:
        return ""
    rows: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        said = ", ".join(f"{key.removeprefix('permutation.')}={value}" for key, value in _differing(run))
        if run.order:
            said = f"the order of `{run.order}`" + (f", {said}" if said else "")
        key = tuple(run.options[group] for group in GROUPS[:3])
        rows.setdefault((*key, said, run.processor), []).append(run)
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    for (*options, said, processor), members in sorted(rows.items(), key=lambda row: -_mean(run.perplexity for run in row[1])):
        losses = [run.loss for run in members if run.loss is not None]
        cells = [*(f"`{option}`" for option in options), said, _spread([run.perplexity for run in members], 1)]
        cells += [_spread(losses, 3) if losses else "", f"{_mean(run.seconds for run in members):.0f}", processor]
        lines.append(_line([*cells, ", ".join(f"`{run.identity}`" for run in members)]))
    note = f"Dense: {runs[0].dense:.1f}. Seconds of calibration, learning and pruning on two cores."
    return "\n".join([*lines, "", note, ""])


@cache
def _defaults(pruner: str, reconstruction: str) -> dict[str, Any]:
    """What `python run.py` has now, with one pruner and one reconstruction, on a device that multiplies bfloat16."""
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("config", overrides=[f"pruner={pruner}", f"reconstruction={reconstruction}"])
    config: dict[str, Any] = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
    return _settings(config | {"compute_dtype": "bfloat16"})


def _differing(run: Run) -> Iterable[tuple[str, Any]]:
    defaults = _defaults(run.options["pruner"], run.options["reconstruction"])
    for key, value in run.settings.items():
        group, _, rest = key.partition(".")
        if value != defaults.get(key) and not (rest == "name" and group != "temperature"):
            yield group if rest == "name" else key, value


def _perplexity(metrics: dict[str, Any], which: str) -> float:
    (result,) = metrics["perplexity"][which].values()
    return float(result["value"])


def _final_loss(folder: Path) -> float | None:
    history = folder / "history.jsonl"
    if not history.is_file():
        return None
    measured = [entry["measured_loss"] for entry in read_json_lines(history, Pass)]
    return min(loss for loss in measured if loss is not None)


def _spread(values: list[float], digits: int) -> str:
    mean = f"{_mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def with_tables(document: str) -> str:
    """The document with its tables generated anew."""
    for name, folder in TABLES.items():
        document = with_block(document, f"<!-- {name} -->\n", f"<!-- /{name} -->", table(folder))
    return document


def main() -> None:
    """Rewrite experiments/lcp_ablation/README.md."""
    document = RECORDS / "README.md"
    document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
