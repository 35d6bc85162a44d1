"""Windows for calibration: pieces of a text with the same number of tokens."""

import logging
import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from permllm.data.texts import Text
from permllm.errors import ConfigError, DataError
from permllm.runtime import parallel
from permllm.settings.config import CalibrationConfig

log = logging.getLogger(__name__)

# Characters of the largest text that is tokenised as a whole. WikiText-2's training text has 11
# million.
LARGEST_WHOLE_TEXT = 1 << 24
# Characters of a piece of a larger text, and characters that are read for each token that windows
# take. English has four or five characters in a token.
PIECE = 1 << 16
_CHARACTERS_A_TOKEN = 64


def bos_of(tokenizer: PreTrainedTokenizerBase, bos: bool) -> int | None:
    """Return the BOS token that windows begin with; None: `bos` is False.

    Raises:
        ConfigError: the tokenizer has no BOS.
    """
    if not bos:
        return None
    if tokenizer.bos_token_id is None:
        raise ConfigError("model.bos=true: the model's tokenizer has no BOS token; set it to false")
    return int(tokenizer.bos_token_id)


def with_bos(windows: Tensor, bos: int | None) -> Tensor:
    """Put BOS before each window, int64 `(windows, tokens)`; None: return them unchanged."""
    return windows if bos is None else nn.functional.pad(windows, (1, 0), value=bos)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> Tensor:
    """Return the tokens of a text, int64 `(tokens,)`; `special` adds the default special ones."""
    ids = tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    config: CalibrationConfig,
    seed: int,
    bos: bool = False,
    extra: int = 0,
) -> Tensor:
    """Draw calibration windows by the method that `calibration.sampling` names.

    Args:
        tokenizer: the model's tokenizer.
        text: the text for calibration.
        config: settings of the calibration.
        seed: seed of the windows.
        bos: True: each window begins with the tokenizer's BOS, and has no other special token.
        extra: number of windows after the `calibration.samples`; it does not
            change the others, unless the text is so large that its pieces are drawn. They repeat
            if the text is too short.

    Returns:
        The windows, int64 `(samples + extra, seqlen)` on the CPU, in all ranks those of rank 0.

    Raises:
        ConfigError: the tokenizer has no BOS.
        DataError: the text cannot be downloaded or read, or is too short.
    """
    first = bos_of(tokenizer, bos)
    generator = random.Random(seed)
    piece = config.seqlen if first is None else config.seqlen - 1
    count = config.samples + extra
    tokens_of = partial(encode, tokenizer, special=first is None)

    def draw() -> Tensor:
        documents = text.calibration(seed)
        if config.sampling == "documents":
            windows = _of_documents(documents, tokens_of, piece, count, generator)
        else:
            part = _part_of(documents, piece * count, generator)
            if config.sampling == "overlapping":
                windows = _overlapping(tokens_of(" ".join(part)), piece, count, generator)
            else:
                generator.shuffle(part)
                windows = _disjoint(tokens_of("\n\n".join(part)), piece, config, extra, generator)
        return with_bos(torch.stack(windows), first)

    return parallel.on_main(draw)


def _part_of(documents: Sequence[str], tokens: int, generator: random.Random) -> list[str]:
    """Return all documents of a small text, or random pieces of a large one.

    Tokenising a text of a gigabyte would take minutes and tens of gigabytes.
    """
    wanted = max(LARGEST_WHOLE_TEXT, _CHARACTERS_A_TOKEN * tokens)
    if sum(map(len, documents)) <= wanted:
        return list(documents)
    pieces = [
        text[start : start + PIECE] for text in documents for start in range(0, len(text), PIECE)
    ]
    generator.shuffle(pieces)
    part = []
    for piece in pieces:
        part.append(piece)
        wanted -= len(piece)
        if wanted <= 0:
            break
    return part


def _disjoint(
    tokens: Tensor, piece: int, config: CalibrationConfig, extra: int, generator: random.Random
) -> list[Tensor]:
    """Draw windows that do not overlap, and read the text again if it has too few extra ones."""
    needed = config.samples * piece
    if len(tokens) < needed:
        raise DataError(
            f"the calibration text has {len(tokens)} tokens, but calibration.samples="
            f"{config.samples} windows of calibration.seqlen={config.seqlen} need {needed}"
        )
    offset = generator.randrange(len(tokens) % piece + 1)
    places = range(offset, len(tokens) - piece + 1, piece)
    starts = generator.sample(places, config.samples)
    count = config.samples + extra
    if count > len(places):
        log.warning("the text has %d windows and is read again for %d", len(places), count)
    unread: Sequence[int] = sorted(set(places) - set(starts))
    while len(starts) < count:
        starts += generator.sample(unread, min(len(unread), count - len(starts)))
        unread = places
    return [tokens[start : start + piece] for start in starts]


def _overlapping(tokens: Tensor, piece: int, count: int, generator: random.Random) -> list[Tensor]:
    """Draw windows at random places, as the released code of the papers does for WikiText-2."""
    if len(tokens) <= piece:
        raise DataError(
            f"the calibration text has {len(tokens)} tokens, but calibration.sampling=overlapping "
            f"with calibration.seqlen needs at least {piece + 1}"
        )
    starts = [generator.randint(0, len(tokens) - piece - 1) for _ in range(count)]
    return [tokens[start : start + piece] for start in starts]


def _of_documents(
    documents: Sequence[str],
    tokens_of: Callable[[str], Tensor],
    piece: int,
    count: int,
    generator: random.Random,
) -> list[Tensor]:
    """Draw windows from random documents, as the released code does for C4 and the Pile."""
    short: set[int] = set()
    windows: list[Tensor] = []
    while len(windows) < count:
        if len(short) == len(documents):
            raise DataError(
                f"none of the {len(short)} documents for calibration has more than the {piece} "
                "tokens that a window of calibration.seqlen takes"
            )
        index = generator.randint(0, len(documents) - 1)
        if index in short:
            continue
        tokens = tokens_of(documents[index])
        if len(tokens) > piece:
            start = generator.randint(0, len(tokens) - piece - 1)
            windows.append(tokens[start : start + piece])
        else:
            short.add(index)
    return windows
