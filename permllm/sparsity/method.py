"""Base of all methods, and a function that makes a method from its settings."""

from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from math import ceil
from typing import Any

from pydantic import ValidationError

from permllm.errors import ConfigError, first_line
from permllm.settings.config import RunConfig
from permllm.settings.values import refusal
from permllm.sparsity.statistics import Statistics


class Method:
    """Base of pruners, allocations, permutations, masks and reconstructions.

    The settings of a method are the typed arguments of its class.

    Attributes:
        learned: the method trains.
        needs_dense_statistics: the method needs `calibration.statistics=dense`.
        statistics: classes of the statistics of the linears' inputs that the method needs.
        samples: number of windows to learn from; None: as many as for the statistics.
        skip: number of windows before them; None: 0.
        batch_size: windows in a step.
        micro_batch_size: windows in a forward of a step; None: all windows of the step.
        activation_checkpointing: backward recomputes each layer; None: if memory needs it.
        loss: name in `permllm.training.losses`; None: the method does not train, or by its own.
        select_from: number of last epochs whose result is measured; None: 0.
    """

    learned: bool = False
    needs_dense_statistics: bool = False
    statistics: Statistics = ()
    samples: int | None = None
    skip: int | None = None
    batch_size: int = 1
    micro_batch_size: int | None = None
    activation_checkpointing: bool | None = None
    loss: Any = None
    select_from: int | None = 0

    def validate(self, config: RunConfig) -> None:
        """Raise ConfigError if settings of the run and of this method contradict each other."""

    def check_groups(self, config: RunConfig, groups: list[Any], layers: int) -> None:
        """Raise ConfigError if the method cannot work on a model.

        Args:
            config: settings of the run.
            groups: pruned channel groups.
            layers: number of decoder layers.
        """

    def needs_device(self) -> str | None:
        """Return the reason why all weights must be on the device at once; None: no reason."""
        return None

    def steps_for(self, windows: int) -> int:
        """Return the number of steps of learning from some windows; by default, of one epoch."""
        return ceil(windows / self.batch_size)


def _nothing() -> None:
    """Return no object, for an option whose group does nothing."""


def instantiate(key: str, settings: Mapping[str, Any]) -> Any:
    """Return the object that the settings of a group name; None: the group does nothing.

    Args:
        key: name of the group, for messages.
        settings: `_target_`, the class or null, and its arguments, which may be such settings
            themselves; `name` is the name of the option and no argument.

    Raises:
        ConfigError: the class is not found, an argument is unknown, or a value is invalid.
    """
    arguments = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and "_target_" in value:
            arguments[name] = instantiate(f"{key}.{name}", value)
        elif name not in ("_target_", "name"):
            arguments[name] = value
    target = settings.get("_target_", "")
    module, _, name = str(target).rpartition(".")
    try:
        kind: Any = _nothing if target is None else getattr(import_module(module), name)
    except Exception as error:  # a third-party module may raise anything
        raise ConfigError(f"{key}: {target} cannot be imported: {first_line(error)}") from error
    try:
        return kind(**arguments)
    except ValidationError as error:
        raise refusal(error, arguments, key) from error
    except TypeError as error:
        for name, value in arguments.items():
            if name not in signature(kind).parameters:
                option = settings.get("name", target)
                raise ConfigError(
                    f"{key}.{name}={value}: {key}={option} has no such setting"
                ) from error
        raise ConfigError(f"{key}: {first_line(error)}") from error
