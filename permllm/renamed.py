"""Settings that are called otherwise in records, and in earlier versions, than where they are typed: the one table of them.

A record keeps the keys that it always had, so that runs of all versions are read alike and keep their identities. For one
version an earlier key is still taken where it is typed, with a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from permllm.errors import ConfigError


@dataclass(frozen=True)
class Renamed:
    """A setting with two names.

    Attributes:
        old: its key in records and in earlier versions, dotted.
        new: its key where it is typed; the same where values alone were renamed.
        values: values that are called otherwise too, the typed one and that of records.
    """

    old: str
    new: str
    values: Mapping[Any, Any] = field(default_factory=dict)

    def recorded(self, value: Any) -> Any:
        """The value as records have it."""
        return next((old for new, old in self.values.items() if _same(new, value)), value)

    def typed(self, value: Any) -> Any:
        """The value as it is typed, for one of records."""
        return next((new for new, old in self.values.items() if _same(old, value)), value)


RENAMED = (
    Renamed("permutation.passes", "permutation.epochs"),
    Renamed("permutation.window", "permutation.layers_per_stage", {"all": "model", 1: "layer"}),
    Renamed("permutation.temperature_every", "permutation.temperature_every", {"epoch": "pass"}),
    Renamed("reconstruction.passes", "reconstruction.epochs"),
    Renamed("calibration.length", "calibration.seqlen"),
    Renamed("evaluation.perplexity.window", "evaluation.perplexity.seqlen"),
    Renamed("budget.passes", "budget.epochs"),
    Renamed("budget.length", "budget.seqlen"),
)


def typed_name(key: str) -> str:
    """What a setting of a record, by its dotted key, is called where it is typed."""
    return next((entry.new for entry in RENAMED if entry.old == key), key)


def recorded_name(key: str) -> str:
    """What a setting, by its dotted key where it is typed, is called in records."""
    return next((entry.old for entry in RENAMED if entry.new == key), key)


def typed_value(key: str, value: Any) -> Any:
    """The value of a setting of a record, by its dotted key there, as it is typed."""
    return next((entry.typed(value) for entry in RENAMED if entry.old == key), value)


def in_records(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Resolved settings with the keys and values that records have."""
    found: dict[str, Any] = _copied(settings)
    for entry, group, old, new in _places(found):
        if new in group:
            value = entry.recorded(group.pop(new))
            group[old] = value
    return found


def without_old_names(settings: Mapping[str, Any], typed: Iterable[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """Composed settings in which values of earlier keys stand under the new ones.

    Args:
        settings: composed, as plain values; a key of either name may be absent.
        typed: keys that were typed, dotted: two names with different values contradict each other only where both were.

    Returns:
        The settings, with the earlier keys as they are without a value, and a line for each earlier name that was used.

    Raises:
        ConfigError: a setting was typed under both names, with different values.
    """
    found, lines, given = _copied(settings), [], set(typed)
    for entry, group, old, new in _places(found):
        if old == new:
            value = group.get(new)
            if entry.typed(value) != value:
                group[new] = entry.typed(value)
                lines.append(
                    f"{entry.new}={value} is now {entry.new}={group[new]}; the earlier value is removed in the next version"
                )
        elif group.get(old) is not None:
            value = entry.typed(group[old])
            if entry.new in given and group.get(new) != value:
                raise ConfigError(
                    f"{entry.old}={group[old]} and {entry.new}={group[new]} are the same setting: give {entry.new} alone"
                )
            lines.append(
                f"{entry.old} is now {entry.new}: {entry.new}={value}; the earlier name is removed in the next version"
            )
            group[new], group[old] = value, None
    return found, lines


def old_keys(group: str) -> list[Renamed]:
    """The settings of a group that have an earlier name, by its dotted path."""
    return [entry for entry in RENAMED if entry.old != entry.new and entry.old.rpartition(".")[0] == group]


def is_left_over(group: Mapping[str, Any], key: str) -> bool:
    """Whether a key of a group, last parts only, is an earlier name without a value, beside the new one."""
    news = [
        entry.new.rpartition(".")[2] for entry in RENAMED if entry.old.rpartition(".")[2] == key and entry.old != entry.new
    ]
    return group.get(key) is None and any(new in group for new in news)


def _places(settings: Mapping[str, Any]) -> Iterator[tuple[Renamed, dict[str, Any], str, str]]:
    """Each renamed setting whose group is there, the group, and the last parts of both keys.

    A group whose class is somebody else's has settings of its own, unless both names stand in it.
    """
    package = __name__.partition(".")[0]
    for entry in RENAMED:
        path, _, old = entry.old.rpartition(".")
        new = entry.new.rpartition(".")[2]
        group: Any = settings
        for part in path.split("."):
            group = group.get(part) if isinstance(group, Mapping) else None
        if isinstance(group, dict):
            foreign = not str(group.get("_target_", package)).startswith(package)
            if not foreign or (old != new and old in group and new in group):
                yield entry, group, old, new


def _copied(value: Any) -> Any:
    return {key: _copied(part) for key, part in value.items()} if isinstance(value, Mapping) else value


def _same(left: Any, right: Any) -> bool:
    """Equal, and no truth value for a number."""
    return type(left) is type(right) and bool(left == right)
