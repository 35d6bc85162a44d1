"""Text that the model itself has written is a text file like any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from permllm.data.text_file import read_text_file
from permllm.data.texts.builtin import Builtin
from tests.conftest import ROOT, run_command

SMALL = ("model=tiny", "calibration=builtin", "calibration.samples=4", "calibration.seqlen=16")


def written(file: Path, *words: str) -> list[str]:
    command = [sys.executable, "scripts/write_text.py", str(file), "--windows", "6", "--tokens", "40", *words, *SMALL]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return read_text_file(str(file))


def test_documents_go_on_from_windows_and_are_read_again(tmp_path: Path) -> None:
    found = written(tmp_path / "own.jsonl", "--batch-size", "4")
    documents = list(Builtin().calibration(0))
    assert found[: len(documents)] == documents
    alone = written(tmp_path / "alone.jsonl", "--batch-size", "4", "--alone", "--prompt", "8")
    assert len(alone) == len(found) - len(documents) == 6
    text = "\n\n".join(documents)
    # The tokens of the tiny model are bytes: the first of them are the text's own.
    assert all(document[:8] in text for document in alone)
    assert alone != found[len(documents) :]
    assert written(tmp_path / "again.jsonl", "--batch-size", "4") == found
    words = ("model=tiny", "logger=none", "evaluation=builtin", "calibration=text", *SMALL[2:], "permutation=none")
    run = run_command(*words, f"calibration.data_files={tmp_path / 'own.jsonl'}", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
