"""Write the results into the README, from the records in experiments/quickstart.

python scripts/update_readme.py
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from permllm.record.figures import print_run
from permllm.record.files import read_json, with_block
from permllm.record.schema import Environment, FinishedRun

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "experiments" / "quickstart"
BEGIN, END = "<!-- result -->\n", "<!-- /result -->"


def result_block() -> str:
    """The text between the markers: the table of the default run, and the three permutations side by side."""
    records = {_metrics(file.parent)["name"]: file.parent for file in RECORDS.glob("*/metrics.json")}
    default = next(folder for name, folder in records.items() if "-lcp-" in name)
    output = io.StringIO()
    print_run(_metrics(default), Path("runs") / default.name, Console(file=output, width=110))
    environment = read_json(default / "environment.json", Environment)
    hardware, versions = environment["hardware"], environment["versions"]
    printed = "\n".join(line.rstrip() for line in output.getvalue().splitlines())
    lines = ["```", printed, "```", ""]
    lines += [
        f"Measured on {hardware['processor']}, {hardware['threads']} threads, Python {versions['python']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}; seed {environment['seed']}.",
        "The same budget for each way of ordering the channels (`python run.py experiment=quickstart`):",
        "",
        "| permutation | perplexity (BoolQ passages, window 256) | saliency retained | output error "
        "| time without evaluation |",
        "| --- | --- | --- | --- | --- |",
    ]
    for permutation in ("none", "heuristic", "lcp"):
        metrics = _metrics(next(folder for name, folder in records.items() if f"-{permutation}-" in name))
        perplexity = metrics["perplexity"]["sparse"]["boolq-passages"]["value"]
        kept, error = (sum(metrics[key].values()) / len(metrics[key]) for key in ("retained_saliency", "output_error"))
        seconds = sum(value for name, value in metrics["seconds"].items() if not name.startswith("evaluate"))
        lines.append(f"| `{permutation}` | {perplexity:.1f} | {kept:.2%} | {error:.3f} | {seconds:.0f} s |")
    dense = _metrics(default)["perplexity"]["dense"]["boolq-passages"]["value"]
    lines += ["", f"Dense: {dense:.1f}. The heuristic retains the most saliency, the learned order the most of the model.", ""]
    return "\n".join(lines)


def with_results(readme: str) -> str:
    """The README with its block generated anew."""
    return with_block(readme, BEGIN, END, result_block())


def _metrics(folder: Path) -> dict[str, Any]:
    return dict(read_json(folder / "metrics.json", FinishedRun))


def main() -> None:
    """Rewrite README.md."""
    readme = ROOT / "README.md"
    readme.write_text(with_results(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
