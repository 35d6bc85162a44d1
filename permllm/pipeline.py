"""Orchestration of calibration and pruning: one decoder layer at a time, activations of one layer boundary at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from permllm.calibration.dense import Pruner, by_layer, collecting, member_factors
from permllm.calibration.gradients import Gradients, weight_gradients
from permllm.calibration.saliency import SaliencyFactors, saliency
from permllm.calibration.statistics.base import InputStatistics
from permllm.learning.problem import LearningProblem
from permllm.models.decoder import LayerStream, last_states
from permllm.models.families import ChannelGroup, decoder_layers, linear_at
from permllm.models.placement import placement_of
from permllm.reconstruction.base import NoReconstruction, PrunedLayer, PrunedLinear, PrunedNetwork, Reconstruction
from permllm.runtime.precision import products_in
from permllm.sparsity import NMPattern, PackedMasks, permuted_nm_mask, saliency_sum, violations


@dataclass
class PrunedModel:
    """What pruning found out, apart from the weights, which are changed in place.

    Attributes:
        orders: int64 `(C_in,)` by group.
        masks: bool `(C_out, C_in)` by linear, original channel order, on the CPU, packed while nobody asks for one.
        retained: share of the saliency retained, by group.
        moved: share of the channels that are not at their original position, by group.
        output_error: `||X (W - W')^T||^2 / ||X W^T||^2` by group, X the inputs in the dense model, W' before anything larger
            than a linear is reconstructed.
        violations: groups of M in permuted order with more than N nonzeros, over all layers.
    """

    orders: dict[str, Tensor] = field(default_factory=dict)
    masks: PackedMasks = field(default_factory=PackedMasks)
    retained: dict[str, float] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    output_error: dict[str, float] = field(default_factory=dict)
    violations: int = 0


def prune(
    model: nn.Module,
    groups: list[ChannelGroup],
    tokens: Tensor,
    pruner: Pruner,
    pattern: NMPattern,
    order: Callable[[str, Tensor, NMPattern], Tensor],
    batch_size: int,
    factors: dict[str, SaliencyFactors] | None,
    reconstruction: Reconstruction | None = None,
    compute_dtype: torch.dtype | None = None,
    masks: Mapping[str, Tensor] | None = None,
    network_tokens: Tensor | None = None,
    directory: Path | None = None,
    run: str = "",
    seed: int = 0,
) -> PrunedModel:
    """Prune all layers in place, one after the other.

    Args:
        model: dense; its linears hold `weight * mask` afterwards (or the updated weight), zeros as +0.0.
        groups: of the model, those that are pruned; what is none of their members stays dense.
        tokens: int64 `(samples, length)`.
        pruner: the base pruner.
        pattern: N:M of the groups that have none of their own.
        order: int64 `(C_in,)` for a group's name and its saliency `(rows of all members, C_in)`.
        batch_size: samples a forward.
        factors: of every linear, from the dense model; None takes them from the inputs that the pruned layers before give.
        reconstruction: of the kept weights; None leaves them as the pruner does.
        compute_dtype: of the model's matrix products, in reconstruction too; None is that of its weights.
        masks: bool `(C_out, C_in)` of every linear, N:M in the orders; None has the pruner choose them.
        network_tokens: those that the whole network is reconstructed on, where they are others than `tokens`.
        directory: where a reconstruction may write a checkpoint.
        run: digest of the settings, for it.
        seed: of the order of samples, where it takes them at random.
    """
    reconstruction = reconstruction or NoReconstruction()
    device = next(model.parameters()).device
    compute_dtype = compute_dtype or next(model.parameters()).dtype
    asked = (*(pruner.statistics if factors is None or pruner.updates_weights else ()), *reconstruction.statistics)
    gradients = weight_gradients(model, [path for group in groups for path in group.members], asked, tokens, compute_dtype)
    target = None if network_tokens is None else last_states(model, network_tokens, batch_size, compute_dtype)
    dense = LayerStream(model, tokens, batch_size, compute_dtype)
    follows_pruned = factors is None or pruner.updates_weights or reconstruction.changes_weights
    pruned = LayerStream(model, tokens, batch_size, compute_dtype) if follows_pruned else None
    result = PrunedModel()
    placement = placement_of(model)
    for index, members in by_layer(model, groups, "prune"):
        statistics: dict[str, InputStatistics] = {}
        if pruned is not None:
            with collecting(model, members, asked) as statistics:
                for _ in pruned.forward(index):
                    pass
        weights: dict[str, Tensor] = {}
        for group in members:
            found = (
                {path: factors[path] for path in group.members}
                if factors is not None
                else member_factors(model, group, pruner, statistics[group.name], gradients)
            )
            read = statistics.get(group.name)
            _prune_group(model, group, pruner, reconstruction, pattern, order, found, read, gradients, masks, weights, result)
            for path in group.members:
                gradients.pop(path, None)
        with _comparing(model, members, weights, result.output_error):
            dense.advance(index)
        for path, weight in weights.items():
            mask = None if pruner.updates_weights or reconstruction.changes_weights else result.masks.packed(path)
            placement.replace(linear_at(model, path), weight, mask)
        if pruned is not None:
            if weights and reconstruction.changes_weights:
                inputs, kwargs = pruned.batches(index)
                linears = [linear_at(model, path) for path in weights]
                kept = [result.masks[path].to(linear.weight.device) for path, linear in zip(weights, linears, strict=True)]
                layer = decoder_layers(model)[index]
                with products_in(compute_dtype, device):
                    reconstruction.layer(PrunedLayer(layer, linears, kept, inputs, kwargs, dense.batches(index)[0]))
                for linear in linears if placement.streams else ():
                    placement.replace(linear, linear.weight.data)
            pruned.advance(index)
    if reconstruction.changes_weights:
        linears = [linear_at(model, path) for path in result.masks]
        if network_tokens is None or target is None:
            network_tokens, target = tokens, dense.states()
        found_masks = list(result.masks.values())
        with products_in(compute_dtype, device):
            problem = LearningProblem(
                model,
                groups,
                network_tokens,
                factors or {},
                target,
                pattern,
                seed,
                batch_size,
                calibration=tokens,
                directory=directory,
                run=run,
            )
            reconstruction.network(PrunedNetwork(problem, linears, found_masks))
    for group in groups:
        with placement.layer(group.layer):
            for path in group.members:
                weight = linear_at(model, path).weight
                perm = result.orders[group.name].to(weight.device)
                result.violations += violations(weight, perm, group.pattern or pattern)
    return result


def _prune_group(
    model: nn.Module,
    group: ChannelGroup,
    pruner: Pruner,
    reconstruction: Reconstruction,
    pattern: NMPattern,
    order: Callable[[str, Tensor, NMPattern], Tensor],
    factors: dict[str, SaliencyFactors],
    statistics: InputStatistics | None,
    gradients: Gradients,
    masks: Mapping[str, Tensor] | None,
    weights: dict[str, Tensor],
    result: PrunedModel,
) -> None:
    pattern = group.pattern or pattern
    dense = {path: linear_at(model, path).weight for path in group.members}

    def score(path: str) -> Tensor:
        return saliency(dense[path], factors[path].to(dense[path].device))

    # Made anew for each linear afterwards: those of all members at once are the most memory that pruning takes.
    perm = order(group.name, torch.cat([score(path) for path in group.members]), pattern)
    result.orders[group.name] = perm.cpu()
    result.moved[group.name] = float((perm.cpu() != torch.arange(group.channels)).float().mean())
    kept = total = 0.0
    for path, weight in dense.items():
        perm, scores = perm.to(weight.device), score(path)
        mine = None if statistics is None else statistics.of_linear(gradients.get(path, ()))
        if pruner.updates_weights:
            given = {} if masks is None else {"mask": masks[path].to(weight.device)}
            new, mask = pruner.update(weight, mine, perm, pattern, **given)  # type: ignore[attr-defined]
        else:
            mask = permuted_nm_mask(scores, perm, pattern) if masks is None else masks[path].to(weight.device)
            new = torch.where(mask, weight, torch.zeros_like(weight))  # a product would leave -0.0 behind
        weights[path] = reconstruction.linear(PrunedLinear(weight, new, mask, perm, pattern, mine))
        result.masks[path] = mask.cpu()
        kept, total = kept + saliency_sum(scores, mask), total + saliency_sum(scores)
    result.retained[group.name] = kept / max(total, 1e-300)


@contextmanager
def _comparing(
    model: nn.Module, groups: list[ChannelGroup], weights: dict[str, Tensor], errors: dict[str, float]
) -> Iterator[None]:
    """Relative squared output error of each group under the new weights, while the dense layer runs."""
    sums = {group.name: torch.zeros(2, dtype=torch.float64) for group in groups}
    handles = []
    for group in groups:
        for path in group.members:

            def compare(linear: Any, args: tuple[Tensor], output: Tensor, path: str = path, name: str = group.name) -> None:
                difference = nn.functional.linear(args[0], linear.weight - weights[path])
                reference = output if linear.bias is None else output - linear.bias
                sums[name] += torch.stack([part.float().square().sum().double().cpu() for part in (difference, reference)])

            handles.append(linear_at(model, path).register_forward_hook(compare))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, (difference, reference) in sums.items():
        errors[name] = float(difference / reference.clamp_min(1e-300))
