"""Options of the groups in `conf/`, and the comment at the head of the YAML of each."""

import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from permllm.settings.config import METHOD_GROUPS
from permllm.settings.values import flatten

# Groups whose options are methods. The help has a line for each of these.
EXPLAINED = ("method", "method/frontier", *METHOD_GROUPS)
_COMMANDS = ("# python run.py ", "# permllm run ")


def conf_directory() -> Path:
    """Return the folder of the YAML files, in an installed package or beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def groups() -> list[str]:
    """Return the names of all groups, sorted."""
    return sorted(folder.name for folder in conf_directory().iterdir() if folder.is_dir())


def options(group: str, places: Sequence[str] = ()) -> dict[str, str]:
    """Return the comment at the head of each YAML of a group, by the name of the option.

    `places` are further places with options, as in `hydra.searchpath`.
    """
    heads = {}
    for folder in [conf_directory(), *map(_folder, places)]:
        part = folder.joinpath(*group.split("/"))
        for file in part.iterdir() if part.is_dir() else ():
            if file.name.endswith(".yaml"):
                heads[file.name.removesuffix(".yaml")] = _head(file.read_text(encoding="utf-8"))
    return dict(sorted(heads.items()))


@cache
def set_by_method(method: str) -> dict[str, Any]:
    """Return the names of options, and other values, that an option of `method` sets, by key.

    A value may refer to other settings. An option of another package sets nothing here.
    """
    file = conf_directory() / "method" / f"{method}.yaml"
    if not file.is_file():
        return {}
    own = yaml.safe_load(file.read_text(encoding="utf-8"))
    settings = {"mask.name": "pruner", "reconstruction.name": "none"}
    for entry in own.pop("defaults"):
        if isinstance(entry, dict):
            for key, option in entry.items():
                settings[f"{key.removeprefix('override /')}.name"] = option
        else:  # another method, which this one is a variant of
            settings |= set_by_method(entry.removeprefix("/method/"))
    return settings | flatten(own)


def help_of_groups(places: Sequence[str] = ()) -> str:
    """Return the options of all groups for --help; the groups of methods come last."""
    lines = []
    for group in groups():
        if group not in EXPLAINED:
            lines.append(f"{group}: {', '.join(options(group, places))}")
    for group in EXPLAINED:
        top, _, inner = group.partition("/")
        if not inner:
            lines += ["", f"{top}:"]
        for name, head in options(group, places).items():
            typed = f"{inner}/{name}" if inner else name
            sentence = re.split(r"(?<=\.)\s", head)[0]
            lines.append(f"  {typed:27} {sentence}")
    return "\n".join(lines)


def _folder(place: str) -> Traversable:
    """Return the folder of a place in `hydra.searchpath`, `pkg://PACKAGE` or `file://FOLDER`."""
    kind, _, name = place.rpartition("://")
    return resources.files(name) if kind == "pkg" else Path(name)


def _head(text: str) -> str:
    """Return the first comment of a YAML, which ends at the first command, in one line."""
    words = []
    for line in text.splitlines():
        if not line.startswith("# ") or line.startswith(_COMMANDS):
            break
        if "@package" not in line:
            words.append(line.removeprefix("# "))
    return " ".join(words)
