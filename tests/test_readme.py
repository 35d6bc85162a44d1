"""Tests of what documents name: records, options, links and commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from permllm.runtime.version import __version__
from permllm.store.files import RECORDS
from tests.conftest import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_all_kept_records_are_shown_somewhere() -> None:
    for file in (ROOT / "experiments").rglob("*.jsonl"):
        page = ROOT if file.parent.name == "quickstart" else file.parent
        text = (page / "README.md").read_text(encoding="utf-8")
        views = re.findall(r"<!-- view: (?!\S+\.yaml).*", text)
        for name in re.findall(r"<!-- view: (\S+\.yaml) ", text):
            views += map(str, yaml.safe_load((page / name).read_text(encoding="utf-8")).values())
        path = file.relative_to(page).as_posix()
        named = f"({path})" in text or any(path in view for view in views)
        # A view that names no file shows `records.jsonl`.
        shown = file.name == RECORDS and any(".jsonl" not in view for view in views)
        assert named or shown, file


def test_every_option_that_the_readme_names_exists() -> None:
    groups = {folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir()}
    pattern = r"(?<![\w.])([a-z]+)=([\w./-]+(?:,(?![\w.]+=)[\w./-]+)*)"
    named = {
        (group, option)
        for group, options in re.findall(pattern, README)
        for option in options.split(",")
        if group in groups
    }
    assert {group for group, _ in named} >= {"model", "pruner", "permutation", "mask", "method"}
    missing = [name for name in named if not (ROOT / "conf" / f"{'/'.join(name)}.yaml").is_file()]
    assert missing == []


def test_the_citation_of_the_readme_is_that_of_the_file() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__
    assert f"version = {{{citation['version']}}}," in README


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target
