"""Gradients of the calibration loss in the dense model: of each linear's weight, for one sample after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from permllm.calibration.statistics.base import GradientStatistic, Statistic, gradient_kinds
from permllm.errors import ConfigError, TrainingError
from permllm.models.decoder import layer_inputs, run_layer
from permllm.models.families import decoder_layers, linear_at
from permllm.models.head import Head, tokens_at_a_time
from permllm.runtime.memory import to_host
from permllm.runtime.precision import products_in, recomputed

Gradients: TypeAlias = dict[str, list[GradientStatistic]]
"""Statistics of the gradients of linears' weights, by module path."""


def weight_gradients(
    model: nn.Module,
    paths: Iterable[str],
    kinds: Iterable[type[Statistic]],
    tokens: Tensor,
    compute_dtype: torch.dtype | None = None,
) -> Gradients:
    """Statistics of the gradients of the calibration loss: of each sample, the mean cross-entropy of its next tokens.

    One backward a sample, in which each decoder layer is computed anew: the device holds the states between the layers, the
    activations of one layer and the logits of one sample, or of a part of it where the vocabulary is large, and one gradient,
    which goes to the host.

    Args:
        model: dense, of a known family; as it was afterwards.
        paths: of the linears.
        kinds: statistics; where none of them is of gradients nothing is computed.
        tokens: int64 `(samples, length)`.
        compute_dtype: of the model's matrix products; None is that of its weights.

    Raises:
        ConfigError: a sample has no next token.
        TrainingError: a gradient is not finite.
    """
    wanted = gradient_kinds(kinds)
    if not wanted:
        return {}
    predictions = tokens.shape[1] - 1
    if not predictions:
        raise ConfigError("calibration.seqlen=1: a gradient of the loss needs samples of at least 2 tokens")
    weights = {path: linear_at(model, path).weight for path in paths}
    found: Gradients = {}
    for path, weight in weights.items():
        dtype = torch.promote_types(weight.dtype, torch.float32)
        found[path] = [kind(weight.shape, dtype) for kind in wanted]

    def take(path: str, gradient: Tensor) -> None:
        gradient = to_host(gradient).to(torch.promote_types(gradient.dtype, torch.float32)) / predictions
        if not math.isfinite(float(gradient.sum())):  # one pass, where isfinite() makes five
            raise TrainingError(f"the gradient of the calibration loss for {path} is not finite in {weights[path].dtype}")
        for statistic in found[path]:
            statistic.update(gradient)

    head = Head(model)
    dtype = compute_dtype or next(model.parameters()).dtype
    with _requiring(model, weights, take), torch.enable_grad():
        for sample in tqdm(tokens.split(1), desc="gradients", unit="sample"):
            with products_in(dtype, next(model.parameters()).device):
                loss = _summed_loss(model, head, sample)
            loss.backward()  # type: ignore[no-untyped-call]
    return found


def _summed_loss(model: nn.Module, head: Head, sample: Tensor) -> Tensor:
    """A sum over tokens: the gradients of a mean would vanish in float16."""
    inputs = layer_inputs(model, sample)
    hidden = inputs.hidden
    for layer, kwargs in zip(decoder_layers(model), inputs.kwargs, strict=True):
        hidden = recomputed(run_layer, layer, hidden, kwargs)
    states = head.reads(hidden)[0, :-1]
    targets = sample[0, 1:].to(states.device)
    at_a_time = tokens_at_a_time(len(head.weight), len(states))
    if at_a_time == len(states):
        return _cross_entropy(head, states, targets)
    total = states.new_zeros((), dtype=torch.promote_types(states.dtype, torch.float32))
    for part, following in zip(states.split(at_a_time), targets.split(at_a_time), strict=True):
        total = total + recomputed(_cross_entropy, head, part, following)
    return total


def _cross_entropy(head: Head, states: Tensor, targets: Tensor) -> Tensor:
    logits = head.logits(states)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(wide, targets, reduction="sum")


@contextmanager
def _requiring(model: nn.Module, weights: Mapping[str, Tensor], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Only these weights get gradients, each of which is given to `take` in backward and then gone."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    handles = []
    try:
        model.requires_grad_(False)
        for path, weight in weights.items():

            def given(parameter: Tensor, path: str = path) -> None:
                gradient, parameter.grad = parameter.grad, None
                assert gradient is not None
                take(path, gradient)

            handles.append(weight.requires_grad_().register_post_accumulate_grad_hook(given))  # type: ignore[no-untyped-call]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights.values():
            weight.grad = None
        for parameter, required in before:
            parameter.requires_grad_(required)
