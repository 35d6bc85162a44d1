"""`plan=true`: channel groups, what learns, memory and minutes by stage, without weights."""

from __future__ import annotations

import torch
from rich.table import Table

from permllm.models.families import ChannelGroup
from permllm.pruning.footprint import Footprint
from permllm.pruning.placement import FITS, placement_for, placements, would_fit
from permllm.runtime.speed import speed_of
from permllm.runtime.terminal import terminal

# Sizes of accelerators' memory, GB.
_CARDS = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192)


def print_plan(of: Footprint) -> None:
    """Print the plan of a job."""
    console, config, plan = terminal(), of.config, of.orders
    table = Table(title=f"{config.model.name}: channel groups of each of the {of.layers} decoder layers", title_justify="left")
    for heading in ("group", "members", "N:M", "layers", "channels", "rows", "blocks", "logits"):
        table.add_column(heading, justify="right" if heading in ("channels", "rows", "blocks", "logits") else "left")
    alike: dict[tuple[str, ...], list[ChannelGroup]] = {}
    for group in of.groups:
        members = ", ".join(member.rsplit(".", 1)[-1] for member in group.members)
        alike.setdefault((group.table.name, members, str(group.pattern or config.pattern)), []).append(group)
    for words, groups in alike.items():
        name, rows = groups[0].name, " + ".join(map(str, groups[0].rows))
        learned = plan.columns[name] if plan else ("-", "-")
        table.add_row(*words, str(len({group.layer for group in groups})), str(groups[0].channels), rows, *learned)
    console.print(table)
    zeros = sum(count * (pattern.m - pattern.n) / pattern.m for pattern, count in of.weights.items())
    every = sum(group.channels * sum(group.rows) for group in of.every)
    patterns = ", ".join(f"{count} to {pattern}" for pattern, count in of.weights.items())
    console.print(
        f"{of.parameters} parameters; pruned are {patterns}: {zeros / every:.2%} of the layers' linears become zeros"
    )
    for name in plan.stays if plan else []:
        console.print(f"{name} stays where it starts: it learns only with permutation.layers_per_stage=all and all layers")
    for what, learn in {"orders": plan, "masks": of.masks}.items():
        if learn:
            most = max(stop - first for first, stop in learn.windows)
            console.print(f"{what} learn {most} layers at a time, of {sum(stop - first for first, stop in learn.windows)}")
    _print_needs(of)


def _print_needs(of: Footprint) -> None:
    """Print memory and minutes by stage, and settings that would fit where this job does not."""
    console, chosen = terminal(), placement_for(of)
    speed = speed_of(of.config.plan_on, of.device, {of.products, of.dtype, torch.float32})
    names = list(dict.fromkeys((*placements(of), chosen)))
    table = Table("", title="GB by stage and place of the layers' weights (model.placement)", title_justify="left")
    for name in names:
        table.add_column(f"{name}, taken here" if name == chosen else name, justify="right")
    table.add_column(f"minutes, {chosen}", justify="right")
    needs, times = {name: of.needs(name) for name in names}, {name: of.minutes(name, speed) for name in names}
    for stage in needs[chosen].stages:
        sizes = (f"{needs[name].stages[stage] / 1e9:.2f}" for name in names)
        table.add_row(stage, *sizes, f"{times[chosen][stage]:.1f}")
    table.add_row("on the host", *(f"{needs[name].host / 1e9:.2f}" for name in names), "")
    table.add_row("peak", *(f"{of.peak(name) / 1e9:.2f}" for name in names), "")
    card = Footprint(of.config, of.model, of.methods, torch.device("cuda"))
    table.add_row("a card of", *(_card(card.needs(name).device) for name in names), "")
    table.add_row("minutes", *(f"{sum(times[name].values()):.0f}" for name in names), f"{sum(times[chosen].values()):.0f}")
    console.print(table)
    where = f"{of.config.plan_on} with 16 cores" if of.config.plan_on else f"{of.device}, as measured now"
    console.print(f"estimates, memory within 15 %, minutes within a factor of two: {where}; model and texts are there already")
    for line in would_fit(of):
        console.print(line)


def _card(size: int) -> str:
    return next((f"{card} GB" for card in _CARDS if size <= card * 1e9 * FITS), f"more than {_CARDS[-1]} GB")
