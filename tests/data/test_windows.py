"""Calibration windows."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

from permllm.config import CalibrationConfig
from permllm.data.texts.builtin import TEXT as BUILTIN
from permllm.data.windows import (
    calibration_tokens,
    document_windows,
    encode,
    joined_windows,
    overlapping_windows,
    windows_of,
)
from permllm.errors import ConfigError, DataError

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
    assert joined_windows(TOKENIZER, ["x" * 99], samples=tokens // 10, length=10, seed=0).shape == (
        tokens // 10,
        10,
    )
    with pytest.raises(
        DataError,
        match=r"has 100 tokens, but calibration\.samples=11 of calibration\.seqlen=10 need 110",
    ):
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
    with pytest.raises(
        DataError, match=r"none of the 5 documents is longer than calibration\.seqlen=40 tokens"
    ):
        document_windows(TOKENIZER, ["short"] * 5, samples=4, length=40, seed=0)


def test_overlapping_windows_are_drawn_as_in_the_released_code() -> None:
    documents = [
        "",
        " = Title = \n",
        "".join(chr(97 + index % 26) * (index % 7) for index in range(90)),
        "",
        "end",
    ]
    windows = overlapping_windows(TOKENIZER, documents, samples=40, length=50, seed=5)
    tokens = TOKENIZER(" ".join(documents))["input_ids"]
    random.seed(5)
    starts = [random.randint(0, len(tokens) - 50 - 1) for _ in range(40)]
    assert windows.tolist() == [tokens[start : start + 50] for start in starts]
    assert min(b - a for a, b in itertools.pairwise(sorted(starts))) < 50
    with pytest.raises(DataError, match=r"has 6 tokens, not more than calibration\.seqlen=6"):
        overlapping_windows(TOKENIZER, ["a", "bcd"], samples=1, length=6, seed=0)


def test_windows_do_not_overlap_unless_the_settings_say_otherwise() -> None:
    assert CalibrationConfig("c4").sampling == "disjoint"
    assert CalibrationConfig("c4", sampling="documents").sampling == "documents"


def test_the_chosen_sampling_is_the_one_that_draws(cache: Path) -> None:
    drawn = calibration_tokens(
        TOKENIZER,
        CalibrationConfig("builtin", samples=8, seqlen=64, sampling="overlapping"),
        seed=0,
    )
    assert torch.equal(drawn, overlapping_windows(TOKENIZER, [BUILTIN.evaluation()], 8, 64, seed=0))
    disjoint = calibration_tokens(
        TOKENIZER, CalibrationConfig("builtin", samples=8, seqlen=64), seed=0
    )
    assert torch.equal(disjoint, joined_windows(TOKENIZER, [BUILTIN.evaluation()], 8, 64, seed=0))


@pytest.mark.parametrize("sampling", ["disjoint", "documents", "overlapping"])
def test_bos_takes_the_first_place_of_each_window(sampling: str) -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = CalibrationConfig("builtin", samples=4, seqlen=16, sampling=sampling)
    documents = ["The first document, of some words.", "A second one, which has as many."]
    with pytest.raises(
        ConfigError, match=r"^model\.bos=true: the model's tokenizer has no BOS token"
    ):
        windows_of(tokenizer, documents, config, seed=0, bos=True)
    tokenizer.bos_token = "<unk>"
    windows = windows_of(tokenizer, documents, config, seed=0, bos=True)
    assert windows.shape == (4, 16)
    assert (windows[:, 0] == tokenizer.unk_token_id).all()
    # Bytes alone, three tokens above their values: the end of a text has no token of its own
    # either.
    own = {bytes(token - 3 for token in window[1:].tolist()).decode() for window in windows}
    joined = {
        "disjoint": ("\n\n".join(documents), "\n\n".join(documents[::-1])),
        "overlapping": (" ".join(documents),),
    }
    assert all(
        any(piece in text for text in joined.get(sampling, tuple(documents))) for piece in own
    )
