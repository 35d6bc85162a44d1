"""The code that a result follows from: what an older checkout computed is not taken for what this one would."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
_NAME = _PACKAGE.name
# Packages that carry values and make none. Of `runtime`, only the precision of products changes a value.
_PLUMBING = ("errors", "config", "runtime", "runs")
_DECIDES = (f"{_NAME}.runtime.precision",)


@cache
def code_digest(*modules: str) -> str:
    """sha256 of the source of modules and of all that they import of this package, without what only carries values.

    Args:
        modules: full names; of one that is not of this package, which is imported already, its own source alone counts.
    """
    digest = hashlib.sha256()
    ours = tuple(name for name in modules if name.partition(".")[0] == _NAME)
    for name in sorted(_reached(ours)):
        digest.update(name.encode() + _file(name).read_bytes())
    for name in sorted(set(modules) - set(ours)):
        source = getattr(sys.modules.get(name), "__file__", None)
        digest.update(name.encode() + (Path(source).read_bytes() if source else b""))
    return digest.hexdigest()


def _reached(modules: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [other for other in _imports(name) if _makes_values(other)]
    return found


def _makes_values(name: str) -> bool:
    return name in _DECIDES or name.split(".")[1] not in _PLUMBING


def _imports(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(_file(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == _NAME:
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                if name != _NAME and _file(name).is_file():
                    yield name


def _file(module: str) -> Path:
    path = _PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
