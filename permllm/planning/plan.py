"""Output of `plan=true`: channel groups, stages, memory and minutes, without loading weights."""

from collections import Counter

import torch
from rich.table import Table

from permllm.command import terminal
from permllm.models.families import ChannelGroup
from permllm.planning.footprint import Footprint
from permllm.planning.placement import FITS, fits, placement_for, placements
from permllm.planning.speed import speed_of

# Memory sizes of accelerators in GB.
_CARDS = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192)


def print_plan(of: Footprint) -> None:
    """Print the plan of a job."""
    console = terminal()
    plan = of.orders
    config = of.config
    title = f"{config.model.name}: channel groups of the {of.layers} decoder layers"
    headings = "group", "members", "N:M", "channels", "rows", "blocks", "logits", "layers"
    table = Table(*headings, title=title, title_justify="left")
    for row, layers in Counter(_row(of, group) for group in of.groups).items():
        table.add_row(*row, str(layers))
    console.print(table)
    zeros = sum(count * (nm.m - nm.n) / nm.m for nm, count in of.weights.items())
    share = zeros / sum(group.channels * sum(group.rows) for group in of.every)
    pruned = ", ".join(f"{count} to {pattern}" for pattern, count in of.weights.items())
    console.print(
        f"The model has {of.parameters} parameters. Pruned weights: {pruned}. "
        f"{share:.2%} of the linears' weights in the decoder layers become zeros."
    )
    learns = "it learns only with permutation.layers_per_stage=all and all layers"
    for name in plan.stays if plan else []:
        console.print(f"{name} stays at its start: {learns}")
    for what, learn in {"permutations": plan, "masks": of.masks}.items():
        sizes = [len(span) for span in learn.spans] if learn else []
        if sizes:
            console.print(f"{what} learn {max(sizes)} layers at a time, {sum(sizes)} in all")
    console.print(_needs(of))
    where = f"{config.plan_on} with 16 cores" if config.plan_on else f"{of.device}, as measured now"
    console.print(
        f"Estimates for {where}, without downloads. On CPUs memory was within 15 % of them, and "
        "minutes within a factor of two. No GPU has confirmed them."
    )


def _row(of: Footprint, group: ChannelGroup) -> tuple[str, ...]:
    members = ", ".join(member.rsplit(".", 1)[-1] for member in group.members)
    learned = of.orders.columns[group.name] if of.orders else ("-", "-")
    pattern = str(group.pattern or of.config.pattern)
    rows = " + ".join(map(str, group.rows))
    return group.table.name, members, pattern, str(group.channels), rows, *learned


def _needs(of: Footprint) -> Table:
    """Return the table of memory by stage and placement, and of minutes by stage."""
    placement = placement_for(of)
    names = list(dict.fromkeys((*placements(of), placement)))
    needs = {name: of.needs(name) for name in names}
    speed = speed_of(of.config.plan_on, of.device, {of.products, of.dtype, torch.float32})
    minutes = {name: of.minutes(name, speed) for name in names}
    card = Footprint(of.config, of.model, of.methods, of.model_groups, torch.device("cuda"))
    choice = "chosen" if fits(of) else "does not fit"
    title = "GB by stage and place of the layers' weights (model.placement)"
    table = Table("", title=title, title_justify="left")
    for name in (*names, f"minutes, {placement}"):
        table.add_column(f"{name} ({choice})" if name == placement else name, justify="right")
    for stage in needs[placement].stages:
        sizes = (f"{needs[name].stages[stage] / 1e9:.2f}" for name in names)
        table.add_row(stage, *sizes, f"{minutes[placement][stage]:.1f}")
    table.add_row("on the host", *(f"{needs[name].host / 1e9:.2f}" for name in names))
    table.add_row("peak", *(f"{needs[name].peak / 1e9:.2f}" for name in names))
    table.add_row("on a GPU, a card of", *(_card(card.needs(name).device) for name in names))
    totals = (f"{sum(minutes[name].values()):.0f}" for name in (*names, placement))
    table.add_row("minutes", *totals)
    return table


def _card(size: int) -> str:
    """Return the smallest card on which a job of `size` bytes fits."""
    suitable = (f"{card} GB" for card in _CARDS if size <= card * 1e9 * FITS)
    return next(suitable, f"more than {_CARDS[-1]} GB")
