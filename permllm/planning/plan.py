"""Output of `plan=true`: channel groups, memory and minutes, without loading weights."""

from collections import Counter

import torch
from rich.table import Table

from permllm.command import terminal
from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup
from permllm.planning.footprint import Footprint
from permllm.planning.placement import FITS, first_that_fits, placement_for, placements
from permllm.planning.speed import speed_of

# Memory sizes of accelerators in GB.
_CARDS = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192)


def print_plan(of: Footprint) -> None:
    """Print the plan of a job. Raise ConfigError at its end if no placement fits."""
    console = terminal()
    config = of.config
    title = f"{config.model.name}: channel groups of the {of.layers} decoder layers"
    headings = "group", "members", "channels", "rows", "blocks", "logits", "layers"
    table = Table(*headings, title=title, title_justify="left")
    for row, layers in Counter(_row(of, group) for group in of.groups.pruned).items():
        table.add_row(*row, str(layers))
    console.print(table)
    pattern = config.pattern
    zeros = of.pruned * (pattern.m - pattern.n) / pattern.m
    share = zeros / sum(group.weights for group in of.groups.every)
    console.print(
        f"The model has {of.parameters} parameters. Pruned weights: {of.pruned} to {pattern}. "
        f"{share:.2%} of the linears' weights in the decoder layers become zeros."
    )
    if of.methods.allocation is not None:
        console.print(
            "After calibration the allocation decides which other linears stay dense. Here none."
        )
    for name in of.permutations.stays:
        console.print(
            f"{name} stays at its start: it learns only with permutation.layers_per_stage=all "
            "and all layers"
        )
    for what, plan in {"permutations": of.permutations, "masks": of.masks}.items():
        if plan.spans:
            console.print(f"{what} learn {plan.depth} layers at a time, {plan.layers} in all")
    fits = bool(first_that_fits(of)[0])
    console.print(_estimates(of, fits))
    where = f"{config.plan_on} with 16 cores" if config.plan_on else f"{of.device}, as measured now"
    console.print(
        f"Estimates for {where}, without downloads. On CPUs memory was within 16 % of them, and "
        "minutes within a factor of two. No GPU has confirmed them."
    )
    learned = of.methods.learned.values()
    if not of.on_a_host and any(method.activation_checkpointing is None for method in learned):
        console.print(
            "The memory of learning is the least: with more free memory a GPU keeps activations "
            "instead of computing them again."
        )
    if not fits:
        raise ConfigError("plan=true: no model.placement fits")


def _row(of: Footprint, group: ChannelGroup) -> tuple[str, ...]:
    return (
        group.table.name,
        ", ".join(member.rpartition(".")[2] for member in group.members),
        str(group.channels),
        " + ".join(map(str, group.rows)),
        *of.permutations.columns.get(group.name, ("-", "-")),
    )


def _estimates(of: Footprint, fits: bool) -> Table:
    """Return the table of memory by phase and placement, and of minutes if a placement fits."""
    speed = speed_of(of.config.plan_on, of.device, {of.compute_dtype, of.dtype, torch.float32})
    on_a_gpu = Footprint(of.config, of.model, of.methods, of.groups, torch.device("cuda"))
    placement = placement_for(of)
    choice = "chosen" if fits else "does not fit"
    title = "GB by phase and place of the layers' weights (model.placement)"
    table = Table("", title=title, title_justify="left")
    rest = ("on the host", "peak", "on a GPU, a card of", "minutes")
    columns = [[*of.phases(placement), *rest]]
    for name in dict.fromkeys((*placements(of), placement)):
        heading = f"{name} ({choice})" if name == placement else name
        table.add_column(heading, justify="right")
        needs = of.needs(name)
        sizes = (*needs.phases.values(), needs.host, needs.peak)
        card = _card(on_a_gpu.needs(name).device)
        minutes = sum(of.minutes(name, speed).values())
        columns.append([*(f"{size / 1e9:.2f}" for size in sizes), card, f"{minutes:.0f}"])
    if fits:
        table.add_column(f"minutes, {placement}", justify="right")
        minutes_by_phase = of.minutes(placement, speed).values()
        total = f"{sum(minutes_by_phase):.0f}"
        columns.append([*(f"{minutes:.1f}" for minutes in minutes_by_phase), "", "", "", total])
    rows = [*zip(*columns, strict=True)]
    for row in rows if fits else rows[:-1]:  # the last row has minutes
        table.add_row(*row)
    return table


def _card(size: int) -> str:
    """Return the smallest card on which a job of `size` bytes fits."""
    suitable = (f"{card} GB" for card in _CARDS if size <= card * 1e9 * FITS)
    return next(suitable, f"more than {_CARDS[-1]} GB")
