"""Blocks of a document that are made from records: `python scripts/readme_tables.py FILE.md` makes them anew.

A block stands between two comments, the first of which says what it is made from:

    <!-- view: table records=records.jsonl columns=block_size -->
    <!-- /view -->

Files are named from the document's folder, and a value with spaces stands in quotes. A view is a function of this room, given
the folder and the rest of the words by their names; it returns the lines.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from permllm.errors import ConfigError, DataError

View = Callable[..., list[str]]
# By the name in a document, the module of this package; imported when a document asks for it.
_MODULES = {
    "table": "tables",
    "paper": "tables",
    "index": "tables",
    "peers": "tables",
    "study": "studies",
    "ablation": "ablation",
    "frontier": "frontier",
    "placements": "placements",
    "orders": "exports",
    "stock": "exports",
    "verify": "exports",
}
_BLOCK = re.compile(r"(?P<begin><!-- view: (?P<words>[^\n]*) -->\n)(?P<block>.*?)(?P<end><!-- /view -->)", re.DOTALL)


@dataclass(frozen=True)
class Marker:
    """What a document says of a block: the view, and its options by name."""

    view: str
    options: dict[str, str]


def markers(file: Path) -> Iterator[Marker]:
    """Those of a document, in their order. Raises ConfigError where it cannot be read."""
    for match in _BLOCK.finditer(_text(file)):
        yield _marker(file, match["words"])


def with_views(file: Path) -> str:
    """A document with each of its blocks made anew.

    Raises:
        ConfigError: it cannot be read, there is no such view, or one has no such option.
        DataError: a record is not as it should be.
    """

    def anew(match: re.Match[str]) -> str:
        lines = _lines(file, _marker(file, match["words"]))
        return match["begin"] + "".join(f"{line}\n" for line in lines) + match["end"]

    return _BLOCK.sub(anew, _text(file))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _marker(file: Path, words: str) -> Marker:
    try:
        name, *options = shlex.split(words) or [""]
    except ValueError as error:
        raise ConfigError(f"{file}: view {words}: {error}") from error
    return Marker(name, {key: value for key, _, value in (option.partition("=") for option in options)})


def _lines(file: Path, marker: Marker) -> list[str]:
    if marker.view not in _MODULES:
        near = get_close_matches(marker.view, _MODULES, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{file}: there is no view {marker.view!r}; there are {', '.join(_MODULES)}{meant}")
    view: View = getattr(import_module(f"{__name__}.{_MODULES[marker.view]}"), marker.view)
    try:
        inspect.signature(view).bind(file.parent, **marker.options)
    except TypeError as error:
        raise ConfigError(f"{file}: view {marker.view}: {error}") from error
    try:
        return view(file.parent, **marker.options)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{file}: view {marker.view}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # what a view reads has no declared form
        raise DataError(f"{file}: view {marker.view}: its files are not of the form that it shows ({error!r})") from error
