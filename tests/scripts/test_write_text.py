"""Text of the model itself: documents of one window, the same from the same command."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import ROOT, run_python


def test_each_document_is_a_window_that_begins_as_the_text(tmp_path: Path) -> None:
    # With this seed the model writes no byte that is no character, which a document would lack.
    settings = ("model=tiny", "calibration.seqlen=32", "seed=1")
    for name in ("once", "again"):
        words = (str(tmp_path / name), "--documents", "300", *settings)
        done = run_python("scripts/write_text.py", *words, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    text = (tmp_path / "once").read_text()
    assert text == (tmp_path / "again").read_text()
    documents = [json.loads(line)["text"] for line in text.splitlines()]
    assert len(documents) == 300
    assert {len(document.encode()) for document in documents} == {32 + 16}  # a token is a byte
    assert len({document[16:] for document in documents}) > 290
