"""Selection of the linears that a job prunes (`keep_dense`), and its form in records.

A name in this setting is the index of a decoder layer (`0`, `-1`), or consecutive words of the path
of a linear or a channel group: `down_proj`, `self_attn.o_proj`, `mlp`, `mlp.gate_up_proj`,
`model.layers.3`.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from permllm.errors import ConfigError, DataError
from permllm.models.families import ChannelGroup

DENSE = "dense"
"""Value of a linear that was not pruned, in `patterns` of records and exports."""


def pruned_groups(groups: list[ChannelGroup], keep_dense: Iterable[str]) -> list[ChannelGroup]:
    """Return the channel groups to prune, with the members to prune.

    Args:
        groups: all channel groups of the model.
        keep_dense: names of linears that are not pruned.

    Raises:
        ConfigError: a name fits no linear, or no linear is left to prune.
    """
    dense: set[str] = set()
    for name in keep_dense:
        dense |= _named(name, groups)
    pruned = without_dense(groups, dense)
    if not pruned:
        raise ConfigError(
            f"keep_dense=[{','.join(keep_dense)}] names every linear of the decoder layers: "
            "nothing is left to prune"
        )
    return pruned


def recorded_groups(groups: list[ChannelGroup], patterns: Mapping[str, str]) -> list[ChannelGroup]:
    """Return the channel groups that were pruned, from `patterns` of a record or an export.

    Raises DataError if the model lacks a linear of `patterns`.
    """
    unknown = patterns.keys() - {path for group in groups for path in group.members}
    if unknown:
        raise DataError(f"its patterns name {min(unknown)}, but the model has no such linear")
    return without_dense(groups, {path for path, text in patterns.items() if text == DENSE})


def recorded_patterns(groups: list[ChannelGroup], pruned: list[ChannelGroup]) -> dict[str, str]:
    """Return `dense` by path for the linears of `groups` that are not pruned."""
    sparse = {path for group in pruned for path in group.members}
    return {path: DENSE for group in groups for path in group.members if path not in sparse}


def without_dense(groups: list[ChannelGroup], dense: Collection[str]) -> list[ChannelGroup]:
    """Return the groups without the members at the paths in `dense`; a group needs a member."""
    pruned = []
    for group in groups:
        sizes = zip(group.members, group.rows, strict=True)
        rows = {path: count for path, count in sizes if path not in dense}
        if rows:
            pruned.append(replace(group, members=tuple(rows), rows=tuple(rows.values())))
    return pruned


def _named(name: str, groups: list[ChannelGroup]) -> set[str]:
    layers = 1 + groups[-1].layer
    is_index = name.removeprefix("-").isdigit()
    paths = set()
    for group in groups:
        in_layer = name in (str(group.layer), str(group.layer - layers))
        for path in group.members:
            in_path = f".{name}." in f".{path}. .{group.name}."
            if in_layer or (in_path and not is_index):
                paths.add(path)
    if not paths:
        members = {path.rpartition(".")[2] for group in groups for path in group.members}
        raise ConfigError(
            f"keep_dense: the model has no {name!r}; expected a layer, 0 to {layers - 1}, or one "
            f"of {', '.join(sorted(members))}"
        )
    return paths
