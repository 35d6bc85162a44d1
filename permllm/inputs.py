"""Files that settings name: what changes when one of them does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# What of a definition names files.
_NAMING = ("include", "dataset_path", "data_files", "data_dir")


def input_digest(path: Path) -> str | None:
    """A file's sha256; of a run directory that of its order; of another folder, names, sizes and times; None for nothing."""
    if (path / "permutations.safetensors").is_file():
        path = path / "permutations.safetensors"
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if path.is_dir():
        listing = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(path.iterdir())]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return None


def is_task_file(name: str) -> bool:
    """Whether the name of a task of lm-eval is the path of a YAML that defines one."""
    return name.endswith((".yaml", ".yml"))


@dataclass(frozen=True)
class TaskFunction:
    """A function of a module beside a definition, `!function module.name`."""

    name: str


class TaskDefinition(yaml.SafeLoader):
    """Reads a definition of a task: what `!function` names is a `TaskFunction`, what stands under other tags is None."""


TaskDefinition.add_multi_constructor("!", lambda loader, suffix, node: None)
TaskDefinition.add_constructor(
    "!function", lambda loader, node: TaskFunction(str(node.value)) if isinstance(node, yaml.ScalarNode) else None
)


def task_digest(definition: Path) -> str | None:
    """What changes when a task of one's own does: its YAML's sha256, or one of that and of all that it names.

    Named are definitions that it includes, modules of its functions, and data (`dataset_path`, and in `dataset_kwargs`
    `data_files`, which may be patterns, and `data_dir`): files beside the definition or in the working directory, and all that
    lies in such folders. None where there is no YAML.
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
        return  # which is said where the task is read
    for name in _named(found):
        for place in (definition.parent / name, Path(name)):
            with suppress(OSError, ValueError):  # a text that is no path
                if is_task_file(name):
                    _add_files(place, files)
                    continue
                found_there = sorted(place.parent.glob(place.name)) if "*" in place.name else [place]
                inside = (sorted(one.rglob("*")) if one.is_dir() else [one] for one in found_there)
                files.update(dict.fromkeys(file for one in inside for file in one if file.is_file()))


def _named(value: Any, naming: bool = False) -> Iterator[str]:
    """Paths that a part of a definition may name, whether they are there or not."""
    if isinstance(value, TaskFunction):
        yield f"{value.name.rpartition('.')[0]}.py"
    elif isinstance(value, str) and naming:
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _named(part, naming or key in _NAMING)
    elif isinstance(value, list):
        for part in value:
            yield from _named(part, naming)
