"""Write the table of experiments/lcp_ablation/README.md from the records beside it: a row a run, the settings that differ.

python scripts/ablation_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from permllm.results.files import with_block

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "experiments" / "lcp_ablation"
BEGIN, END = "<!-- table -->\n", "<!-- /table -->"

# Settings that say what a run is; where a record is older than a setting, this is what it ran with.
SETTINGS: dict[str, Any] = {
    "pruner.name": None,
    "permutation.name": None,
    "permutation.path": None,
    "reconstruction.name": "none",
    "permutation.loss": "cosine",
    "permutation.learning_rate": None,
    "permutation.passes": None,
    "permutation.straight_through": None,
    "permutation.window": "model",
    "permutation.init": None,
    "permutation.margin": None,
    "permutation.noise": None,
    "permutation.normalize_saliency": None,
    "permutation.sinkhorn_iterations": None,
    "permutation.batch_size": None,
    "block_size": None,
    "temperature.name": None,
    "temperature.start": None,
    "temperature.end": None,
    "calibration.samples": None,
    "calibration.length": None,
    "reconstruction.passes": None,
    "reconstruction.learning_rate": None,
    "seed": None,
}
# Columns of their own, whether they vary or not.
COLUMNS = ("pruner.name", "permutation.name", "reconstruction.name")
LEARNING = ("block_size", "temperature.", "permutation.")


def table() -> str:
    """The rows, worst perplexity first; settings that all runs share are left out."""
    runs = [(_settings(folder), _json(folder / "metrics.json"), folder) for folder in _folders()]
    varying = [
        key
        for key in SETTINGS
        if key not in (*COLUMNS, "permutation.path")
        and len({str(settings[key]) for settings, _, _ in runs if key in settings}) > 1
    ]
    lines = [
        "| pruner | permutation | reconstruction | settings | perplexity | loss at the end | seconds | record |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for settings, metrics, folder in sorted(runs, key=lambda run: -_perplexity(run[1], "sparse")):
        said = ", ".join(f"{key.removeprefix('permutation.')}={settings[key]}" for key in varying if key in settings)
        if "permutation.path" in settings:
            said = f"the order of `{settings['permutation.path'].rsplit('-', 1)[-1]}`" + (f", {said}" if said else "")
        seconds = sum(value for name, value in metrics["seconds"].items() if not name.startswith(("evaluate", "load")))
        columns = [f"`{settings[key]}`" for key in COLUMNS]
        columns += [said, f"{_perplexity(metrics, 'sparse'):.1f}", _final_loss(folder), f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(columns)} | `{folder.name.rsplit('-', 1)[-1]}` |")
    dense = _perplexity(runs[0][1], "dense")
    return "\n".join(
        [
            *lines,
            "",
            f"Dense: {dense:.1f}. Seconds of calibration, learning and pruning on two cores that did other work as well.",
            "",
        ]
    )


def _folders() -> list[Path]:
    return sorted(file.parent for file in RECORDS.glob("*/metrics.json"))


def _settings(folder: Path) -> dict[str, Any]:
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    learned = "passes" in config["permutation"]
    for key, default in SETTINGS.items():
        if key.startswith(LEARNING) and key not in ("permutation.name", "permutation.path") and not learned:
            continue
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        value = default if value is None else value
        if value is not None:
            found[key] = value
    return found


def _perplexity(metrics: dict[str, Any], which: str) -> float:
    (result,) = metrics["perplexity"][which].values()
    return float(result["value"])


def _final_loss(folder: Path) -> str:
    history = folder / "history.jsonl"
    if not history.is_file():
        return ""
    measured = [json.loads(line)["measured_loss"] for line in history.read_text(encoding="utf-8").splitlines()]
    return f"{min(loss for loss in measured if loss is not None):.4f}"


def _json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def with_table(document: str) -> str:
    """The document with its table generated anew."""
    return with_block(document, BEGIN, END, table())


def main() -> None:
    """Rewrite experiments/lcp_ablation/README.md."""
    document = RECORDS / "README.md"
    document.write_text(with_table(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
