"""Placement of a job's weights by the settings or the memory, and settings that need less."""

import logging
import math
from dataclasses import replace
from typing import Any

from permllm.errors import ConfigError
from permllm.planning.footprint import Footprint
from permllm.planning.speed import CARDS
from permllm.pruning.methods import Methods, checked_groups, methods_of
from permllm.runtime.devices import processes_here
from permllm.runtime.memory import available_host_memory, free_memory
from permllm.settings.config import PLACEMENTS, Placement, RunConfig

log = logging.getLogger(__name__)

# Largest estimate as a share of the memory, because estimates are right to within 16 %.
FITS = 0.85


def placements(footprint: Footprint) -> list[Placement]:
    """Return the placements that a job can have, from the fastest to the slowest."""
    if footprint.methods.needs_device:
        return ["device"]
    possible = list(PLACEMENTS)
    if footprint.ranks == 1:  # no other process to share layers with
        possible.remove("sharded")
    if footprint.config.model.source == "random":  # no files
        possible.remove("disk")
    return possible


def placement_for(footprint: Footprint) -> Placement:
    """Return the placement of a job's weights by the settings, or the first that fits.

    If no placement fits, the job tries the one that needs least memory, because needs are
    estimates. A warning then names settings that would fit.
    """
    name, reasons = first_that_fits(footprint)
    if name:
        if reasons:
            log.info("model.placement=%s, because %s", name, "; ".join(reasons))
        return name
    last = _allowed(footprint)[-1]
    would = "; ".join(would_fit(footprint)) or "no other setting is known to fit"
    log.warning("no model.placement fits: %s. Trying %s; %s", "; ".join(reasons), last, would)
    return last


def would_fit(footprint: Footprint) -> list[str]:
    """Return settings with which the job would fit, each with the memory that it needs."""
    suggestions = []
    for word, values in _changes(footprint.config, footprint.methods).items():
        changed = replace(footprint.config, **values)
        try:
            methods = methods_of(changed)
            groups = checked_groups(changed, methods, footprint.model)
        except ConfigError:  # another setting of this job contradicts it
            continue
        other = Footprint(changed, footprint.model, methods, groups, footprint.device)
        placement, _ = first_that_fits(other)
        if placement:
            needs = other.needs(placement)
            sizes = f"{needs.device / 1e9:.1f} GB, and {needs.host / 1e9:.1f} GB on the host"
            suggestions.append(f"{word} would fit: {sizes}, with model.placement={placement}")
    return suggestions


def _changes(config: RunConfig, methods: Methods) -> dict[str, dict[str, Any]]:
    """Return settings that need less memory, and the values of the config that each changes."""
    changes: dict[str, dict[str, Any]] = {}
    if config.model.placement != "auto":
        changes["model.placement=auto"] = {"model": replace(config.model, placement="auto")}
    for group in methods.learned:
        settings = getattr(config, group)
        changes[f"{group}.micro_batch_size=1"] = {group: settings | {"micro_batch_size": 1}}
        if settings.get("layers_per_stage") == "all":
            changes[f"{group}.layers_per_stage=4"] = {group: settings | {"layers_per_stage": 4}}
    lowrank = {"name": "lowrank", "_target_": "permllm.mask.lowrank.LowRankMask"}
    if config.mask.get("name") == "score":
        changes["mask=lowrank"] = {"mask": config.mask | lowrank}
    if methods.mask.learned:
        lcp = {
            "name": "lcp",
            "_target_": "permllm.permutation.lcp.lcp.LCP",
            "constraint": "foldable",
            "block_size": config.block_size,
            "temperature": config.temperature,
        }
        mask = {"name": "pruner", "_target_": "permllm.mask.base.Mask"}
        changes["method=order-folded"] = {"permutation": lcp, "mask": mask}
    return changes


def _allowed(footprint: Footprint) -> list[Placement]:
    """Return the placements that the settings allow."""
    placement = footprint.config.model.placement
    return placements(footprint) if placement == "auto" else [placement]


def first_that_fits(footprint: Footprint) -> tuple[Placement | None, list[str]]:
    """Return the first placement that fits, or None, and why earlier ones do not fit."""
    device = footprint.device
    card = footprint.config.plan_on
    host: float = available_host_memory() // processes_here()
    if card:
        on_card = CARDS[card][-1] * 1e9
        host = math.inf  # unknown
    reasons: list[str] = []
    for placement in _allowed(footprint):
        needs = footprint.needs(placement)
        if footprint.on_a_host:
            places = [(needs.device + needs.host, host, str(device))]
        else:
            free = on_card if card else free_memory(device)
            places = [(needs.device, free, str(device)), (needs.host, host, "the host")]
        lacks = [
            f"{placement} needs {size / 1e9:.1f} GB, more than {FITS:.0%} of the "
            f"{free / 1e9:.1f} GB free on {place}"
            for size, free, place in places
            if size > FITS * free
        ]
        if not lacks:
            return placement, reasons
        reasons.append(lacks[0])
    return None, reasons
