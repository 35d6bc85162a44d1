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


def print_plan(footprint: Footprint) -> None:
    """Print the plan of a job. Raise ConfigError at its end if no placement fits."""
    console = terminal()
    console.print(_groups(footprint))
    pattern = footprint.config.pattern
    zeros = footprint.pruned * (pattern.m - pattern.n) / pattern.m
    share = zeros / sum(group.weights for group in footprint.groups.every)
    console.print(
        f"The model has {footprint.parameters} parameters. Pruned weights: {footprint.pruned} to "
        f"{pattern}. "
        f"{share:.2%} of the linears' weights in the decoder layers become zeros."
    )
    fits = first_that_fits(footprint) is not None
    console.print(_estimates(footprint, fits))
    card = footprint.config.plan_on
    where = f"{card} with 16 cores" if card else f"{footprint.device}, as measured now"
    console.print(
        f"Estimates for {where}, without downloads. On CPUs memory was within 16 % of them. No GPU "
        "has confirmed them, and minutes are rough."
    )
    if not fits:
        raise ConfigError("plan=true: no model.placement fits")


def _groups(footprint: Footprint) -> Table:
    name = footprint.config.model.name
    title = f"{name}: channel groups of the {footprint.layers} decoder layers"
    headings = ("group", "members", "channels", "rows", "layers")
    table = Table(*headings, title=title, title_justify="left")
    rows = Counter(
        (
            group.table.name,
            ", ".join(member.rpartition(".")[2] for member in group.members),
            str(group.channels),
            " + ".join(map(str, group.rows)),
        )
        for group in footprint.groups.pruned
    )
    for row, layers in rows.items():
        table.add_row(*row, str(layers))
    return table


def _estimates(footprint: Footprint, fits: bool) -> Table:
    config = footprint.config
    speed = speed_of(config.plan_on, footprint.device, {footprint.compute_dtype, torch.float32})
    cuda = torch.device("cuda")
    on_a_gpu = Footprint(config, footprint.model, footprint.methods, footprint.groups, cuda)
    placement = placement_for(footprint)
    names = placements(footprint)
    needs = [footprint.needs(name) for name in names]
    minutes = {name: footprint.minutes(name, speed) for name in names}

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
    suitable = (f"{card} GB" for card in _CARDS if size <= card * 1e9 * FITS)
    return next(suitable, f"more than {_CARDS[-1]} GB")
