"""Find runs that were measured again with other numbers.

    python scripts/reruns.py experiments/table1/records.jsonl experiments/sizes/records.jsonl

The records of such runs have one identity: all settings that determine the pruned model, with the
seed. Commit, processor, threads or the dtype of products differ. Results are compared over the
windows that both records have, in points of the gap between Wanda without a permutation and the
dense model.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from permllm.command import run_tool
from permllm.report.metrics import Scores
from permllm.report.read import Run, collect
from permllm.report.render import as_text
from scripts.provenance import processor

Nats = NDArray[np.float64]


def reruns(runs: Sequence[Run], least: float = 0.05) -> pd.DataFrame:
    """Return the runs that were measured again with other numbers, the largest difference first.

    Each run has the two of its records that differ most, by at least so many points.
    """
    by_identity = defaultdict(list)
    for run in runs:
        by_identity[run.key()].append(run)
    lines = []
    for records in by_identity.values():
        pairs = [(*pair, points(*pair, runs)) for pair in combinations(records, 2)]
        pairs = [pair for pair in pairs if abs(pair[2]) >= least]
        if pairs:
            names = [record.config.get("method") for record in records]
            one, other, difference = max(pairs, key=lambda pair: abs(pair[2]))
            lines.append(
                {
                    "model": one.config["model"]["name"],
                    "run": next(
                        filter(None, names), f"{one.config['pruner']['name']}, {one.methods}"
                    ),
                    "seed": str(one.config["seed"]),
                    "record": _described(one),
                    "other record": _described(other),
                    "points": f"{abs(difference):.1f}",
                }
            )
    return pd.DataFrame(sorted(lines, key=lambda line: -float(line["points"])))


def points(one: Run, other: Run, runs: Iterable[Run]) -> float:
    """Return by how many points more of the gap the first record closes; 0: nothing to compare."""
    differences = []
    texts = _nats(one)
    others = _nats(other)
    dense = _nats(one, dense=True)
    start = _start(one, runs)
    for text in texts.keys() & others.keys() & start.keys():
        parts = [values[text] for values in (texts, others, start, dense)]
        count = min(map(len, parts))
        of_one, of_other, of_start, of_dense = (part[:count].mean() for part in parts)
        same_windows = np.allclose(
            dense[text][:count], _nats(other, dense=True)[text][:count], rtol=1e-3
        )
        if same_windows:
            differences.append((of_other - of_one) / (of_start - of_dense))
    return 100 * float(np.mean(differences)) if differences else 0.0


def _start(run: Run, runs: Iterable[Run]) -> dict[str, Nats]:
    """Return the nats of Wanda without a permutation, of the record with the most windows."""
    starts = [
        _nats(other)
        for other in runs
        if other.methods == "none"
        and other.config["pruner"]["name"] == "wanda"
        and other.config["seed"] == 0
        and all(other.config[key] == run.config[key] for key in ("model", "sparsity"))
    ]
    return max(starts, key=lambda nats: sum(map(len, nats.values())), default={})


def _nats(run: Run, dense: bool = False) -> dict[str, Nats]:
    """Return the nats a token of each window, by text, of the pruned or of the dense model."""
    scores: dict[str, Scores] = {}
    for metric in run.results:
        if metric.kind == "perplexity" and metric.dense:
            scores |= metric.dense.scores if dense else metric.scores
    return {text: np.array(nats) for text, (_, nats) in scores.items()}


def _described(run: Run) -> str:
    hardware = run.environment["hardware"]
    git = run.environment["git"]
    file = f"{run.directory.parent.parent.name}/{run.directory.parent.name}"
    words = processor(run.environment).removeprefix("Intel(R) ").split(" ")
    about = [git["commit"][:7], words[0], hardware["threads"], run.metrics["compute_dtype"]]
    return f"`{file}` ({', '.join(map(str, about))})"


def main(words: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl")
    runs = collect(parser.parse_args(words).files, apart=True).runs
    print(as_text(reruns(runs), "md"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
