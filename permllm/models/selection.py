"""Selection of the linears that a job prunes, and of their N:M (`keep_dense`, `sparsity_of`).

A name in these settings is the index of a decoder layer (`0`, `-1`), or consecutive words of the
path of a linear or a channel group: `down_proj`, `self_attn.o_proj`, `mlp`, `mlp.gate_up_proj`,
`model.layers.3`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from permllm.errors import ConfigError, DataError
from permllm.models.families import ChannelGroup
from permllm.settings.config import NMPattern

DENSE = "dense"
"""Pattern of a linear that was not pruned, in records."""


def pruned_groups(
    groups: list[ChannelGroup],
    pattern: NMPattern,
    keep_dense: Iterable[str],
    sparsity_of: Mapping[str, str],
) -> list[ChannelGroup]:
    """Return the channel groups to prune, with the members to prune and their patterns.

    Args:
        groups: all channel groups of the model.
        pattern: N:M of linears that `sparsity_of` does not name; their groups have no own pattern.
        keep_dense: names of linears that are not pruned; takes precedence over `sparsity_of`.
        sparsity_of: N:M by name.

    Raises:
        ConfigError: a name fits no linear; no linear is left to prune; two names give a linear two
            patterns; linears that read the same channels get different patterns.
    """
    dense: set[str] = set()
    for name in keep_dense:
        dense |= _named("keep_dense", name, groups)
    patterns: dict[str, NMPattern] = {}
    for name, text in sparsity_of.items():
        named_pattern = NMPattern.parse(text, f"sparsity_of.{name}")
        for path in sorted(_named("sparsity_of", name, groups) - dense):
            other = patterns.setdefault(path, named_pattern)
            if other != named_pattern:
                raise ConfigError(f"sparsity_of: names give {path} both {other} and {text}")
    pruned = _without_dense(groups, pattern, dense, patterns)
    if not pruned:
        raise ConfigError(
            f"keep_dense=[{','.join(keep_dense)}] names every linear of the decoder layers: "
            "nothing is left to prune"
        )
    return pruned


def recorded_groups(
    groups: list[ChannelGroup], pattern: NMPattern, patterns: Mapping[str, str]
) -> list[ChannelGroup]:
    """Return the channel groups that were pruned, from the patterns in a record or a checkpoint.

    Args:
        groups: all channel groups of the model.
        pattern: N:M of linears that are not in `patterns`.
        patterns: as `differing_patterns`.

    Raises:
        DataError: the model lacks a linear of `patterns`.
        ConfigError: linears that read the same channels have different patterns.
    """
    unknown = patterns.keys() - {path for group in groups for path in group.members}
    if unknown:
        raise DataError(f"its patterns name {min(unknown)}, but the model has no such linear")
    dense = {path for path, text in patterns.items() if text == DENSE}
    others = {path: NMPattern.parse(text) for path, text in patterns.items() if text != DENSE}
    return _without_dense(groups, pattern, dense, others)


def differing_patterns(groups: list[ChannelGroup], pruned: list[ChannelGroup]) -> dict[str, str]:
    """Return N:M, or `dense`, of the linears that were not pruned to the job's pattern, by path.

    Args:
        groups: all channel groups of the model.
        pruned: the pruned groups, as `pruned_groups` returns them.
    """
    own = {path: group.pattern for group in pruned for path in group.members}
    patterns = {path: own.get(path, DENSE) for group in groups for path in group.members}
    return {path: str(pattern) for path, pattern in patterns.items() if pattern is not None}


def _without_dense(
    groups: list[ChannelGroup], pattern: NMPattern, dense: set[str], patterns: dict[str, NMPattern]
) -> list[ChannelGroup]:
    pruned = []
    for group in groups:
        sizes = zip(group.members, group.rows, strict=True)
        rows = {path: count for path, count in sizes if path not in dense}
        own = {patterns.get(path, pattern) for path in rows}
        if len(own) > 1:
            raise ConfigError(
                f"sparsity_of: {', '.join(rows)} read the same channels: give all of them one "
                "pattern, or keep some dense"
            )
        for own_pattern in own:
            pruned.append(
                replace(
                    group,
                    members=tuple(rows),
                    rows=tuple(rows.values()),
                    pattern=None if own_pattern == pattern else own_pattern,
                )
            )
    return pruned


def _named(key: str, name: str, groups: list[ChannelGroup]) -> set[str]:
    """Return the paths of the linears that a name fits."""
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
        valid = ", ".join(sorted(members))
        raise ConfigError(
            f"{key}: the model has no {name!r}; expected a layer, 0 to {layers - 1}, or one of "
            f"{valid}"
        )
    return paths
