"""What a statistic is, and how a method is given those that it names: the classes in its `statistics`, here or anybody's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from copy import copy
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor


class InputStatistic(ABC):
    """Sums over what a channel group reads, which all of its members share.

    Args:
        channels: C_in.
        device: where the sums live.
        norm_tokens: tokens that count as one in a norm, see `InputStatistics`.
    """

    @abstractmethod
    def __init__(self, channels: int, device: torch.device | str, norm_tokens: int) -> None: ...

    @abstractmethod
    def update(self, rows: Tensor) -> None:
        """Add activations, `(tokens, C_in)`, float32 or wider."""

    @staticmethod
    def memory(channels: int) -> int:
        """Bytes that it takes for a group of so many channels, with what methods derive from it; for `plan=true`."""
        return 8 * channels


class GradientStatistic(ABC):
    """Sums over the gradients of one weight, a gradient for each calibration sample (`permllm.calibration.gradients`).

    Those of all linears exist at once, on the host: one number a weight is what fits.

    Args:
        shape: `(C_out, C_in)`.
        dtype: of the gradients, float32 or wider.
    """

    @abstractmethod
    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None: ...

    @abstractmethod
    def update(self, gradient: Tensor) -> None:
        """Add the gradient `(C_out, C_in)` of one sample's loss, on the host."""


Statistic: TypeAlias = InputStatistic | GradientStatistic
Statistics: TypeAlias = tuple[type[Statistic], ...]

_Kind = TypeVar("_Kind", bound=Statistic)


def input_kinds(kinds: Iterable[type[Statistic]]) -> list[type[InputStatistic]]:
    """Those of the statistics that are sums over inputs, each once."""
    return [kind for kind in dict.fromkeys(kinds) if issubclass(kind, InputStatistic)]


def gradient_kinds(kinds: Iterable[type[Statistic]]) -> list[type[GradientStatistic]]:
    """Those of the statistics that are sums over gradients, each once."""
    return [kind for kind in dict.fromkeys(kinds) if issubclass(kind, GradientStatistic)]


class InputStatistics:
    """The statistics that were asked for, of a channel group's inputs and, `of_linear`, of the gradients of a member.

    `statistics[Norm]` is the one of a class.

    Args:
        channels: C_in.
        device: where the sums live.
        kinds: the classes; those of gradients come with `of_linear`.
        norm_tokens: tokens that count as one in a norm: 1, or the length of a sample for the scale of the released code of
            Wanda, RIA and PermLLM, `sqrt(sum of squares over all tokens / number of samples)`.

    Attributes:
        tokens: that were added.
        norm_tokens: as given.
    """

    def __init__(
        self, channels: int, device: torch.device | str, kinds: Iterable[type[Statistic]] = (), norm_tokens: int = 1
    ) -> None:
        self.tokens = 0
        self.norm_tokens = norm_tokens
        self._of_inputs = [kind(channels, device, norm_tokens) for kind in input_kinds(kinds)]
        self._held: dict[type, Statistic] = {type(statistic): statistic for statistic in self._of_inputs}
        self._derived: dict[str, Tensor] = {}

    def update(self, x: Tensor) -> None:
        """Add the activations `x (..., C_in)`, any floating dtype."""
        rows = x.detach().flatten(0, -2)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self._derived.clear()
        self.tokens += rows.shape[0]
        for statistic in self._of_inputs:
            statistic.update(rows)

    def of_linear(self, gradients: Iterable[GradientStatistic]) -> InputStatistics:
        """The same sums, and those of the gradients of one member's weight."""
        view = copy(self)
        view._held = self._held | {type(statistic): statistic for statistic in gradients}
        return view

    def derived(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A quantity that follows from the inputs, computed for all members of the group the first time it is asked for."""
        if name not in self._derived:
            self._derived[name] = compute()
        return self._derived[name]

    def __getitem__(self, kind: type[_Kind]) -> _Kind:
        """The statistic of a class. Raises RuntimeError when it was not asked for."""
        found = self._held.get(kind)
        if not isinstance(found, kind):
            raise RuntimeError(f"{kind.__name__} was not asked for: the method must name it in its `statistics`")
        return found
