"""Tiny problems of learning and pruning that tests of several packages share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from permllm.models.families import ChannelGroup, channel_groups, decoder_layers
from permllm.models.layers import LayerStream
from permllm.models.load import LoadedModel
from permllm.permutation.lcp.lcp import LCP
from permllm.pruner.base import Pruner
from permllm.pruner.wanda import Wanda
from permllm.pruning.layerwise import PrunedModel, prune_layers
from permllm.pruning.methods import Job, Methods, ModelGroups
from permllm.pruning.phases import calibrate_dense
from permllm.settings import composition
from permllm.settings.config import NMPattern, RunConfig, read_config
from permllm.sparsity.method import instantiate
from permllm.store.directory import Record
from permllm.store.loggers import NO_LOGGER
from permllm.training.losses import cosine_loss
from permllm.training.problem import LearningProblem
from tests.conftest import tiny_model
from tests.settings.test_config import composed

PRUNERS = ("magnitude", "wanda", "ria", "sparsegpt")
PATTERN = NMPattern(2, 4)
CPU = torch.device("cpu")


class Interrupt(Exception):
    """Stops learning or pruning."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shuffled(channels: int, seed: int = 0) -> Tensor:
    return torch.randperm(channels, generator=torch.Generator().manual_seed(seed))


def tokens(samples: int = 6, length: int = 12) -> Tensor:
    return torch.randint(0, 259, (samples, length), generator=torch.Generator().manual_seed(0))


def sinkhorn(logits: Tensor, temperature: float, iterations: float) -> Tensor:
    """Return the soft permutations `(blocks, B, B)`, as autograd differentiates them.

    Half an iteration normalises rows alone.
    """
    log_p = logits / temperature
    for half in range(int(2 * iterations)):
        log_p = log_p - log_p.logsumexp(1 if half % 2 else 2, keepdim=True)
    return log_p.exp()


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    return hard.detach() + soft - soft.detach()


@functools.cache
def _of_option(option: str) -> dict[str, Any]:
    config = read_config(composition.composed(["model=tiny-random", option]))
    return dict(getattr(config, option.partition("=")[0]))


def method(option: str, **settings: Any) -> Any:
    """Return the method of `GROUP=OPTION`, with some other settings than its YAML's."""
    return instantiate(option.partition("=")[0], _of_option(option) | settings)


def lcp(**settings: Any) -> LCP:
    usual = {"block_size": 24, "epochs": 2, "batch_size": 4, "loss": "cosine"}
    made: LCP = method("permutation=lcp", **usual | settings)
    return made


def problem(
    model: Any = None,
    pruner: Pruner | None = None,
    pattern: NMPattern = PATTERN,
    samples: Tensor | None = None,
    **extra: Any,
) -> LearningProblem:
    """Return the problem of a calibrated model, by default a Llama's with Wanda."""
    model, windows = model or tiny_model("llama"), tokens() if samples is None else samples
    groups = channel_groups(model)
    dense = calibrate_dense(model, groups, windows, pruner or Wanda(), batch_size=4)
    given = dense.factors, dense.target, extra.pop("calibration", windows)
    return LearningProblem(model, groups, windows, *given, pattern, seed=0, **extra)


def identities(groups: Iterable[ChannelGroup]) -> dict[str, Tensor]:
    """Return the permutation of each group that moves nothing."""
    return {group.name: torch.arange(group.channels) for group in groups}


@functools.cache
def _settings() -> RunConfig:
    return read_config(
        composed("model=tiny-random", "calibration.samples=6", "calibration.batch_size=4")
    )


def pruned(model: Any, pruner: Pruner, permutation: Any = None, **more: Any) -> PrunedModel:
    """Prune a model.

    Args:
        model: in place.
        pruner: of the job.
        permutation: None leaves the channels where they are.
        more: `groups`, `windows`, `pattern`, `reconstruction`, `products` and `record` of the job;
            `factors`, `permutations` and `masks` of the phases before.
    """
    config = dataclasses.replace(_settings(), sparsity=str(more.get("pattern", PATTERN)))
    methods = Methods(pruner, None, permutation, None, more.get("reconstruction"))
    groups, record = more.get("groups") or channel_groups(model), more.get("record") or Record()
    loaded: Any = LoadedModel(model, None, "")  # type: ignore[arg-type]
    products = more.get("products") or model.dtype
    model_groups = ModelGroups(channel_groups(model), groups)
    windows = more.get("windows", tokens())
    job = Job(config, methods, record, NO_LOGGER, loaded, model_groups, products, windows)
    before = {key: more.get(key) for key in ("factors", "permutations", "masks")}
    if permutation is None and before["permutations"] is None:
        before["permutations"] = identities(groups)
    return prune_layers(job, **before)


def states_of(model: nn.Module, layers: int = 2) -> Tensor:
    """Return the output of the first layers."""
    stream = LayerStream(model, tokens(), 4)
    for index in range(layers):
        stream.advance(index)
    return stream.states()


class _ScaledLayer(LlamaDecoderLayer):
    """Decoder layer that multiplies the values that it adds to the states by an argument."""

    def forward(self, hidden_states: Tensor, scale: Any = None, **kwargs: Any) -> Tensor:
        while not isinstance(scale, Tensor):
            scale = scale[1] if isinstance(scale, tuple) else scale["scale"]
        return hidden_states.lerp(super().forward(hidden_states, **kwargs), scale)


def model_with_scales(argument: Callable[[Tensor], Any] = lambda scale: scale) -> Any:
    """Return a random Llama whose layers multiply what they add to the states of each token.

    The model computes the scales of the tokens from their ids, and passes them to each layer.

    Args:
        argument: makes the argument of the layers from the scales, `(windows, tokens, 1)`.
    """
    model: Any = tiny_model("llama")

    def with_scales(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        scales = kwargs["input_ids"].unsqueeze(2) / 259
        return args, kwargs | {"scale": argument(scales)}

    for layer in decoder_layers(model):
        layer.__class__ = _ScaledLayer
    model.model.register_forward_pre_hook(with_scales, with_kwargs=True)
    return model


def outputs_of_layers(model: nn.Module, windows: Tensor) -> list[Tensor]:
    """Return the outputs of all decoder layers in the forward of the whole model."""
    found: list[Tensor] = []
    with ExitStack() as hooks:
        for layer in decoder_layers(model):
            hook = layer.register_forward_hook(lambda _, __, output: found.append(output))
            hooks.enter_context(hook)
        model(input_ids=windows, use_cache=False)
    return found


def output_loss(orders: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None) -> float:
    """Return the loss of the pruned model under given orders and masks, by default the pruner's."""
    learning = problem()
    pruned(learning.model, Wanda(), factors=learning.factors, permutations=orders, masks=masks)
    return float(cosine_loss(states_of(learning.model), learning.target))


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Tell whether both mappings hold equal tensors under the names of the first."""
    return all(torch.equal(value, other[name]) for name, value in one.items())


def check_masks(
    groups: Iterable[ChannelGroup], orders: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> None:
    """Check that the masks of all members are 2:4 in the orders of their groups."""
    for group, path in ((one, path) for one in groups for path in one.members):
        kept = masks[path][:, orders[group.name]].unflatten(1, (-1, PATTERN.m)).sum(2)
        assert bool((kept == PATTERN.n).all())


def check_others(model: nn.Module, found: PrunedModel, dense: nn.Module | None = None) -> None:
    """Check that what is not pruned is as in the dense model, by default a Llama's."""
    before = dict((dense or tiny_model("llama")).named_parameters())
    for name, parameter in model.named_parameters():
        assert name.removesuffix(".weight") in found.masks or torch.equal(parameter, before[name])
