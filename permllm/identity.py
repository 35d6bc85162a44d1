"""Settings that make a pruned model, settings that say how it is evaluated, and digests of both.

All functions take settings as plain values, so that those of a record can be given too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Settings that do not change a pruned model; its identity leaves them out.
_NOT_PART_OF_A_RUN = (
    *("force", "plan", "logger", "runs_dir", "run_dir", "export", "evaluation", "paths"),
    *("protocol", "budget", "method"),
)
# Of the model: under what it comes, and where its weights wait, which change nothing of it.
_NOT_OF_THE_MODEL = ("accept_terms", "terms", "licence", "notice", "placement")
# Settings at the top that a permutation takes as arguments where its `uses` names them.
FROM_THE_TOP = ("block_size", "temperature")
# Among the digests of files (`inputs`), those that a model is evaluated on, and of these the text of the perplexity.
_EVALUATED = "evaluation."
_EVALUATED_FILE = "evaluation.perplexity.data_files"

_DIGITS = 12


def identity_of(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The part of resolved settings that makes a pruned model.

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
    permutation = dict(identity.get("permutation") or {})
    used = permutation.pop("uses", None) or []
    identity["permutation"] = permutation
    for key in FROM_THE_TOP:
        if key not in used:
            identity.pop(key, None)
    return _without_classes(identity)


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
    if file:
        text |= {"dataset": None, "file": str(file).rsplit("/", 1)[-1], "digest": digest}
    found = {}
    if text and (resolved.get("model") or {}).get("bos"):
        text["bos"] = True
    if file or text.get("dataset") is not None:
        found["perplexity"] = text
    if tasks.get("tasks"):
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


def _without_classes(value: Any) -> Any:
    """The settings without the names of this package's classes; those of somebody else's say what they are."""
    if not isinstance(value, Mapping):
        return value
    ours = str(value.get("_target_", "")).startswith(f"{__name__.partition('.')[0]}.")
    return {key: _without_classes(part) for key, part in value.items() if not (key == "_target_" and ours)}
