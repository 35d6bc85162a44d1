"""Rewrite kept records in the present names of settings: python scripts/migrate_records.py experiments/*/*.jsonl.

Records of version 1.1 and before have other names, and lack settings that came later. The script gives each record all
settings that its methods have today, and removes settings that no longer exist where they had no effect.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from permllm.config import (
    FROM_THE_TOP,
    CalibrationConfig,
    ExportConfig,
    LoggerConfig,
    ModelConfig,
    PathsConfig,
    PerplexityConfig,
    RunConfig,
    ZeroShotConfig,
    digest_of,
    evaluation_of,
)
from permllm.pruning.config_store import SETTINGS
from permllm.runs.files import write_record_lines
from permllm.runs.names import SCHEMA_VERSION

# Old key, new key, and values that have other names, by dotted group.
RENAMED: dict[str, dict[str, tuple[str, dict[Any, Any]]]] = {
    "permutation": {
        "passes": ("epochs", {}),
        "window": ("layers_per_stage", {"model": "all", "layer": 1}),
        "temperature_every": ("temperature_every", {"pass": "epoch"}),
    },
    "reconstruction": {"passes": ("epochs", {})},
    "calibration": {"length": ("seqlen", {})},
    "evaluation.perplexity": {"window": ("seqlen", {})},
    "budget": {"passes": ("epochs", {}), "length": ("seqlen", {})},
}
# What a record ran with that lacks a setting whose default is another one.
BEFORE: dict[str, Any] = {
    "compute_dtype": "float32",
    "permutation.loss": "cosine",
    "reconstruction.start": "masked",
}
# Values at which settings that are gone had no effect.
GONE: dict[str, tuple[Any, ...]] = {
    "permutation.target": ("position",),
    "permutation.mask_temperature": (1.0,),
    "permutation.deal": ("random",),
    "temperature.end": (0.1,),
    "export.format": ("dense",),
    "permutation.rounds": (1,),
    "permutation.gumbel": (0.0,),
    "permutation.skip": (0,),
    "mask.rounds": (1,),
    "mask.skip": (0,),
    "mask.orders": ("fixed",),
    "mask.start": ("pruner",),
    "mask.centered": (True,),
    "mask.sweeps": (3,),
    "mask.weights_learning_rate": (None,),
    "reconstruction.average": (0.0,),
    "reconstruction.columns": ("permuted",),
}
OF_THE_PAPER = {
    "normalize_saliency": False,
    "norm_over": "samples",
    "temperature_every": "epoch",
    "sinkhorn_start": "softmax",
}
CLASSES = {"lcp-paper": "lcp"}
TARGETS = {
    "wanda": "permllm.pruning.wanda.Wanda",
    "ria": "permllm.pruning.ria.RIA",
    "sparsegpt": "permllm.pruning.sparsegpt.SparseGPT",
    "magnitude": "permllm.pruning.magnitude.Magnitude",
    "heuristic": "permllm.permutation.heuristic.Heuristic",
    "from_file": "permllm.permutation.from_file.FromFile",
    "lcp": "permllm.permutation.lcp.lcp.LCP",
    "pruner": "permllm.mask.pruner.PrunerMask",
    "score": "permllm.mask.score.ScoreMask",
    "lowrank": "permllm.mask.lowrank.LowRankMask",
    "refined": "permllm.mask.refined.RefinedMask",
    "admm": "permllm.pruning.admm.ADMM",
    "obs": "permllm.pruning.obs.OBS",
    "distill": "permllm.pruning.distill.Distill",
    "linear": "permllm.permutation.lcp.temperature.Linear",
}
NONE = {
    "permutation": "permllm.permutation.none.Identity",
    "reconstruction": "permllm.pruning.reconstruction.NoReconstruction",
}


def renamed(settings: dict[str, Any]) -> None:
    """Give the settings their present keys and values, in place."""
    for path, entries in RENAMED.items():
        group: Any = settings
        for part in path.split("."):
            group = group.get(part) if isinstance(group, dict) else None
        if not isinstance(group, dict):
            continue
        given = dict(group)
        group.clear()
        for key, value in given.items():
            name, values = entries.get(key, (key, {}))
            group[name] = values.get(value, value) if isinstance(value, str) else value


def conventions(permutation: dict[str, Any]) -> None:
    """Replace four settings of LCP by the one that says both, in place."""
    if all(permutation.get(key) == value for key, value in OF_THE_PAPER.items()):
        permutation["conventions"] = "paper"
    elif "normalize_saliency" in permutation:
        assert permutation["normalize_saliency"]
        permutation.setdefault("conventions", "ours")
    for key in OF_THE_PAPER:
        permutation.pop(key, None)


def complete(path: str, given: Mapping[str, Any], kind: type | None, keep: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return all settings of a class: those that are given, and for the others what a record without them ran with."""
    own = [one for one in fields(kind) if one.init] if kind is not None else []  # type: ignore[arg-type]
    own = [one for one in own if path == "" or one.name not in FROM_THE_TOP]
    names = {*keep, *(one.name for one in own)}
    found = {key: value for key, value in given.items() if key in names}
    for one in own:
        if one.name in given:
            continue
        if f"{path}.{one.name}" in BEFORE:
            found[one.name] = BEFORE[f"{path}.{one.name}"]
        elif one.default is not MISSING:
            found[one.name] = one.default
        elif one.default_factory is not MISSING:
            found[one.name] = one.default_factory()
    for key, value in given.items():
        if key not in found and value not in GONE.get(f"{path}.{key}", ()):
            print(f"{path}.{key}={value!r}: this setting is gone, and it had an effect: it is kept")
            found[key] = value
    return found


def complete_group(group: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a group that names a class."""
    own = {key: value for key, value in given.items() if key not in (*FROM_THE_TOP, "uses", "_target_")}
    option = CLASSES.get(own["name"], own["name"])
    kind = SETTINGS[group].get(option)
    uses = [one.name for one in fields(kind) if one.name in FROM_THE_TOP] if kind is not None else []  # type: ignore[arg-type]
    head = {"name": own.pop("name"), "_target_": NONE[group] if option == "none" else TARGETS[option]}
    return head | ({"uses": uses} if uses else {}) | complete(group, own, kind)


def migrated(config: dict[str, Any]) -> dict[str, Any]:
    """Return a record's settings in the present form."""
    renamed(config)
    if config.get("study"):
        return config
    config.setdefault("mask", {"name": "pruner"})
    config.setdefault("reconstruction", {"name": "none"})
    config.setdefault("inputs", {})
    for key, value in BEFORE.items():
        if "." not in key:
            config.setdefault(key, value)
    evaluation = config["evaluation"]
    evaluation["perplexity"] = complete("evaluation.perplexity", evaluation["perplexity"], PerplexityConfig)
    evaluation["zero_shot"] = complete("evaluation.zero_shot", evaluation["zero_shot"], ZeroShotConfig)
    evaluation.setdefault("tasks", {})
    config["model"] = complete("model", config["model"], ModelConfig)
    config["calibration"] = complete("calibration", config["calibration"], CalibrationConfig)
    config["calibration"]["sampling"] = config["calibration"]["sampling"] or "disjoint"
    config["logger"] = complete("logger", config["logger"], LoggerConfig)
    config["export"] = complete("export", config.get("export", {}), ExportConfig)
    config["paths"] = complete("paths", config.get("paths", {}), PathsConfig)
    budget = config.get("budget", {})
    config["budget"] = {key: value for key, value in budget.items() if key not in ("name", "calibrations")}
    conventions(config["permutation"])
    for group in ("pruner", "permutation", "temperature", "mask", "reconstruction"):
        config[group] = complete_group(group, config[group])
    config.pop("study", None)
    return complete("", config, RunConfig, keep=("inputs",))


def migrate(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return records in the present form."""
    for line in lines:
        line.pop("crc32", None)
        before, metrics, config = line["config"], line["metrics"], None
        scores = line.get("scores", {}).get("evaluations", {})
        config = line["config"] = migrated(before)
        metrics["schema_version"] = SCHEMA_VERSION
        renamed(metrics.get("protocol", {}))
        if "study" in metrics:
            continue
        for entry in (metrics, *metrics.get("other_evaluations", [])):
            renamed({"evaluation": entry.get("evaluation", {})})
            renamed(entry.get("protocol", {}))
            if how := entry.get("evaluation", {}).get("zero_shot"):
                how.setdefault("add_bos_token", None)
            if entry is metrics and "evaluation" not in metrics:
                entry["evaluation"] = evaluation_of(config)
            hashed = digest_of(entry["evaluation"])
            if entry.get("evaluation_hash") in scores:
                scores[hashed] = scores.pop(entry["evaluation_hash"])
            entry["evaluation_hash"] = hashed
        metrics["sparsity"].setdefault("of_model", metrics["sparsity"]["fraction"])
        if "export" in metrics:
            metrics["export"].setdefault("shard_gb", config["export"]["shard_gb"])
    return lines


def texts(records: list[dict[str, Any]]) -> dict[tuple[str, int, float], str]:
    """Return the digests of texts, by name, window and perplexity of the dense model."""
    found = {}
    for metrics in (line["metrics"] for line in records):
        for name, values in metrics.get("perplexity", {}).get("dense", {}).items():
            digest = metrics.get("texts", {}).get("perplexity")
            if digest:
                found[name, values["window"], values["value"]] = digest if isinstance(digest, str) else digest[name]
    return found


def main() -> None:
    """Rewrite files in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    files = {file: [json.loads(line) for line in file.read_text().splitlines()] for file in parser.parse_args().files}
    known = texts([line for lines in files.values() for line in lines])
    for file, lines in files.items():
        migrated_lines = migrate(lines)
        for line in migrated_lines:
            metrics, given = line["metrics"], line["config"]["inputs"].get("evaluation.perplexity.data_files", "unknown")
            for name, values in metrics.get("perplexity", {}).get("dense", {}).items():
                of_texts = metrics.setdefault("texts", {})
                if "perplexity" not in of_texts:
                    of_texts["perplexity"] = known.get((name, values["window"], values["value"]), given)
                    print(f"{file} {metrics['name']}: {name} is {of_texts['perplexity'][:60]}")
        write_record_lines(file, migrated_lines)


if __name__ == "__main__":
    main()
