"""Tables of documents are those of the records, and one that cannot be made is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from permllm.errors import ConfigError
from scripts.readme_tables import main, with_views
from tests.conftest import ROOT

TABLE_6 = ROOT / "experiments" / "table6" / "records.jsonl"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/*.md")])


def test_tables_of_documents_are_those_of_the_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", *map(str, DOCUMENTS)]) == 0, capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tabel", "view tabel: 'tabel'; views are table, paper, "),
        ("table colums=x", "got an unexpected keyword argument 'colums'"),
        ("table records=none.jsonl", "none.jsonl is not a directory, nor a file of records"),
        (f"table records={TABLE_6} baseline=block_size=7", "no row has block_size=7"),
    ],
)
def test_a_table_that_cannot_be_names_its_file(words: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"Before.\n\n<!-- view: {words} -->\nold\n<!-- /view -->\n\nAfter.\n")
    with pytest.raises(ConfigError) as raised:
        with_views(file)
    assert str(raised.value).startswith(f"{file}: view ")
    assert message in str(raised.value)
