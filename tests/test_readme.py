"""The README says what is true: its result is that of the records, its install commands are those of CI and pyproject."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.conftest import ROOT, script

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_results_are_those_of_the_records() -> None:
    assert script("update_readme").with_results(README) == README, "stale: run python scripts/update_readme.py"


def test_the_ablation_tables_are_those_of_the_records() -> None:
    document = (ROOT / "experiments" / "lcp_ablation" / "README.md").read_text(encoding="utf-8")
    assert script("ablation_table").with_tables(document) == document, "stale: run python scripts/ablation_table.py"


def test_the_speed_tables_are_those_of_the_records() -> None:
    document = (ROOT / "experiments" / "lcp_speed" / "README.md").read_text(encoding="utf-8")
    assert script("speed_table").with_tables(document) == document, "stale: run python scripts/speed_table.py"


def test_the_tables_of_exports_are_those_of_the_records() -> None:
    document = (ROOT / "experiments" / "export" / "README.md").read_text(encoding="utf-8")
    assert script("export_table").with_tables(document) == document, "stale: run python scripts/export_table.py"


def test_the_papers_tables_are_those_of_the_records() -> None:
    for file, text in script("paper_tables").with_blocks().items():
        assert file.read_text(encoding="utf-8") == text, f"{file} is stale: run python scripts/paper_tables.py"


def test_the_two_commands_exist_as_written() -> None:
    assert "pip install -e . && python run.py\n" in README
    assert "pip install -e '.[test]' && pytest\n" in README
    assert "pip install --quiet -e '.[test]'\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert "test" in extras


@pytest.mark.parametrize(
    "group",
    [
        "model",
        "pruner",
        "permutation",
        "temperature",
        "reconstruction",
        "calibration",
        "evaluation",
        "export",
        "logger",
        "budget",
        "method",
        "study",
        "hparams_search",
        "experiment",
    ],
)
def test_every_option_is_in_the_table_and_every_option_in_the_table_exists(group: str) -> None:
    (row,) = re.findall(rf"^\| `{group}` \| (.*) \|$", README, flags=re.MULTILINE)
    named = {name for name in re.findall(r"`([^`]+)`", row) if "=" not in name and not name.startswith(f"{group}.")}
    assert named == {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}


def test_links_to_files_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists()


def test_commands_for_several_processes_have_a_sample_of_each_batch_for_each() -> None:
    commands = [line for line in README.splitlines() if line.startswith("torchrun ")]
    assert commands
    for command in commands:
        found = re.match(r"torchrun --nproc-per-node (\d+) run\.py .*permutation\.batch_size=(\d+)", command)
        assert found, command
        assert int(found[2]) >= int(found[1])
