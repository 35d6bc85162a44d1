"""Digests of the files that settings name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

# Keys of a task's definition that name files.
_NAMING = ("include", "dataset_path", "data_files", "data_dir")


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
