"""Calibration samples: token windows of one length."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from permllm.config import CalibrationConfig
from permllm.data.named import NamedText, calibration_text
from permllm.errors import DataError
from permllm.record.caching import cached_tensors

_TOKENS = "tokens"


def calibration_tokens(tokenizer: PreTrainedTokenizerBase, config: CalibrationConfig, seed: int) -> Tensor:
    """Draw calibration windows, as `calibration.sampling` says.

    Returns:
        int64 `(samples, length)` on the CPU.

    Raises:
        ConfigError: the settings name no text. DataError: there is not enough text.
    """
    named = calibration_text(config)

    def windows() -> Tensor:
        return windows_of(tokenizer, named.text.calibration(seed), config, seed)

    settings = {"sampling": config.sampling, "samples": config.samples, "length": config.seqlen, "seed": seed}
    return _kept(tokenizer, named, settings, windows, calibration=True)


def windows_of(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], config: CalibrationConfig, seed: int) -> Tensor:
    """Draw calibration windows of documents, as `calibration_tokens`."""
    return _WINDOWS[config.sampling](tokenizer, documents, config.samples, config.seqlen, seed)


def all_tokens(tokenizer: PreTrainedTokenizerBase, named: NamedText) -> Tensor:
    """All tokens of a text that perplexity is measured on, int64 `(tokens,)`.

    Raises:
        DataError: the text cannot be had.
    """
    return _kept(tokenizer, named, {}, lambda: encode(tokenizer, named.text.evaluation()), calibration=False)


def _kept(
    tokenizer: PreTrainedTokenizerBase,
    named: NamedText,
    settings: dict[str, Any],
    compute: Callable[[], Tensor],
    calibration: bool,
) -> Tensor:
    """`compute()`, or what an earlier job kept of it; what no key can follow from is not kept."""
    if named.code is None:
        return compute()
    identity = {"text": named.text.digest(calibration), "modules": named.code, "tokenizer": tokenizer_digest(tokenizer)}
    identity |= settings | {"use": "calibration" if calibration else "perplexity"}
    return cached_tensors("tokens", identity, (__name__, *named.code), lambda: {_TOKENS: compute()})[_TOKENS]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What changes when a tokenizer gives other tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    text = json.dumps([type(tokenizer).__name__, rules, added, tokenizer("a b\n\nc")["input_ids"]])
    return hashlib.sha256(text.encode()).hexdigest()


def joined_windows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], samples: int, length: int, seed: int
) -> Tensor:
    """Random windows of the documents, joined by a blank line, none overlapping another: int64 `(samples, length)`.

    Raises:
        DataError: the text is too short.
    """
    order = random.Random(seed)
    documents = list(documents)
    order.shuffle(documents)
    tokens = encode(tokenizer, "\n\n".join(documents))
    if len(tokens) < samples * length:
        raise DataError(
            f"the calibration text has {len(tokens)} tokens, but calibration.samples={samples} of "
            f"calibration.seqlen={length} need {samples * length}: "
            f"take at most {len(tokens) // length} samples of it, or another text"
        )
    offset = order.randrange(len(tokens) % length + 1)
    starts = order.sample(range(offset, len(tokens) - length + 1, length), samples)
    return torch.stack([tokens[start : start + length] for start in starts])


def document_windows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], samples: int, length: int, seed: int
) -> Tensor:
    """Each window a random piece of a random document that is longer, documents drawn with replacement.

    C4 and the Pile in the released code of SparseGPT, Wanda, RIA and PermLLM, draw by draw.

    Returns:
        int64 `(samples, length)`.

    Raises:
        DataError: no document is longer than a window.
    """
    order = random.Random(seed)
    short: set[int] = set()
    windows: list[Tensor] = []
    while len(windows) < samples:
        index = order.randint(0, len(documents) - 1)
        if index in short:
            continue
        tokens = encode(tokenizer, documents[index])
        if len(tokens) > length:
            start = order.randint(0, len(tokens) - length - 1)
            windows.append(tokens[start : start + length])
        else:
            short.add(index)
            if len(short) == len(documents):
                raise DataError(f"none of the {len(documents)} documents is longer than calibration.seqlen={length} tokens")
    return torch.stack(windows)


def overlapping_windows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], samples: int, length: int, seed: int
) -> Tensor:
    """Windows at random places of all documents joined by one space, which may overlap.

    WikiText-2 in the released code of SparseGPT, Wanda, RIA and PermLLM, draw by draw.

    Returns:
        int64 `(samples, length)`.

    Raises:
        DataError: the text is not longer than a window.
    """
    order = random.Random(seed)
    tokens = encode(tokenizer, " ".join(documents))
    if len(tokens) <= length:
        raise DataError(f"the calibration text has {len(tokens)} tokens, not more than calibration.seqlen={length}")
    starts = [order.randint(0, len(tokens) - length - 1) for _ in range(samples)]
    return torch.stack([tokens[start : start + length] for start in starts])


_WINDOWS: dict[str | None, Callable[..., Tensor]] = {
    "disjoint": joined_windows,
    "documents": document_windows,
    "overlapping": overlapping_windows,
}


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of `text`, int64 `(tokens,)`, with the tokenizer's default special tokens, and no warning about length."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
