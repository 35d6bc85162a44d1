"""Text of the model itself: documents of one window, the same from the same command."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import ROOT, run_python


def test_each_document_is_a_window_that_begins_as_the_text(tmp_path: Path) -> None:
    for name in ("once", "again"):
        words = (str(tmp_path / name), "--documents", "300", "model=tiny", "calibration.seqlen=32")
        done = run_python("scripts/write_text.py", *words, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    text = (tmp_path / "once").read_text()
    assert text == (tmp_path / "again").read_text()
    documents = [json.loads(line)["text"] for line in text.splitlines()]
    assert len(documents) == 300
    lengths = [len(document.encode()) for document in documents]
    # A token is a byte, and a byte that is no character is left out.
    assert max(lengths) == 32 + 16
    assert lengths.count(32 + 16) > 290
    assert len({document[16:] for document in documents}) > 290
