"""Rooms of the package in their order: each imports only from those before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import permllm

PACKAGE = Path(permllm.__file__).parent
# A room is a package, or a file directly in `permllm/`. CONTRIBUTING.md follows this order.
ROOMS = (
    *("errors", "runtime", "command", "settings", "store", "data", "models", "sparsity"),
    *("training", "pruner", "allocation", "permutation", "mask", "reconstruction", "pruning"),
    *("planning", "evaluation", "report", "export", "job", "api", "cli", "__init__"),
)
# Loaded by `import permllm`, they would cost seconds.
HEAVY = ("torch", "transformers", "numpy", "pandas", "hydra", "omegaconf", "pydantic")


def imports_of(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} imports relatively"
            names = (
                [f"{node.module}.{name.name}" for name in node.names]
                if node.module == "permllm"
                else [str(node.module)]
            )
            yield from names
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_has_its_place() -> None:
    assert {room_of(file) for file in PACKAGE.rglob("*.py")} == set(ROOMS)


def test_a_room_imports_only_from_those_before_it() -> None:
    against = []
    for file in sorted(PACKAGE.rglob("*.py")):
        place = ROOMS.index(room_of(file))
        for name in imports_of(file):
            root, _, rest = name.partition(".")
            if root == "permllm":
                room = rest.split(".")[0] or "__init__"
                if room not in ROOMS or ROOMS.index(room) > place:
                    against.append(f"{file.relative_to(PACKAGE)} imports {name}")
    assert against == []


def test_importing_the_package_costs_nothing() -> None:
    code = f"import sys, permllm; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
