"""Orchestration of calibration and pruning: one decoder layer at a time, activations of one layer boundary at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from permllm.config import NMPattern
from permllm.models.families import ChannelGroup, linear_at
from permllm.models.layers import LayerStream, last_states
from permllm.models.offload import masked, placement_of
from permllm.pruning.reconstruction import (
    NoReconstruction,
    PrunedLinear,
    PrunedNetwork,
    Reconstruction,
    trains_network,
)
from permllm.runs.directory import Record
from permllm.runs.masks import PackedMasks, violations
from permllm.runs.names import PRUNED_LAYERS, layer_file
from permllm.runs.pruned_layers import PrunedLayer, load_layer, mask_name, save_layer, weight_name
from permllm.runs.tensors import load_tensor
from permllm.runtime import parallel
from permllm.runtime.precision import products_in
from permllm.sparsity.calibrate import Pruner, by_layer, collecting, member_factors
from permllm.sparsity.nm import permuted_nm_mask, saliency_sum
from permllm.sparsity.saliency import SaliencyFactors, saliency
from permllm.sparsity.statistics import InputStatistics
from permllm.training.problem import LearningProblem


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

    def add(self, layer: PrunedLayer) -> None:
        """Have what was found of a layer."""
        self.orders |= layer.orders
        self.masks.take(layer.masks, layer.masks)
        self.retained |= layer.retained
        self.moved |= layer.moved
        self.output_error |= layer.output_error

    def of_layer(self, groups: list[ChannelGroup], weights: dict[str, Tensor]) -> PrunedLayer:
        """What was found of a layer, with weights that masks do not say."""
        names, masks = [group.name for group in groups], PackedMasks()
        masks.take(self.masks, [path for group in groups for path in group.members])
        of_groups = ({name: found[name] for name in names} for found in (self.retained, self.moved, self.output_error))
        return PrunedLayer({name: self.orders[name] for name in names}, masks, weights, *of_groups)


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
    *,
    compute_dtype: torch.dtype | None = None,
    masks: Mapping[str, Tensor] | None = None,
    network_tokens: Tensor | None = None,
    record: Record | None = None,
    seed: int = 0,
    watch: Callable[[LearningProblem], None] = lambda problem: None,
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
        record: keeps each layer that is pruned, so that a run that was stopped continues after it, and the checkpoints of a
            reconstruction; None: in memory.
        seed: of the order of samples, where it takes them at random.
        watch: is given the problem that the whole network is reconstructed by, to have its steps and epochs told.
    """
    reconstruction = reconstruction or NoReconstruction()
    device = next(model.parameters()).device
    compute_dtype = compute_dtype or next(model.parameters()).dtype
    asked = (*(pruner.statistics if factors is None or pruner.updates_weights else ()), *reconstruction.statistics)
    target = None if network_tokens is None else last_states(model, network_tokens, batch_size, compute_dtype)
    dense = LayerStream(model, tokens, batch_size, compute_dtype)
    changes = pruner.updates_weights or reconstruction.changes_weights
    pruned = LayerStream(model, tokens, batch_size, compute_dtype) if factors is None or changes else None
    result = PrunedModel()
    placement, record = placement_of(model), record or Record()
    for index, members in by_layer(model, groups, "prune"):
        kept_layer = record.loaded(layer_file(PRUNED_LAYERS, index), load_layer) if members else None
        if kept_layer is not None:
            _take_over(model, index, kept_layer, result, dense, pruned)
            _read_from_file(model, record, index, kept_layer, result.masks)
            continue
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
                else member_factors(model, group, pruner, statistics[group.name])
            )
            _prune_group(
                model,
                group,
                pruner,
                reconstruction,
                pattern,
                order,
                found,
                statistics.get(group.name),
                masks,
                weights,
                result,
            )
        statistics.clear()  # those of the last layer would stay while the whole network learns
        with _comparing(model, members, weights, result.output_error):
            dense.advance(index)
        for path, weight in weights.items():
            mask = None if changes else partial(result.masks.__getitem__, path)
            placement.replace(linear_at(model, path), weight, mask)
        if pruned is not None:
            pruned.advance(index)
        if members:
            weights = {path: linear_at(model, path).weight.data for path in weights} if changes else {}
            layer = result.of_layer(members, weights)
            record.keep(layer_file(PRUNED_LAYERS, index), layer, save_layer)
            _read_from_file(model, record, index, layer, result.masks)
            del weights, layer  # before the next layer's
    if trains_network(reconstruction):
        if network_tokens is None or target is None:
            network_tokens, target = tokens, dense.states()
        del dense, pruned  # states of all samples, which are not needed any more
        with products_in(compute_dtype, device):
            problem = LearningProblem(
                model,
                groups,
                network_tokens,
                factors or {},
                target,
                pattern,
                seed=seed,
                calibration_batch_size=batch_size,
                calibration=tokens,
                directory=record.directory,
            )
            watch(problem)
            reconstruction.network(
                PrunedNetwork(problem, [linear_at(model, path) for path in result.masks], result.masks.values())
            )
    result.violations = _violations(model, groups, result.orders, pattern)
    return result


def _violations(model: nn.Module, groups: list[ChannelGroup], orders: dict[str, Tensor], pattern: NMPattern) -> int:
    """Groups of M, in permuted order, with more than N nonzeros."""
    found = 0
    for group in groups:
        with placement_of(model).layer(group.layer):
            for path in group.members:
                weight = linear_at(model, path).weight
                found += violations(weight, orders[group.name].to(weight.device), group.pattern or pattern)
    return found


def _take_over(
    model: nn.Module, index: int, layer: PrunedLayer, result: PrunedModel, dense: LayerStream, pruned: LayerStream | None
) -> None:
    """Add what an earlier attempt has found of a layer, give it its weights, and advance the states before and after."""
    result.add(layer)
    dense.advance(index)
    for path in layer.masks:
        linear = linear_at(model, path)
        if path in layer.weights:
            placement_of(model).replace(linear, layer.weights[path].to(linear.weight))
        else:
            mask = partial(result.masks.__getitem__, path)
            placement_of(model).replace(linear, masked(mask(), linear.weight), mask)
    if pruned is not None:
        pruned.advance(index)


def _read_from_file(model: nn.Module, record: Record, index: int, layer: PrunedLayer, masks: PackedMasks) -> None:
    """Leave a layer's masks and changed weights in its file until they are needed, if the model's weights stay on disk."""
    placement = placement_of(model)
    if not placement.reads_files or record.directory is None:
        return
    file = record.directory / layer_file(PRUNED_LAYERS, index)
    if not file.is_file():  # rank 0 has written it on another machine
        return
    if layer.weights:
        placement.lies_in(file, {linear_at(model, path): weight_name(path) for path in layer.weights})
    for path in layer.masks:
        masks.set_packed(path, partial(load_tensor, file, mask_name(path)), masks.shape(path))


def _prune_group(
    model: nn.Module,
    group: ChannelGroup,
    pruner: Pruner,
    reconstruction: Reconstruction,
    pattern: NMPattern,
    order: Callable[[str, Tensor, NMPattern], Tensor],
    factors: dict[str, SaliencyFactors],
    statistics: InputStatistics | None,
    masks: Mapping[str, Tensor] | None,
    weights: dict[str, Tensor],
    result: PrunedModel,
) -> None:
    pattern = group.pattern or pattern
    dense = {path: linear_at(model, path).weight for path in group.members}

    def score(path: str) -> Tensor:
        return saliency(dense[path], factors[path].to(dense[path].device))

    # Made anew for each linear afterwards: those of all members at once are the most memory that pruning takes.
    perm = order(group.name, _below_each_other(map(score, group.members), sum(group.rows)), pattern)
    result.orders[group.name] = perm.cpu()
    result.moved[group.name] = float((perm.cpu() != torch.arange(group.channels)).float().mean())
    kept = total = 0.0
    for path, weight in dense.items():
        perm, scores = perm.to(weight.device), score(path)
        if pruner.updates_weights:
            given = {} if masks is None else {"mask": masks[path].to(weight.device)}
            new, mask = pruner.update(weight, statistics, perm, pattern, **given)  # type: ignore[arg-type]
        else:
            mask = permuted_nm_mask(scores, perm, pattern) if masks is None else masks[path].to(weight.device)
            new = torch.where(mask, weight, torch.zeros_like(weight))  # a product would leave -0.0 behind
        weights[path] = parallel.share(reconstruction.linear(PrunedLinear(weight, new, mask, perm, pattern, statistics)))
        result.masks[path] = parallel.share(mask).cpu()
        kept, total = kept + saliency_sum(scores, mask), total + saliency_sum(scores)
    result.retained[group.name] = kept / max(total, 1e-300)


def _below_each_other(parts: Iterator[Tensor], rows: int) -> Tensor:
    """Matrices as one, `(rows, C)`: `torch.cat` would hold each of them twice."""
    first = next(parts)
    if len(first) == rows:
        return first
    whole = first.new_empty(rows, first.shape[1])
    whole[: len(first)] = first
    start = len(first)
    del first
    for part in parts:
        whole[start : start + len(part)] = part
        start += len(part)
    return whole


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
