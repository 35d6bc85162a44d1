"""Blocks of documents: what a comment asks for is made, and what bad input gets."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from permllm.commands import call
from permllm.errors import ConfigError, DataError
from permllm.results.collect import collect
from permllm.results.published import published
from scripts.views import markers, with_views
from scripts.views.ablation import _differing, _perplexity
from scripts.views.tables import computed_on, published_table
from tests.kept import EXPERIMENTS
from tests.results.test_results import make_run


def test_the_ablation_tells_masks_apart_and_takes_several_texts() -> None:
    run = next(run for run in collect([EXPERIMENTS / "lcp_ablation" / "records.jsonl"], apart=True).runs if not run.history)
    mask = {"name": "score", "_target_": "permllm.mask.ScoreMask", "learning_rate": 0.25}
    other = replace(run, config=run.config | {"mask": mask})
    assert set(_differing(other)) - set(_differing(run)) == {("mask", "score"), ("mask.learning_rate", 0.25)}
    texts = {"a": {"value": 2.0}, "b": {"value": 8.0}}
    assert _perplexity({"perplexity": {"sparse": texts}}, "sparse") == pytest.approx(4.0)


def document(folder: Path, words: str, block: str = "old\n") -> Path:
    file = folder / "README.md"
    file.write_text(f"Before.\n\n<!-- view: {words} -->\n{block}<!-- /view -->\n\nAfter.\n")
    return file


COMPUTED_WITH = {
    "versions": {"python": "3", "torch": "2", "transformers": "5"},
    "git": None,
    "hardware": {"system": "x", "processor": "P", "cores": 2, "threads": 2, "memory_bytes": 1, "device": "cpu"},
    "seed": 0,
    "command": "run.py",
    "started": "2026-01-01",
}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    for size, value in ((32, 30.0), (64, 20.0)):
        make_run(tmp_path / "runs" / f"run{size}", value, block_size=size)
        (tmp_path / "runs" / f"run{size}" / "environment.json").write_text(json.dumps(COMPUTED_WITH))
    assert call("records", [str(tmp_path / "runs"), "--to", str(tmp_path / "records.jsonl")]) == 0
    return tmp_path


def test_a_block_is_made_anew_and_all_else_stays(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = document(kept, 'table columns=block_size measures="perplexity, output error" baseline=block_size=32')
    capsys.readouterr()
    assert call("results", ["--document", str(file)]) == 0
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
    assert call("results", ["--document", str(file)]) == 0
    assert capsys.readouterr().out == "nothing is new\n"


def test_the_frontier_has_the_row_that_closes_most_first_and_what_it_costs(kept: Path) -> None:
    file = document(kept, "frontier columns=block_size baseline=block_size=32")
    for size, seconds in ((32, 60.0), (64, 90.0)):
        metrics = kept / "runs" / f"run{size}" / "metrics.json"
        values = json.loads(metrics.read_text()) | {"peak_memory_bytes": 2_500_000_000}
        values["seconds"] = {"load": 7.0, "calibrate": 30.0, "permute": seconds, "mask": 30.0, "evaluate sparse": 9.0}
        metrics.write_text(json.dumps(values))
    assert call("records", [str(kept / "runs"), "--to", str(kept / "records.jsonl"), "--replace"]) == 0
    _, *block = with_views(file).partition("-->\n")[2].partition("<!-- /view -->")[0].splitlines()[1:]
    gap = math.log(30 / 20) / math.log(30 / 10)
    assert block[:3] == [
        "| dense |  |  |  | 10.00 |",
        f"| 64 | 2.5 | 2.50 GB | {gap:.2%} | 20.00 |",
        "| 32 | 2.0 | 2.50 GB | 0.00% | 30.00 |",
    ]


def test_placements_are_beside_the_plan_and_the_device(tmp_path: Path) -> None:
    for name, placement, seconds, peak in (
        ("a", "device", 100.0, 4),
        ("b", "device", 80.0, 3),
        ("c", "disk", 100.0, 1),
    ):
        make_run(tmp_path / "runs" / name, 30.0)
        file = tmp_path / "runs" / name / "metrics.json"
        (file.parent / "environment.json").write_text(json.dumps(COMPUTED_WITH))
        values = {"placement": placement, "planned_memory_bytes": 2 * 10**9, "peak_memory_bytes": peak * 10**9}
        file.write_text(json.dumps(json.loads(file.read_text()) | values | {"seconds": {"load": 10.0, "permute": seconds}}))
        assert call("records", [str(tmp_path / "runs" / name), "--to", str(tmp_path / "records.jsonl")]) == 0
    file = document(tmp_path, "placements")
    _, *lines = with_views(file).partition("-->\n")[2].partition("<!-- /view -->")[0].splitlines()
    assert lines[1:3] == [
        "| smollm2-135m | lcp | device | 2 | 2.00 GB | 4.00 GB | 90 |  |",
        "| smollm2-135m | lcp | disk | 1 | 2.00 GB | 1.00 GB | 110 | +22% |",
    ]
    (tmp_path / "records.jsonl").unlink()
    make_run(tmp_path / "old", 30.0)
    assert call("records", [str(tmp_path / "old"), "--to", str(tmp_path / "records.jsonl")]) == 0
    with pytest.raises(DataError, match="old does not say what was planned for which placement"):
        with_views(file)


@pytest.mark.parametrize(
    ("hardware", "line"),
    [
        ({"processor": "P", "threads": 2}, "P, 2 threads"),
        ({"processor": "P", "threads": 2, "instructions": "AVX2"}, "P (AVX2), 2 threads"),
        ({"processor": "P", "threads": 2, "instructions": "AVX2", "gpu": {"name": "G"}}, "G, 2 threads"),
        ({"processor": "P", "threads": 1, "instructions": "AVX512", "processes": 3}, "P (AVX512), 1 threads, 3 processes"),
    ],
)
def test_the_line_below_a_table_tells_processors_apart_by_their_instructions(hardware: dict[str, Any], line: str) -> None:
    assert computed_on(hardware) == line


def test_each_block_of_a_document_is_its_own(kept: Path) -> None:
    file = document(kept, "table measures=perplexity")
    file.write_text(file.read_text() + file.read_text().replace("measures=perplexity", 'measures="output error"'))
    assert [marker.options for marker in markers(file)] == [{"measures": "perplexity"}, {"measures": "output error"}]
    text = with_views(file)
    assert text.count("<!-- /view -->") == 2
    assert text.count("| 64 | 20.00 |\n") == text.count("| 64 | 0.1500 |\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tabel", r"there is no view 'tabel'; there are table, .*; did you mean table\?"),
        ("table colums=x", "view table: got an unexpected keyword argument 'colums'"),
        ("table baseline=block_size=7", "view table: --baseline block_size=7: no row has block_size=7; valid are 32, 64"),
        ("table records=none.jsonl", r"view table: .*none\.jsonl is not a directory, nor a file of records"),
        ("study study=none", "view study: .*holds something other than studies"),
        ("", "there is no view ''"),
        ('table columns="block_size', "view table .*: No closing quotation"),
        ("verify files=other.json", r"view verify: its files are not of the form that it shows \(KeyError\('layers'\)\)"),
        ("index of=empty", "the first block of .* is no view of the paper or of a study"),
    ],
)
def test_a_block_that_cannot_be_made_is_one_line_that_names_the_document(kept: Path, words: str, message: str) -> None:
    file = document(kept, words)
    (kept / "other.json").write_text("{}")
    (kept / "empty").mkdir()
    (kept / "empty" / "README.md").write_text("no block")
    with pytest.raises((ConfigError, DataError), match=message) as error:
        with_views(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)
    assert file.read_text().count("old") == 1


def test_a_document_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("results", ["--document", str(tmp_path / "none.md")]) == 1
    assert capsys.readouterr().err == f"error: --document {tmp_path / 'none.md'} cannot be read: No such file or directory\n"
    assert call("results", []) == 1
    assert "no folder of runs was given" in capsys.readouterr().err


def test_all_numbers_of_a_published_table_are_shown() -> None:
    for number in range(1, 9):
        rows = published(f"table{number}")
        header, _, *lines = (line.strip("|").split("|") for line in published_table(rows))
        cells = [cell.strip() for line in lines for cell in line[4:]]
        assert sorted(float(cell) for cell in cells if cell) == sorted(row.value for row in rows)
        assert [name.strip() for name in header[:4]] == ["model", "sparsity", "method", "setting"]
