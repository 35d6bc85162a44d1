"""`plan=true`: the channel groups, the learnable parameters and the memory of each stage, without weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from permllm.calibration.dense import Pruner
from permllm.calibration.statistics.base import gradient_kinds, input_kinds
from permllm.config import PLACEMENTS, RunConfig
from permllm.learning.training import KEPT_ON_A_HOST, kept_a_token
from permllm.mask.contract import MaskPlan
from permllm.models.families import ChannelGroup, channel_groups, decoder_layers
from permllm.models.head import tokens_at_a_time
from permllm.models.losses import CHUNK
from permllm.models.patterns import groups_to_prune
from permllm.pattern import NMPattern
from permllm.permutation.contract import LearningPlan
from permllm.runtime.devices import resolve_device
from permllm.runtime.memory import peak_host_memory
from permllm.runtime.terminal import terminal


def print_plan(
    config: RunConfig, model: PreTrainedModel, pruner: Pruner, permutation: Any, mask: Any, reconstruction: Any
) -> None:
    """Print the plan of a run.

    Args:
        config: of the run.
        model: on the meta device.
        pruner: the base pruner.
        permutation: the permutation method; one that is learned says what it will learn.
        mask: the mask method, likewise.
        reconstruction: of the kept weights.
    """
    console = terminal()
    every, groups = channel_groups(model), groups_to_prune(model, config)
    layers = len(decoder_layers(model))
    plan: LearningPlan | None = permutation.plan(groups, layers) if permutation.learned else None
    table = Table(title=f"{config.model.name}: channel groups of each of the {layers} decoder layers", title_justify="left")
    for heading in ("group", "members", "channels", "rows", "blocks", "logits"):
        table.add_column(heading, justify="left" if heading in ("group", "members") else "right")
    of_parts = config.keep_dense or config.sparsity_of
    if of_parts:
        table.add_column("N:M")
        table.add_column("layers")
    alike: dict[tuple[str, ...], list[ChannelGroup]] = {}
    for group in groups:
        members = ", ".join(member.rsplit(".", 1)[-1] for member in group.members)
        alike.setdefault((group.table.name, members, str(group.pattern or config.pattern)), []).append(group)
    for (name, members, pattern), (group, *others) in alike.items():
        table.add_row(
            name,
            members,
            str(group.channels),
            " + ".join(map(str, group.rows)),
            plan.blocks[group.name] if plan else "-",
            plan.sizes[group.name] if plan else "-",
            *([pattern, _ranges([group.layer, *(other.layer for other in others)])] if of_parts else []),
        )
    console.print(table)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights: Counter[NMPattern] = Counter()
    for group in groups:
        weights[group.pattern or config.pattern] += group.channels * sum(group.rows)
    console.print(f"parameters             {parameters}, {_pruned(weights)}")
    if of_parts:
        zeros = sum(count * (pattern.m - pattern.n) / pattern.m for pattern, count in weights.items())
        share = zeros / sum(group.channels * sum(group.rows) for group in every)
        console.print(f"zeros                  {share:.2%} of all linears of the decoder layers")
    if config.model.bos:
        console.print("windows                begin with BOS, in calibration and perplexity")
    console.print(f"logits                 {plan.logits if plan else 0}")
    for name in plan.stays if plan else []:
        console.print(f"{name} stays where it starts: it learns only with permutation.layers_per_stage=all and all layers")
    windows = plan.windows if plan else []
    depth = max((stop - first for first, stop in windows), default=0)
    if windows:
        console.print(f"stages                 {len(windows)}, of at most {depth} layers")
    console.print(f"learnable parameters   {plan.parameters if plan else 0}")
    of_window = plan.logits * depth // (layers - windows[0][0]) if plan and windows else 0
    learning = []
    if plan and not getattr(mask, "learns_orders", False):
        between = 4 * plan.between * depth // (layers - windows[0][0])
        learning.append(_Learning("learn", permutation, of_window, depth, max(0, between - 16 * of_window)))  # not at once
    if mask.learned:
        learning.append(_masks(console, mask, mask.plan(groups, layers), of_window))
    if reconstruction.learned:
        learning.append(_weights(console, config, reconstruction, weights, layers))
    of_placement = partial(_memory, config, model, every, pruner, parameters, learning, mask, reconstruction)
    _print_memory(console, config, model, of_placement, len(windows) > 1)


def _print_memory(
    console: Console, config: RunConfig, model: PreTrainedModel, of_placement: Callable[[str], dict[str, int]], staged: bool
) -> None:
    """Print bytes by stage, and what each placement of the weights needs."""
    console.print("memory (estimates, of the largest stage):" if staged else "memory (estimates):")
    for stage, size in of_placement(config.model.placement).items():
        console.print(f"  {stage:<20} {size / 1e9:.2f} GB")
    moved = _of_layers(model) * _item(config)
    console.print("with the weights in a placement, and Python:")
    for placement in PLACEMENTS:
        stages = of_placement(placement)
        beside = (stages.pop(_BESIDE) + peak_host_memory()) / 1e9
        largest = max(stages.values()) / 1e9
        if resolve_device(config.model.device).type == "cpu":  # where all of it is the host's
            needs = f"{beside + largest:.2f} GB"
        else:
            needs = f"{largest:.2f} GB of the device's, {beside:.2f} GB of the host's"
        comes = "" if placement == "device" else f"; {moved / 1e9:.2f} GB come to it in each pass over the layers"
        console.print(f"  {placement:<20} {needs}{comes}")


def _masks(console: Console, mask: Any, plan: MaskPlan, logits: int) -> _Learning:
    """Print what masks learn; `logits` is how many logits of orders learn in the largest window."""
    each = [sum(plan.parameters.get(layer, 0) for layer in range(first, stop)) for first, stop in plan.windows]
    console.print(f"mask parameters        {sum(each)}, in stages of at most {max(each)}")
    depth = max(stop - first for first, stop in plan.windows)
    if mask.learns_orders:
        return _Learning("learn masks", mask, max(each) + logits, depth)
    # A masked weight in the format of the products, which are bfloat16 where they are not the weights' own.
    return _Learning("learn masks", mask, max(each), depth, 2 * max(each) if plan.keeps_masked else 0)


def _weights(
    console: Console, config: RunConfig, reconstruction: Any, weights: Mapping[NMPattern, int], layers: int
) -> _Learning:
    """Print how many kept weights learn, with their places, their mean where it is wanted, and as products read them."""
    kept, pruned = sum(count * pattern.n // pattern.m for pattern, count in weights.items()), sum(weights.values())
    console.print(f"kept weights           {kept}, which learn together")
    waiting = 4 * kept * (2 if reconstruction.average else 1)
    # Half-precision weights learn as float32 copies and are read as they are; float32 ones are rounded for the products.
    waiting += 2 * pruned if config.model.dtype == "float32" else 0
    return _Learning("learn weights", reconstruction, kept, layers, waiting)


def _pruned(weights: Mapping[NMPattern, int]) -> str:
    """How many weights are pruned to what."""
    (pattern, count), *others = weights.items()
    return f"of which {count} are pruned to {pattern}" + "".join(f", {more} to {other}" for other, more in others)


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers with what follows one another drawn together: `0, 2-5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


# Of the stages, what the host holds beside what the device does.
_BESIDE = "on host, beside it"


class _Learning(NamedTuple):
    """What learns in a stage: the method, its parameters and layers in the largest window, bytes that wait for backward."""

    name: str
    method: Any
    parameters: int
    depth: int
    waiting: int = 0


def _item(config: RunConfig) -> int:
    """Bytes a weight."""
    return torch.empty(0, dtype=getattr(torch, config.model.dtype)).element_size()


def _of_layers(model: PreTrainedModel, layers: int | None = None) -> int:
    """Parameters of the decoder layers, or of the largest so many."""
    sizes = sorted((sum(value.numel() for value in layer.parameters()) for layer in decoder_layers(model)), reverse=True)
    return sum(sizes[:layers])


def _memory(
    config: RunConfig,
    model: PreTrainedModel,
    groups: list[ChannelGroup],
    pruner: Pruner,
    parameters: int,
    learning: Sequence[_Learning],
    mask: Any,
    reconstruction: Any,
    placement: str,
) -> dict[str, int]:
    """Bytes by stage, with the weights in a placement."""
    item = _item(config)
    hidden = model.config.hidden_size
    widest = max(sum(group.rows) for group in groups)
    largest = max(group.channels * sum(group.rows) for group in groups)
    in_layers = _of_layers(model) * item
    # Of the layers that come and go, the one that is computed with and the next, which is on its way.
    weights = parameters * item - (0 if placement == "device" else in_layers - 2 * _of_layers(model, 1) * item)
    states = (config.calibration.samples + config.further) * config.calibration.seqlen * hidden * item
    forward = config.calibration.batch_size * config.calibration.seqlen * (6 * hidden + 2 * widest) * item
    channels = max(group.channels for group in groups)
    sums = sum(kind.memory(channels) for kind in input_kinds(pruner.statistics))
    pruned = sum(group.channels * sum(group.rows) for group in groups)
    # A float32 number a weight and statistic; a saliency that follows from them, a dense score, takes their place.
    of_gradients = 4 * pruned * len(gradient_kinds(pruner.statistics))
    scores = 4 * pruned if of_gradients else 0
    vocabulary = model.config.vocab_size
    perplexity = config.evaluation.perplexity
    # Of the tokens of a batch those whose logits exist together, and in float32 those of a window.
    evaluated = tokens_at_a_time(vocabulary, max(perplexity.batch_tokens, perplexity.seqlen))
    of_window = tokens_at_a_time(vocabulary, perplexity.seqlen)
    stages = {
        "weights": float(weights),
        "evaluate": weights + (evaluated * item + of_window * 4) * vocabulary,
        # Two streams of states and the learning target; masks are kept as bool until they are written.
        _BESIDE: float(3 * states + pruned + of_gradients + (in_layers if placement == "host" else 0)),
        "calibrate": float(weights + forward + sums),
    }
    if of_gradients:
        # One sample: the states between the layers, one layer's internals, the logits, and one gradient.
        between = config.calibration.seqlen * (len(decoder_layers(model)) * hidden + 8 * hidden + 4 * widest) * item
        together = tokens_at_a_time(vocabulary, config.calibration.seqlen)
        stages["gradients"] = weights + between + together * vocabulary * (item + 12) + largest * item
    read = () if mask.local else input_kinds(mask.statistics)
    if read:
        # A group's weights and their mask, in order, and what a refinement keeps of them up to date.
        stages["refine masks"] = weights + forward + sum(kind.memory(channels) for kind in read) + 6 * 4 * largest
    for name, method, learned, depth, waiting in learning:
        together = min(method.batch_size, getattr(method, "micro_batch_size", None) or method.batch_size)
        tokens = together * config.calibration.seqlen
        # What backward needs of all layers where that is little, else the states between layers and one layer's internals.
        activations = tokens * kept_a_token(groups, hidden) * item * depth
        recomputes = getattr(method, "activation_checkpointing", None)
        if placement != "device" or recomputes or (recomputes is None and activations > KEPT_ON_A_HOST):
            activations = tokens * (hidden * depth + 8 * hidden + 4 * widest) * item
        # Where the loss goes through the head: its weight in the format of the products, and four numbers a token and a word.
        words = tokens_at_a_time(vocabulary, CHUNK) * vocabulary if getattr(method, "loss", None) == "kl" else 0
        # Parameters, their gradient and two moments; a layer's masked weight and the gradient of it.
        stages[name] = weights + 16 * learned + waiting + activations + 3 * largest * item
        stages[name] += 4 * 4 * words + (2 * vocabulary * hidden if words else 0)
        stages[name] += scores * depth / len(decoder_layers(model))
    asked = input_kinds((*pruner.statistics, *reconstruction.statistics))
    stages["prune"] = weights + forward + sum(kind.memory(channels) for kind in asked) + 4 * 3 * largest
    return {name: math.ceil(size) for name, size in stages.items()}
