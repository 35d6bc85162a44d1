"""Perplexity over windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from permllm.config import PerplexityConfig
from permllm.data.bos import bos_of
from permllm.data.registry import NamedText
from permllm.data.windows import all_tokens, begun
from permllm.errors import DataError
from permllm.models.checkpoint import vocabulary_of
from permllm.models.families import after_layers
from permllm.models.head import Head, tokens_at_a_time
from permllm.models.layers import LayerStream
from permllm.models.offload import placement_of
from permllm.runtime import parallel


def perplexity_windows(
    tokenizer: PreTrainedTokenizerBase,
    named: NamedText,
    config: PerplexityConfig,
    bos: bool = False,
) -> Tensor:
    """Tokenise an evaluation text once and cut it into windows; the remainder is dropped.

    Args:
        tokenizer: of the model.
        named: the text.
        config: of its windows.
        bos: whether the first token of each is the tokenizer's BOS, so that all of the text's own
            are predicted.

    Returns:
        int64 `(windows, seqlen)` on the CPU.

    Raises:
        ConfigError: the tokenizer has no BOS. DataError: the text cannot be had, or is shorter than
            one window.
    """
    first = bos_of(tokenizer, bos)
    tokens = all_tokens(tokenizer, named, bos)
    piece = config.seqlen - (first is not None)
    count = len(tokens) // piece
    if count == 0:
        raise DataError(
            f"{named.name} has {len(tokens)} tokens, fewer than one evaluation.perplexity.seqlen={config.seqlen}: "
            f"take a window of at most {len(tokens) + config.seqlen - piece}, or another text"
        )
    for limit in (named.text.max_windows, config.limit):
        if limit is not None:
            count = min(count, limit)
    return begun(tokens[: count * piece].view(count, piece), first)


def _nats(logits: Tensor, targets: Tensor) -> float:
    """Negative log-likelihood, a sum: logits `(tokens, vocabulary)`, targets int64 `(tokens,)`."""
    return float(nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows: Tensor, batch_tokens: int, label: str = "perplexity"
) -> dict[str, Any]:
    """Perplexity of `model` on `windows` int64 `(windows, seqlen)`.

    The logarithms are taken in float32 and summed in float64. `exp(mean negative log-likelihood of
    the seqlen - 1 predicted tokens of every window)`. Of a large vocabulary the logits exist for
    some tokens at a time.

    Returns:
        `value`, `window` (tokens), `tokens` (predicted ones), `losses` (nats of each window, over
        its predicted tokens).
    """
    count, window = windows.shape
    portions = parallel.portions(torch.arange(count), max(1, batch_tokens // window))
    device, mine = next(model.parameters()).device, [part for part, _ in portions]
    at_a_time = tokens_at_a_time(vocabulary_of(model), len(mine[0]) * window)
    together, streams = at_a_time == len(mine[0]) * window, placement_of(model).streams
    head = None if together and not streams else Head(model)
    batches = [windows[part].to(device) for part in mine]
    states_of = (
        _streamed_states(model, torch.cat(batches), len(mine[0]), label)
        if streams
        else _states(model, batches)
    )
    found = torch.zeros(count, dtype=torch.float64)
    for batch, (part, counted) in zip(
        tqdm(batches, desc=label, unit="batch", leave=False), portions, strict=True
    ):
        nats = []
        if together:
            logits = (
                model(input_ids=batch, use_cache=False).logits
                if head is None
                else head.logits(next(states_of))
            )
            for sequence, targets in zip(
                logits, batch, strict=True
            ):  # one at a time: float32 logits are large
                nats.append(_nats(sequence[:-1], targets[1:]))
        else:
            assert head is not None
            for sequence, targets in zip(next(states_of), batch, strict=True):
                parts = zip(
                    sequence[:-1].split(at_a_time), targets[1:].split(at_a_time), strict=True
                )
                nats.append(
                    math.fsum(_nats(head.logits(part), following) for part, following in parts)
                )
        if counted:
            found[part] = torch.tensor(nats, dtype=torch.float64)
    parallel.all_reduce([found])  # each window is zero in all ranks but one
    losses, total = found.tolist(), 0.0
    for nats in losses:  # one after the other: `sum` rounds in another way from Python 3.12 on
        total += nats
    tokens = count * (window - 1)
    mean = total / tokens
    return {
        "value": math.exp(mean) if mean < 700 else math.inf,
        "window": window,
        "tokens": tokens,
        "losses": losses,
    }


def _states(model: PreTrainedModel, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """What the head reads, `(windows, seqlen, hidden)` of each batch."""
    for batch in batches:
        yield model.base_model(input_ids=batch, use_cache=False).last_hidden_state


def _streamed_states(
    model: PreTrainedModel, windows: Tensor, batch_size: int, label: str
) -> Iterator[Tensor]:
    """The same, all windows through one layer and then through the next, so that each layer comes once."""
    stream = LayerStream(model, windows, batch_size)
    stream.to_the_end(label)
    device = next(model.parameters()).device
    for hidden in stream.states().split(batch_size):
        yield after_layers(model, hidden.to(device))
