"""Write the tables of experiments/export/README.md from the JSON files beside it.

python scripts/export_table.py
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from permllm.record.files import read_json, read_yaml, with_block
from permllm.record.schema import FinishedRun, Object, Settings

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "experiments" / "export"
RUNS = ROOT / "experiments" / "lcp_ablation"


def orders() -> list[str]:
    """Perplexity of the default recipe and the heuristic, free and foldable, mean and deviation over seeds."""
    found: dict[tuple[str, str], list[float]] = {}
    dense = 0.0
    for file in sorted(RUNS.glob("*/metrics.json")):
        config = dict(read_yaml(file.parent / "config.yaml", Settings))
        metrics = dict(read_json(file, FinishedRun))
        if not _default(config, metrics):
            continue
        permutation = config["permutation"]
        constraint = "-" if permutation["name"] == "none" else permutation.get("constraint", "free")
        (value,) = metrics["perplexity"]["sparse"].values()
        dense = next(iter(metrics["perplexity"]["dense"].values()))["value"]
        found.setdefault((permutation["name"], constraint), []).append(value["value"])
    lines = [
        "| permutation | constraint | perplexity (WikiText-2 test, first 32 windows of 256) | seeds |",
        "| --- | --- | --- | --- |",
    ]
    for (name, constraint), values in sorted(found.items(), key=lambda item: -statistics.fmean(item[1])):
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        lines.append(f"| `{name}` | {constraint} | {statistics.fmean(values):.1f}{spread} | {len(values)} |")
    return [*lines, "", f"Dense: {dense:.1f}."]


def _default(config: dict[str, Any], metrics: dict[str, Any]) -> bool:
    """A run of Wanda whose other settings are the default recipe's."""
    permutation = config["permutation"]
    if config["pruner"]["name"] != "wanda" or metrics.get("compute_dtype") != "bfloat16":
        return False
    if config.get("reconstruction", {"name": "none"})["name"] != "none" or config["calibration"]["samples"] != 128:
        return False
    if permutation["name"] in ("none", "heuristic"):
        return True
    recipe = {"straight_through": "swap", "learning_rate": 0.01, "passes": 3, "rounds": 1, "gumbel": 0.0, "init": "heuristic"}
    recipe |= {"margin": 0.05, "noise": 0.02, "window": "model", "block_size": 64}
    temperature = config["temperature"]
    return (
        permutation["name"] == "lcp"
        and all(permutation.get(key) == value for key, value in recipe.items())
        and permutation.get("loss") in (None, "kl")
        and (temperature["name"], temperature["start"], temperature["end"]) == ("linear", 1.0, 0.1)
    )


def stock() -> list[str]:
    """One line a file of `stock_perplexity.py`."""
    lines = [
        "| run | class | perplexity of the run | with stock transformers | relative difference |",
        "| --- | --- | --- | --- | --- |",
    ]
    for file in sorted(RECORDS.glob("stock*.json")):
        row = _json(file)
        values = f"{row['perplexity_of_the_run']:.3f} | {row['perplexity_stock']:.3f} | {row['relative_difference']:.1e}"
        lines.append(f"| `{row['run']}` | `{row['class'].rsplit('.', 1)[-1]}` | {values} |")
    return lines


def proofs() -> list[str]:
    """One line a file of `permllm.verify`."""
    lines = _head(
        "checkpoint",
        "weights",
        "zeros",
        "violations",
        "-0.0",
        "not finite",
        "MB on disk",
        "relative difference of logits",
        "verdict",
    )
    for file in sorted(RECORDS.glob("verify-*.json")):
        report = _json(file)
        layers = report["layers"]
        sizes = [math.prod(layer["shape"]) for layer in layers]
        zeros = sum(layer["zeros"] * size for layer, size in zip(layers, sizes, strict=True)) / sum(sizes)
        sums = [sum(layer[key] or 0 for layer in layers) for key in ("violations", "negative_zeros", "nan")]
        difference = f"{report['difference']['relative']:.1e}" if report["difference"] else ""
        cells = [str(len(layers)), f"{zeros:.2%}", *map(str, sums), f"{report['bytes'] / 1e6:.1f}", difference]
        verdict = "passed" if report["passed"] else "failed"
        lines.append(f"| {file.stem.removeprefix('verify-')} | {' | '.join(cells)} | {verdict} |")
    return lines


def benchmarks() -> list[str]:
    """Speed and loading of each file of `permllm.bench`."""
    lines: list[str] = []
    for file in sorted(RECORDS.glob("bench-*.json")):
        report = _json(file)
        hardware = report["hardware"]
        lines += [
            f"`{file.stem.removeprefix('bench-')}`, {report['dtype']}, {report['gathers']} gathers, prompts of "
            f"{report['prompt']} tokens, {hardware['processor']}, {hardware['threads']} threads; {report['note']}.",
            "",
            *_head("variant", "batch", "prefill, tokens/s", "decoding, tokens/s"),
        ]
        for row in report["speed"]:
            prefill = f"{row['prefill_tokens_a_second']:.0f} (spread {row['prefill_spread']:.0%})"
            decode = f"{row['decode_tokens_a_second']:.1f} (spread {row['decode_spread']:.0%})"
            lines.append(f"| {row['variant']} | {row['batch']} | {prefill} | {decode} |")
        lines += ["", *_head("variant", "loading, s", "weights in memory, MB", "files, MB")]
        for name, seconds in report["loading_s"].items():
            size = report["file_bytes"].get(name)
            on_disk = f"{size / 1e6:.1f}" if size else ""
            lines.append(f"| {name} | {seconds:.2f} | {report['weight_bytes'][name] / 1e6:.1f} | {on_disk} |")
        lines += [
            "",
            *_head("group of the first layer", "size", "product, ms", "gather, ms", "norm, ms", "norm and gather, ms"),
        ]
        for row in report["layers"]:
            times = [f"{row[key] * 1e3:.2f}" for key in ("dense_s", "gather_s", "norm_s", "norm_and_gather_s")]
            lines.append(f"| {row['group']} | {row['rows']} x {row['channels']} | {' | '.join(times)} |")
        lines.append("")
    return lines[:-1]


def memory() -> list[str]:
    """One line a form of `benchmark_export.py`."""
    file = RECORDS / "memory.json"
    if not file.is_file():
        return []
    report = _json(file)
    lines = _head("form", "dense model, GB", "largest shard, GB", "peak growth, GB", "seconds")
    for row in report["rows"]:
        sizes = [row[key] / 1e9 for key in ("dense_checkpoint_bytes", "largest_shard_bytes", "peak_growth_bytes")]
        lines.append(
            f"| {row['form']}, {row['format']} | {' | '.join(f'{size:.2f}' for size in sizes)} | {row['seconds']:.0f} |"
        )
    return lines


TABLES = {"orders": orders, "stock": stock, "verify": proofs, "bench": benchmarks, "memory": memory}


def with_tables(document: str) -> str:
    """The document with its tables generated anew."""
    for name, table in TABLES.items():
        document = with_block(document, f"<!-- {name} -->\n", f"<!-- /{name} -->", _text(table()))
    return document


def _head(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _json(file: Path) -> dict[str, Any]:
    return dict(read_json(file, Object))


def main() -> None:
    """Rewrite experiments/export/README.md."""
    document = RECORDS / "README.md"
    document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
