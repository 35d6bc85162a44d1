"""Placement of a job's weights by the settings or the memory."""

import logging
import math

from permllm.planning.footprint import Footprint
from permllm.planning.speed import CARDS
from permllm.runtime.devices import processes_here
from permllm.runtime.memory import available_host_memory, free_memory
from permllm.settings.config import PLACEMENTS, Placement

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
    estimates. A warning says so.
    """
    name, reasons = first_that_fits(footprint)
    if name:
        if reasons:
            log.info("model.placement=%s, because %s", name, "; ".join(reasons))
        return name
    last = _allowed(footprint)[-1]
    log.warning("no model.placement fits: %s. Trying %s", "; ".join(reasons), last)
    return last


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
