"""Placement of a job's weights by the settings or the memory, and settings that need less."""

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from permllm.errors import ConfigError
from permllm.planning.footprint import Footprint
from permllm.planning.speed import CARDS
from permllm.pruning.methods import Methods, checked_groups, methods_of
from permllm.runtime import parallel
from permllm.runtime.devices import processes_here
from permllm.runtime.memory import available_host_memory, free_memory
from permllm.settings.config import PLACEMENTS, Placement, RunConfig

log = logging.getLogger(__name__)

# Largest estimate as a share of the memory, because estimates are right to within 15 %.
FITS = 0.85


def placements(footprint: Footprint) -> list[Placement]:
    """Return the placements that a job can have, from the fastest to the slowest."""
    if footprint.methods.needs_device:
        return ["device"]
    # One process has no other process to share layers with, and a random model has no files.
    without = {"sharded"} if parallel.world_size() == 1 else set()
    without |= {"disk"} if footprint.config.model.source == "random" else set()
    return [name for name in PLACEMENTS if name not in without]


def placement_for(footprint: Footprint) -> Placement:
    """Return the placement of a job's weights by the settings, or the first that fits.

    If no placement fits, the job tries the one that needs least memory, because needs are
    estimates. A warning then names settings that would fit.
    """
    name, reasons = _first_that_fits(footprint)
    if name:
        if reasons:
            log.info("model.placement=%s, because %s", name, "; ".join(reasons))
        return name
    last = _allowed(footprint)[-1]
    would = "; ".join(would_fit(footprint)) or "no other setting is known to fit"
    log.warning("no model.placement fits: %s. Trying %s; %s", "; ".join(reasons), last, would)
    return last


def fits(footprint: Footprint) -> bool:
    """Tell if the job fits in the memory with a placement that the settings allow."""
    return _first_that_fits(footprint)[0] is not None


def would_fit(footprint: Footprint) -> list[str]:
    """Return settings with which the job would fit, each with the memory that it needs."""
    suggestions = []
    for word, changed in _changes(footprint.config, footprint.methods):
        try:
            methods = methods_of(changed)
            checked_groups(changed, methods, footprint.model)
        except ConfigError:  # another setting of this job contradicts it
            continue
        other = Footprint(changed, footprint.model, methods, footprint.device)
        if name := _first_that_fits(other)[0]:
            needs = other.needs(name)
            sizes = f"{needs.device / 1e9:.1f} GB, and {needs.host / 1e9:.1f} GB on the host"
            suggestions.append(f"{word} would fit: {sizes}, with model.placement={name}")
    return suggestions


def _changes(config: RunConfig, methods: Methods) -> Iterator[tuple[str, RunConfig]]:
    """Yield settings that need less memory, and the config with each."""
    if config.model.placement != "auto":
        yield "model.placement=auto", replace(config, model=replace(config.model, placement="auto"))
    for group, method in methods.learned.items():
        smaller: dict[str, Any] = {"micro_batch_size": 1}
        if getattr(method, "layers_per_stage", None) == "all":
            smaller["layers_per_stage"] = 4
        for key, value in smaller.items():
            changed = {group: getattr(config, group) | {key: value}}
            yield f"{group}.{key}={value}", replace(config, **changed)
    if config.mask.get("name") == "score":
        lowrank = config.mask | {"name": "lowrank", "_target_": "permllm.mask.lowrank.LowRankMask"}
        yield "mask=lowrank", replace(config, mask=lowrank)
    if methods.mask.learned:
        lcp = {
            "name": "lcp",
            "_target_": "permllm.permutation.lcp.lcp.LCP",
            "constraint": "foldable",
            "block_size": config.block_size,
            "temperature": config.temperature,
        }
        mask = {"name": "pruner", "_target_": "permllm.mask.base.Mask"}
        yield "method=order-folded", replace(config, permutation=lcp, mask=mask)


def _allowed(footprint: Footprint) -> list[Placement]:
    """Return the placements that the settings allow."""
    placement = footprint.config.model.placement
    return placements(footprint) if placement == "auto" else [placement]


def _first_that_fits(footprint: Footprint) -> tuple[Placement | None, list[str]]:
    """Return the first placement that fits, or None, and why earlier ones do not fit."""
    device = footprint.device
    card = footprint.config.plan_on
    host: float = available_host_memory() // processes_here()
    if card:  # its host is unknown
        free = CARDS[card][-1] * 1e9
        host = math.inf
    else:
        free = host if device.type == "cpu" else free_memory(device)
    reasons = list[str]()
    for placement in _allowed(footprint):
        needs = footprint.needs(placement)
        on_device = needs.device
        on_host = needs.host
        if device.type == "cpu":
            on_device += on_host
            on_host = 0
        lacking = [
            f"{size / 1e9:.1f} GB, more than {FITS:.0%} of the {has / 1e9:.1f} GB free on {place}"
            for place, size, has in ((device, on_device, free), ("the host", on_host, host))
            if size > FITS * has
        ]
        if not lacking:
            return placement, reasons
        reasons.append(f"{placement} needs {lacking[0]}")
    return None, reasons
