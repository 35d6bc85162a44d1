"""Calibration samples: token windows of one length."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from permllm.config import CalibrationConfig
from permllm.data.bos import bos_of
from permllm.data.registry import NamedText, calibration_text
from permllm.errors import DataError
from permllm.runs.cache import cached
from permllm.runtime import parallel

_TOKENS = "tokens"


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase,
    config: CalibrationConfig,
    seed: int,
    bos: bool = False,
    further: int = 0,
) -> Tensor:
    """Draw calibration windows, as `calibration.sampling` says.

    Args:
        tokenizer: of the model.
        config: the settings of the group.
        seed: of the windows.
        bos: whether the first token of each is the tokenizer's BOS, and no other special token is
            added.
        further: windows drawn after the `calibration.samples`, which are the same without them.

    Returns:
        int64 `(samples + further, length)` on the CPU.

    Raises:
        ConfigError: the settings name no text, or the tokenizer has no BOS. DataError: there is not
            enough text.
    """
    named = calibration_text(config)

    def windows() -> Tensor:
        return windows_of(tokenizer, named.text.calibration(seed), config, seed, bos, further)

    settings = {
        "sampling": config.sampling,
        "samples": config.samples,
        "length": config.seqlen,
        "seed": seed,
    } | _special(bos)
    settings |= {"further": further} if further else {}
    return _kept(tokenizer, named, settings, windows, calibration=True)


def windows_of(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    config: CalibrationConfig,
    seed: int,
    bos: bool = False,
    further: int = 0,
) -> Tensor:
    """Draw calibration windows of documents, as `calibration_tokens`."""
    draw, first = _WINDOWS[config.sampling], bos_of(tokenizer, bos)
    return draw(tokenizer, documents, config.samples, config.seqlen, seed, first, further)


def begun(windows: Tensor, bos: int | None) -> Tensor:
    """Windows int64 `(windows, tokens)`, with BOS before each where there is one."""
    return windows if bos is None else nn.functional.pad(windows, (1, 0), value=bos)


def all_tokens(tokenizer: PreTrainedTokenizerBase, named: NamedText, bos: bool = False) -> Tensor:
    """All tokens of a text that perplexity is measured on, int64 `(tokens,)`; no special ones where BOS will begin windows.

    Raises:
        DataError: the text cannot be had.
    """
    return _kept(
        tokenizer,
        named,
        _special(bos),
        lambda: encode(tokenizer, named.text.evaluation(), not bos),
        calibration=False,
    )


def _special(bos: bool) -> dict[str, Any]:
    return {"bos": True} if bos else {}


def _kept(
    tokenizer: PreTrainedTokenizerBase,
    named: NamedText,
    settings: dict[str, Any],
    compute: Callable[[], Tensor],
    calibration: bool,
) -> Tensor:
    """`compute()`, or what an earlier job kept of it; what no key can follow from is not kept."""
    if not named.kept:
        return compute()
    identity = {"text": named.text.digest(calibration), "tokenizer": tokenizer_digest(tokenizer)}
    identity |= settings | {"use": "calibration" if calibration else "perplexity"}
    return cached("tokens", identity, lambda: {_TOKENS: parallel.on_main(compute)})[_TOKENS]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What changes when a tokenizer gives other tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = (
        backend.to_str()
        if backend is not None
        else json.dumps(sorted(tokenizer.get_vocab().items()))
    )
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    text = json.dumps([type(tokenizer).__name__, rules, added, tokenizer("a b\n\nc")["input_ids"]])
    return hashlib.sha256(text.encode()).hexdigest()


def joined_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    samples: int,
    length: int,
    seed: int,
    bos: int | None = None,
    further: int = 0,
) -> Tensor:
    """Random windows of the documents, joined by a blank line, none overlapping another: int64 `(samples + further, length)`.

    Raises:
        DataError: the text is too short.
    """
    order = random.Random(seed)
    documents = list(documents)
    order.shuffle(documents)
    tokens = encode(tokenizer, "\n\n".join(documents), bos is None)
    piece = length if bos is None else length - 1
    if len(tokens) < (samples + further) * piece:
        asked = f"calibration.samples={samples}" + (
            f" and {further} further ones" if further else ""
        )
        raise DataError(
            f"the calibration text has {len(tokens)} tokens, but {asked} of "
            f"calibration.seqlen={length} need {(samples + further) * piece}: "
            + (
                f"take at most {len(tokens) // piece} samples of it"
                if len(tokens) >= piece
                else "take shorter windows"
            )
            + ", or another text"
        )
    offset = order.randrange(len(tokens) % piece + 1)
    places = range(offset, len(tokens) - piece + 1, piece)
    starts = order.sample(places, samples)
    if further:
        starts += order.sample(sorted(set(places) - set(starts)), further)
    return begun(torch.stack([tokens[start : start + piece] for start in starts]), bos)


def document_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    samples: int,
    length: int,
    seed: int,
    bos: int | None = None,
    further: int = 0,
) -> Tensor:
    """Each window a random piece of a random document that is longer, documents drawn with replacement.

    C4 and the Pile in the released code of SparseGPT, Wanda, RIA and PermLLM, draw by draw.

    Returns:
        int64 `(samples + further, length)`.

    Raises:
        DataError: no document is longer than a window.
    """
    order = random.Random(seed)
    short: set[int] = set()
    windows: list[Tensor] = []
    piece = length if bos is None else length - 1
    while len(windows) < samples + further:
        index = order.randint(0, len(documents) - 1)
        if index in short:
            continue
        tokens = encode(tokenizer, documents[index], bos is None)
        if len(tokens) > piece:
            start = order.randint(0, len(tokens) - piece - 1)
            windows.append(tokens[start : start + piece])
        else:
            short.add(index)
            if len(short) == len(documents):
                raise DataError(
                    f"none of the {len(documents)} documents is longer than calibration.seqlen={length} tokens"
                )
    return begun(torch.stack(windows), bos)


def overlapping_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    samples: int,
    length: int,
    seed: int,
    bos: int | None = None,
    further: int = 0,
) -> Tensor:
    """Windows at random places of all documents joined by one space, which may overlap.

    WikiText-2 in the released code of SparseGPT, Wanda, RIA and PermLLM, draw by draw.

    Returns:
        int64 `(samples + further, length)`.

    Raises:
        DataError: the text is not longer than a window.
    """
    order = random.Random(seed)
    tokens = encode(tokenizer, " ".join(documents), bos is None)
    piece = length if bos is None else length - 1
    if len(tokens) <= piece:
        raise DataError(
            f"the calibration text has {len(tokens)} tokens, not more than calibration.seqlen={length}"
        )
    starts = [order.randint(0, len(tokens) - piece - 1) for _ in range(samples + further)]
    return begun(torch.stack([tokens[start : start + piece] for start in starts]), bos)


_WINDOWS: dict[str | None, Callable[..., Tensor]] = {
    "disjoint": joined_windows,
    "documents": document_windows,
    "overlapping": overlapping_windows,
}


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> Tensor:
    """Token ids of `text`, int64 `(tokens,)`, and no warning about length.

    Args:
        tokenizer: of the model.
        text: any.
        special: whether to add the tokenizer's default special tokens.
    """
    ids = tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
