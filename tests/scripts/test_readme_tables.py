"""Tables of documents: all are those of the records, a block is made anew, and what bad input gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from permllm.cli import call
from scripts.readme_tables import main
from scripts.views import markers
from tests.conftest import ROOT
from tests.runs.test_table import make_run

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/*.md")])
COMPUTED_WITH = {
    "versions": {"python": "3", "torch": "2", "transformers": "5"},
    "git": None,
    "hardware": {"system": "x", "processor": "P", "cores": 2, "threads": 2, "memory_bytes": 1, "device": "cpu"},
    "seed": 0,
    "command": "run.py",
    "started": "2026-01-01",
}


def test_the_tables_of_documents_are_those_of_the_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", *map(str, DOCUMENTS)]) == 0, capsys.readouterr()


def document(folder: Path, words: str) -> Path:
    file = folder / "README.md"
    file.write_text(f"Before.\n\n<!-- view: {words} -->\nold\n<!-- /view -->\n\nAfter.\n")
    return file


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    for size, value in ((32, 30.0), (64, 20.0)):
        make_run(tmp_path / "runs" / f"run{size}", value, block_size=size)
        (tmp_path / "runs" / f"run{size}" / "environment.json").write_text(json.dumps(COMPUTED_WITH))
    assert call("results", [str(tmp_path / "runs"), "--jsonl", str(tmp_path / "records.jsonl")]) == 0
    return tmp_path


def test_a_block_is_made_anew_and_all_else_stays(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = document(kept, 'table columns=block_size measures="perplexity, output error" baseline=block_size=32')
    capsys.readouterr()
    before = file.read_text()
    assert main([str(file), "--check"]) == 1
    assert capsys.readouterr().out == f"{file} is stale\n"
    assert file.read_text() == before
    assert main([str(file)]) == 0
    assert capsys.readouterr().out == f"{file} is new\n"
    assert file.read_text() == "\n".join(
        [
            "Before.\n",
            '<!-- view: table columns=block_size measures="perplexity, output error" baseline=block_size=32 -->',
            "| block_size | wikitext2 perplexity (window 2048) | against the baseline | output error |",
            "| --- | --- | --- | --- |",
            "| dense | 10.00 |  |  |",
            "| 32 | 30.00 |  | 0.1500 |",
            "| 64 | 20.00 | -33.3% | 0.1500 |",
            "",
            "P, 2 threads; Python 3, torch 2, transformers 5; 2026-01-01.",
            "<!-- /view -->\n\nAfter.\n",
        ]
    )
    assert main([str(file)]) == 0
    assert capsys.readouterr().out == ""
    file.write_text(file.read_text() + file.read_text().replace("perplexity, output error", "perplexity"))
    assert [marker.options["measures"] for marker in markers(file)] == ["perplexity, output error", "perplexity"]
    assert main([str(file)]) == 0
    assert file.read_text().count("| 64 | 20.00 | -33.3% |") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tabel", "there is no view 'tabel'; there are table, "),
        ("table colums=x", "view table: got an unexpected keyword argument 'colums'"),
        ("table baseline=block_size=7", "view table: --baseline block_size=7: no row has block_size=7; valid are 32, 64"),
        ("table records=none.jsonl", "none.jsonl is not a directory, nor a file of records"),
    ],
)
def test_a_block_that_cannot_be_made_is_one_line_that_names_the_document(
    kept: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = document(kept, words)
    capsys.readouterr()
    assert main([str(file)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file}: ")
    assert message in said
    assert said.count("\n") == 1
    assert "old" in file.read_text()


def test_a_document_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.md")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'none.md'} cannot be read: No such file or directory\n"
