"""Perplexity over windows that do not overlap."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from permllm.data.texts import Text
from permllm.data.windows import bos_of, encode, with_bos
from permllm.errors import DataError
from permllm.models.checkpoint import vocabulary_of
from permllm.models.families import after_layers
from permllm.models.head import Head, tokens_at_a_time
from permllm.models.layers import LayerStream
from permllm.models.load import LoadedModel, check_windows
from permllm.models.offload import placement_of
from permllm.runtime import parallel
from permllm.settings.config import PerplexityConfig


def perplexity_windows(
    loaded: LoadedModel, text: Text, config: PerplexityConfig, name: str
) -> Tensor:
    """Cut a text for perplexity into windows, and drop the remainder.

    Args:
        loaded: the model. If it asks for BOS, each window begins with BOS, so that all tokens of
            the text are predicted.
        text: the text.
        config: settings of the windows.
        name: beginning of errors.

    Returns:
        The windows, int64 `(windows, seqlen)` on the CPU, in all ranks those of rank 0.

    Raises:
        ConfigError: the tokenizer has no BOS.
        DataError: the text cannot be downloaded or read, is shorter than a window, or has tokens
            that the model does not know.
    """
    first = bos_of(loaded.tokenizer, loaded.bos)
    tokens = parallel.on_main(
        lambda: encode(loaded.tokenizer, text.evaluation(), special=first is None)
    )
    piece = config.seqlen if first is None else config.seqlen - 1
    count = len(tokens) // piece
    if count == 0:
        raise DataError(
            f"{name}: it has {len(tokens)} tokens, fewer than one window of "
            f"evaluation.perplexity.seqlen={config.seqlen}: take shorter windows, or another text"
        )
    limits = (count, text.max_windows, config.limit)
    count = min(limit for limit in limits if limit is not None)
    windows = with_bos(tokens[: count * piece].view(count, piece), first)
    check_windows(name, windows, loaded.model)
    return windows


@torch.no_grad()
def measure_perplexity(
    model: PreTrainedModel, windows: Tensor, batch_tokens: int, label: str = "perplexity"
) -> dict[str, Any]:
    """Measure `exp(mean negative log-likelihood)` over `seqlen - 1` tokens of each window.

    Log-likelihoods are computed in float32 and summed over windows in float64. A large vocabulary's
    logits are in memory for some tokens at a time.

    Args:
        model: the model.
        windows: int64 `(windows, seqlen)`.
        batch_tokens: tokens per forward; at least one window is taken.
        label: label of the progress bar.

    Returns:
        `value`, `window` (tokens of a window), `tokens` (predicted tokens), `scores` (nats of each
        window).
    """
    count, window = windows.shape
    portions = parallel.portions(torch.arange(count), max(1, batch_tokens // window))
    mine = torch.cat([windows[part] for part, _ in portions])
    nats = _nats_of_windows(model, mine, len(portions[0][0]), label)
    losses_of_windows = torch.zeros(count, dtype=torch.float64)
    for part, counted in portions:
        losses = [next(nats) for _ in part]
        if counted:
            losses_of_windows[part] = torch.tensor(losses, dtype=torch.float64)
    parallel.all_reduce([losses_of_windows])  # each window is zero in all ranks but one
    losses = losses_of_windows.tolist()
    total = 0.0
    for loss in losses:  # in a loop, because `sum` rounds differently from Python 3.12 on
        total += loss
    tokens = count * (window - 1)
    mean = total / tokens
    value = math.inf if mean >= 700 else math.exp(mean)  # NaN stays NaN
    return {"value": value, "window": window, "tokens": tokens, "scores": losses}


def _nats_of_windows(
    model: PreTrainedModel, windows: Tensor, batch_size: int, label: str
) -> Iterator[float]:
    """Yield the negative log-likelihood of each window, a sum over its tokens."""
    batches = windows.to(next(model.parameters()).device).split(batch_size)
    tokens = batches[0].numel()
    at_a_time = tokens_at_a_time(vocabulary_of(model), tokens)
    head = Head(model)
    streams = placement_of(model).streams
    states_of = _streamed_states(model, batches, label) if streams else _states(model, batches)
    for batch in tqdm(batches, desc=label, unit="batch", leave=False):
        states = next(states_of)
        if at_a_time == tokens:
            # Window by window, because float32 logits take much memory.
            for logits, targets in zip(head.logits(states), batch, strict=True):
                yield _nats(logits[:-1], targets[1:])
            continue
        for window, targets in zip(states, batch, strict=True):
            parts = zip(window[:-1].split(at_a_time), targets[1:].split(at_a_time), strict=True)
            yield math.fsum(_nats(head.logits(part), ids) for part, ids in parts)


def _nats(logits: Tensor, targets: Tensor) -> float:
    """Return the nats of targets, int64 `(tokens,)`, under logits `(tokens, vocabulary)`."""
    return float(nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))


def _states(model: PreTrainedModel, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the input of the head for each batch, `(windows, seqlen, hidden)`."""
    for batch in batches:
        yield model.base_model(input_ids=batch, use_cache=False).last_hidden_state


def _streamed_states(
    model: PreTrainedModel, batches: Sequence[Tensor], label: str
) -> Iterator[Tensor]:
    """Yield the same as `_states`, after all windows have gone through one layer, then the next."""
    stream = LayerStream(model, torch.cat(list(batches)), len(batches[0]), already_split=True)
    stream.to_the_end(label)
    for hidden in stream.states().split(len(batches[0])):
        yield after_layers(model, hidden.to(batches[0].device))
