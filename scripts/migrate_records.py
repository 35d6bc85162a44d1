"""Rewrite kept records of schema version 2 as version 3: python scripts/migrate_records.py experiments/*/*.jsonl."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from permllm.config import digest_of, identity_of

GONE = ("units", "protocol", "files", "code", "zero_shot", "other_evaluations")
COPIED = ("evaluation", "evaluation_hash", "perplexity", "tasks", "evaluated_texts")


def evaluated(entry: dict[str, Any], scores: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """Return an evaluation in the present form."""
    how = dict(entry["evaluation"])
    asked = how.pop("zero_shot", None)
    if asked:
        common = {"num_fewshot": None, "limit": asked["limit"], "add_bos_token": asked["add_bos_token"]}
        common |= {"source": "wheel"} if asked["source"] == "wheel" else {}
        how["tasks"] = {name: dict(common) for name in asked["tasks"]}
    assert not entry.get("tasks")
    found: dict[str, Any] = {"evaluation": how, "evaluation_hash": digest_of(how)}
    found["perplexity"] = entry.get("perplexity", {})
    found["tasks"] = {
        which: {task: result(task, values) for task, values in tasks.items()}
        for which, tasks in entry.get("zero_shot", {}).items()
    }
    digest = entry["texts"]["perplexity"]
    names = list(found["perplexity"]["dense"])
    found["evaluated_texts"] = digest if isinstance(digest, dict) else dict.fromkeys(names, digest)
    assert isinstance(digest, dict) or len(names) == 1
    found["seconds"] = seconds
    kept = scores.get(entry["evaluation_hash"], {})
    found["scores"] = {"perplexity": kept.get("perplexity", {}), "tasks": {}}
    for which, tasks in kept.get("zero_shot", {}).items():
        found["scores"]["tasks"][which] = {
            task: {"digest": one["digest"], "items": one["items"], "metrics": {"acc,none": one["acc"]}}
            for task, one in tasks.items()
        }
    return found


def result(task: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return a task's result in the present form."""
    metrics = {f"{key},none": values[key] for key in ("acc", "acc_norm") if values[key] is not None}
    stderr = {"acc,none": values["stderr"]} if values["acc"] is not None else {}
    rest = {key: values.get(key) for key in ("n", "limited", "split")}
    return {"metrics": metrics, "stderr": stderr, **rest, "num_fewshot": None, "asked": task}


def migrated(line: dict[str, Any]) -> dict[str, Any]:
    """Return a record in the present form."""
    line.pop("crc32")
    metrics, config = line["metrics"], line["config"]
    if "study" in metrics:
        return line
    scores = line.pop("scores", {}).get("evaluations", {})
    seconds = {stage: value for stage, value in metrics["seconds"].items() if stage.startswith("evaluate")}
    entries = [metrics, *(other for other in metrics.get("other_evaluations", []) if other["finished"])]
    evaluations = [evaluated(entry, scores, {} if number else seconds) for number, entry in enumerate(entries)]
    texts = {"calibration": metrics["texts"]["calibration"]} if "calibration" in metrics["texts"] else {}
    kept = {key: value for key, value in metrics.items() if key not in (*GONE, *COPIED)}
    line["metrics"] = kept | {"schema_version": 3, "texts": texts} | {key: evaluations[0][key] for key in COPIED}
    old = config["evaluation"].pop("zero_shot")
    assert not config["evaluation"]["tasks"]
    config["evaluation"]["tasks"] = old.pop("tasks")
    config["evaluation"]["lm_eval"] = old
    first = {"run": line["run"], "config": config, "metrics": line["metrics"], "evaluations": evaluations}
    return first | {key: line[key] for key in ("environment", "history") if key in line}


def joined(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records with those of one pruned model as one, whose evaluations name the record that they are from."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        if "study" in line["metrics"]:
            return lines
        there = found.setdefault(json.dumps(identity_of(line["config"]), sort_keys=True), line)
        if there is line:
            continue
        assert all(there["metrics"][key] == line["metrics"][key] for key in ("sparsity", "retained_saliency", "output_error"))
        for one in (there, line):
            for evaluation in one["evaluations"]:
                evaluation.setdefault("config_hash", one["metrics"]["config_hash"])
        there["evaluations"] += line["evaluations"]
        for stage, value in line["metrics"]["seconds"].items():
            if stage.startswith("evaluate"):
                there["metrics"]["seconds"][stage] += value
        print("joined", there["run"], line["run"])
    return list(found.values())


for name in sys.argv[1:]:
    lines = [migrated(json.loads(line)) for line in Path(name).read_text().splitlines()]

    Path(name).write_text("".join(json.dumps(line) + "\n" for line in (joined(lines) if "peers" in name else lines)))
