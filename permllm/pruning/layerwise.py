"""Pruning of one decoder layer after the other, with the states of one layer in memory."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from permllm.models.families import ChannelGroup, linear_at
from permllm.models.layers import LayerStream, Teacher, last_states
from permllm.models.offload import masked, placement_of
from permllm.models.selection import recorded_patterns
from permllm.pruning.checks import check_result
from permllm.pruning.methods import Job, learning_problem, needs_teacher, windows_for
from permllm.pruning.phases import member_factors
from permllm.reconstruction.base import PrunedLinear, PrunedNetwork
from permllm.runtime import parallel
from permllm.runtime.precision import products_in
from permllm.sparsity.nm import permuted_nm_mask, saliency_sum, violations
from permllm.sparsity.saliency import SaliencyFactors, saliency
from permllm.sparsity.statistics import InputStatistics, by_layer, collecting
from permllm.store.files import PRUNED_LAYERS, WEIGHTS, layer_file
from permllm.store.tensors import (
    PrunedLayer,
    load_layer,
    load_tensor,
    mask_name,
    save_layer,
    save_tensors,
    weight_name,
)

log = logging.getLogger(__name__)


@dataclass
class PrunedModel(PrunedLayer):
    """Result of pruning all layers in place; `weights` stays empty.

    The output error of a group is `||X (W - W')^T||^2 / ||X W^T||^2`, with X its inputs in the
    dense model and W' its pruned weights before `Reconstruction.network`.

    Attributes:
        violations: number of permuted groups of M with more than N nonzeros, in all layers.
    """

    violations: int = 0

    def add(self, layer: PrunedLayer) -> None:
        """Add the result of a layer."""
        self.masks.take(layer.masks)
        for name in ("permutations", "retained", "moved", "output_error"):
            getattr(self, name).update(getattr(layer, name))


def prune_layers(
    job: Job,
    *,
    factors: Mapping[str, SaliencyFactors] | None = None,
    permutations: Mapping[str, Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> PrunedModel:
    """Prune the decoder layers of a job's dense model in place, one after the other.

    Afterwards the pruned linears hold `weight * mask`, or the updated weight, with zeros as +0.0.

    Args:
        job: job with the model. Its record keeps each pruned layer, so that a stopped run continues
            after the last one.
        factors: saliency factors of every linear in the dense model; None: they are computed from
            the inputs after the earlier layers are pruned.
        permutations: permutations, int64 `(C_in,)` by group; None: the permutation method finds
            each while its group is pruned.
        masks: permuted N:M masks of every linear, bool `(C_out, C_in)`; None: the pruner chooses
            them.
    """
    model = job.loaded.model
    windows = job.windows
    samples = job.config.calibration.samples
    reconstruction = job.methods.learned.get("reconstruction")
    target: Tensor | Teacher | None = None
    if reconstruction is not None:
        learned_from = windows_for(reconstruction, samples)
        if needs_teacher(reconstruction, samples, job.window_bytes, streams=False):
            target = Teacher(model, windows[learned_from])
        elif learned_from.start or learned_from.stop > samples:
            batch_size = job.config.calibration.batch_size
            target = last_states(model, windows[learned_from], batch_size, job.compute_dtype)
    layers = _LayerPruner(job, windows[:samples], factors, permutations, masks)
    for index, members in by_layer(model, job.groups.pruned, "prune"):
        layers.prune(index, members)
    result = layers.result
    if reconstruction is not None:
        if target is None:
            target = layers.dense.states()[learned_from]
        del layers  # frees the states of all windows
        problem = learning_problem(job, "reconstruction", factors or {}, target)
        linears = [linear_at(model, path) for path in result.masks]
        with products_in(job.compute_dtype, job.device):
            reconstruction.network(PrunedNetwork(problem, linears, result.masks.values()))
        for linear in linears:
            linear.weight.data.copy_(job.rounded(linear.weight.data))
    result.violations = _violations(job, result.permutations)
    return result


def _violations(job: Job, permutations: Mapping[str, Tensor]) -> int:
    total = 0
    for group in job.groups.pruned:
        with placement_of(job.loaded.model).layer(group.layer):
            for path in group.members:
                weight = linear_at(job.loaded.model, path).weight
                columns = permutations[group.name].to(weight.device)
                total += violations(weight, columns, job.config.pattern)
    return total


class _LayerPruner:
    """Loop over the decoder layers of a job; the arguments are as in `prune_layers`.

    Attributes:
        result: result of the layers so far.
        dense: states of the dense model after these layers.
        pruned: states of the pruned model after them; None: nothing depends on them.
    """

    def __init__(
        self,
        job: Job,
        tokens: Tensor,
        factors: Mapping[str, SaliencyFactors] | None,
        permutations: Mapping[str, Tensor] | None,
        masks: Mapping[str, Tensor] | None,
    ) -> None:
        self.job = job
        self.factors = factors
        self.permutations = permutations
        self.masks = masks
        self.result = PrunedModel()
        self.model = job.loaded.model
        self.placement = placement_of(self.model)
        self.changes = job.methods.change_weights
        pruner = job.methods.pruner
        self.reconstruction = job.methods.reconstruction
        self.statistics = self.reconstruction.statistics if self.reconstruction else ()
        if factors is None or pruner.updates_weights:
            self.statistics = (*pruner.statistics, *self.statistics)
        batch_size = job.config.calibration.batch_size
        self.dense = LayerStream(self.model, tokens, batch_size, job.compute_dtype)
        self.pruned: LayerStream | None = None
        if self.statistics:  # they depend on the pruned layers before a layer
            self.pruned = LayerStream(self.model, tokens, batch_size, job.compute_dtype)

    def prune(self, index: int, groups: list[ChannelGroup]) -> None:
        """Prune a layer that is on the device, or read its kept result; advance the states."""
        record = self.job.record
        name = layer_file(PRUNED_LAYERS, index)
        layer = record.read(name, load_layer) if groups else PrunedLayer()
        is_new = layer is None
        if layer is None:
            layer = self._new(index, groups)
        weights = self._weights(layer)
        with _comparing(self.model, groups if is_new else [], weights) as errors:
            self.dense.advance(index)
        layer.output_error.update(errors)
        self.result.add(layer)
        for path, weight in weights.items():
            mask = None if self.changes else partial(self.result.masks.__getitem__, path)
            self.placement.replace(linear_at(self.model, path), weight, mask)
        if self.pruned is not None:
            self.pruned.advance(index)
        if is_new:
            record.write(name, layer, save_layer)
        if groups and self.placement.reads_files and record.directory is not None:
            self._read_from_file(record.directory / name, layer)

    def _weights(self, layer: PrunedLayer) -> dict[str, Tensor]:
        """Return the pruned weights of a layer, `(C_out, C_in)` by linear, on the device."""
        dense = {path: linear_at(self.model, path).weight for path in layer.masks}
        if layer.weights:
            return {path: layer.weights[path].to(weight) for path, weight in dense.items()}
        return {path: masked(layer.masks[path], weight) for path, weight in dense.items()}

    def _read_from_file(self, file: Path, layer: PrunedLayer) -> None:
        """Leave the masks and changed weights of a layer in its file until they are needed."""
        if not file.is_file():  # rank 0 wrote it on another machine
            return
        if layer.weights:
            names = {linear_at(self.model, path): weight_name(path) for path in layer.weights}
            self.placement.read_from(file, names)
        for path, shape in layer.masks.shapes().items():
            read = partial(load_tensor, file, mask_name(path))
            self.result.masks.set_packed(path, read, shape)

    def _new(self, index: int, groups: list[ChannelGroup]) -> PrunedLayer:
        """Prune a layer; its output errors are measured later."""
        layer = PrunedLayer()
        with collecting(self.model, groups, self.statistics) as statistics:
            if self.pruned is not None:
                for _ in self.pruned.forward(index):
                    pass
        for group in groups:
            self._add(group, statistics[group.name], layer)
        return layer

    def _add(self, group: ChannelGroup, statistics: InputStatistics, layer: PrunedLayer) -> None:
        """Prune a group, and add its permutation, masks, weights and measures to the layer."""
        factors = self.factors
        if factors is None:
            factors = member_factors(self.model, group, self.job.methods.pruner, statistics)
        permutation = self._permutation(group, factors)
        layer.permutations[group.name] = permutation
        layer.moved[group.name] = float(
            (permutation != torch.arange(group.channels)).float().mean()
        )
        retained = 0.0
        total = 0.0
        for path in group.members:
            dense = linear_at(self.model, path).weight
            scores = saliency(dense, factors[path].to(dense.device))
            columns = permutation.to(dense.device)
            mask, weight = self._pruned(path, dense, scores, columns, statistics)
            layer.masks[path] = parallel.broadcast(mask).cpu()
            if weight is not None:
                layer.weights[path] = parallel.broadcast(weight)
            retained += saliency_sum(scores, mask)
            total += saliency_sum(scores)
        layer.retained[group.name] = retained / max(total, 1e-300)

    def _pruned(
        self,
        path: str,
        dense: Tensor,
        scores: Tensor,
        columns: Tensor,
        statistics: InputStatistics,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mask and the changed weight of a linear, both `(C_out, C_in)`.

        The weight is None if the mask alone changes the dense weight. `columns` is the permutation
        of the channels, int64 `(C_in,)`, `scores` the saliency.
        """
        config = self.job.config
        pruner = self.job.methods.pruner
        mask = None if self.masks is None else self.masks[path].to(dense.device)
        if pruner.updates_weights:
            weight, mask = pruner.update(dense, statistics, columns, config.pattern, mask)
        else:
            if mask is None:
                mask = permuted_nm_mask(scores, columns, config.pattern)
            if self.reconstruction is None:
                return mask, None
            weight = masked(mask, dense)
        if self.reconstruction is not None:
            pruned = PrunedLinear(dense, weight, mask, columns, config.pattern, statistics)
            weight = self.reconstruction.linear(pruned)
        weight = self.job.rounded(weight)
        names = f"pruner={config.pruner['name']} reconstruction={config.reconstruction['name']}"
        check_result(f"{names}: {path}", dense.shape, mask, columns, config.pattern, weight)
        return mask, weight

    def _permutation(self, group: ChannelGroup, factors: Mapping[str, SaliencyFactors]) -> Tensor:
        if self.permutations is not None:
            return self.permutations[group.name]
        job = self.job
        method: Any = job.methods.permutation  # a LocalPermutation
        scores = []
        with job.record.phase("permute", job.device):
            for path in group.members:
                weight = linear_at(self.model, path).weight
                scores.append(saliency(weight, factors[path].to(weight.device)))
            value = method.permutation(group.name, torch.cat(scores), job.config.pattern)
            return parallel.broadcast(value).cpu()


@contextmanager
def _comparing(
    model: nn.Module,
    groups: list[ChannelGroup],
    weights: dict[str, Tensor],
) -> Iterator[dict[str, float]]:
    """Measure the output error of each group while the dense layer runs; yield it by group."""
    device = next(model.parameters()).device
    sums = {group.name: torch.zeros(2, dtype=torch.float64, device=device) for group in groups}

    def add_squares(name: str, path: str, linear: Any, args: tuple[Tensor], output: Tensor) -> None:
        difference = nn.functional.linear(args[0], linear.weight - weights[path])
        reference = output if linear.bias is None else output - linear.bias
        parts = [part.float().square().sum().double() for part in (difference, reference)]
        sums[name] += torch.stack(parts)

    with ExitStack() as hooks:
        for group in groups:
            for path in group.members:
                hook = partial(add_squares, group.name, path)
                hooks.enter_context(linear_at(model, path).register_forward_hook(hook))
        errors: dict[str, float] = {}
        yield errors
    parallel.all_reduce(sums.values())  # each rank has read its share of the windows
    for name, (difference, reference) in sums.items():
        errors[name] = float(difference / reference.clamp_min(1e-300))


def record_pruning(job: Job, pruned: PrunedModel) -> None:
    """Write changed weights and measures of a pruned model to the record."""
    record = job.record
    if pruned.violations:
        log.warning(
            "the pruned model is not N:M: %d groups of M have more than N nonzeros",
            pruned.violations,
        )
    if job.methods.change_weights:
        _keep_weights(job)
    record.metrics |= _figures(job, pruned)


def _keep_weights(job: Job) -> None:
    for index, groups in by_layer(job.loaded.model, job.groups.pruned, "keep"):
        paths = [path for group in groups for path in group.members]
        if paths:
            weights = {
                path: job.rounded(linear_at(job.loaded.model, path).weight.data) for path in paths
            }
            job.record.write(layer_file(WEIGHTS, index), weights, save_tensors)


def _figures(job: Job, pruned: PrunedModel) -> dict[str, Any]:
    """Return the measures of a pruned model for `metrics.json`, before its evaluation."""
    patterns = recorded_patterns(job.groups.every, job.groups.pruned)
    of_model = sum(group.weights for group in job.groups.every)
    weights = sum(group.weights for group in job.groups.pruned)
    nonzeros = sum(int(mask.sum()) for mask in pruned.masks.values())
    return {
        "sparsity": {
            "pattern": str(job.config.pattern),
            **({"patterns": patterns} if patterns else {}),
            "fraction": (weights - nonzeros) / weights,
            "of_model": (weights - nonzeros) / of_model,
            "violations": pruned.violations,
            "weights_changed": job.methods.change_weights,
        },
        "retained_saliency": pruned.retained,
        "output_error": pruned.output_error,
        "moved_channels": pruned.moved,
    }
