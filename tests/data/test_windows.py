"""Calibration windows."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ByT5Tokenizer

from permllm.data import windows
from permllm.data.texts import Documents
from permllm.data.windows import calibration_windows, encode
from permllm.errors import ConfigError, DataError
from permllm.settings.config import CalibrationConfig

TOKENIZER = ByT5Tokenizer(extra_ids=0)
SAMPLINGS = ("disjoint", "documents", "overlapping")


def drawn(
    documents: list[str], samples: int, length: int, sampling: str, seed: int = 0, extra: int = 0
) -> Tensor:
    config = CalibrationConfig("text", samples=samples, seqlen=length, sampling=sampling)
    return calibration_windows(TOKENIZER, Documents(documents), config, seed, extra=extra)


def test_disjoint_windows_are_pieces_of_the_text_that_do_not_overlap() -> None:
    text = "".join(chr(97 + n % 26) + str(n) for n in range(1000))
    windows = drawn([text], 20, 50, "disjoint")
    assert (windows.shape, windows.dtype) == ((20, 50), torch.int64)
    whole = encode(TOKENIZER, text).unfold(0, 50, 1)
    starts = sorted(int((whole == window).all(1).nonzero()[0]) for window in windows)
    assert all(b - a >= 50 for a, b in itertools.pairwise(starts))
    assert torch.equal(windows, drawn([text], 20, 50, "disjoint"))
    assert not torch.equal(windows, drawn([text], 20, 50, "disjoint", seed=1))
    two = TOKENIZER.decode(drawn(["one", "two"], 1, 9, "disjoint")[0])
    assert two.removesuffix("</s>") in ("one\n\ntwo", "two\n\none")


def test_the_whole_text_can_be_used_and_one_token_more_is_refused() -> None:
    assert drawn(["x" * 99], 10, 10, "disjoint").shape == (10, 10)
    with pytest.raises(DataError, match=r"100.*calibration\.seqlen=10.*110"):
        drawn(["x" * 99], 11, 10, "disjoint")
    with pytest.raises(DataError, match=r" 5 .*calibration\.seqlen"):
        drawn(["short"] * 5, 4, 40, "documents")
    with pytest.raises(DataError, match=r" 6 .*calibration\.seqlen"):
        drawn(["a", "bcd"], 1, 6, "overlapping")


class Counting(ByT5Tokenizer):
    """Tokenizer that counts the characters that it reads."""

    characters = 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return super().__call__(text, **options)


@pytest.mark.parametrize("sampling", ["disjoint", "overlapping"])
@pytest.mark.parametrize("count", [1, 50])
def test_a_large_text_is_read_in_part_from_everywhere(
    sampling: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "LARGEST_WHOLE_TEXT", 20_000)
    monkeypatch.setattr(windows, "PIECE", 500)
    text = "".join(chr(0x4E00 + place // 100) for place in range(100_000))
    size = len(text) // count
    documents = [text[start : start + size] for start in range(0, len(text), size)]
    tokenizer = Counting(extra_ids=0)
    config = CalibrationConfig("text", samples=40, seqlen=6, sampling=sampling)
    drawn_windows = calibration_windows(tokenizer, Documents(documents), config, 0)
    assert drawn_windows.shape == (40, 6)
    assert 20_000 <= tokenizer.characters <= 21_000
    letters = TOKENIZER.decode(drawn_windows.flatten(), errors="ignore")
    places = {ord(letter) - 0x4E00 for letter in letters if letter in text}
    assert min(places) < 250
    assert max(places) > 750
    again = calibration_windows(tokenizer, Documents(documents), config, 0)
    assert torch.equal(again, drawn_windows)


def test_document_windows_are_drawn_as_in_the_released_code() -> None:
    letters = "abcdefghij"
    documents = ["short"] * 20 + [f"{letter}{letters}" * 20 for letter in letters]
    # Written out as SparseGPT and its descendants do, with the module's own generator.
    random.seed(3)
    for window in drawn(documents, 30, 40, "documents", seed=3):
        while True:
            tokens = TOKENIZER(documents[random.randint(0, len(documents) - 1)])["input_ids"]
            if len(tokens) > 40:
                break
        start = random.randint(0, len(tokens) - 40 - 1)
        assert window.tolist() == tokens[start : start + 40]


def test_overlapping_windows_are_drawn_as_in_the_released_code() -> None:
    letters = "".join(chr(97 + index % 26) * (index % 7) for index in range(90))
    documents = ["", " = Title = \n", letters, "", "end"]
    windows = drawn(documents, 40, 50, "overlapping", seed=5)
    tokens = TOKENIZER(" ".join(documents))["input_ids"]
    random.seed(5)
    starts = [random.randint(0, len(tokens) - 50 - 1) for _ in range(40)]
    assert windows.tolist() == [tokens[start : start + 50] for start in starts]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_extra_windows_follow_those_that_are_drawn_without_them(sampling: str) -> None:
    documents = ["".join(chr(97 + n % 26) + str(n) for n in range(1000))]
    more = drawn(documents, 8, 40, sampling, extra=6)
    assert torch.equal(more[:8], drawn(documents, 8, 40, sampling))
    assert len(more.unique(dim=0)) == len(more) == 14
    if sampling == "disjoint":
        starts = sorted(documents[0].index(TOKENIZER.decode(window[1:-1])) for window in more)
        assert all(b - a >= 40 for a, b in itertools.pairwise(starts))


def test_a_text_that_is_too_short_to_learn_from_is_read_again() -> None:
    documents = ["".join(chr(97 + n % 26) + str(n) for n in range(1000))]
    windows = drawn(documents, 2, 500, "disjoint", extra=17)
    assert torch.equal(windows[:2], drawn(documents, 2, 500, "disjoint"))
    # The text has seven windows of 500 tokens.
    epochs = windows.split(7)
    assert [len(epoch.unique(dim=0)) for epoch in epochs] == [7, 7, 5]
    assert len(windows.unique(dim=0)) == 7


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_bos_takes_the_first_place_of_each_window(sampling: str) -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = CalibrationConfig("builtin", samples=4, seqlen=16, sampling=sampling)
    documents = ["The first document, of some words.", "A second one, which has as many."]
    text = Documents(documents)
    with pytest.raises(ConfigError, match=r"^model\.bos=true"):
        calibration_windows(tokenizer, text, config, seed=0, bos=True)
    tokenizer.bos_token = "<unk>"
    windows = calibration_windows(tokenizer, text, config, seed=0, bos=True)
    assert windows.shape == (4, 16)
    assert (windows[:, 0] == tokenizer.unk_token_id).all()
    # Bytes alone, three tokens above their values: the end of a text has no token of its own.
    own = {bytes(token - 3 for token in window[1:].tolist()).decode() for window in windows}
    joined = {
        "disjoint": ["\n\n".join(documents), "\n\n".join(documents[::-1])],
        "overlapping": [" ".join(documents)],
        "documents": documents,
    }
    assert all(any(piece in text for text in joined[sampling]) for piece in own)
