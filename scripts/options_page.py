"""Write docs/options.md: every group, its options, and each setting with its type, its default and what it does.

python scripts/options_page.py
"""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from permllm import config  # noqa: E402
from permllm.config import FROM_THE_TOP, flatten  # noqa: E402
from permllm.pruning.config_store import SETTINGS, options_of  # noqa: E402

PAGE = ROOT / "docs" / "options.md"
# The settings of a group whose options share them.
SHARED = {
    "model": config.ModelConfig,
    "calibration": config.CalibrationConfig,
    "evaluation": config.EvaluationConfig,
    "export": config.ExportConfig,
    "logger": config.LoggerConfig,
    "paths": config.PathsConfig,
    "budget": config.BudgetConfig,
}
KINDS = {int: "whole number", float: "number", bool: "true or false", str: "string", type(None): "null", Any: "any"}
INTRODUCTION = """\
# Options

Each setting, from the classes that hold them (`python scripts/options_page.py` writes this page). `GROUP=OPTION` chooses an
option, `KEY=VALUE` sets a value, `permllm run --cfg job --resolve` shows the result. An option sets what differs from the
defaults.

`conf/local/default.yaml` is yours: git ignores it, it is composed last, and what it says holds on this machine unless the
command line says otherwise, such as `paths: {cache_dir: /scratch/permllm}` after the line `# @package _global_`.
"""


def page() -> str:
    """The page."""
    return "\n".join([INTRODUCTION, *_top(), *(line for group in options_of() for line in _group(group))])


def _top() -> Iterator[str]:
    yield "## At the top\n"
    nested = {*options_of(), "budget"}
    yield from _settings(config.RunConfig, "", [one.name for one in fields(config.RunConfig) if one.name not in nested])


def _group(group: str) -> Iterator[str]:
    chosen, options = options_of()[group]
    yield f"## `{group}`\n"
    yield f"By itself `{chosen}`.\n" if chosen else "By itself none.\n"
    yield "| option | what | sets |\n| --- | --- | --- |"
    for option in options:
        text = _text(group, option)
        said = " ".join(line[2:] for line in text.splitlines() if line.startswith("# ") and "@package" not in line)
        what = re.split(r" (?:python run\.py|python -m)", said)[0]
        yield f"| `{option}` | {_cell(what)} | {', '.join(_sets(group, yaml.safe_load(text) or {}).values())} |"
    yield ""
    if group in SHARED:
        yield from _settings(SHARED[group], group)
    for option, settings in SETTINGS.get(group, {}).items():
        yield f"`{group}={option}`:\n"
        yield from _settings(settings, group)


def _text(group: str, option: str) -> str:
    return (config.conf_directory() / group / f"{option}.yaml").read_text(encoding="utf-8")


def _sets(group: str, values: dict[str, Any]) -> dict[str, str]:
    """What an option sets, by key; what options share (`_base`) first, of which an option may say otherwise."""
    said: dict[str, str] = {}
    for entry in values.pop("defaults", []):
        if isinstance(entry, dict):
            chosen = {key.removeprefix("override /"): option for key, option in entry.items() if "override" in key}
            said |= {key: f"`{key}={option}`" for key, option in chosen.items()}
        elif entry.startswith("_") and entry != "_self_":
            shared = _sets(group, yaml.safe_load(_text(group, entry)))
            said |= {key: text for key, text in shared.items() if "${oc.select:budget" not in text}  # as `budget` says
        elif not entry.startswith(("_", "/")):
            said[entry] = f"as `{entry}`"
    values.get("model", {}).pop("architecture", None)
    for key, value in flatten(values).items():
        if (key.rpartition(".")[2] not in ("name", "_target_") and not key.startswith("hydra.")) or "params" in key:
            key = key.removeprefix("hydra.sweeper.params.")
            said[key] = f"`{key}={_cell(_shown(value))}`"
    return said


def _settings(settings: type, prefix: str, names: list[str] | None = None) -> Iterator[str]:
    rows, inner = [], []
    hints, said = get_type_hints(settings), _attributes(settings)
    for one in fields(settings):
        key = f"{prefix}.{one.name}".lstrip(".")
        if is_dataclass(hints[one.name]):
            inner.append((hints[one.name], key))
        elif one.init and (one.name not in FROM_THE_TOP if names is None else one.name in names):
            factory = one.default_factory
            default = one.default if factory is MISSING else factory()
            given = "" if default is MISSING or default == "???" else f"`{_shown(default)}`"
            rows.append(f"| `{key}` | {_kind(hints[one.name])} | {given} | {_cell(said.get(one.name, ''))} |")
    if rows:
        yield from ("| setting | type | default | what |\n| --- | --- | --- | --- |", *rows, "")
    if names is None:
        for kind, key in inner:
            yield from _settings(kind, key)


def _attributes(settings: type) -> dict[str, str]:
    """What a docstring says of each setting."""
    said: dict[str, str] = {}
    for kind in reversed(settings.__mro__):
        text = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2] if kind.__doc__ else ""
        for name, what in re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", text, re.MULTILINE):
            said[name] = re.sub(r"\bNone\b", "null", " ".join(what.split()))
    return said


def _kind(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in get_args(hint))
    if get_origin(hint) in (list, dict):
        return "list" if get_origin(hint) is list else "mapping"
    return KINDS.get(hint, "")


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(page() + "\n", encoding="utf-8")
