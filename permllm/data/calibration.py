"""Calibration samples: token windows of one length."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from permllm.caching import cached_tensors
from permllm.config import CalibrationConfig
from permllm.data.text import calibration_documents, perplexity_text, text_digest
from permllm.errors import DataError

# Sources of short documents, which are joined before windows are cut.
_JOINED = ("boolq-passages", "sciq-support", "law-questions", "builtin", "text")
_TOKENS = "tokens"


def calibration_tokens(tokenizer: PreTrainedTokenizerBase, config: CalibrationConfig, seed: int) -> Tensor:
    """Draw calibration windows.

    Short documents (BoolQ passages, the built-in text, text files) are joined by two newlines and cut into windows, of which a
    random choice is taken, none overlapping another. From the other sources each window is a random piece of a random document
    that is longer than the window (the papers' protocol).

    Returns:
        int64 `(samples, length)` on the CPU.

    Raises:
        DataError: there is not enough text.
    """

    def windows() -> dict[str, Tensor]:
        documents = calibration_documents(config.dataset, config.data_files)
        cut = joined_windows if config.dataset in _JOINED else document_windows
        return {_TOKENS: cut(tokenizer, documents, config.samples, config.length, seed)}

    identity = {"text": text_digest(config.dataset, config.data_files, calibration=True), "dataset": config.dataset}
    identity |= {"tokenizer": tokenizer_digest(tokenizer), "use": "calibration"}
    sizes = {"samples": config.samples, "length": config.length, "seed": seed}
    return cached_tensors("tokens", identity | sizes, windows)[_TOKENS]


def all_tokens(tokenizer: PreTrainedTokenizerBase, dataset: str | None, data_files: str | None) -> tuple[str, Tensor]:
    """The name of a text that perplexity is measured on, and all its tokens, int64 `(tokens,)`.

    Raises:
        DataError: the text cannot be had.
    """

    def encoded() -> dict[str, Tensor]:
        return {_TOKENS: encode(tokenizer, perplexity_text(dataset, data_files)[1])}

    identity = {"text": text_digest(dataset, data_files, calibration=False), "dataset": None if data_files else dataset}
    identity |= {"tokenizer": tokenizer_digest(tokenizer), "use": "perplexity"}
    name = Path(data_files).stem if data_files else str(dataset)
    return name, cached_tensors("tokens", identity, encoded)[_TOKENS]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What changes when a tokenizer gives other tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    text = json.dumps([type(tokenizer).__name__, rules, added, tokenizer("a b\n\nc")["input_ids"]])
    return hashlib.sha256(text.encode()).hexdigest()


def joined_windows(tokenizer: PreTrainedTokenizerBase, documents: list[str], samples: int, length: int, seed: int) -> Tensor:
    """Random, non-overlapping windows of the joined documents, int64 `(samples, length)`. Raises DataError when too short."""
    order = random.Random(seed)
    documents = list(documents)
    order.shuffle(documents)
    tokens = encode(tokenizer, "\n\n".join(documents))
    if len(tokens) < samples * length:
        raise DataError(
            f"the calibration text has {len(tokens)} tokens, but calibration.samples={samples} of "
            f"calibration.length={length} need {samples * length}"
        )
    offset = order.randrange(len(tokens) % length + 1)
    starts = order.sample(range(offset, len(tokens) - length + 1, length), samples)
    return torch.stack([tokens[start : start + length] for start in starts])


def document_windows(tokenizer: PreTrainedTokenizerBase, documents: list[str], samples: int, length: int, seed: int) -> Tensor:
    """A random window of each of `samples` random documents longer than it, int64 `(samples, length)`."""
    order = random.Random(seed)
    windows: list[Tensor] = []
    for index in order.sample(range(len(documents)), len(documents)):
        tokens = encode(tokenizer, documents[index])
        if len(tokens) > length:
            start = order.randrange(len(tokens) - length)
            windows.append(tokens[start : start + length])
            if len(windows) == samples:
                return torch.stack(windows)
    raise DataError(
        f"only {len(windows)} documents are longer than calibration.length={length}, but calibration.samples={samples}"
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of `text`, int64 `(tokens,)`, with the tokenizer's default special tokens, and no warning about length."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
