"""Identity of a run and of its evaluation: settings, and digests of the files in settings."""

import copy
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from permllm.errors import DataError
from permllm.runtime.files import input_sha256
from permllm.settings.checkpoints import MODEL_FILES, weight_files

# Settings that name a file or a folder.
PATHS = (
    "model.path",
    "permutation.path",
    "calibration.data_files",
    "evaluation.perplexity.data_files",
)


def identity_by_fields(
    kind: type, settings: Mapping[str, Any], **further: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the part of some settings that determines the pruned model.

    The metadata of a field say what the setting does: `identity` is False if it does not determine
    the model, or a function of the value, whose result does. `former` has values that mean the
    behaviour before there was the setting, and do not count. Anything else counts as it is.

    Args:
        kind: dataclass of the settings.
        settings: values by the names of the fields.
        further: such metadata of settings that are no fields of `kind`.
    """
    metadata = {field.name: field.metadata for field in fields(kind)} | further
    identity = {}
    for key, value in settings.items():
        rules = metadata.get(key, {})
        determines = rules.get("identity", True)
        counted = determines(value) if callable(determines) else value
        if determines and counted not in rules.get("former", []):
            identity[key] = counted
    return identity


def without_classes(value: Any) -> Any:
    """Remove each `_target_` without a class, or of this package, whose classes may move.

    A class of another package stays, because no other setting identifies it.
    """
    if not isinstance(value, Mapping):
        return value
    return {
        key: without_classes(part)
        for key, part in value.items()
        if key != "_target_" or not (part is None or part.startswith("permllm."))
    }


def digest_of(settings: dict[str, Any]) -> str:
    """Return a hexadecimal digest of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def with_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the names of files and folders in the place of their paths."""
    named = copy.deepcopy(dict(config))
    for path in PATHS:
        *groups, key = path.split(".")
        settings: dict[str, Any] = named
        for group in groups:
            settings = settings.get(group) or {}
        if settings.get(key):
            settings[key] = Path(settings[key]).name
    return named


def is_task_file(name: str) -> bool:
    """Tell if a task is the path of a YAML file, and not a name of lm-eval."""
    return name.endswith((".yaml", ".yml"))


def input_digest(path: Path) -> str | None:
    """Return a digest of an input's content; None: it does not exist.

    Of a run directory the permutations count, of a model's folder config, generation settings,
    tokenizer and weights.
    """
    if (path / "permutations.safetensors").is_file():
        path = path / "permutations.safetensors"
    if path.is_file():
        return input_sha256(path)
    files = [file for pattern in MODEL_FILES for file in path.glob(pattern)]
    with suppress(DataError):  # the reader of the weights raises it
        files += weight_files(path)
    digests = {file.name: input_sha256(file) for file in files if file.is_file()}
    return digest_of(digests) if digests else None
