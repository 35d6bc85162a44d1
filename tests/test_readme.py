"""The README says what is true: its records, options, links and install commands exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_all_kept_records_are_shown_somewhere() -> None:
    for file in (ROOT / "experiments").rglob("*.jsonl"):
        page = ROOT if file.parent.name == "quickstart" else file.parent
        text = (page / "README.md").read_text(encoding="utf-8")
        views = r"<!-- view: (paper|peers)|The record and its tables"
        assert file.name in text or re.search(views, text), file


def test_the_two_commands_exist_as_written() -> None:
    assert "pip install -e . && python run.py\n" in README
    assert "pip install -e '.[test]' && pytest\n" in README
    assert "pip install --quiet -e '.[test]'\n" in (ROOT / ".ci" / "run").read_text("utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert "test" in project["optional-dependencies"]


@pytest.mark.parametrize(
    "group",
    [
        *("model", "pruner", "permutation", "temperature", "reconstruction", "calibration"),
        *("evaluation", "export", "logger", "budget", "method", "experiment", "protocol"),
    ],
)
def test_every_option_in_the_table_exists(group: str) -> None:
    (row,) = re.findall(rf"^\| `{group}` \| (.*) \|$", README, flags=re.MULTILINE)
    options = [name for name in re.findall(r"`([^`]+)`", row) if "=" not in name]
    named = [name for name in options if not name.startswith(f"{group}.")]
    assert named
    assert [name for name in named if not (ROOT / "conf" / group / f"{name}.yaml").is_file()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 160


def test_commands_for_several_processes_have_a_sample_of_each_batch_for_each() -> None:
    commands = [line for line in README.splitlines() if line.startswith("torchrun ")]
    assert commands
    for command in commands:
        form = r"torchrun --nproc-per-node (\d+) run\.py .*permutation\.batch_size=(\d+)"
        found = re.match(form, command)
        assert found, command
        assert int(found[2]) >= int(found[1])
