"""What a result follows from: the settings that make a pruned model, those that say how it is evaluated, and their digests.

Works on settings as plain values, those of a record too, which an earlier version may have written: the same pruned model has
the same identity in both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Settings that do not change a pruned model; its identity leaves them out.
_NOT_PART_OF_A_RUN = ("force", "plan", "logger", "runs_dir", "run_dir", "export", "budget", "evaluation", "paths")
# Of the model: under what it comes, and where its weights wait, which change nothing of it.
_NOT_OF_THE_MODEL = ("accept_terms", "terms", "licence", "notice", "placement")
# Settings that came later, dotted, with the value at which everything is as it was before them. At that value the identity
# leaves them out, so that no run directory changes its name.
_ADDED_LATER: dict[str, Any] = {
    "study": {},
    "model.wheel": None,
    "model.bos": False,
    "permutation.norm_over": "tokens",
    "permutation.temperature_every": "step",
    "permutation.sinkhorn_start": "exponential",
    "mask": {"name": "pruner"},
    "permutation.steps": None,
    "permutation.samples": None,
    "permutation.skip": 0,
    "permutation.micro_batch_size": None,
    "mask.micro_batch_size": None,
    "reconstruction.micro_batch_size": None,
    "mask.skip": 0,
    "mask.weights_learning_rate": None,
    "calibration.sampling": "disjoint",
    "reconstruction.columns": "permuted",
    "reconstruction.samples": None,
    "reconstruction.skip": 0,
    "reconstruction.average": 0.0,
    "reconstruction.start": "masked",
    "reconstruction.steps": None,
    "reconstruction.activation_checkpointing": None,
    "keep_dense": [],
    "sparsity_of": {},
    "permutation.deal": "random",  # which was taken out again
}

# Settings at the top that a permutation takes as arguments where its `uses` names them.
FROM_THE_TOP = ("block_size", "temperature")
# Among the digests of files (`inputs`), those that a model is evaluated on, and of these the text of the perplexity.
_EVALUATED = "evaluation."
_EVALUATED_FILE = "evaluation.perplexity.data_files"

_DIGITS = 12
# Of the digests of earlier versions, which counted the evaluation and the names of classes as well.
EARLIER_DIGITS = 10


def identity_of(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The part of resolved settings that makes a pruned model, or what a study measures.

    Neither the names of this package's classes, which may move, nor what the permutation does not use are part of it.
    """
    identity = {key: value for key, value in resolved.items() if key not in _NOT_PART_OF_A_RUN}
    if "inputs" in identity:
        identity["inputs"] = {
            key: digest for key, digest in (identity["inputs"] or {}).items() if not key.startswith(_EVALUATED)
        }
    if isinstance(identity.get("model"), Mapping):
        identity["model"] = {key: value for key, value in identity["model"].items() if key not in _NOT_OF_THE_MODEL}
        if str(identity["model"].get("device")).startswith("cuda:"):  # which of them is all one
            identity["model"]["device"] = "cuda"
    identity["permutation"], used = _split(identity.get("permutation") or {})
    for key in FROM_THE_TOP:
        if key not in used:
            identity.pop(key, None)
    # Earlier versions gave the constant temperature an end.
    temperature = identity.get("temperature")
    if isinstance(temperature, Mapping) and temperature.get("name") == "constant":
        identity["temperature"] = {key: value for key, value in temperature.items() if key != "end"}
    identity = _without_classes(identity)
    for path, before in _ADDED_LATER.items():
        identity = _without(identity, path.split("."), before)
    return identity


def later_settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that came later, dotted, with their values in an identity also where it leaves them out."""
    found = {}
    for path, before in _ADDED_LATER.items():
        value: Any = identity
        for key in path.split("."):
            value = value.get(key, before) if isinstance(value, Mapping) else before
        found[path] = value
    return found


def evaluation_of(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The part of resolved settings that says how a model is evaluated: `perplexity`, `zero_shot`, `tasks`, where asked for.

    Sizes of batches are not part of it, nor is where a file lies, but its name, which names the result, and its digest.
    """
    settings = resolved.get("evaluation") or {}
    text, tasks = dict(settings.get("perplexity") or {}), dict(settings.get("zero_shot") or {})
    digest = (resolved.get("inputs") or {}).get(_EVALUATED_FILE)
    file = text.pop("data_files", None)
    text.pop("batch_tokens", None)
    tasks.pop("batch_size", None)
    if tasks.get("add_bos_token", "absent") is None:  # came later
        tasks.pop("add_bos_token")
    if file:
        text |= {"dataset": None, "file": str(file).rsplit("/", 1)[-1], "digest": digest}
    found = {}
    if text and (resolved.get("model") or {}).get("bos"):
        text["bos"] = True
    if text and (file or text.get("dataset", "of an early record") is not None):
        found["perplexity"] = text
    if tasks and tasks.get("tasks", "of an early record"):
        found["zero_shot"] = tasks
    asked = {}
    for name, task in (settings.get("tasks") or {}).items():
        how = dict(task or {"num_fewshot": None, "limit": None})
        how |= {key: value for key, value in tasks.items() if key == "add_bos_token" or (key, value) == ("source", "wheel")}
        file = f"{_EVALUATED}tasks.{name}"
        digest = (resolved.get("inputs") or {}).get(file, "of no file")
        asked[str(name).rsplit("/", 1)[-1]] = how if digest == "of no file" else how | {"digest": digest}
    if asked:
        found["tasks"] = asked
    return found


def digest_of(settings: Mapping[str, Any]) -> str:
    """Hexadecimal digest of settings."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _split(permutation: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings of a permutation that are its own, and the names of those that it takes from the top."""
    own = dict(permutation)
    # Earlier versions repeated them in the group.
    repeated = [key for key in FROM_THE_TOP if key in own]
    used = [*(own.pop("uses", None) or []), *repeated]
    for key in repeated:
        own.pop(key)
    return own, used


def _without_classes(value: Any) -> Any:
    """The settings without the names of this package's classes; those of somebody else's say what they are."""
    if not isinstance(value, Mapping):
        return value
    ours = str(value.get("_target_", "")).startswith(f"{__name__.partition('.')[0]}.")
    return {key: _without_classes(part) for key, part in value.items() if not (key == "_target_" and ours)}


def _without(settings: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """The settings without the one at `path`, where it has this value."""
    key, *below = path
    present = settings.get(key)
    if below and isinstance(present, dict):
        return settings | {key: _without(present, below, value)}
    if not below and present == value:
        return {name: kept for name, kept in settings.items() if name != key}
    return settings
