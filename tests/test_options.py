"""The page of all options says what they are now."""

from __future__ import annotations

import runpy

from permllm.pruning.config_store import options_of
from tests.conftest import ROOT


def test_the_page_of_options_is_what_its_script_writes() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "options_page.py"))
    assert page["PAGE"].read_text(encoding="utf-8") == page["page"]() + "\n", "run python scripts/options_page.py"


def test_every_option_and_every_setting_says_what_it_is() -> None:
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    settings = [row for row in rows if len(row) == 4]
    assert len(settings) > 60
    assert all(cell for row in settings for cell in (row[0], row[1], row[3]))
    for group, (_, options) in options_of().items():
        part = text.partition(f"## `{group}`\n")[2].partition("\n## ")[0]
        assert all(f"| `{option}` | " in part for option in options)
