"""Placement of a job's weights by the settings or the memory."""

import logging

from permllm.planning.footprint import Footprint
from permllm.planning.speed import CARDS
from permllm.runtime.devices import processes_here
from permllm.runtime.memory import available_host_memory, free_memory
from permllm.settings.config import PLACEMENTS, Placement

log = logging.getLogger(__name__)

# Largest estimate as a share of the memory, because estimates are right to within 16 %.
FITS = 0.85


def placements(footprint: Footprint) -> list[Placement]:
    """Return the placement of the settings, or those that a job can have, the fastest first."""
    placement = footprint.config.model.placement
    if placement != "auto":
        return [placement]
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
    estimates. A warning says so.
    """
    name = first_that_fits(footprint)
    if name is None:
        name = placements(footprint)[-1]
        log.warning("no model.placement fits. Trying %s: plan=true shows what it needs", name)
    elif name != placements(footprint)[0]:
        log.info("model.placement=%s is the first that fits; plan=true shows what each needs", name)
    return name


def first_that_fits(footprint: Footprint) -> Placement | None:
    """Return the first placement that fits; None: none fits."""
    return next((name for name in placements(footprint) if _fits(footprint, name)), None)


def _fits(footprint: Footprint, placement: Placement) -> bool:
    needs = footprint.needs(placement)
    if card := footprint.config.plan_on:  # whose host is unknown
        return needs.device <= FITS * CARDS[card][-1] * 1e9
    host = FITS * available_host_memory() // processes_here()
    if footprint.on_a_host:
        return needs.device + needs.host <= host
    return needs.device <= FITS * free_memory(footprint.device) and needs.host <= host
