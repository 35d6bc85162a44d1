"""Identity of a run and of its evaluation: settings, and digests of the files in settings."""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

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
# Keys of a task's definition whose values are files.
_NAMING = ("include", "dataset_path", "data_files", "data_dir")


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


class TaskDefinition(yaml.SafeLoader):
    """Loader of a task's YAML that replaces `!function module.name` by the file of the module."""


def _module(loader: yaml.Loader, node: yaml.Node) -> dict[str, str]:
    return {"include": f"{str(node.value).rpartition('.')[0]}.py"}


TaskDefinition.add_multi_constructor("!", lambda loader, suffix, node: None)
TaskDefinition.add_constructor("!function", _module)


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


def task_digest(definition: Path) -> str | None:
    """Return the sha256 of a task's YAML file and all files that it names; None: no such file.

    It names other definitions, modules of functions, and data files, patterns and folders, relative
    to its folder or to the working directory.
    """
    files: dict[Path, None] = {}
    _add_files(definition, files)
    digests = [input_digest(file) for file in files]
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _add_files(definition: Path, files: dict[Path, None]) -> None:
    """Add a definition and all files that it names to `files`."""
    if definition in files or not definition.is_file():
        return
    files[definition] = None
    try:
        content = yaml.load(definition.read_text(encoding="utf-8"), Loader=TaskDefinition)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return  # lm-eval raises the error later
    for name in _named(content):
        for place in (definition.parent / name, Path(name)):
            with suppress(OSError, ValueError):  # the text is not a path
                if is_task_file(name):
                    _add_files(place, files)
                    continue
                for match in sorted(place.parent.glob(place.name)):
                    inside = sorted([match, *match.rglob("*")])
                    files |= dict.fromkeys(file for file in inside if file.is_file())


def _named(value: Any, naming: bool = False) -> Iterator[str]:
    """Yield the texts in a part of a definition that may be paths."""
    if isinstance(value, str) and naming:
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _named(part, naming or key in _NAMING)
    elif isinstance(value, list):
        for part in value:
            yield from _named(part, naming)
