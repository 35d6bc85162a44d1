"""`plan=true`: the channel groups, the learnable parameters, memory and the least time, without weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rich.console import Console
from rich.table import Table

from permllm.config import NMPattern
from permllm.models.families import ChannelGroup
from permllm.pruning.footprint import FITS, Footprint, placements
from permllm.runtime.memory import host_memory
from permllm.runtime.precision import compute_dtype
from permllm.runtime.speed import copy_rate, product_rate
from permllm.runtime.terminal import terminal

# Sizes of accelerators' memory, GB.
_CARDS = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192)


def print_plan(footprint: Footprint, chosen: str, alone: str | None) -> None:
    """Print the plan of a run.

    Args:
        footprint: what it takes.
        chosen: the placement of its weights.
        alone: why no other than `device` is possible; None where all are.
    """
    console = terminal()
    config, plan = footprint.config, footprint.orders
    layers = footprint.layers
    table = Table(title=f"{config.model.name}: channel groups of each of the {layers} decoder layers", title_justify="left")
    for heading in ("group", "members", "channels", "rows", "blocks", "logits"):
        table.add_column(heading, justify="left" if heading in ("group", "members") else "right")
    of_parts = config.keep_dense or config.sparsity_of
    if of_parts:
        table.add_column("N:M")
        table.add_column("layers")
    alike: dict[tuple[str, ...], list[ChannelGroup]] = {}
    for group in footprint.groups:
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
    console.print(f"parameters             {footprint.parameters}, {_pruned(footprint.weights)}")
    if of_parts:
        zeros = sum(count * (pattern.m - pattern.n) / pattern.m for pattern, count in footprint.weights.items())
        share = zeros / sum(group.channels * sum(group.rows) for group in footprint.every)
        console.print(f"zeros                  {share:.2%} of all linears of the decoder layers")
    if config.model.bos:
        console.print("windows                begin with BOS, in calibration and perplexity")
    console.print(f"logits                 {plan.logits if plan else 0}")
    for name in plan.stays if plan else []:
        console.print(f"{name} stays where it starts: it learns only with permutation.layers_per_stage=all and all layers")
    windows = plan.windows if plan else []
    if windows:
        console.print(
            f"stages                 {len(windows)}, of at most {max(stop - first for first, stop in windows)} layers"
        )
    console.print(f"learnable parameters   {plan.parameters if plan else 0}")
    if footprint.masks:
        each = footprint.masks_by_window
        console.print(f"mask parameters        {sum(each)}, in stages of at most {max(each)}")
    if footprint.reconstructs:
        console.print(f"kept weights           {footprint.kept}, which learn together")
    needs = footprint.needs(chosen)
    console.print("memory (estimates, of the largest stage):" if len(windows) > 1 else "memory (estimates):")
    for stage, size in needs.stages.items():
        console.print(f"  {stage:<20} {size / 1e9:.2f} GB")
    console.print(f"  {'on host, beside it':<20} {needs.host / 1e9:.2f} GB")
    _print_placements(console, footprint, chosen, alone)


def _print_placements(console: Console, footprint: Footprint, chosen: str, alone: str | None) -> None:
    """Print what each placement of the weights needs, and how long products, or the copies that they hide, take."""
    device, on_a_host = footprint.device, footprint.device.type == "cpu"
    config = footprint.config
    dtype = compute_dtype(config.compute_dtype, getattr(torch, config.model.dtype), device)
    rate = product_rate(device, dtype)
    seconds = footprint.products / rate
    table = Table(title="where the layers' weights wait (model.placement)", title_justify="left")
    for heading in ("placement", *(("memory",) if on_a_host else ("device", "host")), "a card of", "products alone"):
        table.add_column(heading, justify="left" if heading == "placement" else "right")
    for placement in placements(config)[: None if alone is None else 1]:
        needs = footprint.needs(placement)
        peak = footprint.peak(placement)
        memory = [peak] if on_a_host else [peak, needs.host + host_memory()]
        takes = _duration(seconds)
        if placement == "host" and not on_a_host:
            takes = _duration(max(seconds, footprint.passes * footprint.streamed / copy_rate(device)))
        elif placement == "disk":
            takes = f"{takes}, {footprint.passes * footprint.streamed / 1e9:.0f} GB read"
        table.add_row(
            f"{placement}, taken here" if placement == chosen else placement,
            *(f"{size / 1e9:.2f} GB" for size in memory),
            _card(footprint.on_a_card(placement).device),
            takes,
        )
    console.print(table)
    console.print(f"at the {rate / 1e12:.2g} TFLOP/s of products in {str(dtype).removeprefix('torch.')} measured here")
    if alone is not None:
        console.print(alone)


def _card(size: int) -> str:
    return next((f"{card} GB" for card in _CARDS if size <= card * 1e9 * FITS), f"more than {_CARDS[-1]} GB")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
