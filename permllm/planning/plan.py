"""Output of `plan=true`: channel groups, memory and minutes, without loading weights."""

from collections import Counter

import torch
from rich.table import Table

from permllm.command import terminal
from permllm.errors import ConfigError
from permllm.planning.footprint import Footprint
from permllm.planning.placement import FITS, first_that_fits, placement_for, placements
from permllm.planning.speed import speed_of

# Memory sizes of accelerators in GB.
_CARDS = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192)


def print_plan(of: Footprint) -> None:
    """Print the plan of a job. Raise ConfigError at its end if no placement fits."""
    console = terminal()
    console.print(_groups(of))
    pattern = of.config.pattern
    zeros = of.pruned * (pattern.m - pattern.n) / pattern.m
    share = zeros / sum(group.weights for group in of.groups.every)
    console.print(
        f"The model has {of.parameters} parameters. Pruned weights: {of.pruned} to {pattern}. "
        f"{share:.2%} of the linears' weights in the decoder layers become zeros."
    )
    fits = first_that_fits(of) is not None
    console.print(_estimates(of, fits))
    card = of.config.plan_on
    where = f"{card} with 16 cores" if card else f"{of.device}, as measured now"
    console.print(
        f"Estimates for {where}, without downloads. On CPUs memory was within 16 % of them. No GPU "
        "has confirmed them, and minutes are rough."
    )
    if not fits:
        raise ConfigError("plan=true: no model.placement fits")


def _groups(of: Footprint) -> Table:
    """Return the table of the channel groups that are pruned, alike ones in a row."""
    title = f"{of.config.model.name}: channel groups of the {of.layers} decoder layers"
    headings = ("group", "members", "channels", "rows", "layers")
    table = Table(*headings, title=title, title_justify="left")
    rows = Counter(
        (
            group.table.name,
            ", ".join(member.rpartition(".")[2] for member in group.members),
            str(group.channels),
            " + ".join(map(str, group.rows)),
        )
        for group in of.groups.pruned
    )
    for row, layers in rows.items():
        table.add_row(*row, str(layers))
    return table


def _estimates(of: Footprint, fits: bool) -> Table:
    """Return the table of memory, and of minutes if a placement fits."""
    speed = speed_of(of.config.plan_on, of.device, {of.compute_dtype, torch.float32})
    on_a_gpu = Footprint(of.config, of.model, of.methods, of.groups, torch.device("cuda"))
    placement = placement_for(of)
    names = placements(of)
    needs = [of.needs(name) for name in names]
    minutes = {name: of.minutes(name, speed) for name in names}

    title = "GB by phase and place of the layers' weights (model.placement)"
    table = Table("", title=title, title_justify="left")
    for name in names:
        verdict = " (chosen)" if fits else " (does not fit)"
        table.add_column(name + verdict * (name == placement), justify="right")
    if fits:
        table.add_column(f"minutes, {placement}", justify="right")
    for phase, of_phase in minutes[placement].items():
        sizes = [_gigabytes(need.phases[phase]) for need in needs]
        table.add_row(phase, *sizes, *[f"{of_phase:.1f}"] * fits)
    table.add_row("on the host", *[_gigabytes(need.host) for need in needs])
    table.add_row("peak", *[_gigabytes(need.peak) for need in needs])
    cards = [_card(on_a_gpu.needs(name).device) for name in names]
    table.add_row("on a GPU, a card of", *cards)
    if fits:
        totals = [f"{sum(minutes[name].values()):.0f}" for name in [*names, placement]]
        table.add_row("minutes", *totals)
    return table


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}"


def _card(size: int) -> str:
    """Return the smallest card on which a job of `size` bytes fits."""
    suitable = (f"{card} GB" for card in _CARDS if size <= card * 1e9 * FITS)
    return next(suitable, f"more than {_CARDS[-1]} GB")
