"""A job: the methods that its settings name, made and checked before anything is computed, and what its stages work on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from inspect import isabstract, signature
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permllm.config import RunConfig, check_divides, instantiate, instantiate_permutation
from permllm.errors import ConfigError, check_contract, check_one_of, check_whole
from permllm.models.checkpoint import check_dense
from permllm.models.families import ChannelGroup, decoder_layers, linear_at
from permllm.models.load import LoadedModel
from permllm.models.offload import placement_of
from permllm.models.selection import groups_to_prune
from permllm.permutation.foldable import check_segments, shared_orders
from permllm.permutation.from_file import FromFile
from permllm.permutation.lcp.settings import LCPSettings
from permllm.permutation.settings import Constraint
from permllm.pruning.footprint import FITS, Footprint, placements
from permllm.pruning.reconstruction import Reconstruction, trains_network
from permllm.runs.directory import Record
from permllm.runs.loggers import RunLogger
from permllm.runtime import parallel
from permllm.runtime.memory import available_host_memory, free_memory
from permllm.sparsity.calibrate import Pruner
from permllm.sparsity.statistics import InputStatistic
from permllm.training.settings import LearningSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Methods:
    """What a job prunes with.

    Attributes:
        pruner: the base pruner.
        permutation: finds the order of each channel group.
        mask: finds the masks, unless it leaves them to the pruner.
        reconstruction: changes the kept weights.
    """

    pruner: Pruner
    permutation: Any
    mask: Any
    reconstruction: Reconstruction

    @property
    def change_weights(self) -> bool:
        """Whether the kept weights become others than the dense model's."""
        return self.pruner.updates_weights or self.reconstruction.changes_weights

    @property
    def learned(self) -> dict[str, Any]:
        """What trains, by its group, in the order in which it does."""
        return {group: method for group in ("permutation", "mask") if (method := getattr(self, group)).learned}


@dataclass
class Job:
    """What the stages of a job work on.

    Attributes:
        config: of the job.
        methods: that it prunes with.
        record: what it leaves, in a run directory or in memory.
        logger: where its numbers stream to.
        loaded: the model, dense until it is pruned.
        groups: its channel groups that are pruned, all layers.
        products: dtype of matrix products before the evaluation.
    """

    config: RunConfig
    methods: Methods
    record: Record
    logger: RunLogger
    loaded: LoadedModel
    groups: list[ChannelGroup]
    products: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.loaded.model.device

    @property
    def permutation_key(self) -> str:
        """The setting that named the permutation."""
        return f"permutation={self.config.permutation.get('name')}"

    def weight(self, path: str) -> Tensor:
        """The present weight of a linear, on the host."""
        with placement_of(self.loaded.model).layer_of(path):
            return linear_at(self.loaded.model, path).weight.data.cpu()


def methods_of(config: RunConfig) -> Methods:
    """The methods that the settings name.

    Raises:
        ConfigError: one cannot be made or lacks what it will be asked for, or the masks would be made from other
            statistics than those that their order is learned with.
    """
    methods = Methods(
        instantiate(config.pruner),
        instantiate_permutation(config),
        instantiate(config.mask),
        instantiate(config.reconstruction),
    )
    _check_contracts(config, methods)
    statistics = config.calibration.statistics
    kept = methods.learned if methods.mask.local else methods.learned | {"mask": methods.mask}
    for group in kept if statistics != "dense" else ():
        raise ConfigError(
            f"calibration.statistics={statistics} is not valid with {group}={getattr(config, group)['name']}, which is "
            "found with dense statistics and keeps them"
        )
    return methods


def _check_contracts(config: RunConfig, methods: Methods) -> None:
    """Raise ConfigError where a method lacks what its protocol says: hours later would be late."""
    pruner, permutation = methods.pruner, methods.permutation
    key = f"pruner={config.pruner.get('name')}"
    check_contract(key, pruner, ("updates_weights",), ("factors",))
    _check_statistics(key, pruner)
    check_contract(key, pruner, (), ("update",) if pruner.updates_weights else ())
    key = f"permutation={config.permutation.get('name')}"
    check_contract(key, permutation, ("learned", "local"), ())
    check_contract(key, permutation, (), ("order",) if permutation.local else ("orders",))
    if permutation.learned:
        check_contract(key, permutation, (), ("orders", "plan"))
        check_whole(f"{key}: batch_size", getattr(permutation, "batch_size", None), 1)
    constraint = getattr(permutation, "constraint", "missing")
    if constraint is not None or not permutation.local:  # a file's is known once the groups are
        check_one_of(f"{key}: constraint", constraint, get_args(Constraint))
    key = f"mask={config.mask.get('name')}"
    check_contract(key, methods.mask, ("learned", "local"), ())
    if methods.mask.learned:
        check_contract(key, methods.mask, (), ("plan",))
        check_whole(f"{key}: batch_size", getattr(methods.mask, "batch_size", None), 1)
    if not methods.mask.local:
        check_contract(key, methods.mask, (), ("masks",))
        _check_statistics(key, methods.mask)
        if pruner.updates_weights and "mask" not in signature(pruner.update).parameters:  # type: ignore[attr-defined]
            raise ConfigError(
                f"{key} needs a pruner that corrects weights under given masks (`update` with an argument `mask`), "
                f"and pruner={config.pruner.get('name')} only does so under its own"
            )
    key = f"reconstruction={config.reconstruction.get('name')}"
    check_contract(key, methods.reconstruction, ("changes_weights", "learned"), ("linear", "network"))
    if methods.reconstruction.learned:
        check_whole(f"{key}: batch_size", getattr(methods.reconstruction, "batch_size", None), 1)
    _check_statistics(key, methods.reconstruction)
    reason = needs_device(config, methods)
    if reason and config.model.placement not in ("auto", "device"):
        raise ConfigError(f"{reason}, which needs model.placement=device")
    if config.model.placement == "sharded" and parallel.world_size() == 1 and not config.plan:
        raise ConfigError(
            "model.placement=sharded needs several processes: torchrun --nproc-per-node 2 run.py model.placement=sharded"
        )


def needs_device(config: RunConfig, methods: Methods) -> str | None:
    """What needs the weights of all layers at once, where they may come one layer at a time; None for nothing."""
    if trains_network(methods.reconstruction):
        return f"reconstruction={config.reconstruction.get('name')} trains all kept weights together"
    for group, method in methods.learned.items():
        if getattr(method, "activation_checkpointing", None) is False:
            return f"{group}.activation_checkpointing=false keeps all layers for backward"
    return None


def footprint_of(config: RunConfig, methods: Methods, model: PreTrainedModel, device: torch.device) -> Footprint:
    """What a job takes, from its model on the meta device."""
    parts = (methods.pruner, methods.permutation, methods.mask, methods.reconstruction)
    return Footprint(config, model, *parts, device)


def placement_for(footprint: Footprint, config: RunConfig, methods: Methods) -> str:
    """Where the weights of a job's model are to wait: what the settings say, or the first placement that fits here.

    Where none fits, that which needs least is tried, as estimates are no more than that; a warning says so.
    """
    if config.model.placement != "auto":
        return config.model.placement
    if needs_device(config, methods):
        return "device"
    candidates = placements(config)
    device, host = footprint.device, available_host_memory() // parallel.local_processes()
    free = free_memory(device) if device.type == "cuda" else host
    reasons: list[str] = []
    for name in candidates:
        needs = footprint.needs(name)
        asked = (needs.device, needs.host) if device.type == "cuda" else (needs.device + needs.host, 0)
        if asked[0] <= FITS * free and asked[1] <= FITS * host:
            if reasons:
                log.info("model.placement=%s, as %s", name, "; ".join(reasons))
            return name
        place, size, has = (str(device), asked[0], free) if asked[0] > FITS * free else ("the host", asked[1], host)
        reasons.append(f"{name} needs {size / 1e9:.1f} GB and {has / 1e9:.1f} GB are free on {place}")
    log.warning("no model.placement fits: %s. Trying %s", "; ".join(reasons), candidates[-1])
    return candidates[-1]


def _check_statistics(key: str, method: object) -> None:
    kinds = getattr(method, "statistics", None)
    if not isinstance(kinds, tuple) or not all(
        isinstance(kind, type) and issubclass(kind, InputStatistic) and not isabstract(kind) for kind in kinds
    ):
        kind = f"{type(method).__module__}.{type(method).__qualname__}"
        raise ConfigError(f"{key}: {kind} needs an attribute `statistics`, a tuple of classes of statistics")


def checked_groups(config: RunConfig, methods: Methods, model: PreTrainedModel) -> list[ChannelGroup]:
    """The channel groups of a model that are pruned, all layers.

    Raises:
        ConfigError: the model is pruned already, M does not divide what must hold whole groups of M, given orders lack one of
            them or do not fold as asked, or nothing would learn in any of them.
    """
    check_dense(config.model.path or config.model.name, model.config)
    groups, permutation = groups_to_prune(model, config), methods.permutation
    for group in groups:
        check_divides(group.pattern or config.pattern, group.channels, group.name)
    if not permutation.local:
        check_segments(shared_orders(groups, permutation.constraint), config.pattern)
    if isinstance(permutation, FromFile):
        permutation.check(groups, folds=config.export.form == "folded")
    for name, method in methods.learned.items():
        if isinstance(method, LearningSettings) and method.last_layers is not None:
            spans = method.spans(len(decoder_layers(model)))
            if not any(first <= group.layer < stop for group in groups for first, stop in spans):
                raise ConfigError(f"{name}.last_layers={method.last_layers}: keep_dense leaves nothing to learn in them")
    plan = permutation.plan(groups, len(decoder_layers(model))) if permutation.learned else None
    if plan is not None and isinstance(permutation, LCPSettings) and not plan.logits:
        raise ConfigError(
            f"no order would learn: {', '.join(plan.stays) or 'each'} learns only in a stage that holds all layers that share "
            "it, as by permutation.layers_per_stage=all and all layers"
        )
    return groups
